"""What loading a model takes, in bytes and seconds: as measured before, else estimated."""

import re
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.store.stored import StoredModel

log = structlog.get_logger(component="footprints")

# For a model that was never loaded here, as measured (docs/operations.md). Compiled graphs keep the weights and one
# repacked copy for each batch size; that there is but one is assumed, since what is guessed too large is never tried.
BYTES_PER_PARAMETER = {"torch": 4, "compiled": 12}  # "torch" on a GPU too, where half of it is weights in 16 bits
SECONDS, SECONDS_PER_PARAMETER = 2.0, 1.5e-7


class Footprint(BaseModel):
    """Resident bytes and seconds of a load; `measured` unless it is a guess."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    measured: bool = True


class Footprints:
    """Remembers a footprint for each model version, in `folder` too if there is one. Its methods belong to one thread.

    `kind` tells apart what makes the same model take more or less: backend, precision, instances; `compiled` whether
    models are.
    """

    def __init__(self, folder: Path | None, kind: str = "", *, compiled: bool = True) -> None:
        self._folder = folder / "footprints" if folder else None
        self._kind = re.sub(r"[^\w.-]", "_", kind)
        self._per_parameter = BYTES_PER_PARAMETER["compiled" if compiled else "torch"]
        # Mutable state: what is known, by model version; None where the disk has nothing.
        self._known: dict[str, Footprint | None] = {}

    def of(self, stored: StoredModel) -> Footprint:
        """What a load of `stored` took last, else an estimate."""
        if stored.key not in self._known:
            self._known[stored.key] = self._read(stored)
        return self._known[stored.key] or self._estimate(stored)

    def remember(self, stored: StoredModel, footprint: Footprint) -> None:
        """Take note of what was measured. A folder that can't be written is no error."""
        self._known[stored.key] = footprint
        if (path := self._path(stored)) is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft = path.with_suffix(".draft")
            draft.write_text(footprint.model_dump_json() + "\n")
            draft.replace(path)
        except OSError as error:
            log.warning("footprint_not_written", model=stored.id, file=str(path), reason=str(error))

    def _read(self, stored: StoredModel) -> Footprint | None:
        if (path := self._path(stored)) is None:
            return None
        try:
            return Footprint.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None

    def _path(self, stored: StoredModel) -> Path | None:
        return self._folder / f"{stored.key}.{self._kind}.json" if self._folder else None

    def _estimate(self, stored: StoredModel) -> Footprint:
        parameters = stored.card.parameters if stored.card else 0
        seconds = SECONDS + SECONDS_PER_PARAMETER * parameters
        return Footprint(bytes=self._per_parameter * parameters, seconds=seconds, measured=False)
