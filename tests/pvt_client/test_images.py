from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from pvt_client import ImageUnreadable
from pvt_client.images import encode_png, upload
from service.images.decoding import Geometry, decode


def pixels(data: bytes) -> Any:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image)


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=9)), st.sampled_from([None, 1, 3, 4]))
def test_an_array_becomes_a_png_that_pillow_reads_back(plane: Any, channels: int | None) -> None:
    array = plane if channels is None else np.stack([plane + n for n in range(channels)], axis=-1)

    assert np.array_equal(pixels(encode_png(array)), array.squeeze(2) if channels == 1 else array)


def test_an_array_that_is_a_view_keeps_its_order() -> None:
    array = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)[::-1, ::2, ::-1]

    assert np.array_equal(pixels(encode_png(array)), array)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3), np.int32), np.zeros((2, 4, 4, 3), np.uint8), np.zeros((4, 4, 2), np.uint8),
     np.zeros((0, 4), np.uint8), np.zeros(4, np.uint8)],
)  # fmt: skip
def test_an_array_that_is_not_an_image_is_refused_with_what_is_expected(array: Any) -> None:
    with pytest.raises(ImageUnreadable, match=r"uint8 \(H, W\) or \(H, W, 1 \| 3 \| 4\) is expected"):
        upload(array)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_pil_images_of_every_mode_are_sent_as_png(mode: str) -> None:
    sent = upload(Image.new(mode, (3, 2)))

    with Image.open(BytesIO(sent.data)) as image:
        assert (image.format, image.size) == ("PNG", (3, 2))
        assert image.mode == {"CMYK": "RGB", "YCbCr": "RGB"}.get(mode, mode)


def test_a_pil_image_whose_file_is_broken_is_unreadable(digits: Path) -> None:
    with Image.open(BytesIO((digits / "one.png").read_bytes()[:200])) as image, pytest.raises(ImageUnreadable):
        upload(image)


def test_paths_files_and_pil_images_keep_their_name(digits: Path) -> None:
    path = digits / "one.png"
    with path.open("rb") as file, Image.open(path) as image:
        names = [upload(each).filename for each in (path, str(path), file, image, path.read_bytes())]

    assert names == ["one.png"] * 4 + [None]


@pytest.mark.parametrize("wrong", [3, None, "missing.png", "/", "nul\0"])
def test_what_can_not_be_read_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(ImageUnreadable):
        upload(wrong)


def test_a_file_opened_as_text_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with (tmp_path / "text").open() as file, pytest.raises(ImageUnreadable, match="open it with 'rb'"):
        upload(file)  # type: ignore[arg-type]


def test_a_closed_file_is_unreadable(digits: Path) -> None:
    with (digits / "one.png").open("rb") as file:
        pass
    with pytest.raises(ImageUnreadable, match=r"one\.png"):
        upload(file)


RAMP = np.linspace(0, 1, 48 * 64).reshape(48, 64)
GEOMETRY = Geometry(32, 32, 0.9, "bicubic")


def served(data: bytes) -> Any:
    """What the service's model sees of a file."""
    return decode(data, GEOMETRY, max_pixels=10**6).pixels


def of_file(image: Image.Image, kind: str, **options: Any) -> bytes:
    image.save(buffer := BytesIO(), kind, **options)
    return buffer.getvalue()


def oriented(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


COLOURS = Image.fromarray(np.stack([RAMP * 255, RAMP.T.reshape(48, 64) * 255, 255 - RAMP * 255], -1).astype(np.uint8))
FILES = {
    "I;16": of_file(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
    "I;16 of 12 bits": of_file(Image.fromarray((RAMP * 4095).astype(np.uint16)), "PNG"),
    "I;16B": of_file(Image.fromarray((RAMP * 65535).astype(">u2")), "TIFF"),
    "I": of_file(Image.fromarray((RAMP * 10**9).astype(np.int32)), "TIFF"),
    "I, negative": of_file(Image.fromarray((RAMP * 600 - 300).astype(np.int32)), "TIFF"),
    "F": of_file(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "F of any range": of_file(Image.fromarray((RAMP * 7 - 3).astype(np.float32)), "TIFF"),
    "CMYK": of_file(COLOURS.convert("CMYK"), "TIFF"),
    "LAB": of_file(Image.merge("LAB", COLOURS.split()), "TIFF"),
    "palette with a transparent colour": of_file(COLOURS.quantize(16), "GIF", transparency=3),
    "a transparent colour": of_file(COLOURS, "PNG", transparency=COLOURS.getpixel((5, 5))),
    **{f"PNG turned by {n}": of_file(COLOURS, "PNG", exif=oriented(n)) for n in range(1, 9)},
    "JPEG turned": of_file(COLOURS, "JPEG", exif=oriented(6), quality=95),
    "WebP turned": of_file(COLOURS, "WebP", exif=oriented(8), lossless=True),
    "TIFF turned": of_file(COLOURS, "TIFF", tiffinfo={0x0112: 6}),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_pil_image_gets_the_answer_that_its_file_gets(name: str, loaded: bool) -> None:
    with Image.open(BytesIO(FILES[name])) as image:
        if loaded:
            image.load()
        sent = upload(image).data

    assert np.abs(served(sent).astype(int) - served(FILES[name])).max() <= (4 if name.startswith("JPEG") else 1)


def test_an_orientation_is_all_of_exif_that_is_sent() -> None:
    (exif := oriented(6))[0x010E] = "a description"
    with Image.open(BytesIO(of_file(COLOURS, "JPEG", exif=exif))) as image:
        sent = upload(image).data

    assert b"a description" not in sent
    with Image.open(BytesIO(sent)) as image:
        assert dict(image.getexif()) == {0x0112: 6}


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 1), (48, 64, 3), (48, 64, 4)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_from_0_to_1_are_the_same_image_in_bytes(shape: tuple[int, ...], dtype: Any) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    assert upload((array / 255).astype(dtype)).data == upload(array).data


def test_sixteen_bits_are_kept() -> None:
    grey = (RAMP * 65535).astype(np.uint16)

    assert np.array_equal(pixels(encode_png(grey)), grey)
    assert np.array_equal(pixels(encode_png(grey.astype(">u2"))), grey)


@pytest.mark.parametrize("shape", [(48, 64), (1, 48, 64), (3, 48, 64), (4, 48, 64)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_is_the_array_with_its_channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0))
    array = tensor.numpy().astype(np.uint8) * 255
    given = (tensor * 255).to(dtype) if dtype == torch.uint8 else tensor.to(dtype).requires_grad_()

    assert upload(given).data == upload(array if array.ndim == 2 else array.transpose(1, 2, 0)).data


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.full((4, 4, 3), 200.0), "from 200 to 200 is not an image: floats must be from 0 to 1"),
        (np.full((4, 4, 3), -1.5, np.float32), "undo a normalisation"),
        (np.full((4, 4), np.nan), "floats must be from 0 to 1"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"pass a batch as list\(array\), or to predict_many"),
        (np.zeros((3, 8, 8), np.uint8), r"pass array.transpose\(1, 2, 0\)"),
        (torch.zeros(2, 3, 8, 8), "pass its images one by one"),
        (torch.zeros(5), r"a tensor of shape \(5,\) is not an image"),
        ("https://example.org/a.jpg", "that is a URL; fetch it"),
        (".", r"that is a folder; pass the files in it"),
    ],
)  # fmt: skip
def test_what_is_not_sent_is_refused_with_what_to_do(wrong: Any, words: str) -> None:
    with pytest.raises(ImageUnreadable, match=words):
        upload(wrong)
