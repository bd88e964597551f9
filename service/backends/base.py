"""What every backend offers: from a served module it makes a program, and from that a graph for each batch size."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.weights import load_weights
from service.errors import CardInvalid, DeviceFailed
from service.results import Floats, Head, Pixels
from service.store.cards import Colours, ModelCard

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Batch = NDArray[np.uint8]  # (n, height, width, 3)
Images = Batch | Sequence[Pixels]
Blob = NDArray[np.uint8]  # (bytes,)


class Served(nn.Module):
    """The model as it is served: uint8 pixels (n, height, width, 3) in, logits, embedding and maps of `stages` out.

    Pixels are RGB. It normalises them itself, in the order of the model's channels, so that a backend compiles that
    into its graph. Without a head there are no logits.
    """

    def __init__(
        self,
        model: PVT_V2,
        mean: Sequence[float],
        std: Sequence[float],
        stages: Sequence[int] = (),
        colours: Colours = "rgb",
    ) -> None:
        super().__init__()
        self.model = model
        self.reversed = colours == "bgr"
        self.stages = tuple(stages)
        self.mean = nn.Buffer(255 * torch.tensor(mean))
        self.scale = nn.Buffer(1 / (255 * torch.tensor(std)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits (n, classes), embedding (n, channels) and stage maps (n, channels, height, width) of `pixels`."""
        return self.outputs(self.normalised(pixels))

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """The same of the model's input: images (n, 3, height, width)."""
        logits, embedding, maps = self.model.forward_all(images, self.stages)
        return (logits, embedding, *maps) if isinstance(self.model.head, nn.Linear) else (embedding, *maps)

    def normalised(self, pixels: Tensor) -> Tensor:
        """The model's input for `pixels`: float32 images (n, 3, height, width)."""
        pixels = pixels.flip(-1) if self.reversed else pixels
        return ((pixels.float() - self.mean) * self.scale).permute(0, 3, 1, 2)

    def head(self) -> Head | None:
        """A copy of the model's last layer; None where it has no head."""
        head = self.model.head
        if not isinstance(head, nn.Linear):
            return None
        return Head(head.weight.detach().numpy().copy(), head.bias.detach().numpy().copy())


def build(card: ModelCard, folder: Path, stages: Sequence[int] = ()) -> Served:
    """The module of `card` with the weights in `folder`, in plain float32.

    Raises CardInvalid if card and weights differ in the number of parameters, else what `load_weights` raises.
    """
    # On the meta device the module costs no memory and no random numbers: every tensor comes from the file.
    with torch.device("meta"):
        model = create(card.variant, num_classes=len(card.labels))
    load_weights(model, folder / card.weights.file, sha256=card.weights.sha256)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != card.parameters:
        raise CardInvalid(f"{folder}: the card says {card.parameters} parameters, the weights have {parameters}")
    pixels = card.preprocessing
    return Served(model, pixels.mean, pixels.std, stages, pixels.colours).eval()


@torch.inference_mode()
def plain_logits(module: Served, images: Batch) -> Floats:
    """Logits (n, classes) of the module itself, eager and in float32; without a head, embeddings (n, channels)."""
    logits: Floats = module(torch.tensor(images))[0].numpy()
    return logits


class Layout(NamedTuple):
    """How cores are shared out: `streams` batches run at a time, each on `threads` cores; on a GPU that is 1."""

    streams: int
    threads: int


class Graph(Protocol):
    """A module compiled for batches of one fixed shape; `precision` is what it really computes in."""

    precision: Precision

    def run(self, instance: int, images: Images) -> tuple[Floats, ...]:
        """Logits (n, classes), embedding (n, channels), and the stage maps that the module returns.

        Without a head there are no logits. There may be fewer images than the batch size; rows after theirs
        mean nothing. Each `instance` makes one call at a time. Raises OutOfMemory if the batch does not fit.
        """
        ...

    def export(self) -> bytes | None:
        """Its compiled form, from which `Backend.restore` makes it again; None if it has none."""
        return None


@dataclass(frozen=True, slots=True)
class OptimizedGraphs:
    """Makes faster graphs by batch size, once `prepare` has done what takes minutes, or until its event is set."""

    prepare: Callable[[int, Precision, Event], None]
    graph: Callable[[int, Precision], Graph]


@dataclass(frozen=True, slots=True)
class Program:
    """Makes the graphs of a module by batch size, with errors of the backend's own; `optimized` makes faster ones."""

    graph: Callable[[int, Layout, Precision], Graph]
    optimized: OptimizedGraphs | None = None


class Backend(Protocol):
    """Executes modules on `instances` executors, each of which runs one batch at a time.

    `device` is `cpu`, or torch's names of GPUs. `precisions` are those worth trying there, the most promising first,
    float32 always last. A first load may compile and measure for `tuning_seconds`, and compares precisions in batches
    of `probe_size`.
    """

    name: str
    version: str
    device: str
    instances: int
    precisions: tuple[Precision, ...]
    tuning_seconds: float
    probe_size: int

    @property
    def restore(self) -> Callable[[Blob, Layout, Precision], Graph] | None:
        """Makes a graph from its exported form, and may keep that. None: its graphs have no such form."""
        return None

    def layouts(self, cores: int) -> Sequence[Layout]:
        """The layouts to choose from on `cores`; the first has a stream for each instance."""
        ...

    def memory_bytes(self) -> int:
        """Memory in use where models lie, of models and all else, after free memory was returned."""
        ...

    def program(self, module: Served, height: int, width: int) -> Program:
        """The program of `module` for images of `height` x `width`; it may replace the module's weights by others."""
        ...


class DeviceHealth:
    """The one place that knows whether a GPU failed; from then on none is expected to work. From any thread."""

    def __init__(self) -> None:
        # Mutable state: the first failure; empty while there is none.
        self.failure = ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note a `DeviceFailed` that the block raises, if it is the first."""
        try:
            yield
        except DeviceFailed as error:
            self.failure = self.failure or str(error)
            raise
