"""The names of the classes of ImageNet-1k, which all published checkpoints have."""

from functools import cache
from importlib.resources import files

IMAGENET = "imagenet"  # what stands for all of them on a command line
_FILE = "data/imagenet1k.tsv"


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """WordNet synset and name of each class, in the order of the checkpoints' heads."""
    lines = files("service").joinpath(_FILE).read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return tuple((synset, name) for synset, name in rows)


def imagenet_labels() -> tuple[str, ...]:
    """The name of each class."""
    return tuple(name for _, name in imagenet_classes())
