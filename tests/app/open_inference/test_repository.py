"""Against Triton's own client, unchanged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.app.conftest import MakeClient
from tests.app.processes import Server, serving
from tests.service.stores import add_model

MODEL = "pvt_v2_b0.tiny"
KEY = {"Authorization": "Bearer manager"}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = tmp_path_factory.mktemp("store")
    for version in ("1", "2"):
        add_model(store, version=version)
    broken = add_model(store, "pvt_v2_b1.broken")
    (broken / "card.json").write_text("{")
    with serving(model_store=str(store), default_model=MODEL, backend="torch", management_keys="manager") as process:
        yield process


@pytest.fixture(scope="module")
def server(process: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(process.url.removeprefix("http://")) as client:
        yield client


def states(server: Any, **headers: str) -> dict[str, str]:
    index = server.get_model_repository_index(headers=headers)
    return {f"{each['name']}@{each['version']}": each["state"] for each in index}


def test_a_model_is_loaded_and_the_index_tells(server: Any, process: Server) -> None:
    before = states(server)
    assert before == dict.fromkeys((f"{MODEL}@2", f"{MODEL}@1", "pvt_v2_b1.broken@1"), "UNAVAILABLE")

    server.load_model(MODEL, headers=KEY)

    assert states(server) == before | {f"{MODEL}@2": "READY"}
    index = {f"{each['name']}@{each['version']}": each for each in server.get_model_repository_index()}
    assert index[f"{MODEL}@2"] == {"name": MODEL, "version": "2", "state": "READY", "reason": ""}
    assert "card.json" in index["pvt_v2_b1.broken@1"]["reason"]
    line = process.event("management")
    assert (line["action"], line["model"], line["outcome"]) == ("load", MODEL, "done")


def test_an_unloaded_model_is_loaded_again_by_its_next_request(server: Any) -> None:
    server.load_model(MODEL, headers=KEY)
    server.unload_model(MODEL, headers=KEY)

    assert states(server)[f"{MODEL}@2"] == "UNAVAILABLE"
    assert server.is_model_ready(MODEL)
    tensor = triton.InferInput("images", [1, 32, 32, 3], "UINT8")
    tensor.set_data_from_numpy(np.zeros((1, 32, 32, 3), np.uint8))
    assert server.infer(MODEL, [tensor]).as_numpy("logits").shape == (1, 3)
    assert states(server)[f"{MODEL}@2"] == "READY"


def test_every_version_is_told_and_can_be_asked(server: Any) -> None:
    assert server.get_model_metadata(MODEL)["versions"] == ["2", "1"]
    for version in ("1", "2"):
        assert server.is_model_ready(MODEL, version)
        assert server.get_model_metadata(MODEL, version)["name"] == MODEL
    assert not server.is_model_ready(MODEL, "3")


def test_who_has_no_management_key_changes_nothing(server: Any) -> None:
    for change in (server.load_model, server.unload_model):
        with pytest.raises(InferenceServerException, match="send a management key") as raised:
            change(MODEL)
        assert raised.value.status() == "401"


def test_a_model_that_can_not_be_loaded_is_told_with_the_reason(server: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"card\.json") as broken:
        server.load_model("pvt_v2_b1.broken", headers=KEY)
    with pytest.raises(InferenceServerException, match="no model") as unknown:
        server.load_model("pvt_v2_b0.none", headers=KEY)

    assert (broken.value.status(), unknown.value.status()) == ("503", "404")


def test_configurations_and_files_are_not_taken(server: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"parameters\.config: Extra inputs") as raised:
        server.load_model(MODEL, headers=KEY, config="{}")

    assert raised.value.status() == "400"


def test_the_index_tells_of_models_in_memory_alone_where_that_is_asked(make_client: MakeClient, tmp_path: Path) -> None:
    add_model(tmp_path)
    client = make_client(model_store=tmp_path, default_model=MODEL, backend="torch")

    assert client.post("/v2/repository/index", json={"ready": True}).json() == []
    assert len(client.post("/v2/repository/index", json={"ready": False}).json()) == 1
    wrong = client.post("/v2/repository/index", json={"all": True})
    assert (wrong.status_code, wrong.json()) == (400, {"error": "all: Extra inputs are not permitted"})
    assert client.post("/v2/repository/index", content=b"null").status_code == 400


def test_every_version_is_told(make_client: MakeClient, tmp_path: Path) -> None:
    for version in ("1", "2"):
        add_model(tmp_path, version=version)
    client = make_client(model_store=tmp_path, default_model=MODEL, backend="torch")

    index = client.post("/v2/repository/index").json()
    assert sorted(each["version"] for each in index) == ["1", "2"]
    assert sorted(client.get(f"/v2/models/{MODEL}").json()["versions"]) == ["1", "2"]
    assert client.get(f"/v2/models/{MODEL}/versions/1/ready").json() == {"ready": True}
    assert client.get(f"/v2/models/{MODEL}/versions/3/ready").status_code == 404


def test_without_management_keys_nobody_may_load(make_client: MakeClient, tmp_path: Path) -> None:
    add_model(tmp_path)
    client = make_client(model_store=tmp_path, default_model=MODEL)

    response = client.post(f"/v2/repository/models/{MODEL}/load")

    assert response.status_code == 403
    assert response.json()["error"].startswith("management is off")
