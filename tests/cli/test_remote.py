"""`pvt-serve ps`, `load`, `unload`, `pin`, `unpin` and `top` on a service with keys, and with a port for management."""

import json
import re
from collections.abc import Callable, Iterator
from socket import create_server
from typing import Any

import httpx
import pytest

from tests.app.processes import post, serving
from tests.cli.conftest import Done, PvtServe
from tests.cli.terminals import on_terminal
from tests.conftest import ROOT
from tests.pvt_client.scripted import cut, response, scripted

DIGITS = "pvt_v2_b0.digits"
QUICK = {
    "PVT_BACKEND": "torch", "PVT_INSTANCES": "1", "PVT_MAX_BATCH_SIZE": "1", "PVT_PRECISION": "float32",
}  # fmt: skip
Manage = Callable[..., Done]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A service with both kinds of keys."""
    with serving(read_log=False, api_keys="reader", management_keys="manager", environment=QUICK) as server:
        yield server.url


@pytest.fixture
def manage(pvt_serve: PvtServe, url: str, monkeypatch: pytest.MonkeyPatch) -> Manage:
    """Runs a command for that service, with the management key."""
    monkeypatch.setenv("PVT_URL", url)
    monkeypatch.setenv("PVT_KEY", "manager")
    return pvt_serve


def states(url: str) -> dict[str, tuple[str, bool]]:
    """The state of each model of the store, and whether it is pinned, as the service tells."""
    models = httpx.get(f"{url}/models", headers={"Authorization": "Bearer reader"}).json()["models"]
    return {each["id"]: (each["state"], each.get("pinned", False)) for each in models if each["state"] != "remote"}


def test_models_are_loaded_pinned_and_unloaded(manage: Manage, url: str) -> None:
    loaded = manage("load", "pvt_v2_b0")
    assert states(url)[DIGITS] == ("ready", False)
    manage("pin", DIGITS)
    assert states(url)[DIGITS] == ("ready", True)
    refused = manage("unload", DIGITS)
    assert states(url)[DIGITS] == ("ready", True)
    manage("unpin", DIGITS)
    unloaded = manage("unload", DIGITS, "--json")
    assert states(url)[DIGITS] == ("available", False)

    assert re.fullmatch(rf"{DIGITS}@1: ready, torch float32, [0-9.,]+ MB\n", loaded.out)
    assert (refused.code, refused.out, "is pinned; unpin it" in refused.err) == (1, "", True)
    assert [each["state"] for each in json.loads(unloaded.out)["models"]] == ["available"]


def test_ps_lists_what_is_in_memory(manage: Manage, monkeypatch: pytest.MonkeyPatch) -> None:
    manage("unload", DIGITS)
    empty = manage("ps", "--key", "reader")
    manage("load", DIGITS)
    monkeypatch.setenv("COLUMNS", "80")
    titles, row = manage("ps", "--key", "reader").lines
    (model,) = json.loads(manage("ps", "--key", "reader", "--json").out)["models"]

    assert (empty.code, empty.out, "no model is in memory" in empty.err) == (0, "", True)
    assert titles.split()[:3] == ["model", "state", "MB"]
    assert row.split()[:2] == [f"{DIGITS}@1", "ready"]
    assert float(row.split()[2].replace(",", "")) == pytest.approx(model["memory_bytes"] / 1e6, abs=20)
    assert (model["leases"], [each["size"] for each in model["batch_plan"]]) == (0, [1])


def test_one_of_several_models_that_fails_leaves_the_others(manage: Manage) -> None:
    done, nothing = manage("load", DIGITS, "nothing"), manage("load", "nothing")

    assert (done.code, len(done.lines), "nothing: Model not found (404)" in done.err) == (3, 1, True)
    assert (nothing.code, nothing.out, nothing.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(("command", "key"), [("ps", "manager"), ("load", "reader"), ("load", "wrong")])
def test_a_key_of_the_other_kind_is_refused_in_a_line_that_says_which(manage: Manage, command: str, key: str) -> None:
    done = manage(command, *([DIGITS] if command == "load" else []), "--key", key)

    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert ("PVT_MANAGEMENT_KEYS" if command == "load" else "PVT_API_KEYS") in done.err
    assert "PVT_KEY" in done.err


def test_without_a_url_it_is_the_service_of_the_settings(
    pvt_serve: PvtServe, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("PVT_HOST", "0.0.0.0")  # noqa: S104  where it listens, which is no address to connect to
    monkeypatch.setenv("PVT_PORT", url.rpartition(":")[2])

    assert pvt_serve("ps", "--key", "reader").code == 0
    assert pvt_serve("load", DIGITS, "--key", "manager").code == 0
    monkeypatch.setenv("PVT_MANAGEMENT_PORT", "1")
    assert "not reached" in pvt_serve("load", DIGITS, "--key", "manager").err


def test_a_service_without_management_says_what_turns_it_on(pvt_serve: PvtServe, service_url: str) -> None:
    done = pvt_serve("pin", DIGITS, "--url", service_url)

    assert (done.code, done.err.count("\n"), "PVT_MANAGEMENT_KEYS" in done.err) == (1, 1, True)


def test_what_is_no_service_of_this_kind_is_said_to_be(pvt_serve: PvtServe) -> None:
    with scripted(response(200, b'{"hello": "there"}')) as other:
        for command in (["top"], ["load", "x"], ["ps"]):
            done = pvt_serve(*command, "--url", other.url)

            assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
            assert "is the URL right?" in done.err


def test_top_shows_the_last_minute_of_the_service(manage: Manage, url: str) -> None:
    image = (ROOT / "docs" / "digits" / "one.png").read_bytes()
    for _ in range(3):
        headers = {"Authorization": "Bearer reader", "Content-Type": "image/png"}
        assert httpx.post(f"{url}/predict", content=image, headers=headers, timeout=60).status_code == 200
    post(url, [("image", image)])  # without a key

    stats: dict[str, Any] = {"routes": []}
    while sum(each["requests"] for each in stats["routes"] if each["route"] == "/predict") < 4:
        stats = httpx.get(f"{url}/stats").json()  # made once a second
    shown = manage("top")
    (as_json,) = manage("top", "--json").lines

    assert shown.code == 0
    assert max(map(len, shown.lines)) <= 80
    row = next(line.split() for line in shown.lines if line.startswith("/predict"))
    titles = next(line for line in shown.lines if line.startswith("route")).replace(" ms", "").replace("per s", "rate")
    found = dict(zip(titles.split(), row, strict=True))
    assert (int(found["requests"]), int(found["4xx"])) >= (4, 1)
    assert float(found["p50"]) <= float(found["p99"])
    assert f"of {stats['instances']['total']} instances busy" in shown.out
    assert any(line.startswith(DIGITS) for line in shown.lines)
    assert {*json.loads(as_json)} == {*stats}


def test_top_on_a_terminal_goes_on_until_ctrl_c_even_if_the_service_goes(url: str) -> None:
    answer = response(200, httpx.get(f"{url}/stats").content)
    with (
        scripted(answer, cut) as server,
        on_terminal("top", "--url", server.url, "--seconds", "0.1") as top,
    ):
        top.until("requests in flight")
        top.until("trying again: ")
        server.behaviours[:] = [answer]
        top.seen = ""
        top.until("http")
        top.interrupt()

        assert top.ended() == 0
        assert "\x1b[?1049l" in top.seen  # the terminal is as it was


def test_management_on_a_port_of_its_own_needs_no_key(pvt_serve: PvtServe, monkeypatch: pytest.MonkeyPatch) -> None:
    with create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    monkeypatch.setenv("PVT_MANAGEMENT_PORT", port)
    with serving(read_log=True, environment=QUICK) as server:
        monkeypatch.setenv("PVT_PORT", server.url.rpartition(":")[2])
        done, elsewhere = pvt_serve("load", DIGITS), pvt_serve("load", DIGITS, "--url", server.url)
        listed = pvt_serve("ps")

    assert (done.code, "ready" in done.out, DIGITS in listed.out) == (0, True, True)
    assert (elsewhere.code, f"on port {port} only" in elsewhere.err) == (1, True)
