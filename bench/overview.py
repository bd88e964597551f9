"""Results of several machines -> `docs/benchmarks.md`, side by side. Pure: the same results give the same text."""

from collections.abc import Callable, Sequence

from bench.aggregate import clients_table, names
from bench.peers import CONTENDERS
from bench.ratios import CLIENTS, LITSERVE, OURS, TARGETS, Spread, figure, latency, over, some, throughput
from bench.results import Model, Results
from bench.tables import table

_TITLES = {contender.name: contender.title for contender in CONTENDERS}


def overview(machines: Sequence[Results]) -> str:
    """The page: chart, one sentence, peers, a lone client, models, machines, and the aims at the end."""
    sections = [
        _head(machines),
        _peers(machines),
        _lone(machines),
        _models(machines),
        _machines(machines),
        _aims(machines),
    ]
    return "\n\n".join(sections) + "\n"


def _kind(results: Results) -> str:
    return results.kind.replace("-", " ")


def _head(machines: Sequence[Results]) -> str:
    measured = [(results, over(results, throughput(LITSERVE))) for results in machines]
    ratios = " and ".join(f"{figure(ratio.median)} times ({_kind(results)})" for results, ratio in measured if ratio)
    chart = f"![Throughput by clients](benchmarks/{machines[0].kind}/throughput.svg)\n\n" if machines else ""
    reports = ", ".join(f"[{_kind(results)}](benchmarks/{results.kind}/index.md)" for results in machines)
    sentence = (
        f"With {CLIENTS} clients pvt-serve serves {ratios} as many images per second as LitServe, each server as its "
        "own guide sets it up."
    )
    if not ratios:
        sentence = "pvt-serve was not measured beside LitServe."
    return (
        f"# Benchmarks\n\n{chart}{sentence}\n\nFor most models the processor matters most: whether it computes "
        "natively in bfloat16. Each kind of processor that was measured has a full report"
        f"{f': {reports}' if reports else ''}. `make bench` measures your own machine, and "
        "[performance.md](performance.md) says how far to trust figures."
    )


def _peers(machines: Sequence[Results]) -> str:
    head: list[object] = ["server"]
    for results in machines:
        head += [f"images/s {_kind(results)}", "pvt-serve / it"]
    rows = []
    for name in _servers(machines):
        row: list[object] = [_TITLES[name]]
        for results in machines:
            rate = next((each.rate for each in clients_table(results).get(name, []) if each.clients == CLIENTS), None)
            row += [rate or "", "" if name == OURS else over(results, throughput(name)) or ""]
        rows.append(row)
    note = (
        f"pvt_v2_b0 at 224x224, JPEGs of 640x427, {CLIENTS} clients; medians of the rounds, least and greatest in "
        "brackets. Each ratio is computed within its round."
    )
    return f"## Beside the peers\n\n{note}\n\n{table(head, rows)}"


def _lone(machines: Sequence[Results]) -> str:
    head: list[object] = ["server"]
    for results in machines:
        head += [f"p50 ms {_kind(results)}", "pvt-serve / it"]
    rows = []
    for name in _servers(machines):
        row: list[object] = [_TITLES[name]]
        for results in machines:
            p50 = next((each.p50 for each in clients_table(results).get(name, []) if each.clients == 1), None)
            row += [p50 or "", "" if name == OURS else over(results, latency(name)) or ""]
        rows.append(row)
    return f"## One client\n\n{table(head, rows)}"


def _models(machines: Sequence[Results]) -> str:
    head: list[object] = ["model", "parameters", "weights"]
    for results in machines:
        head += [f"first load {_kind(results)}", "from the cache", f"images/s, {CLIENTS} clients"]
    variants = dict.fromkeys(variant for results in machines for variant in results.models)
    rows = []
    for variant in variants:
        known = next(results.models[variant] for results in machines if variant in results.models)
        row: list[object] = [f"`{variant}`", f"{known.parameters:,}", f"{known.weights_bytes / 1e6:.0f} MB"]
        for results in machines:
            row += _model_cells(results.models.get(variant))
        rows.append(row)
    note = (
        "Each variant with its defaults and seeded weights of the true shapes at 224x224 (`python -m bench.models`). "
        "The first load compiles and measures; later ones restore that from `PVT_CACHE_DIR`."
    )
    return f"## Models\n\n{note}\n\n{table(head, rows)}"


def _model_cells(model: Model | None) -> list[object]:
    if model is None:
        return ["", "", ""]
    return [f"{model.first_load_seconds:.1f} s", f"{model.cached_load_seconds:.2f} s", some(model.rates)]


def _machines(machines: Sequence[Results]) -> str:
    fields = dict.fromkeys(name for results in machines for name in results.machine)
    rows = [[name, *(results.machine.get(name, "") for results in machines)] for name in fields]
    return f"## Machines\n\n{table(['', *map(_kind, machines)], rows)}"


def _aims(machines: Sequence[Results]) -> str:
    """Each ratio that is aimed at, and by how much it is reached; what is not reached last."""
    rows = []
    for target in TARGETS:
        values = [over(results, target.ratio) for results in machines]
        aim = f"{'at most' if target.at_most else 'at least'} {target.aim:g}"
        missed = sum(value is None or not target.reached(value.median) for value in values)
        rows.append((missed, [target.name, aim, *(_verdict(value, target.reached) for value in values)]))
    rows.sort(key=lambda row: row[0])
    return f"## Aims\n\n{table(['ratio', 'aim', *map(_kind, machines)], [row for _, row in rows])}"


def _verdict(value: Spread | None, reached: Callable[[float], bool]) -> str:
    if value is None:
        return "not measured"
    return f"{value}{'' if reached(value.median) else ', **not reached**'}"


def _servers(machines: Sequence[Results]) -> list[str]:
    measured = {name for results in machines for name in names(results)}
    return [contender.name for contender in CONTENDERS if contender.name in measured]
