"""Ray Serve with `@serve.batch`: a replica for each core, one thread each, as Ray sets it for one CPU."""

from signal import SIGINT, SIGTERM, sigwait
from typing import Any

import ray
import torch
from ray import serve
from starlette.requests import Request

from bench.peers.common import BATCH, BATCH_WAIT_SECONDS, classify, make_model, port, prepare
from service.machine import usable_cores


@serve.deployment(num_replicas=usable_cores(), max_ongoing_requests=100, ray_actor_options={"num_cpus": 1})
class Classifier:
    """The whole of the peer."""

    def __init__(self) -> None:
        self.model = make_model()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_WAIT_SECONDS)
    async def batch(self, images: list[bytes]) -> list[dict[str, Any]]:
        """The answers to a batch."""
        return classify(self.model, torch.stack([prepare(image) for image in images]))

    async def __call__(self, request: Request) -> dict[str, Any]:
        """The body is the image."""
        answer: dict[str, Any] = await self.batch(await request.body())
        return answer


if __name__ == "__main__":
    ray.init(num_cpus=usable_cores(), include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port()})
    serve.run(Classifier.bind(), route_prefix="/predict")  # type: ignore[attr-defined]  # the decorator's
    sigwait({SIGINT, SIGTERM})
