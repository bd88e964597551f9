"""Settings, then the socket, then the server: what `python -m app` and `pvt-serve serve` both do."""

import socket

from app import logs
from app.settings import Settings, SettingsInvalid
from app.workers import supervisor
from service.errors import BackendUnavailable, StoreNotWritable


class StartRefused(Exception):
    """A setting is wrong, or the address can't be listened on; the message says which and why."""


def serve() -> int:
    """Serve, with settings from the environment, until a signal stops it; returns the exit code.

    Raises:
        StartRefused: it can't.
    """
    try:
        settings = Settings.from_environment()
    except SettingsInvalid as error:
        raise StartRefused(str(error)) from error
    logs.configure(settings.log_format)
    if settings.pull == "on_demand":
        _make_store(settings)
    listeners = [_listen(settings.host, settings.port, "PVT_HOST and PVT_PORT")]
    if settings.workers > 1:
        return supervisor.run(settings, listeners[0])
    from app import server  # noqa: PLC0415  it imports torch, which a supervisor does not need

    if port := settings.management_port:
        listeners.append(_listen(settings.management_host, port, "PVT_MANAGEMENT_HOST and PVT_MANAGEMENT_PORT"))
    try:
        server.run(settings, *listeners)
    except BackendUnavailable as error:
        raise StartRefused(str(error)) from error
    return 0


def _make_store(settings: Settings) -> None:
    try:
        settings.writable_store()
    except StoreNotWritable as error:
        raise StartRefused(str(error)) from error


def _listen(host: str, port: int, names: str) -> socket.socket:
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise StartRefused(f"can't listen on {host}:{port}, as {names} say: {error.strerror or error}") from error
