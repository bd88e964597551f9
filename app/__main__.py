"""`python -m app`: serve, as the environment says."""

import os
import socket
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
        return _refuse("; ".join(_told(*e["loc"], value=e["input"], reason=e["msg"]) for e in error.errors()))
    logs.configure(settings.log_format)
    try:
        listener = _listen(settings.host, settings.port, "PVT_HOST and PVT_PORT")
        management = [
            _listen(settings.management_host, port, "PVT_MANAGEMENT_HOST and PVT_MANAGEMENT_PORT")
            for port in (settings.management_port,)
            if port
        ]
    except OSError as error:
        return _refuse(str(error))
    if settings.workers > 1:
        return supervisor.run(settings, listener)
    from app import server  # noqa: PLC0415  with it comes torch, which a supervisor does not need

    server.run(settings, listener, *management)
    return 0


def _listen(host: str, port: int, names: str) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        raise OSError(f"can't listen on {host}:{port}, as {names} say: {error.strerror or error}") from error


def _told(*names: int | str, value: object, reason: str) -> str:
    if not names:  # what is wrong is how several go together
        return reason
    name = str(names[0])
    shown = "" if name.endswith("_keys") else f"={value}"
    return f"{PREFIX}{name.upper()}{shown}: {reason}"


def _refuse(reason: str) -> int:
    print(f"pvt-serve: {reason}", file=sys.stderr)  # noqa: T201  there is no log yet
    return 2


if __name__ == "__main__":
    sys.exit(main())
