"""The published ImageNet-1k weights as data: for each variant, the public URLs of its file; and the classes' names."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import ClassVar, Literal

from service.architecture.variants import VARIANTS, Dialect
from service.errors import InvalidRequest, ModelNotFound
from service.store.cards import Accuracy
from service.store.store import DEFAULT_TAG

SourceName = Literal["timm", "opengvlab", "official", "lucid"]
DEFAULT_SOURCE: SourceName = "timm"
IMAGENET = "imagenet"  # on a command line: the labels of ImageNet-1k
LICENCE = "Apache-2.0"  # of the official release and of timm's copies, as their pages say
PREPROCESSOR_FILE = "preprocessor_config.json"  # of transformers' repositories
SIDE, CLASSES = 224, 1000
HUB = "https://huggingface.co"

_RELEASE = "https://github.com/whai362/PVT/releases/download/v2"
_CLASSES_FILE = "data/imagenet1k.tsv"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A weights file: the library whose model it is, its possible URLs, tried in turn, and its published SHA-256.

    `preprocessor` is the URL of the file beside it that describes the preprocessing, if there is one.
    """

    library: Dialect
    urls: tuple[str, ...]
    sha256: str | None = None
    preprocessor: str | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """A variant with ImageNet-1k weights. `top1` is the accuracy that its authors give, as a share of 1."""

    variant: str
    parameters: int
    top1: float
    files: Mapping[SourceName, RemoteFile]
    num_classes: ClassVar[int] = CLASSES
    input_size: ClassVar[tuple[int, int]] = SIDE, SIDE
    licence: ClassVar[str] = LICENCE

    @property
    def id(self) -> str:
        """Its name in a store."""
        return f"{self.variant}.{DEFAULT_TAG}"

    @property
    def accuracy(self) -> Accuracy:
        """The accuracy, for a card."""
        return Accuracy(dataset="ImageNet-1k validation, as published", top1=self.top1, images=50_000)

    def file(self, source: SourceName) -> RemoteFile:
        """Its file at `source`.

        Raises:
            InvalidRequest: `source` has none.
        """
        if source not in self.files:
            raise InvalidRequest(f"{source} has no {self.variant}; these have: {', '.join(self.files)}")
        return self.files[source]


def _published(variant: str, parameters: int, top1: float, lucid_sha256: str | None) -> Published:
    name = variant.removeprefix("pvt_v2_")
    timm = f"{HUB}/timm/{variant}.in1k/resolve/main"
    opengvlab = f"{HUB}/OpenGVLab/pvt_v2_{'b2_linear' if name == 'b2_li' else name}/resolve/main"
    lucid = f"{HUB}/lucid-dl/pvt-v2-{name}/resolve/main/IN1K"
    files: dict[SourceName, RemoteFile] = {
        "timm": RemoteFile("timm", (f"{timm}/model.safetensors",)),
        "opengvlab": RemoteFile(
            "transformers",
            (f"{opengvlab}/model.safetensors", f"{opengvlab}/pytorch_model.bin"),
            preprocessor=f"{opengvlab}/{PREPROCESSOR_FILE}",
        ),
        "official": RemoteFile("official", (f"{_RELEASE}/{variant}.pth",)),
    }
    if lucid_sha256:
        files["lucid"] = RemoteFile("lucid", (f"{lucid}/model.safetensors",), lucid_sha256)
    return Published(variant, parameters, top1, MappingProxyType(files))


_ROWS = (
    ("pvt_v2_b0", 3_666_760, 0.705, "a511e23835b9b510bc02436d27c49dc306c97dd3b627fdc70fcbac14d5b2c771"),
    ("pvt_v2_b1", 14_009_000, 0.787, "64e479955a1a8a644b8a5bf0e95b125235fa6268cc1148998273e503d28c3782"),
    ("pvt_v2_b2", 25_362_856, 0.820, "00fc4d873e5cfc8e57bb9471ffa1a2b142c0bb465bfc0a02dd347ad1812a4b71"),
    ("pvt_v2_b2_li", 22_553_512, 0.821, None),
    ("pvt_v2_b3", 45_238_696, 0.831, "9aebf5a6685261a41a72495724752e16a4b8d02c6e7a0977adc77cd7921dfb74"),
    ("pvt_v2_b4", 62_556_072, 0.836, "2e411209ef6a4807c09cf2decca4711236ed888dbe211645a83b0c2bf26220be"),
    ("pvt_v2_b5", 81_956_008, 0.838, "d9636f599bff05ee39f8c74810ffd2bda99c75fef941278df32f9ba515bc4a09"),
)
CATALOGUE: Mapping[str, Published] = MappingProxyType({row[0]: _published(*row) for row in _ROWS})


def published(name: str) -> Published:
    """The entry for a variant's name, its short form (`b2`) or a model's id.

    Raises:
        ModelNotFound: there is none.
    """
    variant = variant_named(name.removesuffix(f".{DEFAULT_TAG}"))
    if variant not in CATALOGUE:
        raise ModelNotFound(f"no published weights are known for {name!r}; there are: {', '.join(CATALOGUE)}")
    return CATALOGUE[variant]


def variant_named(name: str) -> str:
    """`pvt_v2_b2` for `b2`, and for `pvt_v2_b2`; any other name as it is."""
    return f"pvt_v2_{name}" if f"pvt_v2_{name}" in VARIANTS else name


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """WordNet synset and name of each class of ImageNet-1k, in the order of the checkpoints' heads."""
    lines = files("service").joinpath(_CLASSES_FILE).read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return tuple((synset, name) for synset, name in rows)


def imagenet_labels() -> tuple[str, ...]:
    """The name of each class of ImageNet-1k."""
    return tuple(name for _, name in imagenet_classes())
