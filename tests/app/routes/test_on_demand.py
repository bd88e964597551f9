"""PVT_PULL=on_demand over HTTP: the first request fetches published weights from a server like the hub."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from service.acquisition.download import RetryPolicy
from service.acquisition.pulling import PULLS, PullOptions
from service.store.store import Store
from tests.app.conftest import MakeClient, png
from tests.service.checkpoints import checkpoint, path_of
from tests.service.hub import Fault, Hub, serving_hub
from tests.service.stores import add_model

B0 = "pvt_v2_b0.in1k"


@pytest.fixture(autouse=True)
def _quick_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.acquisition.pulling.SIDE", 32)
    monkeypatch.setattr("service.acquisition.pulling.PullOptions", _impatient)
    torch.set_num_threads(1)


def _impatient(mirror: str | None) -> Any:
    return PullOptions(mirror=mirror, policy=RetryPolicy(attempts=1))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving_hub() as hub:
        hub.put(path_of("timm"), checkpoint("timm"))
        yield hub


@pytest.fixture
def on_demand(make_client: MakeClient, tmp_path: Path, hub: Hub) -> TestClient:
    add_model(tmp_path)
    return make_client(
        model_store=tmp_path, pull="on_demand", mirror=hub.url, backend="torch", default_model="pvt_v2_b0.tiny"
    )


def predict(client: TestClient, **query: str) -> Any:
    return client.post("/predict", params={"model": B0, **query}, files={"image": png()})


def test_the_first_request_fetches_the_model_and_all_who_ask_meanwhile_wait_for_it(
    on_demand: TestClient, hub: Hub, tmp_path: Path
) -> None:
    released, begun = threading.Event(), threading.Event()
    hub.faults = [Fault(hold=released, begun=begun)]
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(predict, on_demand) for _ in range(3)]
        assert begun.wait(60)
        while not (seen := on_demand.get(f"/models/{B0}").json()).get("pull", {}).get("total"):
            assert seen["state"] in {"remote", "loading"}
        listed = {model["id"]: model["state"] for model in on_demand.get("/models").json()["models"]}
        released.set()
        answers = [each.result(60) for each in asked]

    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].json()["version"] == "1"
    assert len(answers[0].json()["results"][0]["predictions"]) == 5
    assert len(hub.requests) == 1
    assert (seen["state"], seen["pull"]["total"]) == ("loading", len(checkpoint("timm")))
    assert listed[B0] == "loading"
    assert listed["pvt_v2_b5.in1k"] == "remote"
    assert on_demand.get(f"/models/{B0}").json()["state"] == "ready"
    assert Store(tmp_path).find(B0).require_card().origin


def test_a_request_that_does_not_wait_long_enough_leaves_the_pull_under_way(on_demand: TestClient, hub: Hub) -> None:
    released, begun = threading.Event(), threading.Event()
    hub.faults = [Fault(hold=released, begun=begun)]
    late = predict(on_demand, timeout_ms="100")
    refused = on_demand.post(
        "/predict", params={"model": B0}, files={"image": png()}, headers={"Prefer": "respond-async"}
    )
    other = on_demand.post("/predict", files={"image": png()})
    released.set()

    assert late.status_code == 504
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert "are being fetched" in refused.json()["detail"]
    assert other.status_code == 200
    assert predict(on_demand).status_code == 200
    assert len(hub.requests) == 1


def test_pulls_that_hang_keep_nobody_waiting_who_would_not_wait(on_demand: TestClient, hub: Hub) -> None:
    hold = threading.Event()
    hub.faults = [Fault(hold=hold) for _ in range(PULLS)]
    variants = ["pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2"]
    assert len(variants) > PULLS
    for variant in variants[1:]:
        hub.put(path_of("timm").replace("pvt_v2_b0", variant), b"never looked at")

    for _ in range(2):
        for variant in variants:
            answer = on_demand.post(
                "/predict",
                params={"model": variant, "timeout_ms": "20000"},
                files={"image": png()},
                headers={"Prefer": "respond-async"},
            )
            assert (answer.status_code, answer.json()["title"]) == (503, "Model loading")
    hold.set()


def test_what_a_pull_that_was_killed_left_behind_is_no_model(on_demand: TestClient, tmp_path: Path) -> None:
    (tmp_path / B0).mkdir()

    assert predict(on_demand).json()["version"] == "1"
    assert [path.name for path in (tmp_path / B0).iterdir()] == ["1"]


def test_a_pinned_model_is_fetched_before_the_service_is_ready(
    make_client: MakeClient, tmp_path: Path, hub: Hub
) -> None:
    add_model(tmp_path)
    client = make_client(model_store=tmp_path, pull="on_demand", mirror=hub.url, backend="torch",
                         default_model="pvt_v2_b0.tiny", pinned=B0)  # fmt: skip

    while client.get("/health/ready").status_code != 200:
        assert client.get("/health/live").status_code == 200
    model = client.get(f"/models/{B0}").json()
    assert (model["state"], len(hub.requests)) == ("ready", 1)


def test_a_hub_that_fails_is_told_of_and_not_asked_by_every_request(on_demand: TestClient, hub: Hub) -> None:
    hub.faults = [Fault(status=503)]
    first, second = predict(on_demand), predict(on_demand)

    assert (first.status_code, second.status_code) == (503, 503)
    assert "503 Service Unavailable" in first.json()["detail"]
    assert len(hub.requests) == 1
    model = on_demand.get(f"/models/{B0}").json()
    assert (model["state"], "503 Service Unavailable" in model["reason"]) == ("failed", True)


def test_wrong_bytes_from_the_hub_harm_no_other_model(on_demand: TestClient, hub: Hub) -> None:
    hub.put(path_of("timm"), checkpoint("timm")[:-1000])

    refused = predict(on_demand)

    assert (refused.status_code, refused.json()["title"]) == (503, "Weights corrupt")
    assert on_demand.post("/predict", files={"image": png()}).status_code == 200
    assert on_demand.get("/health/ready").status_code == 200


def test_without_it_the_error_says_which_command_to_run(make_client: MakeClient, tmp_path: Path) -> None:
    add_model(tmp_path)
    client = make_client(model_store=tmp_path, backend="torch", default_model="pvt_v2_b0.tiny")

    refused = client.post("/predict", params={"model": "pvt_v2_b2"}, files={"image": png()})
    model = client.get("/models/pvt_v2_b2").json()

    assert (refused.status_code, refused.json()["title"]) == (503, "Weights unavailable")
    assert "fetch them with 'pvt-serve pull pvt_v2_b2'" in refused.json()["detail"]
    assert (model["id"], model["state"], model["num_classes"]) == ("pvt_v2_b2.in1k", "remote", 1000)
    assert (model["parameters"], model["accuracy"]["top1"]) == (25_362_856, 0.82)


def test_a_default_model_that_would_be_fetched_makes_the_service_ready(
    make_client: MakeClient, tmp_path: Path, hub: Hub
) -> None:
    client = make_client(
        model_store=tmp_path, pull="on_demand", mirror=hub.url, backend="torch", default_model="pvt_v2_b0"
    )

    assert client.get("/health/ready").status_code == 200
    assert client.post("/predict", files={"image": png()}).json()["model"] == B0
