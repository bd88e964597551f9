"""New versions, loaded beside those that serve."""

import asyncio
from collections.abc import Sequence
from typing import Generic, TypeVar

import structlog

from service.errors import ModelNotFound, ServiceError
from service.registry.entries import Candidate, Entry
from service.registry.holdings import Holdings, Source
from service.registry.name_table import NameTable

M = TypeVar("M")

log = structlog.get_logger(component="registry")


class Reload(Generic[M]):
    """Brings every name that stands for something up to date; names pass over when all is ready, and nobody waits."""

    def __init__(self, source: Source[M], names: NameTable[M], holdings: Holdings[M]) -> None:
        self._source = source
        self._names = names
        self._holdings = holdings
        self._one_at_a_time = asyncio.Lock()
        # Mutable state: what was last said of names that can't be brought up to date, so that it is said once.
        self._said: dict[str, str] = {}

    async def run(self, *, again: bool) -> None:
        """Once. What failed before is tried again when its files have changed, or `again` says so."""
        async with self._one_at_a_time:
            for name in self._names:
                await self._refresh(name, again=again)

    async def _refresh(self, name: str, *, again: bool) -> None:
        turn = self._names.turn()
        try:
            candidates = await self._candidates(name)
        except ServiceError as error:
            if self._said.get(name) != str(error):
                log.warning("model_not_refreshed", model=name, reason=str(error))
            self._said[name] = str(error)
            return
        self._said.pop(name, None)
        serving = self._names.get(name)
        if serving is None or not candidates or candidates[0].identity == serving.candidate.identity:
            return
        self._holdings.hold(serving)  # what serves is not to make room for its successor
        try:
            for candidate in candidates:
                if candidate.identity == serving.candidate.identity:
                    return
                if not again and self._holdings.failed(candidate):
                    continue
                if await self._replace(name, serving, candidate, turn):
                    return
        finally:
            self._holdings.release(serving, used=False)

    async def _candidates(self, name: str) -> Sequence[Candidate]:
        """What `name` stands for now. A name that is gone is forgotten, unless its model is gone, too."""
        try:
            return await self._source.candidates(name)
        except ModelNotFound:
            serving = self._names.get(name)
            if serving is None or serving.stored.id == name:
                raise
            await self._source.candidates(serving.stored.id)
            if self._names.get(name) is serving:
                log.info("name_gone", name=name, stood_for=serving.stored.key)
                self._names.drop(name)
            return ()

    async def _replace(self, name: str, serving: Entry[M], candidate: Candidate, turn: int) -> bool:
        """Whether `candidate` is ready, and `name` stands for it if it still stood for `serving`."""
        entry = self._holdings.begin(candidate)
        self._holdings.hold(entry)
        version, serves = candidate.stored.key, serving.stored.key
        try:
            await self._holdings.loaded(entry)
        except ServiceError as error:
            log.warning("model_not_replaced", name=name, version=version, still_serves=serves, reason=str(error))
            return False
        else:
            if self._names.get(name) is serving:
                self._names.point(name, entry, turn)
                log.info("model_replaced", name=name, version=version, served_before=serves)
            return True
        finally:
            self._holdings.release(entry, used=False)
