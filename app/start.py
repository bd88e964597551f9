"""Settings, then the socket, then the server: what `python -m app` and `pvt-serve serve` both do."""

from pydantic import ValidationError

from app import logs, supervisor
from app.listener import listen
from app.settings import PREFIX, Settings, UnknownSettingError


class StartRefused(Exception):
    """A setting is wrong, or the address can't be listened on; the message says which and why."""


def read_settings() -> Settings:
    """The settings that the environment gives.

    Raises:
        StartRefused: one is unknown or out of bounds.
    """
    try:
        return Settings.from_environment()
    except UnknownSettingError as error:
        raise StartRefused(str(error)) from error
    except ValidationError as error:
        told = "; ".join(_told(str(e["loc"][0]), e["input"], e["msg"]) for e in error.errors())
        raise StartRefused(told) from error


def serve() -> int:
    """Serve as the environment says until told to stop; gives the exit code.

    Raises:
        StartRefused: it can't.
    """
    settings = read_settings()
    logs.configure(settings.log_format)
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        told = f"can't listen on {where}, as PVT_HOST and PVT_PORT say: {error.strerror or error}"
        raise StartRefused(told) from error
    if settings.workers > 1:
        return supervisor.run(settings, listener)
    from app import server  # noqa: PLC0415  with it comes torch, which a supervisor does not need

    server.run(settings, listener)
    return 0


def _told(name: str, value: object, reason: str) -> str:
    shown = "" if name.endswith("_keys") else f"={value}"
    return f"{PREFIX}{name.upper()}{shown}: {reason}"
