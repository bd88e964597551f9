from io import BytesIO
from itertools import combinations

import numpy as np
from PIL import Image

from bench.images import jpegs, large_jpegs


def thumbnail(image: bytes) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return np.asarray(Image.open(BytesIO(image)).convert("L").resize((32, 24)), dtype=np.float32)


def test_no_two_images_are_alike_and_all_are_photos_of_640x427() -> None:
    images = jpegs(64)

    assert len(set(images)) == 64
    assert {Image.open(BytesIO(image)).size for image in images} == {(640, 427)}
    assert min(abs(a - b).mean() for a, b in combinations(map(thumbnail, images), 2)) > 0.5


def test_images_are_the_same_at_every_call() -> None:
    assert jpegs(3) == jpegs(3)


def test_large_images_have_12_megapixels_and_the_bytes_of_a_camera() -> None:
    one, two = large_jpegs(2)

    assert one != two
    assert Image.open(BytesIO(one)).size == (4000, 3000)
    assert 1_500_000 < len(one) < 6_000_000
