from io import BytesIO
from typing import Any

import numpy as np
import orjson
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from app.encodings import NPY, NPZ, SAFETENSORS, encode, json_bytes, json_chunks
from service.errors import InvalidRequest

ARRAYS: dict[str, NDArray[Any]] = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((2, 1), np.float16)}


def test_npz_and_safetensors_hold_every_array() -> None:
    npz = dict(np.load(BytesIO(encode(ARRAYS, NPZ, {}))))
    tensors = safetensors.numpy.load(encode(ARRAYS, SAFETENSORS, {"model": "m"}))

    for given in (npz, tensors):
        assert given.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert given[name].dtype == array.dtype
            np.testing.assert_array_equal(given[name], array)


def test_npy_holds_one() -> None:
    np.testing.assert_array_equal(np.load(BytesIO(encode({"a": ARRAYS["a"]}, NPY, {}))), ARRAYS["a"])
    with pytest.raises(InvalidRequest, match="holds one array, and a, b were requested"):
        encode(ARRAYS, NPY, {})


@pytest.mark.parametrize("size", [0, 1, 20_000, 20_001, 45_000])
def test_numbers_of_a_flat_array_survive_json(size: int) -> None:
    array = np.random.default_rng(0).standard_normal(size).astype(np.float32)

    value = {"a": [], "b": {}, "data": [{"x": array, "shape": (size,)}, "é\n", None]}

    told = orjson.loads(b"".join(json_chunks(value)))

    assert told == orjson.loads(json_bytes(value))
    np.testing.assert_array_equal(np.float32(told["data"][0]["x"]), array)


def test_axes_become_nested_lists() -> None:
    assert orjson.loads(json_bytes({"a": ARRAYS["a"]})) == {"a": [[0, 1, 2], [3, 4, 5]]}
