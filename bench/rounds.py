"""Rounds over all servers in turn, so that drift of a shared machine hits all alike."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from tqdm import tqdm

from bench.bare import bare_loop
from bench.bodies import Body, bodies
from bench.images import jpegs, large_jpegs
from bench.load import Wrk
from bench.make_store import TAG, make_store
from bench.openloop import open_loop
from bench.ours import Ours
from bench.peers import Contender
from bench.results import Closed, Open, Results, Round, Visit
from bench.server import Server, serving

VARIANT = "pvt_v2_b0"
IMAGES, LARGE_IMAGES = 64, 4
LARGE_CLIENTS = 8
RATES = (0.1, 0.2, 0.4, 0.6, 0.8)  # of the bare loop's images per second
SATURATED = 0.9  # a server that answers less than this share of an offered load in time is offered no higher one
_LATE_MS = 2000.0
_WARM_SECONDS = 2
LARGE_FACTOR = 4  # times the seconds of other loads: a batch of 12-megapixel images takes some itself


@dataclass(frozen=True, slots=True)
class Plan:
    """What each server is put through, each load for `seconds`."""

    clients: tuple[int, ...] = (1, 8, 32)
    seconds: int = 5
    open: bool = True
    large: bool = True


class RoundRunner:
    """Images and a model store in `folder`, and the bare loop."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        self._images = jpegs(IMAGES)
        self._large = large_jpegs(LARGE_IMAGES) if plan.large else []
        make_store(folder / "store", VARIANT)
        self._ours = Ours(folder / "store")

    @property
    def store(self) -> Path:
        """With one model, of random weights."""
        return self._folder / "store"

    def round(self, contenders: Sequence[Contender], number: int, skipped: dict[str, str]) -> Round:
        """Every contender once; why one could not be measured goes into `skipped`."""
        busy = psutil.cpu_percent(interval=1) / 100
        bare = bare_loop(self._ours, self._images, self._plan.seconds)
        visits = {}
        for contender in tqdm(contenders, desc=f"round {number + 1}", leave=False):
            if missing := contender.missing():
                skipped[contender.name] = f"not installed: {', '.join(missing)}"
                continue
            try:
                visits[contender.name] = self._visit(contender, bare, number)
            except (RuntimeError, httpx.HTTPError) as error:
                skipped[contender.name] = (str(error).strip() or type(error).__name__).splitlines()[-1]
        for name, reason in skipped.items():
            print(f"{name} is left out: {reason}", file=sys.stderr)
        return Round(bare=bare, busy=busy, visits=visits)

    def _visit(self, contender: Contender, bare: float, number: int) -> Visit:
        small = bodies(self._images, contender.form)
        wrk = Wrk(self._folder / contender.form, small)
        settings = {"PVT_DEFAULT_MODEL": f"{VARIANT}.{TAG}", "PVT_LOG_FORMAT": "json"}
        with serving(contender, self._folder, self.store, settings) as server:
            started = server.wait(small[0])
            for clients in self._plan.clients:  # each as it will be, so that every batch size has been seen
                wrk.run(server.url, clients, _WARM_SECONDS)
            closed = tuple(
                _closed(server, wrk, clients, self._plan.seconds, small[0]) for clients in self._plan.clients
            )
            resident = server.resident_bytes() / 1e6
            opened = self._open(server, contender, bare, number) if self._plan.open else ()
            large = self._large_loop(server, contender) if self._plan.large else None
        return Visit(closed=closed, open=opened, large=large, resident_mb=resident, start_seconds=started)

    def _open(self, server: Server, contender: Contender, bare: float, number: int) -> tuple[Open, ...]:
        loops: list[Open] = []
        (first,) = bodies(self._images[:1], contender.form)
        for share in RATES:
            rate = round(bare * share, 1)
            folder, seconds = self._folder / contender.form, self._plan.seconds
            server.settle(first)
            loop = open_loop(server.url, folder, first.content_type, rate=rate, seconds=seconds, seed=number)
            loops.append(loop)
            if loop.answered < SATURATED * loop.sent or loop.p50_ms > _LATE_MS:
                break
        return tuple(loops)

    def _large_loop(self, server: Server, contender: Contender) -> Closed:
        large = bodies(self._large, contender.form)
        wrk = Wrk(self._folder / f"{contender.form}-large", large)
        wrk.run(server.url, LARGE_CLIENTS, _WARM_SECONDS)
        return _closed(server, wrk, LARGE_CLIENTS, self._plan.seconds * LARGE_FACTOR, large[0])


def _closed(server: Server, wrk: Wrk, clients: int, seconds: int, first: Body) -> Closed:
    server.settle(first)
    before = server.cpu_seconds()
    loop = wrk.run(server.url, clients, seconds)
    used = server.cpu_seconds() - before
    return loop.model_copy(update={"cpu_ms": used * 1000 / max(1, loop.requests)})


def add_round(results: Results, done: Round, skipped: dict[str, str]) -> Results:
    """`results` with one more round; a server that was measured at last is no longer skipped."""
    kept = {name: reason for name, reason in {**results.skipped, **skipped}.items() if name not in done.visits}
    return results.model_copy(update={"rounds": (*results.rounds, done), "skipped": kept})
