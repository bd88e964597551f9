"""Golden outputs: whatever runs a model must give the logits that plain float32 gives for its reference images.

The images and logits are the card's, or, where it names none, made from synthetic pictures when the model is first
loaded and kept with its batch plan.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np

from service.backends.base import Graph
from service.errors import GoldenMismatch
from service.execution.reference import Deviation, Reference
from service.execution.tuning import Tuned

# What checking all images may add to a load from the plan cache; where it would take longer, fewer are checked.
RESTORED_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Golden:
    """Checks graphs against `reference`."""

    reference: Reference

    def check(self, graph: Graph, size: int, count: int = 1) -> Deviation:
        """Run `graph`, made for batches of `size`, on the first `count` images or as many as fill its batches.

        Raises:
            GoldenMismatch: its logits are too far off for the precision it computes in; the message says how far.
        """
        images = self.reference.images
        numbers = [i % len(images) for i in range(ceil(count / size) * size)]
        batches = [images[numbers[i : i + size]] for i in range(0, len(numbers), size)]
        logits = np.concatenate([graph.run(0, batch)[0] for batch in batches])
        deviation = self.reference.deviation(logits, numbers)
        if objection := deviation.objection(graph.precision):
            raise GoldenMismatch(f"{objection} ({graph.precision}, batches of {size}: {deviation})")
        return deviation

    def check_all(self, tuned: Tuned, *, restored: bool = False) -> Deviation:
        """Check each graph of `tuned`; the furthest off of them.

        All images are tried, or, in graphs `restored` from the plan cache, whose bytes are known to be those that were
        checked when they were made, as many as `RESTORED_SECONDS` allow and at least one batch in each graph.

        Raises:
            GoldenMismatch: as `check`.
        """
        n = len(self.reference.images)
        few = max(1, min(n, int(RESTORED_SECONDS / tuned.plan.time(1))))
        counts = {size: n if not restored else few if size == 1 else 1 for size in tuned.graphs}
        checked = [self.check(graph, size, counts[size]) for size, graph in tuned.graphs.items()]
        return max(checked, key=lambda each: each.relative)
