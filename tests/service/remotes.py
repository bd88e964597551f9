"""Remote stores, for tests: a server of the S3 protocol, and one of plain HTTP that can be made to fail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import Any

from service.store.cards import ModelCard, Preprocessing
from service.store.folder import weights_file, write_model
from service.store.location import RemoteOptions
from service.store.remote import RemoteStore
from service.store.store import StoredModel
from tests.service.hub import QuietServer

TINY = "pvt_v2_b0.tiny"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def add_small(root: Path, id_: str = TINY, version: str = "1", *, classes: int = 3) -> Path:
    """A model whose weights are 100 kB that nobody reads; returns its version folder."""
    content = f"{id_}@{version} {classes}".encode().ljust(100_000, b".")
    card = ModelCard(
        id=id_,
        variant="pvt_v2_b0",
        labels=tuple(map(str, range(classes))),
        preprocessing=Preprocessing(height=32, width=32),
        weights=weights_file(content),
        parameters=1,
        licence="Apache-2.0",
        source="none",
    )
    return write_model(root, version, card, content)


class S3:
    """A server of the S3 protocol on this machine, its state in memory."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer  # noqa: PLC0415  a second, which only its tests pay

        self.server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self.server.start()
        host, port = self.server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self.environment = {**KEYS, "AWS_ENDPOINT_URL": self.endpoint}

    @property
    def client(self) -> Any:
        import boto3  # noqa: PLC0415  the same

        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", aws_access_key_id="test",
            aws_secret_access_key="test",  # noqa: S106
        )  # fmt: skip

    def upload(self, root: Path, bucket: str, prefix: str = "") -> str:
        """All of the store in `root`; returns its URL."""
        client = self.client
        client.create_bucket(Bucket=bucket)
        for path in root.rglob("*"):
            if path.is_file():
                client.put_object(Bucket=bucket, Key=f"{prefix}{path.relative_to(root)}", Body=path.read_bytes())
        return f"s3://{bucket}/{prefix}"


class Folder(SimpleHTTPRequestHandler):
    """Serves a folder. `status` gives, for a path, another answer than the file; None is the file."""

    status: Callable[[str], int | None]
    listing = True
    requested: list[str]

    def do_GET(self) -> None:
        self.requested.append(self.path)
        if status := type(self).status(self.path):
            self.send_error(status)
        elif not self.listing and self.path.endswith("/"):
            self.send_error(404)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


class Site:
    """A folder behind HTTP."""

    def __init__(self, root: Path, handler: type[Folder]) -> None:
        self.handler = handler
        self.server = QuietServer(("127.0.0.1", 0), partial(handler, directory=str(root)))
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = Thread(target=partial(self.server.serve_forever, poll_interval=0.01))
        self._thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@contextmanager
def site(root: Path, *, listing: bool = True) -> Iterator[Site]:
    def ordinary(_: str) -> int | None:
        return None

    class Handler(Folder):
        pass

    Handler.status = ordinary
    Handler.listing = listing
    Handler.requested = []
    served = Site(root, Handler)
    try:
        yield served
    finally:
        if served._thread.is_alive():
            served.stop()


def remote(url: str, cache: Path, cache_bytes: int = 10**9, poll_seconds: float = 3600) -> RemoteStore:
    return RemoteStore(RemoteOptions(url=url, cache=cache, cache_bytes=cache_bytes, poll_seconds=poll_seconds))


def fetched(store: RemoteStore, name: str = TINY) -> StoredModel:
    with store.holding(store.find(name)) as stored:
        return stored


def weights(folder: Path) -> Path:
    """The weights of the one model that `add_small` makes."""
    return folder / TINY / "1" / "model.safetensors"


def bytes_of(cache: Path) -> int:
    """What counts of it: all but cards and indices."""
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.suffix != ".json")
