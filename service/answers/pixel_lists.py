"""Lists of pixels in JSON to arrays, piece by piece.

A JSON parser holds the interpreter's lock for a whole call, here a second for the largest body, in which the event loop
stands still, whichever thread it runs on. Between two pieces it has its turn.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import InvalidRequest

_PIECE_BYTES = 65_536
_BLANKS = bytes.maketrans(b"[]", b"  ")
_DIGITS = b"0123456789-,[] \t\r\n"
_MOST = 255  # of uint8


def pixel_numbers(text: bytes, shape: Sequence[int]) -> NDArray[np.uint8]:
    """The numbers in `text`, a JSON list, flat or nested as `shape` is, of as many numbers as it says; flat.

    Raises:
        InvalidRequest: it is something else; the message says what was expected.
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
        cut = text.find(b",", start + _PIECE_BYTES)
        end = cut if cut >= 0 else len(text)
        piece = _piece(text[start:end])
        pixels[filled : filled + len(piece)] = piece
        filled, start = filled + len(piece), end + 1
    return pixels


def _piece(text: bytes) -> NDArray[np.uint8]:
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
