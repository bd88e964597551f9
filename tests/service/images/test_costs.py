"""What an image costs is known from its header; that its bytes are enough is in `test_decoding_memory`."""

import io
from typing import Any

import pytest
from PIL import Image

from service.errors import ImageTooLarge, InvalidImage
from service.images.decoding import Geometry, cost, decode

GEOMETRY = Geometry(224, 224, 0.9, "bicubic")
LIMIT = 50_000_000


def encode(size: tuple[int, int], kind: str, mode: str = "RGB", **options: Any) -> bytes:
    Image.new(mode, size).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def test_a_small_image_is_not_large() -> None:
    assert not cost(encode((640, 480), "JPEG"), GEOMETRY, max_pixels=LIMIT).large


def test_a_png_of_49_megapixels_costs_its_pixels_although_none_is_there() -> None:
    data = encode((7000, 7000), "PNG")[:200]

    costs = cost(data, GEOMETRY, max_pixels=LIMIT)

    assert costs.pixels == 49_000_000
    assert 4 * 49_000_000 < costs.bytes < 5 * 49_000_000
    assert costs.large


def test_a_jpeg_that_is_read_at_a_quarter_costs_little_memory_and_counts_as_an_eighth_of_its_pixels() -> None:
    data = encode((4000, 3000), "JPEG")

    assert cost(data, GEOMETRY, max_pixels=LIMIT).pixels == 1_500_000
    assert not cost(data, GEOMETRY, max_pixels=LIMIT).large
    assert cost(data, GEOMETRY, max_pixels=LIMIT, scaled_jpeg=False).large


def test_a_jpeg_of_several_scans_costs_its_coefficients() -> None:
    data = encode((4000, 3000), "JPEG", progressive=True)

    assert cost(data, GEOMETRY, max_pixels=LIMIT).pixels == 12_000_000
    assert 3 * 12_000_000 < cost(data, GEOMETRY, max_pixels=LIMIT).bytes < 5 * 12_000_000
    data = encode((4000, 3000), "JPEG", progressive=True, subsampling="4:4:4")
    assert 6 * 12_000_000 < cost(data, GEOMETRY, max_pixels=LIMIT).bytes < 8 * 12_000_000


def test_a_target_far_wider_than_the_image_counts_the_rows_between_the_two_steps() -> None:
    stretched = Geometry(1024, 1024, 1.0, "bicubic", "stretch")

    assert cost(encode((700, 60_000), "PNG", "1"), stretched, max_pixels=LIMIT).bytes > 60_000 * 1024 * 4


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"", InvalidImage), (b"GIF89a", InvalidImage), (encode((7100, 7100), "PNG", "1"), ImageTooLarge)],
)
def test_what_has_no_cost_is_refused_as_in_decoding(data: bytes, error: type[Exception]) -> None:
    for function in (cost, decode):
        with pytest.raises(error):
            function(data, GEOMETRY, max_pixels=LIMIT)


def test_a_decoding_whose_cost_is_refused_decodes_nothing() -> None:
    def refuse(_: object) -> Any:
        raise ImageTooLarge("not now")

    with pytest.raises(ImageTooLarge, match="not now"):
        decode(encode((64, 64), "PNG")[:60], GEOMETRY, max_pixels=LIMIT, reserve=refuse)
