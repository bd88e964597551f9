"""mosec as its examples write it: a stage that prepares and one that infers in batches, a process a core for each."""

import os
import sys
from typing import Any

import numpy as np
import torch
from mosec import Server, Worker
from numpy.typing import NDArray

from bench.peers.common import BATCH, BATCH_WAIT_SECONDS, classify, make_model, port, prepare
from service.machine import usable_cores


class Prepare(Worker):
    """Takes the raw body."""

    def deserialize(self, data: bytes) -> bytes:
        """The body is the image."""
        return data

    def forward(self, data: bytes) -> NDArray[np.float32]:
        """One image's input."""
        pixels: NDArray[np.float32] = prepare(data).numpy()
        return pixels


class Infer(Worker):
    """Answers in batches, as JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def forward(self, data: list[NDArray[np.float32]]) -> list[dict[str, Any]]:
        """The answers to a batch."""
        return classify(self.model, torch.from_numpy(np.stack(data)))


if __name__ == "__main__":
    os.environ.setdefault("MOSEC_LOG_LEVEL", "warning")
    listen = port()
    sys.argv = [sys.argv[0], "--address", "127.0.0.1", "--port", str(listen), "--timeout", "60000"]
    server = Server()
    server.append_worker(Prepare, num=usable_cores())
    wait = int(BATCH_WAIT_SECONDS * 1000)
    server.append_worker(Infer, num=usable_cores(), max_batch_size=BATCH, max_wait_time=wait)
    server.run()
