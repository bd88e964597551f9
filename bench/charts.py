"""The report's charts, as SVG."""

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.aggregate import breakdown, clients_table, loads_table
from bench.peers import CONTENDERS
from bench.ratios import CLIENTS
from bench.results import Results

THROUGHPUT, LATENCY, BREAKDOWN = "throughput.svg", "latency.svg", "core-time.svg"
_SIZE = (8.0, 4.5)
_TITLES = {contender.name: contender.title for contender in CONTENDERS}


def draw(results: Results, folder: Path) -> None:
    """Write the charts of `results` into `folder`; the same results give the same bytes."""
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "pvt-serve", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    folder.mkdir(parents=True, exist_ok=True)
    if any(turn.visits for turn in results.rounds):
        _throughput(results, folder / THROUGHPUT)
        _breakdown(results, folder / BREAKDOWN)
    if any(visit.open for turn in results.rounds for visit in turn.visits.values()):
        _latency(results, folder / LATENCY)


def _throughput(results: Results, path: Path) -> None:
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    for name, rows in clients_table(results).items():
        spreads = [row.rate for row in rows]
        middle = [each.median for each in spreads]
        error = [[each.median - each.least for each in spreads], [each.greatest - each.median for each in spreads]]
        axes.errorbar(
            [str(row.clients) for row in rows], middle, yerr=error, marker="o", capsize=3, label=_TITLES[name]
        )
    axes.set(xlabel="clients, each with one request under way", ylabel="images/s", title="Throughput by clients")
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)


def _latency(results: Results, path: Path) -> None:
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    for index, (name, rows) in enumerate(loads_table(results).items()):
        offered = [row.offered for row in rows]
        colour = f"C{index}"
        axes.plot(offered, [row.p50.median for row in rows], marker="o", color=colour, label=f"{_TITLES[name]}: p50")
        axes.plot(offered, [row.p99.median for row in rows], marker="x", color=colour, linestyle=":")
    axes.set(xlabel="offered load, images/s", ylabel="ms", yscale="log", title="Latency by offered load (p99 dotted)")
    _save(figure, axes, path)


def _breakdown(results: Results, path: Path) -> None:
    rows = breakdown(results)
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    names = [_TITLES[name] for name in rows]
    left = [0.0] * len(names)
    for part in ("decode", "inference", "the rest"):
        widths = [max(0.0, parts[part]) for parts in rows.values()]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="processor ms per image", title=f"Where the cores' time goes, {CLIENTS} clients")
    _save(figure, axes, path)


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
