"""Measures this machine: our server and its peers side by side, and engines alone.

    python -m bench             rounds over all servers, engines, models, report into docs/benchmarks.md (`make bench`)
    python -m bench --quick     ours, LitServe with and without our graph, a table, no report (`make bench-quick`)

Results of processors with and without native bfloat16 lie side by side in docs/benchmarks. Each stage adds to
results.json as soon as it is done, so that a run may be made in pieces:
`--stages servers --rounds 1 --add`, as often as wanted, then `--stages report`.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from bench import engines as alone
from bench.images import jpegs
from bench.machine import machine, versions
from bench.models import measure as measure_models
from bench.overview import overview
from bench.peers import CONTENDERS, QUICK, chosen
from bench.report import report, summary
from bench.results import Costs, Engine, Peak, Results, Start, read, write
from bench.rounds import Plan, RoundRunner, add_round
from bench.server import ROOT, start_figures
from service.architecture.variants import VARIANTS
from service.machine import usable_cores

DOCS = ROOT / "docs"
STAGES = ("starts", "servers", "engines", "models", "report")
STARTS = 5
QUICK_PLAN = Plan(clients=(1, 8), seconds=4, open=False, large=False)
QUICK_ROUNDS = 2


def main() -> None:
    """Measure what the command line asks for."""
    arguments = _arguments()
    if arguments.quick:
        _quick()
        return
    here = _described(Results())
    path = arguments.out / "benchmarks" / here.kind / "results.json"
    results = _described(read(path)) if arguments.add else here
    if "starts" in arguments.stages:
        with TemporaryDirectory() as name:
            figures = start_figures(jpegs(1)[0], Path(name), STARTS)
        starts = tuple(Start(seconds=seconds, megabytes=megabytes) for seconds, megabytes in figures)
        results = results.model_copy(update={"starts": starts})
        write(path, results)
    if "servers" in arguments.stages:
        results = _servers(results, path, arguments)
    if "engines" in arguments.stages:
        results = _engines(results, path, arguments)
    if "models" in arguments.stages:
        models = measure_models(arguments.variants, arguments.rounds, arguments.seconds)
        results = results.model_copy(update={"models": models})
        write(path, results)
    if "report" in arguments.stages:
        _report(arguments.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a table in three minutes, no report")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--add", action="store_true", help="to the results that are there, instead of starting anew")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and benchmarks/")
    parser.add_argument("--rounds", type=int, default=5, help="over all servers")
    parser.add_argument("--seconds", type=int, default=5, help="of each load")
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--servers", nargs="+", choices=names, default=names)
    parser.add_argument("--engine-rounds", type=int, default=3, help="over all engines")
    parser.add_argument("--engines", nargs="+", choices=alone.ENGINES, default=list(alone.ENGINES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--engine-timeout", type=int, default=600, help="seconds for one engine, variant, thread count")
    return parser.parse_args()


def _quick() -> None:
    results = _described(Results()).model_copy(update={"seconds": QUICK_PLAN.seconds})
    skipped: dict[str, str] = {}
    with TemporaryDirectory() as name:
        runner = RoundRunner(Path(name), QUICK_PLAN)
        for number in range(QUICK_ROUNDS):
            results = add_round(results, runner.round(chosen(QUICK), number, skipped), skipped)
    print("\n".join(f"{key}: {value}" for key, value in results.machine.items()), end="\n\n")
    print(summary(results))


def _described(results: Results) -> Results:
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    update = {
        "machine": machine(),
        "cores": usable_cores(),
        "versions": versions(),
        "commands": (*results.commands, *([] if command in results.commands else [command])),
    }
    return results.model_copy(update=update)


def _servers(results: Results, path: Path, arguments: argparse.Namespace) -> Results:
    results = results.model_copy(update={"seconds": arguments.seconds})
    with TemporaryDirectory() as name:
        runner = RoundRunner(Path(name), Plan(seconds=arguments.seconds))
        for number in range(len(results.rounds), len(results.rounds) + arguments.rounds):
            skipped: dict[str, str] = {}
            results = add_round(results, runner.round(chosen(tuple(arguments.servers)), number, skipped), skipped)
            (line,) = _lines("bench.costs", "--store", str(runner.store))
            costs = (*results.costs, Costs.model_validate_json(line))
            results = results.model_copy(update={"costs": costs, "peaks": (*results.peaks, *_peaks(results.cores))})
            write(path, results)
    return results


def _engines(results: Results, path: Path, arguments: argparse.Namespace) -> Results:
    from bench.peak import flops  # noqa: PLC0415  it takes torch's counter, which nothing else needs

    counts = {variant: flops(variant) for variant in arguments.variants}
    results = results.model_copy(update={"flops": {**results.flops, **counts}})
    rounds = [(v, t) for v in arguments.variants for t in sorted({1, results.cores})] * arguments.engine_rounds
    for variant, threads in tqdm(rounds, desc="engines", leave=False):
        rows = [row for engine in arguments.engines for row in _engine(engine, variant, threads, arguments)]
        results = results.model_copy(update={"engines": (*results.engines, *rows)})
        write(path, results)
    results = results.model_copy(update={"peaks": (*results.peaks, *_peaks(results.cores))})
    write(path, results)
    return results


def _engine(engine: str, variant: str, threads: int, arguments: argparse.Namespace) -> list[Engine]:
    command = ["--engine", engine, "--variant", variant, "--threads", str(threads)]
    try:
        lines = _lines("bench.engines", *command, timeout=arguments.engine_timeout)
        return [Engine.model_validate_json(line) for line in lines]
    except subprocess.TimeoutExpired:
        note = f"over {arguments.engine_timeout} s"
    except subprocess.CalledProcessError as error:
        print(f"{engine} {variant}: {error.stderr[-500:]}", file=sys.stderr)
        note = "failed"
    return [
        Engine(engine=engine, variant=variant, batch=batch, threads=threads, ms=None, note=note)
        for batch in alone.BATCHES
    ]


def _peaks(cores: int) -> list[Peak]:
    lines = [line for threads in sorted({1, cores}) for line in _lines("bench.peak", "--threads", str(threads))]
    return [Peak.model_validate_json(line) for line in lines]


def _lines(module: str, *arguments: str, timeout: int = 600) -> list[str]:
    """The JSON lines that `python -m module` prints."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment
    )
    return [line for line in run.stdout.splitlines() if line.startswith("{")]


def _report(out: Path) -> None:
    """A page and charts for each kind of processor that was measured, and one page with all of them side by side."""
    from bench.charts import draw  # noqa: PLC0415  matplotlib, which a quick run does without

    everything = [read(path) for path in sorted((out / "benchmarks").glob("*/results.json"))]
    for results in everything:
        folder = out / "benchmarks" / results.kind
        draw(results, folder)
        (folder / "index.md").write_text(report(results))
    (out / "benchmarks.md").write_text(overview(everything))
    print(f"written: {out / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
