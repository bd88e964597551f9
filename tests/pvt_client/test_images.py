from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from pvt_client import ImageUnreadable
from pvt_client.images import encode_png, upload


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
    [np.zeros((4, 4, 3)), np.zeros((2, 4, 4, 3), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8),
     np.zeros(4, np.uint8)],
)  # fmt: skip
def test_an_array_that_is_not_an_image_is_refused_with_what_is_expected(array: Any) -> None:
    with pytest.raises(ImageUnreadable, match=r"uint8 \(H, W\) or \(H, W, 1 \| 3 \| 4\) is expected"):
        upload(array)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_pil_images_of_every_mode_are_sent_as_png(mode: str) -> None:
    sent = upload(Image.new(mode, (3, 2)))

    with Image.open(BytesIO(sent.data)) as image:
        assert (image.format, image.size) == ("PNG", (3, 2))


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
