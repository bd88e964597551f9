"""Models of any repository of the hub into the store: its files are fetched, then imported as a folder."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from threading import Event
from urllib.parse import quote

from pydantic import BaseModel, Field, ValidationError

from service.acquisition.catalogue import HUB, PREPROCESSOR_FILE
from service.acquisition.configs import CONFIG_FILE, read_config
from service.acquisition.download import Download, Progress, SourceFileMissing, discard
from service.acquisition.folders import CARD_FILE, INDEX_SUFFIX, MAX_INDEX_BYTES, PREFERRED, shards_in, weights_among
from service.acquisition.importing import ImportOptions, import_model
from service.acquisition.publishing import PULL_FOLDER
from service.acquisition.pulling import Pulled, PullOptions, is_whole, locked
from service.architecture.variants import VARIANTS
from service.errors import InvalidRequest, PullFailed, ServiceError, StoreNotWritable, reasons
from service.files import staging_folder
from service.store.cards import Origin
from service.store.folder import writing
from service.store.store import Store, StoredModel

MAX_WEIGHTS_BYTES = 8_000_000_000  # of one file: the largest variant in float64 with all that a trainer keeps takes 4
_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(@(?P<revision>[^\s@]{1,200}))?", re.ASCII
)
_NOT_IN_TAGS = re.compile(r"[^A-Za-z0-9_-]+")


class _File(BaseModel):
    rfilename: str


class _CardData(BaseModel):
    license: str | None = None


class _Listing(BaseModel):
    """What the hub's API says of a repository: the commit that a revision means, and the names of its files."""

    sha: str | None = Field(default=None, pattern=r"^[0-9a-f]{4,64}$")
    siblings: list[_File] | None = None
    card: _CardData | None = Field(default=None, alias="cardData")

    @property
    def names(self) -> set[str] | None:
        """The files that lie in no folder."""
        return (
            None if self.siblings is None else {each.rfilename for each in self.siblings if "/" not in each.rfilename}
        )


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the hub: `owner/name`, at a branch, a tag or a commit."""

    name: str
    revision: str = "main"

    @property
    def url(self) -> str:
        """Its page."""
        return f"{HUB}/{self.name}"

    @property
    def tag(self) -> str:
        """The tag of its model unless another is given: its name, but for a variant in front of it."""
        name = self.name.partition("/")[2]
        for variant in sorted(VARIANTS, key=len, reverse=True):
            name = re.sub(f"^{variant}[._-]+", "", name)
        return _NOT_IN_TAGS.sub("-", name).strip("-") or "hub"


def repository(text: str) -> Repository:
    """The repository that `owner/name` or `owner/name@revision` names; raises InvalidRequest for anything else."""
    match = _NAME.fullmatch(text.removeprefix(f"{HUB}/"))
    if match is None or ".." in text:
        raise InvalidRequest(f"{text!r} is no repository of the hub; write owner/name, or owner/name@revision")
    return Repository(match["name"], match["revision"] or "main")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fetch:
    """Fetches the files of a repository, each by itself, so that each is resumed by itself."""

    root: Path
    of: Repository
    options: PullOptions
    stop: Event
    on_progress: Progress
    # Mutable state: the folders of what was fetched, and the bytes of whole files.
    folders: list[Path] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    def file(self, path: str, name: str, *, max_bytes: int, anew: bool = False) -> tuple[Path, Origin]:
        """The file at `path` of the hub, and where it comes from; `anew` discards what an earlier pull left of it."""
        url, token = self.options.address(HUB + path)
        folder = self.root / PULL_FOLDER / f"hub.{self.of.name.replace('/', '--')}.{quote(name, safe='')}"
        if anew:
            discard(folder)
        self.folders.append(folder)
        before = sum(self.done)

        def on_progress(done: int, total: int | None) -> None:
            self.on_progress(before + done, None if total is None else before + total)

        found, origin = Download(
            url=url, folder=folder, root=self.root, token=token, max_bytes=max_bytes, stop=self.stop,
            policy=self.options.policy, on_progress=on_progress,
        ).run()  # fmt: skip
        self.done.append(origin.bytes)
        return found, origin

    def listing(self) -> _Listing:
        """What the hub's API says; nothing where there is no API, as on a plain mirror."""
        path = f"/api/models/{self.of.name}/revision/{quote(self.of.revision, safe='')}"
        try:
            file, _ = self.file(path, "listing", max_bytes=MAX_INDEX_BYTES, anew=True)
            return _Listing.model_validate_json(file.read_bytes())
        except SourceFileMissing:
            return _Listing()
        except ValidationError as error:
            raise PullFailed(f"{self.of.url}: the hub's answer is none that is understood: {reasons(error)}") from error

    def discard(self) -> None:
        """Delete everything that was fetched."""
        for folder in self.folders:
            discard(folder)


def pull_repository(
    root: Path,
    of: Repository,
    options: PullOptions,
    *,
    tag: str | None = None,
    again: bool = False,
    on_progress: Progress = lambda _done, _total: None,
    on_note: Callable[[str], None] = lambda _: None,
    stop: Event | None = None,
) -> Pulled:
    """Put the model in a repository into the store at `root`, unless it is there at that commit.

    `again` pulls it all the same. `on_note` is called with each line of the import's summary.

    Raises:
        PullFailed: it can't be downloaded; the bytes so far are kept for the next time.
        InvalidRequest, WeightsInvalid, WeightsUnavailable: it holds no model that can be served; nothing is kept.
        StoreNotWritable: the store can't be written.
    """
    fetch, tag = _Fetch(root=root, of=of, options=options, stop=stop or Event(), on_progress=on_progress), tag or of.tag
    with locked(root, f"hub.{of.name.replace('/', '--')}", fetch.stop):
        listing = fetch.listing()
        if not again and (present := _present(root, of, listing.sha, tag)):
            fetch.discard()
            return Pulled(present, fresh=False)
        with writing(root):
            staging = staging_folder(root / PULL_FOLDER, "hub-")
        with staging as folder:
            try:
                origin, licence = _files(folder, fetch, listing), listing.card.license if listing.card else None
                requested = ImportOptions(file=folder, tag=tag, licence=licence, source=of.url, origin=origin)
                stored = import_model(root, requested, on_note)
            except PullFailed:
                raise
            except (ServiceError, OSError) as error:
                fetch.discard()
                raise _named(error, folder, of) from error
        fetch.discard()
        return Pulled(stored, fresh=True)


def _present(root: Path, of: Repository, sha: str | None, tag: str) -> StoredModel | None:
    """The whole version that was pulled from this commit under this tag."""
    for versions in Store(root).contents().versions.values() if sha else ():
        for stored in versions:
            card = stored.card
            same = card and card.origin and card.source == of.url and card.origin.revision == sha
            if same and stored.id.partition(".")[2] == tag and is_whole(stored):
                return stored
    return None


def _files(folder: Path, fetch: _Fetch, listing: _Listing) -> Origin:
    """Fetch what the model needs into `folder`, the descriptions first; where the weights come from."""
    base = f"/{fetch.of.name}/resolve/{quote(listing.sha or fetch.of.revision, safe='')}"

    def fetched(name: str, max_bytes: int = MAX_WEIGHTS_BYTES) -> Origin:
        small = max_bytes == MAX_INDEX_BYTES  # the hub has no SHA-256 of what is no weights file
        file, origin = fetch.file(f"{base}/{quote(name, safe='')}", name, max_bytes=max_bytes, anew=small)
        (folder / name).symlink_to(file.absolute())
        return origin.model_copy(update={"revision": listing.sha or origin.revision})

    for name in (CONFIG_FILE, PREPROCESSOR_FILE, CARD_FILE):
        if listing.names is None or name in listing.names:
            with suppress(SourceFileMissing):
                fetched(name, MAX_INDEX_BYTES)
    if (folder / CONFIG_FILE).exists():
        read_config(folder / CONFIG_FILE)  # what can't be served is refused before its weights are fetched
    names = PREFERRED if listing.names is None else (weights_among(listing.names, fetch.of.name)[0],)
    for name in names:
        with suppress(SourceFileMissing):
            if not name.endswith(INDEX_SUFFIX):
                return fetched(name)
            index = fetched(name, MAX_INDEX_BYTES)
            shards = sorted(set(shards_in(folder / name).values()))
            return _of_all(index, [fetched(each) for each in shards], [folder / each for each in shards])
    raise PullFailed(
        f"{fetch.of.url} at {fetch.of.revision}: there is no such repository or revision, or it lacks "
        f"{' and '.join(names)}; check its name, and set HF_TOKEN if it is private"
    )


def _of_all(index: Origin, origins: Sequence[Origin], files: Sequence[Path]) -> Origin:
    """The origin of shards, at the URL of their index; SHA-256 is that of all their bytes, in the order of `files`."""
    digest = sha256()
    for path in files:
        with path.open("rb") as file:
            file_digest(file, lambda: digest)
    checked = all(each.digest_from == "hub" for each in origins)
    fields = {"sha256": digest.hexdigest(), "bytes": sum(each.bytes for each in origins)}
    return index.model_copy(update={**fields, "digest_from": "hub" if checked else "nobody"})


def _named(error: Exception, folder: Path, of: Repository) -> Exception:
    """The error with the repository's name in place of the temporary folder's, and what else can be done."""
    if not isinstance(error, ServiceError) or isinstance(error, StoreNotWritable):
        return error
    advice = f"hf download {of.name} --revision {of.revision} --local-dir DIR, then pvt-serve import DIR, takes options"
    return type(error)(f"{str(error).replace(str(folder), of.name)} ({advice})")
