import pytest
from pydantic import BaseModel, ValidationError

from app.queries import ExplainQuery, FeaturesQuery, PredictQuery


@pytest.mark.parametrize(
    ("query", "given", "told"),
    [
        (PredictQuery, {"top_k": "0"}, "must be from 1 to 1000"),
        (PredictQuery, {"top_k": "1001"}, "must be from 1 to 1000"),
        (PredictQuery, {"timeout_ms": "0"}, "must be from 1 to 3600000"),
        (ExplainQuery, {"class_id": "-1"}, "must be at least 0"),
        (ExplainQuery, {"alpha": "1.5"}, "must be from 0 to 1"),
        (ExplainQuery, {"alpha": "x"}, "Input should be a valid number"),
        (FeaturesQuery, {"stages": "9"}, "must be different numbers from 1 to 4"),
        (FeaturesQuery, {"stage": "1"}, "Extra inputs are not permitted"),
    ],
)
def test_a_number_out_of_range_is_told_the_range(query: type[BaseModel], given: dict[str, str], told: str) -> None:
    with pytest.raises(ValidationError) as raised:
        query.model_validate(given)

    (error,) = raised.value.errors()
    assert told in error["msg"]


def test_a_size_is_a_side_or_height_and_width() -> None:
    sizes = [PredictQuery.model_validate(given).input_size for given in ({}, {"size": "224"}, {"size": "256x384"})]

    assert sizes == [None, (224, 224), (256, 384)]


def test_the_range_is_in_the_schema_too() -> None:
    schema = PredictQuery.model_json_schema()["properties"]["top_k"]

    assert (schema["minimum"], schema["maximum"]) == (1, 1000)
