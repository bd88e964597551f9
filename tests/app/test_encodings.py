from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import orjson
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from app.encodings import NPY, NPZ, SAFETENSORS, Stack, chunks, encode, json_bytes, json_pieces
from service.errors import InvalidRequest

ARRAYS: dict[str, NDArray[Any]] = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((2, 1), np.float16)}


def stacks(*names: str) -> dict[str, Stack]:
    return {name: Stack.of(len(ARRAYS[name]), ARRAYS[name].__getitem__) for name in names}


def test_npz_and_safetensors_hold_every_array() -> None:
    npz = dict(np.load(BytesIO(b"".join(encode(stacks("a", "b"), NPZ, {})))))
    tensors = safetensors.numpy.load(b"".join(encode(stacks("a", "b"), SAFETENSORS, {"model": "m"})))

    for given in (npz, tensors):
        assert given.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert given[name].dtype == array.dtype
            np.testing.assert_array_equal(given[name], array)


def test_npy_holds_one() -> None:
    np.testing.assert_array_equal(np.load(BytesIO(b"".join(encode(stacks("a"), NPY, {})))), ARRAYS["a"])
    with pytest.raises(InvalidRequest, match="holds one array, and a, b were requested"):
        encode(stacks("a", "b"), NPY, {})


@pytest.mark.parametrize("size", [0, 1, 20_000, 20_001, 45_000])
def test_numbers_of_a_flat_array_survive_json(size: int) -> None:
    array = np.random.default_rng(0).standard_normal(size).astype(np.float32)

    value = {"a": [], "b": {}, "data": [{"x": array, "shape": (size,)}, "é\n", None]}

    told = orjson.loads(b"".join(json_pieces(value)))

    assert told == orjson.loads(json_bytes(value))
    np.testing.assert_array_equal(np.float32(told["data"][0]["x"]), array)


def test_axes_become_nested_lists() -> None:
    assert orjson.loads(json_bytes({"a": ARRAYS["a"]})) == {"a": [[0, 1, 2], [3, 4, 5]]}


def test_what_an_iterator_yields_is_encoded_when_its_turn_comes() -> None:
    made: list[int] = []

    def entries() -> Iterator[dict[str, int]]:
        for i in range(3):
            made.append(i)
            yield {"i": i}

    parts = chunks(json_pieces({"results": entries(), "none": iter([])}), size=15)
    first = next(parts)

    assert made == [0]
    assert orjson.loads(first + b"".join(parts)) == {"results": [{"i": 0}, {"i": 1}, {"i": 2}], "none": []}


def test_a_stack_is_a_flat_list_in_json() -> None:
    assert orjson.loads(b"".join(json_pieces({"data": stacks("a")["a"]}))) == {"data": [0, 1, 2, 3, 4, 5]}


def test_an_archive_is_made_piece_by_piece() -> None:
    array = np.arange(10**6, dtype=np.float32).reshape(10, -1)
    pieces = [*encode({"a": Stack.of(10, array.__getitem__)}, NPZ, {})]

    assert max(map(len, pieces)) <= 500_000
    np.testing.assert_array_equal(np.load(BytesIO(b"".join(pieces)))["a"], array)
