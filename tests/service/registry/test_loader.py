from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from service.backends.base import Backend, DeviceHealth, Layout, Precision, Program, Served, build
from service.backends.cpu import OpenVinoBackend, TorchBackend
from service.errors import CardInvalid, DeviceFailed, ModelLoadFailed, WeightsDigestMismatch, WeightsMismatch
from service.execution.executable import Executable
from service.execution.plan_cache import PlanCache
from service.execution.tuning import Limits
from service.registry.loader import load
from service.store.store import Store
from tests.service.store.test_store import edit_card
from tests.service.stores import add_model


class Broken(TorchBackend):
    def program(self, module: Served, height: int, width: int) -> Program:
        raise RuntimeError(f"can't compile {type(module).__name__} for {height}x{width}")


def load_tiny(
    root: Path,
    max_batch_size: int = 4,
    *,
    backends: Sequence[Backend] = (TorchBackend(1),),
    cache: Path | None = None,
    precision: Precision | None = "float32",
) -> Executable:
    """In float32 by default: these tests do not depend on the precision that is faster on a processor."""
    makers = [partial(lambda backend: backend, backend) for backend in backends]
    stored = Store(root).find("pvt_v2_b0.tiny")
    return load(stored, makers, Limits(1, max_batch_size, precision), PlanCache(cache) if cache else None)


def random_images(count: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    return list(np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def test_images_of_a_batch_have_the_outputs_they_have_alone(tmp_path: Path) -> None:
    add_model(tmp_path)
    executable = load_tiny(tmp_path)
    images = random_images(executable.plan.largest)

    together = executable.run(0, images)

    for image, outputs in zip(images, together, strict=True):
        (alone,) = executable.run(0, [image])
        np.testing.assert_allclose(outputs.logits, alone.logits, atol=1e-5)
        np.testing.assert_allclose(outputs.embedding, alone.embedding, atol=1e-5)


@pytest.mark.parametrize("backend", [TorchBackend, OpenVinoBackend])
def test_a_model_without_a_head_computes_its_embedding_and_nothing_else(
    tmp_path: Path, backend: Callable[[int], Backend]
) -> None:
    folder = add_model(tmp_path / "store", classes=0)
    card = Store(tmp_path / "store").find("pvt_v2_b0.tiny").require_card()
    images = random_images(2)
    with torch.inference_mode():
        expected = build(card, folder).model.forward_all(build(card, folder).normalised(torch.tensor(np.stack(images))))
    load_once = partial(load_tiny, tmp_path / "store", backends=[backend(1)], cache=tmp_path / "cache")

    for cached in (False, backend is OpenVinoBackend):
        executable = load_once()
        outputs = executable.run(0, images)

        assert executable.report.cached is cached
        assert [each.logits.shape for each in outputs] == [(0,), (0,)]
        np.testing.assert_allclose([each.embedding for each in outputs], expected.embedding, rtol=1e-3, atol=1e-4)
    graph = backend(1).program(build(card, folder), 32, 32).graph(1, Layout(1, 1), "float32")
    assert [each.shape for each in graph.run(0, images[:1])] == [(1, 256)]


@pytest.mark.parametrize(("classes", "labels"), [(3, []), (0, ["a", "b"])])
def test_a_card_and_weights_of_which_one_has_a_head_do_not_go_together(
    tmp_path: Path, classes: int, labels: list[str]
) -> None:
    edit_card(add_model(tmp_path, classes=classes), labels=labels, format=3)

    with pytest.raises(WeightsMismatch, match=r"head.*compare the card's variant and number of labels"):
        load_tiny(tmp_path)


def test_a_model_without_a_head_has_stage_maps_and_other_sizes(tmp_path: Path) -> None:
    add_model(tmp_path, classes=0)
    executable = load_tiny(tmp_path, max_batch_size=1, backends=[OpenVinoBackend(1)])

    executable.add_stages()
    larger = executable.resized(64, 64)

    (staged,) = executable.run(0, random_images(1), stages=True)
    np.testing.assert_allclose(staged.stages[-1].mean(axis=(1, 2)), staged.embedding, rtol=1e-3, atol=1e-5)
    assert executable.head is None
    (resized,) = larger.run(0, [np.zeros((64, 64, 3), np.uint8)])
    assert (resized.logits.shape, resized.embedding.shape) == ((0,), (256,))


def test_the_plan_is_measured_up_to_the_setting(tmp_path: Path) -> None:
    add_model(tmp_path)

    executable = load_tiny(tmp_path, max_batch_size=1)

    assert executable.plan.sizes == (1,)
    assert executable.plan.time(1) > 0


def test_the_report_says_what_was_loaded_and_how(tmp_path: Path) -> None:
    add_model(tmp_path)

    report = load_tiny(tmp_path, precision=None).report

    assert (report.backend, report.precision) == ("torch", "float32")
    assert report.load_seconds > 0


def test_memory_that_was_freed_before_does_not_make_a_model_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add_model(tmp_path) / "model.safetensors"
    monkeypatch.setattr("service.backends.cpu.resident_bytes", lambda: 10**9)

    assert load_tiny(tmp_path).report.memory_bytes == path.stat().st_size


def test_a_card_with_another_number_of_labels_than_the_head_is_refused(tmp_path: Path) -> None:
    edit_card(add_model(tmp_path), labels=["one", "two"])

    with pytest.raises(WeightsMismatch, match=r"head\.weight"):
        load_tiny(tmp_path)


def test_a_card_with_another_number_of_parameters_is_refused(tmp_path: Path) -> None:
    edit_card(add_model(tmp_path), parameters=7)

    with pytest.raises(CardInvalid, match="the card says 7 parameters"):
        load_tiny(tmp_path)


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = add_model(tmp_path) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(WeightsDigestMismatch):
        load_tiny(tmp_path)


def test_a_card_that_makes_the_model_compute_nan_is_refused(tmp_path: Path) -> None:
    pixels = {"height": 32, "width": 32, "mean": [0.0, 0.0, 0.0], "std": [1e-320, 1e-320, 1e-320]}
    edit_card(add_model(tmp_path), preprocessing=pixels)

    with pytest.raises(ModelLoadFailed, match="gives NaN or infinity"):
        load_tiny(tmp_path)


def test_a_backend_that_fails_gives_way_to_the_next_and_the_model_serves(tmp_path: Path) -> None:
    add_model(tmp_path)

    with capture_logs() as logs:
        executable = load_tiny(tmp_path, backends=[Broken(1), TorchBackend(1)])

    assert executable.run(0, random_images(1))
    assert executable.report.notes == ("torch failed: RuntimeError: can't compile Served for 32x32",)
    assert [line["event"] for line in logs] == ["backend_failed"]


def test_the_last_backends_failure_is_the_models(tmp_path: Path) -> None:
    add_model(tmp_path)

    with pytest.raises(RuntimeError, match="can't compile"):
        load_tiny(tmp_path, backends=[Broken(1)])


def test_a_second_load_takes_plan_and_graphs_from_the_cache_and_has_the_same_outputs(tmp_path: Path) -> None:
    add_model(tmp_path / "store")
    images = random_images(1)
    load_once = partial(load_tiny, tmp_path / "store", backends=[OpenVinoBackend(1)], cache=tmp_path / "cache")

    first, second = load_once(), load_once()

    assert (first.report.cached, second.report.cached) == (False, True)
    assert second.plan == first.plan
    assert second.report.layout == first.report.layout
    np.testing.assert_array_equal(second.run(0, images)[0].logits, first.run(0, images)[0].logits)


def test_a_load_from_the_cache_does_not_read_the_weights(tmp_path: Path) -> None:
    path = add_model(tmp_path / "store") / "model.safetensors"
    load_once = partial(load_tiny, tmp_path / "store", backends=[OpenVinoBackend(1)], cache=tmp_path / "cache")
    load_once()
    path.write_bytes(bytes(path.stat().st_size))

    assert load_once().report.cached


def test_a_cached_graph_that_the_backend_refuses_is_made_anew(tmp_path: Path) -> None:
    class Refusing(OpenVinoBackend):
        version = OpenVinoBackend.version

        def restore(self, *_: object) -> NoReturn:
            raise RuntimeError("made by another version")

    add_model(tmp_path / "store")
    load_once = partial(load_tiny, tmp_path / "store", 1, cache=tmp_path / "cache")
    load_once(backends=[OpenVinoBackend(1)])

    with capture_logs() as logs:
        again = load_once(backends=[Refusing(1)])

    assert not again.report.cached
    assert again.run(0, random_images(1))
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("plan_cache_ignored", "RuntimeError: made by another version")
    ]


def test_a_plan_for_other_options_or_another_card_is_measured_anew(tmp_path: Path) -> None:
    folder = add_model(tmp_path / "store")
    load_once = partial(load_tiny, tmp_path / "store", backends=[OpenVinoBackend(1)], cache=tmp_path / "cache")
    load_once(1)

    assert not load_once(2).report.cached
    edit_card(folder, preprocessing={"height": 64, "width": 32})
    assert not load_once(2).report.cached
    assert load_once(2).report.cached


def test_a_card_that_fails_during_a_load_is_reported_and_the_next_backend_serves(tmp_path: Path) -> None:
    class FailedCard(TorchBackend):
        def program(self, module: Served, height: int, width: int) -> Program:
            raise DeviceFailed(f"cuda:0 failed with {type(module).__name__} for {height}x{width}")

    add_model(tmp_path)
    devices = DeviceHealth()
    makers: list[Callable[[], Backend]] = [partial(FailedCard, 1), partial(TorchBackend, 1)]

    loaded = load(Store(tmp_path).find("pvt_v2_b0.tiny"), makers, Limits(1, 1), devices=devices)

    assert devices.failure == "cuda:0 failed with Served for 32x32"
    assert loaded.report.notes == (f"torch failed: DeviceFailed: {devices.failure}",)
