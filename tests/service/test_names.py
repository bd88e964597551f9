import pytest

from service.architecture.variants import VARIANTS
from service.names import meant

MODELS = [*VARIANTS, "pvt_v2_b0.digits", *(f"{name}.in1k" for name in VARIANTS)]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("b2", "pvt_v2_b2"),
        ("B2", "pvt_v2_b2"),
        ("b2_li", "pvt_v2_b2_li"),
        ("b2-li", "pvt_v2_b2_li"),
        ("digits", "pvt_v2_b0.digits"),
        ("b0.digits", "pvt_v2_b0.digits"),
        ("PVT_V2_B0.digits", "pvt_v2_b0.digits"),
        ("pvt-v2-b2", "pvt_v2_b2"),
        ("pvtv2b2", "pvt_v2_b2"),
        ("pvt_v2_b2_in1k", "pvt_v2_b2.in1k"),
        ("OpenGVLab/pvt_v2_b2", "pvt_v2_b2"),
        ("pvt_v2_b2_linear", "pvt_v2_b2_li"),
        ("pvt_v2_b0.digist", "pvt_v2_b0.digits"),
    ],
)
def test_a_model_is_found_by_a_part_of_its_name_or_another_spelling(name: str, near: str) -> None:
    assert meant(name, MODELS) == f"; did you mean {near!r}?"


@pytest.mark.parametrize("name", ["", "resnet50", "?", "x" * 100_000, "[]"])
def test_a_name_that_resembles_none_has_no_nearest(name: str) -> None:
    assert meant(name, MODELS) == ""
