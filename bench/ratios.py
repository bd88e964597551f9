"""Ratios, each computed within a round and only then summed up, so that drift between rounds cancels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.results import Costs, Peak, Results, Round

OURS, LITSERVE, GRAPH = "ours", "litserve", "litserve-graph"
CLIENTS = 8


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of `count` values."""

    median: float
    least: float
    greatest: float
    count: int

    def __str__(self) -> str:
        """To three digits."""
        return f"{figure(self.median)} ({figure(self.least)} to {figure(self.greatest)})"


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that is aimed at: reached from `aim` on, or up to it where `at_most`."""

    name: str
    aim: float
    ratio: Callable[[Round], float | None]
    at_most: bool = False

    def reached(self, value: float) -> bool:
        """Whether `value` is good enough."""
        return value <= self.aim if self.at_most else value >= self.aim


def figure(value: float) -> str:
    """Three significant digits, and all of a whole number's."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004  digits


def spread(values: Sequence[float]) -> Spread | None:
    """Of `values`; None of none."""
    return some(values) if values else None


def some(values: Sequence[float]) -> Spread:
    """Of `values`, of which there is at least one."""
    return Spread(median(values), min(values), max(values), len(values))


def over(results: Results, ratio: Callable[[Round], float | None]) -> Spread | None:
    """`ratio` of each round that has one."""
    return spread([value for value in map(ratio, results.rounds) if value is not None])


def throughput(name: str, clients: int = CLIENTS) -> Callable[[Round], float | None]:
    """Ours / `name`, images per second."""
    return lambda turn: _divide(_rate(turn, OURS, clients), _rate(turn, name, clients))


def latency(name: str, clients: int = 1) -> Callable[[Round], float | None]:
    """Ours / `name`, median latency."""

    def ratio(turn: Round) -> float | None:
        return _divide(_p50(turn, OURS, clients), _p50(turn, name, clients))

    return ratio


def bare(turn: Round) -> float | None:
    """Ours / the bare loop of decoding and inference, images per second."""
    return _divide(_rate(turn, OURS, CLIENTS), turn.bare)


def large(turn: Round) -> float | None:
    """Ours / LitServe, images per second of 12 megapixels."""
    loops = [turn.visits[each].large if each in turn.visits else None for each in (OURS, LITSERVE)]
    return _divide(*(loop.images_per_second if loop else None for loop in loops))


TARGETS = (
    Target("images/s, 8 clients: pvt-serve / LitServe", 4.0, throughput(LITSERVE)),
    Target("images/s, 8 clients: pvt-serve / LitServe + our graph", 2.5, throughput(GRAPH)),
    Target("p50 of a lone client: pvt-serve / LitServe", 0.25, latency(LITSERVE), at_most=True),
    Target("images/s, 8 clients: pvt-serve / bare loop", 0.90, bare),
    Target("images/s of 12 megapixels, 8 clients: pvt-serve / LitServe", 5.0, large),
)


@dataclass(frozen=True, slots=True)
class Bound:
    """The most that arithmetic allows here, and the ratio of that to each of `peer`'s images per second.

    Nothing takes time but decoding, as measured, and the model's operations at the measured peak, on all cores.
    `lone_ms` is what one image takes if decoding has a core and today's graph, as measured on one core, all of them,
    with nothing lost in sharing it out; `lone` the ratio of that to LitServe's p50 with one client.
    """

    images_per_second: float
    decode_ms: float
    infer_ms: float
    peer: dict[str, float]
    lone_ms: float
    lone: float | None


def bound(results: Results, variant: str = "pvt_v2_b0") -> Bound | None:
    """Of this machine; None where peak, costs or rounds were not measured."""
    cost = costs(results)
    peak = best_peak(results, cost.precision, results.cores) if cost else None
    if not cost or not peak or variant not in results.flops:
        return None
    infer_ms = results.flops[variant] / (peak.flops / results.cores) * 1000
    rate = results.cores * 1000 / (cost.decode_ms + infer_ms)
    peers = {name: over(results, lambda turn, name=name: _rate(turn, name, CLIENTS)) for name in (LITSERVE, GRAPH)}  # type: ignore[misc]  # bound per name
    alone = over(results, lambda turn: _p50(turn, LITSERVE, 1))
    lone_ms = cost.decode_ms + cost.infer_ms / results.cores
    return Bound(
        rate,
        cost.decode_ms,
        infer_ms,
        {n: rate / s.median for n, s in peers.items() if s},
        lone_ms,
        lone_ms / alone.median if alone else None,
    )


def costs(results: Results) -> Costs | None:
    """The medians of all that were measured."""
    if not results.costs:
        return None
    names = [name for name in Costs.model_fields if name.endswith("_ms")]
    medians = {name: median(getattr(each, name) for each in results.costs) for name in names}
    return Costs(precision=results.costs[-1].precision, **medians)


def best_peak(results: Results, precision: str, threads: int) -> Peak | None:
    """The greatest measured."""
    seen = [peak for peak in results.peaks if (peak.precision, peak.threads) == (precision, threads)]
    return max(seen, key=lambda peak: peak.flops, default=None)


def _rate(turn: Round, name: str, clients: int) -> float | None:
    loop = turn.visits[name].at(clients) if name in turn.visits else None
    return loop.images_per_second if loop else None


def _p50(turn: Round, name: str, clients: int) -> float | None:
    loop = turn.visits[name].at(clients) if name in turn.visits else None
    return loop.p50_ms if loop else None


def _divide(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
