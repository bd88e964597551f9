"""Memory that a model took comes back, measured on a process of its own."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save

from service.architecture.pvt_v2 import create
from service.architecture.variants import VARIANTS
from service.machine import resident_bytes
from service.store.cards import ModelCard, Preprocessing
from service.store.folder import weights_file, write_model
from tests.conftest import ROOT
from tests.service.machine.memory_rounds import settled_bytes

MB = 1_000_000


class Step(NamedTuple):
    turn: int
    model: str
    loaded: int
    after: int


def add_variant(root: Path, variant: str, noise: torch.Tensor) -> int:
    """A model of the variant's true shapes, its tensors cut from one seeded `noise`; gives the bytes of its weights."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in create(variant, num_classes=10).state_dict().items()}
    tensors = {name: noise[: shape.numel()].reshape(shape).clone() for name, shape in shapes.items()}
    weights = save(tensors)
    card = ModelCard(
        id=f"{variant}.tiny",
        variant=variant,
        labels=tuple("0123456789"),
        preprocessing=Preprocessing(height=32, width=32),
        weights=weights_file(weights),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        licence="Apache-2.0",
        source="random",
    )
    write_model(root, "1", card, weights)
    return 4 * card.parameters  # in memory they are float32


def rounds(root: Path, backend: str, count: int) -> list[Step]:
    command = [sys.executable, "-m", "tests.service.machine.memory_rounds", str(root), backend, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return [Step(int(turn), model, int(loaded), int(after)) for turn, model, loaded, after in lines]


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return 0.02 * torch.randn(4_000_000, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.timeout(240)
def test_all_seven_variants_loaded_and_unloaded_in_turn_three_times_leave_nothing_behind(
    tmp_path: Path, noise: torch.Tensor
) -> None:
    weights = {f"{variant}.tiny": add_variant(tmp_path, variant, noise) for variant in VARIANTS}

    steps = rounds(tmp_path, "torch", 3)

    assert [step.model for step in steps] == [*sorted(weights)] * 3
    for turn in (1, 2):  # the first takes some of the libraries' memory along
        measured = sum(step.loaded for step in steps if step.turn == turn)
        assert measured == pytest.approx(sum(weights.values()), rel=0.1), steps
    assert steps[-1].after - steps[6].after < 15 * MB, steps
    assert sum(weights.values()) > 990 * MB


def test_compiled_graphs_and_what_was_traced_for_them_leave_nothing_behind(tmp_path: Path, noise: torch.Tensor) -> None:
    add_variant(tmp_path, "pvt_v2_b0", noise)  # of which every load left 8 MB behind, in types that torch made

    steps = rounds(tmp_path, "openvino", 5)

    assert steps[-1].after - steps[1].after < 8 * MB, steps


def test_what_a_thread_has_freed_at_the_end_of_its_own_arena_goes_back_too() -> None:
    def on_a_thread() -> tuple[int, int, int]:
        before = settled_bytes()  # with it glibc lets 64 MB stay there, as it does by itself once it freed large blocks
        blocks = [b"x" * 100_000 for _ in range(400)]
        held = resident_bytes()
        del blocks
        return before, held, settled_bytes()

    with ThreadPoolExecutor(1) as executor:
        before, held, after = executor.submit(on_a_thread).result()

    assert held - before > 35 * MB
    assert after - before < 4 * MB


def test_a_card_that_has_failed_keeps_nothing_else_from_giving_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", failing)

    assert settled_bytes() > 0
