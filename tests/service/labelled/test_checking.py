"""Every way to resize and to compute pixels that a card can say is tried."""

from typing import get_args

import pytest

from service.images.geometry import Interpolation, Kernel, Resize
from service.labelled.checking import _others, _resizes
from service.store.cards import Preprocessing

CARDS = [
    Preprocessing(height=64, width=64, crop=0.9),
    Preprocessing(height=64, width=64, resize="stretch"),
    Preprocessing(height=64, width=64, resize="letterbox", fill=(1, 2, 3), kernel="opencv", antialias=False),
]


@pytest.mark.parametrize("own", CARDS)
def test_every_resize_is_tried_and_a_letterbox_in_both_usual_colours(own: Preprocessing) -> None:
    tried = _resizes(own)

    assert {each.resize for each in tried} | {own.resize} == {*get_args(Resize)}
    assert {each.fill for each in tried if each.resize == "letterbox"} == {(114, 114, 114), (0, 0, 0)}
    assert own not in tried
    assert len(tried) == len({str(each.geometry) for each in tried})


@pytest.mark.parametrize("own", CARDS)
def test_pixels_are_computed_in_every_other_way_of_the_same_crop(own: Preprocessing) -> None:
    tried = _others(own)

    assert {each.interpolation for each in [own, *tried]} >= {*get_args(Interpolation)} - {"lanczos"}
    assert {each.kernel for each in [own, *tried]} == {*get_args(Kernel)}
    assert {(each.resize, each.crop, each.fill) for each in tried} == {(own.resize, own.crop, own.fill)}
