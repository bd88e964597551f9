"""The Open Inference Protocol over gRPC, in front of the application: each call is a request of the REST form.

So keys, limits, memory, deadlines, cancellation, the log and the metrics are those of `/v2`, and there is one
implementation of the protocol (decision 82). It runs on the application's event loop; the extra `grpc` installs it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from math import inf
from typing import Any

import grpc
import orjson
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from prometheus_client import CollectorRegistry, Counter
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from app.bodies import LARGE_JSON
from app.clients import Directory
from app.dependencies import State
from app.open_inference import grpc_messages
from app.open_inference.grpc_exchange import OK, Answer, Exchange, Metadata, address, outcome_of
from app.open_inference.grpc_messages import METHODS, POOL, SERVICE, RestRequest
from app.open_inference.messages import HEADER_LENGTH
from app.remote_images.shares import Key, Share, Shares
from app.settings import Settings
from service.errors import DeadlineExceeded
from service.memory import BODIES, Reservation

log = structlog.get_logger(component="grpc")

Context = Any  # grpc.aio.ServicerContext, which has no static types
HEALTH = "grpc.health.v1.Health"
# Of a call's metadata; the others are no business of the application.
_PASSED = frozenset({"authorization", "cache-control", "forwarded", "prefer", "x-forwarded-for", "x-request-id"})
_FRAMING_BYTES = 65_536  # of a message, beside what a body of PVT_MAX_BODY_MB has
_MOST_READING = 32  # messages that arrive at the same time, where memory has no limit
_STREAM_AHEAD = 16  # requests of one stream under way, unless PVT_CLIENT_CONCURRENCY is less
_WATCH_SECONDS = 1.0
_SENDING_SECONDS = 2.0  # for responses that are being sent when all else has ended


# What the application gets of a call without a key, whose message is not read.
_UNREAD = RestRequest("POST", "/v2/models/unread/infer")


class Gateway:
    """Calls to requests of the application and back. It belongs to one event loop."""

    def __init__(self, app: ASGIApp, state: State, registry: CollectorRegistry) -> None:
        self._app = app
        self._state = state
        self._settings: Settings = state["settings"]
        self._identify = Directory(self._settings).identify
        self._passed = _PASSED.union(tracing.headers if (tracing := state["tracing"]) else ())
        self._calls = Counter("pvt_grpc_requests", "Calls answered.", ["method", "code"], registry=registry)
        memory, most = state["engine"].memory, self._settings.max_body_bytes
        # A message is whole before its size is known, so few may arrive at the same time; of one client two in three.
        places = max(2, memory.most.get(BODIES, _MOST_READING * most) // most)
        self._reading = Shares(places, {"client": Share(weight=2, reserved=1)}, room=inf)
        # Mutable state: the requests of the application under way, their responses being sent included.
        self._tasks: set[asyncio.Task[None]] = set()

    async def drained(self) -> None:
        """Returns once every response that is being sent has been sent, or after a while."""
        if self._tasks:
            await asyncio.wait({*self._tasks}, timeout=_SENDING_SECONDS)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What answers the methods of the protocol and of health checks."""
        methods: dict[str, Any] = {
            name: grpc.stream_unary_rpc_method_handler(self._unary(name))
            for name in METHODS
            if name != "ModelStreamInfer"
        }  # on the wire the same as unary; it leaves the reading of the message to us
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream)
        reply = health_pb2.HealthCheckResponse.SerializeToString
        probes = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, response_serializer=reply),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, response_serializer=reply),
        }
        return [
            grpc.method_handlers_generic_handler(SERVICE, methods),
            grpc.method_handlers_generic_handler(HEALTH, probes),
            _Absent(),
        ]

    def _unary(self, method: str) -> Callable[[object, Context], Awaitable[bytes]]:
        async def call(_: object, context: Context) -> bytes:
            code, details, message = grpc.StatusCode.INTERNAL, "", b""
            metadata: Metadata = ()
            try:
                with self._state["engine"].memory.reserve(0, BODIES) as held:
                    request = await self._read(method, context, held)
                    exchange = self._begin(context, request, method)
                    context.add_done_callback(lambda _: exchange.sent.set())
                    answer = await exchange.answer()
                code, details, metadata = answer.code, "", answer.metadata
                message = await self._message(method, answer)
                code = grpc.StatusCode.OK
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except _Refused as refused:
                code, details = refused.code, refused.details
            except Exception as error:  # noqa: BLE001  gRPC would send its text to the client
                code, details, metadata = outcome_of(error)
            finally:
                self._calls.labels(method, code.name).inc()
            if code != grpc.StatusCode.OK:
                await context.abort(code, details, metadata)
            context.set_trailing_metadata(metadata)
            return message

        return call

    async def _read(self, method: str, context: Context, held: Reservation) -> RestRequest:
        """The call's request, whose message takes memory from `held`; it is not read where a key is missing."""
        client, role = self._identify(self._scope(context, _UNREAD))
        if method == "ModelInfer" and self._settings.api_keys and role != "api":
            return _UNREAD
        seconds = self._settings.client_timeout_seconds
        async with self._reading.place([Key("client", client)]):
            try:
                async with asyncio.timeout(seconds):
                    message = await context.read()
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the message did not arrive within the {seconds:g} s of PVT_CLIENT_TIMEOUT_SECONDS"
                ) from None
            message = b"" if message is grpc.aio.EOF else message
            held.grow(len(message))
        return await self._parsed(method, message, context.time_remaining())

    async def _parsed(self, method: str, message: bytes, seconds_left: float | None) -> RestRequest:
        def parse() -> RestRequest:
            return grpc_messages.rest_request(method, grpc_messages.parsed(method, message), seconds_left)

        return parse() if len(message) < LARGE_JSON else await run_in_threadpool(parse)

    async def _message(self, method: str, answer: Answer) -> bytes:
        """The message of the response; raises _Refused where the answer is an error."""
        if method == "ModelReady" and answer.status in {200, 404, 503}:
            return bytes(grpc_messages.response(method, {"ready": answer.status == OK}).SerializeToString())
        if method in {"ServerLive", "ServerReady"} and answer.status in {200, 503} and answer.body:
            found = orjson.loads(answer.body)
            if "error" not in found:
                return bytes(grpc_messages.response(method, found).SerializeToString())
        if answer.status != OK:
            raise _Refused(answer.code, answer.details)
        if method == "ModelInfer":
            return bytes((await self._inferred(answer)).SerializeToString())
        content = orjson.loads(answer.body) if answer.body else {}
        wrapped = {"ModelConfig": {"config": content}, "RepositoryIndex": {"models": content}}.get(method, content)
        return bytes(grpc_messages.response(method, wrapped).SerializeToString())

    @staticmethod
    async def _inferred(answer: Answer) -> Any:  # noqa: ANN401  a message
        make, length = grpc_messages.inference_response, int(answer.headers[HEADER_LENGTH.lower()])
        if len(answer.body) < LARGE_JSON:
            return make(answer.body, length)
        return await run_in_threadpool(make, answer.body, length)

    async def _stream(self, requests: object, context: Context) -> None:
        """Requests one after another, several under way at once; responses in their order, errors among them."""
        del requests  # read one by one below
        if self._settings.api_keys and self._identify(self._scope(context, _UNREAD))[1] != "api":
            exchange = self._begin(context, _UNREAD, "ModelStreamInfer")
            exchange.sent.set()
            answer = await exchange.answer()
            self._calls.labels("ModelStreamInfer", answer.code.name).inc()
            await context.abort(answer.code, answer.details, answer.metadata)
        waiting: asyncio.Queue[asyncio.Task[tuple[bytes, Exchange | None]] | None] = asyncio.Queue()
        places = asyncio.Semaphore(min(_STREAM_AHEAD, self._settings.client_concurrency or _STREAM_AHEAD))
        unsent: set[Exchange] = set()

        async def read(group: asyncio.TaskGroup) -> None:
            await places.acquire()
            while (message := await context.read()) is not grpc.aio.EOF:
                waiting.put_nowait(group.create_task(self._streamed(context, message, unsent)))
                await places.acquire()
            waiting.put_nowait(None)

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(read(group))
                while task := await waiting.get():
                    reply, sent = await task
                    await context.write(reply)
                    if sent is not None:
                        sent.sent.set()
                        unsent.discard(sent)
                        await asyncio.wait([sent.task])  # its client may have as many as PVT_CLIENT_CONCURRENCY
                    places.release()
        finally:
            for each in unsent:
                each.sent.set()

    async def _streamed(self, context: Context, message: bytes, unsent: set[Exchange]) -> tuple[bytes, Exchange | None]:
        """The response to one request of a stream, and what waits until it is sent. Errors bear the request's id."""
        reply, code = grpc_messages.response("ModelStreamInfer", {}), grpc.StatusCode.OK
        exchange: Exchange | None = None
        try:
            with self._state["engine"].memory.reserve(len(message), BODIES):
                reply.infer_response.id = grpc_messages.parsed("ModelStreamInfer", message).id
                request = await self._parsed("ModelStreamInfer", message, context.time_remaining())
                exchange = self._begin(context, request, "ModelStreamInfer")
                unsent.add(exchange)
                answer = await exchange.answer()
            if answer.status == OK:
                reply.infer_response.CopyFrom(await self._inferred(answer))
            else:
                code, reply.error_message = answer.code, answer.details
        except Exception as error:  # noqa: BLE001  as above
            code, reply.error_message, _ = outcome_of(error)
        finally:
            self._calls.labels("ModelStreamInfer", code.name).inc()
        reply.infer_response.parameters["triton_final_response"].bool_param = True
        return reply.SerializeToString(), exchange

    def _begin(self, context: Context, request: RestRequest, method: str = "") -> Exchange:
        scope = self._scope(context, request)
        scope["state"]["grpc_method"] = method and f"{SERVICE}/{method}"
        exchange = Exchange(self._app, scope, request.body)
        self._tasks.add(exchange.task)
        exchange.task.add_done_callback(self._tasks.discard)
        return exchange

    def _scope(self, context: Context, request: RestRequest) -> dict[str, Any]:
        metadata = [(key, value) for key, value in context.invocation_metadata() or () if key in self._passed]
        headers = [(key.encode(), value if isinstance(value, bytes) else value.encode()) for key, value in metadata]
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            # A client of that version takes no chunks, so that memory for a whole response is reserved.
            "http_version": "1.0",
            "scheme": "grpc",
            "method": request.method,
            "path": request.path,
            "raw_path": request.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [*headers, *request.headers],
            "client": address(context.peer()),
            "server": (self._settings.host, self._settings.grpc_port),
            "state": dict(self._state),
        }

    async def _check(self, message: bytes, context: Context) -> Any:  # noqa: ANN401  a message
        try:
            service = health_pb2.HealthCheckRequest.FromString(message).service
        except DecodeError as error:  # which gRPC would tell the client as an exception of Python's
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the message is no HealthCheckRequest: {error}")
        if service not in {"", SERVICE}:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service {service[:100]!r} is none of this server's")
        exchange = self._begin(context, RestRequest("GET", "/v2/health/ready"))
        exchange.sent.set()  # nothing waits for a few bytes
        ready = (await exchange.answer()).status == OK
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if ready else states.NOT_SERVING)

    async def _watch(self, message: bytes, context: Context) -> AsyncIterator[Any]:
        last = None
        while True:
            status = await self._check(message, context)
            if status != last:
                yield status
            last = status
            await asyncio.sleep(_WATCH_SECONDS)


class _Refused(Exception):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


class _Absent(grpc.GenericRpcHandler):  # type: ignore[misc]  # it has no static types
    """Refuses the methods that this service has not, by name and with what to do."""

    _WHY = (
        ("SharedMemory", "shared memory is not supported; send the tensors' bytes in the request"),
        ("TraceSetting", "traces are not supported; server-timing of the trailing metadata has a call's times"),
        ("LogSettings", "log settings can't be changed while the service runs; PVT_LOG_FORMAT sets their form"),
    )

    def service(self, handler_call_details: Any) -> Any:  # noqa: ANN401  untyped
        """See `grpc.GenericRpcHandler`."""
        method = handler_call_details.method
        why = next(
            (why for part, why in self._WHY if part in method), f"this server's services are {SERVICE}, {HEALTH}"
        )

        async def refuse(_: object, context: Context) -> None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method[:100]}: {why}")

        return grpc.unary_unary_rpc_method_handler(refuse)


@asynccontextmanager
async def serving(app: ASGIApp, state: State, registry: CollectorRegistry) -> AsyncIterator[None]:
    """Listen on PVT_GRPC_PORT while the context lasts; leaving it lets responses under way be sent."""
    settings = state["settings"]
    server = grpc.aio.server(options=[
        ("grpc.max_receive_message_length", settings.max_body_bytes + _FRAMING_BYTES),
        ("grpc.so_reuseport", int(settings.workers > 1)),  # alone, a port in use is an error
    ])  # fmt: skip
    gateway = Gateway(app, state, registry)
    names = (SERVICE, HEALTH, reflection.SERVICE_NAME)
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        POOL.AddSerializedFile(file.serialized_pb)
    reflection.enable_server_reflection(names, server, pool=POOL)
    server.add_generic_rpc_handlers(gateway.handlers())
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    server.add_insecure_port(f"{host}:{settings.grpc_port}")
    await server.start()
    log.info("grpc_listening", address=f"{host}:{settings.grpc_port}")
    try:
        yield
    finally:
        await gateway.drained()
        await server.stop(grace=0.5)
