"""LitServe as its guides write it: prepare in `decode_request`, batching on, the eager model in one worker."""

import sys
from typing import Any

import litserve
import torch
from fastapi import Request
from starlette.formparsers import MultiPartParser

from bench.peers.common import BATCH, BATCH_WAIT_SECONDS, classify, make_model, port, prepare

# LitServe lifts this limit under the name that earlier versions of Starlette gave it. A larger upload becomes a file on
# disk, which can't be handed to the worker.
MultiPartParser.spool_max_size = sys.maxsize


class Classifier(litserve.LitAPI):
    """The whole of the peer."""

    def setup(self, device: str) -> None:
        """Called once in each worker."""
        self.model = make_model().to(device)

    def decode_request(self, request: Request) -> torch.Tensor:
        """One image's input; what LitServe hands in is the request's form."""
        return prepare(request["image"].file.read())

    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """The answers to a stacked batch."""
        return classify(self.model, batch)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """They are a list already."""
        return output


if __name__ == "__main__":
    api = Classifier(max_batch_size=BATCH, batch_timeout=BATCH_WAIT_SECONDS)
    litserve.LitServer(api, accelerator="cpu").run(port=port(), host="127.0.0.1", generate_client_file=False)
