"""`python -m app`: serve, as the environment says."""

import os
import sys
from argparse import ArgumentParser

from pydantic import ValidationError

from app import logs, supervisor
from app.listener import listen
from app.settings import PREFIX, Settings, UnknownSettingError


def main() -> int:
    """Serve until told to stop; 2 when a setting is wrong."""
    parser = ArgumentParser(
        prog="python -m app",
        description="Serve PVT-v2 models over HTTP. Settings are environment variables, such as PVT_PORT: see README.",
    )
    parser.add_argument("--workers", metavar="N", help="processes that share the port; the same as PVT_WORKERS")
    if (workers := parser.parse_args().workers) is not None:
        os.environ[f"{PREFIX}WORKERS"] = workers  # where the worker processes read it, too
    try:
        settings = Settings.from_environment()
    except UnknownSettingError as error:
        return _refuse(str(error))
    except ValidationError as error:
        return _refuse("; ".join(_told(str(e["loc"][0]), e["input"], e["msg"]) for e in error.errors()))
    logs.configure(settings.log_format)
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        return _refuse(f"can't listen on {where}, as PVT_HOST and PVT_PORT say: {error.strerror or error}")
    if settings.workers > 1:
        return supervisor.run(settings, listener)
    from app import server  # noqa: PLC0415  with it comes torch, which a supervisor does not need

    server.run(settings, listener)
    return 0


def _told(name: str, value: object, reason: str) -> str:
    shown = "" if name.endswith("_keys") else f"={value}"
    return f"{PREFIX}{name.upper()}{shown}: {reason}"


def _refuse(reason: str) -> int:
    print(f"pvt-serve: {reason}", file=sys.stderr)  # noqa: T201  there is no log yet
    return 2


if __name__ == "__main__":
    sys.exit(main())
