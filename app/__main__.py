"""`python -m app`: serve, as the environment says."""

import sys
from argparse import ArgumentParser

from pydantic import ValidationError

from app import logs
from app.server import listen, run
from app.settings import PREFIX, Settings, UnknownSettingError


def main() -> int:
    """Serve until told to stop; 2 when a setting is wrong."""
    ArgumentParser(
        prog="python -m app",
        description="Serve PVT-v2 models over HTTP. Settings are environment variables, such as PVT_PORT: see README.",
    ).parse_args()
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
    run(settings, listener)
    return 0


def _told(name: str, value: object, reason: str) -> str:
    shown = "" if name.endswith("_keys") else f"={value}"
    return f"{PREFIX}{name.upper()}{shown}: {reason}"


def _refuse(reason: str) -> int:
    print(f"pvt-serve: {reason}", file=sys.stderr)  # noqa: T201  there is no log yet
    return 2


if __name__ == "__main__":
    sys.exit(main())
