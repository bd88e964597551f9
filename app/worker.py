"""`python -m app.worker`: one of several worker processes. Only the supervisor starts it."""

import socket
import sys
from pathlib import Path

import structlog

from app import logs
from app.engine_options import engine_options
from app.fleet import Fleet
from app.member import Member
from app.server import run
from app.settings import Settings
from app.supervisor import STARTUP_FAILURE
from service.errors import BackendUnavailable

log = structlog.get_logger(component="worker")


def main() -> None:
    """Serve until told to stop; the arguments are the worker's number, how many there are, their folder, two pipes."""
    index, size, folder, listener, watched = sys.argv[1:]
    settings = Settings.from_environment()
    logs.configure(settings.log_format, worker=int(index))
    try:
        engine_options(settings)
    except BackendUnavailable as error:
        log.error("start_refused", reason=str(error))  # noqa: TRY400  the reason is all there is to say
        sys.exit(STARTUP_FAILURE)
    fleet = Fleet(Path(folder), int(size))
    fleet.share_metrics(index)
    run(settings, socket.socket(fileno=int(listener)), member=Member(fleet, int(index), int(watched)))


if __name__ == "__main__":
    main()
