"""gRPC against Triton's own client, unchanged, and against gRPC's own clients of health checks and reflection."""

import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from app.open_inference.grpc_messages import METHODS, POOL, SERVICE
from tests.app.conftest import png
from tests.app.open_inference.test_clients import run
from tests.app.processes import ROOT, Server, serving
from tests.service.stores import add_model

MODEL = "pvt_v2_b0.digits"
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
KEY, MANAGER = {"authorization": "Bearer sesame"}, {"authorization": "Bearer manager"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def grpc_serving(**settings: str) -> Iterator[tuple[Server, str]]:
    """A server, and its address for gRPC."""
    port = str(free_port())
    variables = {"grpc_port": port, "backend": "torch", "precision": "float32", "timeout_ms": "120000", **settings}
    with serving(environment={f"PVT_{name.upper()}": value for name, value in variables.items()}) as server:
        yield server, f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Server, str]]:
    with grpc_serving() as found:
        yield found


@pytest.fixture(scope="module")
def client(both: tuple[Server, str]) -> Iterator[Any]:
    with triton.InferenceServerClient(both[1]) as client:
        yield client


@pytest.fixture(scope="module")
def http(both: tuple[Server, str]) -> Iterator[Any]:
    with triton_http.InferenceServerClient(both[0].url.removeprefix("http://")) as client:
        yield client


def tensor(module: Any, name: str, array: Any, datatype: str) -> Any:
    found = module.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array)
    return found


def pixels(module: Any = triton, side: int = 64) -> Any:
    return tensor(module, "images", PIXELS[:, :side, :side], "UINT8")


def files(module: Any = triton, *contents: bytes) -> Any:
    return tensor(module, "encoded", np.array(contents or (png(), png("black")), dtype=np.object_), "BYTES")


def plain(message: Any) -> Any:
    return MessageToDict(message, preserving_proto_field_name=True)


def numbers(value: Any) -> Any:
    """Integers of 64 bits are text in protobuf's JSON."""
    if isinstance(value, dict):
        return {key: numbers(each) for key, each in value.items() if each not in (0, "", [], False)}
    if isinstance(value, list):
        return [numbers(each) for each in value]
    return int(value) if isinstance(value, str) and value.lstrip("-").isdecimal() else value


def test_the_messages_are_those_of_tritons_package() -> None:
    """Each member has the name, number and type that Triton's own descriptors give it."""
    theirs = service_pb2.DESCRIPTOR.pool

    def check(message: Any) -> None:
        other = theirs.FindMessageTypeByName(message.full_name)
        for each in message.fields:
            known = other.fields_by_number[each.number]
            assert (each.name, each.type, each.is_repeated) == (known.name, known.type, known.is_repeated)
            if each.enum_type:
                values = {value.name: value.number for value in each.enum_type.values}
                assert values.items() <= {value.name: value.number for value in known.enum_type.values}.items()
            if each.message_type and each.message_type not in seen:
                seen.add(each.message_type)
                check(each.message_type)

    seen: set[Any] = set()
    for method in METHODS.values():
        known = theirs.FindServiceByName(SERVICE).methods_by_name[method.name]
        assert (method.client_streaming, method.server_streaming) == (known.client_streaming, known.server_streaming)
        assert (method.input_type.full_name, method.output_type.full_name) == (
            known.input_type.full_name, known.output_type.full_name,
        )  # fmt: skip
        check(method.input_type)
        check(method.output_type)
    assert POOL.FindServiceByName(SERVICE).full_name == SERVICE


def test_server_and_models_say_the_same_as_over_http(client: Any, http: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready("pvt_v2_b0.none")
    assert plain(client.get_server_metadata()) == http.get_server_metadata()
    assert numbers(plain(client.get_model_metadata(MODEL))) == numbers(http.get_model_metadata(MODEL))
    assert numbers(plain(client.get_model_config(MODEL, "1").config)) == numbers(http.get_model_config(MODEL, "1"))
    assert plain(client.get_model_repository_index())["models"] == [
        {key: value for key, value in each.items() if value} for each in http.get_model_repository_index()
    ]


def test_inference_gives_what_http_gives(client: Any, http: Any) -> None:
    names = [each.name for each in client.get_model_metadata(MODEL).outputs]
    assert "stage4" in names
    for make in (pixels, files):
        outputs = [triton.InferRequestedOutput(name) for name in names]
        answer = client.infer(MODEL, [make(triton)], outputs=outputs, request_id="mine", parameters={"mine": 1})
        expected = http.infer(
            MODEL, [make(triton_http)], outputs=[triton_http.InferRequestedOutput(name) for name in names]
        )
        assert (answer.get_response().id, answer.get_response().model_version) == ("mine", "1")
        for name in names:
            np.testing.assert_array_equal(answer.as_numpy(name), expected.as_numpy(name))


def test_statistics_count_calls(client: Any, http: Any) -> None:
    before = http.get_inference_statistics(MODEL)["model_stats"][0]["inference_count"]
    client.infer(MODEL, [pixels()])
    (found,) = client.get_inference_statistics(MODEL).model_stats

    assert found.inference_count == before + 2
    assert numbers(plain(found)) == numbers(http.get_inference_statistics(MODEL)["model_stats"][0])
    assert [each.name for each in client.get_inference_statistics().model_stats] == [MODEL]


def test_classes_and_typed_contents(both: tuple[Server, str], client: Any) -> None:
    output = triton.InferRequestedOutput("probabilities", class_count=2)
    classes = client.infer(MODEL, [files()], outputs=[output]).as_numpy("probabilities")
    assert classes.shape == (2, 2)
    assert len(classes[0, 0].decode().split(":")) == 3

    raw = client.infer(MODEL, [pixels()])
    with grpc.insecure_channel(both[1]) as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            service_pb2.ModelInferRequest.SerializeToString,
            service_pb2.ModelInferResponse.FromString,
        )
        request = service_pb2.ModelInferRequest(model_name=MODEL)
        image = request.inputs.add(name="images", datatype="UINT8", shape=PIXELS.shape)
        image.contents.uint_contents.extend(PIXELS.ravel().tolist())
        answer = call(request, timeout=60)
        logits = dict(zip((each.name for each in answer.outputs), answer.raw_output_contents, strict=True))["logits"]
        np.testing.assert_array_equal(np.frombuffer(logits, "<f4").reshape(2, 10), raw.as_numpy("logits"))

        request = service_pb2.ModelInferRequest(model_name=MODEL)
        request.inputs.add(name="encoded", datatype="BYTES", shape=[1]).contents.bytes_contents.append(png())
        assert call(request, timeout=60).outputs[0].shape == [1, 10]

        image.contents.uint_contents[:] = [300]
        for wrong, told in (
            (service_pb2.ModelInferRequest(model_name=MODEL, raw_input_contents=[b"a"]), "1 raw_input_contents for 0"),
            (service_pb2.ModelInferRequest(model_name="a/b"), "contain a slash"),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                call(wrong, timeout=60)
            assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert told in raised.value.details()


def refused(call: Any, *arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as raised:
        call(*arguments, **options)
    return raised.value.status().removeprefix("StatusCode."), raised.value.message()


def test_errors_have_the_codes_of_grpc_and_say_what_http_says(client: Any, http: Any) -> None:
    infer = client.infer
    flat = tensor(triton, "images", PIXELS[0], "UINT8")
    wrong = refused(infer, MODEL, [flat])
    assert wrong == (
        "INVALID_ARGUMENT",
        refused(http.infer, MODEL, [tensor(triton_http, "images", PIXELS[0], "UINT8")])[1],
    )
    assert refused(infer, MODEL, [files(triton, b"none")])[0] == "INVALID_ARGUMENT"
    assert refused(infer, MODEL, [pixels(), pixels()])[1].startswith("inputs: List should have at most 1 item")
    assert refused(infer, "pvt_v2_b0.none", [pixels()])[0] == "NOT_FOUND"
    assert refused(infer, "pvt_v2_b5", [pixels()])[0] == "UNAVAILABLE"
    assert refused(infer, MODEL, [pixels()], timeout=1)[0] == "DEADLINE_EXCEEDED"
    assert refused(client.load_model, MODEL)[0] == "PERMISSION_DENIED"
    assert refused(client.get_trace_settings)[0] == "UNIMPLEMENTED"
    assert "send the tensors' bytes" in refused(client.register_system_shared_memory, "a", "/a", 8)[1]


def test_a_deadline_of_the_call_is_that_of_the_request(client: Any) -> None:
    client.infer(MODEL, [pixels()])
    assert refused(client.infer, MODEL, [pixels()], client_timeout=0.0005)[0] == "DEADLINE_EXCEEDED"


def test_many_calls_at_once_are_answered_each_with_its_own(client: Any) -> None:
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for i in range(16):
        client.async_infer(MODEL, [pixels()], lambda result, error: done.put(error or result), request_id=str(i))

    assert sorted(int(done.get(timeout=60).get_response().id) for _ in range(16)) == list(range(16))


def test_a_stream_answers_in_order_and_goes_on_after_an_error(client: Any) -> None:
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(lambda result, error: done.put(error or result))
    for i in range(20):
        client.async_stream_infer(MODEL, [files(triton, b"none") if i == 3 else pixels()], request_id=str(i))
    found = [done.get(timeout=60) for _ in range(20)]
    client.stop_stream()

    assert isinstance(found.pop(3), InferenceServerException)
    assert [each.get_response().id for each in found] == [str(i) for i in range(20) if i != 3]


def test_messages_that_never_arrive_keep_no_other_client_waiting() -> None:
    with grpc_serving(api_keys="sesame,other") as (_, address), grpc.insecure_channel(address) as channel:
        answered = threading.Event()

        def never() -> Iterator[bytes]:
            answered.wait(60)
            yield from ()

        slow = channel.stream_unary(f"/{SERVICE}/ModelInfer")
        hanging = [slow.future(never(), metadata=[*KEY.items()]) for _ in range(50)]
        request = service_pb2.ModelInferRequest(model_name=MODEL)
        request.inputs.add(name="images", datatype="UINT8", shape=PIXELS.shape)
        request.raw_input_contents.append(PIXELS.tobytes())
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for _ in range(3):
            assert call(request.SerializeToString(), metadata=[("authorization", "Bearer other")], timeout=60)
        assert not any(each.done() for each in hanging[:20])
        answered.set()
        assert {each.exception(60).code() for each in hanging} == {grpc.StatusCode.INVALID_ARGUMENT}


def test_streams_need_keys_and_keep_to_the_limits_of_their_client() -> None:
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with (
        grpc_serving(api_keys="sesame", client_concurrency="1") as (_, address),
        triton.InferenceServerClient(address) as client,
    ):
        client.start_stream(lambda result, error: done.put(error or result))
        client.async_stream_infer(MODEL, [pixels()])
        error = done.get(timeout=60)
        assert isinstance(error, InferenceServerException)
        assert "UNAUTHENTICATED" in str(error)
        client.stop_stream()
        client.start_stream(lambda result, error: done.put(error or result), headers=KEY)
        for i in range(10):
            client.async_stream_infer(MODEL, [pixels()], request_id=str(i))
        assert [done.get(timeout=60).get_response().id for _ in range(10)] == [str(i) for i in range(10)]
        client.stop_stream()


def test_the_example_of_the_page_prints_what_is_shown(
    both: tuple[Server, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", (ROOT / "docs" / "grpc.md").read_text(), re.DOTALL)
    assert found
    monkeypatch.chdir(ROOT)
    code = (
        found[1]
        .replace("localhost:8001", both[1])
        .replace("open(", "Path(")
        .replace(', "rb").read()', ").read_bytes()")
    )

    exec(compile(code, "docs/grpc.md", "exec"), {"Path": Path})  # noqa: S102  our own

    assert capsys.readouterr().out == found[2]


@pytest.mark.skipif(
    shutil.which("perf_analyzer") is None, reason="Triton's wheels up to 2.50 have it, none on PyPI now"
)
@pytest.mark.parametrize("over", ["http", "grpc", "stream"])
def test_perf_analyzer_measures(both: tuple[Server, str], tmp_path: Path, over: str) -> None:
    image = {"images": {"content": [0] * 64 * 64 * 3, "shape": [1, 64, 64, 3]}}
    (tmp_path / "data.json").write_text(json.dumps({"data": [image]}))
    where = [both[0].url.removeprefix("http://")] if over == "http" else [both[1], "-i", "grpc"]
    done = subprocess.run(
        ["perf_analyzer", "-m", MODEL, "-u", *where, *(["--streaming"] if over == "stream" else []),
         "--input-data", str(tmp_path / "data.json"), "--measurement-mode", "count_windows",
         "--measurement-request-count", "10", "--stability-percentage", "999"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Successful request count" in done.stdout


def test_health_and_reflection(both: tuple[Server, str]) -> None:
    with grpc.insecure_channel(both[1]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            assert health.Check(request, timeout=60).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        with pytest.raises(grpc.RpcError) as raised:
            health.Check(health_pb2.HealthCheckRequest(service="x"), timeout=60)
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND
        for broken in (
            channel.unary_unary("/grpc.health.v1.Health/Check"),
            channel.unary_unary("/inference.GRPCInferenceService/ServerLive"),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                broken(b"\xff\xff", timeout=60)
            assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        names = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE, "grpc.health.v1.Health"} <= set(names.get_services())
        assert names.FindFileContainingSymbol(SERVICE).service[0].name == "GRPCInferenceService"


def test_kserves_client(both: tuple[Server, str], client: Any) -> None:
    found = run("kserve_grpc", both[1])

    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, True)
    expected = client.infer(MODEL, [pixels()]).as_numpy("logits")
    for binary in ("True", "False"):
        np.testing.assert_allclose(np.reshape(found[f"logits {binary}"], (2, 10)), expected, rtol=1e-6)


def test_keys_management_the_log_and_the_metrics(tmp_path: Path) -> None:
    add_model(tmp_path)
    options = {"model_store": str(tmp_path), "default_model": "pvt_v2_b0.tiny", "client_concurrency": "2"}
    image = tensor(triton, "images", np.zeros((1, 32, 32, 3), np.uint8), "UINT8")
    with (
        grpc_serving(api_keys="sesame", management_keys="manager", **options) as (server, address),
        triton.InferenceServerClient(address) as client,
    ):
        assert client.is_server_live()  # a probe
        for call in (
            lambda: client.infer("pvt_v2_b0.tiny", [image]),
            lambda: client.get_model_metadata("pvt_v2_b0.tiny"),
            lambda: client.load_model("pvt_v2_b0.tiny", headers=KEY),
        ):
            assert refused(call)[0] == "UNAUTHENTICATED"
        client.load_model("pvt_v2_b0.tiny", headers=MANAGER)
        assert server.event("management")["outcome"] == "done"
        answer = client.infer("pvt_v2_b0.tiny", [image], headers=KEY | {"x-request-id": "traced"})
        assert answer.as_numpy("logits").shape == (1, 3)
        while (line := server.event("request"))["request_id"] != "traced":
            pass
        assert (line["protocol"], line["status"], line["images"], line["client"][:4]) == ("grpc", 200, 1, "key:")
        client.unload_model("pvt_v2_b0.tiny", headers=MANAGER)
        text = httpx.get(f"{server.url}/metrics").text
        assert 'pvt_grpc_requests_total{code="OK",method="ModelInfer"} 1.0' in text
        assert 'pvt_grpc_requests_total{code="UNAUTHENTICATED",method="ModelInfer"} 1.0' in text


def test_messages_beyond_the_limit_are_refused_and_so_are_bombs() -> None:
    with grpc_serving(max_body_mb="1") as (server, address), triton.InferenceServerClient(address) as client:
        large = tensor(triton, "encoded", np.array([bytes(3_000_000)], dtype=np.object_), "BYTES")
        body = tensor(triton, "encoded", np.array([bytes(1_000_100)], dtype=np.object_), "BYTES")
        assert refused(client.infer, MODEL, [large])[0] == "RESOURCE_EXHAUSTED"
        assert "PVT_MAX_BODY_MB" in refused(client.infer, MODEL, [body])[1]
        bomb = tensor(triton, "encoded", np.array([bytes(100_000_000)], dtype=np.object_), "BYTES")
        assert refused(client.infer, MODEL, [bomb], compression_algorithm="gzip")[0] == "RESOURCE_EXHAUSTED"
        assert client.infer(MODEL, [pixels()], compression_algorithm="gzip").as_numpy("logits").shape == (2, 10)
        assert psutil.Process(server.process.pid).memory_info().rss < 700e6


def test_workers_share_the_port_and_drain() -> None:
    with grpc_serving(workers="2", shutdown_seconds="20") as (server, address):
        for _ in range(6):  # a connection each
            with triton.InferenceServerClient(address) as client:
                assert client.infer(MODEL, [pixels()]).as_numpy("logits").shape == (2, 10)
        assert server.stop() == 0


def wait_for_load(url: str) -> None:
    """Until the first call has reached the engine, which loads the model for it."""
    while httpx.post(f"{url}/v2/repository/index").json()[0]["state"] == "UNAVAILABLE":
        pass


def test_calls_under_way_are_answered_before_the_process_ends() -> None:
    with (
        grpc_serving(shutdown_seconds="120") as (server, address),
        triton.InferenceServerClient(address) as client,
    ):
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(4):
            client.async_infer(MODEL, [pixels()], lambda result, error: done.put(error or result))
        wait_for_load(server.url)
        server.process.send_signal(signal.SIGTERM)
        server.event("draining")
        assert refused(client.infer, MODEL, [pixels()])[0] == "UNAVAILABLE"
        assert [done.get(timeout=60).as_numpy("logits").shape for _ in range(4)] == [(2, 10)] * 4
        assert server.process.wait(60) == 0


def test_a_caller_that_hangs_up_ends_its_request() -> None:
    with grpc_serving() as (server, address), grpc.insecure_channel(address) as channel:
        request = service_pb2.ModelInferRequest(model_name=MODEL)
        request.inputs.add(name="images", datatype="UINT8", shape=PIXELS.shape)
        request.raw_input_contents.append(PIXELS.tobytes())
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer").future(request.SerializeToString())
        wait_for_load(server.url)
        call.cancel()
        while "/infer" not in (line := server.event("request"))["path"]:
            pass
        assert (line["status"], line["protocol"]) == (499, "grpc")


def test_a_port_that_is_taken_is_told_in_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        variables = {"PVT_GRPC_PORT": str(listener.getsockname()[1]), "PVT_PORT": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "app"], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "as PVT_HOST and PVT_GRPC_PORT say: Address already in use" in done.stderr
    assert done.stderr.count("\n") == 1
