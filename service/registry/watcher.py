"""Notices that the store may have changed: at once where the kernel reports it, and every few seconds everywhere."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path

import structlog
from watchfiles import awatch

log = structlog.get_logger(component="watching")

DEBOUNCE_MS = 1000  # changes are gathered for so long at the most,
QUIET_MS = 200  # or until there have been none for so long


class Watch:
    """Calls `refresh` when something below `folder` has changed, and every `seconds` besides.

    The kernel reports changes on local disks only, and a folder that was replaced or mounted over is another one.
    """

    def __init__(self, folder: Path | None, seconds: float, refresh: Callable[[], Awaitable[None]]) -> None:
        """`folder` None: nothing on this machine can be watched."""
        self._folder = folder
        self._seconds = seconds
        self._refresh = refresh
        # Mutable state: whether something has changed since the last look, and why the folder can't be watched.
        self._changed = asyncio.Event()
        self._reason: str | None = None

    async def run(self) -> None:
        """Go on until cancelled."""
        async with asyncio.TaskGroup() as group:
            if self._folder:
                group.create_task(self._watch(self._folder))
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), self._seconds)
                self._changed.clear()
                try:
                    await self._refresh()
                except Exception:
                    log.exception("refresh_failed")

    async def _watch(self, folder: Path) -> None:
        """Set `changed`. Where that fails, the folder is looked for again later."""
        while True:
            try:
                watched = await asyncio.to_thread(_identity, folder)
                timeout = max(1, int(1000 * self._seconds))
                batches = awatch(folder, watch_filter=None, debounce=DEBOUNCE_MS, step=QUIET_MS, rust_timeout=timeout,
                                 yield_on_timeout=True)  # fmt: skip
                async with aclosing(batches):
                    async for changes in batches:
                        self._reason = None
                        if changes:
                            self._changed.set()
                        if await asyncio.to_thread(_identity, folder) != watched:
                            break
            except (OSError, RuntimeError) as error:
                if self._reason != str(error):
                    log.warning(
                        "store_not_watched", folder=str(folder), reason=str(error), looked_at_every=self._seconds
                    )
                self._reason = str(error)
                await asyncio.sleep(self._seconds)
            self._changed.set()


def _identity(folder: Path) -> tuple[int, int]:
    there = folder.stat()
    return there.st_dev, there.st_ino
