"""What systemd passes to a service, and is told by it: sockets that it listens on, and how the service is.

The protocols are those of `sd_listen_fds(3)` and `sd_notify(3)`, which stay as they are:
https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
"""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

_FIRST: Final = 3  # SD_LISTEN_FDS_START
_NUMBER, _FOR, _NAMES = "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"


class WrongSocket(Exception):
    """A socket that systemd passed can't be served on; the message says why, and what to do."""


def passed_sockets() -> list[socket.socket]:
    """The sockets that were passed to this process, once; empty without socket activation.

    Raises:
        WrongSocket: one of them does not listen.
    """
    number, process = (os.environ.pop(name, "") for name in (_NUMBER, _FOR))
    os.environ.pop(_NAMES, None)
    if process != str(os.getpid()) or not number.isdecimal():
        return []
    return [*_listening(range(_FIRST, _FIRST + int(number)))]


def _listening(descriptors: range) -> Iterator[socket.socket]:
    advice = "write ListenStream=, and Accept=no, in the .socket unit"
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # noqa: FBT003  the standard library's own signature
        try:
            passed = socket.socket(fileno=descriptor)
            listens = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise WrongSocket(f"file descriptor {descriptor} of LISTEN_FDS is no socket; {advice}") from error
        families = {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}
        if not listens or passed.type != socket.SOCK_STREAM or passed.family not in families:
            raise WrongSocket(f"file descriptor {descriptor} of LISTEN_FDS does not listen for streams; {advice}")
        yield passed


def notify(*assignments: str) -> None:
    """Send such as `READY=1` to systemd, if it started this process and waits for that; whatever fails is no error."""
    if address := os.environ.get("NOTIFY_SOCKET", ""):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)  # noqa: FBT003  the standard library's own signature
            channel.sendto("\n".join(assignments).encode(), "\0" + address[1:] if address[0] == "@" else address)


def notify_watchdog() -> None:
    """Send that the service moves, if the unit has WatchdogSec= for this process; call it once a second."""
    if "WATCHDOG_USEC" in os.environ and os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
        notify("WATCHDOG=1")
