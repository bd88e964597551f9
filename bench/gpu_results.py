"""What a measurement on a GPU leaves behind, kept as JSON, from which `docs/benchmarks-gpu.md` is made."""

from pydantic import BaseModel, ConfigDict

from bench.results import Closed


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GpuEngine(_Record):
    """One engine with one batch size: images per second of each round, or why there are none.

    `relative` is the largest difference of a logit from float32's, as a share of the greatest of those; `cosine` the
    least cosine similarity of an image's logits with them.
    """

    engine: str
    variant: str
    batch: int
    images_per_second: tuple[float, ...] = ()
    relative: float | None = None
    cosine: float | None = None
    precision: str = ""
    note: str = ""


class GpuPeak(_Record):
    """The best of a large bfloat16 matrix product on the card, in operations per second."""

    flops: float
    side: int


class GpuLimits(_Record):
    """What each station of a request's way could do by itself, in images per second.

    `decode` is of all cores, `copy` of the way of a 224x224 image's pixels onto the card, `compute` of the engine at
    its best batch size.
    """

    variant: str
    decode: float
    copy_to_device: float
    compute: float


class GpuServing(_Record):
    """Closed loops over HTTP against one model and so many worker processes, in rounds."""

    model: str
    workers: int
    loops: tuple[Closed, ...]


class GpuResults(_Record):
    """All of it. `flops` is operations per image by variant."""

    card: str = ""
    machine: dict[str, str] = {}
    versions: dict[str, str] = {}
    commands: tuple[str, ...] = ()
    peak: GpuPeak | None = None
    flops: dict[str, int] = {}
    engines: tuple[GpuEngine, ...] = ()
    limits: tuple[GpuLimits, ...] = ()
    serving: tuple[GpuServing, ...] = ()
