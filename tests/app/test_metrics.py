"""The metrics, read by Prometheus's own parsers."""

import asyncio
import logging
import shutil
import subprocess
from collections.abc import Mapping

import httpx
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from app import logs
from app.logs import LogWriter
from app.metrics import LAG_SECONDS, HttpMetrics, ProcessMetrics
from service.machine import gpu_memory, gpu_utilization
from service.metrics import EngineMetrics
from tests.app.conftest import MakeClient, png
from tests.app.processes import post, serving

OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"}
PROMETHEUS_3 = (  # what it sends
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
DIGITS = ("model", "pvt_v2_b0.digits")
# https://opentelemetry.io/docs/specs/semconv/http/http-metrics/#metric-httpserverrequestduration
ADVISED = ["0.005", "0.01", "0.025", "0.05", "0.075", "0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0", "7.5", "10.0"]


def samples(text: str) -> Mapping[tuple[object, ...], float]:
    """By name and sorted labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def request_labels(status: str, route: str = "/predict", method: str = "POST") -> tuple[tuple[str, str], ...]:
    return (
        ("error_type", status if status[0] == "5" else ""),
        ("http_request_method", method),
        ("http_response_status_code", status),
        ("http_route", route),
        ("url_scheme", "http"),
    )


def test_http_is_measured_by_the_names_labels_and_buckets_of_opentelemetry(make_client: MakeClient) -> None:
    client, image = make_client(), png()
    answer = client.post("/predict", content=image, headers={"Content-Type": "image/png"})

    text = client.get("/metrics").text

    found, labels = samples(text), request_labels("200")
    assert found["http_server_request_duration_seconds_count", *labels] == 1
    buckets = [line for line in text.splitlines() if line.startswith("http_server_request_duration_seconds_bucket")]
    bounds = [line.partition('le="')[2].partition('"')[0] for line in buckets if 'route="/predict"' in line]
    assert bounds == [*ADVISED, "+Inf"]
    assert found["http_server_request_body_size_bytes_sum", *labels] == len(image)
    assert found["http_server_response_body_size_bytes_sum", *labels] == len(answer.content)
    assert found["http_server_active_requests", ("http_request_method", "GET"), ("url_scheme", "http")] == 1
    assert found["http_server_active_requests", ("http_request_method", "POST"), ("url_scheme", "http")] == 0


def test_refusals_are_counted_by_their_reason_and_methods_and_paths_stay_few(make_client: MakeClient) -> None:
    client = make_client()
    client.post("/predict", content=b"no image", headers={"Content-Type": "image/png"})
    client.post("/predict?model=nothing", content=png(), headers={"Content-Type": "image/png"})
    before = client.get("/metrics").text
    for number in range(20):
        client.get(f"/no/such/path/{number}")
        client.request(f"METHOD{number}", "/predict")

    text = client.get("/metrics").text

    found = samples(text)
    assert found["pvt_rejected_total", ("reason", "invalid-image")] == 1
    assert found["pvt_rejected_total", ("reason", "model-not-found")] == 1
    assert found["pvt_rejected_total", ("reason", "not-found")] == 20
    assert found["http_server_request_duration_seconds_count", *request_labels("405", method="_OTHER")] == 20
    assert found["http_server_request_duration_seconds_count", *request_labels("404", "unmatched", "GET")] == 20
    assert len(text.splitlines()) < len(before.splitlines()) + 4 * 60


def test_models_are_described_and_their_work_is_measured(make_client: MakeClient) -> None:
    client = make_client(backend="torch", precision="float32", max_batch_size=4, instances=1, memory_budget_mb=5000)
    answers = [client.post("/predict", files=[("image", png())] * count).json() for count in (1, 3)]
    client.get("/models/pvt_v2_b0.digits")

    found = samples(client.get("/metrics").text)

    info = ("device", "cpu"), DIGITS, ("precision", "float32"), ("version", "1")
    assert found["pvt_model_info", *info] == 1
    states = {state: found["pvt_model_state", DIGITS, ("state", state), ("version", "1")]
              for state in ("loading", "ready", "failed")}  # fmt: skip
    assert states == {"loading": 0, "ready": 1, "failed": 0}
    assert found["pvt_models_memory_budget_bytes",] == 5e9
    outcomes = [value for key, value in found.items() if key[0] == "pvt_plan_cache_total"]
    assert outcomes == [1]
    steps = {key[2][1]: value for key, value in found.items()  # type: ignore[index]
             if key[0] == "pvt_model_load_step_seconds_sum"}  # fmt: skip
    assert {*steps} == {"fetch", "wait", "read", "compile", "check"} | ({"write"} & {*steps})
    assert sum(steps.values()) == pytest.approx(found["pvt_model_load_seconds_sum", DIGITS])
    assert min(steps[step] for step in ("read", "compile", "check")) > 0
    ran = {key[2][1]: value for key, value in found.items() if key[0] == "pvt_batch_seconds_count"}  # type: ignore[index]
    padding = found.get(("pvt_batch_padding_images_total", DIGITS), 0)
    assert sum(int(size) * runs for size, runs in ran.items()) - padding == 4  # places without padding are images
    best = [each["predictions"][0]["score"] for answer in answers for each in answer["results"]]
    assert found["pvt_top1_score_count", DIGITS] == 4
    assert found["pvt_top1_score_sum", DIGITS] == pytest.approx(sum(best), abs=1e-6)


@pytest.mark.parametrize(("model", "ready"), [("pvt_v2_b0.digits", 1), ("pvt_v2_b0.none", 0)])
def test_readiness_is_what_the_probe_says(make_client: MakeClient, model: str, ready: int) -> None:
    client = make_client(default_model=model)

    assert client.get("/health/ready").is_success == ready
    assert samples(client.get("/metrics").text)["pvt_ready",] == ready


def test_padding_is_what_the_graph_had_room_for() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    metrics.graph_ran("m", 8, 5, 0.1)
    metrics.graph_ran("m", 1, 1, 0.01)

    found = samples(generate_latest(registry).decode())

    assert found["pvt_batch_padding_images_total", ("model", "m")] == 3
    assert found["pvt_batch_seconds_sum", ("model", "m"), ("size", "8")] == 0.1
    assert found["pvt_batch_seconds_count", ("model", "m"), ("size", "1")] == 1


def test_what_is_unloaded_is_described_no_more() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    metrics.report_states([("m", "1", "ready"), ("m", "2", "loading")])
    metrics.report_states([("m", "2", "ready")])

    states = {key[1:]: value for key, value in samples(generate_latest(registry).decode()).items()
              if key[0] == "pvt_model_state"}  # fmt: skip

    assert states == {
        (("model", "m"), ("state", state), ("version", "2")): float(state == "ready")
        for state in ("loading", "ready", "failed")
    }


def test_openmetrics_has_request_ids_as_exemplars_and_no_series_of_its_own_age(make_client: MakeClient) -> None:
    client = make_client()
    client.post("/predict", files={"image": png()}, headers={"X-Request-ID": "my-request"})
    client.post("/predict", files={"image": png()}, headers={"X-Request-ID": "x" * 128})  # too long for an exemplar

    response = client.get("/metrics", headers=OPENMETRICS)

    assert response.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert response.headers["vary"] == "Accept"
    families = list(openmetrics_families(response.text))  # type: ignore[no-untyped-call]  # strict: it ends with # EOF, and each family is there once
    names = {sample.name for family in families for sample in family.samples}
    assert [name for name in names if name.endswith("_created")] == []
    exemplars = [
        sample.exemplar
        for family in families
        for sample in family.samples
        if sample.exemplar and sample.labels.get("http_route") == "/predict"
    ]
    assert [each.labels for each in exemplars] == [{"request_id": "my-request"}]
    text = client.get("/metrics").text
    assert "_created" not in text
    assert {each.name for each in text_string_to_metric_families(text)} == {each.name for each in families}


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "text/plain"),
        ("text/html", "text/plain"),
        ("not a media type", "text/plain"),
        ("application/openmetrics-text", "application/openmetrics-text"),
        ("application/openmetrics-text;q=0.1, text/plain", "text/plain"),
        ("application/openmetrics-text;q=0, */*", "text/plain"),
        ("application/openmetrics-text; version=9999.1", "application/openmetrics-text"),
        (PROMETHEUS_3, "application/openmetrics-text; version=1.0.0"),
    ],
)
def test_the_form_is_what_accept_prefers(client: TestClient, accept: str, expected: str) -> None:
    response = client.get("/metrics", headers={"Accept": accept})

    assert response.status_code == 200
    assert response.headers["content-type"].startswith(expected)


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs Debian's package prometheus")
def test_prometheus_own_tool_finds_nothing_wrong(make_client: MakeClient) -> None:
    client = make_client()
    client.post("/predict", files={"image": png()})
    client.post("/predict", files={"image": b"no image"})

    done = subprocess.run(
        ["promtool", "check", "metrics"], input=client.get("/metrics").content, capture_output=True, check=False
    )

    # It reads them all, and advises on names that platforms, and not we, have chosen.
    assert done.returncode in {0, 3}, done.stderr
    advice = (done.stdout + done.stderr).decode().splitlines()
    assert [line for line in advice if line.startswith(("pvt_", "http_"))] == []


async def test_a_busy_event_loop_shows_its_lag() -> None:
    registry = CollectorRegistry()
    metrics, loop = ProcessMetrics(registry), asyncio.get_running_loop()
    task = asyncio.create_task(metrics.measure_lag())
    await asyncio.sleep(0)  # it begins to wait
    end = loop.time() + 2 * LAG_SECONDS
    while loop.time() < end:  # past the time when the next measurement is due
        pass
    await asyncio.sleep(LAG_SECONDS / 10)
    task.cancel()

    assert samples(generate_latest(registry).decode())["pvt_event_loop_lag_seconds_sum",] >= 0.5 * LAG_SECONDS


def test_dropped_log_lines_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    metrics = ProcessMetrics(registry)
    for dropped in (3, 3, 5):
        monkeypatch.setattr(logs, "dropped_lines", lambda dropped=dropped: dropped)
        metrics.collect()

    assert samples(generate_latest(registry).decode())["pvt_log_lines_dropped_total",] == 5


def test_a_writer_counts_what_it_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING_BYTES", 0)
    writer = LogWriter(-1)
    monkeypatch.setattr(logging.getLogger(), "handlers", [writer])
    writer.write("a")
    writer.write("b")

    assert logs.dropped_lines() == 2


def test_gpus_are_measured_where_there_are_some_and_a_failed_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def info(name: str) -> tuple[int, int]:
        if name == "cuda:1":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 30, 100

    def utilization(name: str) -> int:
        if name == "cuda:1":
            raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.")
        return 25

    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)

    assert gpu_memory(["cuda:0", "cuda:1"]) == {("cuda:0", "used"): 70, ("cuda:0", "total"): 100}
    assert gpu_utilization(["cuda:0", "cuda:1"]) == {("cuda:0",): 0.25}
    assert gpu_memory([]) == gpu_utilization([]) == {}


def test_an_unknown_method_makes_no_series_of_its_own() -> None:
    registry = CollectorRegistry()
    metrics = HttpMetrics(registry)
    for number in range(100):
        metrics.active(f"M{number}", "http").inc()
        metrics.record("/predict", f"M{number}", 405, 0.1)

    found = samples(generate_latest(registry).decode())

    assert found["http_server_active_requests", ("http_request_method", "_OTHER"), ("url_scheme", "http")] == 100
    assert found["http_server_request_duration_seconds_count", *request_labels("405", method="_OTHER")] == 100


def test_several_workers_are_summed_and_described_once() -> None:
    with serving(backend="torch", max_batch_size="1", workers="2", instances="2", preload="pvt_v2_b0.digits") as server:
        while httpx.get(f"{server.url}/health/ready").status_code != 200:
            pass
        for _ in range(8):
            assert post(server.url, [("image", png())]).status_code == 200
        for headers, parse in (({}, text_string_to_metric_families), (OPENMETRICS, openmetrics_families)):
            families = parse(httpx.get(f"{server.url}/metrics", headers=headers).text)
            found = {
                (each.name, *sorted(each.labels.items())): each.value for family in families for each in family.samples
            }
            assert found["http_server_request_duration_seconds_count", *request_labels("200")] == 8
            assert found["pvt_top1_score_count", DIGITS] == 8
            assert found["pvt_batch_padding_images_total", DIGITS] == 0
            infos = [(dict(key[1:]), value) for key, value in found.items() if key[0] == "pvt_model_info"]
            assert [(info["device"], info["precision"], value) for info, value in infos] == [("cpu", "float32", 1)]
            assert [value for key, value in found.items() if key[0] == "pvt_build_info"] == [1]
            assert [value for key, value in found.items() if key[0] == "pvt_ready"] == [1]
            assert found["pvt_model_state", DIGITS, ("state", "ready"), ("version", "1")] == 1
            assert found["pvt_event_loop_lag_seconds_count",] > 0
        assert server.stop() == 0
