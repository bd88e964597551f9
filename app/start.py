"""Settings, then the socket, then the server: what `python -m app` and `pvt-serve serve` both do."""

import socket

from pydantic import ValidationError

from app import logs, supervisor
from app.listener import listen
from app.settings import PREFIX, Settings, UnknownSettingError
from service.errors import BackendUnavailable, StoreNotWritable


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
        told = "; ".join(_told(*e["loc"], value=e["input"], reason=e["msg"]) for e in error.errors())
        raise StartRefused(told) from error


def serve() -> int:
    """Serve as the environment says until told to stop; gives the exit code.

    Raises:
        StartRefused: it can't.
    """
    settings = read_settings()
    logs.configure(settings.log_format)
    if settings.pull == "on_demand":
        _make_store(settings)
    listener = _listen(settings.host, settings.port, "PVT_HOST and PVT_PORT")
    if settings.workers > 1:
        return supervisor.run(settings, listener)
    from app import server  # noqa: PLC0415  with it comes torch, which a supervisor does not need
    from app.engine_options import engine_options  # noqa: PLC0415  the same

    try:
        engine_options(settings)
    except BackendUnavailable as error:
        raise StartRefused(str(error)) from error
    listeners = [listener]
    if port := settings.management_port:
        listeners.append(_listen(settings.management_host, port, "PVT_MANAGEMENT_HOST and PVT_MANAGEMENT_PORT"))
    server.run(settings, *listeners)
    return 0


def _make_store(settings: Settings) -> None:
    try:
        settings.writable_store()
    except StoreNotWritable as error:
        raise StartRefused(str(error)) from error


def _listen(host: str, port: int, names: str) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        told = f"can't listen on {host}:{port}, as {names} say: {error.strerror or error}"
        raise StartRefused(told) from error


def _told(*names: int | str, value: object, reason: str) -> str:
    if not names:  # what is wrong is how several go together
        return reason.removeprefix("Value error, ")
    name = str(names[0])
    shown = "" if name.endswith("_keys") else f"={value}"
    return f"{PREFIX}{name.upper()}{shown}: {reason}"
