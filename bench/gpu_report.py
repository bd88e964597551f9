"""`docs/benchmarks-gpu.md`, from what was measured on a card. Pure: the same results give the same text."""

from collections.abc import Iterable

from bench.gpu_engines import ENGINES, best
from bench.gpu_results import GpuEngine, GpuResults
from bench.ratios import Spread, figure, spread
from bench.tables import table

COMMAND = "python -m bench.gpu"
# The aims: ours over max-autotune, by batch size.
AIMS = {8: 1.3, 256: 1.0}


def report(results: GpuResults) -> str:
    """The whole page."""
    sections = [_head(results), _ratios(results), _engines(results), _limits(results), _serving(results)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(results: GpuResults) -> str:
    facts = table(["machine", ""], {"GPU": results.card or "none", **results.machine}.items())
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    commands = "\n".join(results.commands)
    return (
        f"# Benchmarks on a GPU\n\nMade by `{COMMAND}` from [benchmarks/gpu.json](benchmarks/gpu.json); to measure "
        f"your own card, call it there. Nothing is cached anywhere.\n\n{facts}\n\nVersions: {versions}.\n\n"
        f"Commands:\n\n```sh\n{commands}\n```"
    )


def ratio(results: GpuResults, variant: str, batch: int) -> Spread | None:
    """Ours over max-autotune, images per second, of each round; None where either was not measured."""
    found = {row.engine: row for row in results.engines if (row.variant, row.batch) == (variant, batch)}
    ours, theirs = found.get("pvt-serve"), found.get("max-autotune")
    if not ours or not theirs:
        return None
    return spread([mine / other for mine, other in zip(ours.images_per_second, theirs.images_per_second, strict=False)])


def _ratios(results: GpuResults) -> str:
    rows = []
    for variant in _variants(results):
        for batch, aim in AIMS.items():
            value = ratio(results, variant, batch)
            verdict = "not measured" if not value else "reached" if value.median >= aim else "**not reached**"
            rows.append([variant, batch, f"at least {aim:g}", value or "", verdict])
    if not rows:
        return ""
    head = ["variant", "batch", "aim", "measured", ""]
    return (
        '## Ours beside `torch.compile(mode="max-autotune")`\n\nRatio of images per second within a round, then the '
        f"median of the rounds, least and greatest in brackets.\n\n{table(head, rows)}"
    )


def _engines(results: GpuResults) -> str:
    if not results.engines:
        return ""
    peak = results.peak
    rows = [
        [row.variant, row.batch, row.engine, *_speed(row, results), *_errors(row)]
        for row in sorted(results.engines, key=lambda row: (row.variant, row.batch, ENGINES.index(row.engine)))
    ]
    text = (
        "## Engines without a server\n\nImages per second at 224, 1000 classes, seeded weights, the same in all. "
        "transformers' model and max-autotune in bfloat16, their input normalised and on the card beforehand; "
        "pvt-serve from bytes of pixels in pinned memory to logits in the host's, two batches on their way at a time. "
        "Errors are against transformers' model in float32."
    )
    if peak:
        text += f" The peak is {figure(peak.flops / 1e12)} TFLOP/s, a bfloat16 matrix product of side {peak.side}."
    head = ["variant", "batch", "engine", "images/s", "share of the peak", "precision", "largest error", "least cosine"]
    return f"{text}\n\n{table(head, rows)}"


def _speed(row: GpuEngine, results: GpuResults) -> list[object]:
    rate = spread(row.images_per_second)
    if not rate:
        return [row.note or "not measured", ""]
    known = results.peak and row.variant in results.flops
    share = f"{rate.median * results.flops[row.variant] / results.peak.flops:.0%}" if known and results.peak else ""
    return [rate, share]


def _errors(row: GpuEngine) -> list[object]:
    if row.relative is None or row.cosine is None:
        return [row.precision, "", ""]
    return [row.precision, f"{row.relative:.2g}", f"{row.cosine:.6f}"]


def _limits(results: GpuResults) -> str:
    rows = []
    for each in results.limits:
        stations = {"decoding": each.decode, "copying": each.copy_to_device, "computing": each.compute}
        served = _best_served(results, each.variant)
        named = min(stations, key=lambda name: stations[name])
        rows.append(
            [each.variant, *map(figure, stations.values()), named, figure(served) if served else "not measured"]
        )
    if not rows:
        return ""
    head = ["variant", "decoding", "copying", "computing", "slowest", "over HTTP"]
    return (
        "## Where it saturates\n\nWhat each station could do by itself, in images per second: decoding 640x427 JPEGs "
        "on all cores, copying pixels of 224x224 from pinned memory, computing. The slowest of them bounds what HTTP "
        f"can reach; the last column is the most that it did.\n\n{table(head, rows)}"
    )


def _serving(results: GpuResults) -> str:
    rows = []
    for each in results.serving:
        for clients in sorted({loop.clients for loop in each.loops}):
            loops = [loop for loop in each.loops if loop.clients == clients]
            rate = spread([loop.images_per_second for loop in loops])
            own = best(results.engines, each.model.removesuffix(".bench"))
            share = f"{rate.median / own:.0%}" if rate and own and each.model.endswith(".bench") else ""
            times = [spread([getattr(loop, name) for loop in loops]) for name in ("p50_ms", "p99_ms")]
            rows.append([each.model, each.workers, clients, rate, *times, share, sum(loop.failed for loop in loops)])
    if not rows:
        return ""
    head = ["model", "workers", "clients", "images/s", "p50 ms", "p99 ms", "of the engine's own rate", "failed"]
    return (
        "## Over HTTP\n\n`wrk`, each client one request at a time, 64 different JPEGs of 640x427, multipart.\n\n"
        f"{table(head, rows)}"
    )


def _best_served(results: GpuResults, variant: str) -> float:
    rates: Iterable[float] = (
        loop.images_per_second for each in results.serving if each.model == f"{variant}.bench" for loop in each.loops
    )
    return max(rates, default=0.0)


def _variants(results: GpuResults) -> list[str]:
    return list(dict.fromkeys(row.variant for row in results.engines))
