"""What a measurement leaves behind: plain records, kept as JSON, from which the report is made."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from service.files import atomic_write


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Closed(_Record):
    """One closed loop of `clients` connections; `failed` counts answers other than 2xx and 3xx, and broken connections.

    `cpu_ms` is processor time of the server per answered image.
    """

    clients: int
    images_per_second: float
    p50_ms: float
    p99_ms: float
    requests: int
    failed: int
    cpu_ms: float = 0.0


class Open(_Record):
    """One open loop: `sent` requests at `offered` per second, latencies from the intended send time.

    Percentiles are over all that were answered with 200, and those unanswered at the end with their wait so far.
    `lag_ms` is how late the generator itself was (p99), `generator_cpu` the share of a core that it took.
    """

    offered: float
    sent: int
    answered: int
    refused: int
    broken: int
    unanswered: int
    p50_ms: float
    p99_ms: float
    lag_ms: float
    generator_cpu: float

    @property
    def failed(self) -> int:
        """Requests without a good answer."""
        return self.sent - self.answered


class Visit(_Record):
    """One server's turn in a round; `large` is the closed loop over 12-megapixel images."""

    closed: tuple[Closed, ...] = ()
    open: tuple[Open, ...] = ()
    large: Closed | None = None
    resident_mb: float = 0.0
    start_seconds: float = 0.0

    def at(self, clients: int) -> Closed | None:
        """The closed loop of `clients` connections."""
        return next((loop for loop in self.closed if loop.clients == clients), None)


class Round(_Record):
    """Every server's turn, by its name, and the bare loop's images per second in the same minutes.

    `busy` is the share of the cores (0 to 1) that others had in use just before.
    """

    bare: float
    busy: float = 0.0
    visits: dict[str, Visit]


class Costs(_Record):
    """Processor milliseconds per image on one thread, measured alone: of ours, and of a peer's way."""

    precision: str
    decode_ms: float
    infer_ms: float
    peer_decode_ms: float
    peer_infer_ms: float
    peer_graph_decode_ms: float


class Peak(_Record):
    """The most floating-point operations per second seen in a large matrix product on `threads` threads."""

    precision: str
    threads: int
    flops: float
    by: str


class Engine(_Record):
    """Milliseconds per image of one engine; `threads` is 1, or the machine's cores. `note` says why there are none."""

    engine: str
    variant: str
    batch: int
    threads: int
    ms: float | None
    note: str = ""


class Model(_Record):
    """One model as its server loads and runs it: `rates` are images per second with 8 clients, one for each round.

    The first load compiles and measures; the cached one restores what the first one kept.
    """

    parameters: int
    weights_bytes: int
    first_load_seconds: float
    cached_load_seconds: float
    memory_bytes: int | None = None
    rates: tuple[float, ...]


class Start(_Record):
    """Of our server with the embedded model: process start to first prediction, and resident memory then."""

    seconds: float
    megabytes: float


class Results(_Record):
    """All runs on one machine; rounds and engine figures grow from call to call."""

    machine: dict[str, str] = {}
    cores: int = 1
    versions: dict[str, str] = {}
    commands: tuple[str, ...] = ()
    seconds: int = 0
    skipped: dict[str, str] = {}
    starts: tuple[Start, ...] = ()
    rounds: tuple[Round, ...] = ()
    costs: tuple[Costs, ...] = ()
    peaks: tuple[Peak, ...] = ()
    flops: dict[str, int] = {}
    engines: tuple[Engine, ...] = ()
    models: dict[str, Model] = {}

    @property
    def kind(self) -> str:
        """The kind of processor they were measured on, as folders are named."""
        return "with-bfloat16" if self.machine.get("bfloat16") == "native" else "without-bfloat16"


def read(path: Path) -> Results:
    """The results at `path`; empty ones where there is no such file."""
    return Results.model_validate_json(path.read_bytes()) if path.exists() else Results()


def write(path: Path, results: Results) -> None:
    """Put them there, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, results.model_dump_json(indent=1) + "\n")
