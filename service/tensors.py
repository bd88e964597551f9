"""Tensors of the Open Inference Protocol v2: from bytes or JSON lists to images, and from a model's answer to both.

Source: the REST part of the protocol (kserve.github.io), and its extensions for binary tensor data and classification
in Triton's documentation.
"""

import binascii
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from struct import Struct
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from service.cards import ModelCard
from service.encodings import json_array, little_endian
from service.errors import InvalidRequest
from service.outputs import softmax
from service.results import Answered, Inferred, whole
from service.variants import VARIANTS

Datatype = Literal["UINT8", "BYTES", "FP32"]
_LENGTH = Struct("<I")  # in front of each element of a BYTES tensor
STAGES = ("stage1", "stage2", "stage3", "stage4")
VECTORS = ("probabilities", "logits", "embedding")
OUTPUTS = (*VECTORS, *STAGES)


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor looks like; -1 stands for any number."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InputTensor:
    """A tensor as it came: `raw` bytes of the body, or a list from the JSON, nested or flat."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: memoryview | None = None
    data: Sequence[Any] | None = None


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to send."""

    spec: Spec
    elements: "NDArray[np.float32] | list[bytes]"

    def raw(self) -> bytes:
        """Its elements as the binary extension sends them, little-endian."""
        if isinstance(self.elements, list):
            return b"".join(chain.from_iterable((_LENGTH.pack(len(each)), each) for each in self.elements))
        return little_endian(self.elements)

    def json(self) -> orjson.Fragment | list[str]:
        """Its elements as one flat list for JSON."""
        if isinstance(self.elements, list):
            return [each.decode() for each in self.elements]
        return json_array(self.elements.ravel())


def input_specs(card: ModelCard) -> list[Spec]:
    """What the model takes: one of these."""
    pixels = card.preprocessing
    return [Spec("images", "UINT8", (-1, pixels.height, pixels.width, 3)), Spec("encoded", "BYTES", (-1,))]


def output_specs(card: ModelCard) -> list[Spec]:
    """What the model gives, in the order of OUTPUTS."""
    channels, classes = VARIANTS[card.variant].embed_dims, len(card.labels)
    pixels = card.preprocessing
    vectors = [Spec(name, "FP32", (-1, classes)) for name in VECTORS[:2]]
    stages = [
        Spec(name, "FP32", (-1, channels[i], pixels.height >> i + 2, pixels.width >> i + 2))
        for i, name in enumerate(STAGES)
    ]
    return [*vectors, Spec("embedding", "FP32", (-1, channels[-1])), *stages]


def images(tensor: InputTensor) -> tuple[list[bytes | NDArray[np.uint8]], tuple[int, int] | None]:
    """The pictures in `tensor`, and the input size they ask for: none where they are encoded.

    Raises:
        InvalidRequest: it is none of the tensors that a model takes; the message says what was expected.
    """
    if tensor.name == "images":
        pixels = _pixels(tensor)
        return list(pixels), (pixels.shape[1], pixels.shape[2])
    if tensor.name == "encoded":
        return list(_encoded(tensor)), None
    raise InvalidRequest(f"input {tensor.name[:100]!r}: a model takes 'images' or 'encoded'")


def output(answered: Answered, name: str, classification: int | None) -> OutputTensor:
    """The tensor `name` of all pictures; with `classification`, its so many highest values as `value:index:label`.

    Raises:
        InvalidRequest: there is no such tensor, or it has no classes.
        ServiceError: a picture failed; the message says which.
    """
    results = whole(answered.results, [None] * len(answered.results))
    stack = np.stack([_element(each, name) for each in results])
    if classification is None:
        return OutputTensor(Spec(name, "FP32", stack.shape), stack)
    if name not in VECTORS[:2]:
        raise InvalidRequest(f"output {name!r} has no classes; classification is for {VECTORS[0]!r} and {VECTORS[1]!r}")
    count = min(classification, stack.shape[1])
    best = (-stack).argsort(axis=1, kind="stable")[:, :count]
    labels = answered.card.labels
    told = [f"{row[i]:f}:{i}:{labels[i]}".encode() for row, order in zip(stack, best, strict=True) for i in order]
    return OutputTensor(Spec(name, "BYTES", best.shape), told)


def check_outputs(names: Sequence[str]) -> None:
    """Raises InvalidRequest when one of `names` is no output, or there twice."""
    for i, name in enumerate(names):
        if name not in OUTPUTS:
            raise InvalidRequest(f"output {name[:100]!r}: a model gives {', '.join(OUTPUTS)}")
        if name in names[:i]:
            raise InvalidRequest(f"output {name!r} is asked for twice")


def _element(result: Inferred, name: str) -> NDArray[np.float32]:
    if name in STAGES:
        return result.outputs.stages[STAGES.index(name)]
    if name == "embedding":
        return result.outputs.embedding
    return softmax(result.outputs.logits) if name == "probabilities" else result.outputs.logits


def _pixels(tensor: InputTensor) -> NDArray[np.uint8]:
    _expect(tensor, "UINT8")
    shape = tensor.shape
    if len(shape) != 4 or shape[-1] != 3 or min(shape) < 1:  # noqa: PLR2004  n, height, width, channels
        raise InvalidRequest(
            f"input 'images' has the shape {list(shape)}; expected [n, height, width, 3], n at least 1"
        )
    flat = _flat_uint8(tensor.data or ()) if tensor.raw is None else np.frombuffer(tensor.raw, np.uint8)
    if len(flat) != (count := int(np.prod(shape, dtype=object))):
        raise InvalidRequest(f"input 'images' has {len(flat)} elements; its shape {list(shape)} says {count}")
    return flat.reshape(shape)


def _flat_uint8(data: Sequence[Any]) -> NDArray[np.uint8]:
    try:
        array = np.asarray(data) if data else np.zeros(0, np.uint8)
        if array.dtype.kind not in "iu":
            raise ValueError(f"{array.dtype} among them")  # noqa: TRY301
        if array.size and (array.min() < 0 or array.max() > 255):  # noqa: PLR2004  of uint8
            raise ValueError(f"values from {array.min()} to {array.max()}")  # noqa: TRY301
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"input 'images': its data must be whole numbers from 0 to 255 ({error})") from error
    return array.astype(np.uint8).ravel()


def _encoded(tensor: InputTensor) -> Iterator[bytes]:
    _expect(tensor, "BYTES")
    shape = tensor.shape
    if not shape or min(shape) < 1 or any(side != 1 for side in shape[1:]):
        raise InvalidRequest(f"input 'encoded' has the shape {list(shape)}; expected [n], n at least 1")
    elements = list(_from_base64(tensor.data or ()) if tensor.raw is None else _elements(tensor.raw))
    if len(elements) != shape[0]:
        raise InvalidRequest(f"input 'encoded' has {len(elements)} elements; its shape {list(shape)} says {shape[0]}")
    yield from elements


def _elements(raw: memoryview) -> Iterator[bytes]:
    start = 0
    while start < len(raw):
        if start + _LENGTH.size > len(raw):
            raise InvalidRequest("input 'encoded' ends in the middle of a length")
        (length,) = _LENGTH.unpack_from(raw, start)
        start += _LENGTH.size
        if start + length > len(raw):
            raise InvalidRequest(f"input 'encoded' ends in the middle of an element of {length} bytes")
        yield bytes(raw[start : start + length])
        start += length


def _from_base64(data: Sequence[Any]) -> Iterator[bytes]:
    """JSON has no place for bytes."""
    for i, each in enumerate(data):
        try:
            yield b64decode(each, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"input 'encoded', element {i}: in JSON a picture is a string of base64; or send it with the binary "
                "tensor data extension"
            ) from error


def _expect(tensor: InputTensor, datatype: str) -> None:
    if tensor.datatype != datatype:
        raise InvalidRequest(f"input {tensor.name!r} is {tensor.datatype[:100]}; expected {datatype}")
