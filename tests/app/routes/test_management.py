import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from service.store.store import Store
from tests.app.conftest import MakeClient, png
from tests.app.processes import serving
from tests.service.stores import add_model

TINY = "pvt_v2_b0.tiny"
BOSS = {"Authorization": "Bearer boss"}
PORT = 9999
EVERY = [
    ("POST", f"/models/{TINY}/load"),
    ("POST", f"/models/{TINY}/unload"),
    ("POST", f"/models/{TINY}/pin"),
    ("DELETE", f"/models/{TINY}/pin"),
    ("POST", "/models/refresh"),
    ("GET", "/aliases"),
    ("PUT", "/aliases/production"),
    ("DELETE", "/aliases/production"),
    ("GET", "/debug/scheduler"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for version in ("1", "2"):
        add_model(root, TINY, version)
    return root


@pytest.fixture
def options(store: Path) -> Iterator[dict[str, Any]]:
    yield {"model_store": store, "default_model": TINY, "backend": "torch", "management_keys": ("boss",)}
    (store / "aliases.json").unlink(missing_ok=True)


@pytest.fixture
def boss(make_client: MakeClient, options: dict[str, Any]) -> TestClient:
    client = make_client(**options)
    client.headers.update(BOSS)
    return client


def predict(client: TestClient, model: str = TINY, **headers: str) -> Any:
    return client.post(f"/predict?model={model}", files={"image": png()}, headers=headers)


@pytest.mark.parametrize(("method", "path"), EVERY)
def test_without_a_key_nothing_is_managed(
    make_client: MakeClient, options: dict[str, Any], method: str, path: str
) -> None:
    off = make_client(**{**options, "management_keys": ()}).request(method, path, json={"model": TINY}, headers=BOSS)
    client = make_client(**{**options, "api_keys": ("user",)})
    wrong = [
        client.request(method, path, json={"model": TINY}, headers=headers)
        for headers in ({}, {"Authorization": "Bearer user"})
    ]

    assert off.status_code == 403
    assert "set PVT_MANAGEMENT_KEYS to one or more keys" in off.json()["detail"]
    assert [each.status_code for each in wrong] == [401, 401]


def test_a_model_is_loaded_pinned_unpinned_and_unloaded(boss: TestClient) -> None:
    loaded = boss.post(f"/models/{TINY}/load").json()
    pinned = boss.post(f"/models/{TINY}/pin").json()
    refused = boss.post(f"/models/{TINY}/unload")
    unpinned = boss.delete(f"/models/{TINY}/pin").json()
    unloaded = boss.post(f"/models/{TINY}/unload").json()

    assert (loaded["state"], loaded["version"], loaded["pinned"], loaded["leases"]) == ("ready", "2", False, 0)
    assert loaded["idle_seconds"] >= 0
    assert loaded["memory_bytes"] > 10e6
    assert pinned["pinned"]
    assert refused.status_code == 409
    assert refused.json()["detail"] == f"{TINY}@2 is pinned; unpin it first (DELETE /models/{TINY}/pin)"
    assert not unpinned["pinned"]
    assert unloaded["state"] == "available"
    assert "memory_bytes" not in unloaded
    assert predict(boss).status_code == 200


def test_the_versions_of_a_model_are_listed_with_where_they_stand(boss: TestClient) -> None:
    boss.put("/aliases/old", json={"model": f"{TINY}@1"})
    predict(boss, "old")

    model, *_ = boss.get("/models").json()["models"]

    assert (model["version"], model["state"]) == ("2", "available")
    newest, oldest = model["versions"]
    assert newest == {"version": "2", "state": "available", "state_text": "on disk; the first request loads it"}
    assert (oldest["version"], oldest["state"], oldest["aliases"]) == ("1", "ready", ["old"])
    assert oldest["memory_bytes"] > 10e6
    assert boss.get("/models/old").json()["state"] == "ready"


def test_a_model_whose_newest_version_can_not_be_loaded_is_told_by_the_one_that_answers(
    make_client: MakeClient, tmp_path: Path
) -> None:
    add_model(tmp_path, TINY, "1")
    weights = add_model(tmp_path, TINY, "2") / "model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    client = make_client(model_store=tmp_path, default_model=TINY, backend="torch", management_keys=("boss",))
    predict(client)
    unloaded = client.post(f"/models/{TINY}/unload", headers=BOSS).json()

    assert (unloaded["version"], unloaded["state"]) == ("1", "available")
    newest, oldest = unloaded["versions"]
    assert (newest["state"], oldest["state"]) == ("failed", "available")
    assert "reason" in newest
    assert client.get(f"/models/{TINY}@2").json()["state"] == "failed"


def test_an_alias_is_written_to_the_store_and_followed(boss: TestClient, store: Path) -> None:
    written = boss.put("/aliases/production", json={"model": f"{TINY}@1"})
    first = predict(boss, "production").json()["version"]
    boss.put("/aliases/production", json={"model": f"{TINY}@2"})
    boss.post("/models/refresh")
    second = predict(boss, "production").json()["version"]
    removed = boss.delete("/aliases/production")
    gone = predict(boss, "production")

    assert written.json() == {"aliases": {"production": f"{TINY}@1"}}
    assert (first, second) == ("1", "2")
    assert removed.json() == {"aliases": {}}
    assert Store(store).aliases() == {}
    assert gone.status_code == 404


@pytest.mark.parametrize(
    ("name", "model", "status", "reason"),
    [
        ("production", "pvt_v2_b0.other", 404, "no model 'pvt_v2_b0.other'"),
        ("pvt_v2_b0", TINY, 422, "a variant's name"),
        ("production", "", 422, "alias target ''"),
    ],
)
def test_what_is_no_alias_is_refused(boss: TestClient, name: str, model: str, status: int, reason: str) -> None:
    response = boss.put(f"/aliases/{name}", json={"model": model})

    assert response.status_code == status
    assert reason in response.json()["detail"]


def test_unknown_models_and_aliases_are_404(boss: TestClient) -> None:
    paths = [("POST", "/models/none/load"), ("POST", "/models/none/pin"), ("POST", "/models/none/unload"),
             ("DELETE", "/models/none/pin"), ("DELETE", "/aliases/none")]  # fmt: skip

    assert {path: boss.request(method, path).status_code for method, path in paths} == {path: 404 for _, path in paths}


def test_who_would_not_wait_is_told_when_to_come_back_and_the_model_is_loaded_meanwhile(boss: TestClient) -> None:
    refused = predict(boss, Prefer="respond-async")
    accepted = boss.post(f"/models/{TINY}/load", headers={"Prefer": "respond-async"})
    boss.post(f"/models/{TINY}/load")
    answered = predict(boss, Prefer="respond-async")

    assert refused.status_code == 503
    assert refused.json()["title"] == "Model loading"
    assert int(refused.headers["Retry-After"]) >= 1
    assert accepted.status_code in {200, 202}
    assert answered.status_code == 200


def test_a_service_can_refuse_cold_requests_and_a_request_can_wait_all_the_same(
    make_client: MakeClient, options: dict[str, Any]
) -> None:
    refusing = make_client(**options, cold="refuse")

    assert predict(refusing).status_code == 503
    assert predict(refusing, Prefer="handling=lenient, wait=60").status_code == 200


def test_a_model_that_does_not_fit_is_told_so_with_the_figures(
    make_client: MakeClient, options: dict[str, Any]
) -> None:
    response = predict(make_client(**options, memory_budget_mb=1))

    assert response.status_code == 503
    assert response.json()["title"] == "Memory budget exceeded"
    assert "PVT_MEMORY_BUDGET_MB allows 1 MB and nothing is loaded" in response.json()["detail"]
    assert "Retry-After" not in response.headers


def test_several_workers_are_not_managed_one_by_one(make_client: MakeClient, options: dict[str, Any]) -> None:
    client = make_client(**options, workers=2)

    refused = client.post(f"/models/{TINY}/load", headers=BOSS)

    assert refused.status_code == 403
    assert "PVT_WORKERS is 2" in refused.json()["detail"]
    assert client.get("/aliases", headers=BOSS).status_code == 200


def on_port(client: TestClient, method: str, path: str, port: int, **headers: str) -> Any:
    return client.request(method, f"http://localhost:{port}{path}", headers=headers)


@pytest.mark.parametrize(("method", "path"), EVERY[:1] + EVERY[5:6] + EVERY[-1:])
def test_a_management_port_answers_alone_and_without_a_key_unless_there_is_one(
    make_client: MakeClient, options: dict[str, Any], method: str, path: str
) -> None:
    keyed = make_client(**options, management_port=PORT)
    client = make_client(**{**options, "management_keys": ()}, management_port=PORT)

    assert on_port(client, method, path, PORT).status_code == 200
    assert on_port(client, method, path, 80).status_code == 403
    assert on_port(keyed, method, path, PORT).status_code == 401
    assert on_port(keyed, method, path, PORT, **BOSS).status_code == 200
    assert on_port(keyed, method, path, 80, **BOSS).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:9999"}, 200),
        ({"Host": "[::1]:9999"}, 200),
        ({"Origin": "http://localhost:9999"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example:9999"}, 403),
        ({"Host": "evil.example:9999", "Origin": "http://evil.example:9999"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
    ],
)
def test_a_page_in_a_browser_does_not_get_at_an_open_management_port(
    make_client: MakeClient, options: dict[str, Any], headers: dict[str, str], status: int
) -> None:
    client = make_client(**{**options, "management_keys": ()}, management_port=PORT)

    assert on_port(client, "GET", "/aliases", PORT, **headers).status_code == status


def test_every_change_leaves_a_line_in_the_log_and_no_key(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    with serving(model_store=str(store), default_model=TINY, backend="torch", management_port=port,
                 management_keys="hush") as server:  # fmt: skip
        url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer hush", "X-Request-ID": "mine"}
        assert httpx.post(f"{server.url}/models/{TINY}/load", headers=headers).status_code == 403
        httpx.post(f"{url}/models/{TINY}/load", headers=headers, timeout=60)
        done = server.event("management")
        httpx.post(f"{url}/models/none/load", headers=headers)
        failed = server.event("management")
        listening = next(each for each in server.seen if each["event"] == "listening")

    assert listening["management"] == url
    assert {name: done[name] for name in ("action", "model", "outcome", "by", "client", "request_id")} == {
        "action": "load", "model": TINY, "outcome": "done", "by": "key", "client": "127.0.0.1", "request_id": "mine",
    }  # fmt: skip
    assert (failed["outcome"], failed["model"]) == ("failed", "none")
    assert "hush" not in json.dumps(server.seen)


def test_the_schema_describes_it(boss: TestClient) -> None:
    paths = boss.get("/openapi.json").json()["paths"]

    for method, path in EVERY:
        operation = paths[path.replace(TINY, "{model_id}").replace("/production", "/{name}")][method.lower()]
        assert operation["tags"] == ["management"]
        assert {"401", "403"} <= {*operation["responses"]}
