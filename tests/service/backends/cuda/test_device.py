import gc
import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from service.architecture.pvt_v2 import create
from service.backends import cuda
from service.backends.base import Served
from service.backends.cuda import Captured, CudaDevice
from service.errors import DeviceFailed, OutOfMemory
from tests.service.backends.cuda.simulated_cuda import POOL, SimulatedTorch

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPE = (2, 4, 4, 3)


def take_torchs_place(simulated: SimulatedTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "torch", simulated)


class Sums:
    """The sum of each image's pixels, and the image's first pixel."""

    def __init__(self) -> None:
        self.pixels, self.outputs = torch.zeros(0), self.of(torch.zeros(SHAPE))

    @staticmethod
    def of(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels.float().sum(dim=(1, 2, 3)), pixels[:, 0, 0].float()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.pixels, self.outputs = pixels, self.of(pixels)
        return self.outputs

    def again(self) -> None:
        """Repeats the last call, as a graph of it does."""
        for output, new in zip(self.outputs, self.of(self.pixels), strict=True):
            output.copy_(new)


@pytest.fixture(params=["lazy", "mixed", pytest.param("real", marks=gpu)])
def torch_or_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimulatedTorch | None:
    """The simulation, which has taken torch's place; None on a real card."""
    simulated = None if request.param == "real" else SimulatedTorch(mixed=request.param == "mixed")
    if simulated:
        take_torchs_place(simulated, monkeypatch)
    return simulated


def captured(simulated: SimulatedTorch | None, slots: int) -> Captured:
    function = Sums()
    if simulated:
        simulated.repeat = function.again
    return CudaDevice(0).capture(function, SHAPE, slots)


def batch(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, SHAPE, dtype=np.uint8)


def assert_outputs(given: tuple[np.ndarray, ...], seed: int) -> None:
    for mine, true in zip(given, Sums.of(torch.from_numpy(batch(seed))), strict=True):
        np.testing.assert_array_equal(mine, true.numpy())


def test_each_batch_gets_its_own_outputs(torch_or_card: SimulatedTorch | None) -> None:
    run = captured(torch_or_card, 2)

    given = []
    for seed in range(6):
        np.copyto(run.input_buffer(seed % 2), batch(seed))
        given.append(run.run(seed % 2))

    for seed, each in enumerate(given):  # read at the end: a later batch has not overwritten them
        assert_outputs(each, seed)


def test_batches_in_flight_at_the_same_time_do_not_mix(torch_or_card: SimulatedTorch | None) -> None:
    slots, rounds = 3, 8
    run = captured(torch_or_card, slots)
    together = threading.Barrier(slots)
    given: dict[int, tuple[np.ndarray, ...]] = {}

    def work(slot: int) -> None:
        for turn in range(rounds):
            np.copyto(run.input_buffer(slot), batch(turn * slots + slot))
            together.wait(30)
            given[turn * slots + slot] = run.run(slot)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(given) == slots * rounds
    for seed, each in given.items():
        assert_outputs(each, seed)


@pytest.mark.parametrize("mixed", [False, True], ids=["lazy", "mixed"])
def test_all_batches_may_be_under_way_before_the_first_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, *, mixed: bool
) -> None:
    slots = 2
    everyone_waits = threading.Barrier(slots)

    def wait() -> None:
        everyone_waits.wait(30)

    simulated = SimulatedTorch(on_wait=wait, mixed=mixed)
    take_torchs_place(simulated, monkeypatch)
    run = captured(simulated, slots)
    given: dict[int, tuple[np.ndarray, ...]] = {}

    def work(slot: int) -> None:
        np.copyto(run.input_buffer(slot), batch(slot))
        given[slot] = run.run(slot)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    for slot in range(slots):
        assert_outputs(given[slot], slot)


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

    assert before == cuda.WARM_UPS + 1
    assert len(calls) == before  # a run repeats what was captured


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_too_little_memory_on_the_card_is_reported_as_that(
    torch_or_card: SimulatedTorch | None, kind: type[RuntimeError]
) -> None:
    del torch_or_card

    def greedy(_: Tensor) -> tuple[Tensor]:
        raise kind("CUDA error: out of memory")

    with pytest.raises(OutOfMemory, match="does not fit into the GPU's memory: CUDA error: out of memory"):
        CudaDevice(0).capture(greedy, SHAPE, 1)


def test_a_card_that_no_longer_works_is_reported_as_that(torch_or_card: SimulatedTorch | None) -> None:
    del torch_or_card

    def broken(_: Tensor) -> tuple[Tensor]:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might")

    with pytest.raises(DeviceFailed, match=r"^cuda:0 failed with CUDA error: an illegal memory access was.*; re"):
        CudaDevice(0).capture(broken, SHAPE, 1)


def test_what_can_not_be_captured_says_why_and_the_card_goes_on(torch_or_card: SimulatedTorch | None) -> None:
    card, function, calls = CudaDevice(0), Sums(), []
    if torch_or_card:
        torch_or_card.repeat = function.again

    def refused(pixels: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) > cuda.WARM_UPS:
            if torch_or_card:
                torch_or_card.broken = True  # ending a capture that failed fails too
            raise ValueError("not while capturing")
        return function(pixels)

    with pytest.raises(ValueError, match="not while capturing"):
        card.capture(refused, SHAPE, 1)
    if torch_or_card:
        torch_or_card.broken = False
    run = card.capture(function, SHAPE, 1)
    np.copyto(run.input_buffer(0), batch(1))
    assert_outputs(run.run(0), 1)


def test_a_capture_that_fails_is_no_failure_of_the_card(torch_or_card: SimulatedTorch | None) -> None:
    del torch_or_card

    def refused(_: Tensor) -> tuple[Tensor]:
        raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(torch.AcceleratorError, match="during capture"):
        CudaDevice(0).capture(refused, SHAPE, 1)


def test_many_captures_share_no_stream_with_each_other_but_slots(torch_or_card: SimulatedTorch | None) -> None:
    function = Sums()
    if torch_or_card:
        torch_or_card.repeat = function.again
    card = CudaDevice(0)

    runs = [card.capture(function, SHAPE, 2) for _ in range(20)]
    np.copyto(runs[-1].input_buffer(1), batch(3))

    assert_outputs(runs[-1].run(1), 3)
    streams = {card.computing, card.capturing, *card.copying.values()}
    assert len(streams) == 4


def test_warming_up_never_uses_a_stream_that_something_else_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated, function, warmed = SimulatedTorch(), Sums(), list[object]()
    take_torchs_place(simulated, monkeypatch)
    simulated.repeat = function.again
    card = CudaDevice(0)

    def watched(pixels: Tensor) -> tuple[Tensor, Tensor]:
        warmed.append(simulated.current())
        return function(pixels)

    for _ in range(2 * POOL):
        card.capture(watched, SHAPE, 2)

    captured = warmed[cuda.WARM_UPS :: cuda.WARM_UPS + 1]
    assert captured == [card.capturing] * len(captured)
    others = [stream for stream in warmed if stream is not card.capturing]
    assert len(others) == len(captured) * cuda.WARM_UPS
    assert not {*others} & {card.computing, *card.copying.values()}


def test_nothing_is_collected_during_a_capture(torch_or_card: SimulatedTorch | None) -> None:
    function, seen = Sums(), []
    if torch_or_card:
        torch_or_card.repeat = function.again

    def watched(pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(gc.isenabled())
        return function(pixels)

    CudaDevice(0).capture(watched, SHAPE, 1)

    assert seen == [True] * cuda.WARM_UPS + [False]
    assert gc.isenabled()


def test_a_graph_has_a_workspace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated, function = SimulatedTorch(), Sums()
    take_torchs_place(simulated, monkeypatch)
    simulated.repeat = function.again

    CudaDevice(0).capture(function, SHAPE, 1)

    assert simulated.order == ["clear", "capture", "captured", "clear"]


def test_captures_of_several_threads_take_turns(torch_or_card: SimulatedTorch | None) -> None:
    inside, most = 0, 0
    guard = threading.Lock()
    together = threading.Barrier(3)

    class Watched(Sums):
        def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal inside, most
            with guard:
                inside += 1
                most = max(most, inside)
            try:
                return super().__call__(pixels)
            finally:
                with guard:
                    inside -= 1

    card, function = CudaDevice(0), Watched()
    if torch_or_card:
        torch_or_card.repeat = function.again

    def capture() -> None:
        together.wait(30)
        card.capture(function, SHAPE, 1)

    threads = [threading.Thread(target=capture) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert most == 1


def test_a_card_says_what_it_is(torch_or_card: SimulatedTorch | None) -> None:
    card = CudaDevice(0)

    assert (card.name, card.bfloat16) == ("cuda:0", True) or torch_or_card is None
    assert card.memory_bytes() == 7 or torch_or_card is None


@gpu
def test_a_captured_model_has_the_outputs_of_the_plain_one_on_a_card() -> None:
    torch.manual_seed(0)
    served = Served(create("pvt_v2_b0", num_classes=5), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = served(torch.from_numpy(images))

    (card,) = cuda.cuda_devices(["cuda:0"])
    run = card.capture(card.place(served, torch.float32), images.shape, 1)
    np.copyto(run.input_buffer(0), images)

    for mine, true in zip(run.run(0), expected, strict=True):
        np.testing.assert_allclose(mine, true.numpy(), atol=1e-4 * max(1.0, float(true.abs().max())))
