"""The engine's metrics: one catalogue, every label bounded by the models of the store."""

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache, partial
from time import time
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.samples import Exemplar

from service.recent import Recent

# From a digit on one core (half a millisecond) to a b5 behind a full queue.
STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LOAD_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SCORE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
STATES = ("loading", "ready", "failed")

Labels = tuple[str, ...]


class Histogram(prometheus_client.Histogram):
    """The client library's, which looks for an observation's bucket one by one; a request makes a dozen of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  the library's
        super().__init__(*args, **kwargs)
        self._is_series = bool(self._labelvalues or not self._labelnames)

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """Count `amount`; of `exemplar` name and value have 128 characters at the most, which is not checked again."""
        if not self._is_series:
            super().observe(amount, exemplar)  # which raises: labels are missing
            return
        self._sum.inc(amount)
        bucket = self._buckets[bisect_left(self._upper_bounds, amount)]
        bucket.inc(1)
        if exemplar:
            bucket.set_exemplar(Exemplar(exemplar, amount, time()))


class EngineMetrics:
    """Every metric of the engine, registered in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        # Of several worker processes, gauges are added up, and a dead one's do not count.
        gauge = partial(Gauge, registry=registry, multiprocess_mode="livesum")
        self.stage_seconds = histogram(
            "pvt_stage_seconds",
            "Seconds an image spends in each stage of a request.",
            ["stage", "model"],
            buckets=STAGE_BUCKETS,
        )
        self.batch_size = histogram(
            "pvt_batch_size", "Images per batch, padding not counted.", ["model"], buckets=SIZE_BUCKETS
        )
        self.batch_seconds = histogram(
            "pvt_batch_seconds",
            "Seconds of one run of the graph that was compiled for so many images.",
            ["model", "size"],
            buckets=STAGE_BUCKETS,
        )
        self.padding = counter("pvt_batch_padding_images", "Places of such runs that had no image.", ["model"])
        self.batch_releases = counter("pvt_batch_releases", "Batches released to an instance.", ["reason", "model"])
        self.queue_images = gauge("pvt_queue_images", "Admitted images by how far they are.", ["model", "state"])
        self.queue_capacity = gauge("pvt_queue_capacity_images", "Images that are admitted at most.", ["model"])
        self.queue_depth = gauge("pvt_queue_depth", "Replaced by pvt_queue_images{state='queued'}.", ["model"])
        self.images = counter("pvt_images", "Images by what became of them.", ["model", "outcome"])
        self.failed_seconds = counter(
            "pvt_failed_seconds",
            "Seconds that images took which were not answered, from admission to error.",
            ["model"],
        )
        self.last_batch = gauge(
            "pvt_last_batch_timestamp_seconds",
            "Unix time at which the last batch went to an instance.",
            ["model"],
            multiprocess_mode="max",
        )
        self.cancellations = counter(
            "pvt_cancelled", "Images whose caller hung up, whose time ran out, or whose place another got.", ["stage"]
        )
        self.top1_score = histogram(
            "pvt_top1_score",
            "The best class's score of each image that was classified, from 0 to 1.",
            ["model"],
            buckets=SCORE_BUCKETS,
        )
        # Info metrics can't be summed over processes; these are 1 while it is so in any of them.
        state = partial(Gauge, registry=registry, multiprocess_mode="livemax")
        self.model_info = state(
            "pvt_model_info", "1 for each loaded model.", ["model", "version", "precision", "device"]
        )
        self.model_state = state(
            "pvt_model_state",
            "1 for the state of each version that is in memory, or was to be.",
            ["model", "version", "state"],
        )
        self.gpu_memory_bytes = state("pvt_gpu_memory_bytes", "Memory of each GPU: used, total.", ["device", "kind"])
        self.gpu_utilization = state("pvt_gpu_utilization_ratio", "Share of time in which it computes.", ["device"])
        self.plan_cache = counter(
            "pvt_plan_cache", "Loads with plan and graphs from the plan cache (hit) or not.", ["model", "outcome"]
        )
        self.models_budget_bytes = gauge(
            "pvt_models_memory_budget_bytes", "PVT_MEMORY_BUDGET_MB in bytes; +Inf without one."
        )
        self.model_loads = counter("pvt_model_loads", "Attempts to load a model.", ["model", "outcome"])
        self._model_load_seconds = histogram(
            "pvt_model_load_seconds",
            "Seconds from the first request for a model to its being ready.",
            ["model"],
            buckets=LOAD_BUCKETS,
        )
        self._model_load_step_seconds = histogram(
            "pvt_model_load_step_seconds", "Seconds that each step of a load takes.", ["model", "step"],
            buckets=LOAD_BUCKETS,
        )  # fmt: skip
        self.model_memory_bytes = gauge(
            "pvt_model_memory_bytes", "Resident memory that each loaded model takes.", ["model"]
        )
        self._cache_hits = counter("pvt_cache_hits", "Images answered from the content cache.", ["model"])
        self.cache_misses = counter("pvt_cache_misses", "Images that were not in the content cache.", ["model"])
        self._cache_coalesced = counter(
            "pvt_cache_coalesced", "Images answered by the computation of an equal one.", ["model"]
        )
        self.cache_evictions = counter("pvt_cache_evictions", "Results that left the content cache for others.")
        self.cache_bytes = gauge("pvt_cache_bytes", "Bytes of the results in the content cache.")
        self.memory_limit_bytes = gauge("pvt_memory_limit_bytes", "Memory for bodies, decoding, answers and loads.")
        self.memory_reserved_bytes = gauge(
            "pvt_memory_reserved_bytes", "Memory of that limit which is reserved now, by what for.", ["what"]
        )
        self.evictions = counter(
            "pvt_evictions", "Models that left memory: for want of room, replaced, unloaded, wrong.", ["reason"]
        )
        self.canaries = counter(
            "pvt_canaries", "Canary images: right, wrong, or not run for want of memory.", ["model", "outcome"]
        )
        self.canary_failures = counter("pvt_canary_failures", "Canary images whose logits were wrong.", ["model"])
        self.models_loaded = gauge("pvt_models_loaded", "Models that are ready.")
        self.instances = gauge("pvt_instances", "Batches that can run at the same time.")
        self.instances_busy = gauge("pvt_instances_busy", "Instances that run a batch.")
        for metric in (self.stage_seconds, self.batch_size, self.batch_releases, self.images, self.last_batch,
                       self.batch_seconds, self.padding, self.top1_score, self._cache_hits):  # fmt: skip
            # Looking for a series costs several times what counting does, so each is looked for once.
            metric.__dict__["labels"] = cache(metric.labels)
        self.recent_batches = Recent[int]()  # by size
        # Mutable state: the series of each gauge that come and go with models, and the models whose queue is reported.
        self._reported: dict[Gauge, set[Labels]] = {}
        self._queues: dict[str, Mapping[str, int]] = {}

    def batch_released(self, model: str, reason: str, size: int) -> None:
        """A batch of `size` images of `model` went to an instance."""
        self.batch_releases.labels(reason, model).inc()
        self.batch_size.labels(model).observe(size)
        self.recent_batches.count(size)
        self.last_batch.labels(model).set_to_current_time()

    def cancelled(self, stage: str) -> None:
        """An image left at `stage` because its caller hung up or its time ran out."""
        self.cancellations.labels(stage).inc()

    def cache_hit(self, model: str, seconds: float) -> None:
        """An image of `model` was answered from the content cache, in `seconds`."""
        self._cache_hits.labels(model).inc()
        self.stage_seconds.labels("cache", model).observe(seconds)
        self.images.labels(model, "answered").inc()

    def cache_coalesced(self, model: str, *, answered: bool) -> None:
        """An image of `model` got the outcome of an equal one: a result, or what is wrong with it."""
        self._cache_coalesced.labels(model).inc()
        self.images.labels(model, "answered" if answered else "refused").inc()

    def report_queues(self, depths: Mapping[str, Mapping[str, int]]) -> None:
        """Report the images of each model by state, and its `capacity`; a model that is gone has none any more."""
        self._queues |= depths
        for model in self._queues:
            depth = depths.get(model, dict.fromkeys(self._queues[model], 0))
            for state, images in depth.items():
                if state == "capacity":
                    self.queue_capacity.labels(model).set(images)
                else:
                    self.queue_images.labels(model, state).set(images)
            self.queue_depth.labels(model).set(depth["queued"])

    def model_loaded(self, model: str, seconds: float, steps: Mapping[str, float]) -> None:
        """A load of `model` took `seconds`, of which `steps` account for some; the rest it waited."""
        self._model_load_seconds.labels(model).observe(seconds)
        for step, each in {"wait": seconds - sum(steps.values()), **steps}.items():
            self._model_load_step_seconds.labels(model, step).observe(max(0.0, each))

    def graph_ran(self, model: str, size: int, images: int, seconds: float) -> None:
        """A graph of `model` that was compiled for `size` images ran with so many, in `seconds`."""
        self.batch_seconds.labels(model, size).observe(seconds)
        self.padding.labels(model).inc(size - images)

    def report(self, gauge: Gauge, values: Mapping[Labels, float]) -> None:
        """Set the series of `gauge` by their labels, and end those that it had before."""
        for labels in self._reported.get(gauge, set()) - {*values}:
            if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # what several processes share can't be removed
                gauge.labels(*labels).set(0)
            else:
                gauge.remove(*labels)
        self._reported[gauge] = {*values}
        for labels, value in values.items():
            gauge.labels(*labels).set(value)

    def report_states(self, states: Sequence[tuple[str, str, str]]) -> None:
        """Report model, version and state of each version that is in memory, or was to be."""
        known = {(*version, state): 0.0 for *version, _ in states for state in STATES}
        self.report(self.model_state, known | dict.fromkeys(states, 1.0))
