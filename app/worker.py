"""`python -m app.worker`: one of several worker processes. Only the supervisor starts it."""

import socket
import sys
from pathlib import Path

from app import logs
from app.fleet import Fleet
from app.member import Member
from app.server import run
from app.settings import Settings


def main() -> None:
    """Serve until told to stop; the arguments are the worker's number, how many there are, their folder, two pipes."""
    index, size, folder, listener, watched = sys.argv[1:]
    settings = Settings.from_environment()
    logs.configure(settings.log_format, worker=int(index))
    fleet = Fleet(Path(folder), int(size))
    fleet.share_metrics(index)
    run(settings, socket.socket(fileno=int(listener)), member=Member(fleet, int(index), int(watched)))


if __name__ == "__main__":
    main()
