"""`python -m app`: serve, as the environment says. `pvt-serve serve` does the same."""

import faulthandler
import os
import socket
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import structlog

from app import logs
from app.listening import ListenRefused, listening
from app.settings import PREFIX, Settings, SettingsInvalid
from app.supervisor import STARTUP_FAILURE, NoTemporaryFolder, supervise
from app.workers import Worker, WorkerGroup
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
    parser.add_argument("--as-worker", nargs="+", help=SUPPRESS)  # the supervisor starts one of several with it
    arguments = parser.parse_args()
    if arguments.as_worker:
        index, size, folder, stop_pipe, *listeners = arguments.as_worker
        return _work(int(index), WorkerGroup(Path(folder), int(size)), int(stop_pipe), listeners)
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
        logs.configure(settings.log_format, level=settings.log_level, secrets=settings.secrets)
        if settings.pull == "on_demand":
            settings.writable_store()
        return _listen_and_serve(settings)
    except (SettingsInvalid, StoreNotWritable, BackendUnavailable, ListenRefused, NoTemporaryFolder) as error:
        raise StartRefused(str(error)) from error


def _listen_and_serve(settings: Settings) -> int:
    mode = int(settings.socket_mode, 8)
    with ExitStack() as stack:
        public = listening(settings.host, settings.port, mode, "PVT_HOST and PVT_PORT")
        listeners = stack.enter_context(public)
        if settings.grpc_port:  # each worker listens itself: whether it is free is known only here
            with listening(settings.host, settings.grpc_port, mode, "PVT_HOST and PVT_GRPC_PORT"):
                pass
        if settings.workers > 1:
            return supervise(settings, listeners)
        management: list[socket.socket] = []
        if settings.manages_apart:
            names = "PVT_MANAGEMENT_HOST and PVT_MANAGEMENT_PORT"
            apart = listening(settings.management_host, settings.management_port, mode, names)
            management = stack.enter_context(apart)
        from app import server  # noqa: PLC0415  it imports torch, which a supervisor does not need

        server.run(settings, listeners, management)
    server.leave()  # after the file of a Unix socket was removed
    return 0


def _work(index: int, group: WorkerGroup, stop_pipe: int, listeners: Sequence[str]) -> int:
    """Serve as one of several workers, on sockets by their descriptors, until the supervisor stops it."""
    from app import server  # noqa: PLC0415  as above

    faulthandler.enable()
    settings = Settings.from_environment()
    logs.configure(settings.log_format, index, level=settings.log_level, secrets=settings.secrets)
    group.share_metrics(str(index))
    try:
        worker = Worker(group, index, stop_pipe)
        worker.watch(settings.exit_seconds)
        server.run(settings, [socket.socket(fileno=int(each)) for each in listeners], worker=worker)
    except BackendUnavailable as error:
        structlog.get_logger(component="worker").error("start_refused", reason=str(error))
        return STARTUP_FAILURE
    server.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
