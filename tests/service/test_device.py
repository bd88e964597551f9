import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from service.backends import device as device_module
from service.backends.device import Captured, CudaDevice, Placed
from service.errors import OutOfMemory
from service.pvt_v2 import create
from service.served import Served
from tests.service.simulated_cuda import SimulatedTorch

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPE = (2, 4, 4, 3)


class Sums:
    """The sum of each picture's pixels, and the picture's first pixel."""

    def __init__(self) -> None:
        self.pixels, self.answers = torch.zeros(0), self.of(torch.zeros(SHAPE))

    @staticmethod
    def of(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels.float().sum(dim=(1, 2, 3)), pixels[:, 0, 0].float()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.pixels, self.answers = pixels, self.of(pixels)
        return self.answers

    def again(self) -> None:
        """What repeating a graph of the last call does."""
        for answer, new in zip(self.answers, self.of(self.pixels), strict=True):
            answer.copy_(new)


@pytest.fixture(params=["lazy", "mixed", pytest.param("real", marks=gpu)])
def torch_or_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimulatedTorch | None:
    """The simulation, which has taken torch's place; None where a card is there."""
    simulated = None if request.param == "real" else SimulatedTorch(mixed=request.param == "mixed")
    if simulated:
        monkeypatch.setattr(device_module, "torch", simulated)
    return simulated


def captured(simulated: SimulatedTorch | None, slots: int) -> Captured:
    function = Sums()
    if simulated:
        simulated.repeat = function.again
    return CudaDevice(0).capture(function, SHAPE, slots)


def batch(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, SHAPE, dtype=np.uint8)


def assert_answered(given: tuple[np.ndarray, ...], seed: int) -> None:
    for mine, true in zip(given, Sums.of(torch.from_numpy(batch(seed))), strict=True):
        np.testing.assert_array_equal(mine, true.numpy())


def test_each_batch_gets_its_own_answers(torch_or_card: SimulatedTorch | None) -> None:
    run = captured(torch_or_card, 2)

    given = []
    for seed in range(6):
        np.copyto(run.room(seed % 2), batch(seed))
        given.append(run.run(seed % 2))

    for seed, each in enumerate(given):  # read at the end: a later batch has not overwritten them
        assert_answered(each, seed)


def test_batches_on_their_way_at_the_same_time_do_not_mix(torch_or_card: SimulatedTorch | None) -> None:
    slots, rounds = 3, 8
    run = captured(torch_or_card, slots)
    together = threading.Barrier(slots)
    given: dict[int, tuple[np.ndarray, ...]] = {}

    def work(slot: int) -> None:
        for turn in range(rounds):
            np.copyto(run.room(slot), batch(turn * slots + slot))
            together.wait(30)
            given[turn * slots + slot] = run.run(slot)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(given) == slots * rounds
    for seed, each in given.items():
        assert_answered(each, seed)


@pytest.mark.parametrize("mixed", [False, True], ids=["lazy", "mixed"])
def test_all_batches_may_be_under_way_before_the_first_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, *, mixed: bool
) -> None:
    slots = 2
    everyone_waits = threading.Barrier(slots)

    def wait() -> None:
        everyone_waits.wait(30)

    simulated = SimulatedTorch(on_wait=wait, mixed=mixed)
    monkeypatch.setattr(device_module, "torch", simulated)
    run = captured(simulated, slots)
    given: dict[int, tuple[np.ndarray, ...]] = {}

    def work(slot: int) -> None:
        np.copyto(run.room(slot), batch(slot))
        given[slot] = run.run(slot)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    for slot in range(slots):
        assert_answered(given[slot], slot)


def test_what_the_first_runs_decide_is_not_captured(torch_or_card: SimulatedTorch | None) -> None:
    function, calls = Sums(), []
    if torch_or_card:
        torch_or_card.repeat = function.again

    def counted(pixels: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(pixels))
        return function(pixels)

    run = CudaDevice(0).capture(counted, SHAPE, 1)
    before = len(calls)
    run.run(0)

    assert before == device_module.WARM_UPS + 1
    assert len(calls) == before  # a run repeats what was captured


def test_too_little_memory_on_the_card_is_told_as_that(torch_or_card: SimulatedTorch | None) -> None:
    del torch_or_card

    def greedy(_: Tensor) -> tuple[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match="does not fit into the GPU's memory: CUDA out of memory"):
        CudaDevice(0).capture(greedy, SHAPE, 1)


def test_a_card_says_what_it_is(torch_or_card: SimulatedTorch | None) -> None:
    card = CudaDevice(0)

    assert (card.name, card.bfloat16) == ("cuda:0", True) or torch_or_card is None
    assert card.memory_bytes() == 7 or torch_or_card is None


@pytest.mark.parametrize("variant", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_the_compiler_takes_a_placed_module_whole(variant: str) -> None:
    torch.manual_seed(0)
    served = Served(create(variant, num_classes=3), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)).eval()
    placed = Placed(served, torch.bfloat16, channels_last=True).eval()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))
    compiled = torch.compile(placed, backend="aot_eager", dynamic=False, fullgraph=True)

    with torch.no_grad():
        given, expected = compiled(pixels), placed(pixels)

    for mine, true in zip(given, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, true, atol=0.05, rtol=0.05)


@gpu
def test_a_captured_model_answers_as_the_plain_one_does_on_a_card() -> None:
    torch.manual_seed(0)
    served = Served(create("pvt_v2_b0", num_classes=5), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = served(torch.from_numpy(pictures))

    (card,) = device_module.cuda_devices(["cuda:0"])
    run = card.capture(card.place(served, torch.float32, channels_last=True), pictures.shape, 1)
    np.copyto(run.room(0), pictures)

    for mine, true in zip(run.run(0), expected, strict=True):
        np.testing.assert_allclose(mine, true.numpy(), atol=1e-4 * max(1.0, float(true.abs().max())))
