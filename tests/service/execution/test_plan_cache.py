import os
import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.backends.base import Layout
from service.execution.plan_cache import CachedPlan, PlanCache, code_digest, digest, machine
from tests.conftest import ROOT

KEY = {"weights": "abc", "cpu": "one", "backend": "openvino 1"}
GRAPHS = {1: b"graph of one", 4: b"graph of four"}
ENTRY = CachedPlan(
    key=KEY,
    precision="float32",
    layout=Layout(2, 1),
    seconds={1: 0.02, 4: 0.07},
    alone_seconds=0.01,
    alone_layout=Layout(1, 2),
    notes=("bfloat16 is not used",),
    graphs={size: digest(blob) for size, blob in GRAPHS.items()},
)


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    cache = PlanCache(tmp_path / "cache")
    cache.write("pvt_v2_b0.tiny", "1", ENTRY, GRAPHS.items())
    return cache


def folder(cache: PlanCache) -> Path:
    return cache.root / "pvt_v2_b0.tiny" / "1"


def ignored(cache: PlanCache, key: dict[str, str] = KEY) -> str:
    """Why the entry is ignored, as the log says."""
    with capture_logs() as logs:
        assert cache.read("pvt_v2_b0.tiny", "1", key) is None
    (line,) = logs
    assert line["event"] == "plan_cache_ignored"
    return str(line["reason"])


def test_what_was_written_is_read_again(cache: PlanCache) -> None:
    found = cache.read("pvt_v2_b0.tiny", "1", KEY)

    assert found is not None
    entry, paths = found
    assert entry == ENTRY
    assert {size: path.read_bytes() for size, path in paths.items()} == GRAPHS


def test_what_is_not_there_is_no_event(cache: PlanCache) -> None:
    with capture_logs() as logs:
        assert cache.read("pvt_v2_b1.tiny", "1", KEY) is None
        assert cache.read("pvt_v2_b0.tiny", "2", KEY) is None

    assert logs == []


@pytest.mark.parametrize(("name", "value"), [("cpu", "two"), ("backend", "openvino 2"), ("weights", "def")])
def test_an_entry_of_another_machine_version_or_model_is_ignored(cache: PlanCache, name: str, value: str) -> None:
    assert ignored(cache, {**KEY, name: value}) == (f"made for another key: {name} was {KEY[name]!r} and is {value!r}")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": {}}', "\x00\xff"])
def test_a_plan_that_is_no_plan_is_ignored(cache: PlanCache, content: str) -> None:
    (folder(cache) / "plan.json").write_text(content)

    assert "plan.json" in ignored(cache)


@pytest.mark.parametrize("seconds", ["-1.0", "0.0", "NaN", '"fast"'])
def test_a_plan_with_impossible_times_is_ignored(cache: PlanCache, seconds: str) -> None:
    path = folder(cache) / "plan.json"
    path.write_text(path.read_text().replace("0.02", seconds))

    assert "plan.json" in ignored(cache)


def test_a_graph_with_a_flipped_bit_is_ignored(cache: PlanCache) -> None:
    path = folder(cache) / "4.graph"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])

    assert ignored(cache) == "4.graph is corrupt"


def test_a_graph_that_is_truncated_is_ignored(cache: PlanCache) -> None:
    (folder(cache) / "1.graph").write_bytes(GRAPHS[1][:-1])

    assert ignored(cache) == "1.graph is corrupt"


def test_a_plan_without_its_graph_file_is_no_entry(cache: PlanCache) -> None:
    (folder(cache) / "1.graph").unlink()

    assert cache.read("pvt_v2_b0.tiny", "1", KEY) is None


def test_a_new_entry_takes_the_place_of_the_old(cache: PlanCache) -> None:
    other = ENTRY.model_copy(update={"key": {**KEY, "cpu": "two"}, "graphs": {1: digest(b"new")}, "seconds": {1: 0.1}})

    cache.write("pvt_v2_b0.tiny", "1", other, [(1, b"new")])

    assert sorted(path.name for path in folder(cache).iterdir()) == ["1.graph", "plan.json"]
    assert cache.read("pvt_v2_b0.tiny", "1", {**KEY, "cpu": "two"}) is not None
    assert [path.name for path in folder(cache).parent.iterdir()] == ["1"]


def test_what_a_killed_process_has_left_is_removed(cache: PlanCache) -> None:
    left = folder(cache).parent / ".new-left"
    left.mkdir()
    (left / "1.graph").write_bytes(b"half")

    cache.write("pvt_v2_b0.tiny", "1", ENTRY, GRAPHS.items())

    assert [path.name for path in folder(cache).parent.iterdir()] == ["1"]


def test_a_folder_that_can_not_be_written_is_logged_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with capture_logs() as logs:
        PlanCache(tmp_path / "file" / "cache").write("pvt_v2_b0.tiny", "1", ENTRY, GRAPHS.items())

    assert [(line["event"], "PVT_CACHE_DIR" in line["hint"]) for line in logs] == [("plan_cache_not_written", True)]


def test_the_machine_is_named_by_processor_features_and_code() -> None:
    assert set(machine()) == {"cpu", "code"}
    assert all(machine().values())


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the service's code."""
    shutil.copytree(ROOT / "service", tmp_path / "service", ignore=shutil.ignore_patterns("data", "__pycache__"))
    return tmp_path / "service"


def test_a_changed_epsilon_of_a_variant_makes_another_key(code: Path) -> None:
    before, variants = code_digest(code), code / "architecture" / "variants.py"
    text = variants.read_text()
    assert before == machine()["code"]

    variants.write_text(text.replace("norm_eps: float = 1e-6", "norm_eps: float = 1e-5"))

    assert variants.read_text() != text
    assert code_digest(code) != before


@pytest.mark.parametrize("package", ["architecture", "backends", "execution", "images"])
def test_every_module_of_the_service_is_part_of_the_key(code: Path, package: str) -> None:
    for path in (code / package).rglob("*.py"):
        before = code_digest(code)
        path.write_text(path.read_text() + "\n")
        assert code_digest(code) != before, path
    before = code_digest(code)
    (code / package / "more.py").touch()
    assert code_digest(code) != before


def test_instruction_sets_that_are_not_to_be_used_make_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for isa in ("AVX2", "AVX512_CORE"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        machine.cache_clear()
        found.add(machine()["cpu"])
    monkeypatch.undo()
    machine.cache_clear()

    assert len({*found, machine()["cpu"]}) == 3 - (os.environ.get("ONEDNN_MAX_CPU_ISA") in {"AVX2", "AVX512_CORE"})
