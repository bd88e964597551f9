"""Receivers of OTLP, over HTTP and over gRPC, that parse what they get with OpenTelemetry's own messages."""

import gzip
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from typing_extensions import override

SERVER = 2  # the kind of a span


@dataclass
class Span:
    """One span: ids in hex, times in nanoseconds."""

    name: str
    kind: int
    trace: str
    id: str
    parent: str
    start: int
    end: int
    state: str
    status: int
    links: list[str]
    attributes: dict[str, Any]
    resource: dict[str, Any]

    @property
    def ms(self) -> float:
        return (self.end - self.start) / 1e6


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@dataclass
class Receiver:
    """What arrived so far."""

    url: str
    spans: list[Span] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, request: Any) -> None:
        with self.changed:
            for resource in request.resource_spans:
                about = _plain(resource.resource.attributes)
                for each in (span for scope in resource.scope_spans for span in scope.spans):
                    ids = each.trace_id.hex(), each.span_id.hex(), each.parent_span_id.hex()
                    times = each.start_time_unix_nano, each.end_time_unix_nano
                    links = [link.span_id.hex() for link in each.links]
                    self.spans.append(
                        Span(each.name, each.kind, *ids, *times, each.trace_state, each.status.code, links,
                             _plain(each.attributes), about)
                    )  # fmt: skip
            self.changed.notify_all()

    def wait(self, found: Callable[[Span], bool], count: int = 1) -> list[Span]:
        """The spans for which `found` holds, once there are so many."""
        with self.changed:
            assert self.changed.wait_for(lambda: sum(map(found, self.spans)) >= count, 90), [
                span.name for span in self.spans
            ]
            return [span for span in self.spans if found(span)]

    def request(self, request_id: str) -> Span:
        """The server span of that request."""
        return self.wait(lambda span: span.attributes.get("pvt.request_id") == request_id)[0]

    def below(self, span: Span) -> list[Span]:
        """Its children, by their beginning: they are exported before it."""
        return sorted((each for each in self.spans if each.parent == span.id), key=lambda each: each.start)


@contextmanager
def http_receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["content-encoding"] == "gzip":
                body = gzip.decompress(body)
            receiver.headers.update(self.headers.items(), path=self.path)
            receiver.take(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:  # standard error is for tests
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield receiver
        server.shutdown()
        thread.join()


@contextmanager
def grpc_receiver() -> Iterator[Receiver]:
    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        @override
        def Export(self, request: Any, _: object) -> Any:
            receiver.take(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)  # type: ignore[no-untyped-call]  # generated
        receiver = Receiver(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        server.start()
        yield receiver
        server.stop(None).wait()
