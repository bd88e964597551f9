"""The ways to share out the cores of a CPU, and how long finding the best may take."""

from collections.abc import Sequence

from service.backends.base import Layout

# A first load may spend so long on compiling and timing; what would take longer is left out and noted.
TUNING_SECONDS = 10.0


def base_layout(instances: int, cores: int) -> Layout:
    """An even share of the cores for each instance."""
    return Layout(instances, max(1, cores // instances))


def layouts(base: Layout, cores: int) -> Sequence[Layout]:
    """`base`, and others that use all `cores`: by halves down to one stream where `base` has one for each core.

    Where the number of instances was chosen by hand, one stream on all cores is left, for a lone image.
    """
    threads = [1 << i for i in range(1, cores.bit_length())] if base.streams == cores else []
    others = [Layout(cores // each, each) for each in threads if cores % each == 0]
    return tuple(dict.fromkeys([base, *others, Layout(1, cores)]))
