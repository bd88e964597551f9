"""Pages that cost the event loop more than a request for them should: rendered once, or not too often."""

from asyncio import Lock
from collections.abc import Callable, Collection, Iterator, Mapping
from time import perf_counter, thread_time

import orjson
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.caching import validated
from app.clients import Allowance

RENDER_SHARE = 0.02  # of a core, for metrics
RENDER_BURST = 10  # times in a row that they are rendered anew all the same
ROOT_PATHS = 8  # below which the document is kept


# By media type: how it is written, and the response's whole content type. The first is the default.
FORMATS: Mapping[str, tuple[Callable[[Collector], bytes], str]] = {
    "text/plain": (generate_latest, CONTENT_TYPE_LATEST),
    "application/openmetrics-text": (openmetrics.generate_latest, openmetrics.CONTENT_TYPE_LATEST),
}


class MetricsPage(Collector):
    """The metrics as text. Those who scrape more often than RENDER_SHARE allows get the text of the one before."""

    def __init__(self, registry: CollectorRegistry, collect: Callable[[], None]) -> None:
        """`collect` brings gauges up to date."""
        self._registry = registry
        self._collect = collect
        # Mutable state: the last texts by media type, how long one took, whether the service was ready then, and how
        # often more may be made.
        self._texts: dict[str, bytes] = {}
        self._seconds = 0.0
        self._ready: bool | None = None
        self._allowance = Allowance()

    def text(self, media_type: str = "text/plain", *, ready: bool | None = None) -> bytes:
        """The metrics in Prometheus's format, or another one of FORMATS; `ready`: whether the service is, if known."""
        start, used = perf_counter(), thread_time()
        if not self._texts or not self._allowance.wait_seconds(start, self._rate, RENDER_BURST):
            self._texts.clear()
            self._collect()
            self._ready = ready
        if media_type not in self._texts:
            self._texts[media_type] = FORMATS[media_type][0](self)
            self._seconds = thread_time() - used  # under load others have the core meanwhile: figures must stay fresh
            self._allowance.take(start, self._rate)
        return self._texts[media_type]

    def collect(self) -> Iterator[Metric]:
        """See `Collector.collect`: every metric, without the times at which its series began."""
        if self._ready is not None:  # which is about all workers, so it is no gauge that each of them has
            yield GaugeMetricFamily("pvt_ready", "Whether it is ready, as /health/ready says.", float(self._ready))
        for metric in self._registry.collect():
            metric.samples = [each for each in metric.samples if not each.name.endswith("_created")]
            yield metric

    def samples(self, names: Collection[str]) -> list[Sample]:
        """The samples that have one of `names`, of all workers."""
        return [each for metric in self._registry.collect() for each in metric.samples if each.name in names]

    @property
    def _rate(self) -> float:
        return RENDER_SHARE / max(self._seconds, 1e-4)


def openapi_route(app: FastAPI) -> Route:
    """Serves the OpenAPI document of `app` as bytes that are kept, in place of the framework's own route."""
    documents: dict[str, bytes] = {}
    making = Lock()

    def document(root_path: str) -> bytes:
        content = app.openapi()
        if root_path:
            content = {**content, "servers": [{**content["servers"][0], "url": root_path}]}
        return orjson.dumps(content)

    async def openapi(request: Request) -> Response:
        root_path = request.scope.get("root_path", "").rstrip("/")
        if root_path not in documents:
            async with making:  # the first takes half a second
                if root_path not in documents:
                    if len(documents) >= ROOT_PATHS:
                        documents.clear()
                    documents[root_path] = await run_in_threadpool(document, root_path)
        return validated(request, documents[root_path], "application/json")

    return Route(app.openapi_url or "", openapi, include_in_schema=False)
