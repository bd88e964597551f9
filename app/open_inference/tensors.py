"""Tensors of the Open Inference Protocol v2: from bytes or JSON lists to images, and from a model's outputs to both.

Source: the REST part of the protocol (kserve.github.io), and its extensions for binary tensor data and classification
in Triton's documentation.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from struct import Struct
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from app.data_urls import from_base64
from app.encodings import Stack
from app.problems import TooManyImages
from service.architecture.variants import VARIANTS
from service.errors import InvalidImage, InvalidRequest
from service.postprocess import scores
from service.results import Image, ImageResult, InferenceResult, Size, require_all
from service.store.cards import ModelCard

Datatype = Literal["UINT8", "BYTES", "FP32"]
_LENGTH = Struct("<I")  # in front of each element of a BYTES tensor
STAGES = ("stage1", "stage2", "stage3", "stage4")
VECTORS = ("probabilities", "logits", "embedding")
OUTPUTS = (*VECTORS, *STAGES)
# A JSON parser holds the interpreter's lock for a whole call, for the largest body a second in which the event loop
# stands still, whichever thread calls it. So pixels are parsed in chunks.
_CHUNK_BYTES = 65_536
_BLANKS = bytes.maketrans(b"[]", b"  ")
_DIGITS = b"0123456789-,[] \t\r\n"
_MOST = 255  # of uint8


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """A tensor; -1 stands for any number."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InputTensor:
    """An input: `raw` bytes of the body, or from JSON the text of a list of `numbers`, or any other list as `data`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: memoryview | None = None
    numbers: bytes | None = None
    data: Sequence[Any] = ()


def inputs_of(card: ModelCard) -> list[TensorMetadata]:
    """The inputs of the model, of which a request has one."""
    pixels = card.preprocessing
    return [
        TensorMetadata("images", "UINT8", (-1, pixels.height, pixels.width, 3)),
        TensorMetadata("encoded", "BYTES", (-1,)),
    ]


def outputs_of(card: ModelCard) -> list[TensorMetadata]:
    """The outputs of the model, in the order of OUTPUTS: without a head no logits, and probabilities only of logits.

    Where the card's activation is `none` the logits are the scores, so there are no probabilities.
    """
    channels, classes, pixels = VARIANTS[card.variant].embed_dims, len(card.labels), card.preprocessing
    of_classes = (VECTORS[:2] if card.activation != "none" else VECTORS[1:2]) if classes else ()
    shapes: dict[str, tuple[int, ...]] = {**dict.fromkeys(of_classes, (classes,)), "embedding": (channels[-1],)}
    shapes |= {name: (channels[i], pixels.height >> i + 2, pixels.width >> i + 2) for i, name in enumerate(STAGES)}
    return [TensorMetadata(name, "FP32", (-1, *shape)) for name, shape in shapes.items()]


def check_model(names: Sequence[str], card: ModelCard) -> None:
    """Raises InvalidRequest when one of `names`, which are of OUTPUTS, is no output of the model of `card`."""
    known = [output.name for output in outputs_of(card)]
    if absent := [name for name in names if name not in known]:
        why = "its scores are its logits (activation none)" if card.labels else "it has no classification head"
        raise InvalidRequest(f"output {absent[0]!r}: {card.id!r} has none, since {why}; it has {', '.join(known)}")


def images(tensor: InputTensor, most: int) -> tuple[list[Image], Size | None]:
    """The images in `tensor`, `most` of them at the most, and their input size: None where they are encoded.

    Raises InvalidRequest, which says what was expected.
    """
    if tensor.name == "images":
        pixels = _pixels(tensor, most)
        return [*pixels], (pixels.shape[1], pixels.shape[2])
    if tensor.name == "encoded":
        return [*_encoded(tensor, most)], None
    raise InvalidRequest(f"input {tensor.name[:100]!r}: a model takes 'images' or 'encoded'")


def output(
    result: InferenceResult, name: str, classification: int | None, *, binary: bool
) -> tuple[dict[str, Any], Iterable[bytes]]:
    """The tensor `name` of all images as the response's JSON has it, and its little-endian bytes if `binary`.

    The numbers of each image are made into bytes when their turn comes. With `classification` it has its so many
    highest values, as `value:index:label`. Raises InvalidRequest where it has no classes, and the error of an image
    that failed.
    """
    found = require_all(result.results, [None] * len(result.results))
    if classification is None:
        numbers = Stack.of(len(found), lambda i: _element(result.card, found[i], name))
        message = {"name": name, "datatype": "FP32", "shape": numbers.whole_shape}
        if binary:
            return {**message, "parameters": {"binary_data_size": numbers.nbytes}}, numbers.pieces()
        return {**message, "data": numbers}, ()
    if name in VECTORS[:2]:
        stack = np.stack([_element(result.card, each, name) for each in found])
        data: Any
        best = (-stack).argsort(axis=1, kind="stable")[:, :classification]
        datatype, shape, labels = "BYTES", best.shape, result.card.labels
        data = [f"{row[i]:f}:{i}:{labels[i]}" for row, order in zip(stack, best, strict=True) for i in order]
        if binary:
            data = b"".join(_LENGTH.pack(len(each)) + each for each in map(str.encode, data))
    else:
        raise InvalidRequest(f"output {name!r} has no classes; classification is for {VECTORS[0]!r} and {VECTORS[1]!r}")
    message = {"name": name, "datatype": datatype, "shape": shape}
    if binary:
        return {**message, "parameters": {"binary_data_size": len(data)}}, [data]
    return {**message, "data": data}, ()


def check_outputs(names: Sequence[str]) -> None:
    """Raises InvalidRequest when one of `names` is no output, or is repeated."""
    for i, name in enumerate(names):
        if name not in OUTPUTS:
            raise InvalidRequest(f"output {name[:100]!r}: the outputs of a model are {', '.join(OUTPUTS)}")
        if name in names[:i]:
            raise InvalidRequest(f"output {name!r} is requested twice")


def _element(card: ModelCard, result: ImageResult, name: str) -> NDArray[np.float32]:
    if name in STAGES:
        return result.outputs.stages[STAGES.index(name)]
    if name == "embedding":
        return result.outputs.embedding
    return scores(result.outputs.logits, card) if name == "probabilities" else result.outputs.logits


def _check(tensor: InputTensor, datatype: Datatype, shape: str, most: int, *, fits: bool) -> None:
    """Raises InvalidRequest where `tensor` has another type or more than `most` images, or does not fit `shape`."""
    name, actual = tensor.name, tensor.shape
    if tensor.datatype != datatype:
        raise InvalidRequest(f"input {name!r} is {tensor.datatype[:100]}; expected {datatype}")
    if not fits or min(actual) < 1:
        raise InvalidRequest(f"input {name!r} has the shape {[*actual]}; expected {shape}, n at least 1")
    if actual[0] > most:
        raise TooManyImages(f"input {name!r} holds {actual[0]} images; PVT_MAX_IMAGES allows {most} in one request")


def _pixels(tensor: InputTensor, most: int) -> NDArray[np.uint8]:
    shape = tensor.shape
    _check(tensor, "UINT8", "[n, height, width, 3]", most, fits=len(shape) == 4 and shape[-1] == 3)  # noqa: PLR2004
    if tensor.raw is not None:
        flat = np.frombuffer(tensor.raw, np.uint8)
    elif tensor.numbers:
        flat = pixel_numbers(tensor.numbers, shape)
    elif tensor.data:
        raise InvalidRequest("input 'images': its data must be whole numbers from 0 to 255")
    else:
        flat = np.zeros(0, np.uint8)
    if len(flat) != (count := prod(shape)):
        raise InvalidRequest(f"input 'images' has {len(flat)} elements; its shape {[*shape]} says {count}")
    return flat.reshape(shape)


def _encoded(tensor: InputTensor, most: int) -> list[bytes]:
    shape = tensor.shape
    _check(tensor, "BYTES", "[n]", most, fits=bool(shape) and {*shape[1:]} <= {1})
    if tensor.numbers:
        raise _not_base64(0)
    given = _from_base64(tensor.data) if tensor.raw is None else _elements(tensor.raw)
    elements = [*islice(given, shape[0] + 1)]  # not all of a million
    if len(elements) != shape[0]:
        found = len(elements) if len(elements) < shape[0] else "more"
        raise InvalidRequest(f"input 'encoded' has {found} elements; its shape {[*shape]} says {shape[0]}")
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
    for i, each in enumerate(data):
        found = from_base64(each) if isinstance(each, str) else None
        if not isinstance(found, bytes):
            raise _not_base64(i, found) from found
        yield found


def _not_base64(index: int, error: InvalidImage | None = None) -> InvalidRequest:
    return InvalidRequest(
        f"input 'encoded', element {index}: in JSON an image is a string of base64; or send it with the binary tensor "
        f"data extension{f' ({error})' if error else ''}"
    )


def pixel_numbers(text: bytes, shape: Sequence[int]) -> NDArray[np.uint8]:
    """The numbers in `text`, a JSON list, flat or nested as `shape` is, of as many numbers as it says; flat.

    Raises InvalidRequest, which says what was expected.
    """
    count, opened = prod(shape), text.count(b"[")
    nested = sum(prod(shape[:axis]) for axis in range(len(shape)))
    if opened not in {1, nested} or text.count(b"]") != opened:
        raise InvalidRequest(
            f"input 'images': its data must be a flat list, or lists nested as its shape {[*shape]} is"
        )
    found = text.count(b",") + 1
    if found != count:
        raise InvalidRequest(f"input 'images' has {found} elements; its shape {[*shape]} says {count}")
    pixels = np.empty(count, np.uint8)
    filled, start, end = 0, 0, 0
    while end < len(text):
        cut = text.find(b",", start + _CHUNK_BYTES)
        end = cut if cut >= 0 else len(text)
        chunk = _chunk(text[start:end])
        pixels[filled : filled + len(chunk)] = chunk
        filled, start = filled + len(chunk), end + 1
    return pixels


def _chunk(text: bytes) -> NDArray[np.uint8]:
    if rest := text.translate(None, _DIGITS):
        raise _wrong(f"{rest[:1].decode(errors='replace')!r} among them")
    try:
        # Brackets become blanks, so that numbers between which only brackets stand do not become one.
        numbers = orjson.loads(b"[" + text.translate(_BLANKS) + b"]")
    except orjson.JSONDecodeError as error:
        raise _wrong(str(error)) from error
    if not numbers:
        raise _wrong("a comma without a number")
    least, most = min(numbers), max(numbers)
    if least < 0 or most > _MOST:
        raise _wrong(f"values from {least} to {most}")
    return np.array(numbers, np.uint8)


def _wrong(why: str) -> InvalidRequest:
    return InvalidRequest(f"input 'images': its data must be whole numbers from 0 to 255 ({why})")
