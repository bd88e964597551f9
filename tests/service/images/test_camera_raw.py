"""Camera raw files as their makers lay them out, written by tifffile: the large preview, or a refusal."""

import io
import struct
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from sklearn.datasets import load_sample_images

from service.errors import InvalidImage
from service.images.decoding import Decoded, Geometry, decode

PHOTO = Image.fromarray(load_sample_images().images[0]).resize((1200, 800))
GEOMETRY = Geometry(64, 64, 0.9, "bicubic")
CFA = 32803
FORMS = {1: "B", 3: "H", 4: "I"}
Entry = tuple[int, int, tuple[int, ...]]
THUMBNAIL = np.full((120, 160, 3), 200, np.uint8)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), "JPEG", quality=95, **options)
    return buffer.getvalue()


def raw_file(*previews: bytes, orientation: int = 1, order: str = "<", dng: bool = False) -> bytes:
    """As NEF and DNG: a thumbnail first; the sensor's image and the previews in directories of their own below it."""
    data = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))

    def put(block: bytes) -> int:
        data.extend(block)
        return len(data) - len(block)

    def directory(width: int, height: int, compression: int, photometric: int, block: bytes, *more: Entry) -> int:
        own: list[Entry] = [(256, 4, (width,)), (257, 4, (height,)), (258, 3, (8,)), (259, 3, (compression,)),
               (262, 3, (photometric,)), (273, 4, (put(block),)), (279, 4, (len(block),))]  # fmt: skip
        entries = sorted([*own, *more])
        packed = b""
        for tag, kind, values in entries:
            body = struct.pack(f"{order}{len(values)}{FORMS[kind]}", *values)
            body = struct.pack(f"{order}I", put(body)) if len(body) > 4 else body.ljust(4, b"\0")
            packed += struct.pack(f"{order}HHI", tag, kind, len(values)) + body
        return put(struct.pack(f"{order}H", len(entries)) + packed + bytes(4))

    inside = [directory(4000, 3000, 1, CFA, bytes(100))]
    inside += [directory(1, 1, 7, 6, each) for each in previews]
    version: list[Entry] = [(50706, 1, (1, 4, 0, 0))] if dng else []
    turn, below = (274, 3, (orientation,)), (330, 4, tuple(inside))
    first = directory(160, 120, 1, 2, THUMBNAIL.tobytes(), (277, 3, (3,)), turn, below, *version)
    data[4:8] = struct.pack(f"{order}I", first)
    return bytes(data)


def opened(data: bytes) -> Decoded:
    return decode(data, GEOMETRY, max_pixels=2 * 10**6)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dng", [False, True])
def test_the_largest_preview_is_the_image(order: str, dng: bool) -> None:
    small, large = jpeg(PHOTO.resize((300, 200))), jpeg(PHOTO)
    found, expected = opened(raw_file(small, large, order=order, dng=dng)), opened(large)

    assert (found.width, found.height) == PHOTO.size
    assert np.array_equal(found.pixels, expected.pixels)


def test_a_preview_is_turned_as_the_raw_file_says_unless_it_says_so_itself() -> None:
    (exif := Image.Exif())[0x0112] = 6
    plain, own = jpeg(PHOTO), jpeg(PHOTO, exif=exif)

    for data in (raw_file(plain, orientation=6), raw_file(own, orientation=6), raw_file(own)):
        assert np.array_equal(opened(data).pixels, opened(own).pixels)
        assert opened(data).height == PHOTO.width


@pytest.mark.parametrize("previews", [[], [jpeg(PHOTO.resize((570, 375)))], [jpeg(PHOTO)[:100]]])
def test_without_a_large_preview_it_is_refused_with_what_to_send(previews: list[bytes]) -> None:
    with pytest.raises(InvalidImage, match="; send a rendered image"):
        opened(raw_file(*previews))


def test_a_refusal_names_what_was_found() -> None:
    with pytest.raises(InvalidImage, match=r"camera raw without a preview\); send a rendered image"):
        opened(raw_file())
    with pytest.raises(InvalidImage, match=r"camera raw whose largest preview has 213750 pixels\); send a rendered"):
        opened(raw_file(jpeg(PHOTO.resize((570, 375)))))


def test_a_canons_first_directory_is_its_preview() -> None:
    """CR2: marked behind the header; the first directory is a JPEG with the old compression."""
    large = jpeg(PHOTO)
    entries = ((256, 3, 1, 1200), (257, 3, 1, 800), (259, 3, 1, 6), (273, 4, 1, 16), (279, 4, 1, len(large)))
    at = 16 + len(large)
    directory = len(entries).to_bytes(2, "little") + b"".join(
        tag.to_bytes(2, "little")
        + kind.to_bytes(2, "little")
        + count.to_bytes(4, "little")
        + value.to_bytes(4, "little")
        for tag, kind, count, value in entries
    )
    data = b"II*\0" + at.to_bytes(4, "little") + b"CR\x02\0" + bytes(4) + large + directory + bytes(4)

    assert np.array_equal(opened(data).pixels, opened(large).pixels)


def test_a_cut_preview_is_refused() -> None:
    data = raw_file(jpeg(PHOTO))

    for share in (0.3, 0.6, 0.9):
        with pytest.raises(InvalidImage):
            opened(data[: int(len(data) * share)])


def test_a_tiff_of_a_scan_with_smaller_copies_is_no_raw_file() -> None:
    with tifffile.TiffWriter(buffer := io.BytesIO()) as file:
        file.write(np.asarray(PHOTO), photometric="rgb", subifds=1)
        file.write(np.asarray(PHOTO.resize((600, 400))), photometric="rgb", subfiletype=1)

    assert (opened(buffer.getvalue()).width, opened(buffer.getvalue()).height) == PHOTO.size


def test_directories_that_lead_back_to_themselves_end() -> None:
    data = raw_file(jpeg(PHOTO))
    at = data.index(struct.pack("<HHI", 330, 4, 2)) + 8
    (inside,) = struct.unpack_from("<I", data, at)
    itself = data[:inside] + data[4:8] * 2 + data[inside + 8 :]

    assert opened(itself).pixels.mean() == 200  # nothing is left that says what it is but the image itself
    with pytest.raises(InvalidImage):
        opened(raw_file(jpeg(PHOTO), dng=True).replace(data[inside : inside + 8], data[4:8] * 2))
