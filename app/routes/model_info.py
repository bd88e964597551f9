"""What `GET /models` shows."""

from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, Field

from app.disclosure import shown
from service.acquisition.catalogue import CLASSES, LICENCE, SIDE
from service.acquisition.pulling import RemoteModel
from service.execution.reference import Deviation
from service.registry.status import ModelStatus, VersionStatus
from service.store.cards import Accuracy


class BatchSize(BaseModel):
    """A compiled batch size and its measured time, while all instances run."""

    size: int
    ms: float


class PlannedBatch(BatchSize):
    """A batch size of a model's plan."""

    precision: Annotated[str | None, Field(description="What it computes in, where not in the model's.")] = None


class ReferenceCheck(BaseModel):
    """How far the logits are from float32's for the model's reference images: the worst of the batch plan's graphs."""

    images: Annotated[int, Field(description="That were tried; from the plan cache as many as time allows.")]
    cosine: Annotated[float, Field(description="Similarity of all logits as one vector; 16 bits must have 0.999.")]
    deviation: Annotated[
        float,
        Field(description="Largest difference of a logit, as a share of the logits' spread; 16 bits may have 0.03."),
    ]
    changed: Annotated[int, Field(description="Images whose top class is another one.")]
    worst_swap: Annotated[
        float,
        Field(
            description="Greatest distance in float32's logits between a top class and the one in its place, as a "
            "share of their spread; 0 where none changed. 16 bits may have 0.03."
        ),
    ]


class CoreLayout(BaseModel):
    """`streams` batches run at a time, each on `threads` cores."""

    streams: int
    threads: int


class VersionInfo(BaseModel):
    """A version of a model: in the store, in memory, or both."""

    version: str
    state: Literal["available", "loading", "ready", "failed"]
    reason: Annotated[str | None, Field(description="Why it failed.")] = None
    aliases: Annotated[list[str] | None, Field(description="The aliases that stand for it.")] = None
    leases: Annotated[int | None, Field(description="Requests that use it, or wait for it.")] = None
    pinned: bool | None = None
    idle_seconds: Annotated[float | None, Field(description="Since it was last used.")] = None
    memory_bytes: Annotated[int | None, Field(description="Resident memory that it takes, as measured.")] = None


class PullProgress(BaseModel):
    """How much of a file that is being fetched has arrived."""

    bytes: int
    total: int | None = None


class ModelInfo(BaseModel):
    """A model, in the version that its name stands for; the second half is present once that is loaded."""

    id: str
    variant: str
    version: str
    state: Annotated[
        Literal["available", "remote", "loading", "ready", "failed"],
        Field(description="`remote` is not in the store, and `pvt-serve pull` or PVT_PULL=on_demand fetches it."),
    ]
    default: bool
    reason: Annotated[str | None, Field(description="Why the model failed.")] = None
    pull: Annotated[PullProgress | None, Field(description="While it is being fetched into the store.")] = None
    num_classes: int | None = None
    input_size: Annotated[tuple[int, int] | None, Field(description="Height and width, in pixels.")] = None
    parameters: int | None = None
    accuracy: Accuracy | None = None
    licence: str | None = None
    backend: str | None = None
    device: Annotated[str | None, Field(description="`cpu`, or the GPUs that run it.")] = None
    precision: Annotated[
        str | None, Field(description="What it computes in; `batch_plan` and `notes` name the graphs that do not.")
    ] = None
    reference_check: ReferenceCheck | None = None
    memory_bytes: Annotated[
        int | None,
        Field(
            description="Memory that it takes, resident or on GPUs, as measured; some of the first one's is libraries'."
        ),
    ] = None
    pinned: Annotated[bool | None, Field(description="Whether it is never evicted.")] = None
    leases: Annotated[int | None, Field(description="Requests that use it, or wait for it.")] = None
    idle_seconds: Annotated[float | None, Field(description="Since it was last used.")] = None
    versions: Annotated[list[VersionInfo] | None, Field(description="All versions, the newest first.")] = None
    aliases: Annotated[list[str] | None, Field(description="The aliases that stand for it.")] = None
    batch_plan: list[PlannedBatch] | None = None
    alone_ms: Annotated[
        float | None, Field(description="Measured time of a lone image on all cores, where that pays.")
    ] = None
    layout: CoreLayout | None = None
    plan_cached: Annotated[bool | None, Field(description="Whether plan and graphs came from PVT_CACHE_DIR.")] = None
    notes: Annotated[list[str] | None, Field(description="What was tried and left out, and why.")] = None
    load_seconds: float | None = None
    improving: Annotated[
        bool | None, Field(description="Whether faster graphs are still being made, while it serves.")
    ] = None


class ModelList(BaseModel):
    """Every model of the store."""

    models: list[ModelInfo]


def model_info(model: ModelStatus, request: Request | None = None) -> ModelInfo:
    """What is known of `model`: from its card, and from memory; as the sender of `request` may read."""
    info = ModelInfo(
        id=model.id,
        variant=model.variant,
        default=model.default,
        versions=[_version(version, request) for version in model.versions],
        memory_bytes=model.memory_bytes,
        **_common(model, request),
    )
    if card := model.card:
        size = (card.preprocessing.height, card.preprocessing.width)
        known = {"num_classes": len(card.labels), "input_size": size, "parameters": card.parameters}
        info = info.model_copy(update={**known, "accuracy": card.accuracy, "licence": card.licence})
    return info.model_copy(update=_loaded(model)) if model.backend else info


def remote_info(model: RemoteModel, request: Request) -> ModelInfo:
    """What is known of published weights that are not in the store."""
    pull = None if model.pulled_bytes is None else PullProgress(bytes=model.pulled_bytes, total=model.total_bytes)
    return ModelInfo(
        id=model.published.id,
        variant=model.published.variant,
        version="",
        state=model.state,
        default=model.default,
        reason=shown(request, model.failure) if model.failure else None,
        pull=pull,
        num_classes=CLASSES,
        input_size=(SIDE, SIDE),
        parameters=model.published.parameters,
        accuracy=model.published.accuracy,
        licence=LICENCE,
    )


def _version(version: VersionStatus, request: Request | None) -> VersionInfo:
    return VersionInfo(memory_bytes=version.memory_bytes, **_common(version, request))


def _common(version: VersionStatus, request: Request | None) -> dict[str, Any]:
    """What is said of a version and of a model; how it is used, if it is in memory or on its way there."""
    common: dict[str, Any] = {
        "version": version.version,
        "state": version.state,
        "reason": shown(request, version.failure) if version.failure else None,
        "aliases": list(version.aliases) or None,
    }
    if version.state not in {"ready", "loading"}:
        return common
    idle = None if version.idle_seconds is None else round(version.idle_seconds, 3)
    return common | {"leases": version.leases, "pinned": version.pinned, "idle_seconds": idle}


def _loaded(model: ModelStatus) -> dict[str, object]:
    """What is known of a model once it is in memory."""
    assert model.plan is not None and model.layout is not None  # noqa: S101, PT018  it is loaded
    return {
        "backend": model.backend,
        "device": model.device,
        "precision": model.precision,
        "reference_check": model.deviation and _reference_check(model.deviation),
        "batch_plan": [
            PlannedBatch(size=n, ms=round(t * 1000, 3), precision=(model.other_precisions or {}).get(n))
            for n, t in model.plan.items()
        ],
        "alone_ms": None if model.alone_seconds is None else round(model.alone_seconds * 1000, 3),
        "layout": CoreLayout(**model.layout._asdict()),
        "plan_cached": model.plan_cached,
        "notes": list(model.notes or ()),
        "load_seconds": round(model.load_seconds or 0.0, 3),
        "improving": model.optimizing or None,
    }


def _reference_check(found: Deviation) -> ReferenceCheck:
    return ReferenceCheck(
        images=found.images,
        cosine=round(found.cosine, 6),
        deviation=round(found.share, 6),
        changed=found.changed,
        worst_swap=round(found.swap, 6),
    )
