import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from service.machine import usable_cores
from tests.app.conftest import MakeClient, png
from tests.service.stores import add_model


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_a_fresh_service_is_live_and_ready_though_nothing_is_loaded(client: TestClient, path: str) -> None:
    response = client.get(path)

    assert response.status_code == 200
    assert response.json() == {"live": True, "ready": True, "reasons": []}


def test_a_missing_default_model_makes_it_live_but_not_ready(make_client: MakeClient) -> None:
    client = make_client(default_model="pvt_v2_b0.nothing")

    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 503
    assert "pvt_v2_b0.nothing" in client.get("/health").json()["reasons"][0]


def test_a_broken_default_model_makes_it_unready_with_the_reason(make_client: MakeClient, tmp_path: Path) -> None:
    (add_model(tmp_path) / "card.json").unlink()

    response = make_client(model_store=tmp_path, default_model="pvt_v2_b0.tiny").get("/health")

    assert response.status_code == 503
    assert "card.json" in response.json()["reasons"][0]


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a path one that this process may not read, for root too."""

    def forbid(path: Path) -> None:
        def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
            def checked(target: Any = ".", *args: Any, **options: Any) -> Any:
                if isinstance(target, str | Path) and Path(target).is_relative_to(path):
                    inside = Path(target) != path or call.__name__ == "listdir"
                    if inside:
                        raise PermissionError(errno.EACCES, "Permission denied", str(target))
                return call(target, *args, **options)

            return checked

        for name in ("stat", "lstat", "listdir", "access"):
            monkeypatch.setattr(os, name, guarded(getattr(os, name)))

    return forbid


def test_a_version_that_can_not_be_read_is_failed_and_nothing_else(
    make_client: MakeClient, tmp_path: Path, forbid: Callable[[Path], None]
) -> None:
    add_model(tmp_path)
    forbid(add_model(tmp_path, version="2"))
    client = make_client(model_store=tmp_path, default_model="pvt_v2_b0.tiny")

    health = [client.get(f"/health{path}").status_code for path in ("", "/live", "/ready")]
    model = client.get("/models/pvt_v2_b0.tiny").json()

    assert health == [200, 200, 200]
    assert client.get("/models").status_code == 200
    assert (model["version"], model["state"]) == ("1", "available")
    assert [(each["version"], each["state"]) for each in model["versions"]] == [("2", "failed"), ("1", "available")]
    assert "Permission denied" in model["versions"][0]["reason"]
    assert client.post("/predict", files={"image": png()}).json()["version"] == "1"


def test_a_store_that_can_not_be_read_is_unready_with_the_reason(
    make_client: MakeClient, tmp_path: Path, forbid: Callable[[Path], None]
) -> None:
    add_model(tmp_path)
    forbid(tmp_path)
    client = make_client(model_store=tmp_path, default_model="pvt_v2_b0.tiny")

    assert client.get("/health/live").status_code == 200
    for path in ("/health", "/health/ready", "/models", "/models/pvt_v2_b0.tiny"):
        assert client.get(path).status_code == 503
    assert "Permission denied" in client.get("/health").json()["reasons"][0]


def test_a_store_that_can_not_be_listed_still_serves_what_is_named(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(tmp_path)
    listed = os.listdir

    def listdir(path: Any = ".") -> list[str]:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", listdir)
    client = make_client(model_store=tmp_path, default_model="pvt_v2_b0.tiny")

    assert client.get("/models").status_code == 503
    assert client.get("/models/pvt_v2_b0.tiny").json()["state"] == "available"
    assert client.get("/health/ready").status_code == 200


def test_a_preload_that_fails_makes_it_unready(make_client: MakeClient) -> None:
    client = make_client(preload="pvt_v2_b5")

    response = client.get("/health/ready")

    assert response.status_code == 503
    assert "pvt_v2_b5" in response.json()["reasons"][0]
    assert client.post("/predict", files={"image": png()}).status_code == 200


def test_metrics_parse_and_count_what_happened(make_client: MakeClient) -> None:
    client = make_client()
    client.post("/predict", files=[("image", png()), ("image", b"no image")])
    client.get("/models/nothing")
    client.get("/no/such/path")

    text = client.get("/metrics").text

    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    model = ("model", "pvt_v2_b0.digits")
    assert samples["pvt_images_total", model, ("outcome", "answered")] == 1
    assert samples["pvt_images_total", model, ("outcome", "refused")] == 1
    assert samples["pvt_model_loads_total", model, ("outcome", "loaded")] == 1
    assert samples["pvt_models_loaded",] == 1
    assert samples["pvt_instances",] == usable_cores()
    assert samples["pvt_instances_busy",] == 0
    assert samples["pvt_queue_depth", model] == 0
    for state in ("waiting_decode", "decoding", "queued", "running"):
        assert samples["pvt_queue_images", model, ("state", state)] == 0
    assert samples["pvt_queue_capacity_images", model] == 256
    assert samples["pvt_batch_size_sum", model] == 1
    assert samples["pvt_model_memory_bytes", model] > 0
    for stage in ("wait", "decode", "queue", "infer", "encode"):
        assert samples["pvt_stage_seconds_count", model, ("stage", stage)] == 1
    requests = "pvt_http_requests_total"
    assert samples[requests, ("method", "POST"), ("route", "/predict"), ("status", "200")] == 1
    assert samples[requests, ("method", "GET"), ("route", "/models/{model_id}"), ("status", "404")] == 1
    assert samples[requests, ("method", "GET"), ("route", "unmatched"), ("status", "404")] == 1
    assert "/no/such/path" not in text
