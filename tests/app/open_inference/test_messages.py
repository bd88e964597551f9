import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.open_inference.messages import parse
from service.errors import InvalidRequest

INPUT = {"name": "images", "datatype": "UINT8", "shape": [1]}


def message(**input_: Any) -> dict[str, Any]:
    return {"inputs": [INPUT | input_]}


NESTED = st.recursive(
    st.lists(st.integers(0, 255), min_size=1), lambda inner: st.lists(inner, min_size=1), max_leaves=9
)


@given(data=NESTED, id_=st.text(max_size=20), indent=st.sampled_from([None, 1]), first=st.booleans())
def test_numbers_are_cut_out_of_the_json_wherever_they_stand(
    data: Any, id_: str, indent: int | None, first: bool
) -> None:
    input_ = {"data": data, **INPUT} if first else {**INPUT, "data": data, "parameters": {}}
    body = json.dumps({"id": id_, "inputs": [input_], "parameters": {}}, indent=indent, ensure_ascii=False).encode()

    request, tensor = parse(body, None)

    assert (request.id, tensor.shape, tensor.raw) == (id_, (1,), None)
    assert tensor.numbers is not None
    assert json.loads(tensor.numbers) == data


@pytest.mark.parametrize("id_", ['"data":[1,2]', 'a\\"data": [1', "data", '"data"', "\\"])
def test_what_looks_like_data_in_a_string_is_left_there(id_: str) -> None:
    request, tensor = parse(json.dumps({"id": id_, **message(data=[1, 2])}).encode(), None)

    assert (request.id, tensor.numbers) == (id_, b"[1, 2]")


@pytest.mark.parametrize("data", [[], ["a"], [[]], [None, 1], ["1", 2]])
def test_what_is_no_list_of_numbers_is_left_to_the_parser(data: list[Any]) -> None:
    _, tensor = parse(json.dumps(message(data=data)).encode(), None)

    assert (tensor.numbers, tensor.data) == (None, data or ())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1],"data":[1],"data":[2]}]}', "has data twice"),
        (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1]}],"data":[1]}', "data: Extra inputs"),
        (
            b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1],"parameters":{"data":[1]}}]}',
            "must have either",
        ),
        (b'{"inputs":[{"data":[1', "data has no end"),
        (b'{"inputs":[{"data":' + b"[" * 1_000_000, "depth limit exceeded"),
        (b'{"inputs":[{"data":' + b" " * 1_000_000, "the body is no JSON"),
        (b'{"inputs":["' + b'\\"data"' * 100_000, "the body is no JSON"),
    ],
)
def test_data_in_the_wrong_place_is_told(body: bytes, told: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse(body, None)

    assert told in str(raised.value)


def test_bytes_behind_the_json_are_not_copied() -> None:
    head = json.dumps(message(parameters={"binary_data_size": 3})).encode()
    body = head + b"abc"

    _, tensor = parse(body, str(len(head)))

    assert tensor.raw is not None
    assert (bytes(tensor.raw), tensor.raw.obj) == (b"abc", body)
    assert tensor.raw.obj is body
