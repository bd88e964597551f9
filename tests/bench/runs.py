"""Results as a run leaves them, with figures that are easy to reckon with."""

from bench.results import Closed, Costs, Engine, Open, Peak, Results, Round, Start, Visit


def closed(clients: int, rate: float, p50: float = 10.0, cpu_ms: float = 9.0) -> Closed:
    return Closed(
        clients=clients, images_per_second=rate, p50_ms=p50, p99_ms=2 * p50, requests=100, failed=0, cpu_ms=cpu_ms
    )


def opened(offered: float, p50: float) -> Open:
    return Open(
        offered=offered, sent=50, answered=49, refused=1, broken=0, unanswered=0, p50_ms=p50, p99_ms=3 * p50,
        lag_ms=1.0, generator_cpu=0.02,
    )  # fmt: skip


def visit(rate: float, p50: float, large: float) -> Visit:
    return Visit(
        closed=(closed(1, rate / 2, p50), closed(8, rate, 8 * p50)),
        open=(opened(10, p50), opened(20, 2 * p50)),
        large=closed(8, large),
        resident_mb=500,
        start_seconds=4,
    )


def turn(speed: float) -> Round:
    """A round in which the machine ran at `speed` times the usual."""
    return Round(
        bare=100 * speed,
        visits={
            "ours": visit(90 * speed, 10 / speed, 60 * speed),
            "litserve": visit(20 * speed, 50 / speed, 10 * speed),
            "litserve-graph": visit(45 * speed, 25 / speed, 20 * speed),
        },
    )


def results() -> Results:
    """Two cores; decoding 5 ms and a model that takes 15 ms of a core at the peak."""
    return Results(
        machine={"processor": "a | b", "cores": "2"},
        cores=2,
        versions={"torch": "2.0"},
        commands=("python -m bench",),
        seconds=5,
        skipped={"ray": "not installed: ray"},
        starts=(Start(seconds=4, megabytes=600), Start(seconds=5, megabytes=601)),
        rounds=(turn(1.0), turn(2.0), turn(0.5)),
        costs=(
            Costs(
                precision="float32",
                decode_ms=5,
                infer_ms=3,
                peer_decode_ms=6,
                peer_infer_ms=2,
                peer_graph_decode_ms=5.5,
            ),
        ),
        peaks=(
            Peak(precision="float32", threads=1, flops=100e9, by="torch"),
            Peak(precision="float32", threads=2, flops=200e9, by="torch"),
        ),
        flops={"pvt_v2_b0": 1_500_000_000},
        engines=(
            Engine(engine="ours", variant="pvt_v2_b0", batch=1, threads=1, ms=25.0),
            Engine(engine="ours", variant="pvt_v2_b0", batch=8, threads=1, ms=20.0),
            Engine(engine="torch", variant="pvt_v2_b0", batch=8, threads=1, ms=60.0),
            Engine(engine="torch.compile", variant="pvt_v2_b0", batch=8, threads=1, ms=None, note="over 600 s"),
        ),
    )
