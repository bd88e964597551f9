"""Canary images: a model whose weights have changed in memory is noticed, loaded anew, and given up."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from service.engine import Engine
from service.errors import AnswersWrong
from service.execution.tuning import OptimizedGraph
from service.metrics import EngineMetrics
from service.registry.canaries import PATIENCE, SHARE, Canaries
from service.results import ImageResult
from tests.app.conftest import png
from tests.service.registry.fakes import run_virtually
from tests.service.test_engine import NAME, engine

IMAGE = png(size=(40, 30))


def counted(registry: CollectorRegistry, outcome: str) -> float:
    return registry.get_sample_value("pvt_canaries_total", {"model": NAME, "outcome": outcome}) or 0.0


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.01)


async def logits(e: Engine) -> Any:
    (result,) = (await e.infer([IMAGE])).results
    assert isinstance(result, ImageResult)
    return result.outputs.logits


def graphs(e: Engine) -> dict[int, Any]:
    (resident,) = e._registry.loaded()
    return dict(resident.executable._plain[0])


def flip_a_bit_of_the_weights(e: Engine) -> None:
    """The top bit of the exponent of one number of the head, as a particle does."""
    weight = graphs(e)[1].module.model.head.weight
    with torch.inference_mode():
        weight.view(torch.int32)[0, 0] ^= 1 << 30


def turn_the_outputs_of_the_compiled_model(e: Engine) -> None:
    graph = graphs(e)[1]
    run = graph.run
    graph.run = lambda *batch: tuple(-output for output in run(*batch))


@pytest.mark.parametrize(
    ("backend", "corrupt"),
    [("torch", flip_a_bit_of_the_weights), ("openvino", turn_the_outputs_of_the_compiled_model)],
)
async def test_a_model_that_gives_wrong_answers_is_loaded_anew_and_the_second_time_it_fails(
    tmp_path: Path, backend: str, corrupt: Callable[[Engine], None]
) -> None:
    registry = CollectorRegistry()
    options = {"backend": backend, "precision": "float32", "instances": 1, "cores": 1, "max_batch_size": 1}
    async with engine(tmp_path, registry, **options, canary_seconds=0.02) as e:
        right = await logits(e)
        await until(lambda: counted(registry, "right") >= 3)

        corrupt(e)
        assert np.abs(await logits(e) - right).max() > 0.1
        await until(lambda: counted(registry, "wrong"))
        await until(e._registry.loaded)
        anew = await logits(e)
        assert (await e.health()).ready

        corrupt(e)
        await until(lambda: counted(registry, "wrong") == 2)
        with pytest.raises(AnswersWrong, match=r"loaded anew, and is wrong again: logits are off by .* \(float32"):
            await logits(e)
        health = await e.health()

    np.testing.assert_allclose(anew, right, atol=1e-5)
    assert registry.get_sample_value("pvt_canary_failures_total", {"model": NAME}) == 2
    assert registry.get_sample_value("pvt_model_loads_total", {"model": NAME, "outcome": "loaded"}) == 2
    assert (health.live, health.ready) == (True, False)
    assert health.reasons[0].startswith(f"{NAME}: {NAME}@1 was loaded anew, and is wrong again")


async def test_every_graph_has_its_turn_and_one_that_raises_is_wrong(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    options = {"precision": "float32", "instances": 1, "cores": 1, "max_batch_size": 1}
    async with engine(tmp_path, registry, **options, canary_seconds=0.02) as e:
        await logits(e)

        class Broken:
            precision = "float32"

            def run(self, *_: object) -> None:
                raise RuntimeError("could not execute a primitive")

        (resident,) = e._registry.loaded()
        resident.executable.swap_graph(OptimizedGraph(2, cast("Any", Broken()), 0.1))
        del resident
        await until(lambda: counted(registry, "wrong"))
        await until(e._registry.loaded)

        assert [*graphs(e)] == [1]


async def test_canaries_show_in_no_figure_of_requests(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    async with engine(tmp_path, registry, instances=1, cores=1, max_batch_size=1, canary_seconds=0.01) as e:
        await logits(e)
        await until(lambda: counted(registry, "right") >= 5)
        e.collect_metrics()
        activity = e.activity()

    assert registry.get_sample_value("pvt_images_total", {"model": NAME, "outcome": "answered"}) == 1
    assert registry.get_sample_value("pvt_batch_size_count", {"model": NAME}) == 1
    assert len(activity.releases) == 1
    assert [queue.model for queue in activity.queues] == [NAME]


class FakeResident:
    executable = SimpleNamespace(stored=SimpleNamespace(id="a", version="1"))

    def wrong(self, *_: int) -> None: ...


class FakeEngine:
    """A registry, a pipeline and its scheduler, of one model whose canary takes `seconds`; `checks` says when."""

    def __init__(self, seconds: float, busy_until: float) -> None:
        self.seconds = seconds
        self.busy_until = busy_until
        self.checks: list[float] = []
        self.resident = FakeResident()
        self.scheduler = self

    @property
    def idle(self) -> bool:
        return asyncio.get_running_loop().time() >= self.busy_until

    def loaded(self) -> list[object]:
        return [self.resident]

    @contextmanager
    def held(self, _: object) -> Iterator[bool]:
        yield True

    async def on_instance(self, _: object) -> None:
        self.checks.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.seconds)


def checks(seconds: float, busy_until: float, until: float) -> list[float]:
    fake = cast("Any", FakeEngine(seconds, busy_until))

    async def main() -> None:
        canaries = Canaries(fake, fake, EngineMetrics(CollectorRegistry()), 60)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(canaries.run(), until)

    run_virtually(main())
    found: list[float] = fake.checks
    return found


def test_a_canary_runs_once_a_period() -> None:
    assert checks(seconds=0.01, busy_until=0, until=200) == pytest.approx([60, 120, 180], abs=0.1)


def test_a_busy_service_puts_it_off_but_not_without_end() -> None:
    assert checks(seconds=0, busy_until=100, until=130) == pytest.approx([100], abs=0.3)
    assert checks(seconds=0, busy_until=10_000, until=400) == pytest.approx([60 + PATIENCE * 60], abs=0.3)


def test_those_of_a_slow_model_take_no_more_than_their_share() -> None:
    found = checks(seconds=5, busy_until=0, until=1200)

    assert np.diff(found).tolist() == pytest.approx([5 + 5 / SHARE] * (len(found) - 1))
    assert len(found) == 3
