"""What strangers may read: whole paths of files are for the log, and for those who manage the service."""

import re
from pathlib import Path

from fastapi import Request

from app.settings import Settings

# A path below a folder of the machine's root, at its beginning or after a space, a quote or a bracket.
_PATH = re.compile(r"(?P<start>^|[\s'\"`(\[=:,])(?P<path>/(?:[^\s'\"`:,;()\[\]/]+/)+[^\s'\"`:,;()\[\]]*)")
_REQUEST = re.compile(r"\b(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS)$")  # a path after it is that of an endpoint


def shown(request: Request | None, reason: object) -> str:
    """`reason` as the sender of `request` may read it: files by their place in the store, others by their names.

    Without a request, nothing is hidden: the command line shows its own user's files.
    """
    text = str(reason)
    if request is None or "/" not in text or manages(request):
        return text
    settings: Settings = request.state.settings
    for folder in _folders(settings):
        text = text.replace(f"{folder}/", "").replace(str(folder), "the model store")
    return _PATH.sub(_by_name, text)


def manages(request: Request) -> bool:
    """Whether the sender has a key for management, or has reached the port that needs none."""
    settings: Settings = request.state.settings
    on_port = not settings.management_keys and settings.is_for_management(request.scope.get("server"))
    return request.state.role == "management" or on_port


def _folders(settings: Settings) -> list[Path]:
    """The store's folder as it may be written: as it was set, absolute, and without symbolic links."""
    store = settings.store_folder
    return [folder for folder in dict.fromkeys((store.resolve(), store.absolute(), store)) if folder.is_absolute()]


def _by_name(match: re.Match[str]) -> str:
    path = match["path"].rstrip("/")
    if _REQUEST.search(match.string[: match.start()]) or not Path("/", path.split("/")[1]).is_dir():
        return match[0]
    return match["start"] + path.rpartition("/")[2]
