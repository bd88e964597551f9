from io import BytesIO

from PIL import Image

from bench.pictures import jpegs


def test_no_two_pictures_are_alike_and_all_are_photos_of_640x427() -> None:
    pictures = jpegs(64)

    assert len(set(pictures)) == 64
    assert {Image.open(BytesIO(picture)).size for picture in pictures} == {(640, 427)}
