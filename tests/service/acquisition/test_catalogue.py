"""The catalogue and the labels that come with it."""

import re
from typing import get_args

import pytest
import torch

from service.acquisition.catalogue import (
    CATALOGUE,
    CLASSES,
    SourceName,
    imagenet_classes,
    imagenet_labels,
    published,
)
from service.architecture.pvt_v2 import create
from service.architecture.variants import VARIANTS
from service.errors import InvalidRequest, ModelNotFound


def test_every_variant_is_published() -> None:
    assert list(CATALOGUE) == list(VARIANTS)
    for row in CATALOGUE.values():
        assert set(row.files) == set(get_args(SourceName)) - ({"lucid"} if row.variant == "pvt_v2_b2_li" else set())


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_variant(variant: str) -> None:
    with torch.device("meta"):
        model = create(variant, num_classes=CLASSES)

    assert CATALOGUE[variant].parameters == sum(parameter.numel() for parameter in model.parameters())


def test_sources_have_the_public_urls() -> None:
    hub, github = "https://huggingface.co", "https://github.com/whai362/PVT/releases/download/v2"
    li = {source: file.urls[0] for source, file in CATALOGUE["pvt_v2_b2_li"].files.items()}

    assert li == {
        "timm": f"{hub}/timm/pvt_v2_b2_li.in1k/resolve/main/model.safetensors",
        "opengvlab": f"{hub}/OpenGVLab/pvt_v2_b2_linear/resolve/main/model.safetensors",
        "official": f"{github}/pvt_v2_b2_li.pth",
    }
    lucid = CATALOGUE["pvt_v2_b5"].file("lucid")
    assert lucid.urls == (f"{hub}/lucid-dl/pvt-v2-b5/resolve/main/IN1K/model.safetensors",)


def test_published_digests_are_sha256_and_all_different() -> None:
    digests = [row.files["lucid"].sha256 for row in CATALOGUE.values() if "lucid" in row.files]

    assert len({*digests}) == 6
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest or "") for digest in digests)


@pytest.mark.parametrize("name", ["b2", "pvt_v2_b2", "pvt_v2_b2.in1k"])
def test_a_published_model_has_three_names(name: str) -> None:
    assert published(name).id == "pvt_v2_b2.in1k"


@pytest.mark.parametrize("name", ["b7", "pvt_v2_b2.mine", "", "../b2"])
def test_what_is_not_published_is_not_found_and_what_is_is_named(name: str) -> None:
    with pytest.raises(ModelNotFound, match=r"there are: pvt_v2_b0, .*pvt_v2_b5"):
        published(name)


def test_a_source_without_the_variant_names_those_that_have_it() -> None:
    with pytest.raises(InvalidRequest, match="lucid has no pvt_v2_b2_li; these have: timm, opengvlab, official"):
        CATALOGUE["pvt_v2_b2_li"].file("lucid")


def test_labels_are_in_the_order_of_the_checkpoints() -> None:
    classes = imagenet_classes()

    assert len(classes) == len({synset for synset, _ in classes}) == CLASSES
    assert [synset for synset, _ in classes] == sorted(synset for synset, _ in classes)
    assert classes[0] == ("n01440764", "tench, Tinca tinca")
    assert classes[999] == ("n15075141", "toilet tissue, toilet paper, bathroom tissue")
    assert imagenet_labels()[281] == "tabby, tabby cat"
