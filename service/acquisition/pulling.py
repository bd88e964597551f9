"""Published weights into the store: fetched once, whoever asks, checked, converted."""

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
    mirrored,
)
from service.acquisition.download import Fetched, Patience, Progress, Wanted, download
from service.acquisition.labels import imagenet_labels
from service.acquisition.partial import Part
from service.acquisition.preprocessing import MAX_PREPROCESSOR_BYTES, PRESETS, described, of_transformers
from service.acquisition.publishing import PULL_FOLDER, Description, publish
from service.acquisition.replies import SourceFileMissing, shown
from service.architecture.weights import digest, read_checkpoint
from service.errors import (
    InvalidRequest,
    ModelNotFound,
    PullFailed,
    ServiceError,
    WeightsDigestMismatch,
    WeightsUnavailable,
)
from service.store.cards import Origin, Preprocessing
from service.store.store import Store
from service.store.stored import StoredModel
from service.store.writes import writing

log = structlog.get_logger(component="pull")

LOCK_POLL_SECONDS = 0.2
_FLOAT32 = 4  # bytes
_EXTRA_BYTES = 16_000_000  # that a file may have beside its tensors, and golden outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """`source` is which of the public files to fetch, `mirror` a base URL in place of their hosts."""

    source: SourceName = DEFAULT_SOURCE
    mirror: str | None = None
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model of the store; `fresh` says that it was not there before."""

    stored: StoredModel
    fresh: bool


def pull(
    root: Path,
    model: Published,
    options: PullOptions = PullOptions(),
    *,
    again: bool = False,
    tell: Progress = lambda _done, _total: None,
    stop: Event | None = None,
) -> Pulled:
    """Put `model` into the store at `root`, unless a whole version of it is there; `again` fetches it all the same.

    Whoever pulls the same model meanwhile, in any process, waits for the first and finds it done.

    Raises:
        PullFailed: it can't be fetched; what is here of it is kept for the next time.
        WeightsInvalid: what was fetched is not the model; nothing is kept.
        StoreNotWritable: the store can't be written.
    """
    stop = stop or Event()
    remote = model.file(options.source)
    with _alone(root, model.id, stop):
        versions = _versions(root, model.id)
        if not again and (whole := next((each for each in versions if _is_whole(each)), None)):
            return Pulled(whole, fresh=False)
        url, fetched = _fetched(root, model, options, tell=tell, stop=stop)
        pixels = _preprocessing(root, model, options, stop=stop)
        try:
            origin = _origin(url, fetched)
            _check_unchanged(origin, remote, versions)
            about = _described(model, remote, origin, pixels)
            stored = publish(root, read_checkpoint(fetched.path), about)
        except ServiceError:
            Part(fetched.path).discard()
            raise
        Part(fetched.path).discard()
        return Pulled(stored, fresh=True)


def _versions(root: Path, id_: str) -> list[StoredModel]:
    try:
        return Store(root).versions(id_)
    except (ModelNotFound, WeightsUnavailable):
        return []


def _is_whole(stored: StoredModel) -> bool:
    """Whether its weights are those that its card speaks of; the damaged are fetched anew."""
    if stored.card is None:
        return False
    try:
        return digest(stored.folder / stored.card.weights.file) == stored.card.weights.sha256
    except OSError:
        return False


@contextmanager
def _alone(root: Path, name: str, stop: Event) -> Iterator[None]:
    """While it lasts nobody else, in this process or another, pulls `name` into the store at `root`."""
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


def _fetched(root: Path, model: Published, options: PullOptions, *, tell: Progress, stop: Event) -> tuple[str, Fetched]:
    """The first of the file's URLs that has it, and the file."""
    remote, tensors = model.file(options.source), _FLOAT32 * model.parameters
    for i, public in enumerate(remote.urls):
        url = mirrored(public, options.mirror)
        suffix = ".safetensors" if public.endswith(".safetensors") else ".pth"
        wanted = Wanted(url=url, sha256=remote.sha256, max_bytes=tensors + _EXTRA_BYTES, room=tensors + _EXTRA_BYTES)
        target = root / PULL_FOLDER / f"{model.id}.{options.source}{suffix}"
        try:
            fetched = download(wanted, target, root=root, tell=tell, stop=stop, patience=options.patience)
        except SourceFileMissing:
            if i == len(remote.urls) - 1:
                raise
        else:
            return url, fetched
    raise PullFailed(f"{model.id} has no URL at {options.source}")


def _preprocessing(root: Path, model: Published, options: PullOptions, *, stop: Event) -> Preprocessing:
    """What the source's library does to an image, or what the repository itself says of that.

    Raises:
        PullFailed: what it says can't be fetched, or is what no card can say.
    """
    preset = PRESETS[LIBRARIES[options.source]].model_copy(update={"height": SIDE, "width": SIDE})
    public = model.file(options.source).preprocessor
    if public is None:
        return preset
    wanted = Wanted(url=mirrored(public, options.mirror), max_bytes=MAX_PREPROCESSOR_BYTES)
    target = root / PULL_FOLDER / f"{model.id}.{options.source}.{PREPROCESSOR_FILE}"
    try:
        fetched = download(wanted, target, root=root, stop=stop, patience=options.patience)
        return of_transformers(fetched.path, shown(wanted.url))
    except SourceFileMissing:
        log.warning("preprocessor_missing", url=shown(wanted.url), taken=described(preset))
        return preset
    except InvalidRequest as error:
        raise PullFailed(f"{error}; try another --source") from error
    finally:
        Part(target).discard()


def _origin(url: str, fetched: Fetched) -> Origin:
    return Origin(
        url=shown(url),
        sha256=fetched.sha256,
        bytes=fetched.bytes,
        digest_from=fetched.digest_from or "nobody",
        revision=fetched.revision,
    )


def _check_unchanged(origin: Origin, remote: RemoteFile, versions: Sequence[StoredModel]) -> None:
    """Where nobody publishes a digest, the file must be the one that was trusted first."""
    if origin.digest_from != "nobody":
        return
    for stored in versions:
        first = stored.card and stored.card.source == remote.urls[0] and stored.card.origin
        if first and first.sha256 != origin.sha256:
            raise WeightsDigestMismatch(
                f"{origin.url} has changed: SHA-256 is {origin.sha256}, and was {first.sha256} when {stored.key} was "
                f"pulled; if that is as it should be, remove that version first (pvt-serve rm {stored.key})"
            )


def _described(model: Published, remote: RemoteFile, origin: Origin, pixels: Preprocessing) -> Description:
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
