"""Draws the Grafana dashboard from Prometheus' answers to its queries, where there is no Grafana.

    python -m bench.dashboard --prometheus http://127.0.0.1:9090 --minutes 10 --out docs/assets/dashboard.png

Each panel of deploy/grafana/dashboards/pvt-serve.json is at its place, with its queries, unit and legend; the look is
matplotlib's.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Any

import httpx
import matplotlib as mpl
from matplotlib import dates
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.server import ROOT

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "pvt-serve.json"
POINTS = 240
_COLUMNS, _INCHES = 24, (16.0, 0.24)  # of the whole width, and of one row of the grid
_SUFFIX = {"reqps": " req/s", "ops": "/s", "s": " s"}
_SHADES = {"text": "black", "orange": "darkorange"}

Series = Sequence[tuple[str, Sequence[tuple[float, float]]]]


class Source:
    """Answers of the Prometheus at `url` for the `seconds` before now."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url = url.rstrip("/")
        self._end = time()
        self._seconds, self._step = seconds, max(1.0, seconds / POINTS)
        self.shown = tuple(datetime.fromtimestamp(at, UTC) for at in (self._end - seconds, self._end))

    def series(self, panel: Mapping[str, Any]) -> Series:
        """The names and points of what `panel` shows; of a panel of one moment the last points."""
        found = []
        for target in panel["targets"]:
            query = re.sub(r"\$(instance|model)\b", ".*", target["expr"].replace("$__rate_interval", "30s"))
            times = {"start": self._end - self._seconds, "end": self._end, "step": self._step}
            answer = httpx.get(f"{self._url}/api/v1/query_range", params={"query": query, **times}, timeout=60)
            for each in answer.raise_for_status().json()["data"]["result"]:
                labels = each["metric"]
                name = target["legendFormat"] or ", ".join(labels.values())
                for label, value in labels.items():
                    name = name.replace(f"{{{{{label}}}}}", value)
                points = [(float(at), float(value)) for at, value in each["values"]]
                if not target.get("instant") or points[-1][0] > self._end - 2 * self._step:
                    found.append((name, points))
        return found


def _shown(unit: str) -> Callable[[float, object], str]:
    """Writes a number of that unit of Grafana."""

    def write(value: float, _: object = None) -> str:
        if unit == "percentunit":
            return f"{value:.3g} %" if (value := 100 * value) < 1000 else f"{value:.0f} %"  # noqa: PLR2004
        if unit in {"bytes", "Bps"}:
            size, prefix = next(
                ((value / n, p) for n, p in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= n), (value, "")
            )
            return f"{size:.3g} {prefix}B" + "/s" * (unit == "Bps")
        return f"{value:.3g}{_SUFFIX.get(unit, '')}"

    return write


def _stat(axes: Axes, panel: Mapping[str, Any], series: Series) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    value = series[0][1][-1][1] if series else float("nan")
    steps = defaults["thresholds"]["steps"]
    colour = [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]
    texts = {key: each["text"] for mapping in defaults.get("mappings", []) for key, each in mapping["options"].items()}
    text = texts.get(f"{value:g}", _shown(defaults["unit"])(value, None))
    axes.text(0.5, 0.45, text, ha="center", va="center", fontsize=20, color=_SHADES.get(colour, colour))
    axes.axis("off")


def _bars(axes: Axes, panel: Mapping[str, Any], series: Series) -> None:
    unit = _shown(panel["fieldConfig"]["defaults"]["unit"])
    names, values = [name for name, _ in series], [points[-1][1] for _, points in series]
    bars = axes.barh(names, values, color=[f"C{i}" for i in range(len(names))])
    axes.bar_label(bars, [unit(value, None) for value in values], padding=3)
    axes.margins(x=0.2)
    axes.invert_yaxis()


def _lines(axes: Axes, panel: Mapping[str, Any], series: Series) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    apart = {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]}
    stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    below: dict[datetime, float] = {}
    for name, points in series:
        times = [datetime.fromtimestamp(at, UTC) for at, _ in points]
        values = [value for _, value in points]
        if stacked and name not in apart:
            base = [below.get(at, 0.0) for at in times]
            values = [low + value for low, value in zip(base, values, strict=True)]
            below |= dict(zip(times, values, strict=True))
            axes.fill_between(times, base, values, alpha=0.3)  # type: ignore[arg-type]  # it takes dates
        axes.plot(times, values, linewidth=1, label=name, linestyle="--" if name in apart else "-")  # type: ignore[arg-type]  # as above
    axes.yaxis.set_major_formatter(_shown(defaults["unit"]))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))  # type: ignore[no-untyped-call]  # matplotlib types some
    axes.set_ylim(bottom=0)
    if series:
        axes.legend(fontsize=6, loc="upper left", ncols=2, framealpha=0.6)
    else:
        axes.text(0.5, 0.5, "No data", ha="center", va="center", transform=axes.transAxes, color="grey")


def _table(axes: Axes, _: Mapping[str, Any], series: Series) -> None:
    for i, (name, points) in enumerate(series):
        axes.text(0.02, 0.85 - 0.12 * i, f"{name}: {points[-1][1]:g}", transform=axes.transAxes)
    axes.axis("off")


_DRAW = {"stat": _stat, "bargauge": _bars, "timeseries": _lines, "table": _table}


def draw(source: Source) -> Figure:
    """The dashboard, each panel at its place in Grafana's grid of 24 columns."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    mpl.rcParams.update({"font.size": 7, "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 8})
    figure = plt.figure(figsize=(_INCHES[0], rows * _INCHES[1]))
    for panel in panels:
        place = panel["gridPos"]
        left, bottom = place["x"] / _COLUMNS, 1 - (place["y"] + place["h"]) / rows
        if panel["type"] == "row":
            figure.text(left + 0.01, bottom + 0.2 / rows, panel["title"], fontsize=11, fontweight="bold")
            continue
        inside = (left + 0.045, bottom + 1.1 / rows, place["w"] / _COLUMNS - 0.055, (place["h"] - 2.3) / rows)
        axes = figure.add_axes(inside)
        axes.set_title(panel["title"], loc="left")
        _DRAW[panel["type"]](axes, panel, source.series(panel))
        if panel["type"] == "timeseries":
            axes.set_xlim(*source.shown)  # type: ignore[arg-type]  # as above
    return figure


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its URL")
    parser.add_argument("--minutes", type=float, default=10, help="up to now")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets" / "dashboard.png")
    arguments = parser.parse_args()
    mpl.use("agg")
    draw(Source(arguments.prometheus, 60 * arguments.minutes)).savefig(arguments.out, dpi=90)


if __name__ == "__main__":
    main()
