"""Ends a process that is stuck, in order: a native call never returns, a GPU failed, or the event loop does not move.

Nothing in the process can mend that. Whoever looks after it (systemd, a container's restart policy, Kubernetes, the
supervisor of `PVT_WORKERS`) starts another. A call that never returns and keeps Python's lock stops this thread too:
then only they notice, since neither a health check is answered nor WATCHDOG=1 sent.
"""

import asyncio
import faulthandler
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from time import monotonic

import structlog

from app import systemd
from service.engine import Engine

log = structlog.get_logger(component="watchdog")

TICK_SECONDS = 0.5
ENDING_SECONDS = 5.0  # for the responses to those who wait
STUCK = os.EX_SOFTWARE  # the exit code


class Watchdog:
    """A thread that looks twice a second. `end` answers the requests under way, on the event loop.

    `notifies`: systemd is to hear from this process.
    """

    def __init__(self, engine: Engine, end: Callable[[], Coroutine[None, None, None]], *, notifies: bool) -> None:
        self._engine = engine
        self._end = end
        self._notifies = notifies
        self._loop = asyncio.get_running_loop()
        # Mutable state: what the event loop found last, and when; whether the thread is to end.
        self._health = engine.live()
        self._looked_at = monotonic()
        self._closed = threading.Event()

    def start(self) -> None:
        """Watch until `close`."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """The process ends anyhow."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            if reasons := self._reasons():
                self._leave(reasons)
            if self._notifies:
                systemd.notify_watchdog()
            with suppress(RuntimeError):  # the loop was closed, and the process ends
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        """On the event loop, where a lock that is never given back stops the loop and not this thread."""
        self._health = self._engine.live()
        self._looked_at = monotonic()

    def _reasons(self) -> list[str]:
        silent = self._engine.clock.since(self._looked_at)
        if silent > self._engine.options.stall_seconds:
            return [f"the event loop has not moved for {silent:.0f} s"]
        return self._health.reasons if not self._health.live else []

    def _leave(self, reasons: list[str]) -> None:
        log.error("stuck", reasons=reasons, exit_code=STUCK)
        faulthandler.dump_traceback()  # which call it is
        with suppress(Exception):  # the loop may be what is stuck
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(ENDING_SECONDS)
        logging.shutdown()
        os._exit(STUCK)
