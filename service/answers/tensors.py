"""Tensors of the Open Inference Protocol v2: from bytes or JSON lists to images, and from a model's answer to both.

Source: the REST part of the protocol (kserve.github.io), and its extensions for binary tensor data and classification
in Triton's documentation.
"""

import binascii
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import prod
from struct import Struct
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from service.answers.encodings import json_array, little_endian
from service.answers.pixel_lists import pixel_numbers
from service.architecture.variants import VARIANTS
from service.errors import InvalidRequest
from service.postprocess.classes import softmax
from service.results import ImageResult, InferenceResult, require_all
from service.store.cards import ModelCard

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
    """A tensor as it came: `raw` bytes of the body, or from JSON the text of a list of `numbers`, or any other list."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: memoryview | None = None
    numbers: bytes | None = None
    data: Sequence[Any] = ()


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


def images(tensor: InputTensor, most: int) -> tuple[list[bytes | NDArray[np.uint8]], tuple[int, int] | None]:
    """The pictures in `tensor`, `most` of them at the most, and their input size: None where they are encoded.

    Raises:
        InvalidRequest: it is none of the tensors that a model takes; the message says what was expected.
    """
    if tensor.name == "images":
        pixels = _pixels(tensor, most)
        return list(pixels), (pixels.shape[1], pixels.shape[2])
    if tensor.name == "encoded":
        return _encoded(tensor, most), None
    raise InvalidRequest(f"input {tensor.name[:100]!r}: a model takes 'images' or 'encoded'")


def output(answered: InferenceResult, name: str, classification: int | None) -> OutputTensor:
    """The tensor `name` of all pictures; with `classification`, its so many highest values as `value:index:label`.

    Raises:
        InvalidRequest: there is no such tensor, or it has no classes.
        ServiceError: a picture failed; the message says which.
    """
    results = require_all(answered.results, [None] * len(answered.results))
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


def _element(result: ImageResult, name: str) -> NDArray[np.float32]:
    if name in STAGES:
        return result.outputs.stages[STAGES.index(name)]
    if name == "embedding":
        return result.outputs.embedding
    return softmax(result.outputs.logits) if name == "probabilities" else result.outputs.logits


def _pixels(tensor: InputTensor, most: int) -> NDArray[np.uint8]:
    shape = tensor.shape
    _expect(tensor, "UINT8")
    if len(shape) != 4 or shape[-1] != 3 or min(shape) < 1:  # noqa: PLR2004  n, height, width, channels
        raise InvalidRequest(
            f"input 'images' has the shape {list(shape)}; expected [n, height, width, 3], n at least 1"
        )
    _expect_count(tensor, most)
    if tensor.raw is not None:
        flat = np.frombuffer(tensor.raw, np.uint8)
    else:
        flat = pixel_numbers(tensor.numbers, shape) if tensor.numbers else _no_numbers(tensor.data)
    if len(flat) != (count := prod(shape)):
        raise InvalidRequest(f"input 'images' has {len(flat)} elements; its shape {list(shape)} says {count}")
    return flat.reshape(shape)


def _no_numbers(data: Sequence[Any]) -> NDArray[np.uint8]:
    if data:
        raise InvalidRequest("input 'images': its data must be whole numbers from 0 to 255")
    return np.zeros(0, np.uint8)


def _encoded(tensor: InputTensor, most: int) -> list[bytes | NDArray[np.uint8]]:
    shape = tensor.shape
    _expect(tensor, "BYTES")
    if not shape or min(shape) < 1 or any(side != 1 for side in shape[1:]):
        raise InvalidRequest(f"input 'encoded' has the shape {list(shape)}; expected [n], n at least 1")
    _expect_count(tensor, most)
    if tensor.numbers:
        raise _not_base64(0)
    given = _from_base64(tensor.data) if tensor.raw is None else _elements(tensor.raw)
    elements: list[bytes | NDArray[np.uint8]] = [*islice(given, shape[0] + 1)]  # not the million that may be there
    if len(elements) != shape[0]:
        told = f"{len(elements)}" if len(elements) < shape[0] else "more"
        raise InvalidRequest(f"input 'encoded' has {told} elements; its shape {list(shape)} says {shape[0]}")
    return elements


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
            raise _not_base64(i) from error


def _not_base64(index: int) -> InvalidRequest:
    return InvalidRequest(
        f"input 'encoded', element {index}: in JSON a picture is a string of base64; or send it with the binary tensor "
        "data extension"
    )


def _expect(tensor: InputTensor, datatype: str) -> None:
    if tensor.datatype != datatype:
        raise InvalidRequest(f"input {tensor.name!r} is {tensor.datatype[:100]}; expected {datatype}")


def _expect_count(tensor: InputTensor, most: int) -> None:
    if tensor.shape[0] > most:
        raise InvalidRequest(
            f"input {tensor.name!r} holds {tensor.shape[0]} images; PVT_MAX_IMAGES allows {most} in one request"
        )
