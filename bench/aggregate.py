"""Rounds -> rows: medians and spread of every server at every load, and where the cores' time went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.peers import CONTENDERS
from bench.ratios import CLIENTS, OURS, Spread, costs, some
from bench.results import Closed, Open, Results


@dataclass(frozen=True, slots=True)
class ClientsRow:
    """All rounds of one server at one number of clients."""

    clients: int
    rate: Spread
    p50: Spread
    p99: Spread
    cpu_ms: Spread
    failed: int


@dataclass(frozen=True, slots=True)
class LoadRow:
    """All rounds of one server at one offered load, of which `offered` is the rounds' median."""

    offered: float
    p50: Spread
    p99: Spread
    failed: int
    sent: int
    rounds: int
    lag_ms: float
    generator_cpu: float


def clients_table(results: Results) -> dict[str, list[ClientsRow]]:
    """By server and number of clients."""
    return {
        name: [
            _clients_row(clients, [loop for loop in loops if loop.clients == clients])
            for clients in sorted({loop.clients for loop in loops})
        ]
        for name, loops in _loops(results).items()
        if loops
    }


def loads_table(results: Results) -> dict[str, list[LoadRow]]:
    """By server and offered load, the first with the first of other rounds and so on."""
    rows: dict[str, list[LoadRow]] = {}
    for name in names(results):
        steps: dict[int, list[Open]] = {}
        for turn in results.rounds:
            for step, loop in enumerate(turn.visits[name].open if name in turn.visits else ()):
                steps.setdefault(step, []).append(loop)
        if steps:
            rows[name] = [_load_row(steps[step]) for step in sorted(steps)]
    return rows


def breakdown(results: Results) -> dict[str, dict[str, float]]:
    """Processor milliseconds per image with 8 clients, by server: decode, inference, and the rest."""
    cost = costs(results)
    parts = {}
    for name, rows in clients_table(results).items():
        total = next((row.cpu_ms.median for row in rows if row.clients == CLIENTS and row.rate.median), None)
        if not cost or total is None:
            continue
        graph = name == OURS or "graph" in name
        decode = cost.decode_ms if name == OURS else cost.peer_graph_decode_ms if graph else cost.peer_decode_ms
        infer = cost.infer_ms if graph else cost.peer_infer_ms
        parts[name] = {"decode": decode, "inference": infer, "the rest": total - decode - infer, "all": total}
    return parts


def names(results: Results) -> list[str]:
    """The servers that were measured, in the registry's order."""
    measured = {name for turn in results.rounds for name in turn.visits}
    return [contender.name for contender in CONTENDERS if contender.name in measured]


def _loops(results: Results) -> Mapping[str, list[Closed]]:
    return {
        name: [loop for turn in results.rounds if name in turn.visits for loop in turn.visits[name].closed]
        for name in names(results)
    }


def _clients_row(clients: int, runs: Sequence[Closed]) -> ClientsRow:
    return ClientsRow(
        clients,
        some([run.images_per_second for run in runs]),
        some([run.p50_ms for run in runs]),
        some([run.p99_ms for run in runs]),
        some([run.cpu_ms for run in runs]),
        sum(run.failed for run in runs),
    )


def _load_row(loops: Sequence[Open]) -> LoadRow:
    return LoadRow(
        median(loop.offered for loop in loops),
        some([loop.p50_ms for loop in loops]),
        some([loop.p99_ms for loop in loops]),
        sum(loop.failed for loop in loops),
        sum(loop.sent for loop in loops),
        len(loops),
        max(loop.lag_ms for loop in loops),
        max(loop.generator_cpu for loop in loops),
    )
