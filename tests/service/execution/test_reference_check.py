"""Whatever runs a model must reproduce the logits of its plain float32 module for its reference images."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from structlog.testing import capture_logs

from service.backends.base import Graph, Images, Layout, Precision, Program, Served, build, plain_logits
from service.backends.cpu import OpenVinoBackend, TorchBackend
from service.errors import GoldenMismatch, ModelLoadFailed, ReferenceInvalid
from service.execution.executable import Executable
from service.execution.plan_cache import PlanCache
from service.execution.reference import (
    MAX_RELATIVE,
    TOLERANCE,
    Reference,
    ReferenceCheck,
    packed,
    synthetic_images,
)
from service.execution.tuning import Limits
from service.registry.loader import load
from service.results import Floats
from service.store.store import Store
from tests.conftest import ROOT
from tests.service.execution.skewed import (
    AnyTorch,
    Exporting,
    Skew,
    SkewedGraph,
    SkewedTorch,
    bfloat16_is_faster,
    failing_in_bfloat16,
    not_a_number,
    off_by,
    rolled,
    rolled_in_bfloat16,
)
from tests.service.store.test_store import edit_card
from tests.service.stores import add_model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model whose card names no reference, `pvt_v2_b0.bare`, and one whose card does, `pvt_v2_b0.tiny`."""
    root = tmp_path_factory.mktemp("store")
    add_model(root, "pvt_v2_b0.bare")
    folder = add_model(root)
    add_reference(folder, honest(folder))
    headless = add_model(root, "pvt_v2_b0.headless", classes=0)
    add_reference(headless, honest(headless))
    return root


def honest(folder: Path) -> Reference:
    images = synthetic_images(32, 32)
    card = Store(folder.parent.parent).find(folder.parent.name).require_card()
    return Reference(images, plain_logits(build(card, folder), images), embeddings=not card.labels)


def add_reference(folder: Path, reference: Reference) -> None:
    data, file = packed(reference)
    (folder / file.file).write_bytes(data)
    edit_card(folder, reference=file.model_dump())


def load_with(
    store: Path,
    *backends: TorchBackend | OpenVinoBackend,
    name: str = "pvt_v2_b0.tiny",
    cache: Path | None = None,
    precision: Precision | None = None,
    max_batch_size: int = 1,
) -> Executable:
    makers = [partial(lambda backend: backend, backend) for backend in backends]
    limits = Limits(1, max_batch_size, precision)
    return load(Store(store).find(name), makers, limits, PlanCache(cache) if cache else None)


def test_float32_that_rounds_otherwise_is_served_and_its_deviation_reported(store: Path) -> None:
    report = load_with(store, SkewedTorch(off_by(MAX_RELATIVE / 10)), precision="float32").report

    assert report.deviation is not None
    assert MAX_RELATIVE / 20 < report.deviation.relative < MAX_RELATIVE
    assert (report.deviation.images, report.deviation.changed) == (4, 0)


@pytest.mark.parametrize("name", ["pvt_v2_b0.tiny", "pvt_v2_b0.bare"])
def test_float32_that_is_further_off_than_rounding_fails_the_model_with_the_figures(store: Path, name: str) -> None:
    with pytest.raises(GoldenMismatch) as caught:
        load_with(store, SkewedTorch(off_by(0.01)), name=name, precision="float32")

    said = str(caught.value)
    assert said.startswith(
        f"{name}@1 does not give the logits of its reference images, so it is not served: torch failed"
    )
    assert (
        "logits are off by 0.01 of the greatest, 0.0002 is allowed (float32, batches of 1: largest difference" in said
    )
    assert "in image" in said
    assert "cosine 0.99" in said
    assert "another top class in 0 of 4" in said
    assert said.endswith(
        "plain float32 module does give them: try another PVT_BACKEND, or other versions of openvino and torch"
    )


def test_a_model_without_a_head_has_to_reproduce_its_embeddings(store: Path) -> None:
    right, wrong = SkewedTorch(off_by(MAX_RELATIVE / 10)), SkewedTorch(off_by(0.01))
    report = load_with(store, right, name="pvt_v2_b0.headless", precision="float32").report
    with pytest.raises(GoldenMismatch) as caught:
        load_with(store, wrong, name="pvt_v2_b0.headless", precision="float32")

    assert report.deviation
    assert MAX_RELATIVE / 20 < report.deviation.relative < MAX_RELATIVE
    said = str(caught.value)
    assert said.startswith("pvt_v2_b0.headless@1 does not give the embeddings of its reference images")
    assert "embeddings are off by 0.01 of the greatest, 0.0002 is allowed" in said
    assert "another top class" not in said


def test_the_embedding_chooses_the_precision_of_a_model_without_a_head(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.execution.tuning.Tuning._probe", bfloat16_is_faster)

    fast = load_with(store, AnyTorch(1), name="pvt_v2_b0.headless").report
    skewed = load_with(store, SkewedTorch(rolled_in_bfloat16), name="pvt_v2_b0.headless").report

    assert fast.deviation
    assert (fast.precision, skewed.precision) == ("bfloat16", "float32")
    assert 0 < fast.deviation.share < TOLERANCE
    assert any("bfloat16 is not used: embeddings are off by" in note for note in skewed.notes), skewed.notes


def test_the_greatest_channel_of_an_embedding_may_be_another_one() -> None:
    reference = Reference(np.zeros((1, 1, 1, 3), np.uint8), np.array([[1.0, 0.9, 0.0]], np.float32), embeddings=True)

    deviation = reference.deviation(np.array([[0.98, 0.99, 0.0]], np.float32))

    assert (deviation.changed, deviation.swap) == (0, 0)


def test_a_reference_of_logits_is_none_of_a_model_without_a_head(tmp_path: Path) -> None:
    folder = add_model(tmp_path, classes=0)
    add_reference(folder, replace(honest(folder), embeddings=False))

    with pytest.raises(ReferenceInvalid, match="no safetensors file with 'images' and 'embeddings'"):
        load_with(tmp_path, TorchBackend(1))


def test_a_model_that_gives_nan_itself_is_told_from_a_backend_that_does(tmp_path: Path) -> None:
    pixels = {"height": 32, "width": 32, "std": [1e-320, 1e-320, 1e-320]}
    edit_card(add_model(tmp_path), preprocessing=pixels)

    with pytest.raises(ModelLoadFailed, match=r"^it gives NaN or infinity; check its weights"):
        load_with(tmp_path, SkewedTorch(rolled), TorchBackend(1))

    folder = tmp_path / "pvt_v2_b0.tiny" / "1"
    images = synthetic_images(32, 32)
    add_reference(folder, Reference(images, np.ones((len(images), 3), np.float32)))
    with pytest.raises(ReferenceInvalid, match=r"the model itself, in plain float32, does not give .* off by nan"):
        load_with(tmp_path, TorchBackend(1))


@pytest.mark.parametrize("skew", [rolled, not_a_number])
def test_a_backend_that_does_not_reproduce_them_gives_way_to_the_next_with_a_note(store: Path, skew: Skew) -> None:
    images = list(synthetic_images(32, 32))

    with capture_logs() as logs:
        executable = load_with(store, SkewedTorch(skew), OpenVinoBackend(1), precision="float32")

    assert executable.report.backend == "openvino"
    (note,) = executable.report.notes
    assert note.startswith("torch failed: ")
    assert [(line["event"], line["reason"]) for line in logs] == [("backend_failed", note)]
    np.testing.assert_allclose(
        executable.run(0, images[:1])[0].logits, honest(store / "pvt_v2_b0.tiny" / "1").logits[0], atol=1e-4
    )


def test_where_no_backend_reproduces_them_each_is_named(store: Path) -> None:
    with pytest.raises(GoldenMismatch, match=r"torch failed: .*; torch failed: .*try another PVT_BACKEND"):
        load_with(store, SkewedTorch(rolled), SkewedTorch(off_by(1.0)), precision="float32")


def test_a_reduced_precision_has_its_own_gate_and_gives_way_to_float32(store: Path) -> None:
    kept = load_with(store, SkewedTorch(lambda logits, _: logits))

    with capture_logs() as logs:
        refused = load_with(store, SkewedTorch(rolled_in_bfloat16))

    assert kept.report.notes == ()
    assert refused.report.precision == "float32"
    (note,) = refused.report.notes
    assert note.startswith("bfloat16 is not used: ")
    assert [(line["event"], line["note"]) for line in logs] == [("plan_note", note)]


def test_a_reduced_precision_that_was_requested_is_not_served_wrong(store: Path) -> None:
    assert load_with(store, SkewedTorch(off_by(0.001)), precision="bfloat16").report.precision == "bfloat16"

    with pytest.raises(GoldenMismatch, match=r"bfloat16, batches of 1: .*: set PVT_PRECISION=auto$"):
        load_with(store, SkewedTorch(rolled_in_bfloat16), precision="bfloat16")


def test_weights_that_do_not_give_the_cards_reference_logits_are_not_served(tmp_path: Path) -> None:
    folder = add_model(tmp_path)
    true = honest(folder)
    add_reference(folder, Reference(true.images, np.roll(true.logits, 1, axis=1)))

    for precision in (None, "bfloat16", "float32"):
        with pytest.raises(ReferenceInvalid) as caught:
            load_with(tmp_path, SkewedTorch(lambda logits, _: logits), TorchBackend(1), precision=precision)

        said = str(caught.value)
        assert said.startswith(f"{folder / 'reference.safetensors'}: the model itself, in plain float32, does not give")
        assert "logits are off by" in said
        assert "do not belong together: make the file anew" in said
        assert not {"bfloat16", "PVT_PRECISION", "torch failed"} & set(said.replace(",", " ").split())


def test_a_broken_reference_fails_the_model_also_where_the_plan_is_cached(tmp_path: Path) -> None:
    folder = add_model(tmp_path / "store")
    add_reference(folder, honest(folder))
    load_with(tmp_path / "store", Exporting(), cache=tmp_path / "cache")
    (folder / "reference.safetensors").write_bytes(b"other")

    with pytest.raises(ReferenceInvalid, match="SHA-256"):
        load_with(tmp_path / "store", Exporting(), cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["pvt_v2_b0.tiny", "pvt_v2_b0.bare"])
def test_a_restored_graph_is_checked_and_where_it_is_wrong_made_anew(store: Path, tmp_path: Path, name: str) -> None:
    load_once = partial(load_with, store, name=name, cache=tmp_path)
    first = load_once(Exporting())

    with capture_logs() as logs:
        wrong = load_once(Exporting(rolled))
        right = load_once(Exporting())

    assert (first.report.cached, wrong.report.cached, right.report.cached) == (False, False, True)
    (line,) = [line for line in logs if line["event"] == "plan_cache_ignored"]
    assert line["reason"].startswith("GoldenMismatch: logits are off by ")
    assert right.report.deviation is not None
    assert right.report.deviation.relative < MAX_RELATIVE


def test_a_reference_that_was_computed_is_kept_with_the_plan_and_not_computed_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_once = partial(load_with, store, Exporting(), name="pvt_v2_b0.bare", cache=tmp_path)
    load_once()
    monkeypatch.setattr("service.registry.loader.computed_reference", None)

    report = load_once().report

    assert report.cached
    assert report.deviation is not None


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_kept_reference_that_is_damaged_is_made_anew(
    store: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    load_once = partial(load_with, store, Exporting(), name="pvt_v2_b0.bare", cache=tmp_path)
    load_once()
    damage(tmp_path / "pvt_v2_b0.bare" / "1" / "reference.safetensors")

    with capture_logs() as logs:
        assert not load_once().report.cached

    assert "ReferenceInvalid" in next(line["reason"] for line in logs if line["event"] == "plan_cache_ignored")
    assert load_once().report.cached


@dataclass
class Recorder(Graph):
    """A graph that gives the reference's logits, or others, and notes which images it was run on."""

    reference: Reference
    factor: float = 1.0
    precision: Precision = "float32"
    batches: list[list[int]] = field(default_factory=list)

    def run(self, instance: int, images: Images) -> tuple[Floats, ...]:
        assert instance == 0
        numbers = [int(image[0, 0, 0]) for image in images]
        self.batches.append(numbers)
        return (self.reference.logits[numbers] * np.float32(self.factor),)


@pytest.fixture
def reference() -> Reference:
    """Images whose pixels are their number; their logits differ the more the smaller it is."""
    images = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None, None], (6, 2, 2, 3))
    one = np.random.default_rng(0).standard_normal(5).astype(np.float32)
    return Reference(images, np.stack([one * np.float32(1 - i / 10) for i in range(6)]))


def test_graphs_that_are_new_are_tried_on_every_image_in_full_batches(reference: Reference) -> None:
    graphs = {size: Recorder(reference) for size in (1, 4)}

    ReferenceCheck(reference).check_all(dict(graphs))

    assert graphs[1].batches == [[0], [1], [2], [3], [4], [5]]
    assert graphs[4].batches == [[0, 1, 2, 3], [4, 5, 0, 1]]


@pytest.mark.parametrize(("seconds", "tried"), [(0.001, 6), (0.015, 3), (2.0, 1)])
def test_graphs_from_the_cache_are_tried_on_what_time_allows(reference: Reference, seconds: float, tried: int) -> None:
    graphs = {size: Recorder(reference) for size in (1, 4)}

    ReferenceCheck(reference).check_restored(dict(graphs), seconds)

    assert graphs[1].batches == [[i] for i in range(tried)]
    assert graphs[4].batches == [[0, 1, 2, 3]]


def test_one_graph_of_several_that_is_wrong_is_enough(reference: Reference) -> None:
    graphs = {1: Recorder(reference), 4: Recorder(reference, factor=1.01)}

    with pytest.raises(GoldenMismatch, match="batches of 4"):
        ReferenceCheck(reference).check_all(dict(graphs))
    with pytest.raises(GoldenMismatch, match="batches of 1"):
        ReferenceCheck(reference).check_all({1: graphs[1]}, Recorder(reference, factor=1.01))


def test_few_images_are_those_that_measure_best(reference: Reference) -> None:
    reference = Reference(reference.images, reference.logits[::-1])
    graph = Recorder(reference)

    ReferenceCheck(reference).check_restored({1: graph}, 0.02)

    assert graph.batches == [[5], [4]]


def test_the_worst_of_all_graphs_is_reported(reference: Reference) -> None:
    better, worse = Recorder(reference, 1.001, "bfloat16"), Recorder(reference, 1.005, "bfloat16")

    found = ReferenceCheck(reference).check_all({1: better, 2: worse, 4: better})

    assert found.share == ReferenceCheck(reference).check(worse, 2).share
    assert found.share > ReferenceCheck(reference).check(better, 1).share


def test_the_first_image_that_is_not_a_number_is_named(reference: Reference) -> None:
    logits = reference.logits.copy()
    logits[2, 1] = np.nan

    deviation = reference.deviation(logits)

    assert deviation.image == 2
    assert deviation.objection("float32")
    assert deviation.objection("bfloat16")


def test_logits_that_are_all_zero_as_they_should_be_are_right() -> None:
    zeros = Reference(np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 3), np.float32))

    assert zeros.deviation(zeros.logits).objection("float32") is None
    assert zeros.deviation(zeros.logits + 1).objection("float32")


@pytest.mark.parametrize("backend", [OpenVinoBackend, TorchBackend], ids=lambda kind: kind.name)
def test_the_embedded_model_reproduces_its_reference_on_every_backend(
    tmp_path: Path, backend: type[OpenVinoBackend | TorchBackend]
) -> None:
    load_one = partial(load_with, ROOT / "model_store", backend(1), name="pvt_v2_b0.digits", cache=tmp_path)
    for report in (load_one(precision="float32").report, load_one(precision="float32").report):
        assert report.deviation is not None
        assert report.deviation.images  # fewer than all from the cache, where a busy machine is slow
        assert report.deviation.relative < 1e-5


@pytest.mark.parametrize("backend", [OpenVinoBackend, AnyTorch], ids=lambda kind: kind.name)
def test_the_embedded_model_is_served_in_bfloat16_or_in_what_the_machine_has(
    tmp_path: Path, backend: type[OpenVinoBackend | AnyTorch]
) -> None:
    load_one = partial(load_with, ROOT / "model_store", backend(1), name="pvt_v2_b0.digits", cache=tmp_path)
    for report in (load_one(precision="bfloat16", max_batch_size=2).report, load_one().report):
        assert report.deviation is not None
        assert report.deviation.objection(report.precision) is None
        assert report.deviation.changed == 0
        if report.precision == "bfloat16":
            assert report.deviation.share < TOLERANCE / 5
        else:  # no such instructions, and a note says so
            assert report.deviation.relative < 1e-5


def with_latency_graph(executable: Executable) -> Executable:
    executable.add_latency_graph()
    return executable


def with_stages(executable: Executable) -> Executable:
    executable.add_stages()
    return executable


def resized(executable: Executable) -> Executable:
    return executable.resized(64, 32)


LATER: tuple[Callable[[Executable], Executable], ...] = (with_latency_graph, with_stages, resized)


def loaded_then_skewed(
    store: Path, skew: Skew, precision: Precision | None, monkeypatch: pytest.MonkeyPatch
) -> Executable:
    """A model whose latency graph is still to be made, and whose later graphs have other logits."""
    backend = SkewedTorch(lambda logits, _: logits)
    monkeypatch.setattr("service.execution.tuning.Tuning._probe", bfloat16_is_faster)
    executable = load_with(store, backend, precision=precision)
    monkeypatch.setattr(backend, "skew", skew)
    program = backend.program(build(executable.card, executable.stored.folder), 32, 32)
    monkeypatch.setattr(executable, "_latency_layout", Layout(1, 1))
    monkeypatch.setattr(
        executable, "_make_latency", lambda: program.graph(1, Layout(1, 1), executable.report.precision)
    )
    return executable


@pytest.mark.parametrize("later", LATER)
def test_graphs_that_are_made_later_are_checked_too(
    store: Path, later: Callable[[Executable], Executable], monkeypatch: pytest.MonkeyPatch
) -> None:
    executable = loaded_then_skewed(store, rolled, "float32", monkeypatch)

    with pytest.raises(GoldenMismatch):
        later(executable)

    assert not executable.staged
    (answered,) = executable.run(0, list(synthetic_images(32, 32)[:1]), alone=True)
    np.testing.assert_allclose(answered.logits, honest(executable.stored.folder).logits[0], atol=1e-4)


@pytest.mark.parametrize("later", LATER)
def test_a_later_graph_that_is_wrong_in_bfloat16_is_made_in_float32_with_a_note(
    store: Path, later: Callable[[Executable], Executable], monkeypatch: pytest.MonkeyPatch
) -> None:
    executable = loaded_then_skewed(store, rolled_in_bfloat16, None, monkeypatch)
    assert executable.report.precision == "bfloat16"

    with capture_logs() as logs:
        further = later(executable)

    images = synthetic_images(further.height, further.width, 1)
    (answered,) = further.run(0, list(images), alone=True, stages=bool(further.staged))
    wanted = plain_logits(build(executable.card, executable.stored.folder), images)[0]
    np.testing.assert_allclose(answered.logits, wanted, atol=1e-4)
    assert [(line["event"], line["note"]) for line in logs] == [("plan_note", note) for note in further.notes]
    for note in further.notes:
        assert " for batches of 1 computes in float32, not bfloat16: logits are off by " in note
        assert "largest difference" in note
    assert executable.precisions == {1: "bfloat16"}
    assert further.precisions == {1: "float32" if later is resized else "bfloat16"}


@pytest.mark.parametrize("later", LATER)
def test_a_later_graph_that_fails_in_bfloat16_is_made_in_float32_unless_that_was_requested(
    store: Path, later: Callable[[Executable], Executable], monkeypatch: pytest.MonkeyPatch
) -> None:
    executable = loaded_then_skewed(store, failing_in_bfloat16, None, monkeypatch)

    further = later(executable)

    images = synthetic_images(further.height, further.width, 1)
    (answered,) = further.run(0, list(images), alone=True, stages=bool(further.staged))
    wanted = plain_logits(build(executable.card, executable.stored.folder), images)[0]
    np.testing.assert_allclose(answered.logits, wanted, atol=1e-4)
    assert further.notes
    for note in further.notes:
        assert note.endswith("computes in float32, not bfloat16: it failed with RuntimeError: no kernel for it")

    forced = loaded_then_skewed(store, failing_in_bfloat16, "bfloat16", monkeypatch)
    with pytest.raises(RuntimeError, match="no kernel"):
        later(forced)


@pytest.mark.parametrize("later", LATER)
def test_a_later_graph_that_is_wrong_in_the_precision_that_was_requested_is_refused(
    store: Path, later: Callable[[Executable], Executable], monkeypatch: pytest.MonkeyPatch
) -> None:
    executable = loaded_then_skewed(store, rolled_in_bfloat16, "bfloat16", monkeypatch)

    with pytest.raises(GoldenMismatch, match=r"\(bfloat16, batches of 1: largest difference "):
        later(executable)


def test_a_batch_of_two_that_is_wrong_in_bfloat16_leaves_the_backend_its_model_and_the_cache_remembers(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WrongInPairs(Exporting):
        precisions: tuple[Precision, ...] = ("bfloat16", "float32")
        made: ClassVar[list[Precision]] = []

        def program(self, module: Served, height: int, width: int) -> Program:
            made, program = self.made, super().program(module, height, width)

            def wrong_in_pairs(size: int, layout: Layout, precision: Precision) -> Graph:
                made.append(precision)
                graph = program.graph(size, layout, precision)
                if size == 2:
                    assert isinstance(graph, SkewedGraph)
                    graph.skew = rolled_in_bfloat16
                return graph

            return Program(wrong_in_pairs)

    monkeypatch.setattr("service.execution.tuning.Tuning._probe", bfloat16_is_faster)
    monkeypatch.setattr("service.execution.tuning.gain", lambda *_: 2.0)
    load_once = partial(load_with, store, WrongInPairs(), TorchBackend(1), cache=tmp_path, max_batch_size=2)

    first = load_once()
    made = len(WrongInPairs.made)
    second = load_once()

    for executable in (first, second):
        assert (executable.report.backend, executable.report.precision) == ("torch", "float32")
        assert executable.plan.sizes == (1, 2)
        assert executable.precisions == {1: "float32", 2: "float32"}
        (note,) = executable.notes
        assert note.startswith("bfloat16 is not used: logits are off by ")
        assert "(bfloat16, batches of 2: " in note
    assert (first.report.cached, second.report.cached) == (False, True)
    assert len(WrongInPairs.made) == made
