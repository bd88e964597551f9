from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from torch import nn

from bench import gpu, gpu_engines
from bench.gpu import add_engines, decode_rate
from bench.gpu_engines import best, copy_rate, measure, peak_flops
from bench.gpu_report import ratio, report
from bench.gpu_results import GpuEngine, GpuLimits, GpuPeak, GpuResults, GpuServing
from bench.ours import OnDevice
from bench.peers.common import make_model
from bench.results import Closed
from service.backends.cuda_compiling import Function, Job, TorchCompiler
from tests.service.fake_device import FakeDevice

CPU = torch.device("cpu")


class AsItIs(TorchCompiler):
    """A compiler that does nothing."""

    def prepare(self, job: Job, stopped: Event) -> None:
        raise NotImplementedError(job, stopped)

    def __call__(self, module: nn.Module) -> Function:
        return module


def engine(name: str, *rates: float, batch: int = 8, note: str = "") -> GpuEngine:
    known = {"relative": 0.0125, "cosine": 0.99991, "precision": "bfloat16"} if rates else {}
    return GpuEngine(engine=name, variant="pvt_v2_b0", batch=batch, images_per_second=rates, note=note, **known)  # type: ignore[arg-type]  # by name


def loop(clients: int, rate: float) -> Closed:
    return Closed(clients=clients, images_per_second=rate, p50_ms=2.0, p99_ms=4.0, requests=9, failed=1)


def results() -> GpuResults:
    engines = (
        engine("transformers", 100.0, 110.0, 120.0),
        engine("max-autotune", 200.0, 210.0, 250.0),
        engine("pvt-serve", 300.0, 294.0, 350.0),
        engine("max-autotune", batch=256, note="OutOfMemoryError: too large"),
        engine("pvt-serve", 900.0, batch=256),
    )
    return GpuResults(
        card="H100",
        machine={"cores": "16"},
        versions={"torch": "2"},
        commands=("python -m bench.gpu",),
        peak=GpuPeak(flops=1e12, side=8192),
        flops={"pvt_v2_b0": 10**9},
        engines=engines,
        limits=(GpuLimits(variant="pvt_v2_b0", decode=500.0, copy_to_device=90_000.0, compute=900.0),),
        serving=(GpuServing(model="pvt_v2_b0.bench", workers=2, loops=(loop(8, 440.0), loop(8, 450.0))),),
    )


def test_the_report_compares_with_max_autotune_round_by_round() -> None:
    text = report(results())

    assert str(ratio(results(), "pvt_v2_b0", 8)) == "1.4 (1.4 to 1.5)"
    assert "| pvt_v2_b0 | 8 | at least 1.3 | 1.4 (1.4 to 1.5) | reached |" in text
    assert "| pvt_v2_b0 | 256 | at least 1 |  | not measured |" in text


def test_the_report_has_the_share_of_the_peak_and_the_errors_of_each_engine() -> None:
    text = report(results())

    assert "| pvt_v2_b0 | 8 | pvt-serve | 300 (294 to 350) | 30% | bfloat16 | 0.013 | 0.999910 |" in text
    assert "| pvt_v2_b0 | 256 | max-autotune | OutOfMemoryError: too large |  |  |  |  |" in text
    assert "The peak is 1 TFLOP/s, a bfloat16 matrix product of side 8192." in text


def test_the_report_says_where_it_saturates_and_what_share_http_reaches() -> None:
    text = report(results())

    assert "| pvt_v2_b0 | 500 | 90000 | 900 | decoding | 450 |" in text
    assert "| pvt_v2_b0.bench | 2 | 8 | 445 (440 to 450) | 2 (2 to 2) | 4 (4 to 4) | 49% | 2 |" in text


def test_nothing_measured_claims_nothing() -> None:
    text = report(GpuResults())

    assert "reached" not in text
    assert "## " not in text


def test_what_is_measured_again_takes_the_place_of_what_was() -> None:
    added = add_engines(results(), [engine("pvt-serve", 1.0)])

    assert len(added.engines) == len(results().engines)
    assert [row.images_per_second for row in added.engines if (row.engine, row.batch) == ("pvt-serve", 8)] == [(1.0,)]
    assert best(added.engines, "pvt_v2_b0") == 900.0
    assert best(added.engines, "pvt_v2_b5") == 0.0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 64 instead of 224, and no compiler."""
    monkeypatch.setattr(gpu_engines, "SIDE", 64)
    monkeypatch.setattr("bench.ours.SIDE", 64)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)


@pytest.mark.usefixtures("small")
def test_all_engines_answer_alike_and_are_timed_in_turn() -> None:
    rows = measure(CPU, FakeDevice(), "pvt_v2_b0", 2, rounds=2, seconds=0.0, compiler=AsItIs(None))

    assert [row.engine for row in rows] == list(gpu_engines.ENGINES)
    for row in rows:
        assert row.note == ""
        assert len(row.images_per_second) == 2
        assert row.cosine is not None
        assert row.cosine > 0.999
        assert row.precision == "bfloat16"


@pytest.mark.usefixtures("small")
def test_an_engine_that_fails_is_told_of_and_the_others_go_on() -> None:
    rows = measure(CPU, FakeDevice(largest=1), "pvt_v2_b0", 2, rounds=1, seconds=0.0, compiler=AsItIs(None))

    assert [bool(row.images_per_second) for row in rows] == [True, True, False]
    assert rows[-1].note == "OutOfMemory: a batch of 2 does not fit"


def test_ours_has_the_weights_it_is_given() -> None:
    theirs = make_model()
    model, as_they_are = ("pvt_v2_b0", theirs.state_dict()), ((0.0,) * 3, (1 / 255,) * 3)
    ours = OnDevice(FakeDevice(bfloat16=False), model, 1, as_they_are, AsItIs(None))
    pixels = np.random.default_rng(0).integers(0, 2, (1, 224, 224, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).logits.numpy()

    assert ours.precision == "float16"
    np.testing.assert_allclose(ours.run(1, pixels), expected, atol=0.02 * float(np.abs(expected).max()))


def test_the_stations_of_a_request_are_measured_by_themselves() -> None:
    assert peak_flops(CPU, side=64, seconds=0.0) == 0.0
    assert peak_flops(CPU, side=64, seconds=0.01) > 0
    assert copy_rate(CPU, batch=1, seconds=0.0) > 0
    assert decode_rate(1, 0.05) > 0


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["bench.gpu", "--out", str(tmp_path)])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    with pytest.raises(SystemExit, match="sees no GPU"):
        gpu.main()
    assert list(tmp_path.iterdir()) == []
