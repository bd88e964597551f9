"""Where the service listens: TCP addresses of both families, or a Unix socket (decision 79)."""

import errno
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from ipaddress import IPv6Address
from pathlib import Path
from typing import Final

from app.settings import UNIX_PREFIX
from service.files import locked

BACKLOG: Final = 2048
_ALL_V6 = IPv6Address("::")
_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}  # a family of addresses that this machine does not have
_FREE_PORT_TRIES = 8
# What to do about the errors that strangers meet.
_ADVICE = {
    errno.EADDRINUSE: "another process listens there; end it, or choose another port (0 takes a free one)",
    errno.EADDRNOTAVAIL: "this machine has no such address; 127.0.0.1, 0.0.0.0 and :: are always there",
    errno.EINVAL: "a link-local address needs its interface, such as fe80::1%eth0",
    errno.EACCES: "this user may not; choose a port above 1023, or a folder that belongs to this user",
    errno.ENOENT: "there is no such folder; make it first",
}


class ListenRefused(Exception):
    """The service can't listen where the settings say; the message says where, why, and what to do."""


def url_of(listener: socket.socket) -> str:
    """The address as a client takes it: `http://host:port`, IPv6 in brackets with its zone, or `unix:/path`."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"{UNIX_PREFIX}{'@' + name[1:].decode() if isinstance(name, bytes) else name}"  # @: it has no file
    host, port = name[:2]
    if listener.family == socket.AF_INET6:
        zone = f"%25{socket.if_indextoname(name[3])}" if name[3] else ""  # RFC 6874
        host = f"[{host}{zone}]"
    return f"http://{host}:{port}"


@contextmanager
def listening(host: str, port: int, mode: int, names: str) -> Iterator[list[socket.socket]]:
    """Listen on every address of `host`, or on a Unix socket with the permissions `mode`, whose file goes at the end.

    `names` are those of the settings, for the messages.

    Raises:
        ListenRefused: it can't.
    """
    with ExitStack() as stack:
        try:
            if host.startswith(UNIX_PREFIX):
                listeners = [stack.enter_context(_unix(Path(host.removeprefix(UNIX_PREFIX)), mode))]
            else:
                listeners = [stack.enter_context(closing(each)) for each in _tcp(host, port)]
        except (OSError, ValueError) as error:
            place = host if host.startswith(UNIX_PREFIX) else f"{f'[{host}]' if ':' in host else host}:{port}"
            raise ListenRefused(f"can't listen on {place}, as {names} say: {_reason(error)}") from error
        yield listeners


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, socket.gaierror | UnicodeError):
        return f"{getattr(error, 'strerror', None) or 'that is no name'}; name an address or a host of this machine"
    if not isinstance(error, OSError):
        return str(error)
    advice = _ADVICE.get(error.errno or 0)
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"{reason}; {advice}" if advice else reason


def _tcp(host: str, port: int) -> Sequence[socket.socket]:
    """A socket for each address of `host`, all with the same port; `::` takes IPv4 too, as do mapped addresses."""
    tries = 1 if port else _FREE_PORT_TRIES
    while True:
        tries -= 1
        try:
            return _same_port(host, port)
        except OSError as error:  # a port that is free on one address may be taken on another
            if not tries or error.errno != errno.EADDRINUSE:
                raise


def _same_port(host: str, port: int) -> Sequence[socket.socket]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    with ExitStack() as opened:
        for family, *_, address in found:
            where = (address[0], listeners[0].getsockname()[1] if listeners else port, *address[2:])
            try:
                listener = socket.create_server(
                    where, family=family, backlog=BACKLOG, dualstack_ipv6=_takes_ipv4(family, str(address[0]))
                )
            except OSError as error:
                if error.errno in _ABSENT and (listeners or address is not found[-1][-1]):
                    continue  # `localhost` is often ::1 too, where there is no IPv6
                raise
            listeners.append(opened.enter_context(listener))
        opened.pop_all()
    return listeners


def _takes_ipv4(family: int, address: str) -> bool:
    if family != socket.AF_INET6 or not socket.has_dualstack_ipv6():
        return False
    v6 = IPv6Address(address.partition("%")[0])
    return v6 == _ALL_V6 or v6.ipv4_mapped is not None


@contextmanager
def _unix(path: Path, mode: int) -> Iterator[socket.socket]:
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no folder")
    listener = socket.socket(socket.AF_UNIX)
    with closing(listener):
        with locked(path.parent):  # two services that start at once must not remove each other's
            _remove_stale(path)
            before = os.umask(0o777 & ~mode)
            try:
                listener.bind(str(path))
            finally:
                os.umask(before)
            listener.listen(BACKLOG)
        own = path.stat()
        try:
            yield listener
        finally:
            with suppress(OSError):
                if os.path.samestat(path.stat(), own):  # else somebody has put another one there
                    path.unlink()


def _remove_stale(path: Path) -> None:
    """Remove the socket that a process which was killed has left. Raises ValueError if it must not be removed."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ValueError("the file there is no socket; remove it, or name another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # noqa: FBT003  the standard library's own signature
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its queue is full: it is alive
    raise ValueError("another process listens there; end it, or name another path")
