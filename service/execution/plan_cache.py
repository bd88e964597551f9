"""The outcome of a tuning on disk, with the compiled graphs, so that a second start neither compiles nor measures.

<root>/<model>/<version>/plan.json
<root>/<model>/<version>/1.graph      the compiled graph for batches of 1, as the backend exported it
<root>/<model>/<version>.plan.json    a plan that was imported
<root>/<model>/<version>/reference.safetensors      reference images and logits, where the card names none

Each version of a model has one entry, which bounds the cache, for exactly one key. An entry that is broken or has
another key is ignored, with a log line that says why, and replaced.
"""

import hashlib
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import structlog
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.backends.base import Layout, Precision
from service.files import atomic_write, staging_folder
from service.machine import usable_cores
from service.store.cards import ReferenceFile

log = structlog.get_logger(component="plan_cache")

_FILE = "plan.json"
# Of the key, what must be the same where a plan is used that another machine measured.
PORTABLE = ("weights", "card", "input", "backend", "instances", "cores")
_CHUNK = 1 << 24  # bytes
_INSTRUCTION_SETS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")

Key = Mapping[str, str]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CachedPlan(BaseModel):
    """One entry: `graphs` has the digest of each size's file, `alone_...` is the latency graph's.

    `reference` is the file beside it with reference images and logits, if there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: dict[str, str]
    precision: Precision
    layout: Layout
    seconds: Annotated[dict[int, Positive], Field(min_length=1)]
    alone_seconds: Positive | None
    alone_layout: Layout | None
    notes: tuple[str, ...]
    graphs: dict[int, str]
    reference: ReferenceFile | None = None


class PortablePlan(BaseModel):
    """A batch plan for replicas, so that all of them agree on it and none measures.

    `requires` is what must be the same there: see `PORTABLE`. `measured_on` is a processor, for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["pvt-serve plan 1"] = "pvt-serve plan 1"
    model: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    version: Annotated[str, Field(pattern=r"^[1-9]\d*$")]
    requires: dict[str, str]
    measured_on: str = ""
    precision: Precision
    layout: Layout
    seconds: Annotated[dict[Annotated[int, Field(ge=1)], Positive], Field(min_length=1)]
    alone_seconds: Positive | None
    alone_layout: Layout | None

    def differences(self, key: Key) -> str:
        """What of `key` is not as it requires; empty where all is."""
        names = [name for name in PORTABLE if self.requires.get(name) != key[name]]
        return "; ".join(f"{name} was {self.requires.get(name, '')[:64]!r} and is {key[name][:64]!r}" for name in names)


class PlanCache:
    """The cache in the folder `root`, which is made when needed. A failure to write it is logged, and no error."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, model: str, version: str) -> Path:
        """The folder of that model version's entry."""
        return self.root / model / version

    def has(self, model: str, version: str) -> bool:
        """Whether there is an entry, valid or not."""
        return (self.folder(model, version) / _FILE).is_file()

    def read(self, model: str, version: str, key: Key) -> tuple[CachedPlan, dict[int, Path]] | None:
        """The entry for `key` and its verified graph files by batch size; None when there is no valid one."""
        folder = self.folder(model, version)
        try:
            entry = CachedPlan.model_validate_json((folder / _FILE).read_bytes())
            paths = {size: folder / f"{size}.graph" for size in entry.graphs}
            _verify(entry, key, paths)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = "plan.json does not fit its schema" if isinstance(error, ValidationError) else str(error)
            log.warning("plan_cache_ignored", model=model, folder=str(folder), reason=reason)
            return None
        return entry, paths

    def pinned(self, model: str, version: str) -> PortablePlan | None:
        """The plan that was imported for that model version; raises ValueError if its file is broken."""
        try:
            return PortablePlan.model_validate_json(self._pinned_file(model, version).read_bytes())
        except FileNotFoundError:
            return None

    def pin(self, model: str, version: str, plan: PortablePlan | None) -> None:
        """Use `plan` for that model version from the next load on; None: measure again."""
        file = self._pinned_file(model, version)
        if plan is None:
            file.unlink(missing_ok=True)
        else:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.parent.mkdir(exist_ok=True)
            atomic_write(file, plan.model_dump_json(indent=2) + "\n")

    def _pinned_file(self, model: str, version: str) -> Path:
        return self.root / model / f"{version}.plan.json"

    def write(
        self,
        model: str,
        version: str,
        entry: CachedPlan,
        graphs: Iterable[tuple[int, bytes | NDArray[np.uint8] | None]],
        others: Mapping[str, bytes] = {},
    ) -> None:
        """Replace that model version's entry by `entry`, `graphs` and other files, all at once.

        Each graph, by its batch size, is fetched when the one before it is written: together they take as much memory
        as several models. Where one is None, nothing is written. The digests in `entry` are computed here.
        """
        folder, digests = self.folder(model, version), {}
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.parent.mkdir(exist_ok=True)
            with staging_folder(folder.parent, ".new-") as staged:
                for size, blob in graphs:
                    if blob is None:
                        return
                    (staged / f"{size}.graph").write_bytes(blob.data if isinstance(blob, np.ndarray) else blob)
                    digests[size] = digest(blob)
                    del blob
                for name, content in others.items():
                    (staged / name).write_bytes(content)
                whole = entry.model_copy(update={"graphs": digests})
                (staged / _FILE).write_text(whole.model_dump_json(indent=2) + "\n")
                shutil.rmtree(folder, ignore_errors=True)
                staged.rename(folder)
        except OSError as error:
            log.warning("plan_cache_not_written", model=model, folder=str(folder), reason=str(error),
                        hint="PVT_CACHE_DIR names the folder; empty, nothing is kept")  # fmt: skip


def _verify(entry: CachedPlan, key: Key, paths: Mapping[int, Path]) -> None:
    """Raise ValueError if `entry` was made for another key, or its graphs in `paths` are damaged."""
    names = sorted(name for name in {*entry.key, *key} if entry.key.get(name) != key.get(name))
    changes = [f"{name} was {entry.key.get(name, '')[:64]!r} and is {key.get(name, '')[:64]!r}" for name in names]
    if changes:
        raise ValueError("made for another key: " + "; ".join(changes))
    if set(paths) != set(entry.seconds):
        raise ValueError("its graphs are not those of its sizes")
    for size, path in paths.items():
        if digest(np.memmap(path, np.uint8, "r") if path.stat().st_size else b"") != entry.graphs[size]:
            raise ValueError(f"{path.name} is corrupt")


def digest(data: bytes | NDArray[np.uint8]) -> str:
    """SHA-256, in hexadecimal, of the SHA-256 digests of the data's chunks, which all cores compute."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    chunks = [view[start : start + _CHUNK] for start in range(0, len(view), _CHUNK)]
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="pvt-digest") as pool:
        return hashlib.sha256(b"".join(pool.map(lambda chunk: hashlib.sha256(chunk).digest(), chunks))).hexdigest()


@cache
def machine() -> dict[str, str]:
    """What a plan depends on besides the model and the settings: the processor, and this service's own code."""
    return {"cpu": _processor(), "code": code_digest(Path(__file__).parent.parent)}


def code_digest(service: Path) -> str:
    """SHA-256 of the names and contents of all modules in `service`, so that nobody has to list those that matter."""
    parts = [(path.relative_to(service).as_posix(), path.read_bytes()) for path in sorted(service.rglob("*.py"))]
    return hashlib.sha256(b"".join(f"{name} {len(data)}\n".encode() + data for name, data in parts)).hexdigest()


def _processor() -> str:
    """The processor's name and a digest of the instruction sets it may use.

    Virtual machines with the same name may differ in these, and so may processes, because of environment variables.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    pairs = [line.partition(":") for line in reversed(lines)]  # of several processors, the first
    known = {name.strip(): value.strip() for name, _, value in pairs}
    allowed = [f"{name}={os.environ.get(name, '')}" for name in _INSTRUCTION_SETS]
    features = " ".join([*sorted(known.get("flags", known.get("Features", "")).split()), *allowed])
    return f"{known.get('model name', platform.machine())} {digest(features.encode())[:12]}"
