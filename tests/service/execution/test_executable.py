from pathlib import Path

import numpy as np
import pytest
import torch

from service.backends.base import Backend, Batch, Graph, Images, Layout, Precision, build
from service.backends.cpu import OpenVinoBackend, TorchBackend
from service.errors import ModelLoadFailed
from service.execution.executable import STAGES, Executable
from service.execution.plan import BatchPlan
from service.execution.tuning import LatencyGraph, OptimizedGraph, Tuned
from service.results import Floats
from tests.service.registry.test_loader import load_tiny, random_images
from tests.service.stores import add_model

BACKENDS = [TorchBackend(1), OpenVinoBackend(1)]


def test_an_image_that_is_alone_runs_in_the_latency_graph(tmp_path: Path) -> None:
    class Named(Graph):
        precision: Precision = "float32"

        def __init__(self, name: float) -> None:
            self.name = name

        def run(self, instance: int, images: Images) -> tuple[Floats, Floats]:
            assert instance == 0
            return np.full((len(images), 3), self.name, np.float32), np.zeros((len(images), 2), np.float32)

    add_model(tmp_path)
    loaded = load_tiny(tmp_path, 1)
    latency = LatencyGraph(Layout(1, 2), 0.01, lambda: Named(2))
    tuned = Tuned("float32", Layout(2, 1), BatchPlan({1: 0.02, 2: 0.03}), {1: Named(1), 2: Named(1)}, latency, ())
    executable = Executable(loaded.stored, TorchBackend(1), tuned, loaded.report)

    def answered(count: int, *, alone: bool) -> float:
        return float(executable.run(0, random_images(count), alone=alone)[0].logits[0])

    assert answered(1, alone=True) == 1  # it is not made yet
    executable.add_latency_graph()
    assert [answered(1, alone=True), answered(1, alone=False), answered(2, alone=True)] == [2, 1, 1]


def expected(executable: Executable, images: Batch) -> tuple[Floats, ...]:
    """What the plain module gives."""
    with torch.inference_mode():
        outputs = build(executable.card, executable.stored.folder, STAGES)(torch.tensor(images))
    return tuple(output.numpy() for output in outputs)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_stage_maps_come_from_the_same_forward_as_logits(tmp_path: Path, backend: Backend) -> None:
    add_model(tmp_path, side=64)
    executable = load_tiny(tmp_path, 2, backends=[backend])
    images = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(ModelLoadFailed, match="with stage maps have not been made"):
        executable.run(0, list(images), stages=True)

    executable.add_stages()
    (outputs,) = executable.run(0, list(images), stages=True)
    (plain,) = executable.run(0, list(images))

    assert [each.shape for each in outputs.stages] == [(32, 16, 16), (64, 8, 8), (160, 4, 4), (256, 2, 2)]
    logits, embedding, *stages = expected(executable, images)
    for mine, true in zip(
        (outputs.logits, outputs.embedding, *outputs.stages), (logits, embedding, *stages), strict=True
    ):
        np.testing.assert_allclose(mine, true[0], atol=1e-4)
    np.testing.assert_allclose(plain.logits, logits[0], atol=1e-4)
    assert plain.stages == ()


def test_the_head_turns_the_embedding_into_logits(tmp_path: Path) -> None:
    add_model(tmp_path)
    executable = load_tiny(tmp_path, 1)
    executable.add_stages()
    (outputs,) = executable.run(0, random_images(1))

    assert executable.head is not None
    weight, bias = executable.head
    np.testing.assert_allclose(weight @ outputs.embedding + bias, outputs.logits, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_another_size_has_the_outputs_of_the_plain_module(tmp_path: Path, backend: Backend) -> None:
    add_model(tmp_path)
    resized = load_tiny(tmp_path, backends=[backend]).resized(64, 96)
    images = np.random.default_rng(1).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)

    (outputs,) = resized.run(0, list(images))

    np.testing.assert_allclose(outputs.logits, expected(resized, images)[0][0], atol=1e-4)
    assert not resized.own_size
    assert resized.plan.time(1) > 0


def test_larger_images_run_in_smaller_batches(tmp_path: Path) -> None:
    add_model(tmp_path)
    loaded = load_tiny(tmp_path, 1)
    tuned = Tuned("float32", Layout(1, 1), BatchPlan({1: 1.0, 2: 1.0, 4: 1.0}), {}, None, ())
    executable = Executable(loaded.stored, TorchBackend(1), tuned, loaded.report)

    assert executable.resized(32, 64).plan.sizes == (1, 2)
    assert executable.resized(96, 96).plan.sizes == (1,)


def test_a_model_whose_files_have_changed_makes_no_more_graphs_and_says_so(tmp_path: Path) -> None:
    folder = add_model(tmp_path)
    executable = load_tiny(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(b"another")

    with pytest.raises(ModelLoadFailed, match=r"model\.safetensors"):
        executable.add_stages()
    with pytest.raises(ModelLoadFailed, match=r"model\.safetensors"):
        executable.resized(64, 64)
    assert executable.run(0, random_images(1))


def test_an_optimized_graph_is_swapped_in_and_may_have_a_new_size(tmp_path: Path) -> None:
    add_model(tmp_path)
    executable = load_tiny(tmp_path, 1)
    graph = TorchBackend(1).program(build(executable.card, executable.stored.folder), 32, 32)
    plain = executable.run(0, random_images(3)[:1])

    executable.swap_graph(OptimizedGraph(4, graph.graph(4, Layout(1, 1), "float32"), 0.25))

    assert executable.plan.sizes == (1, 4)
    assert executable.plan.time(3) == 0.25
    together = executable.run(0, random_images(3))
    assert len(together) == 3
    np.testing.assert_allclose(together[0].logits, plain[0].logits, atol=1e-5)


def test_a_batch_that_is_larger_than_any_graph_with_stage_maps_is_run_in_parts(tmp_path: Path) -> None:
    add_model(tmp_path, side=64)
    executable = load_tiny(tmp_path, 1)
    executable.add_stages()
    images = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    graph = TorchBackend(1).program(build(executable.card, executable.stored.folder), 64, 64)
    executable.swap_graph(OptimizedGraph(4, graph.graph(4, Layout(1, 1), "float32"), 0.25))

    outputs = executable.run(0, list(images), stages=True)

    _, _, *stages = expected(executable, images)
    for i, each in enumerate(outputs):
        for mine, true in zip(each.stages, stages, strict=True):
            np.testing.assert_allclose(mine, true[i], atol=1e-4)
