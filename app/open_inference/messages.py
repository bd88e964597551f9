"""The Open Inference Protocol's messages: JSON, and after it the bytes of tensors (Triton's binary extension)."""

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from app.bodies import EXAMPLE, parse_json
from app.open_inference.tensors import OUTPUTS, InputTensor
from service.errors import InvalidRequest, reasons

HEADER_LENGTH = "Inference-Header-Content-Length"
_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_LENGTH = re.compile(r"[0-9]{1,12}", re.ASCII)
_KEY = b'"data"'
# Blanks are bounded and nothing is tried twice, so that no body makes it slow.
_NUMBERS = re.compile(rb'(?<!\\)"data"\s{0,99}+:\s{0,99}+(?=\[[\s\[]{0,9999}+-?\d)')
_TRIES = 100  # an input has one key of that name


class Message(BaseModel, extra="forbid"):
    """What a client sends; unknown members are refused by name, and null is as good as none."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Parameters(Message, extra="ignore"):
    """Names and values. Each server has its own, so that those which mean nothing to this one are ignored.

    Source: "Parameters" of the protocol, and "Schedule policy" and "Sequence" of Triton's extensions, whose `priority`
    and `sequence_id` are for models that have them.
    """


class TensorParameters(Parameters):
    """Of an input or output, which must be in the message itself."""

    shared_memory_region: Annotated[str | None, Field(description="Refused: see the error.")] = None

    @field_validator("shared_memory_region")
    @classmethod
    def _no_shared_memory(cls, _: str | None) -> None:
        raise PydanticCustomError(
            "shared_memory", "shared memory is not supported; send the tensor's bytes in the request"
        )


class InputParameters(TensorParameters):
    """Of one input."""

    binary_data_size: Annotated[int | None, Field(ge=0)] = None


class Input(Message):
    """One input; its data is in `data` or after the JSON."""

    name: str
    datatype: str
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=8)]
    parameters: InputParameters = InputParameters()
    data: Annotated[list[Any] | None, Field(description="Nested lists or one flat list.")] = None


class OutputParameters(TensorParameters):
    """Of one requested output."""

    binary_data: bool | None = None
    classification: Annotated[int | None, Field(ge=0, le=1000, description="How many classes; 0: the tensor.")] = None


class RequestedOutput(Message):
    """One requested output."""

    name: str
    parameters: OutputParameters = OutputParameters()


class RequestParameters(Parameters):
    """Of the whole request; `timeout` is in microseconds."""

    timeout: Annotated[int | None, Field(ge=0, le=3_600_000_000)] = None
    binary_data_output: bool = False


class InferRequest(Message):
    """The JSON of a request."""

    id: Annotated[str | None, Field(max_length=1000)] = None
    model_name: Annotated[Any, Field(description="KServe's client sends it; the path names the model.")] = None
    model_version: Annotated[Any, Field(description="The same.")] = None
    inputs: Annotated[list[Input], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=len(OUTPUTS))] = []
    parameters: RequestParameters = RequestParameters()


class OutputMessage(BaseModel):
    """One output; its data is in `data` or after the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[Any] | None = None


_PIXELS = {"name": "images", "datatype": "UINT8", "shape": [1, 224, 224, 3]}
INFER_EXAMPLES: Mapping[str, object] = {
    "a file in base64": {
        "inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [1], "data": [EXAMPLE]}],
        "outputs": [{"name": "probabilities", "parameters": {"classification": 2}}, {"name": "embedding"}],
    },
    "pixels after the JSON": {
        "inputs": [{**_PIXELS, "parameters": {"binary_data_size": 150528}}],
        "parameters": {"binary_data_output": True},
    },
}
_CLASSES = {"name": "probabilities", "datatype": "BYTES", "shape": [1, 2], "data": ["0.971299:7:7", "0.006864:8:8"]}
_RESPONSE: dict[str, Any] = {"model_name": "pvt_v2_b0.digits", "model_version": "1", "outputs": [_CLASSES]}


class InferResponse(BaseModel, json_schema_extra={"examples": [_RESPONSE]}):
    """The JSON of a response."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputMessage]


M = TypeVar("M", bound=Message)


def validated(form: type[M], value: object) -> M:
    """`value` as a `form`; raises InvalidRequest, which names what is wrong."""
    try:
        return form.model_validate(value)
    except ValidationError as error:
        raise InvalidRequest(reasons(error, "the body")) from error


def compressed(content: Iterator[bytes], accepted: str) -> tuple[Iterator[bytes], dict[str, str]]:
    """The pieces of `content` in the one coding that is accepted, and the header that says so.

    Triton's client names exactly the one that its user chose. A client that lists several sends its library's default,
    for which floating point numbers are not worth compressing.
    """
    coding = accepted.strip().lower()
    if coding not in _WINDOW:
        return content, {}
    return _compressed(content, zlib.compressobj(1, zlib.DEFLATED, _WINDOW[coding])), {"Content-Encoding": coding}


def _compressed(content: Iterator[bytes], stream: "zlib._Compress") -> Iterator[bytes]:
    for piece in content:
        yield stream.compress(piece)
    yield stream.flush()


def parse(body: bytes, header_length: str | None) -> tuple[InferRequest, InputTensor]:
    """The request in `body` and its one input; `header_length` bytes are JSON, by default all."""
    end = len(body)
    if header_length is not None:
        if not _LENGTH.fullmatch(header_length) or int(header_length) > len(body):
            raise InvalidRequest(
                f"{HEADER_LENGTH} {header_length[:100]!r}: must be a length within the body's {len(body)}"
            )
        end = int(header_length)
    header, numbers = _without_numbers(body[:end])
    request = validated(InferRequest, parse_json(header))
    return request, _tensor(request.inputs[0], numbers, memoryview(body)[end:])


def _without_numbers(text: bytes) -> tuple[bytes, bytes | None]:
    """`text` with nothing in the list of numbers that is an input's data, and that list; None where there is none.

    A JSON parser would hold up the event loop over them, also from another thread.
    """
    at, found = -1, None
    for _ in range(_TRIES):
        at = text.find(_KEY, at + 1)
        if at < 0 or (found := _NUMBERS.match(text, at)):
            break
    if not found:
        return text, None
    start = found.end()
    # After the list comes a key or the end of the object; neither sign is in a list of numbers.
    end = min(i if i >= 0 else len(text) for i in (text.find(b'"', start), text.find(b"}", start)))
    end = text.rfind(b"]", start, end) + 1
    if not end:
        raise InvalidRequest("the body is no JSON: the input's data has no end")
    return text[: start + 1] + text[end - 1 :], text[start:end]


def _tensor(message: Input, numbers: bytes | None, tail: memoryview) -> InputTensor:
    size = message.parameters.binary_data_size
    if (size is None) == (message.data is None):
        raise InvalidRequest(
            f"input {message.name[:100]!r} must have either data in JSON, or binary_data_size and as many bytes after"
        )
    if numbers is not None and message.data:
        raise InvalidRequest(f"input {message.name[:100]!r} has data twice")
    if len(tail) != (size or 0):
        raise InvalidRequest(f"{len(tail)} bytes follow the JSON, input {message.name[:100]!r} says {size or 0}")
    raw = tail if size is not None else None
    return InputTensor(message.name, message.datatype, tuple(message.shape), raw, numbers, message.data or ())
