import base64
import textwrap
import zlib
from contextlib import suppress
from io import BytesIO, StringIO
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageCms, ImageOps

from pvt_client import ImageUnreadable
from pvt_client.images import upload
from pvt_client.pixels import encode_png
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


# The orientation as a LONG, which EXIF does not allow.
LONG_ORIENTATION = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x04\0\0\0\x01\0\0\0\x06\0\0\0\0"


COLOURS = Image.fromarray(np.stack([RAMP * 255, RAMP.T.reshape(48, 64) * 255, 255 - RAMP * 255], -1).astype(np.uint8))
ALPHA = Image.fromarray((255 - RAMP[::-1] * 255).astype(np.uint8))
DEEP: dict[str, tuple[Any, int]] = {
    "I": (np.int32, 10**9),
    "F": (np.float32, 7),
    "I;16": (np.uint16, 60_000),
    "I;16B": (">u2", 60_000),
}


def in_mode(mode: str) -> Image.Image:
    if mode in DEEP:
        dtype, white = DEEP[mode]
        return Image.fromarray((RAMP * white).astype(dtype))
    if mode == "LAB":
        return Image.merge("LAB", COLOURS.split())
    if mode in {"LA", "La", "RGBA", "RGBa", "PA"}:
        opaque = COLOURS.quantize(16) if mode == "PA" else COLOURS.convert("L" if mode[0] == "L" else "RGB")
        opaque = opaque.convert("PA") if mode == "PA" else opaque
        opaque.putalpha(ALPHA)
        return opaque.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    return COLOURS.quantize(16) if mode == "P" else COLOURS.convert(mode)


MODES = ["1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", *DEEP]
LOSSY = ("JPEG", "AVIF", "HEIF", "MPO", "CMYK", "TIFF of YCbCr")
# Of an image that is no longer that of its file Pillow has forgotten what its numbers mean.
FORGOTTEN = (
    "TIFF of 12 bits",
    "TIFF of uint32",
    "TIFF of int8",
    "TIFF of uint16, w",
    "TIFF of int32, w",
    "TIFF of float32, w",
)
WRITTEN: dict[str, dict[str, Any]] = {each: {} for each in ("PNG", "TIFF", "GIF", "BMP", "AVIF", "HEIF", "MPO")}
WRITTEN |= {"WebP": {"lossless": True}, "JPEG": {"quality": 95}}


def in_every_mode_and_format() -> dict[str, bytes]:
    """A file for each mode in each format that Pillow writes it in."""
    files = {}
    for mode, (kind, options) in product(MODES, WRITTEN.items()):
        if (kind, mode) in {("HEIF", "La"), ("HEIF", "RGBa")}:  # no decoder reads what is written
            continue
        with suppress(OSError, ValueError, KeyError, DeprecationWarning):
            files[f"{kind} of {mode}"] = of_file(in_mode(mode), kind, **options)
    return files


def of_several(kind: str, **options: Any) -> bytes:
    others = [ImageOps.invert(COLOURS), ALPHA.convert("RGB")]
    return of_file(COLOURS, kind, save_all=True, append_images=others, **options)


def of_numbers(values: Any, **options: Any) -> bytes:
    tifffile.imwrite(buffer := BytesIO(), values, **options)
    return buffer.getvalue()


def of_twelve_bits(values: Any) -> bytes:
    """Rows of two values in three bytes, written as bytes and then called what they are."""
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
    buffer = BytesIO(of_numbers(np.packbits(bits.reshape(len(values), -1), axis=1)))
    with tifffile.TiffFile(buffer, mode="r+") as file:
        file.pages.first.tags[256].overwrite(values.shape[1])
        file.pages.first.tags[258].overwrite(12)
    return buffer.getvalue()


def with_chunk_behind_the_pixels(png: bytes, name: bytes, data: bytes) -> bytes:
    chunk = len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)
    return png[:-12] + chunk + png[-12:]


FILES = {
    **in_every_mode_and_format(),
    "I;16 of 12 bits": of_file(Image.fromarray((RAMP * 4095).astype(np.uint16)), "PNG"),
    "I, negative": of_file(Image.fromarray((RAMP * 600 - 300).astype(np.int32)), "TIFF"),
    "F of any range": of_file(Image.fromarray((RAMP * 7 - 3).astype(np.float32)), "TIFF"),
    "F with NaN": of_file(Image.fromarray(np.where(RAMP > 0.7, np.nan, RAMP).astype(np.float32)), "TIFF"),
    "TIFF of 12 bits": of_twelve_bits((RAMP * 4095).astype(np.uint16)),
    "TIFF of uint32": of_numbers((RAMP * 4e9).astype(np.uint32)),
    "TIFF of int16": of_numbers((RAMP * 900 - 400).astype(np.int16)),
    "TIFF of int8": of_numbers((RAMP * 200 - 100).astype(np.int8)),
    "TIFF of float64": of_numbers(RAMP * 7 - 3),
    "TIFF of uint16, white as zero": of_numbers((RAMP * 65535).astype(np.uint16), photometric="miniswhite"),
    "TIFF of int32, white as zero": of_numbers((RAMP * 10**9).astype(np.int32), photometric="miniswhite"),
    "TIFF of float32, white as zero": of_numbers(RAMP.astype(np.float32), photometric="miniswhite"),
    "TIFF of uint16, big-endian": of_numbers((RAMP * 60_000).astype(">u2"), byteorder=">"),
    "palette with a transparent colour": of_file(COLOURS.quantize(16), "GIF", transparency=3),
    "palette with transparent colours": of_file(COLOURS.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "a transparent colour": of_file(COLOURS, "PNG", transparency=COLOURS.getpixel((5, 5))),
    "a transparent grey": of_file(ALPHA, "PNG", transparency=200),
    "a transparent black": of_file(COLOURS.convert("1"), "PNG", transparency=0),
    "a transparent deep grey": of_file(Image.new("I;16", (64, 48), 5000), "PNG", transparency=5000),
    "animated GIF": of_several("GIF"),
    "animated PNG": of_several("PNG"),
    "animated WebP": of_several("WebP", lossless=True),
    "TIFF of several pages": of_several("TIFF"),
    "MPO of several": of_several("MPO", quality=95),
    **{f"PNG turned by {n}": of_file(COLOURS, "PNG", exif=oriented(n)) for n in range(1, 9)},
    "PNG turned at its end": with_chunk_behind_the_pixels(of_file(COLOURS, "PNG"), b"eXIf", oriented(6).tobytes()[6:]),
    "JPEG turned": of_file(COLOURS, "JPEG", exif=oriented(6), quality=95),
    "JPEG turned by XMP": of_file(COLOURS, "JPEG", xmp=b'<rdf tiff:Orientation="6"/>', quality=95),
    "JPEG turned by a number of another type": of_file(COLOURS, "JPEG", exif=LONG_ORIENTATION, quality=95),
    "JPEG with a broken EXIF block": of_file(COLOURS, "JPEG", exif=b"Exif\0\0II*\0\xff\xff", quality=95),
    "MPO turned": of_several("MPO", exif=oriented(6), quality=95),
    "WebP turned": of_file(COLOURS, "WebP", exif=oriented(8), lossless=True),
    "AVIF turned": of_file(COLOURS, "AVIF", exif=oriented(6)),
    "HEIF turned": of_file(COLOURS, "HEIF", exif=oriented(6)),
    "TIFF turned": of_file(COLOURS, "TIFF", tiffinfo={0x0112: 6}),
    "TIFF of numbers, turned": of_file(in_mode("F"), "TIFF", tiffinfo={0x0112: 6}),
    "CMYK JPEG turned": of_file(COLOURS.convert("CMYK"), "JPEG", exif=oriented(3), quality=95),
    "PNG with a profile and text": of_file(COLOURS, "PNG", icc_profile=ImageCms.ImageCmsProfile(
        ImageCms.createProfile("sRGB")).tobytes(), exif=oriented(1)),
}  # fmt: skip


def test_the_files_are_of_every_mode_and_format() -> None:
    assert {Image.open(BytesIO(FILES[f"TIFF of {mode}"])).mode for mode in MODES if f"TIFF of {mode}" in FILES} >= {
        "1", "L", "P", "PA", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16", "I;16B"}  # fmt: skip
    assert {name.partition(" ")[0] for name in FILES} >= {*WRITTEN}
    assert len(in_every_mode_and_format()) >= 90


@pytest.mark.parametrize(
    ("name", "state"),
    [(name, state) for name, state in product(FILES, ["opened", "loaded", "copied", "closed"])
     if state != "copied" or not name.startswith(FORGOTTEN)],
)  # fmt: skip
def test_a_pil_image_gets_the_answer_that_its_file_gets(name: str, state: str) -> None:
    with Image.open(BytesIO(FILES[name])) as image:
        if state != "opened":
            image.load()
        sent = image.copy() if state == "copied" else image
        data = b"" if state == "closed" else upload(sent).data
    data = data or upload(image).data

    allowed = 4 if name.startswith(LOSSY) else 1
    assert np.abs(served(data).astype(int) - served(FILES[name])).max() <= allowed


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WebP", "TIFF", "MPO"])
def test_of_several_frames_the_current_one_is_sent(kind: str) -> None:
    options = {"lossless": True} if kind == "WebP" else {}
    with Image.open(BytesIO(of_several(kind, **options))) as image:
        image.seek(1)
        sent, frame = upload(image).data, of_file(image.convert("RGB"), "PNG")

    assert np.abs(served(sent).astype(int) - served(frame)).max() <= 1
    assert np.abs(served(sent).astype(int) - served(of_file(COLOURS, "PNG"))).max() > 100


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "LAB", "RGB"])
def test_an_image_that_is_turned_by_its_own_exif_block_is_turned_in_every_mode(mode: str) -> None:
    """As one that was opened from a photo and then converted has it."""
    (image := in_mode(mode)).info["exif"] = oriented(6).tobytes()
    upright = in_mode(mode).transpose(Image.Transpose.ROTATE_270)

    assert np.abs(served(upload(image).data).astype(int) - served(upload(upright).data)).mean() < 1


def test_an_image_whose_pixels_are_gone_is_unreadable(digits: Path) -> None:
    with Image.open(digits / "one.png") as never_loaded:
        pass
    (closed := Image.open(digits / "one.png")).close()

    for image in (never_loaded, closed, Image.new("RGB", (0, 0))):
        with pytest.raises(ImageUnreadable):
            upload(image)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WebP"])
def test_nothing_else_of_a_file_is_sent(kind: str) -> None:
    (exif := oriented(6))[0x010E] = "a secret place"
    options = {"exif": exif, "xmp": b"a secret place", "icc_profile": b"a secret place"}
    if kind == "TIFF":
        options = {"tiffinfo": {33723: b"a secret place", 700: b"a secret place", 270: "a secret place"}}
    for mode in ("RGB", "L", "F", "LAB") if kind == "TIFF" else ("RGB", "L"):
        written = of_file(in_mode(mode), kind, **options)
        assert b"a secret place" in written
        with Image.open(BytesIO(written)) as image:
            assert b"a secret place" not in upload(image).data


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
        (np.full((4, 4, 3), 200.0), r"from 200 to 200 is .* from 0 to 1; pass array.round\(\).astype\(numpy.uint8\)"),
        (np.full((4, 4, 3), -1.5, np.float32), "undo a normalisation"),
        (np.full((4, 4), np.nan), "it has NaN or infinities"),
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


class Foreign:
    """An array of another library, which numpy can read."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.array, dtype)


class Asynchronous:
    """As an upload of FastAPI."""

    async def read(self) -> bytes:
        return b""


GREY = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("image", "same"),
    [
        (GREY > 100, ((GREY > 100) * 255).astype(np.uint8)),
        (torch.from_numpy(GREY > 100), ((GREY > 100) * 255).astype(np.uint8)),
        (COLOUR[:, :, 0], np.ascontiguousarray(COLOUR[:, :, 0])),
        (np.asfortranarray(COLOUR), COLOUR),
        (COLOUR[::-1, ::2, ::-1], COLOUR[::-1, ::2, ::-1].copy()),
        ((GREY.astype(">u2")) * 257, GREY.astype(np.uint16) * 257),
        ((COLOUR / 255).astype(">f4"), COLOUR),
        (Foreign(COLOUR), COLOUR),
        (Foreign((COLOUR / 255).astype(np.float32)), COLOUR),
    ],
)  # fmt: skip
def test_arrays_of_every_kind_are_the_same_image(image: Any, same: Any) -> None:
    assert upload(image).data == upload(same).data


def test_encoded_bytes_of_every_kind_are_sent_as_they_are(digits: Path) -> None:
    data = (digits / "one.png").read_bytes()
    text = base64.b64encode(data).decode()
    urls = [text, "\n".join(textwrap.wrap(text, 76)), text.rstrip("="), quote(text),
            text.replace("+", "-").replace("/", "_")]  # fmt: skip
    forms: list[Any] = [data, bytearray(data), memoryview(data), memoryview(bytearray(data))[:], BytesIO(data)]

    for form in (*forms, *(f"data:image/png;base64,{each}" for each in urls)):
        assert upload(form) == (None, data)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros((4, 4, 3), np.int64), r"int64 \(4, 4, 3\) from 0 to 0 .*pass array.astype\(numpy.uint8\) or, if"),
        (np.full((4, 4), 300, np.uint32), r"pass array.astype\(numpy.uint16\)$"),
        (np.full((4, 4), 70_000), "scale it to uint8 or uint16"),
        (np.full((4, 4), -1), "its values are negative"),
        (np.full((4, 4), np.inf), "NaN or infinities"),
        (np.full((4, 4), 1e9), "divide by what is white"),
        (np.zeros((4, 4), complex), "an array of complex128"),
        (np.zeros((4, 4), "M8[s]"), r"datetime64\[s\] .* convert it to uint8"),
        (np.zeros((0, 4), np.uint8), "it has no pixels"),
        (np.zeros((4, 0, 3)), "it has no pixels"),
        (np.ma.masked_less(GREY, 9), r"it has masked values; pass array.filled\(value\)"),
        ("", "an empty path is no file"),
        (np.zeros(4, np.uint8), "one array for each image"),
        (np.uint8(3), "one array for each image"),
        (np.array(["a.png", "b.png"]), r"a list of images; pass list\(array\)"),
        (Foreign(np.array(["a.png", "b.png"], object)), r"a list of images; pass list\(array\)"),
        (torch.zeros(8, 8, 3), r"pass tensor.numpy\(\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"pass array.astype\(numpy.uint8\)"),
        (torch.zeros(3, 8, 8, device="meta"), "the tensor: "),
        ((n for n in "ab"), "generator is not one image: pass a list, or pass it to predict_many"),
        ({1, 2}, "set is not one image"),
        ([b"a"], "a list in a list is not one image: pass one list, and pixels as numpy.array"),
        (np.zeros((9, 9, 2), np.uint8), "of grey with alpha pass a PIL image of mode LA"),
        (object(), "object is not an image: pass a path"),
        (StringIO("text"), "open it with 'rb'"),
        (Asynchronous(), "await file.read"),
        ("ftp://example.org/a.jpg", "that is a URL"),
        ("S3://bucket/a.jpg", "that is a URL"),
        ("file:///a.jpg", "that is a URL; pass its path"),
        ("data:image/png;base64,%%%", "the data URL: its base64 is not valid"),
        ("data:image/svg+xml,<svg/>", "a data URL without base64"),
        ("iVBORw0KGgo" * 400, r"iVBO[^.]{96}\.{3} \(4400 characters\): .*; if that is .* base64, pass base64.b64d"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_by_name(wrong: Any, words: str) -> None:
    with pytest.raises(ImageUnreadable, match=words) as caught:
        upload(wrong)
    assert len(str(caught.value)) < 400


def test_a_file_that_was_read_before_is_refused_with_what_to_do(digits: Path) -> None:
    with (digits / "one.png").open("rb") as file:
        upload(file)
        with pytest.raises(ImageUnreadable, match=r"one\.png was read to its end before; seek\(0\)"):
            upload(file)


def test_an_error_of_any_decoder_is_one_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageUnreadable, match="exceeds limit"):
        upload(LazyPillow(BytesIO(FILES["PNG of RGB"])))


class LazyPillow:
    """A file that is opened, by Pillow, when it is read."""

    def __init__(self, file: BytesIO) -> None:
        self.file = file

    def read(self) -> bytes:
        return Image.open(self.file).tobytes()
