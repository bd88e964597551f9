"""Traces, as a receiver of OTLP gets them."""

import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import tritonclient.grpc as triton
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from app import tracing
from app.__main__ import StartRefused, serve
from app.main import create_app
from app.settings import Settings, SettingsInvalid
from app.starting import Starting
from service.execution.executable import Executable
from service.execution.plan import BatchPlan
from service.registry.resident import Resident
from service.tracing import current
from tests.app.conftest import MakeClient, png
from tests.app.otlp import SERVER, Receiver, grpc_receiver, http_receiver
from tests.app.processes import LARGE_BATCHES, Server, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"  # the specification's own examples
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
STAGES = ["read", "wait", "decode", "queue", "infer", "encode"]
QUICK: Any = {
    "backend": "torch",
    "precision": "float32",
    "instances": "1",
    "max_batch_size": "4",
    "timeout_ms": "120000",
}
OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0"}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SDK_DISABLED", tracing.SWITCH, *tracing.ENDPOINTS, *tracing.PROTOCOLS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Server, Receiver, httpx.Client]]:
    """A server, what receives its spans over HTTP, and a client; the model is loaded."""
    with http_receiver() as receiver:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=birds",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            "OTEL_SERVICE_NAME": "digits",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        with (
            serving(environment=environment, command=LARGE_BATCHES, preload="pvt_v2_b0.digits", **QUICK) as server,
            httpx.Client(base_url=server.url, timeout=120) as client,
        ):
            assert client.post("/predict", files={"image": png()}).status_code == 200
            yield server, receiver, client


def test_a_request_is_a_span_with_its_stages_below_it(traced: tuple[Server, Receiver, httpx.Client]) -> None:
    _, receiver, client = traced
    headers = {"X-Request-ID": "one", "traceparent": TRACEPARENT, "tracestate": "vendor=a1,other=b2"}
    answer = client.post("/predict", content=png(), headers=headers | {"Content-Type": "image/png"})

    span = receiver.request("one")
    assert (span.name, span.kind, span.trace, span.parent) == ("POST /predict", SERVER, TRACE, PARENT)
    assert (span.state, span.status) == ("vendor=a1,other=b2", 0)
    stages = receiver.below(span)
    names = [each.name for each in stages]
    assert names[names.index("read") :] == STAGES
    assert names[: names.index("read")] in ([], ["wait"])  # for its turn to begin, where that took a millisecond
    measured = dict(entry.split(";dur=") for entry in answer.headers["Server-Timing"].split(", "))
    sums = {name: sum(each.ms for each in stages if each.name == name) for name in STAGES}
    assert sums == {
        name: pytest.approx(float(measured[name]), abs=1.01 if name == "wait" else 0.011) for name in STAGES
    }
    assert span.start <= stages[0].start
    assert all(before.end <= after.start + 1000 for before, after in pairwise(stages))
    assert stages[-1].end <= span.end
    assert {each.trace for each in stages} == {TRACE}
    wanted = {
        "http.request.method": "POST", "http.route": "/predict", "http.response.status_code": 200,
        "url.path": "/predict", "url.scheme": "http", "network.protocol.version": "1.1", "client.address": "127.0.0.1",
        "http.request.body.size": len(png()), "http.response.body.size": len(answer.content),
        "pvt.model": "pvt_v2_b0.digits", "pvt.version": "1", "pvt.images": 1, "pvt.batch_size": 1,
    }  # fmt: skip
    assert {name: span.attributes[name] for name in wanted} == wanted
    assert "error.type" not in span.attributes
    resource = {"service.name": "digits", "deployment.environment.name": "test", "telemetry.sdk.name": "opentelemetry"}
    assert {name: span.resource[name] for name in resource} == resource
    assert span.resource["service.version"]
    assert (receiver.headers["x-tenant"], receiver.headers["path"]) == ("birds", "/v1/traces")


def test_each_request_is_linked_with_its_batch_and_the_batch_with_each(
    traced: tuple[Server, Receiver, httpx.Client],
) -> None:
    _, receiver, client = traced
    with ThreadPoolExecutor(12) as pool:
        names = [f"batch-{number}" for number in range(12)]
        several = [("image", png())] * 3

        def send(name: str) -> int:
            return client.post("/predict", files=several, headers={"X-Request-ID": name}).status_code

        assert {*pool.map(send, names)} == {200}

    spans = [receiver.request(name) for name in names]
    batches = {each.id: each for each in receiver.spans if each.name == "batch"}
    assert len({each.trace for each in spans}) == len(names)
    for span in spans:
        (infer,) = [each for each in receiver.below(span) if each.name == "infer"]
        own = [batches[link] for link in span.links]
        assert own
        assert all(span.id in batch.links for batch in own)
        assert all(batch.trace != span.trace and not batch.parent for batch in own)
        assert any(infer.start <= batch.start and batch.end <= infer.end for batch in own)
    ours = {link for span in spans for link in span.links}
    assert sum(batches[each].attributes["pvt.batch_size"] for each in ours) == 3 * len(names)
    about = batches[next(iter(ours))].attributes
    assert (about["pvt.model"], about["pvt.precision"], about["pvt.device"]) == ("pvt_v2_b0.digits", "float32", "cpu")


def test_log_and_exemplars_have_the_ids(traced: tuple[Server, Receiver, httpx.Client]) -> None:
    server, receiver, client = traced
    client.post("/predict", files={"image": png()}, headers={"X-Request-ID": "noted", "traceparent": TRACEPARENT})
    while (line := server.event("request"))["request_id"] != "noted":
        pass

    span = receiver.request("noted")
    assert (line["trace_id"], line["span_id"], span.trace) == (TRACE, span.id, TRACE)
    exemplars = [
        sample.exemplar.labels
        for family in text_string_to_metric_families(client.get("/metrics", headers=OPENMETRICS).text)  # type: ignore[no-untyped-call]
        for sample in family.samples
        if sample.exemplar and sample.labels["http_route"] == "/predict"
    ]
    assert {"trace_id": TRACE, "span_id": span.id, "request_id": "noted"} in exemplars


def test_a_request_that_follows_at_once_on_its_connection_has_a_trace_of_its_own(
    traced: tuple[Server, Receiver, httpx.Client],
) -> None:
    server, receiver, _ = traced
    host, port = re.findall(r"//(.*):(\d+)", server.url)[0]
    one = b"GET /models HTTP/1.1\r\nHost: x\r\nX-Request-ID: pipelined-%d\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"".join(one % number for number in range(3)))
        spans = [receiver.request(f"pipelined-{number}") for number in range(3)]

    assert [span.parent for span in spans] == ["", "", ""]
    assert len({span.trace for span in spans}) == 3


def test_grpc_calls_of_several_workers_are_traced_over_grpc() -> None:
    from tests.app.open_inference.test_grpc import grpc_serving, pixels  # noqa: PLC0415

    with grpc_receiver() as receiver:
        environment = {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with grpc_serving(workers="2", instances="2", max_batch_size="2") as (server, address):
                for number in range(4):  # a connection each, of which the kernel chooses the worker
                    with triton.InferenceServerClient(address) as client:
                        headers = {"x-request-id": f"call-{number}", "traceparent": TRACEPARENT}
                        client.infer("pvt_v2_b0.digits", [pixels()], headers=headers)
                with triton.InferenceServerClient(address) as client, pytest.raises(Exception, match="nothing"):
                    client.infer("nothing", [pixels()], headers={"x-request-id": "refused"})
                assert server.stop() == 0  # which sends the last spans

    spans = [receiver.request(f"call-{number}") for number in range(4)]
    refused = receiver.request("refused")
    method = "inference.GRPCInferenceService/ModelInfer"
    assert {(span.name, span.trace, span.parent) for span in spans} == {(method, TRACE, PARENT)}
    for span in spans:
        assert {*STAGES} <= {each.name for each in receiver.below(span)}
        about = [span.attributes[f"rpc.{name}"] for name in ("system.name", "method", "response.status_code")]
        assert about == ["grpc", method, "OK"]
        assert len(span.links) > 0
    assert refused.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert refused.status == 0  # the caller's mistake


@contextmanager
def deaf() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_collector_that_does_not_answer_holds_up_no_request_and_not_the_exit(protocol: str) -> None:
    with deaf() as url:
        environment = {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "100000",
            "OTEL_BSP_SCHEDULE_DELAY": "1",
            "OTEL_BSP_MAX_QUEUE_SIZE": "4",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "2",
        }
        with serving(environment=environment, shutdown_seconds="5", **QUICK) as server:
            statuses = {httpx.get(f"{server.url}/models", timeout=60).status_code for _ in range(30)}
            assert statuses == {200}
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0  # where spans are not waited for the exporter's 100 s


Exported = Callable[[str], list[ReadableSpan]]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    """The spans of an application whose process traces already, by name; each is there as soon as it has ended."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return lambda name: [span for span in exporter.get_finished_spans() if span.name == name]


@pytest.mark.parametrize(
    "given",
    [
        [f"00-{'0' * 32}-{PARENT}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"ff-{TRACE}-{PARENT}-01"],
        [f"00-{TRACE.upper()}-{PARENT}-01"],
        [f"00-{TRACE}-{PARENT}-01-more"],
        [f"00-{TRACE}-{PARENT}-0"],
        [f"00-{TRACE}-{PARENT}"],
        ["", "nonsense"],
        ["x" * 600],
        [TRACEPARENT, f"00-{'1' * 32}-{PARENT}-01"],
        ["\xff"],
    ],
)
def test_a_traceparent_that_is_none_is_ignored(exported: Exported, make_client: MakeClient, given: list[str]) -> None:
    client = make_client()
    headers = [(b"traceparent", each.encode("latin-1")) for each in given]

    assert client.get("/models", headers=[*headers, (b"tracestate", b"a=1")]).status_code == 200

    (span,) = exported("GET /models")
    assert span.parent is None
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" != TRACE
    assert not span.context.trace_state


@pytest.mark.parametrize("given", [f"cc-{TRACE}-{PARENT}-01-what-comes", TRACEPARENT, f" {TRACEPARENT} "])
@pytest.mark.parametrize(("state", "kept"), [("a=1,b=2", {"a": "1", "b": "2"}), ("\x00;=,", {}), ("a=1," * 300, {})])
def test_a_traceparent_of_a_version_to_come_is_honoured_and_a_bad_tracestate_dropped_alone(
    exported: Exported, make_client: MakeClient, given: str, state: str, kept: dict[str, str]
) -> None:
    client = make_client()
    client.get("/models", headers=[(b"traceparent", given.encode()), (b"tracestate", state.encode())])

    (span,) = exported("GET /models")
    assert span.parent is not None
    assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert dict(span.parent.trace_state) == kept


def test_a_trace_that_is_not_sampled_goes_on_in_the_log_alone(
    exported: Exported, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(**QUICK, slow_ms=0)
    lines: list[Any] = []
    monkeypatch.setattr("app.middleware.log", SimpleNamespace(info=lambda *_, **__: lines.append(current.get())))
    answer = client.post("/predict", files={"image": png()}, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})

    assert answer.status_code == 200
    assert (exported("POST /predict"), exported("batch"), exported("infer")) == ([], [], [])
    assert [line.ids["trace_id"] for line in lines] == [TRACE]
    assert "trace_id" not in client.get("/metrics", headers=OPENMETRICS).text


def test_errors_are_recorded_as_the_conventions_say_and_with_the_stage_that_failed(
    exported: Exported, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(**QUICK)
    assert client.post("/predict", files={"image": png()}).status_code == 200
    client.post("/predict", content=b"no image", headers={"Content-Type": "image/png"})
    client.post("/predict?timeout_ms=1&size=96", files={"image": png()})  # whose graph has to be compiled first
    client.request("BREW", "/predict")
    for path in ("/health/live", "/metrics", "/nowhere"):
        client.get(path)
    monkeypatch.setattr("app.routes.images.prediction_bytes", lambda *_: 1 / 0)
    client.post("/predict", files={"image": png()})

    fine, broken, late, failed = map(about, exported("POST /predict"))
    (brewed,), (unmatched,) = map(about, exported("HTTP /predict")), map(about, exported("GET"))
    assert [fine[0], broken[0], unmatched[0], brewed[0]] == [StatusCode.UNSET] * 4  # a client's mistakes are no errors
    assert [each[1]["http.response.status_code"] for each in (fine, broken, late, failed)] == [200, 422, 504, 500]
    assert [each[1].get("error.type") for each in (fine, broken, late, failed)] == [
        *(None, None), "504", "ZeroDivisionError",
    ]  # fmt: skip
    assert [late[0], failed[0]] == [StatusCode.ERROR] * 2
    assert [broken[1]["pvt.problem"], late[1]["pvt.problem"]] == ["invalid-image", "deadline-exceeded"]
    assert [each[1].get("pvt.model") for each in (broken, late)] == ["pvt_v2_b0.digits", None]
    assert (brewed[1]["http.request.method"], brewed[1]["http.request.method_original"]) == ("_OTHER", "BREW")
    assert ("http.route" in unmatched[1], unmatched[1]["http.response.status_code"]) == (False, 404)
    stages = [
        span for name in [*STAGES, "load"] for span in exported(name) if span.status.status_code == StatusCode.ERROR
    ]
    assert [(span.name, dict(span.attributes or {})["error.type"]) for span in stages] == [
        ("decode", "invalid-image"),
        ("load", "deadline-exceeded"),
    ]
    assert exported("GET /health/live") + exported("GET /metrics") == []


def about(span: ReadableSpan) -> tuple[StatusCode, dict[str, Any]]:
    return span.status.status_code, dict(span.attributes or {})


def batches_of_four(client: TestClient, monkeypatch: pytest.MonkeyPatch, *, most: int) -> None:
    """From now on four images wait for each other; the graphs run one at a time, and fail for more than `most`."""
    monkeypatch.setattr(Resident, "replan", lambda _: None)
    client.post("/predict", files={"image": png()})
    engine, run = client.app.state.started["engine"], Executable.run  # type: ignore[attr-defined]  # of the application
    (resident,) = engine._registry.loaded()
    engine._pipeline.scheduler.replan(resident._own.lane, BatchPlan({1: 1.0, 4: 1.0}))
    engine._pipeline.scheduler._dispatcher._payloads.max_delay_seconds = 100.0

    def run_each(self: Executable, instance: int, pixels: list[Any], **options: Any) -> list[Any]:
        if len(pixels) > most:
            raise RuntimeError("too many")
        return [outputs for each in pixels for outputs in run(self, instance, [each], **options)]

    monkeypatch.setattr(Executable, "run", run_each)


def by_id(spans: list[ReadableSpan]) -> dict[int, ReadableSpan]:
    return {span.context.span_id: span for span in spans if span.context}


def test_a_batch_of_several_requests_is_linked_with_each(
    exported: Exported, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.execution.tuning.gain", lambda *_: 2.0)  # batches, whatever was measured
    client = make_client(**QUICK)
    batches_of_four(client, monkeypatch, most=4)
    with ThreadPoolExecutor(2) as pool:
        two = [("image", png())] * 2
        assert {*pool.map(lambda _: client.post("/predict", files=two).status_code, range(2))} == {200}

    alone, together = exported("batch")
    first, *requests = exported("POST /predict")
    assert together.context is not None
    assert [len(each.links) for each in (alone, first)] == [1, 1]
    assert {link.context.span_id for link in together.links} == {*by_id(requests)}
    assert [[link.context.span_id for link in each.links] for each in requests] == [[together.context.span_id]] * 2
    assert dict(together.attributes or {})["pvt.batch_size"] == 4


def test_a_batch_that_fails_is_a_failed_span_and_its_halves_are_linked_too(
    exported: Exported, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(**QUICK)
    batches_of_four(client, monkeypatch, most=2)
    assert client.post("/predict", files=[("image", png())] * 4).status_code == 200

    span, batches = exported("POST /predict")[-1], by_id(exported("batch"))
    tried = [about(batches[link.context.span_id]) for link in span.links]
    assert [(status, attributes["pvt.batch_size"], attributes.get("error.type")) for status, attributes in tried] == [
        (StatusCode.ERROR, 4, "RuntimeError"),
        (StatusCode.UNSET, 2, None),
        (StatusCode.UNSET, 2, None),
    ]
    assert span.status.status_code == StatusCode.UNSET


def test_below_the_span_of_the_application_that_hosts_it(exported: Exported, model_store: Path) -> None:
    hosted = create_app(Settings(model_store=model_store))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with hosted.router.lifespan_context(hosted):
            yield

    host = FastAPI(lifespan=lifespan, telemetry={"tracing": False})
    host.mount("/images", hosted)

    async def traced_host(scope: Scope, receive: Receive, send: Send) -> None:
        with trace.get_tracer_provider().get_tracer("host").start_as_current_span("host"):
            await host(scope, receive, send)

    with TestClient(traced_host) as client:
        client.get("/images/models", headers={"traceparent": TRACEPARENT})

    (span,), outer = exported("GET /models"), exported("host")[0]  # the other one is of the lifespan
    assert span.parent is not None
    assert outer.context is not None
    assert (span.kind, span.parent.span_id) == (SpanKind.SERVER, outer.context.span_id)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, []),
        ({"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"}, []),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, ["otlp_proto_http"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, []),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://c/v1/traces"}, ["otlp_proto_http"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, []),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "TRUE"}, []),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ["otlp_proto_http"]),
        ({"OTEL_TRACES_EXPORTER": "OTLP, console"}, ["console", "otlp_proto_http"]),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ["otlp_proto_grpc"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ["otlp_proto_grpc"]),
        (
            {
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            ["otlp_proto_http"],
        ),
    ],
)
def test_the_standard_variables_switch_traces_on(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: list[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert [entry.name for entry in tracing.exporters()] == expected


@pytest.fixture
def starting() -> Iterator[Starting]:
    """The handlers of signals are those of before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Starting()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER=zipkin: no such exporter is installed"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "http/protobuf or grpc"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "collector:4318: a URL such as http://collector:4318"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://"}, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http:: a URL such as"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:port"}, "a URL such as"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_BSP_MAX_QUEUE_SIZE": "4"}, "traces can't be exported as OTEL_* say"),
    ],
)
def test_what_they_ask_for_and_can_not_be_had_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, starting: Starting, variables: dict[str, str], reason: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(StartRefused, match=re.escape(reason)):
        serve(starting)
    with pytest.raises(SettingsInvalid, match=re.escape(reason)):
        create_app()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_without_the_extra_a_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, starting: Starting, workers: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv("PVT_WORKERS", workers)
    monkeypatch.setattr(tracing, "entry_points", lambda **_: ())

    with pytest.raises(StartRefused, match=r"OTEL_EXPORTER_OTLP_ENDPOINT asks .* pip install 'pvt-serve\[otel\]'"):
        serve(starting)


def test_what_is_not_traced_takes_no_step_for_what_is(make_client: MakeClient) -> None:
    client = make_client(**QUICK)
    client.post("/predict", files={"image": png()})

    state = client.app.state.started  # type: ignore[attr-defined]  # of the application
    (resident,) = state["engine"]._registry.loaded()
    assert state["tracing"] is None
    assert resident._own.lane.decode.func == state["engine"]._pipeline._decode
    assert resident._own.lane.run.func == state["engine"]._pipeline._run
