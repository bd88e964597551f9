"""Safetensors to arrays: the length of the header, the header as JSON, then the arrays' bytes, little-endian.

The one binary form of the service that tells the model too. Reading it takes no more than numpy.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from pvt_client.answers import Floats

MEDIA_TYPE = "application/vnd.safetensors"
_LENGTH = 8  # bytes of the header's length
_TYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


def read(body: bytes) -> tuple[dict[str, Floats], Mapping[str, str]]:
    """The arrays by name, and what is told with them.

    Raises:
        LookupError, TypeError, ValueError: `body` is cut off, or no such file.
    """
    start = _LENGTH + int.from_bytes(body[:_LENGTH], "little")
    header: dict[str, Any] = json.loads(body[_LENGTH:start])
    told: Mapping[str, str] = header.pop("__metadata__", {})
    return {name: _array(memoryview(body)[start:], **entry) for name, entry in header.items()}, told


def _array(data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> Floats:
    begin, end = data_offsets
    array: Floats = np.frombuffer(data[begin:end], _TYPES[dtype]).reshape(shape)
    return array.copy()  # whose owner may change it, and which keeps no other array's bytes
