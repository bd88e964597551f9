"""The engine with GPUs, for which CPUs stand in."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import WeakSet

import pytest
from torch import nn

from service import options as options_module
from service.backends.cuda.compiling import Function, Job
from service.backends.cuda.device import Captured
from service.engine import Engine
from service.errors import DeviceFailed, OutOfMemory
from service.options import EngineOptions, default_instances
from service.postprocess import Prediction
from tests.app.conftest import png
from tests.service.fake_device import FakeDevice
from tests.service.stores import add_model
from tests.service.test_engine import NAME, engine

TWO = ("cuda:0", "cuda:1")


class Clock(threading.local):
    """A clock of its own for each thread, moved by the runs of that thread."""

    now = 0.0


class Compiled(nn.Module):
    """The module itself, but of a type by which `Cards.run` knows that it is faster."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *pixels: Any) -> Any:
        return self.module(*pixels)


class Cards:
    """The GPUs of a test and their compiler, which waits for its gate; `on_run` is called with every run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.devices: list[FakeDevice] = []
        self.gate = threading.Event()
        self.preparing = threading.Event()
        self.stopped = threading.Event()
        self.on_run: Callable[[Function, int], None] = lambda *_: None
        monkeypatch.setattr("service.execution.plan.perf_counter", lambda: self.clock.now)
        monkeypatch.setattr(options_module, "cuda_devices", self.made)
        monkeypatch.setattr(options_module, "TorchCompiler", lambda *_: self)

    def made(self, names: tuple[str, ...]) -> list[FakeDevice]:
        self.devices = [FakeDevice(name, on_run=self.run) for name in names]
        return self.devices

    def prepare(self, job: Job, stopped: threading.Event) -> None:
        assert job.device in TWO
        self.stopped = stopped
        self.preparing.set()
        assert self.gate.wait(30)

    def __call__(self, module: nn.Module) -> Function:
        return Compiled(module)

    def run(self, function: Function, size: int) -> None:
        """Batches cost a fixed time and some for each image, compiled ones less of both."""
        self.clock.now += 0.1 + 0.01 * size if isinstance(function, Compiled) else 0.4 + 0.2 * size
        self.on_run(function, size)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    return Cards(monkeypatch)


def on_gpus(root: Path, **options: Any) -> Any:
    cache = root.with_name(f"{root.name}-cache")
    defaults = {
        "cache": cache,
        "devices": TWO,
        "instances": default_instances(TWO, 2),
        "max_batch_size": 8,
        "backend": "auto",
    }
    return engine(root, **{**defaults, **options})


def plan(e: Engine) -> list[int]:
    """The batch sizes by which the scheduler goes."""
    (queue,) = e.activity().queues
    return [*queue.plan]


async def answered(e: Engine, count: int) -> int:
    predictions = await e.predict([png() for _ in range(count)])
    return sum(isinstance(result, Prediction) for result in predictions.results)


def raising(error: Exception) -> Callable[..., Any]:
    """A function of anything that raises `error`."""

    def raise_(*_: object, **__: object) -> Any:
        raise error

    return raise_


async def optimized(e: Engine) -> None:
    """Return when nothing is left to optimize."""
    await asyncio.gather(*e._loading._optimizing.values())


async def test_a_model_serves_before_anything_is_compiled_and_with_optimized_graphs_afterwards(
    tmp_path: Path, cards: Cards
) -> None:
    ran: list[bool] = []
    async with on_gpus(tmp_path) as e:
        assert await answered(e, 1) == 1
        async with e._registry.lease(NAME) as resident:
            report = resident.executable.report
        assert (report.backend, report.device) == ("torch", "cuda:0, cuda:1")
        before = plan(e)

        cards.gate.set()
        await optimized(e)
        cards.on_run = lambda function, _: ran.append(isinstance(function, Compiled))
        assert await answered(e, 16) == 16

    assert before == [1, 2, 4, 8]
    assert ran
    assert all(ran)


async def test_larger_batches_that_pay_once_compiled_join_the_plan(
    tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(function: Function, size: int) -> None:
        cards.clock.now += 0.1 + 0.01 * size if isinstance(function, Compiled) else 0.2 * size

    monkeypatch.setattr(cards, "run", flat)
    async with on_gpus(tmp_path) as e:
        await answered(e, 1)
        before = plan(e)
        cards.gate.set()
        await optimized(e)
        after = plan(e)
        assert await answered(e, 16) == 16

    assert (before, after) == ([1], [1, 2, 4, 8])


async def test_running_out_of_memory_halves_the_batch_and_the_model_goes_on(tmp_path: Path, cards: Cards) -> None:
    def tight(_: Function, size: int) -> None:
        if size > 4:
            raise OutOfMemory(f"{size} do not fit")

    async with on_gpus(tmp_path, instances=1, devices=("cuda:0",)) as e:
        await answered(e, 1)
        cards.on_run = tight
        assert await answered(e, 40) == 40
        halved = plan(e)
        cards.on_run = lambda *_: None
        cards.gate.set()
        await optimized(e)

        assert halved == [1, 2, 4]
        assert plan(e) == halved  # what was given up stays so, whatever is compiled
        assert await answered(e, 40) == 40


async def test_a_model_that_fails_on_the_gpu_is_served_by_the_cpu_and_says_why(
    tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeDevice, "place", raising(RuntimeError("CUDA error: an illegal instruction")))
    monkeypatch.setattr("service.execution.plan.perf_counter", perf_counter)
    async with on_gpus(tmp_path, backend="torch") as e:
        assert await answered(e, 3) == 3
        async with e._registry.lease(NAME) as resident:
            report = resident.executable.report

    assert report.device == "cpu"
    assert "torch on cuda:0, cuda:1 failed: RuntimeError: CUDA error: an illegal instruction" in report.notes
    assert cards.devices


async def test_a_model_that_does_not_fit_onto_the_gpu_is_served_by_the_cpu(
    tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cards.devices == []
    monkeypatch.setattr(options_module, "cuda_devices", lambda names: [FakeDevice(name, largest=0) for name in names])
    monkeypatch.setattr("service.execution.plan.perf_counter", perf_counter)
    async with on_gpus(tmp_path, backend="torch") as e:
        assert await answered(e, 1) == 1
        async with e._registry.lease(NAME) as resident:
            assert resident.executable.report.device == "cpu"


async def test_a_gpu_that_fails_makes_the_service_not_live(tmp_path: Path, cards: Cards) -> None:
    def failing(_: Function, size: int) -> None:
        raise DeviceFailed(f"cuda:0 failed with CUDA error: an illegal address in a batch of {size}")

    async with on_gpus(tmp_path) as e:
        await answered(e, 1)
        assert e.live().live
        cards.on_run = failing
        assert await answered(e, 2) == 0

        assert not e.live().live
        assert "an illegal address" in e.live().reasons[0]


async def test_a_gpu_that_fails_while_a_model_is_loaded_makes_the_service_not_live_though_the_cpu_answers(
    tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = "cuda:0 failed with CUDA error: unspecified launch failure"
    monkeypatch.setattr(FakeDevice, "place", raising(DeviceFailed(failure)))
    monkeypatch.setattr("service.execution.plan.perf_counter", perf_counter)
    async with on_gpus(tmp_path, backend="torch") as e:
        assert e.live().live
        assert await answered(e, 1) == 1

        assert cards.devices
        assert e.live().reasons == [failure]


@pytest.mark.parametrize("compiling", [False, True], ids=["stage maps", "compiling"])
async def test_a_gpu_that_fails_while_graphs_are_made_makes_the_service_not_live(
    tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch, compiling: bool
) -> None:
    failure = "cuda:1 failed with CUDA error: unspecified launch failure"
    async with on_gpus(tmp_path) as e:
        await answered(e, 1)
        monkeypatch.setattr(FakeDevice, "capture", raising(DeviceFailed(failure)))
        if compiling:
            cards.gate.set()
            await optimized(e)
        else:
            with pytest.raises(DeviceFailed):
                await e.infer([png()], stages=True)

        assert e.live().reasons == [failure]
        cards.gate.set()


async def test_graphs_that_join_the_plan_later_count_as_the_models_memory(
    tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph_bytes = 50_000_000
    alive: WeakSet[Captured] = WeakSet()
    capture = FakeDevice.capture

    def weighed(device: FakeDevice, *arguments: Any) -> Captured:
        captured = capture(device, *arguments)
        device.captured.clear()  # what is alive is so because the model has it
        alive.add(captured)
        return captured

    def flat(function: Function, size: int) -> None:
        cards.clock.now += 0.1 + 0.01 * size if isinstance(function, Compiled) else 0.2 * size

    monkeypatch.setattr(FakeDevice, "capture", weighed)
    monkeypatch.setattr(FakeDevice, "memory_bytes", lambda _: graph_bytes * len(alive) // len(TWO))
    monkeypatch.setattr(cards, "run", flat)
    async with on_gpus(tmp_path) as e:
        await answered(e, 1)
        (resident,) = e._registry.loaded()
        before, graphs = resident.memory_bytes, len(alive)
        cards.gate.set()
        await optimized(e)

        assert plan(e) == [1, 2, 4, 8]
        assert len(alive) == 4 * len(TWO)
        assert resident.memory_bytes - before == graph_bytes * (len(alive) - graphs)


async def test_only_one_model_is_prepared_at_a_time_while_others_load(tmp_path: Path, cards: Cards) -> None:
    add_model(tmp_path, "pvt_v2_b0.other")
    async with on_gpus(tmp_path) as e:
        for model in (NAME, "pvt_v2_b0.other"):
            await e.predict([png()], model=model)
        waiting = [*e._loading._optimizing.values()]

        assert len(waiting) == 2
        assert not any(task.done() for task in waiting)
        cards.gate.set()
        await asyncio.gather(*waiting)


async def test_a_compiler_that_fails_leaves_the_model_as_it_is_with_a_note(
    tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "prepare", raising(RuntimeError("no C compiler")))
    async with on_gpus(tmp_path) as e:
        await answered(e, 1)
        before = plan(e)
        await optimized(e)
        async with e._registry.lease(NAME) as resident:
            notes = resident.executable.notes
        assert await answered(e, 4) == 4

        assert plan(e) == before
    assert notes[-1] == "batches of 1 and more are not compiled: RuntimeError: no C compiler"


@pytest.mark.parametrize("without", [{"compile": False}, {"cache": None}], ids=["compile", "cache"])
async def test_without_one_of_these_nothing_is_compiled(
    tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch, without: dict[str, Any]
) -> None:
    monkeypatch.setattr(cards, "prepare", lambda *_: pytest.fail("compiled"))
    async with on_gpus(tmp_path, **without) as e:
        await answered(e, 1)
        await optimized(e)
        assert await answered(e, 1) == 1


async def test_stage_maps_and_other_sizes_come_from_the_gpu_too(tmp_path: Path, cards: Cards) -> None:
    cards.gate.set()
    async with on_gpus(tmp_path) as e:
        (result,) = (await e.infer([png()], size=(64, 96), stages=True)).results
        (own,) = (await e.infer([png()], stages=True)).results

    assert [each.shape for each in result.outputs.stages] == [(32, 16, 24), (64, 8, 12), (160, 4, 6), (256, 2, 3)]
    assert [each.shape for each in own.outputs.stages] == [(32, 8, 8), (64, 4, 4), (160, 2, 2), (256, 1, 1)]


async def test_a_model_is_freed_while_its_graphs_are_being_compiled(tmp_path: Path, cards: Cards) -> None:
    async with on_gpus(tmp_path) as e:
        await answered(e, 1)
        assert await asyncio.to_thread(cards.preparing.wait, 30)
        await e.unload(NAME)

        assert e._registry.loaded() == []
        assert cards.stopped.is_set()
        cards.gate.set()
        assert await answered(e, 1) == 1


def test_options_name_no_gpu_unless_told() -> None:
    options = EngineOptions(model_store=Path(), default_model=NAME)

    assert options.devices == ()
    assert default_instances((), 3) == 3
    assert default_instances(TWO, 3) == 4
