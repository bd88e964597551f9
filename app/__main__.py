"""`python -m app`: serve, as the environment says. `pvt-serve serve` does the same."""

import faulthandler
import os
import socket
import sys
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

import structlog

from app import logs
from app.settings import PREFIX, Settings, SettingsInvalid
from app.workers import STARTUP_FAILURE, Worker, WorkerGroup, supervise
from service.errors import BackendUnavailable, StoreNotWritable


class StartRefused(Exception):
    """A setting is wrong, or the address can't be listened on; the message says which and why."""


def main() -> int:
    """Serve until a signal stops it; 2 when a setting is wrong."""
    parser = ArgumentParser(
        prog="python -m app",
        description="Serve PVT-v2 models over HTTP. Settings are environment variables: docs/settings.md.",
    )
    parser.add_argument("--workers", metavar="N", help="processes that share the port; the same as PVT_WORKERS")
    parser.add_argument("--as-worker", nargs=5, help=SUPPRESS)  # the supervisor starts one of several with it
    arguments = parser.parse_args()
    if arguments.as_worker:
        return _work(*arguments.as_worker)
    if arguments.workers is not None:
        os.environ[f"{PREFIX}WORKERS"] = arguments.workers  # where the worker processes read it, too
    try:
        return serve()
    except StartRefused as error:
        print(f"pvt-serve: {error}", file=sys.stderr)  # noqa: T201  there is no log yet
        return 2


def serve() -> int:
    """Serve, with settings from the environment, until a signal stops it; returns the exit code.

    Raises:
        StartRefused: it can't.
    """
    faulthandler.enable()  # a crash of native code leaves the stack of each thread on standard error, as plain text
    try:
        settings = Settings.from_environment()
        logs.configure(settings.log_format, secrets=settings.secrets)
        if settings.pull == "on_demand":
            settings.writable_store()
        listeners = [_listen(settings.host, settings.port, "PVT_HOST and PVT_PORT")]
        if settings.grpc_port:  # each worker listens itself: whether it is free is known only here
            _listen(settings.host, settings.grpc_port, "PVT_HOST and PVT_GRPC_PORT").close()
        if settings.workers > 1:
            return supervise(settings, listeners[0])
        if port := settings.management_port:
            names = "PVT_MANAGEMENT_HOST and PVT_MANAGEMENT_PORT"
            listeners.append(_listen(settings.management_host, port, names))
        from app import server  # noqa: PLC0415  it imports torch, which a supervisor does not need

        server.run(settings, *listeners)
    except (SettingsInvalid, StoreNotWritable, BackendUnavailable) as error:
        raise StartRefused(str(error)) from error
    return 0


def _work(index: str, size: str, folder: str, listener: str, stop_pipe: str) -> int:
    """Serve as one of several workers until the supervisor stops it."""
    from app import server  # noqa: PLC0415  as above

    faulthandler.enable()
    settings = Settings.from_environment()
    logs.configure(settings.log_format, int(index), secrets=settings.secrets)
    group = WorkerGroup(Path(folder), int(size))
    group.share_metrics(index)
    try:
        worker = Worker(group, int(index), int(stop_pipe))
        worker.watch(settings.shutdown_seconds)
        server.run(settings, socket.socket(fileno=int(listener)), worker=worker)
    except BackendUnavailable as error:
        structlog.get_logger(component="worker").error("start_refused", reason=str(error))
        return STARTUP_FAILURE
    return 0


def _listen(host: str, port: int, names: str) -> socket.socket:
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise StartRefused(f"can't listen on {host}:{port}, as {names} say: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
