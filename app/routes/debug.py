"""Looks inside the running service, for those who manage it."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from app.dependencies import EngineDep, require_management
from app.problems import documented
from app.routes.model_info import BatchSize
from service.scheduling.dispatcher import Activity, QueueActivity, Release

router = APIRouter(prefix="/debug", tags=["management"], dependencies=[Depends(require_management)])


class QueueInfo(BaseModel):
    """One model's queue, in images; their way is `to_decode`, `decoding`, `waiting` (for an instance), `running`."""

    model: str
    to_decode: int
    decoding: int
    waiting: int
    running: int
    admitted: Annotated[int, Field(description="Places taken, from admission to result; never more than `capacity`.")]
    capacity: int
    virtual_seconds: Annotated[
        float, Field(description="Instance time it was given so far; of queues that wait, the least is served first.")
    ]
    batch_plan: list[BatchSize]


class InstanceInfo(BaseModel):
    """One instance; model, size, alone and ms describe the batch that it runs, and for how long."""

    instance: int
    busy: bool
    model: str | None = None
    size: int | None = None
    alone: bool | None = None
    ms: float | None = None


class ReleaseInfo(BaseModel):
    """A batch that was released to an instance."""

    seconds_ago: float
    model: str
    reason: Annotated[
        Literal["idle", "full", "delay"],
        Field(description="An idle instance took what there was; the batch was full; its delay had passed."),
    ]
    size: int
    instance: int
    alone: Annotated[bool, Field(description="Nothing else was in the scheduler.")]
    wait_ms: Annotated[float, Field(description="How long its oldest image had waited for an instance.")]
    run_ms: Annotated[float | None, Field(description="How long it ran; null while it does.")]


class SchedulerInfo(BaseModel):
    """One moment of the scheduler; the last releases, newest first."""

    queues: list[QueueInfo]
    instances: list[InstanceInfo]
    releases: list[ReleaseInfo]


@router.get("/scheduler", operation_id="get_scheduler", summary="Look at the scheduler", responses=documented(401, 403))
async def scheduler(engine: EngineDep) -> SchedulerInfo:
    """Queues, instances, and the last batches that were released, with reason, size, wait and run time."""
    return _info(engine.activity())


def _info(activity: Activity) -> SchedulerInfo:
    return SchedulerInfo(
        queues=[_queue(queue) for queue in activity.queues],
        instances=[_instance(i, release, activity.now) for i, release in enumerate(activity.instances)],
        releases=[_release(release, activity.now) for release in activity.releases],
    )


def _queue(queue: QueueActivity) -> QueueInfo:
    fields: dict[str, Any] = asdict(queue)
    plan = [BatchSize(size=n, ms=_ms(seconds)) for n, seconds in fields.pop("plan").items()]
    fields["model"] = fields.pop("lane")
    return QueueInfo(**fields, batch_plan=plan)


def _instance(instance: int, release: Release | None, now: float) -> InstanceInfo:
    if not release:
        return InstanceInfo(instance=instance, busy=False)
    return InstanceInfo(
        instance=instance,
        busy=True,
        model=release.model,
        size=release.size,
        alone=release.alone,
        ms=_ms(now - release.started),
    )


def _release(release: Release, now: float) -> ReleaseInfo:
    return ReleaseInfo(
        seconds_ago=round(now - release.started, 3),
        model=release.model,
        reason=release.reason,
        size=release.size,
        instance=release.instance,
        alone=release.alone,
        wait_ms=_ms(release.waited_seconds),
        run_ms=None if release.run_seconds is None else _ms(release.run_seconds),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
