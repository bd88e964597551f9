"""Where a model store may be other than in a folder: URLs, and what reading them needs."""

import importlib.util
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

# What must be installed for which URLs, and the extra that brings it.
_NEEDS = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "hf": ("huggingface_hub", "hub"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
    "file": (None, None),
    "memory": (None, None),
}
_URL = re.compile(r"[a-z][a-z0-9+.-]+://.+")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """A store by `url`, the folder that keeps a copy of what is used of it, and how many bytes of weights at most."""

    url: str
    cache: Path
    cache_bytes: int
    poll_seconds: float = 30.0

    @property
    def shown(self) -> str:
        """The URL without a password that may stand in it."""
        return without_password(self.url)

    @property
    def folder(self) -> Path:
        """Where the copy of this store lies: each has its own, by a name that people recognise."""
        name = re.sub(r"[^a-z0-9]+", "-", self.shown.lower()).strip("-")[-60:]
        return self.cache / f"{name}-{sha256(self.shown.encode()).hexdigest()[:12]}"


def without_password(url: str) -> str:
    """`url` as it may be shown, at its end no slash."""
    host = urlsplit(url).netloc
    return (url.replace(host, host.rpartition("@")[2], 1) if "@" in host else url).rstrip("/")


def is_url(store: str) -> bool:
    """Whether `store` is a URL rather than a folder."""
    return _URL.fullmatch(store) is not None


def objection(url: str) -> str | None:
    """Why this installation can't read `url`; None when it can."""
    scheme = url.partition("://")[0]
    if scheme not in _NEEDS:
        return f"{scheme}:// is none of " + ", ".join(f"{known}://" for known in _NEEDS)
    package, extra = _NEEDS[scheme]
    if package and importlib.util.find_spec(package) is None:
        return f"{scheme}:// needs the package {package}: pip install 'pvt-serve[{extra}]'"
    return None
