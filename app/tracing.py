"""Traces of requests, where `OTEL_*` ask for them: what OpenTelemetry's SDK, which the extra `otel` installs, exports.

Names and attributes are those of its conventions for servers of HTTP and gRPC
(https://opentelemetry.io/docs/specs/semconv/http/http-spans/, https://opentelemetry.io/docs/specs/semconv/rpc/grpc/);
those of our own begin with `pvt.`. Spans of stages are made once their request has ended, of times that are measured
anyway, so that a request that is not traced pays nothing.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Token
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from time import monotonic, perf_counter, time_ns
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from app.settings import SettingsInvalid
from service.store.location import without_secrets
from service.tracing import ImageTrace, RequestTrace, Stage, current
from service.workers import detached

if TYPE_CHECKING:  # imported late, as the log and the supervisor need to know only whether there are traces
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import TracerProvider
    from starlette.types import Scope

EXTRA = "pip install 'pvt-serve[otel]'"
SWITCH = "OTEL_TRACES_EXPORTER"
ENDPOINTS = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
PROTOCOLS = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
FLUSH_SECONDS = 1.0  # for the last spans, when all else has ended
LEAST_SECONDS = 0.001  # of a load, and of the time before a request has begun: less is no stage
# By protocol, as the specification names it: the exporter's entry point.
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
_EXPORTERS = "opentelemetry_traces_exporter"
_METHODS = {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}  # the conventions'
_SERVER_ERRORS = 500
_MOST_PARENT = 512  # bytes of `traceparent`; the library logs a warning for each that is longer


def _variable(*names: str) -> tuple[str, str]:
    """The first of these variables that is set, and its value; an empty one counts as unset, as the SDK has it."""
    return next(((name, value) for name in names if (value := os.environ.get(name, "").strip())), ("", ""))


def exporters() -> list[EntryPoint]:
    """What exports spans, as OTEL_* say; none where nothing asks for traces.

    OTEL_TRACES_EXPORTER asks for them, and so does an endpoint alone.

    Raises:
        SettingsInvalid: it is not installed, or a variable has a value that it can't have.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    asked, names = _variable(SWITCH)
    if not asked:
        asked, endpoint = _variable(*ENDPOINTS)
        names = "otlp" if endpoint else "none"
    chosen = {name for each in names.split(",") if (name := each.strip().lower()) not in {"", "none"}}
    return [_exporter(name, asked) for name in sorted(chosen)]


def _exporter(name: str, asked: str) -> EntryPoint:
    """The exporter `name`, which the variable `asked` asks for."""
    entry = _protocol() if name == "otlp" else name
    if found := next(iter(entry_points(group=_EXPORTERS, name=entry)), None):
        return found
    if entry in _OTLP.values():
        raise SettingsInvalid(
            f"{asked} asks for traces, which need the extra otel: {EXTRA}, or switch them off: OTEL_SDK_DISABLED=true"
        )
    raise SettingsInvalid(f"{SWITCH}={name[:100]}: no such exporter is installed; the extra otel has otlp and console")


def _protocol() -> str:
    """The entry point of OTLP's exporter."""
    name, protocol = _variable(*PROTOCOLS)
    if protocol and protocol.lower() not in _OTLP:
        raise SettingsInvalid(f"{name}={protocol[:100]}: traces are sent by {' or '.join(_OTLP)}")
    entry = _OTLP[protocol.lower() or "http/protobuf"]
    name, endpoint = _variable(*ENDPOINTS)
    if endpoint and entry == "otlp_proto_http":
        try:
            parts = urlsplit(endpoint)
            valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:  # no port
            valid = False
        if not valid:
            raise SettingsInvalid(
                f"{name}={without_secrets(endpoint)[:200]}: a URL such as http://collector:4318; a collector that "
                f"takes gRPC needs {PROTOCOLS[1]}=grpc"
            )
    return entry


def check() -> None:
    """See that what is asked for can be made.

    Raises:
        SettingsInvalid: it can't.
    """
    for entry in exporters():
        _processor(entry).shutdown()


def _processor(entry: EntryPoint) -> "SpanProcessor":
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415  an extra, which not everybody has

    try:
        return BatchSpanProcessor(entry.load()())
    except Exception as error:  # exporters have classes of their own
        raise SettingsInvalid(f"traces can't be exported as OTEL_* say ({entry.name}): {error}") from error


@dataclass(eq=False, slots=True)
class Opened:
    """A request under way: its trace, its context, and what to undo at its end. `offset` makes Unix time, in ns."""

    trace: RequestTrace
    context: "Context"
    attached: "Token[Context]"
    token: Token[RequestTrace | None]
    offset: int

    def nanoseconds(self, seconds: float) -> int:
        """Unix time of `seconds` on `perf_counter`, which is `monotonic` wherever uvloop runs."""
        return self.offset + int(seconds * 1e9)


class _Headers:
    """Reads the headers of an ASGI scope; see `opentelemetry.propagators.textmap.Getter`."""

    def get(self, carrier: "Scope", key: str) -> list[str] | None:
        name = key.lower().encode("latin-1")
        values = [value.decode("latin-1") for header, value in carrier["headers"] if header == name]
        # Several are invalid, and so is one that no version has (https://www.w3.org/TR/trace-context/#traceparent-header).
        if name == b"traceparent" and (len(values) > 1 or len("".join(values)) > _MOST_PARENT):
            return None
        return values or None

    def keys(self, carrier: "Scope") -> list[str]:
        return [header.decode("latin-1") for header, _ in carrier["headers"]]


class Tracing:
    """Makes the spans: one of each request, with its stages below it, and one of each batch, linked with its requests.

    Spans of requests belong to the event loop, those of batches to any thread.
    """

    def __init__(self, requests: "TracerProvider", batches: "TracerProvider", *, hosted: bool) -> None:
        """`hosted`: by an application that traces itself, whose span, if there is one, is the parent."""
        from opentelemetry import context, propagate, trace  # noqa: PLC0415  see above

        self._trace, self._contexts, self._extract = trace, context, propagate.extract
        self._requests, self._batches = (
            each.get_tracer("pvt-serve", version("pvt-serve")) for each in (requests, batches)
        )
        self._hosted = hosted
        self._getter: Any = _Headers()
        self.headers: Collection[str] = propagate.get_global_textmap().fields

    def begin(self, scope: "Scope") -> Opened:
        """Begin the span of a request that has arrived, as the current one."""
        state, method = scope["state"], scope["state"]["method"]
        ambient = self._contexts.get_current()
        # Not the span of the request before on the same connection: asyncio may have passed it on.
        below = self._hosted and self._trace.get_current_span(ambient).is_recording() and not current.get()
        parent = ambient if below else self._extract(scope, self._contexts.Context(), getter=self._getter)
        opened_at = time_ns() - int(perf_counter() * 1e9)
        attributes: dict[str, Any] = {
            "http.request.method": method if method in _METHODS else "_OTHER",
            "url.scheme": scope.get("scheme", "http"),
            "url.path": state["path"],
        }
        span = self._requests.start_span(
            state.get("grpc_method") or (method if method in _METHODS else "HTTP"),
            parent,
            self._trace.SpanKind.SERVER,
            attributes,
            start_time=opened_at + int(state["arrived"] * 1e9),
        )
        context, ids = self._trace.set_span_in_context(span, parent), span.get_span_context()
        request = RequestTrace(
            span,
            {"trace_id": f"{ids.trace_id:032x}", "span_id": f"{ids.span_id:016x}"},
            recorded=span.is_recording() and ids.trace_flags.sampled,
        )
        state["trace"] = request
        return Opened(request, context, self._contexts.attach(context), current.set(request), opened_at)

    def end(self, opened: Opened, scope: "Scope", status: int, what: Mapping[str, Any]) -> None:
        """End the span of a request, with `what` the log says of it."""
        request, span, end = opened.trace, opened.trace.span, perf_counter()
        request.ended = True
        current.reset(opened.token)
        self._contexts.detach(opened.attached)
        if request.recorded:
            self._describe(scope, request, status, what)
            for stage in _stages(scope["state"], request, end):
                child = self._requests.start_span(
                    stage.name, opened.context, start_time=opened.nanoseconds(stage.start)
                )
                if not stage.finished:
                    child.set_attribute("error.type", scope["state"].get("reason") or str(status))
                    child.set_status(self._trace.StatusCode.ERROR)
                child.end(opened.nanoseconds(stage.end))
            for batch in request.batches:
                span.add_link(batch)
        span.end(opened.nanoseconds(end))

    def _describe(self, scope: "Scope", request: RequestTrace, status: int, what: Mapping[str, Any]) -> None:
        span, state = request.span, scope["state"]
        route, code = getattr(scope.get("route"), "path", None), state.get("grpc_status")
        named = {
            "http.response.status_code": status,
            "http.route": route,
            "http.request.method_original": state["method"] if state["method"] not in _METHODS else None,
            "network.protocol.version": "2" if code else scope.get("http_version"),
            "server.address": (scope.get("server") or [None])[0],
            "server.port": (scope.get("server") or [None, None])[1],
            "client.address": what.get("address"),
            "user_agent.original": next((v.decode("latin-1") for k, v in scope["headers"] if k == b"user-agent"), None),
            "http.request.body.size": what.get("bytes_received"),
            "http.response.body.size": what.get("bytes_sent"),
        }
        if method := state.get("grpc_method"):
            named |= {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": code}
        elif route:
            span.update_name(f"{state['method'] if state['method'] in _METHODS else 'HTTP'} {route}")
        if status >= _SERVER_ERRORS or "exception" in state:
            named["error.type"] = state.get("exception") or code or str(status)
            span.set_status(self._trace.StatusCode.ERROR)
        named |= {f"pvt.{name}": what.get(name) for name in _OURS}
        named["pvt.problem"] = state.get("reason")
        span.set_attributes({name: value for name, value in named.items() if value is not None})

    @contextmanager
    def batch(self, images: Sequence[ImageTrace], what: Mapping[str, str | int]) -> Iterator[None]:
        """See `service.tracing.BatchTracer`."""
        requests = dict.fromkeys(image.request for image in images)
        span = self._batches.start_span(
            "batch",
            self._contexts.Context(),
            attributes={f"pvt.{name}": value for name, value in what.items()},
            links=[self._trace.Link(each.span.get_span_context()) for each in requests],
        )
        for request in requests:
            request.batches.append(span.get_span_context())
        for image in images:
            image.running = monotonic()
        try:
            yield
        except BaseException as error:
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(self._trace.StatusCode.ERROR)
            raise
        finally:
            span.end()


# Of what the log says of a request.
_OURS = (
    "request_id",
    "client",
    "model",
    "version",
    "images",
    "pixels",
    "batch_size",
    "batch_reason",
    "queue_at_arrival",
)


def _stages(state: Mapping[str, Any], request: RequestTrace, end: float) -> Iterator[Stage]:
    """When each stage was, in their order, of a request that ended at `end`."""
    if state["begin_seconds"] >= LEAST_SECONDS:
        yield Stage("wait", state["arrived"], state["arrived"] + state["begin_seconds"])
    for name in ("read", "fetch"):
        if interval := state.get(name):
            yield Stage(name, *interval)
    for stage in request.stages(end):
        if stage.name != "load" or stage.end - stage.start > LEAST_SECONDS:
            yield stage
    if interval := state.get("encode"):
        yield Stage("encode", *interval)


@asynccontextmanager
async def tracing() -> AsyncIterator[Tracing | None]:
    """Traces while the context lasts, if anything asks for them. Its end sends the last spans, for a moment at most.

    Where the process has a tracer provider already, its owner exports, and OTEL_* are the owner's business.

    Raises:
        SettingsInvalid: see `exporters` and `check`.
    """
    from opentelemetry import trace  # noqa: PLC0415  see above

    provider = trace.get_tracer_provider()
    if not isinstance(provider, trace.ProxyTracerProvider):
        yield Tracing(provider, provider, hosted=True)
        return
    if not (chosen := exporters()):
        yield None
        return
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415  as above
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: PLC0415

    resource = _resource()
    requests = TracerProvider(resource=resource, shutdown_on_exit=False)
    # A batch is recorded if one of its requests is, whatever sampler those have.
    batches = TracerProvider(resource=resource, sampler=ALWAYS_ON, shutdown_on_exit=False)
    for entry in chosen:
        processor = _processor(entry)
        requests.add_span_processor(processor)
        batches.add_span_processor(processor)
    try:
        yield Tracing(requests, batches, hosted=False)
    finally:
        with suppress(TimeoutError):  # nobody takes them, and the thread that tries does not keep the process
            async with asyncio.timeout(FLUSH_SECONDS):
                await detached(requests.shutdown)


def _resource() -> Any:  # noqa: ANN401  a Resource, of the extra
    """What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say, and what they leave out."""
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415  see above

    found = dict(Resource.create().attributes)
    if str(found.get("service.name", "")).startswith("unknown_service"):  # the SDK's default
        del found["service.name"]
    own = {"service.name": "pvt-serve", "service.version": version("pvt-serve"), "service.instance.id": str(uuid4())}
    return Resource({**own, "process.pid": os.getpid(), **found})
