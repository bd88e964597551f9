"""What the service answers with, typed, and how responses are read. Reading takes no more than numpy."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pvt_client.errors import Problem, PvtError, UnexpectedResponse, problem_class

Floats = NDArray[np.floating[Any]]
SAFETENSORS = "application/vnd.safetensors"
_SHOWN = 200  # characters of a response that is not understood
_LENGTH = 8  # bytes of the length of a safetensors header
_TYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


class ClassScore(NamedTuple):
    """One class and its share of the softmax over all classes."""

    class_id: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The best classes of one image, best first; `width` and `height` are those of the image you sent, in pixels."""

    filename: str | None
    width: int
    height: int
    classes: tuple[ClassScore, ...]
    model: str
    version: str

    @property
    def best(self) -> ClassScore:
        """The first of `classes`."""
        return self.classes[0]


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Arrays of one image, or of several stacked on a first axis, in the order of the images.

    `embedding` is (D,) or (n, D). `stages` has the requested stages by number, with pool `none` (C, H, W) or
    (n, C, H, W), with `avg` (C,) or (n, C).
    """

    embedding: Floats
    stages: Mapping[int, Floats]
    model: str
    version: str


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """The embedding of one image, `vector` (D,); `width` and `height` are those of the image you sent, in pixels."""

    width: int
    height: int
    vector: Floats
    model: str
    version: str


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """The exact class activation map of one class: `map.mean() + bias` is `logit`."""

    filename: str | None
    width: int
    height: int
    class_id: int
    label: str
    score: float
    logit: float
    bias: float
    map: Floats
    """(H, W), one value for each cell of the last stage."""
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model and its state; `details` is everything that the service reports of it."""

    id: str
    variant: str
    version: str
    state: str
    """`available`, `remote`, `loading`, `ready` or `failed`."""
    default: bool
    details: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Health:
    """`reasons` says what keeps the service from being live or ready; empty when it is both."""

    live: bool
    ready: bool
    reasons: tuple[str, ...]


class Response(NamedTuple):
    """The parts of a response that are read; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@contextmanager
def understanding(response: Response) -> Iterator[None]:
    """Raises UnexpectedResponse when `response` is not of the form that the block expects."""
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        raise UnexpectedResponse(
            f"this client does not understand the response ({error!r}): {_excerpt(response.body)}; is the URL right?"
        ) from error


def read_tensors(body: bytes) -> tuple[dict[str, Floats], Mapping[str, str]]:
    """The arrays of a safetensors file by name, and its metadata.

    The file is the length of the header, the header as JSON, then the bytes of the arrays, little-endian. It is the one
    binary form of the service that names the model too.

    Raises:
        LookupError, TypeError, ValueError: `body` is cut off, or no such file.
    """
    start = _LENGTH + int.from_bytes(body[:_LENGTH], "little")
    header: dict[str, Any] = json.loads(body[_LENGTH:start])
    metadata: Mapping[str, str] = header.pop("__metadata__", {})
    return {name: _array(memoryview(body)[start:], **entry) for name, entry in header.items()}, metadata


def _array(data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> Floats:
    begin, end = data_offsets
    array: Floats = np.frombuffer(data[begin:end], _TYPES[dtype]).reshape(shape)
    return array.copy()  # writable, and it does not keep the bytes of the other arrays in memory


def read_refusal(response: Response, retry_after: float | None) -> Problem:
    """The error that a response of status 400 or more means, from the service or from a proxy."""
    fields: Mapping[str, Any] = {"detail": _excerpt(response.body)}
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        body = json.loads(response.body)
        fields = body if isinstance(body, dict) else fields
    return _problem(fields, response.status, response.headers.get("x-request-id"), retry_after)


def read_prediction(result: Mapping[str, Any], filename: str | None, model: str, version: str) -> Prediction | PvtError:
    """One entry of `results`; `filename` is used where the service was sent none."""
    if "error" in result:
        return _problem(result["error"], 0, None, None)
    classes = tuple(ClassScore(each["class_id"], each["label"], each["score"]) for each in result["predictions"])
    return Prediction(result["filename"] or filename, result["width"], result["height"], classes, model, version)


def read_model(fields: Mapping[str, Any]) -> Model:
    """A model as `GET /models` describes it."""
    known = {name: fields[name] for name in ("id", "variant", "version", "state", "default")}
    return Model(**known, details=fields)


def _problem(fields: Mapping[str, Any], status: int, request_id: str | None, retry_after: float | None) -> Problem:
    kind, status = str(fields.get("type", "about:blank")), int(fields.get("status", status))
    return problem_class(status, kind)(
        type=kind,
        title=str(fields.get("title", f"HTTP {status}")),
        status=status,
        detail=str(fields.get("detail", "")),
        request_id=fields.get("request_id") or request_id,
        retry_after=retry_after,
    )


def _excerpt(body: bytes) -> str:
    return body[: 4 * _SHOWN].decode("utf-8", "replace")[:_SHOWN].strip() or "an empty body"
