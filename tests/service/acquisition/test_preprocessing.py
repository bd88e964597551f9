"""Each library's preprocessing, held against that library's own code; and what people say of theirs."""

import io
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms
from torchvision.transforms._presets import ImageClassification
from transformers import PvtImageProcessor
from transformers.models.pvt.image_processing_pil_pvt import PvtImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from service.acquisition.preprocessing import (
    LIKE,
    PRESETS,
    PreprocessingOptions,
    describe,
    preprocessing,
    read_preprocessor,
)
from service.architecture.variants import VARIANTS, Dialect
from service.errors import InvalidRequest
from service.images.decoding import decode
from service.images.geometry import Geometry
from service.store.cards import Preprocessing

Pixels = NDArray[np.uint8]
Library = Callable[[Image.Image], Any]
PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]
SIZES = [
    (640, 427), (427, 640), (611, 409), (333, 500), (1280, 853), (853, 1280), (1023, 300), (300, 1023), (225, 300),
    (249, 249), (248, 248), (224, 224), (50, 37), (37, 50), (1, 1),
]  # fmt: skip


def of_timm(variant: str = "pvt_v2_b0", **changes: Any) -> Library:
    """What timm makes of an image for its model, before normalisation."""
    with torch.device("meta"):
        config = timm.data.resolve_model_data_config(timm.create_model(variant))
    return channels_last(timm.data.create_transform(**{**config, **changes}, normalize=False))


def of_the_authors(side: int = 224) -> Library:
    """`build_transform` of the release's `classification/datasets.py`, for evaluation, before normalisation."""
    size = int((256 / 224) * side)
    steps = [transforms.Resize(size, interpolation=3), transforms.CenterCrop(side), transforms.PILToTensor()]
    return channels_last(transforms.Compose(steps))


def of_the_hub(processor: Any, **changes: Any) -> Library:
    """What transformers makes of an image, before normalisation."""
    made = processor(**changes, do_rescale=False, do_normalize=False)
    return channels_last(lambda image: made(image, return_tensors="pt")["pixel_values"][0])


def channels_last(transform: Callable[[Image.Image], Any]) -> Library:
    return lambda image: transform(image).permute(1, 2, 0).numpy()


@cache
def images() -> list[Image.Image]:
    return [photo.resize(size, Image.Resampling.BICUBIC) for photo in PHOTOS for size in SIZES]


def ours(image: Image.Image, geometry: Geometry) -> Pixels:
    image.save(buffer := io.BytesIO(), "BMP")
    return decode(buffer.getvalue(), geometry, max_pixels=10**7).pixels


def apart(library: Library, geometry: Geometry) -> Iterator[NDArray[np.float64]]:
    for image in images():
        theirs, mine = library(image), ours(image, geometry)
        assert theirs.shape == mine.shape
        yield np.abs(theirs.astype(np.float64) - mine)


LIBRARIES: dict[str, tuple[Dialect, Callable[[], Library]]] = {
    "timm": ("timm", of_timm),
    "the authors": ("official", of_the_authors),
    "transformers": ("transformers", lambda: of_the_hub(PvtImageProcessor)),
    "transformers on Pillow": ("transformers", lambda: of_the_hub(PvtImageProcessorPil)),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_each_preset_gives_what_its_library_gives(name: str) -> None:
    """In levels of 255. A resize of one pixel more or less is 7 off on average, and up to 200."""
    dialect, library = LIBRARIES[name]

    for difference in apart(library(), PRESETS[dialect].geometry):
        assert difference.mean() < 0.2
        assert difference.max() <= 6
        assert (difference > 1).mean() < 0.0005


def test_a_resize_of_one_pixel_more_would_be_noticed() -> None:
    geometry = Geometry(224, 224, 0.9, "bicubic", rounding="nearest")

    assert max(difference.mean() for difference in apart(of_timm(), geometry)) > 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_wants_the_same_of_all_variants(variant: str) -> None:
    with torch.device("meta"):
        config = timm.data.resolve_model_data_config(timm.create_model(variant))
    preset = PRESETS["timm"]

    assert (config["input_size"], config["crop_pct"], config["crop_mode"]) == ((3, 224, 224), preset.crop, "center")
    assert (config["interpolation"], config["mean"], config["std"]) == (preset.interpolation, preset.mean, preset.std)


@pytest.mark.parametrize("size", [(256, 256), (320, 320), (288, 288), (256, 384), (96, 64)])
def test_another_input_size_is_what_timm_makes_of_it(size: tuple[int, int]) -> None:
    pixels = preprocessing(PreprocessingOptions(height=size[0], width=size[1]), PRESETS["timm"])

    for difference in apart(of_timm(input_size=(3, *size)), pixels.geometry):
        assert difference.mean() < 0.25
        assert difference.max() <= 8


def test_every_side_is_rounded_as_its_library_does() -> None:
    for side in range(32, 4097, 32):
        crop = timm.data.create_transform((3, side, side), crop_pct=0.9, interpolation="bicubic")
        assert PRESETS["timm"].geometry.resized(side) == crop.transforms[0].size
        assert PRESETS["official"].geometry.resized(side) == int((256 / 224) * side)
        assert PRESETS["lucid"].geometry.resized(side) == round(side / 0.9)


def test_transformers_processor_has_the_presets_numbers() -> None:
    preset, processor = PRESETS["transformers"], PvtImageProcessorPil()

    assert (processor.size["height"], processor.size["width"]) == (preset.height, preset.width)
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (preset.mean, preset.std)
    assert processor.resample == Image.Resampling.BICUBIC


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resample": 0},
        {"resample": 1},
        {"resample": 2},
        {"resample": 4},
        {"size": {"height": 128, "width": 192}},
        {"size": {"height": 96, "width": 96}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]},
    ],
    ids=str,
)
def test_a_repositorys_processor_is_read_as_transformers_reads_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    PvtImageProcessorPil(**changes).save_pretrained(tmp_path)
    pixels = read_preprocessor(tmp_path / "preprocessor_config.json")
    theirs = channels_last(
        lambda image: PvtImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    )

    for image in images()[:8]:
        mine = (ours(image, pixels.geometry) / 255 - np.array(pixels.mean)) / np.array(pixels.std)
        assert np.abs(theirs(image) - mine).mean() * 255 * min(pixels.std) < 0.3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"resample": 5}, "resample: Input should be 0, 1, 2, 3 or 4"),
        ({"do_pad": True}, "do_pad is true"),
        ({"size": {"shortest_edge": 224}}, "it does not resize to one height and width"),
        ({"size": 256, "do_center_crop": True, "crop_size": 224}, "it does not resize to one height and width"),
        ({"rescale_factor": 1e-4}, "must be of pixels scaled to 0..1"),
        ({"rescale_factor": 0}, "rescale_factor: Input should be greater than 0"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 224}, "ConvNextImageProcessor is another"),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224}, "CLIPFeatureExtractor is another"),
        ({"image_processor_type": 7}, "7 is another image processor"),
        ({"image_std": [0, 0, 0]}, "std.0: Input should be greater than 0"),
        ([], "valid dictionary"),
    ],
    ids=str,
)
def test_a_processor_that_no_card_can_express_is_refused_by_name(tmp_path: Path, content: object, message: str) -> None:
    (path := tmp_path / "preprocessor_config.json").write_text(json.dumps(content))

    with pytest.raises(InvalidRequest, match=message):
        read_preprocessor(path)


def test_a_broken_processor_is_reported(tmp_path: Path) -> None:
    (path := tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InvalidRequest, match="no JSON"):
        read_preprocessor(path)


@pytest.mark.parametrize(
    "content",
    [
        {"size": 128},
        {"size": [96, 128]},
        {"size": {"height": 96, "width": 128}, "image_mean": None, "do_normalize": False, "do_center_crop": None},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
        {"do_rescale": False, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        {"rescale_factor": 1 / 256},
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "PvtImageProcessorFast"},
    ],
    ids=str,
)
def test_each_form_that_transformers_knows_is_read_as_it_reads_it(tmp_path: Path, content: dict[str, Any]) -> None:
    (path := tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    pixels = read_preprocessor(path)
    processor = PvtImageProcessorPil.from_pretrained(tmp_path)
    theirs = channels_last(lambda image: processor(image, return_tensors="pt")["pixel_values"][0].double())

    for image in images()[:4]:
        mine = (ours(image, pixels.geometry) / 255 - np.array(pixels.mean)) / np.array(pixels.std)
        assert np.abs(theirs(image) - mine).mean() * 255 * min(pixels.std) < 0.3


def test_a_vit_processor_is_read_with_its_own_defaults(tmp_path: Path) -> None:
    (path := tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "ViTFeatureExtractor"})
    )
    pixels, processor = read_preprocessor(path), ViTImageProcessorPil()

    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (pixels.mean, pixels.std)
    assert (processor.size["height"], processor.size["width"]) == (pixels.height, pixels.width)
    assert processor.resample == Image.Resampling[pixels.interpolation.upper()]


def test_a_processor_that_does_not_rescale_has_its_numbers_in_levels(tmp_path: Path) -> None:
    content = {"do_rescale": False, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}
    (path := tmp_path / "preprocessor_config.json").write_text(json.dumps(content))

    pixels = read_preprocessor(path)

    assert pixels.mean == pytest.approx((0.485, 0.456, 0.406))
    assert pixels.std == pytest.approx((0.229, 0.224, 0.225))


@settings(max_examples=200, deadline=None)
@given(side=st.integers(32, 512), more=st.integers(0, 300))
def test_a_shorter_side_in_pixels_is_kept_to_the_pixel(side: int, more: int) -> None:
    pixels = preprocessing(PreprocessingOptions(height=side, width=side, shorter_side=side + more), PRESETS["timm"])

    assert pixels.geometry.resized(side) == side + more


def test_what_is_given_takes_the_place_of_the_presets() -> None:
    hub, timms = PRESETS["transformers"], PRESETS["timm"]

    assert preprocessing(PreprocessingOptions(), hub) == hub
    assert preprocessing(PreprocessingOptions(crop=0.9), hub) == timms
    assert preprocessing(PreprocessingOptions(resize="stretch"), timms) == hub
    assert preprocessing(PreprocessingOptions(crop=0.9), PRESETS["lucid"]) == timms
    assert preprocessing(PreprocessingOptions(shorter_side=232), timms).geometry.resized(224) == 232
    assert describe(timms).startswith("shorter side to 248, bicubic, centre crop 224x224")
    assert describe(hub).startswith("stretched to 224x224")


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("mean", "std", "kept"),
    [
        (*IMAGENET, IMAGENET),
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), IMAGENET),
        ((127.5,) * 3, (127.5,) * 3, ((0.5,) * 3, (0.5,) * 3)),
        ((0.0,) * 3, (1.0,) * 3, ((0.0,) * 3, (1.0,) * 3)),
        ((0.0,) * 3, (255.0,) * 3, ((0.0,) * 3, (1.0,) * 3)),
        ((0.0, 116.28, 103.53), (57.12,) * 3, ((0.0, 0.456, 0.406), (0.224,) * 3)),
        ((123.675, 116.28, 103.53), (1.0,) * 3, (IMAGENET[0], (1 / 255,) * 3)),
    ],
)
def test_mean_and_std_of_either_scale_come_out_in_one(mean: Any, std: Any, kept: Any) -> None:
    pixels = preprocessing(PreprocessingOptions(mean=mean, std=std), PRESETS["timm"])

    assert pixels.mean == pytest.approx(kept[0])
    assert pixels.std == pytest.approx(kept[1])


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((123.675, 116.28, 103.53), None, "mean 123.675 116.28 103.53 is of pixels from 0 to 255, std"),
        (None, (58.395, 57.12, 57.375), "std 58.395 57.12 57.375 of pixels from 0 to 255"),
        ((0.485, 116.28, 103.53), None, "mean 0.485 116.28 103.53: some are"),
        (None, (0.5, 57.0, 57.0), "std 0.5 57 57: some are"),
        ((300.0, 1.0, 1.0), None, "mean 300 1 1: each must be a number"),
        ((float("nan"),) * 3, None, "mean nan nan nan: each must be a number"),
        (None, (float("inf"),) * 3, "std inf inf inf: each must be a number"),
        ((-0.5,) * 3, None, "mean.0: Input should be greater than or equal to 0"),
        (None, (-0.5,) * 3, "std.0: Input should be greater than 0"),
        (None, (0.0,) * 3, "std.0: Input should be greater than 0"),
    ],
)
def test_mean_and_std_that_can_not_both_be_meant_are_refused_by_name(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        preprocessing(PreprocessingOptions(mean=mean, std=std), PRESETS["timm"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PreprocessingOptions(resize="stretch", crop=0.9), "a stretch has no crop"),
        (PreprocessingOptions(resize="letterbox", shorter_side=256), "a letterbox has no crop"),
        (PreprocessingOptions(resize="letterbox"), "give --fill 114 114 114, as Ultralytics"),
        (
            PreprocessingOptions(resize="letterbox", fill=(0, 256, 0)),
            "fill.1: Input should be less than or equal to 255",
        ),
        (PreprocessingOptions(fill=(0, 0, 0)), "fill is the colour around a letterbox"),
        (PreprocessingOptions(interpolation="lanczos", antialias=False), "no lanczos without antialiasing"),
        (PreprocessingOptions(interpolation="area", antialias=False), "no area without antialiasing"),
        (PreprocessingOptions(kernel="opencv", antialias=True), "OpenCV does not antialias"),
        (PreprocessingOptions(shorter_side=256, crop=0.9), "say the same thing"),
        (PreprocessingOptions(shorter_side=200), "at least its 224 pixels"),
        (PreprocessingOptions(height=256, width=384, shorter_side=400), "square input"),
        (PreprocessingOptions(height=0, width=0, shorter_side=256), "square input, and of at least"),
        (PreprocessingOptions(height=-1, width=-1, shorter_side=0), "square input, and of at least"),
        (PreprocessingOptions(crop=0.0), "crop: Input should be greater than 0"),
        (PreprocessingOptions(crop=1.5), "crop: Input should be less than or equal to 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: PreprocessingOptions, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        preprocessing(options, PRESETS["timm"])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_stretch_takes_the_whole_of_any_image(interpolation: Literal["bilinear", "bicubic"]) -> None:
    geometry = Preprocessing(height=64, width=96, resize="stretch", interpolation=interpolation).geometry

    for image in images():
        wanted = np.asarray(image.resize((96, 64), Image.Resampling[interpolation.upper()]))
        assert np.abs(ours(image, geometry).astype(int) - wanted).mean() < 0.3


def test_like_torchvision_is_its_own_preset() -> None:
    preset, pixels = ImageClassification(crop_size=224), LIKE["torchvision"]

    assert (preset.crop_size, preset.resize_size) == ([pixels.height], [pixels.geometry.resized(224)])
    assert (preset.interpolation.value, preset.antialias) == (pixels.interpolation, pixels.antialias)
    assert (tuple(preset.mean), tuple(preset.std)) == (pixels.mean, pixels.std)
    preset.mean, preset.std = [0.0] * 3, [1.0] * 3
    library = channels_last(lambda image: 255 * preset(image))
    for difference in apart(library, pixels.geometry):
        assert difference.max() <= 2.01


def test_like_timm_and_transformers_are_the_presets_of_their_checkpoints() -> None:
    assert (LIKE["timm"], LIKE["transformers"]) == (PRESETS["timm"], PRESETS["transformers"])


def test_like_opencv_is_cv2_resize_by_default() -> None:
    for difference in apart(lambda image: cv2.resize(np.asarray(image), (224, 224)), LIKE["opencv"].geometry):
        assert difference.max() <= 1


def test_single_options_override_a_library() -> None:
    bgr = preprocessing(PreprocessingOptions(colours="bgr", interpolation="area"), LIKE["opencv"])

    assert (bgr.kernel, bgr.interpolation, bgr.antialias, bgr.colours) == ("opencv", "area", False, "bgr")
    assert describe(bgr).startswith("stretched to 224x224, area of OpenCV, channels in the order blue, green, red")
    assert not preprocessing(PreprocessingOptions(kernel="opencv"), LIKE["torchvision"]).antialias
    boxed = preprocessing(PreprocessingOptions(resize="letterbox", fill=(114, 114, 114)), LIKE["timm"])
    assert describe(boxed).startswith("fitted into 224x224 on the colour 114 114 114, bicubic, mean")
