"""The protocol's gRPC form: its messages (`protocol.proto`), to and from those of its REST form."""

from collections.abc import Mapping
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import orjson
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.message import DecodeError

from app.open_inference.messages import HEADER_LENGTH
from service.errors import InvalidRequest

SERVICE = "inference.GRPCInferenceService"
_FILE = Path(__file__).with_name("protocol.binpb")
_LENGTH = Struct("<I")  # in front of each element of a BYTES tensor
_AT_ONCE = 65_536  # numbers that are made into bytes while nothing else runs
_MOST_MICROSECONDS = 3_600_000_000  # of `timeout`


def _pool() -> descriptor_pool.DescriptorPool:
    """The messages in a pool of their own: packages of Triton and KServe put the same names into the default one.

    Messages that are made of descriptors depend on no version of protobuf, as generated modules would.
    """
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(_FILE.read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _pool()
METHODS = {method.name: method for method in POOL.FindServiceByName(SERVICE).methods}


class RestRequest(NamedTuple):
    """A request of the REST form."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()


def parsed(method: str, message: bytes) -> Any:  # noqa: ANN401  messages have no static types
    """The request of `method` in `message`; raises InvalidRequest where it is none."""
    try:
        return message_factory.GetMessageClass(METHODS[method].input_type).FromString(message)
    except DecodeError as error:
        raise InvalidRequest(f"the message is no {METHODS[method].input_type.full_name}: {error}") from error


def response(method: str, content: Mapping[str, Any]) -> Any:  # noqa: ANN401  as above
    """The response of `method`, from what the REST form answers; members that the message has not are left out."""
    message = message_factory.GetMessageClass(METHODS[method].output_type)()
    return json_format.ParseDict(content, message, ignore_unknown_fields=True)


def rest_request(  # noqa: PLR0911  one for each row of a table
    method: str,
    message: Any,  # noqa: ANN401  as above
    seconds_left: float | None,
) -> RestRequest:
    """The same request in the REST form; raises InvalidRequest where there is none."""
    match method:
        case "ServerLive" | "ServerReady":
            return RestRequest("GET", f"/v2/health/{method.removeprefix('Server').lower()}")
        case "ServerMetadata":
            return RestRequest("GET", "/v2")
        case "RepositoryIndex":
            return RestRequest("POST", "/v2/repository/index", orjson.dumps({"ready": message.ready}))
        case "RepositoryModelLoad" | "RepositoryModelUnload":
            path = f"/v2/repository/models/{_name(message.model_name)}/{method.removeprefix('RepositoryModel').lower()}"
            return RestRequest("POST", path, orjson.dumps({"parameters": _parameters(message.parameters)}))
        case "ModelStatistics" if not message.name:
            return RestRequest("GET", "/v2/models/stats")
        case "ModelInfer" | "ModelStreamInfer":
            return _inference(message, seconds_left)
    ends = {"ModelReady": "/ready", "ModelConfig": "/config", "ModelStatistics": "/stats", "ModelMetadata": ""}
    return RestRequest("GET", _model(message.name, message.version) + ends[method])


def inference_response(body: bytes, header_length: int) -> Any:  # noqa: ANN401  as above
    """The response to an inference, of a body whose tensors follow `header_length` bytes of JSON."""
    content = orjson.loads(body[:header_length])
    raw, start = [], header_length
    for output in content["outputs"]:
        size = output.pop("parameters")["binary_data_size"]
        raw.append(body[start : start + size])
        start += size
    message = response("ModelInfer", content)
    message.raw_output_contents.extend(raw)
    return message


def _model(name: str, version: str) -> str:
    return f"/v2/models/{_name(name)}" + (f"/versions/{_name(version)}" if version else "")


def _name(name: str) -> str:
    if not name or "/" in name:
        raise InvalidRequest(f"model name or version {name[:100]!r}: it must not be empty nor contain a slash")
    return name


def _parameters(parameters: Any) -> dict[str, Any]:  # noqa: ANN401  as above
    found = {}
    for key, value in parameters.items():
        which = value.WhichOneof("parameter_choice")
        given = getattr(value, which) if which else None
        found[key] = f"{len(given)} bytes" if isinstance(given, bytes) else given
    return found


def _inference(message: Any, seconds_left: float | None) -> RestRequest:  # noqa: ANN401  as above
    """JSON, and after it the bytes of the tensors (Triton's binary extension); all outputs are to be binary, too."""
    raw = [*message.raw_input_contents]
    if raw and (len(raw) != len(message.inputs) or any(each.HasField("contents") for each in message.inputs)):
        raise InvalidRequest(
            f"{len(raw)} raw_input_contents for {len(message.inputs)} inputs: send one for each, and no contents"
        )
    raw = raw or [_raw(each.datatype, each.contents) for each in message.inputs]
    inputs = [
        {
            "name": each.name,
            "datatype": each.datatype,
            "shape": [*each.shape],
            "parameters": {**_parameters(each.parameters), "binary_data_size": len(data)},
        }
        for each, data in zip(message.inputs, raw, strict=True)
    ]
    outputs = [
        {"name": each.name, "parameters": {**_parameters(each.parameters), "binary_data": True}}
        for each in message.outputs
    ]
    parameters = {**_parameters(message.parameters), "binary_data_output": True}
    if seconds_left is not None:
        own = parameters.get("timeout") or _MOST_MICROSECONDS
        left = min(max(1, int(seconds_left * 1e6)), _MOST_MICROSECONDS)
        parameters["timeout"] = min(own, left) if isinstance(own, int) else own
    content = {"id": message.id or None, "inputs": inputs, "outputs": outputs, "parameters": parameters}
    header = orjson.dumps(content)
    headers = ((HEADER_LENGTH.lower().encode(), str(len(header)).encode()),)
    path = f"{_model(message.model_name, message.model_version)}/infer"
    return RestRequest("POST", path, b"".join((header, *raw)), headers)


def _raw(datatype: str, contents: Any) -> bytes:  # noqa: ANN401  as above
    """The bytes of a tensor whose elements are in the message; of a type that no model takes, none."""
    if datatype == "BYTES":
        return b"".join(part for each in contents.bytes_contents for part in (_LENGTH.pack(len(each)), each))
    if datatype != "UINT8":
        return b""
    numbers = contents.uint_contents
    try:
        return b"".join(bytes(numbers[i : i + _AT_ONCE]) for i in range(0, len(numbers), _AT_ONCE))
    except ValueError:
        raise InvalidRequest("uint_contents of a UINT8 tensor must be whole numbers from 0 to 255") from None
