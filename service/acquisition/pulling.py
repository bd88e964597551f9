"""Published weights into the store: at a command, or at the first request that needs them, once for all who wait."""

import asyncio
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Literal
from urllib.parse import urlsplit

import structlog
from filelock import FileLock, Timeout
from huggingface_hub import constants

from service.acquisition.catalogue import (
    CATALOGUE,
    DEFAULT_SOURCE,
    HUB,
    LICENCE,
    SIDE,
    Published,
    SourceName,
    imagenet_labels,
)
from service.acquisition.download import Download, Progress, RetryPolicy, SourceFileMissing, discard
from service.acquisition.preprocessing import MAX_PREPROCESSOR_BYTES, PRESETS, describe, read_preprocessor
from service.acquisition.publishing import PULL_FOLDER, Description, publish
from service.architecture.weights import open_checkpoint
from service.errors import (
    InvalidRequest,
    ModelLoading,
    ModelNotFound,
    PullFailed,
    ServiceError,
    WeightsDigestMismatch,
    WeightsUnavailable,
)
from service.files import file_sha256
from service.options import EngineOptions
from service.sharing import RecentErrors, shared
from service.store.cards import Preprocessing
from service.store.folder import writing
from service.store.store import Store, StoredModel
from service.workers import Workers

log = structlog.get_logger(component="pull")

PULLS = 2  # on demand, at a time
FAILURE_SECONDS = 30.0  # how long a failure is reported without another attempt
UNKNOWN_SECONDS = 30.0  # assumed for a pull of which nothing is known yet
_FLOAT32 = 4  # bytes
_EXTRA_BYTES = 16_000_000  # besides the tensors: of the file, and of reference images and logits


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """`source` says which of the public files to download, `mirror` is a base URL in place of their hosts."""

    source: SourceName = DEFAULT_SOURCE
    mirror: str | None = None
    policy: RetryPolicy = field(default_factory=RetryPolicy)

    def address(self, public: str) -> tuple[str, bool]:
        """Where to fetch the file whose public URL is `public`, and whether the user's token may go there.

        It is for the hub alone, which HF_ENDPOINT may name.
        """
        hub = self.mirror is None and public.startswith(HUB)
        base = constants.ENDPOINT if hub else self.mirror
        return base.rstrip("/") + urlsplit(public).path if base else public, hub


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
    stop, folder = stop or Event(), root / PULL_FOLDER / f"{model.id}.{options.source}"
    start = partial(Download, root=root, stop=stop, policy=options.policy)
    with locked(root, model.id, stop):
        versions = _versions(root, model.id)
        if not again and (whole := next((each for each in versions if is_whole(each)), None)):
            return Pulled(whole, fresh=False)
        pixels = _preprocessing(model, options, partial(start, folder=folder.with_name(f"{folder.name}.preprocessor")))
        file, about = _weights(model, options, pixels, partial(start, folder=folder, on_progress=on_progress))
        try:
            _check_unchanged(about, versions)
            checkpoint = open_checkpoint(file)
            stored = publish(root, checkpoint.state, about, checkpoint=checkpoint)
        except ServiceError:
            discard(folder)
            raise
        discard(folder)
        return Pulled(stored, fresh=True)


def _versions(root: Path, id_: str) -> list[StoredModel]:
    try:
        return Store(root).versions(id_)
    except (ModelNotFound, WeightsUnavailable):
        return []


def is_whole(stored: StoredModel) -> bool:
    """Whether its weights have the digest in its card; damaged ones are downloaded again."""
    if stored.card is None:
        return False
    try:
        return file_sha256(stored.folder / stored.card.weights.file) == stored.card.weights.sha256
    except OSError:
        return False


@contextmanager
def locked(root: Path, name: str, stop: Event) -> Iterator[None]:
    """Keep all others, in this process and in others, from pulling `name` into the store at `root`."""
    lock = FileLock(root / PULL_FOLDER / f"{name}.lock")
    with ExitStack() as held:
        with writing(root):
            (root / PULL_FOLDER).mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(lock.acquire(cancel_check=stop.is_set))
            except Timeout:
                raise PullFailed(f"stopped while another process pulled {name}") from None
        yield


def _preprocessing(model: Published, options: PullOptions, start: Callable[..., Download]) -> Preprocessing:
    """The preprocessing of the source's library, or that which the repository itself describes."""
    source = model.file(options.source)
    preset = PRESETS[source.library].model_copy(update={"height": SIDE, "width": SIDE})
    if source.preprocessor is None:
        return preset
    url, token = options.address(source.preprocessor)
    download = start(url=url, token=token, max_bytes=MAX_PREPROCESSOR_BYTES)
    try:
        file, origin = download.run()
        return read_preprocessor(file, origin.url)
    except SourceFileMissing as missing:
        log.warning("preprocessor_missing", reason=str(missing), taken=describe(preset))
        return preset
    except InvalidRequest as error:
        raise PullFailed(f"{error}; try another --source") from error
    finally:
        discard(download.folder)


def _weights(
    model: Published, options: PullOptions, pixels: Preprocessing, start: Callable[..., Download]
) -> tuple[Path, Description]:
    """The weights from the first of their URLs that has them, and the rest of their card."""
    source, most = model.file(options.source), _FLOAT32 * model.parameters + _EXTRA_BYTES
    for public in source.urls:
        url, token = options.address(public)
        try:
            file, origin = start(url=url, token=token, sha256=source.sha256, max_bytes=most, room_bytes=most).run()
            break
        except SourceFileMissing:
            if public == source.urls[-1]:
                raise
    return file, Description(
        id=model.id,
        variant=model.variant,
        labels=imagenet_labels(),
        preprocessing=pixels,
        licence=LICENCE,
        source=source.urls[0],
        accuracy=model.accuracy,
        origin=origin,
    )


def _check_unchanged(about: Description, versions: Sequence[StoredModel]) -> None:
    """Where nobody publishes a digest, refuse any other file than the one that was trusted first."""
    origin = about.origin
    if origin is None or origin.digest_from != "nobody":
        return
    for stored in versions:
        first = stored.card and stored.card.source == about.source and stored.card.origin
        if first and first.sha256 != origin.sha256:
            raise WeightsDigestMismatch(
                f"{origin.url} has changed: SHA-256 is {origin.sha256}, and was {first.sha256} when {stored.key} was "
                f"pulled; if the change is right, remove that version first (pvt-serve rm {stored.key})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    """Published weights that are not in the store; while they are pulled, `pulled_bytes` of `total_bytes` are."""

    published: Published
    default: bool
    state: Literal["remote", "loading", "failed"] = "remote"
    failure: ServiceError | None = None
    pulled_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(eq=False, slots=True)
class _Pull:
    began: float
    task: "asyncio.Task[Pulled]" = field(init=False)
    # Mutable state: how far it is, set by its thread.
    done: int = 0
    total: int | None = None

    def progress(self, done: int, total: int | None) -> None:
        self.done, self.total = done, total


class Pulls:
    """Pulls what requests need. Its methods belong to one event loop; it lives until it is closed."""

    def __init__(self, options: EngineOptions) -> None:
        self._enabled = options.pull
        self._root = options.model_store
        self._default = _requestable(options.default_model)
        self._options = PullOptions(mirror=options.mirror)
        self._thread = Workers("pull", PULLS)
        self._stop = Event()
        # Mutable state: pulls under way, and what lately went wrong with which, by variant.
        self._under_way: dict[str, _Pull] = {}
        self._failures = RecentErrors(FAILURE_SECONDS)

    def close(self) -> None:
        """Give up pulls under way; the next one continues their files."""
        self._stop.set()
        self._thread.close(wait=False)

    def wanted(self, name: str) -> Published | None:
        """What a request for `name`, which is not in the store, would pull; None if nothing."""
        return _requestable(name) if self._enabled else None

    def can(self, name: str) -> bool:
        """Whether such a request would succeed, as far as is known."""
        model = self.wanted(name)
        return model is not None and self._failures.get(model.variant) is None

    async def pull(self, model: Published, max_wait_seconds: float | None = None) -> None:
        """Pull `model`. A caller that is cancelled, or waits no longer than `max_wait_seconds`, does not stop that.

        Raises:
            WeightsUnavailable, WeightsInvalid, StoreNotWritable: it can't be pulled; the message says why.
            ModelLoading: `max_wait_seconds` are over; the pull goes on.
        """
        if failure := self._failures.get(model.variant):
            raise failure
        under_way = self._under_way.get(model.variant) or self._begin(model)
        try:
            await shared(under_way.task, max_wait_seconds)
        except TimeoutError:
            done, total, of, seconds_left = under_way.done, under_way.total, "", UNKNOWN_SECONDS
            if total:
                of = f" of {total / 1e6:.1f}"
            if done and total:
                seconds_left = (monotonic() - under_way.began) * (total / done - 1) + 1
            raise ModelLoading(
                f"the weights of {model.id!r} are being fetched, {done / 1e6:.1f} MB{of} are here; ask again then, or "
                "wait for it",
                seconds_left,
            ) from None

    def remote(self, present: Container[str]) -> list[RemoteModel]:
        """The published models whose ids are not `present`."""
        return [self._status(each) for each in CATALOGUE.values() if each.id not in present]

    def one(self, name: str) -> RemoteModel | None:
        """The published model called `name`, if it is not in the store."""
        model = _requestable(name)
        return self._status(model) if model else None

    def _begin(self, model: Published) -> _Pull:
        under_way = self._under_way[model.variant] = _Pull(monotonic())
        blocking = partial(pull, self._root, model, self._options, on_progress=under_way.progress, stop=self._stop)
        under_way.task = asyncio.create_task(self._thread.run(blocking))
        under_way.task.add_done_callback(partial(self._ended, model))
        log.info("pull_begun", model=model.id)
        return under_way

    def _ended(self, model: Published, task: "asyncio.Task[Pulled]") -> None:
        seconds = monotonic() - self._under_way.pop(model.variant).began
        self._failures.note(model.variant, task)
        if task.cancelled():
            return
        if error := task.exception():
            log.warning("pull_failed", model=model.id, reason=str(error) or type(error).__name__)
        else:
            log.info("pulled", model=model.id, version=task.result().stored.version, seconds=round(seconds, 3))

    def _status(self, model: Published) -> RemoteModel:
        status = RemoteModel(published=model, default=model == self._default)
        if under_way := self._under_way.get(model.variant):
            return replace(status, state="loading", pulled_bytes=under_way.done, total_bytes=under_way.total)
        failure = self._failures.get(model.variant)
        return replace(status, state="failed", failure=failure) if failure else status


def _requestable(name: str) -> Published | None:
    """What the catalogue has under a name that requests use: a variant's, or the id."""
    return next((each for each in CATALOGUE.values() if name in {each.variant, each.id}), None)
