"""A network namespace for a test: its own loopback interface with any addresses, its own name server."""

import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from threading import Thread
from typing import TypeVar

import pytest

T = TypeVar("T")

_CLONE_NEWNET = 0x4000_0000  # linux/sched.h
NAME_SERVER = "127.0.0.53"
Names = Callable[[str], Sequence[str] | None]


def in_namespace(work: Callable[[], T], addresses: Sequence[str]) -> T:
    """What `work` returns, run on a thread in a namespace whose loopback interface has `addresses` too.

    Sockets, threads and processes that `work` makes are in it; it ends with them. Skips where none can be made.
    """

    def run() -> T:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            pytest.skip(f"no network namespace can be made: {os.strerror(ctypes.get_errno())}")
        lines = ["link set lo up", *(f"addr add {each} dev lo" for each in addresses)]
        try:
            subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no addresses can be set in a network namespace: {getattr(error, 'stderr', None) or error}")
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def with_resolver(folder: Path) -> list[str]:
    """A command's prefix that gives it `NAME_SERVER` as its only name server; skips the test where that can't be."""
    path = folder / "resolv.conf"
    path.write_text(f"nameserver {NAME_SERVER}\n")
    prefix = ["unshare", "--mount", "sh", "-c", f'mount --bind {path} /etc/resolv.conf && exec "$@"', "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made")
    return prefix


@contextmanager
def name_server(names: Names) -> Iterator[None]:
    """Answers every name with the addresses that `names` gives it, or with silence where that is None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((NAME_SERVER, 53))

        def serve() -> None:
            while True:
                question, sender = server.recvfrom(512)
                if not question:
                    return
                if answer := _answer(question, names):
                    server.sendto(answer, sender)

        thread = Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stop:
                stop.sendto(b"", (NAME_SERVER, 53))
            thread.join()


def _answer(question: bytes, names: Names) -> bytes | None:
    """The response of RFC 1035, 4.1, with a lifetime of 0 for every record."""
    end = question.index(b"\0", 12)
    labels, at = list[str](), 12
    while at < end:
        labels.append(question[at + 1 : at + 1 + question[at]].decode())
        at += 1 + question[at]
    (kind,) = struct.unpack_from("!H", question, end + 1)
    addresses = names(".".join(labels).lower())
    if addresses is None:
        return None
    packed = [
        each.packed for each in map(ip_address, addresses) if kind == (1 if isinstance(each, IPv4Address) else 28)
    ]
    records = [struct.pack("!HHHIH", 0xC00C, kind, 1, 0, len(each)) + each for each in packed]
    code = 0 if addresses else 3  # no such name
    head = struct.pack("!HHHHHH", *struct.unpack_from("!H", question), 0x8180 | code, 1, len(records), 0, 0)
    return head + question[12 : end + 5] + b"".join(records)
