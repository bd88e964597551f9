"""Published weights into the store: downloaded by one process at a time, checked, and converted."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import structlog
from filelock import FileLock, Timeout

from service.acquisition.catalogue import (
    DEFAULT_SOURCE,
    LIBRARIES,
    LICENCE,
    PREPROCESSOR_FILE,
    SIDE,
    Published,
    RemoteFile,
    SourceName,
    imagenet_labels,
    mirrored,
)
from service.acquisition.download import (
    DownloadedFile,
    FileRequest,
    Progress,
    RetryPolicy,
    SourceFileMissing,
    discard,
    download,
    without_secrets,
)
from service.acquisition.preprocessing import MAX_PREPROCESSOR_BYTES, PRESETS, describe, read_preprocessor
from service.acquisition.publishing import PULL_FOLDER, Description, publish
from service.architecture.weights import read_checkpoint
from service.errors import (
    InvalidRequest,
    ModelNotFound,
    PullFailed,
    ServiceError,
    WeightsDigestMismatch,
    WeightsUnavailable,
)
from service.files import file_sha256
from service.store.cards import Origin, Preprocessing
from service.store.folder import writing
from service.store.store import Store, StoredModel

log = structlog.get_logger(component="pull")

LOCK_POLL_SECONDS = 0.2
_FLOAT32 = 4  # bytes
_EXTRA_BYTES = 16_000_000  # besides the tensors: of the file, and of reference images and logits


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """`source` says which of the public files to download, `mirror` is a base URL in place of their hosts."""

    source: SourceName = DEFAULT_SOURCE
    mirror: str | None = None
    policy: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model of the store; `fresh` says that it is new there."""

    stored: StoredModel
    fresh: bool


def pull(
    root: Path,
    model: Published,
    options: PullOptions = PullOptions(),
    *,
    again: bool = False,
    on_progress: Progress = lambda _done, _total: None,
    stop: Event | None = None,
) -> Pulled:
    """Put `model` into the store at `root`, unless a whole version of it is there; `again` pulls it all the same.

    Others that pull the same model meanwhile, in any process, wait for the first, and then have its version.

    Raises:
        PullFailed: it can't be downloaded; the bytes so far are kept for the next time.
        WeightsInvalid: the file is not the model; nothing is kept.
        StoreNotWritable: the store can't be written.
    """
    stop = stop or Event()
    remote = model.file(options.source)
    with _locked(root, model.id, stop):
        versions = _versions(root, model.id)
        if not again and (whole := next((each for each in versions if _is_whole(each)), None)):
            return Pulled(whole, fresh=False)
        url, file = _download_weights(root, model, options, on_progress=on_progress, stop=stop)
        pixels = _preprocessing(root, model, options, stop=stop)
        try:
            origin = _origin(url, file)
            _check_unchanged(origin, remote, versions)
            about = _description(model, remote, origin, pixels)
            stored = publish(root, read_checkpoint(file.path), about)
        except ServiceError:
            discard(file.path)
            raise
        discard(file.path)
        return Pulled(stored, fresh=True)


def _versions(root: Path, id_: str) -> list[StoredModel]:
    try:
        return Store(root).versions(id_)
    except (ModelNotFound, WeightsUnavailable):
        return []


def _is_whole(stored: StoredModel) -> bool:
    """Whether its weights have the digest in its card; damaged ones are downloaded again."""
    if stored.card is None:
        return False
    try:
        return file_sha256(stored.folder / stored.card.weights.file) == stored.card.weights.sha256
    except OSError:
        return False


@contextmanager
def _locked(root: Path, name: str, stop: Event) -> Iterator[None]:
    """Keep all others, in this process and in others, from pulling `name` into the store at `root`."""
    with writing(root):
        (root / PULL_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / PULL_FOLDER / f"{name}.lock", timeout=LOCK_POLL_SECONDS)
        while True:
            try:
                lock.acquire()
                break
            except Timeout:
                if stop.is_set():
                    raise PullFailed(f"stopped while another process pulled {name}") from None
    try:
        yield
    finally:
        lock.release()


def _download_weights(
    root: Path, model: Published, options: PullOptions, *, on_progress: Progress, stop: Event
) -> tuple[str, DownloadedFile]:
    """Download the weights from the first of their URLs that has them; that URL, and the file."""
    remote, tensors = model.file(options.source), _FLOAT32 * model.parameters
    for i, public in enumerate(remote.urls):
        url = mirrored(public, options.mirror)
        suffix = ".safetensors" if public.endswith(".safetensors") else ".pth"
        most = tensors + _EXTRA_BYTES
        request = FileRequest(url=url, sha256=remote.sha256, max_bytes=most, room_bytes=most)
        target = root / PULL_FOLDER / f"{model.id}.{options.source}{suffix}"
        try:
            file = download(request, target, root=root, on_progress=on_progress, stop=stop, policy=options.policy)
        except SourceFileMissing:
            if i == len(remote.urls) - 1:
                raise
        else:
            return url, file
    raise PullFailed(f"{model.id} has no URL at {options.source}")


def _preprocessing(root: Path, model: Published, options: PullOptions, *, stop: Event) -> Preprocessing:
    """The preprocessing of the source's library, or that which the repository itself describes.

    Raises:
        PullFailed: the description can't be downloaded, or a card can't express it.
    """
    preset = PRESETS[LIBRARIES[options.source]].model_copy(update={"height": SIDE, "width": SIDE})
    public = model.file(options.source).preprocessor
    if public is None:
        return preset
    url = mirrored(public, options.mirror)
    request = FileRequest(url=url, max_bytes=MAX_PREPROCESSOR_BYTES)
    target = root / PULL_FOLDER / f"{model.id}.{options.source}.{PREPROCESSOR_FILE}"
    try:
        file = download(request, target, root=root, stop=stop, policy=options.policy)
        return read_preprocessor(file.path, without_secrets(url))
    except SourceFileMissing:
        log.warning("preprocessor_missing", url=without_secrets(url), taken=describe(preset))
        return preset
    except InvalidRequest as error:
        raise PullFailed(f"{error}; try another --source") from error
    finally:
        discard(target)


def _origin(url: str, file: DownloadedFile) -> Origin:
    return Origin(
        url=without_secrets(url),
        sha256=file.sha256,
        bytes=file.bytes,
        digest_from=file.digest_from or "nobody",
        revision=file.revision,
    )


def _check_unchanged(origin: Origin, remote: RemoteFile, versions: Sequence[StoredModel]) -> None:
    """Where nobody publishes a digest, refuse any other file than the one that was trusted first."""
    if origin.digest_from != "nobody":
        return
    for stored in versions:
        first = stored.card and stored.card.source == remote.urls[0] and stored.card.origin
        if first and first.sha256 != origin.sha256:
            raise WeightsDigestMismatch(
                f"{origin.url} has changed: SHA-256 is {origin.sha256}, and was {first.sha256} when {stored.key} was "
                f"pulled; if the change is right, remove that version first (pvt-serve rm {stored.key})"
            )


def _description(model: Published, remote: RemoteFile, origin: Origin, pixels: Preprocessing) -> Description:
    return Description(
        id=model.id,
        variant=model.variant,
        labels=imagenet_labels(),
        preprocessing=pixels,
        licence=LICENCE,
        source=remote.urls[0],
        accuracy=model.accuracy,
        origin=origin,
    )
