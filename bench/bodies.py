"""The forms in which a image is sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Form = Literal["raw", "multipart"]
FIELD = "image"
_BOUNDARY = "pvt-serve-bench-7MA4YWxkTrZu0gW"


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body and its content type."""

    content_type: str
    data: bytes


def bodies(images: Sequence[bytes], form: Form) -> list[Body]:
    """Each of the JPEGs `images` as a body: its bytes alone, or as the file `image` of a form."""
    return [form_of([image]) if form == "multipart" else Body("image/jpeg", image) for image in images]


def form_of(images: Sequence[bytes]) -> Body:
    """All of the JPEGs `images` as files of one form."""
    head = (
        f"--{_BOUNDARY}\r\n"
        f'Content-Disposition: form-data; name="{FIELD}"; filename="photo.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    parts = b"".join(head.encode() + image + b"\r\n" for image in images)
    return Body(f"multipart/form-data; boundary={_BOUNDARY}", parts + f"--{_BOUNDARY}--\r\n".encode())
