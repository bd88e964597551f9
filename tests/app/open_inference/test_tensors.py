import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.open_inference import tensors
from app.open_inference.tensors import pixel_numbers
from service.errors import InvalidRequest


@given(
    shape=st.tuples(*[st.integers(1, 3)] * 3),
    seed=st.integers(0, 1000),
    indent=st.sampled_from([None, 0, 1]),
    chunk=st.integers(1, 30),
    nested=st.booleans(),
)
def test_a_list_cut_anywhere_gives_what_the_parser_gives(
    shape: tuple[int, ...], seed: int, indent: int | None, chunk: int, nested: bool
) -> None:
    array = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    text = json.dumps(array.tolist() if nested else array.ravel().tolist(), indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_CHUNK_BYTES", chunk)
        np.testing.assert_array_equal(pixel_numbers(text.encode(), array.shape), array.ravel())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1,2]", "has 2 elements; its shape [1, 1, 1, 3] says 3"),
        ("[1,2,3,4]", "has 4 elements"),
        ("[1,2 3,4]", "whole numbers"),
        ("[1,,3]", "whole numbers"),
        ("[1,2,]", "whole numbers"),
        ("[,,1]", "whole numbers"),
        ("[1,2,03]", "whole numbers"),
        ("[1,2,256]", "to 256)"),
        ("[1,2,-1]", "values from -1 to"),
        ("[1,2,3.0]", "'.' among them"),
        ("[1,2,1e1]", "'e' among them"),
        ("[1,2,true]", "'t' among them"),
        ("[1,2,NaN]", "'N' among them"),
        ("[[1,2,3]]", "a flat list, or lists nested"),
        ("[1,2,3", "a flat list, or lists nested"),
        ("[[[[1],[2],[3]]]]", "a flat list, or lists nested"),
        ("[[[[1][2,3,4]", "a flat list, or lists nested"),
        ("[1,2," + "9" * 400 + "]", "whole numbers"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 65_536])
def test_what_is_no_list_of_pixels_is_told(monkeypatch: pytest.MonkeyPatch, text: str, told: str, chunk: int) -> None:
    monkeypatch.setattr(tensors, "_CHUNK_BYTES", chunk)

    with pytest.raises(InvalidRequest) as raised:
        pixel_numbers(text.encode(), (1, 1, 1, 3))

    assert told in str(raised.value)


def test_numbers_between_which_only_brackets_stand_do_not_become_one() -> None:
    with pytest.raises(InvalidRequest, match="whole numbers"):
        pixel_numbers(b"[[[[1][2,3,4]]],[[5,6,7]]]", (2, 1, 1, 3))
