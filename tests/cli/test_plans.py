"""Plans that agree between replicas: exported, imported, refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from service.execution.tuning import Tuning
from tests.cli.conftest import PvtServe

MODEL = "pvt_v2_b0.digits"
pytestmark = pytest.mark.usefixtures("local_engine")


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty cache of another replica, from now on."""
    monkeypatch.setenv("PVT_CACHE_DIR", str(tmp_path / "replica"))
    return tmp_path / "replica"


@pytest.fixture
def exported(pvt_serve: PvtServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PVT_CACHE_DIR", str(tmp_path / "first"))
    monkeypatch.setenv("PVT_PRECISION", "float32")
    file = tmp_path / "plan.json"
    done = pvt_serve("plan", "export", MODEL, "--output", file)
    assert (done.code, done.lines) == (0, [f"{MODEL}: its plan is in {file}"])
    monkeypatch.delenv("PVT_PRECISION")
    return file


def changed(file: Path, **values: Any) -> Path:
    other = file.with_name("changed.json")
    other.write_text(json.dumps(json.loads(file.read_text()) | values))
    return other


def plan_of(pvt_serve: PvtServe) -> Any:
    return json.loads(pvt_serve("plan", "export", MODEL).out)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_a_replica_uses_an_imported_plan_to_the_last_digit_and_measures_nothing(
    pvt_serve: PvtServe, exported: Path, replica: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    assert not replica.exists()
    if backend == "openvino":
        monkeypatch.setenv("PVT_BACKEND", "openvino")
        monkeypatch.setenv("PVT_PRECISION", "float32")
        assert pvt_serve("plan", "export", MODEL, "-o", exported).code == 0
        pvt_serve("plan", "export", MODEL)  # its own plan is in the cache, and gives way
    monkeypatch.setenv("PVT_MAX_BATCH_SIZE", "2")
    file = changed(exported, seconds={"1": 0.123456789, "2": 0.2})
    monkeypatch.setattr(Tuning, "run", lambda _: pytest.fail("it measures"))

    done = pvt_serve("plan", "import", file)
    used = plan_of(pvt_serve)

    assert (done.code, done.err) == (0, "")
    assert done.lines == [f"{MODEL}@1 computes in float32, in batches of 1, 2, as {file} says"]
    assert used == json.loads(file.read_text())
    assert used["precision"] == "float32"


def test_what_differs_is_named_and_nothing_is_changed(
    pvt_serve: PvtServe, exported: Path, replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requires = json.loads(exported.read_text())["requires"]
    before = plan_of(pvt_serve)["seconds"].keys()

    def refusal(file: Path, **environment: str) -> str:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(f"PVT_{name}", value)
            done = pvt_serve("plan", "import", file)
        assert (done.code, done.out) == (1, "")
        assert list(replica.rglob("*.plan.json")) == []
        return done.err

    assert "instances was '1' and is '2'" in refusal(exported, INSTANCES="2")
    other = {**requires, "weights": "0" * 64, "backend": "torch 1.0"}
    said = refusal(changed(exported, requires=other))
    assert f"weights was '{'0' * 64}' and is '{requires['weights']}'; backend was 'torch 1.0' and is " in said
    assert "it computes in float32, and PVT_PRECISION is bfloat16" in refusal(exported, PRECISION="bfloat16")
    assert "it has batches of 4, and PVT_MAX_BATCH_SIZE allows 1" in refusal(changed(exported, seconds={"4": 1.0}))
    assert f"is not for {MODEL}@7 here: " in refusal(changed(exported, version="7"))
    assert plan_of(pvt_serve)["seconds"].keys() == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Invalid JSON"),
        ("{}", "model: Field required"),
        ('{"format": "another"}', "format: Input should be 'pvt-serve plan 1'"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(pvt_serve: PvtServe, tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    done = pvt_serve("plan", "import", tmp_path / "plan.json")

    assert done.code == 1
    assert f"{tmp_path / 'plan.json'} is no plan that pvt-serve plan export wrote: " in done.err
    assert reason in done.err


def test_a_plan_can_not_lead_out_of_the_cache(pvt_serve: PvtServe, exported: Path, replica: Path) -> None:
    for values in ({"model": "../x"}, {"model": "a/b"}, {"version": "../1"}):
        assert pvt_serve("plan", "import", changed(exported, **values)).code == 1
    assert not replica.exists()


def test_without_a_cache_there_is_no_place_for_a_plan(
    pvt_serve: PvtServe, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PVT_CACHE_DIR", "")
    done = pvt_serve("plan", "import", exported)

    assert (done.code, done.err) == (
        2, "pvt-serve: PVT_CACHE_DIR is empty, and a plan is kept there: name a folder\n",
    )  # fmt: skip
