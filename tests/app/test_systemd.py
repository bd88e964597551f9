"""Sockets that systemd passes, and what it is told; its own tool passes them."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import systemd
from tests.app.processes import ROOT, serving

LIGHT: Any = {"backend": "torch", "precision": "float32", "instances": "1", "max_batch_size": "1"}
ACTIVATE = shutil.which("systemd-socket-activate")


class Notified:
    """The socket of which NOTIFY_SOCKET has the address."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(60)

    def next(self) -> str:
        return self.socket.recv(1000).decode()

    def until(self, message: str) -> list[str]:
        messages: list[str] = []
        while message not in messages:
            messages.append(self.next())
        return messages


@pytest.fixture
def notified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notified]:
    found = Notified(str(tmp_path_factory.mktemp("notify") / "socket"))
    with closing(found.socket):
        yield found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def test_systemd_hears_that_it_is_ready_that_it_moves_and_that_it_stops(notified: Notified) -> None:
    environment = {"NOTIFY_SOCKET": notified.socket.getsockname(), "WATCHDOG_USEC": "30000000"}
    with serving(environment=environment, **LIGHT) as server:
        assert notified.next() == "READY=1"
        assert notified.next() == "WATCHDOG=1"
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert server.stop() == 0
        assert {*notified.until("STOPPING=1")} <= {"WATCHDOG=1", "STOPPING=1"}


def test_without_a_watchdog_in_the_unit_or_for_another_process_none_is_sent(
    notified: Notified, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", notified.socket.getsockname())
    systemd.notify_watchdog()
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    systemd.notify_watchdog()
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    systemd.notify_watchdog()
    systemd.notify("STATUS=fine")

    assert [notified.next(), notified.next()] == ["WATCHDOG=1", "STATUS=fine"]


def test_nobody_who_listens_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for address in ("", str(tmp_path / "none"), "@none", "vsock:2:1", "relative"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        systemd.notify("READY=1")


@pytest.mark.skipif(not ACTIVATE, reason="needs systemd-socket-activate")
def test_it_serves_on_the_sockets_that_systemd_has_opened_with_two_workers_too(
    tmp_path_factory: pytest.TempPathFactory, notified: Notified
) -> None:
    path, port = tmp_path_factory.mktemp("run") / "socket", free_port()
    command = [str(ACTIVATE), f"--listen=127.0.0.1:{port}", f"--listen={path}"]
    settings = {**LIGHT, "workers": "2", "host": "192.0.2.1"}  # an address that this machine does not have
    environment = os.environ | {f"PVT_{name.upper()}": value for name, value in settings.items()}
    environment |= {"NOTIFY_SOCKET": notified.socket.getsockname(), "WATCHDOG_USEC": "30000000"}
    passed = [name for name in environment if name.startswith(("PVT_", "PATH", "NOTIFY_", "WATCHDOG_"))]
    command += [f"--setenv={name}" for name in passed]
    with subprocess.Popen(
        [*command, sys.executable, "-m", "app"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        try:
            while "Listening on" not in process.stderr.readline():
                pass
            # The first connection starts it, and is answered.
            over_tcp = httpx.get(f"http://127.0.0.1:{port}/health/live", timeout=60)
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=60) as client:
                over_unix = client.get("http://service/health/live")
            notified.until("READY=1")
            notified.until("WATCHDOG=1")
            process.terminate()
            notified.until("STOPPING=1")
            said = process.stderr.read()
        finally:
            process.kill()

    assert (over_tcp.status_code, over_unix.status_code) == (200, 200)
    assert process.returncode == 0
    assert f'"url":"http://127.0.0.1:{port}"' in said
    assert path.exists()  # it is systemd's


@pytest.mark.skipif(not ACTIVATE, reason="needs systemd-socket-activate")
def test_a_socket_that_can_not_be_served_on_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "socket"
    command = [str(ACTIVATE), "--datagram", f"--listen={path}", sys.executable, "-m", "app"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            while "Listening on" not in process.stderr.readline():
                pass
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
                client.sendto(b"x", str(path))
            said = process.stderr.read()
        finally:
            process.kill()

    assert process.returncode == 2
    assert said.splitlines()[-1] == (
        "pvt-serve: file descriptor 3 of LISTEN_FDS does not listen for streams; write ListenStream=, and Accept=no, "
        "in the .socket unit"
    )
