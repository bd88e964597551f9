"""LitServe given our own graph: the same fixed-shape OpenVINO graphs, one for each batch size, in our precision.

One worker on all cores, or with `--worker-per-core` a worker of one thread on each.
"""

import sys
from typing import Any

import litserve
import numpy as np
import torch
from fastapi import Request
from numpy.typing import NDArray
from starlette.formparsers import MultiPartParser

from bench.ours import Graphs
from bench.peers.common import BATCH, BATCH_WAIT_SECONDS, answers, crop, port, store
from service.machine import usable_cores

MultiPartParser.spool_max_size = sys.maxsize  # see litserve_eager


class Classifier(litserve.LitAPI):
    """The whole of the peer."""

    def setup(self, device: str) -> None:  # noqa: ARG002  LitServe's signature
        """Called once in each worker."""
        self.graphs = Graphs(store(), BATCH, threads=max(1, usable_cores() // WORKERS))

    def decode_request(self, request: Request) -> NDArray[np.uint8]:
        """One image's input, of the request's form; normalisation is part of the graph."""
        return crop(request["image"].file.read())

    def batch(self, inputs: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """(n, 224, 224, 3)."""
        return np.stack(inputs)

    def predict(self, batch: NDArray[np.uint8]) -> list[dict[str, Any]]:
        """The answers to a stacked batch."""
        return answers(torch.from_numpy(self.graphs.logits(batch)))

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """They are a list already."""
        return output


WORKERS = usable_cores() if "--worker-per-core" in sys.argv else 1

if __name__ == "__main__":
    api = Classifier(max_batch_size=BATCH, batch_timeout=BATCH_WAIT_SECONDS)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS)
    server.run(port=port(), host="127.0.0.1", generate_client_file=False)
