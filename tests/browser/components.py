"""Colours of feature maps as numpy's singular value decomposition has them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def off_from_components(shown: Sequence[NDArray[Any]], maps: Sequence[NDArray[Any]]) -> float:
    """The largest difference of colours `shown`, each (height, width, 3), from the components of all `maps` together.

    A component's sign is free; it is the same in all of them.
    """
    rows = np.concatenate([each.astype(np.float64).reshape(len(each), -1).T for each in maps])
    colours = np.concatenate([each.reshape(-1, 3) for each in shown])
    left, values, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    scores = (left * values)[:, :3]
    scaled = 255 * (scores - scores.min(axis=0)) / np.ptp(scores, axis=0)
    return float(np.minimum(np.abs(colours - scaled).max(axis=0), np.abs(colours - (255 - scaled)).max(axis=0)).max())
