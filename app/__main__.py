"""`python -m app`: serve, as the environment says. `pvt-serve serve` does the same."""

import os
import sys
from argparse import ArgumentParser

from app.settings import PREFIX
from app.start import StartRefused, serve


def main() -> int:
    """Serve until a signal stops it; 2 when a setting is wrong."""
    parser = ArgumentParser(
        prog="python -m app",
        description="Serve PVT-v2 models over HTTP. Settings are environment variables: docs/settings.md.",
    )
    parser.add_argument("--workers", metavar="N", help="processes that share the port; the same as PVT_WORKERS")
    if (workers := parser.parse_args().workers) is not None:
        os.environ[f"{PREFIX}WORKERS"] = workers  # where the worker processes read it, too
    try:
        return serve()
    except StartRefused as error:
        print(f"pvt-serve: {error}", file=sys.stderr)  # noqa: T201  there is no log yet
        return 2


if __name__ == "__main__":
    sys.exit(main())
