"""Triton's statistics extension, from the metrics of all workers: what was inferred, and how long each part of it took.

Source: "Statistics Extension" of Triton's documentation (`extension_statistics.md`).
"""

from collections.abc import Callable

from prometheus_client.samples import Sample
from pydantic import BaseModel

from app.rendered import MetricsPage
from service.engine import Engine
from service.errors import InvalidRequest

_NAMES = frozenset({
    "pvt_images_total", "pvt_stage_seconds_sum", "pvt_stage_seconds_count", "pvt_failed_seconds_total",
    "pvt_batch_releases_total", "pvt_last_batch_timestamp_seconds", "pvt_cache_misses_total",
})  # fmt: skip
_ANSWERED = "answered"


class Duration(BaseModel):
    """How often something happened, and how many nanoseconds all of that took."""

    count: int = 0
    ns: int = 0


class InferStatistics(BaseModel):
    """By image. `compute_input` is decoding, with the wait for a thread; `compute_output` is making the response.

    `success` is the sum of the four and of `cache_hit`, images answered from the content cache; `fail` are images that
    were refused, failed or given up. Of `cache_miss` only the number is known.
    """

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration = Duration()
    cache_miss: Duration = Duration()


class ModelStatistics(BaseModel):
    """Of one model since the service started, in all its versions; `version` is the one that serves now.

    `last_inference` is in milliseconds since 1970, 0 before the first; `inference_count` counts images, and
    `execution_count` batches. What a batch of each size takes is in `batch_plan` of `/models`.
    """

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferStatistics
    batch_stats: list[None] = []


class Statistics(BaseModel):
    """The statistics of the models that were requested."""

    model_stats: list[ModelStatistics]


async def statistics(engine: Engine, metrics: MetricsPage, name: str | None, version: str | None) -> Statistics:
    """Of the model called `name`, or of every model that has inferred since the start.

    Raises:
        InvalidRequest: another version than the one that serves is named; all versions are counted together.
        ModelNotFound, WeightsUnavailable: there is no such model.
    """
    samples = metrics.samples(_NAMES)
    if name is None:
        used = {each.labels["model"] for each in samples}
        models = [model for model in await engine.models() if model.id in used]
    else:
        models = [await engine.model(name)]
        if version is not None and version != models[0].version:
            await engine.model(f"{name}@{version}")
            raise InvalidRequest(
                f"version {version!r} of {name!r}: its statistics are those of all versions together; leave out the "
                f"version, or name the one that serves, which is {models[0].version!r}"
            )
    return Statistics(model_stats=[_of(model.id, model.version, samples) for model in models])


def _of(name: str, version: str, samples: list[Sample]) -> ModelStatistics:
    own = [each for each in samples if each.labels["model"] == name]

    def total(sample: str, matches: Callable[[dict[str, str]], bool] = lambda _: True) -> float:
        return sum(each.value for each in own if each.name == sample and matches(each.labels))

    def stage(which: str, also: str = "") -> Duration:
        count = total("pvt_stage_seconds_count", lambda labels: labels["stage"] == which)
        seconds = total("pvt_stage_seconds_sum", lambda labels: labels["stage"] in {which, also})
        return Duration(count=int(count), ns=_ns(seconds))

    answered = int(total("pvt_images_total", lambda labels: labels["outcome"] == _ANSWERED))
    failed = int(total("pvt_images_total", lambda labels: labels["outcome"] != _ANSWERED))
    stages = [stage("queue", "wait"), stage("decode"), stage("infer"), stage("encode"), stage("cache")]
    return ModelStatistics(
        name=name,
        version=version,
        last_inference=int(total("pvt_last_batch_timestamp_seconds") * 1000),
        inference_count=answered,
        execution_count=int(total("pvt_batch_releases_total")),
        inference_stats=InferStatistics(
            success=Duration(count=answered, ns=sum(each.ns for each in stages)),
            fail=Duration(count=failed, ns=_ns(total("pvt_failed_seconds_total"))),
            queue=stages[0],
            compute_input=stages[1],
            compute_infer=stages[2],
            compute_output=stages[3],
            cache_hit=stages[4],
            cache_miss=Duration(count=int(total("pvt_cache_misses_total"))),
        ),
    )


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
