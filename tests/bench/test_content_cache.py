import os
import subprocess
import sys

import httpx
import pytest

from bench.bodies import Body
from bench.content_cache import _seconds, summary
from tests.app.processes import ROOT


def test_no_measurement_is_made_with_a_cache_by_accident() -> None:
    program = "import bench, os; print('PVT_CACHE_MB' in os.environ)"

    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PVT_CACHE_MB": "100"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip

    assert run.stdout == "False\n"


def test_the_summary_has_low_percentiles_medians_and_quotients() -> None:
    usual = ((0.010, 0.020), (0.011, 0.022), (0.001, 0.002))
    slow = ((1.0, 1.0), (1.0, 1.0), (1.0, 1.0))

    assert summary([usual] * 9 + [slow]) == (
        "service: without a cache 10.00 (median 10.00) ms, miss 11.00 (median 11.00) ms, hit 1.00 (median 1.00) ms; "
        "miss / without 1.10, miss / hit 11.0\n"
        "client: without a cache 20.00 (median 20.00) ms, miss 22.00 (median 22.00) ms, hit 2.00 (median 2.00) ms; "
        "miss / without 1.10, miss / hit 11.0"
    )


def test_a_hit_that_is_none_is_no_figure() -> None:
    headers = {"Cache-Status": "pvt-serve; fwd=miss", "Server-Timing": "read;dur=1.00, total;dur=2.50"}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers))
    with httpx.Client(transport=transport) as client:
        assert _seconds(client, "http://service/predict", Body("image/jpeg", b""), "fwd=miss")[0] == 0.0025
        with pytest.raises(RuntimeError, match="'fwd=miss', not 'hit'"):
            _seconds(client, "http://service/predict", Body("image/jpeg", b""), "hit")
