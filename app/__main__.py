"""`python -m app`: serve, as the environment says. `pvt-serve serve` does the same."""

from app.starting import Starting

if __name__ == "__main__":
    starting = Starting()  # before the imports, which take a while

import faulthandler
import os
import socket
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import structlog

from app import logs, systemd, tracing
from app.listening import ListenRefused, listening
from app.settings import PREFIX, Settings, SettingsInvalid
from app.supervisor import STARTUP_FAILURE, NoTemporaryFolder, supervise
from app.workers import Worker, WorkerGroup
from service.errors import BackendUnavailable, StoreNotWritable

_REFUSALS = (
    SettingsInvalid, StoreNotWritable, BackendUnavailable, ListenRefused, systemd.WrongSocket, NoTemporaryFolder,
)  # fmt: skip


class StartRefused(Exception):
    """A setting is wrong, or the address can't be listened on; the message says which and why."""


def main(starting: Starting) -> int:
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
        return _work(starting, int(index), WorkerGroup(Path(folder), int(size)), int(stop_pipe), listeners)
    if arguments.workers is not None:
        os.environ[f"{PREFIX}WORKERS"] = arguments.workers  # where the worker processes read it, too
    try:
        return serve(starting)
    except StartRefused as error:
        print(f"pvt-serve: {error}", file=sys.stderr)  # noqa: T201  there is no log yet
        return 2


def serve(starting: Starting) -> int:
    """Serve, with settings from the environment, until a signal stops it; returns the exit code.

    Raises:
        StartRefused: it can't.
    """
    faulthandler.enable()  # a crash of native code leaves the stack of each thread on standard error, as plain text
    try:
        settings = Settings.from_environment()
        logs.configure(settings.log_format, level=settings.log_level, secrets=settings.secrets)
        tracing.check()
        if settings.pull == "on_demand":
            settings.writable_store()
        return _listen_and_serve(settings, starting)
    except _REFUSALS as error:
        starting.give_up()
        raise StartRefused(str(error)) from error


def _listen_and_serve(settings: Settings, starting: Starting) -> int:
    mode = int(settings.socket_mode, 8)
    with starting.opened as stack:
        listeners, management = _passed(settings, stack)
        if not listeners:
            public = listening(settings.host, settings.port, mode, "PVT_HOST and PVT_PORT")
            listeners = stack.enter_context(public)
        if settings.grpc_port:  # each worker listens itself: whether it is free is known only here
            with listening(settings.host, settings.grpc_port, mode, "PVT_HOST and PVT_GRPC_PORT"):
                pass
        if settings.workers > 1:
            return supervise(settings, listeners)
        if settings.manages_apart and not management:
            names = "PVT_MANAGEMENT_HOST and PVT_MANAGEMENT_PORT"
            apart = listening(settings.management_host, settings.management_port, mode, names)
            management = stack.enter_context(apart)
        from app import server  # noqa: PLC0415  it imports torch, which a supervisor does not need

        server.run(settings, listeners, management, starting=starting)
    server.leave()  # after the file of a Unix socket was removed
    return 0


def _passed(settings: Settings, stack: ExitStack) -> tuple[list[socket.socket], list[socket.socket]]:
    """The sockets that systemd has opened, as its .socket units say: those for all, and those for management.

    These have the port of PVT_MANAGEMENT_PORT, or the path of PVT_MANAGEMENT_HOST.
    """
    found = [stack.enter_context(closing(each)) for each in systemd.passed_sockets()]
    names = [each.getsockname() for each in found]
    apart = [
        settings.is_for_management((str(name), None) if isinstance(name, str | bytes) else name[:2]) for name in names
    ]
    pairs = [*zip(found, apart, strict=True)]
    return [each for each, manages in pairs if not manages], [each for each, manages in pairs if manages]


def _work(starting: Starting, index: int, group: WorkerGroup, stop_pipe: int, listeners: Sequence[str]) -> int:
    """Serve as one of several workers, on sockets by their descriptors, until the supervisor stops it."""
    faulthandler.enable()
    settings = Settings.from_environment()
    logs.configure(settings.log_format, index, level=settings.log_level, secrets=settings.secrets)
    group.share_metrics(str(index))
    worker = Worker(group, index, stop_pipe)
    worker.watch(settings.exit_seconds)
    from app import server  # noqa: PLC0415  as above; the supervisor may stop it meanwhile

    sockets = [socket.socket(fileno=int(each)) for each in listeners]
    try:
        server.run(settings, sockets, worker=worker, starting=starting)
    except (BackendUnavailable, SettingsInvalid) as error:
        structlog.get_logger(component="worker").error("start_refused", reason=str(error))
        return STARTUP_FAILURE
    server.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(starting))
