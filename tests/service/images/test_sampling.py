"""Every way of resizing that a card can name, against the library's own answer; the bounds are in levels of 255."""

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from service.errors import ImageTooLarge, InvalidImage
from service.images.decoding import decode
from service.images.geometry import Geometry
from tests.service.images.test_decoding_scaled import photo

Pixels = NDArray[np.uint8]
PHOTOS = [Image.fromarray(each) for each in load_sample_images().images]
SIZES = [
    (640, 427), (427, 640), (611, 409), (853, 1280), (1023, 300), (225, 300), (448, 448), (224, 224), (50, 37),
    (37, 50), (112, 672), (1, 1),
]  # fmt: skip
CV = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
    "area": cv2.INTER_AREA,
}
TORCHVISION = {
    "nearest": InterpolationMode.NEAREST,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
    "area": InterpolationMode.BOX,
}


@cache
def images() -> list[Image.Image]:
    return [PHOTOS[i % 2].resize(size, Image.Resampling.BICUBIC) for i, size in enumerate(SIZES)]


def ours(image: Image.Image, geometry: Geometry, kind: str = "BMP", **options: Any) -> Pixels:
    image.save(buffer := io.BytesIO(), kind, **options)
    return decode(buffer.getvalue(), geometry, max_pixels=10**8).pixels


def geometry(height: int = 224, width: int = 224, **changes: Any) -> Geometry:
    return Geometry(**{"height": height, "width": width, "crop": 1.0, "interpolation": "bilinear", **changes})


def check(theirs: Callable[[Image.Image], Any], wanted: Geometry, *, most: int, mean: float) -> None:
    for image in images():
        mine, other = ours(image, wanted), np.asarray(theirs(image))
        assert mine.shape == other.shape
        difference = np.abs(mine.astype(int) - other)
        assert difference.max() <= most, image.size
        assert difference.mean() <= mean, image.size


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def channels_last(pixels: torch.Tensor) -> Pixels:
    array: Pixels = pixels.permute(1, 2, 0).numpy()
    return array


@pytest.mark.parametrize("interpolation", CV)
@pytest.mark.parametrize("size", [(224, 224), (96, 160), (512, 448)], ids=str)
def test_opencvs_resize(interpolation: str, size: tuple[int, int]) -> None:
    def theirs(image: Image.Image) -> Pixels:
        return cv2.resize(np.asarray(image), size[::-1], interpolation=CV[interpolation])  # type: ignore[return-value]

    stretched = geometry(*size, resize="stretch", interpolation=interpolation, kernel="opencv", antialias=False)
    check(theirs, stretched, most=0 if interpolation == "nearest" else 1, mean=0.3)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [None, 1.0, 0.875])
@pytest.mark.parametrize("resize", [transforms.Resize, v2.Resize])
def test_torchvisions_resize_of_tensors_without_antialiasing(
    interpolation: str, crop: float | None, resize: Any
) -> None:
    side = (224, 224) if crop is None else int(224 / crop)
    steps = [resize(side, TORCHVISION[interpolation], antialias=False), transforms.CenterCrop(224)]
    wanted = geometry(
        resize="stretch" if crop is None else "shorter_side_crop", crop=crop or 1.0, interpolation=interpolation,
        antialias=False,
    )  # fmt: skip
    # v2 computes bicubic in integers of 8 bits, and clips what overshoots between the two passes.
    clipped = 16 if resize is v2.Resize and interpolation == "bicubic" else 1
    theirs = transforms.Compose([tensor, *steps, channels_last])
    check(theirs, wanted, most=0 if interpolation == "nearest" else clipped, mean=0.5)


@pytest.mark.parametrize("interpolation", TORCHVISION)
@pytest.mark.parametrize("crop", [None, 0.875])
def test_torchvisions_resize_of_pillow_images(interpolation: str, crop: float | None) -> None:
    side = (224, 224) if crop is None else int(224 / crop)
    steps = [transforms.Resize(side, TORCHVISION[interpolation]), transforms.CenterCrop(224)]
    wanted = geometry(
        resize="stretch" if crop is None else "shorter_side_crop", crop=crop or 1.0, interpolation=interpolation
    )
    most = {"nearest": 0, "bilinear": 2, "bicubic": 6, "lanczos": 6, "area": 1}[interpolation]
    check(transforms.Compose(steps), wanted, most=most, mean=0.4)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_torchvisions_resize_of_tensors_with_antialiasing(interpolation: str) -> None:
    steps = [tensor, v2.Resize(256, TORCHVISION[interpolation], antialias=True), v2.CenterCrop(224), channels_last]
    check(transforms.Compose(steps), geometry(crop=0.875, interpolation=interpolation), most=6, mean=0.2)


def test_torchvisions_nearest_exact_is_pillows_nearest() -> None:
    """But for a pixel or a row on the border of two, where the arithmetic of float32 decides."""
    steps = [tensor, v2.Resize((224, 224), InterpolationMode.NEAREST_EXACT), channels_last]
    for image in images():
        mine, theirs = (
            ours(image, geometry(resize="stretch", interpolation="nearest")),
            transforms.Compose(steps)(image),
        )
        rows, columns = ((mine != theirs).all(axis=axis).any(axis=-1).sum() for axis in (1, 0))
        assert rows + columns <= 2, image.size


@pytest.mark.parametrize("size", [(224, 224), (225, 300), (64, 96), (640, 480)], ids=str)
def test_torchvisions_center_crop_alone(size: tuple[int, int]) -> None:
    check(transforms.CenterCrop(size), geometry(*size, resize="center_crop"), most=0, mean=0)


def ultralytics(image: Image.Image, height: int, width: int, fill: tuple[int, int, int]) -> Pixels:
    """The arithmetic of `LetterBox` in ultralytics/data/augment.py, with OpenCV's own resize and border."""
    pixels = np.asarray(image)
    ratio = min(height / pixels.shape[0], width / pixels.shape[1])
    across, down = max(1, round(pixels.shape[1] * ratio)), max(1, round(pixels.shape[0] * ratio))
    x, y = (width - across) / 2, (height - down) / 2
    pixels = cv2.resize(pixels, (across, down), interpolation=cv2.INTER_LINEAR)
    sides = round(y - 0.1), round(y + 0.1), round(x - 0.1), round(x + 0.1)
    return cv2.copyMakeBorder(pixels, *sides, cv2.BORDER_CONSTANT, value=fill)  # type: ignore[return-value]


@pytest.mark.parametrize("size", [(224, 224), (192, 320), (321, 192)], ids=str)
def test_a_letterbox_is_ultralytics(size: tuple[int, int]) -> None:
    fill = (114, 30, 220)
    wanted = geometry(*size, resize="letterbox", fill=fill, kernel="opencv", antialias=False)
    check(lambda image: ultralytics(image, *size, fill), wanted, most=1, mean=0.2)


def test_a_letterbox_of_pillow_is_its_pad() -> None:
    """`ImageOps.pad` puts the greater half of an odd border on the other side, so only even ones are compared."""
    for image in images():
        contained = ImageOps.contain(image, (224, 224), Image.Resampling.BICUBIC)
        mine = ours(image, geometry(resize="letterbox", fill=(9, 8, 7), interpolation="bicubic"))
        if (contained.width - contained.height) % 2 == 0:
            theirs = ImageOps.pad(image, (224, 224), Image.Resampling.BICUBIC, color=(9, 8, 7))
            assert np.abs(mine.astype(int) - np.asarray(theirs)).max() <= 6, image.size


def test_none_takes_an_image_of_the_inputs_size_and_refuses_others_with_both_sizes() -> None:
    image = PHOTOS[0].crop((0, 0, 96, 64))
    assert np.array_equal(ours(image, geometry(64, 96, resize="none")), np.asarray(image))

    with pytest.raises(InvalidImage, match=r"640x427 and the model takes 96x64"):
        ours(PHOTOS[0], geometry(64, 96, resize="none"))
    for kind in ("TIFF", "JPEG"):
        (exif := Image.Exif())[0x0112] = 6  # on its side
        with pytest.raises(InvalidImage, match=r"64x96 and the model takes 96x64"):
            ours(image, geometry(64, 96, resize="none"), kind, exif=exif)


WAYS: list[dict[str, Any]] = [
    {"resize": "stretch", "interpolation": "nearest"},
    {"resize": "stretch", "interpolation": "area"},
    *({"resize": "stretch", "interpolation": each, "kernel": "opencv", "antialias": False} for each in CV),
    {"crop": 0.875, "interpolation": "nearest", "antialias": False},
    {"crop": 0.875, "interpolation": "bicubic", "antialias": False},
    {"resize": "letterbox", "fill": (1, 2, 3)},
    {"resize": "letterbox", "fill": (1, 2, 3), "interpolation": "nearest"},
    {"resize": "center_crop"},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("size", [(611, 409), (560, 448), (151, 90)], ids=str)
def test_a_turned_file_gives_what_its_upright_image_gives(way: dict[str, Any], size: tuple[int, int]) -> None:
    image = PHOTOS[1].resize(size, Image.Resampling.BICUBIC)
    for orientation in range(1, 9):
        (exif := Image.Exif())[0x0112] = orientation
        image.save(buffer := io.BytesIO(), "PNG", exif=exif, compress_level=1)
        upright = ImageOps.exif_transpose(Image.open(buffer))
        mine = decode(buffer.getvalue(), geometry(160, 224, **way), max_pixels=10**7)
        difference = np.abs(mine.pixels.astype(int) - ours(upright, geometry(160, 224, **way)))
        assert difference.max() <= (2 if geometry(**way).filtered else 1), orientation
        assert (mine.width, mine.height) == upright.size


@pytest.mark.parametrize("interpolation", CV)
def test_a_large_image_is_sampled_in_strips_as_in_one(interpolation: str) -> None:
    image = photo(2500, 1700)
    theirs = cv2.resize(np.asarray(image), (224, 192), interpolation=CV[interpolation])
    wanted = geometry(192, 224, resize="stretch", interpolation=interpolation, kernel="opencv", antialias=False)

    assert np.abs(ours(image, wanted).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("way", [way for way in WAYS if not geometry(**way).filtered], ids=str)
def test_no_jpeg_of_reduced_size_is_read_where_single_pixels_count(way: dict[str, Any]) -> None:
    photo(1600, 1200).save(buffer := io.BytesIO(), "JPEG", quality=90)
    scaled, full = (
        decode(buffer.getvalue(), geometry(**way), max_pixels=10**7, scaled_jpeg=on) for on in (True, False)
    )

    assert np.array_equal(scaled.pixels, full.pixels)


def test_a_progressive_jpeg_that_is_only_read_at_half_its_sides_is_refused_where_single_pixels_count() -> None:
    Image.new("RGB", (5000, 4000)).save(buffer := io.BytesIO(), "JPEG", progressive=True)

    with pytest.raises(ImageTooLarge, match="5000x4000 pixels is read at half its sides"):
        decode(buffer.getvalue(), geometry(antialias=False), max_pixels=10**8)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "P"])
def test_grey_and_transparent_images_are_resized_as_people_see_them(way: dict[str, Any], mode: str) -> None:
    image = PHOTOS[0].resize((333, 250)).convert("L" if mode == "I;16" else mode)
    seen = image.convert("RGB")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    elif mode == "RGBA":
        image.putalpha(mask := Image.linear_gradient("L").resize(image.size))
        (seen := Image.new("RGB", image.size, "white")).paste(image, mask=mask)
    difference = np.abs(ours(image, geometry(**way), "PNG").astype(int) - ours(seen, geometry(**way)))

    assert difference.max() <= (2 if geometry(**way).filtered else 0)
