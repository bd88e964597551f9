"""The store's folder, watched for real."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.registry.catalog import watch
from tests.service.stores import add_model


class Looks:
    """Counts the looks that a watch has taken."""

    def __init__(self) -> None:
        self.count = 0
        self.looked = asyncio.Event()

    async def refresh(self) -> None:
        self.count += 1
        self.looked.set()
        if self.count == 1:
            raise RuntimeError("a look that fails is not the last")

    async def next(self) -> None:
        async with asyncio.timeout(30):
            await self.looked.wait()
            self.looked.clear()


@asynccontextmanager
async def watching(folder: Path, seconds: float) -> AsyncIterator[Looks]:
    looks = Looks()
    task = asyncio.create_task(watch(folder, seconds, looks.refresh))
    try:
        yield looks
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _begun(folder: Path, looks: Looks) -> None:
    """Return once a change of `folder` is noticed."""
    for i in range(100):
        (folder / f"probe{i}").write_text("")
        try:
            async with asyncio.timeout(0.5):
                await looks.looked.wait()
        except TimeoutError:
            continue
        looks.looked.clear()
        return
    pytest.fail("no change was noticed")


async def test_a_change_is_noticed_long_before_the_next_look_would_be_due(tmp_path: Path) -> None:
    async with watching(tmp_path, 3600) as looks:
        await _begun(tmp_path, looks)

        add_model(tmp_path)
        await looks.next()

        (tmp_path / "aliases.json").write_text("{}")
        await looks.next()


async def test_where_nothing_changes_it_looks_now_and_then(tmp_path: Path) -> None:
    async with watching(tmp_path, 0.01) as looks:
        for _ in range(3):
            await looks.next()


async def test_a_folder_that_is_not_there_yet_or_replaced_is_watched_when_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    async with watching(folder, 0.2) as looks:
        await looks.next()
        for _ in range(2):
            folder.mkdir()
            (folder / "1").write_text("")
            await looks.next()
            folder.rename(tmp_path / f"old{looks.count}")
            await looks.next()
