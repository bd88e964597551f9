"""The report's part on engines without a server."""

from collections.abc import Sequence
from statistics import median

from bench.ratios import best_peak, figure
from bench.results import Engine, Peak, Results
from bench.tables import table

TITLES = {
    "torch": "transformers, eager float32",
    "torch.compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO with its defaults",
    "ours": "pvt-serve",
}
AIMS = {"pvt_v2_b2": 0.70, "pvt_v2_b0": 0.55}  # of the peak, on one core
_GIGA = 1e9
_NOTE = (
    "Wall-clock milliseconds per image at 224, medians, input in memory. transformers' model eager and through "
    "torch.compile in its default mode (one shape each); ONNX Runtime on an export of our module, whose outputs are "
    "the same; OpenVINO with its defaults, converted with a dynamic batch dimension and no setting but the number of "
    "threads; pvt-serve as its server loads it, from bytes of pixels, normalisation included, in batches of the "
    "sizes that its plan finds best. On all cores the others split a batch among their threads, while pvt-serve runs "
    "one batch on each core."
)


def engine_section(results: Results) -> str:
    """Milliseconds per image of every engine, and the share of the peak that ours reaches; empty when not measured."""
    if not results.engines:
        return ""
    threads = sorted({row.threads for row in results.engines})
    tables = [_times(results, count) for count in threads]
    return "\n\n".join(["## Engines without a server", _NOTE, *tables, _shares(results)])


def _times(results: Results, threads: int) -> str:
    rows = [row for row in results.engines if row.threads == threads]
    keys = sorted({(row.variant, row.batch) for row in rows})
    lines = [[variant, batch, *(_cell(rows, engine, variant, batch) for engine in TITLES)] for variant, batch in keys]
    title = "One core" if threads == 1 else f"All {threads} cores"
    return f"### {title}: ms per image\n\n{table(['variant', 'batch', *TITLES.values()], lines)}"


def _cell(rows: Sequence[Engine], engine: str, variant: str, batch: int) -> str:
    here = [row for row in rows if (row.engine, row.variant, row.batch) == (engine, variant, batch)]
    times = [row.ms for row in here if row.ms is not None]
    if times:
        return figure(median(times))
    return here[-1].note if here else "not measured"


def _shares(results: Results) -> str:
    """Of ours on one core, the better of its batch sizes; the peak is that of its precision."""
    precision = results.costs[-1].precision if results.costs else "float32"
    peak = best_peak(results, precision, 1)
    lines = []
    for variant, operations in results.flops.items():
        best = _best(results, variant)
        if best is None or peak is None:
            continue
        share = operations / (best / 1000) / peak.flops
        aim = AIMS.get(variant)
        verdict = "" if aim is None else f"aim {aim:.0%}: {'reached' if share >= aim else '**not reached**'}"
        lines.append([variant, figure(operations / _GIGA), figure(best), f"{share:.0%}", verdict])
    if not lines:
        return ""
    head = ["variant", "GFLOP per image", "ms per image", f"share of the {precision} peak", ""]
    return f"### Share of the peak, pvt-serve on one core\n\n{_peaks(results.peaks)}\n\n{table(head, lines)}"


def _best(results: Results, variant: str) -> float | None:
    mine = [row for row in results.engines if (row.engine, row.variant, row.threads) == ("ours", variant, 1)]
    batches = {row.batch for row in mine if row.ms is not None}
    return min(
        (median(row.ms for row in mine if row.batch == batch and row.ms is not None) for batch in batches), default=None
    )


def _peaks(peaks: Sequence[Peak]) -> str:
    best = {(peak.precision, peak.threads): peak for peak in sorted(peaks, key=lambda peak: peak.flops)}
    seen = "; ".join(
        f"{precision} on {threads} thread{'s' * (threads > 1)} {figure(peak.flops / _GIGA)} GFLOP/s ({peak.by})"
        for (precision, threads), peak in sorted(best.items())
    )
    missing = "" if any(peak.precision == "bfloat16" for peak in peaks) else (
        " There is no bfloat16 peak: this CPU does not compute in it natively."
    )  # fmt: skip
    return (
        f"Measured peak of a large matrix product: {seen}.{missing} A multiplication and an addition are two "
        "operations; convolutions, linear layers and attention are counted (`torch.utils.flop_counter` on our "
        "module), pointwise work, norms and softmax are not."
    )
