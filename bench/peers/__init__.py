"""Servers to measure side by side: ours, and the peers as their users write them, one small module each."""

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from bench.bodies import Form


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that can be started: `command` with `{port}` and `{store}` to fill in, asked by POST to `path`.

    It is ready when it answers a image with 200. `needs` are the packages that it takes, by distribution name;
    `environment` is added to ours, and
    `configured` says for the report how it is set up.
    """

    name: str
    title: str
    command: tuple[str, ...]
    form: Form
    needs: tuple[str, ...]
    configured: str
    path: str = "/predict"
    environment: tuple[tuple[str, str], ...] = ()

    def argv(self, port: int, store: str) -> list[str]:
        """The command, filled in."""
        return [sys.executable, *(part.format(port=port, store=store) for part in self.command)]

    def missing(self) -> list[str]:
        """Those of `needs` that are not installed."""
        return [name for name in self.needs if not _version(name)]

    def versions(self) -> str:
        """Its packages with their versions."""
        return ", ".join(f"{name} {_version(name)}" for name in self.needs)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _peer(module: str) -> tuple[str, ...]:
    return "-m", f"bench.peers.{module}", "--port", "{port}", "--store", "{store}"


# Where several threads or processes infer at the same time: more threads than cores would wait for each other.
_ONE_THREAD = (("OMP_NUM_THREADS", "1"),)
_EAGER = "transformers' model, eager, float32"
_FORM = "the image as a file of a multipart form"
_RAW = "the image as the raw body"

OURS = Contender(
    "ours",
    "pvt-serve",
    ("-m", "app"),
    "multipart",
    ("fastapi", "openvino"),
    f"no setting changed; {_FORM}",
)
CONTENDERS: tuple[Contender, ...] = (
    OURS,
    Contender(
        "litserve",
        "LitServe",
        _peer("litserve_eager"),
        "multipart",
        ("litserve", "torch", "transformers"),
        f"{_EAGER}; max_batch_size 8, batch_timeout 10 ms, one worker, torch's own choice of threads; {_FORM}",
    ),
    Contender(
        "litserve-graph",
        "LitServe + our graph",
        _peer("litserve_graph"),
        "multipart",
        ("litserve", "openvino"),
        "our fixed-shape OpenVINO graph for each batch size from 1 to 8, in our precision; max_batch_size 8, "
        f"batch_timeout 10 ms, one worker that uses all cores; {_FORM}",
    ),
    Contender(
        "litserve-graph-workers",
        "LitServe + our graph, a worker per core",
        (*_peer("litserve_graph"), "--worker-per-core"),
        "multipart",
        ("litserve", "openvino"),
        f"the same with workers_per_device = cores and one thread for each, which its guides do not do; {_FORM}",
    ),
    Contender(
        "mosec",
        "mosec",
        _peer("mosec_eager"),
        "raw",
        ("mosec", "torch", "transformers"),
        f"{_EAGER}; a stage of preparing processes, then one of inferring ones, one process of each for every core, "
        f"OMP_NUM_THREADS 1, max_batch_size 8, max_wait_time 10 ms; {_RAW}",
        path="/inference",
        environment=_ONE_THREAD,
    ),
    Contender(
        "ray",
        "Ray Serve",
        _peer("ray_batch"),
        "raw",
        ("ray", "torch", "transformers"),
        f"{_EAGER}; @serve.batch with max_batch_size 8, batch_wait_timeout_s 0.01, max_ongoing_requests 100, one "
        f"replica of one CPU for each core, for which Ray sets one thread; {_RAW}",
    ),
    Contender(
        "fastapi",
        "FastAPI",
        _peer("fastapi_plain"),
        "multipart",
        ("fastapi", "torch", "transformers"),
        f"{_EAGER}; in a plain endpoint, so on Starlette's thread pool, no batching, OMP_NUM_THREADS 1; {_FORM}",
        environment=_ONE_THREAD,
    ),
)
QUICK = ("ours", "litserve", "litserve-graph")


def chosen(names: tuple[str, ...]) -> list[Contender]:
    """The contenders called `names`, in the registry's order.

    Raises:
        ValueError: there is none of that name.
    """
    known = {contender.name for contender in CONTENDERS}
    if unknown := set(names) - known:
        raise ValueError(f"no contender {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return [contender for contender in CONTENDERS if contender.name in names]
