"""An image in the JSON of other protocols, which have many forms for it."""

import re
from typing import Any

from app.bodies import Link, Upload
from app.data_urls import from_base64
from service.errors import InvalidRequest

# What says how an image is written, or names it, beside the image itself.
_REMARKS = {"type", "format", "detail", "key", "id", "filename", "mime_type", "mimeType", "media_type"}
_DEEPEST = 5  # such as {"content": [{"image_url": {"url": "..."}}]}
_URL = re.compile(r"[a-z][a-z0-9+.-]{0,20}://", re.IGNORECASE)
SEND = 'send base64, a data: URL, or an object with one of them, such as {"b64": "..."} or {"image": "..."}'


def image_of(item: Any, place: str) -> Upload | Link:  # noqa: ANN401  whatever JSON holds
    """The image that `item`, which is at `place`, holds: base64, a `data:` URL, or a link.

    `item` is the text itself, or an object with one member, whatever its name, that is text or such an object again:
    `{"b64": ...}` and `{"image_bytes": {"b64": ...}}` of TensorFlow Serving, `{"image": ...}` of Jina and Infinity,
    `{"type": "image_url", "image_url": {"url": ...}}` of OpenAI and Cohere, `{"content": ...}` of Vertex AI.

    Raises:
        InvalidRequest: it holds something else; what is no base64 is an error in the Upload.
    """
    for _ in range(_DEEPEST):
        match item:
            case str():
                return Link(item) if _URL.match(item) else Upload(None, from_base64(item))
            case dict():
                members = {name: value for name, value in item.items() if name not in _REMARKS}
                _check_members(members, place)
                (item,) = members.values()
            case [dict() as item]:
                pass
            case [[*_], *_] | [int() | float(), *_]:
                raise InvalidRequest(f"{place}: a list of numbers; {SEND}, or pixels to /v2/models/{{name}}/infer")
            case _:
                break
    raise InvalidRequest(f"{place}: no image; {SEND}")


def _check_members(members: dict[str, Any], place: str) -> None:
    if isinstance(members.get("text"), str):
        raise InvalidRequest(f"{place}: text; the models here see images only: {SEND}")
    if len(members) != 1:
        names = ", ".join(repr(name[:40]) for name in [*members][:5]) or "none"
        raise InvalidRequest(f"{place}: an object with the members {names}, of which one must be the image; {SEND}")
