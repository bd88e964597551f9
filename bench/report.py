"""Results -> `docs/benchmarks/<kind of processor>/index.md`. Pure: the same results give the same text."""

from collections.abc import Sequence

from bench.aggregate import breakdown, clients_table, loads_table, names
from bench.engine_report import engine_section
from bench.peers import CONTENDERS
from bench.ratios import CLIENTS, OURS, TARGETS, bound, figure, over, some, spread, throughput
from bench.results import Closed, Results
from bench.tables import table

_TITLES = {contender.name: contender.title for contender in CONTENDERS}


def report(results: Results) -> str:
    """The whole page."""
    sections = [
        _head(results),
        _closed(results),
        _open(results),
        _breakdown(results),
        _large(results),
        engine_section(results),
        _gpu(),
        _starts(results),
        _method(results),
        _machine(results),
        _ratios(results),
        _bound(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def summary(results: Results) -> str:
    """What `make bench-quick` prints."""
    return "\n\n".join(part for part in (_ratios(results), _closed(results), _bound(results)) if part)


def _head(results: Results) -> str:
    kind = results.kind.replace("-", " ")
    processor, cores = (results.machine.get(name, "unknown") for name in ("processor", "cores"))
    return (
        f"# Benchmarks {kind}\n\n![Throughput by clients](throughput.svg)\n\n{_in_one_sentence(results)}\n\n"
        f"Processor: {processor}, {cores} cores. [Both kinds of processor side by side](../../benchmarks.md)."
    )


def _in_one_sentence(results: Results) -> str:
    rates = {(name, row.clients): row.rate for name, rows in clients_table(results).items() for row in rows}
    ours = rates.get((OURS, CLIENTS))
    peers = "; ".join(
        f"{figure(ratio.median)} times {_TITLES[name]}"
        for name in names(results)
        if name != OURS and (ratio := over(results, throughput(name, CLIENTS)))
    )
    if not ours or not peers:
        return "pvt-serve was not measured beside other servers."
    return f"With {CLIENTS} clients on {results.cores} cores pvt-serve serves {figure(ours.median)} images/s: {peers}."


def _machine(results: Results) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    commands = "\n".join(results.commands)
    return (
        f"## Machine and commands\n\n{table(['machine', ''], results.machine.items())}\n\nVersions: {versions}.\n\n"
        "`make bench` makes this page from [results.json](results.json), and measures your machine if you run it "
        f"there. These figures are from:\n\n```sh\n{commands}\n```"
    )


def _ratios(results: Results) -> str:
    rows = []
    for target in TARGETS:
        value = over(results, target.ratio)
        aim = f"{'at most' if target.at_most else 'at least'} {target.aim:g}"
        verdict = "not measured" if not value else "reached" if target.reached(value.median) else "**not reached**"
        rows.append([target.name, aim, value or "", value.count if value else 0, verdict])
    busy = max((turn.busy for turn in results.rounds), default=0.0)
    note = (
        "Each ratio is computed within its round; then the median of the rounds, with the least and the greatest in "
        f"brackets. Just before a round, others had up to {busy:.0%} of the cores in use."
    )
    return f"## Aims\n\n{note}\n\n{table(['ratio', 'aim', 'measured', 'rounds', ''], rows)}"


def _bound(results: Results) -> str:
    limit = bound(results)
    if not limit:
        return ""
    peers = "; ".join(f"{figure(ratio)} times {_TITLES[name]}" for name, ratio in limit.peer.items())
    lone = ""
    if limit.lone is not None:
        lone = (
            f" A lone image would take {figure(limit.lone_ms)} ms if today's graph lost nothing on being shared out "
            f"over the cores and HTTP cost nothing: {figure(limit.lone)} of LitServe's p50."
        )
    return (
        f"What arithmetic allows here: decoding takes {figure(limit.decode_ms)} ms of a core as measured, and the "
        f"model's operations at 100 % of the measured matrix-multiply peak {figure(limit.infer_ms)} ms. With nothing "
        f"else to do, {results.cores} cores then serve {figure(limit.images_per_second)} images/s, which is {peers}, "
        "with 8 clients. A ratio above that is out of reach on this processor in this precision, unless decoding takes "
        f"less time or the model less arithmetic.{lone}"
    )


def _closed(results: Results) -> str:
    rows = []
    for name, servers in clients_table(results).items():
        for row in servers:
            ratio = over(results, throughput(name, row.clients)) if name != OURS else None
            figures = [row.rate, row.p50, row.p99] if row.rate.greatest else ["none answered", "", ""]
            rows.append([_TITLES[name], row.clients, *figures, ratio or "", row.failed])
    bare = spread([turn.bare for turn in results.rounds])
    rows.append(["bare loop, a thread per core, no HTTP", "", bare or "", "", "", "", ""])
    head = ["server", "clients", "images/s", "p50 ms", "p99 ms", "pvt-serve / it", "failed"]
    note = (
        f"`wrk`; each client has one request under way; {results.seconds} s for each load; medians (least to greatest)."
    )
    missing = "".join(f"\n\n{_TITLES.get(n, n)} was not measured: {why}." for n, why in results.skipped.items())
    return f"## Closed loop\n\n{note}\n\n{table(head, rows)}{missing}"


def _open(results: Results) -> str:
    servers = loads_table(results)
    if not servers:
        return ""
    rows = [
        [_TITLES[name], figure(row.offered), row.p50, row.p99, f"{row.failed} of {row.sent}", row.rounds]
        for name, loads in servers.items()
        for row in loads
    ]
    every = [row for loads in servers.values() for row in loads]
    lag, share = max(row.lag_ms for row in every), max(row.generator_cpu for row in every)
    note = (
        "Requests are sent at random times fixed beforehand (Poisson, seeded), whether or not earlier ones have a "
        "response. Latency counts from the intended time, so a server that stalls is charged for every request that "
        "it delayed. A request without a response 10 s after the last one was sent counts as failed, with its wait so "
        "far. A server that can't keep up with a load gets no higher one. The generator itself was at most "
        f"{figure(lag)} ms late (p99 of the worst load) and took at most {figure(share * 100)} % of a core."
    )
    chart = "![Latency by offered load](latency.svg)"
    head = ["server", "offered images/s", "p50 ms", "p99 ms", "failed", "rounds"]
    return f"## Open loop\n\n{note}\n\n{chart}\n\n{table(head, rows)}"


def _breakdown(results: Results) -> str:
    parts = breakdown(results)
    if not parts:
        return ""
    rows = [[_TITLES[name], *(figure(value) for value in row.values())] for name, row in parts.items()]
    note = (
        "Processor milliseconds per image with 8 clients, of all processes of the server. Decoding and inference are "
        "what they cost alone on one thread. The rest is HTTP, hand-overs, busy waiting, and what sharing cores and "
        "caches costs. A rest below zero means that batches under load were cheaper than alone."
    )
    head = ["server", "decode", "inference", "the rest", "all"]
    return f"## Core time\n\n{note}\n\n![Core time per image](core-time.svg)\n\n{table(head, rows)}"


def _large(results: Results) -> str:
    loops: dict[str, list[Closed]] = {}
    for turn in results.rounds:
        for name, visit in turn.visits.items():
            if visit.large:
                loops.setdefault(name, []).append(visit.large)
    if not loops:
        return ""
    rows = [
        [_TITLES[name], *_answered(runs), sum(run.failed for run in runs)]
        for name, runs in loops.items()
    ]  # fmt: skip
    head = ["server", "images/s", "p50 ms", "processor ms per image", "failed"]
    note = "Four different JPEGs of 4000x3000, 8 clients, loads of four times the length."
    return f"## 12-megapixel photos\n\n{note}\n\n{table(head, rows)}"


def _answered(runs: Sequence[Closed]) -> list[object]:
    """Images per second, p50 and processor time of the runs in which anything was answered."""
    good = [run for run in runs if run.requests]
    if not good:
        return ["none answered", "", ""]
    return [some([getattr(run, name) for run in good]) for name in ("images_per_second", "p50_ms", "cpu_ms")]


def _gpu() -> str:
    return (
        "## GPU\n\nNothing was measured on a GPU. `python -m bench.gpu` does that and writes benchmarks-gpu.md; "
        "[gpu.md](../../gpu.md#what-is-not-shown) lists what is open until then."
    )


def _starts(results: Results) -> str:
    if not results.starts:
        return ""
    rows = [
        ["process start to first prediction, s", spread([start.seconds for start in results.starts])],
        ["resident memory then, MB", spread([start.megabytes for start in results.starts])],
    ]
    memory = []
    for name in names(results):
        visits = [turn.visits[name] for turn in results.rounds if name in turn.visits]
        memory.append(
            [_TITLES[name], spread([v.start_seconds for v in visits]), spread([v.resident_mb for v in visits])]
        )
    return (
        f"## Start and memory\n\n{table(['pvt-serve with its embedded model', ''], rows)}\n\nEach server with b0 at "
        "224. Memory after the closed loops, summed over its processes; pages that they share count for "
        f"each.\n\n{table(['server', 's to the first answer', 'MB'], memory)}"
    )


def _method(results: Results) -> str:
    servers = [
        f"- **{contender.title}** ({contender.path}): {contender.configured}."
        for contender in CONTENDERS
        if contender.name in names(results)
    ]
    return (
        "## How it was measured\n\n64 different JPEGs of 640x427, crops of two photos, each compressed again; one for "
        "each request. pvt_v2_b0 at 224 with 1000 classes and seeded random weights. Nothing is cached. In each round "
        "the bare loop (decoding and inference, a thread for each core, no HTTP), then each server in turn: started, "
        "warmed up with every number of clients, measured, stopped. The load generators run on the same cores. "
        "[performance.md](../../performance.md) says how far to trust figures. Each server runs as its own "
        "guides write:\n\n" + "\n".join(servers)
    )
