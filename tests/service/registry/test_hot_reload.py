"""New versions, aliases and broken ones under the engine, with real models, while callers never stop."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.engine import Engine
from service.errors import WeightsUnavailable
from service.postprocess import Prediction
from tests.app.conftest import png
from tests.service.stores import add_model
from tests.service.test_engine import NAME, engine, gated_load


class Versions:
    """The versions that answered, in their order."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._answered = asyncio.Event()

    def add(self, version: str) -> None:
        self.seen.append(version)
        self._answered.set()

    async def more(self, version: str, count: int = 5) -> None:
        """Return when `version` has answered so many more requests."""
        wanted = self.seen.count(version) + count
        async with asyncio.timeout(60):
            while self.seen.count(version) < wanted:
                self._answered.clear()
                await self._answered.wait()


@asynccontextmanager
async def callers(e: Engine, model: str = NAME) -> AsyncIterator[Versions]:
    """Two that ask all the time, and wait for no load; gives the versions. Whoever fails fails the test."""
    versions = Versions()
    stopped = False

    async def call() -> None:
        while not stopped:
            predictions = await e.predict([png()], model=model, max_wait_seconds=0)
            assert all(isinstance(result, Prediction) for result in predictions.results)
            versions.add(predictions.version)
            await asyncio.sleep(0.005)  # two cores have a model to load meanwhile

    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(call())
        yield versions
        stopped = True


async def test_under_constant_load_no_request_fails_or_waits_while_a_new_version_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = gated_load(monkeypatch)
    gate.set()
    async with engine(tmp_path, max_batch_size=1) as e:
        await e.predict([png()])
        async with e._registry.lease(NAME) as resident:
            old = weakref.ref(resident.executable)
            del resident
        async with callers(e) as versions:
            await versions.more("1")
            add_model(tmp_path, NAME, "2")
            gate.clear()
            refreshing = asyncio.create_task(e.refresh())
            await versions.more("1")  # while the new one is being loaded
            assert "2" not in versions.seen
            gate.set()
            await refreshing
            await versions.more("2")
            (model,) = await e.models()

        assert (model.version, model.state) == ("2", "ready")
        # Of the two callers, one may still have had its answer to come from the old one.
        assert "1" not in versions.seen[versions.seen.index("2") + 2 :]
        async with asyncio.timeout(30):
            while old() is not None:
                await asyncio.sleep(0.01)
                gc.collect()
        assert [stored.state for stored in (await e.model(NAME)).versions] == ["ready", "available"]
        assert [lane.model for lane in e.activity().queues] == [NAME]


async def test_a_broken_new_version_leaves_the_old_one_serving_and_is_said_to_be_broken(tmp_path: Path) -> None:
    async with engine(tmp_path, max_batch_size=1) as e:
        await e.predict([png()])
        weights = add_model(tmp_path, NAME, "2") / "model.safetensors"
        good = weights.read_bytes()
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        async with callers(e) as versions:
            await e.refresh()
            await versions.more("1")
            broken = await e.model(NAME)
            weights.write_bytes(good)
            await e.refresh()
            await versions.more("2")
        mended = await e.model(NAME)

    assert (broken.version, broken.state) == ("1", "ready")
    newest = broken.versions[0]
    assert (newest.version, newest.state) == ("2", "failed")
    assert "SHA-256" in str(newest.failure)
    assert [each.state for each in mended.versions] == ["ready", "available"]


async def test_at_first_use_an_older_version_answers_for_a_broken_one(tmp_path: Path) -> None:
    weights = add_model(tmp_path, NAME, "2") / "model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    async with engine(tmp_path, max_batch_size=1) as e:
        assert (await e.predict([png()])).version == "1"
        model = await e.model(NAME)

    assert [each.state for each in model.versions] == ["failed", "ready"]


async def test_a_changed_alias_takes_its_callers_along(tmp_path: Path) -> None:
    add_model(tmp_path, NAME, "2")
    async with engine(tmp_path, max_batch_size=1) as e:
        await e.set_alias("production", f"{NAME}@1")
        await e.predict([png()], model="production")
        async with callers(e, "production") as versions:
            await versions.more("1")
            await e.set_alias("production", f"{NAME}@2")
            await versions.more("2")


async def test_a_store_that_vanishes_takes_nothing_along_that_serves(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    async with engine(root, max_batch_size=1) as e:
        add_model(root, "pvt_v2_b0.other")
        await e.predict([png()])
        async with callers(e) as versions:
            root.rename(elsewhere)
            await e.refresh()
            await versions.more("1")
            with pytest.raises(WeightsUnavailable, match="can't be read"):
                await e.predict([png()], model="pvt_v2_b0.other")
            assert [(model.id, model.state) for model in await e.models()] == [(NAME, "ready")]
            assert (await e.health()).ready
            elsewhere.rename(root)
            assert (await e.predict([png()], model="pvt_v2_b0.other")).version == "1"


async def test_the_store_is_watched(tmp_path: Path) -> None:
    async with engine(tmp_path, reload_seconds=0.5, max_batch_size=1) as e:
        await e.predict([png()])
        async with callers(e) as versions:
            add_model(tmp_path, NAME, "2")
            await versions.more("2", 1)
