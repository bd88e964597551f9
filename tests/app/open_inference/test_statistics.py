"""Triton's statistics, read by its own client and compared with what the responses said."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.app.conftest import MakeClient, png
from tests.app.open_inference.test_inference import MODEL, encoded, pixels
from tests.app.processes import serving
from tests.service.stores import add_model

STAGES = {"decode": "compute_input", "queue": "queue", "infer": "compute_infer", "encode": "compute_output"}
WORKERS, EACH = 2, 6


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(workers=str(WORKERS), backend="torch", precision="float32", read_log=False) as process:
        yield process.url


def of_model(client: Any, *arguments: str) -> dict[str, Any]:
    (found,) = client.get_inference_statistics(*arguments)["model_stats"]
    return dict(found)


def test_counts_and_times_of_all_workers_are_those_of_the_responses(server: str) -> None:
    spent = dict.fromkeys(STAGES, 0.0)
    before = time.time()
    for _ in range(EACH * WORKERS):  # a connection each, so that both workers get some
        response = httpx.post(f"{server}/predict", content=png(), headers={"Content-Type": "image/png"}, timeout=60)
        for entry in response.headers["server-timing"].split(", "):
            name, _, milliseconds = entry.partition(";dur=")
            if name in spent:
                spent[name] += float(milliseconds)
    with triton.InferenceServerClient(server.removeprefix("http://")) as client:
        client.infer(MODEL, [pixels(3)[0]])
        for inputs in ([encoded([b"no image"])], [encoded([png(), b"none"])]):
            with pytest.raises(InferenceServerException):
                client.infer(MODEL, inputs)
        found = of_model(client, MODEL)
        assert found == of_model(client, MODEL, "1") == of_model(client)
        with pytest.raises(InferenceServerException) as unknown:
            client.get_inference_statistics("pvt_v2_b0.none")

    answered = EACH * WORKERS + 3 + 1
    assert unknown.value.status() == "404"
    assert (found["name"], found["version"], found["inference_count"]) == (MODEL, "1", answered)
    assert 0 < found["execution_count"] <= answered
    assert before * 1000 - 1 <= found["last_inference"] <= time.time() * 1000
    told = found["inference_stats"]
    assert told["success"]["count"] == told["queue"]["count"] == told["compute_infer"]["count"] == answered
    assert told["fail"]["count"] == 2
    assert 0 < told["fail"]["ns"] < 60e9
    assert told["success"]["ns"] == sum(told[each]["ns"] for each in STAGES.values())
    for stage, name in STAGES.items():
        assert told[name]["ns"] >= (spent[stage] - 0.01 * EACH * WORKERS) * 1e6  # those requests, rounded, and others


def test_a_version_is_counted_with_the_others(make_client: MakeClient, tmp_path: Path) -> None:
    for version in ("1", "2"):
        add_model(tmp_path, version=version)
    name = "pvt_v2_b0.tiny"
    client = make_client(model_store=tmp_path, default_model=name, backend="torch")

    def infer(version: str) -> None:
        tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
        path = f"/v2/models/{name}/versions/{version}/infer"
        assert client.post(path, json={"inputs": [tensor]}).status_code == 200

    assert client.get("/v2/models/stats").json() == {"model_stats": []}
    (nothing,) = client.get(f"/v2/models/{name}/stats").json()["model_stats"]
    assert (nothing["inference_count"], nothing["last_inference"]) == (0, 0)
    infer("1")
    infer("2")
    (found,) = client.get(f"/v2/models/{name}/versions/2/stats").json()["model_stats"]
    assert (found["version"], found["inference_count"]) == ("2", 2)
    other = client.get(f"/v2/models/{name}/versions/1/stats")
    assert (other.status_code, client.get(f"/v2/models/{name}/versions/3/stats").status_code) == (400, 404)
    assert "those of all versions together" in other.json()["error"]
    assert np.array_equal(found["batch_stats"], [])
