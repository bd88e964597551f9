import shutil
import threading
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from torch import nn

from service.architecture.variants import VARIANTS
from service.backends.cuda_compiling import Function, Job
from service.errors import DeviceFailed
from tests.app.conftest import MakeClient, png
from tests.service.execution.skewed import SkewedTorch, bfloat16_is_faster, rolled_in_bfloat16
from tests.service.fake_device import FakeDevice
from tests.service.stores import add_model


def test_the_embedded_model_is_there_before_it_is_loaded(make_client: MakeClient) -> None:
    model, *remote = make_client().get("/models").json()["models"]

    assert model["id"] == "pvt_v2_b0.digits"
    assert (model["state"], model["default"], model["version"]) == ("available", True, "1")
    assert (model["num_classes"], model["input_size"], model["parameters"]) == (10, [64, 64], 3_412_330)
    assert model["accuracy"]["top1"] >= 0.98
    assert "backend" not in model
    assert [each["id"] for each in remote] == [f"{variant}.in1k" for variant in VARIANTS]
    assert {each["state"] for each in remote} == {"remote"}
    assert model["state_text"] == model["versions"][0]["state_text"] == "on disk; the first request loads it"


def test_models_of_some_states_are_listed(client: TestClient) -> None:
    client.post("/predict", files={"image": png()})

    def listed(state: str) -> list[str]:
        return [each["id"] for each in client.get("/models", params={"state": state}).json()["models"]]

    assert listed("ready") == ["pvt_v2_b0.digits"]
    assert listed("remote, ready") == ["pvt_v2_b0.digits", *(f"{variant}.in1k" for variant in VARIANTS)]
    assert listed("failed") == []
    response = client.get("/models?state=redy")
    assert response.status_code == 422
    assert response.json()["detail"].startswith("state 'redy'; did you mean 'ready'? there are available, remote")


def test_a_loaded_model_tells_how_it_runs(client: TestClient) -> None:
    client.post("/predict", files={"image": png()})

    model = client.get("/models/pvt_v2_b0.digits").json()

    assert (model["state"], model["backend"], model["device"]) == ("ready", "openvino", "cpu")
    assert "improving" not in model
    assert model["precision"] in {"float32", "bfloat16"}
    assert model["batch_plan"][0]["size"] == 1
    assert all(step["ms"] > 0 for step in model["batch_plan"])
    assert model["load_seconds"] > 0
    assert model["memory_bytes"] > 0
    found = model["reference_check"]
    assert found["images"] >= 1
    assert found["cosine"] > 0.999
    assert found["deviation"] < 0.03
    assert (found["changed"], found["worst_swap"]) == (0, 0)


def test_a_model_names_the_graphs_that_do_not_compute_in_its_precision(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = SkewedTorch(lambda logits, _: logits)
    monkeypatch.setattr("service.options.TorchBackend", lambda _: backend)
    monkeypatch.setattr("service.execution.tuning.Tuning._probe", bfloat16_is_faster)
    add_model(tmp_path)
    client = make_client(
        model_store=tmp_path, default_model="pvt_v2_b0.tiny", backend="torch", precision="auto", max_batch_size=1
    )
    assert client.post("/predict", files={"image": png()}).status_code == 200
    before = client.get("/models/pvt_v2_b0.tiny").json()
    backend.skew = rolled_in_bfloat16

    answered = client.post("/predict?size=64", files={"image": png()})

    after = client.get("/models/pvt_v2_b0.tiny").json()
    assert answered.status_code == 200
    assert (before["precision"], after["precision"]) == ("bfloat16", "bfloat16")
    assert before["notes"] == []
    assert after["notes"][0].startswith("64x64: the graph for batches of 1 computes in float32, not bfloat16: logits ")


def test_a_batch_size_that_computes_in_another_precision_says_so(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(tmp_path)
    client = make_client(
        model_store=tmp_path, default_model="pvt_v2_b0.tiny", backend="torch", precision="bfloat16", max_batch_size=1
    )
    client.post("/predict", files={"image": png()})

    assert "precision" not in client.get("/models/pvt_v2_b0.tiny").json()["batch_plan"][0]
    monkeypatch.setattr("service.execution.executable.Executable.precisions", {1: "float32"})
    assert client.get("/models/pvt_v2_b0.tiny").json()["batch_plan"][0]["precision"] == "float32"


def test_on_a_gpu_a_model_tells_where_it_runs_and_whether_it_still_gets_faster(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    class Compiler:
        """Waits, then finds nothing to make faster."""

        def prepare(self, job: Job, stopped: threading.Event) -> None:
            assert gate.wait(60)
            assert not stopped.is_set()
            raise NotImplementedError(job.device)

        def __call__(self, module: nn.Module) -> Function:
            raise NotImplementedError(module)

    monkeypatch.setattr("app.main.visible", lambda: ("cuda:0",))
    monkeypatch.setattr("service.options.cuda_devices", lambda names: [FakeDevice(name) for name in names])
    monkeypatch.setattr("service.options.TorchCompiler", lambda *_: Compiler())
    add_model(tmp_path)
    client = make_client(model_store=tmp_path, default_model="pvt_v2_b0.tiny", max_batch_size=2)

    answered = client.post("/predict", files={"image": png()})
    before = client.get("/models/pvt_v2_b0.tiny").json()
    gate.set()
    while (after := client.get("/models/pvt_v2_b0.tiny").json()).get("improving"):
        pass

    assert answered.status_code == 200
    assert (before["backend"], before["device"], before["improving"]) == ("torch", "cuda:0", True)
    assert before["layout"] == {"streams": 1, "threads": 1}
    assert after["notes"] == ["batches of 1 and more are not compiled: NotImplementedError: cuda:0"]


def test_a_gpu_that_fails_makes_the_service_unhealthy(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = False

    def run(_: Function, size: int) -> None:
        if broken:
            raise DeviceFailed(f"cuda:0 failed with CUDA error: an illegal address ({size}); restart the service")

    monkeypatch.setattr("app.main.visible", lambda: ("cuda:0",))
    monkeypatch.setattr("service.options.cuda_devices", lambda names: [FakeDevice(each, on_run=run) for each in names])
    add_model(tmp_path)
    client = make_client(model_store=tmp_path, default_model="pvt_v2_b0.tiny", max_batch_size=1, compile=False)
    assert client.post("/predict", files={"image": png()}).status_code == 200
    assert client.get("/health/live").status_code == 200

    broken = True
    refused = client.post("/predict", files={"image": png()})
    health = client.get("/health/live")

    assert (refused.status_code, refused.json()["title"]) == (503, "Device failed")
    assert health.status_code == 503
    assert "an illegal address" in health.text


def test_a_model_of_another_name_is_not_found(client: TestClient) -> None:
    assert client.get("/models/resnet50").status_code == 404


def test_a_broken_model_is_failed_with_the_reason_and_harms_no_other(make_client: MakeClient, tmp_path: Path) -> None:
    add_model(tmp_path, "pvt_v2_b0.good")
    broken = add_model(tmp_path, "pvt_v2_b0.broken") / "model.safetensors"
    data = bytearray(broken.read_bytes())
    data[1000] ^= 1
    broken.write_bytes(data)
    client = make_client(model_store=tmp_path, default_model="pvt_v2_b0.good", backend="torch")

    refused = client.post("/predict?model=pvt_v2_b0.broken", files={"image": png()})
    answered = client.post("/predict", files={"image": png()})

    assert (refused.status_code, answered.status_code) == (503, 200)
    assert "SHA-256" in refused.json()["detail"]
    states = {model["id"]: model for model in client.get("/models").json()["models"]}
    assert states["pvt_v2_b0.broken"]["state"] == "failed"
    assert "SHA-256" in states["pvt_v2_b0.broken"]["reason"]
    assert states["pvt_v2_b0.good"]["state"] == "ready"


def test_a_mended_model_is_loaded_by_the_next_request(make_client: MakeClient, tmp_path: Path) -> None:
    weights = add_model(tmp_path, "pvt_v2_b0.tiny") / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(b"\0" * len(good))
    client = make_client(model_store=tmp_path, default_model="pvt_v2_b0.tiny", backend="torch")
    assert client.post("/predict", files={"image": png()}).status_code == 503

    weights.write_bytes(good)

    assert client.post("/predict", files={"image": png()}).status_code == 200


def test_what_runs_counts_and_not_what_has_become_of_its_folder(make_client: MakeClient, tmp_path: Path) -> None:
    folder = add_model(tmp_path, "pvt_v2_b0.tiny")
    client = make_client(model_store=tmp_path, default_model="pvt_v2_b0.tiny", backend="torch")
    assert client.post("/predict", files={"image": png()}).status_code == 200

    (folder.parent / "2").mkdir()
    half_copied = client.get("/models/pvt_v2_b0.tiny").json()
    shutil.rmtree(folder.parent)
    gone, *_ = client.get("/models").json()["models"]

    for model in (half_copied, gone):
        assert (model["state"], model["version"]) == ("ready", "1")
    assert client.get("/health/ready").status_code == 200
    assert client.post("/predict", files={"image": png()}).status_code == 200


def test_a_model_without_a_name_is_not_found(client: TestClient) -> None:
    assert client.post("/predict?model=", files={"image": png()}).status_code == 404
