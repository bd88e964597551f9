"""Where the service listens: Unix sockets, both families of addresses, and what can't be listened on."""

import asyncio
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.listening import ListenRefused, listening, url_of
from app.settings import Settings, SettingsInvalid
from pvt_client import AsyncClient, Client
from tests.app.conftest import png
from tests.app.processes import LIGHT, ROOT, serving

NAMES = "PVT_HOST and PVT_PORT"


def opened(host: str, port: int = 0, mode: int = 0o660) -> Any:
    return listening(host, port, mode, NAMES)


def refusal(host: str, port: int = 0) -> str:
    with pytest.raises(ListenRefused) as error, opened(host, port):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-sS", "-m", "30", *arguments], capture_output=True, text=True, check=True).stdout


def over(path: Path, url: str = "http://x/health/ready") -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        return client.get(url)


async def listed(url: str) -> list[str]:
    async with AsyncClient(url) as client:
        return [each.id for each in await client.models()]


@contextmanager
def interface() -> Iterator[tuple[str, int]]:
    """A link-local address of this machine, with its zone."""
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, index, _, scope, *_ = line.split()
        if scope == "20":
            name = socket.if_indextoname(int(index, 16))
            yield f"{':'.join(digits[n : n + 4] for n in range(0, 32, 4))}%{name}", int(index, 16)
            return
    pytest.skip("no interface has a link-local address")


def test_a_unix_socket_serves_curl_and_goes_with_the_service(tmp_path: Path, digits: Path) -> None:
    path = tmp_path / "pvt.sock"
    with serving(**LIGHT, host=f"unix:{path}", workers="2") as server:
        health = curl("--unix-socket", str(path), "http://localhost/health/live")
        image = f"image=@{digits / 'seven.png'}"
        answers = [curl("--unix-socket", str(path), "-F", image, "http://localhost/predict") for _ in range(4)]
        client = server.event("request")["client"]
        with Client(server.url) as sync:
            label = sync.predict((digits / "four.png").read_bytes()).best.label
        models = asyncio.run(listed(server.url))
        typed = subprocess.run([sys.executable, "-m", "cli", "predict", "--url", server.url, str(digits / "one.png")],
                               cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
        mode = stat.S_IMODE(path.stat().st_mode)
        code = server.stop()

    assert server.url == f"unix:{path}"
    assert '"live":true' in health
    assert all('"label":"7"' in answer for answer in answers)
    assert client == "ip:unix"
    assert label == "4"
    assert "pvt_v2_b0.digits" in models
    assert typed.returncode == 0, typed.stderr
    assert "one.png" in typed.stdout
    assert (mode, code) == (0o660, 0)
    assert not path.exists()


def test_a_socket_that_a_killed_service_left_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "pvt.sock"
    with serving(**LIGHT, host=f"unix:{path}") as killed:
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait(30)
        assert path.exists()
    with serving(**LIGHT, host=f"unix:{path}", socket_mode="666") as server:
        environment = {**os.environ, "PVT_HOST": f"unix:{path}"}
        command = [sys.executable, "-m", "app"]
        second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        still = over(path)
        mode = stat.S_IMODE(path.stat().st_mode)
        assert server.stop() == 0

    assert second.returncode == 2
    assert second.stderr == (
        f"pvt-serve: can't listen on unix:{path}, as PVT_HOST and PVT_PORT say: another process listens there; end it, "
        "or name another path\n"
    )
    assert (still.status_code, mode) == (200, 0o666)
    assert not path.exists()


def test_no_file_but_a_socket_that_nobody_listens_on_is_removed(tmp_path: Path) -> None:
    file, link, busy, other = (tmp_path / name for name in ("file", "link", "busy", "datagrams"))
    file.write_text("precious")
    link.symlink_to(file)
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        full.bind(str(busy))
        full.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for each in waiting:  # until its queue is full
            each.setblocking(False)
            each.connect_ex(str(busy))
        datagrams.bind(str(other))
        reasons = [refusal(f"unix:{each}") for each in (file, link, busy, other)]
        for each in waiting:
            each.close()

        assert "no socket" in reasons[0]
        assert "no socket" in reasons[1]
        assert "another process listens there" in reasons[2]
        assert all(each.exists() for each in (file, link, busy, other))
    assert file.read_text() == "precious"


def test_only_the_services_own_socket_is_removed_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "pvt.sock"
    with opened(f"unix:{path}") as (listener,):
        path.unlink()
        with opened(f"unix:{path}") as (successor,):
            listener.close()
            kept = path.stat()
            assert url_of(successor) == f"unix:{path}"
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
        assert not path.exists()
    assert stat.S_ISSOCK(kept.st_mode)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/pvt.sock", "No such file or directory; there is no such folder; make it first"),
        ("x" * 200, "AF_UNIX path too long"),
        ("", "remove it, or name another path"),
    ],
)
def test_a_path_that_can_hold_no_socket_is_one_clear_line(tmp_path: Path, name: str, reason: str) -> None:
    assert reason in refusal(f"unix:{tmp_path}/{name}")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("host", "reached", "url"),
    [
        ("127.0.0.1", ["127.0.0.1"], "http://127.0.0.1:"),
        ("0.0.0.0", ["127.0.0.1"], "http://0.0.0.0:"),  # noqa: S104  so that it is reached
        ("::", ["127.0.0.1", "::1"], "http://[::]:"),
        ("0::0", ["127.0.0.1", "::1"], "http://[::]:"),
        ("::1", ["::1"], "http://[::1]:"),
        ("[::1]", ["::1"], "http://[::1]:"),
        ("::ffff:127.0.0.1", ["127.0.0.1"], "http://[::ffff:127.0.0.1]:"),
    ],
)
def test_it_is_reached_where_the_address_says_and_nowhere_else(host: str, reached: Sequence[str], url: str) -> None:
    with opened(Settings(host=host).host) as (listener,):
        port = listener.getsockname()[1]
        found = []
        for address in ("127.0.0.1", "::1"):
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as client:
                if client.connect_ex((address, port)) == 0:
                    found.append(address)

        assert url_of(listener) == f"{url}{port}"
    assert found == reached


def test_a_name_is_listened_on_at_each_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(*_: object, **__: object) -> list[Any]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    with opened("both") as listeners:
        assert [each.getsockname()[0] for each in listeners] == ["::1", "127.0.0.1"]
        assert len({each.getsockname()[1] for each in listeners}) == 1

    create, refused = socket.create_server, list[int]()

    def taken_once(address: Any, **options: Any) -> socket.socket:
        if address[0] == "127.0.0.1" and not refused:
            refused.append(address[1])
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return create(address, **options)

    monkeypatch.setattr(socket, "create_server", taken_once)
    with opened("both") as listeners:
        assert len({each.getsockname()[1] for each in listeners}) == 1
        assert len(refused) == 1

    def absent(*_: object, **__: object) -> list[Any]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", absent)
    with opened("one") as listeners:
        assert [each.getsockname()[0] for each in listeners] == ["127.0.0.1"]


def test_both_families_reach_a_service_on_the_address_of_both() -> None:
    with serving(**LIGHT, host="::", workers="2") as server:
        port = httpx.URL(server.url).port
        answers = [httpx.post(f"http://{each}:{port}/predict", files={"image": png()}, timeout=60)
                   for each in ("127.0.0.1", "[::1]", "[::1]", "127.0.0.1")]  # fmt: skip
        clients = [server.event("request")["client"] for _ in answers]

    assert server.url == f"http://[::]:{port}"
    assert [each.status_code for each in answers] == [200] * 4
    assert clients == ["ip:127.0.0.1", "ip:::/64", "ip:::/64", "ip:127.0.0.1"]


def test_a_link_local_address_has_its_zone_in_the_url_that_curl_takes() -> None:
    with interface() as (address, index):
        with opened(address) as (listener,):
            url = url_of(listener)
            zone = socket.if_indextoname(index)
            name = listener.getsockname()[0]
            assert url == f"http://[{name}%25{zone}]:{listener.getsockname()[1]}"
        with serving(**LIGHT, host=address) as server:
            assert '"live":true' in curl("-g", f"{server.url}/health/live")
        assert "a link-local address needs its interface" in refusal(address.partition("%")[0])


def test_management_on_a_unix_socket_is_served_there_only(tmp_path: Path) -> None:
    path, public = tmp_path / "manage.sock", tmp_path / "public.sock"
    with serving(**LIGHT, host=f"unix:{public}", management_host=f"unix:{path}") as server:
        inside = over(path, "http://x/aliases")
        outside = over(public, "http://x/aliases")
        listening_line = next(each for each in server.seen if each["event"] == "listening")
        assert server.stop() == 0

    assert inside.status_code == 200
    assert outside.status_code == 403
    assert "the socket of PVT_MANAGEMENT_HOST only" in outside.json()["detail"]
    assert (listening_line["url"], listening_line["management"]) == (f"unix:{public}", f"unix:{path}")
    assert [*tmp_path.iterdir()] == []


def test_management_on_ipv6_has_its_brackets_and_knows_its_own_host() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as probe:
        port = probe.getsockname()[1]
    with serving(**LIGHT, host="::1", management_host="::1", management_port=str(port)) as server:
        inside = httpx.get(f"http://[::1]:{port}/aliases")
        outside = httpx.get(f"{server.url}/aliases")
        line = next(each for each in server.seen if each["event"] == "listening")

    assert (inside.status_code, outside.status_code) == (200, 403)
    assert line["management"] == f"http://[::1]:{port}"


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("no-such-host.invalid", "name an address or a host of this machine"),
        ("a..b", "name an address or a host of this machine"),
        ("192.0.2.1", "this machine has no such address"),
        ("2001:db8::1", "can't listen on [2001:db8::1]:0, as PVT_HOST and PVT_PORT say: "),
        ("fe80::1%no-such-interface", "name an address or a host of this machine"),
    ],
)
def test_a_host_that_is_none_of_this_machine_is_one_clear_line(host: str, reason: str) -> None:
    assert reason in refusal(host)


@pytest.mark.parametrize(("host", "workers"), [("127.0.0.1", "1"), ("::", "1"), ("::1", "2")])
def test_a_port_that_is_taken_is_one_clear_line_and_exit_2(host: str, workers: str) -> None:
    with opened("::") as (listener,):
        port = str(listener.getsockname()[1])
        environment = {**os.environ, "PVT_HOST": host, "PVT_PORT": port, "PVT_WORKERS": workers}
        command = [sys.executable, "-m", "app"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    place = f"[{host}]" if ":" in host else host
    assert done.returncode == 2
    assert done.stderr == (
        f"pvt-serve: can't listen on {place}:{port}, as PVT_HOST and PVT_PORT say: Address already in use; another "
        "process listens there; end it, or choose another port (0 takes a free one)\n"
    )


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("PVT_HOST", "unix:", "name the socket's file: unix:/run/pvt-serve.sock"),
        ("PVT_HOST", "http://127.0.0.1", "an address without a scheme"),
        ("PVT_MANAGEMENT_HOST", "unix:", "name the socket's file"),
        ("PVT_SOCKET_MODE", "rw-rw----", "three octal digits"),
        ("PVT_SOCKET_MODE", "888", "three octal digits"),
    ],
)
def test_a_setting_that_is_no_address_or_no_mode_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsInvalid, match=f"{name}={value}: .*{reason}"):
        Settings.from_environment()


def test_two_sockets_at_one_path_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVT_HOST", "unix:/tmp/one.sock")
    monkeypatch.setenv("PVT_MANAGEMENT_HOST", "unix:/tmp/one.sock")

    with pytest.raises(SettingsInvalid, match="PVT_MANAGEMENT_HOST is PVT_HOST"):
        Settings.from_environment()
