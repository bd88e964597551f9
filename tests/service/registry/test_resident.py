import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import TypeVar

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from service.backends.base import DeviceHealth
from service.errors import InvalidImage, InvalidRequest, ModelLoadFailed, QueueFull
from service.execution.tuning import Reserve, unlimited
from service.memory import MemoryBudget
from service.metrics import EngineMetrics
from service.options import EngineOptions
from service.pipeline import Pipeline, Sized
from service.registry.resident import Resident
from service.results import Image, ImageResult
from tests.service.registry.test_loader import load_tiny, random_images
from tests.service.stores import add_model

pytestmark = pytest.mark.anyio
T = TypeVar("T")


class Compiler:
    """Compiles where it is called; counts how often, and waits for `go` first."""

    def __init__(self) -> None:
        self.calls = 0
        self.pixels: list[int] = []
        self.go = asyncio.Event()
        self.go.set()
        self.failure: Exception | None = None

    async def __call__(self, resident: Resident, make: Callable[[Reserve], T], pixels: int) -> T:  # noqa: ARG002
        self.calls += 1
        self.pixels.append(pixels)
        await self.go.wait()
        if self.failure:
            raise self.failure
        return make(unlimited)


class Model:
    """A resident model with its pipeline."""

    def __init__(self, root: Path, max_others: int = 2) -> None:
        options = EngineOptions(model_store=root, default_model="pvt_v2_b0.tiny", instances=1, cores=1)
        self.pipeline = Pipeline(options, EngineMetrics(CollectorRegistry()), DeviceHealth(), MemoryBudget())
        self.compiler = Compiler()
        self.resident = Resident(load_tiny(root, 2), self.pipeline, self.compiler, max_others=max_others)

    async def infer(self, sized: Sized, *images: Image, stages: bool = False) -> list[ImageResult]:
        results = await self.pipeline.infer(sized, images, monotonic() + 30, stages=stages)
        assert all(isinstance(each, ImageResult) for each in results), results
        return [each for each in results if isinstance(each, ImageResult)]


@asynccontextmanager
async def resident_model(root: Path, max_others: int = 2) -> AsyncIterator[Model]:
    add_model(root)
    model = Model(root, max_others)
    yield model
    await model.resident.close()
    await model.pipeline.scheduler.close(wait=True)


async def test_sizes_and_stage_maps_are_made_once_for_all_who_wait(tmp_path: Path) -> None:
    async with resident_model(tmp_path) as model:

        async def ask(size: tuple[int, int] | None) -> ImageResult:
            async with model.resident.at(size, stages=True) as sized:
                height, width = size or (32, 32)
                (inferred,) = await model.infer(sized, np.zeros((height, width, 3), np.uint8), stages=True)
                return inferred

        answers = await asyncio.gather(*(ask(size) for size in (None, (64, 32), None, (64, 32))))

    assert model.compiler.calls == 3  # stage maps at the model's own size, the other size, stage maps at that
    assert sorted(model.compiler.pixels) == [32 * 32, 64 * 32, 64 * 32]
    assert [each.outputs.stages[3].shape for each in answers] == [(256, 1, 1), (256, 2, 1)] * 2


async def test_only_who_asked_for_stage_maps_gets_them_though_one_batch_holds_all(tmp_path: Path) -> None:
    async with resident_model(tmp_path) as model, model.resident.at(stages=True) as sized:
        plain, staged = await asyncio.gather(
            model.infer(sized, *random_images(2)), model.infer(sized, *random_images(2), stages=True)
        )

    assert [len(each.outputs.stages) for each in (*plain, *staged)] == [0, 0, 4, 4]
    np.testing.assert_allclose(plain[0].outputs.logits, staged[0].outputs.logits, atol=1e-5)


async def test_the_size_used_least_recently_makes_room(tmp_path: Path) -> None:
    async with resident_model(tmp_path) as model:
        for size in ((64, 64), (32, 64), (64, 64), (96, 32)):
            async with model.resident.at(size):
                pass

        assert [queue.lane for queue in model.pipeline.scheduler.activity().queues] == [
            "pvt_v2_b0.tiny", "pvt_v2_b0.tiny at 64x64", "pvt_v2_b0.tiny at 96x32",
        ]  # fmt: skip
        assert model.resident.memory_bytes > model.resident.executable.report.memory_bytes


async def test_a_size_in_use_is_kept_and_one_more_is_refused(tmp_path: Path) -> None:
    async with resident_model(tmp_path, 1) as model, model.resident.at((64, 64)):
        with pytest.raises(QueueFull, match=r"in use at 64x64, and PVT_SIZES_PER_MODEL allows 1"):
            async with model.resident.at((96, 96)):
                pass


@pytest.mark.parametrize("size", [(33, 32), (0, 32), (-32, 32)])
async def test_sides_must_be_multiples_of_32(tmp_path: Path, size: tuple[int, int]) -> None:
    async with resident_model(tmp_path) as model:
        with pytest.raises(InvalidRequest, match="multiple of 32"):
            async with model.resident.at(size):
                pass


async def test_a_caller_that_goes_does_not_stop_the_compiling(tmp_path: Path) -> None:
    async with resident_model(tmp_path) as model:
        model.compiler.go.clear()

        async def ask() -> tuple[int, int]:
            async with model.resident.at((64, 64)) as sized:
                return sized.executable.height, sized.executable.width

        first, second = asyncio.create_task(ask()), asyncio.create_task(ask())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        model.compiler.go.set()

        assert await second == (64, 64)
        assert model.compiler.calls == 1


async def test_what_failed_to_compile_is_tried_again_by_the_next_who_asks(tmp_path: Path) -> None:
    async with resident_model(tmp_path) as model:
        model.compiler.failure = ModelLoadFailed("no")
        for _ in range(2):
            for size in (None, (64, 64)):
                with pytest.raises(ModelLoadFailed, match="no"):
                    async with model.resident.at(size, stages=True):
                        pass
        model.compiler.failure = None

        async with model.resident.at((64, 64), stages=True):
            assert model.compiler.calls == 6


async def test_pixels_go_to_the_model_as_they_are_and_must_have_its_size(tmp_path: Path) -> None:
    async with resident_model(tmp_path) as model, model.resident.at() as sized:
        (image,) = random_images(1)
        (inferred,) = await model.infer(sized, image)
        (refused,) = await model.pipeline.infer(sized, [np.zeros((32, 64, 3), np.uint8)], monotonic() + 30)

    (expected,) = model.resident.executable.run(0, [image])
    np.testing.assert_array_equal(inferred.outputs.logits, expected.logits)
    np.testing.assert_array_equal(inferred.pixels, image)
    assert isinstance(refused, InvalidImage)
    assert "uint8 (32, 64, 3); the model takes uint8 (32, 32, 3)" in str(refused)


async def test_closing_takes_every_lane_away(tmp_path: Path) -> None:
    async with resident_model(tmp_path) as model, model.resident.at((64, 64)):
        pass

    assert model.pipeline.scheduler.activity().queues == []


async def test_a_size_that_made_room_goes_though_what_it_made_room_for_is_given_up_at_once(tmp_path: Path) -> None:
    async with resident_model(tmp_path, 1) as model:
        async with model.resident.at((64, 64)):
            pass

        async def ask() -> None:
            async with model.resident.at((96, 96)):
                pass

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)  # it has set out, and what it set out has not had a turn
        asking.cancel()

    assert model.pipeline.scheduler.activity().queues == []
