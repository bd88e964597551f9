"""The socket that the service listens on."""

import socket


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`.

    Raises:
        OSError: the address is taken, not this machine's, or not ours to take.
    """
    (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return socket.create_server(address[:2], family=family, backlog=2048)
