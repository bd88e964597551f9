"""`python -m app.workers`: one of several worker processes. Only the supervisor starts it."""

import socket
import sys
from pathlib import Path

import structlog

from app import logs
from app.server import run
from app.settings import Settings
from app.workers.group import WorkerGroup
from app.workers.supervisor import STARTUP_FAILURE
from app.workers.worker import Worker
from service.errors import BackendUnavailable

log = structlog.get_logger(component="worker")


def main() -> None:
    """Serve until the supervisor stops it; the arguments: its number, how many there are, their folder, two pipes."""
    index, size, folder, listener, stop_pipe = sys.argv[1:]
    settings = Settings.from_environment()
    logs.configure(settings.log_format, worker=int(index))
    group = WorkerGroup(Path(folder), int(size))
    group.share_metrics(index)
    try:
        run(settings, socket.socket(fileno=int(listener)), worker=Worker(group, int(index), int(stop_pipe)))
    except BackendUnavailable as error:
        log.error("start_refused", reason=str(error))  # noqa: TRY400  the reason is all there is to say
        sys.exit(STARTUP_FAILURE)


if __name__ == "__main__":
    main()
