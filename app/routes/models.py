"""`GET /models`, and what it shows of a model."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import AfterValidator, BaseModel, Field

from app.dependencies import EngineDep
from app.disclosure import shown
from app.problems import documented
from service.acquisition.pulling import RemoteModel
from service.errors import InvalidRequest, WeightsUnavailable
from service.names import meant
from service.registry.versions import ModelStatus, VersionStatus
from service.store.cards import Accuracy, Activation, Preprocessing

router = APIRouter(prefix="/models", tags=["models"])

Seconds = Annotated[float, AfterValidator(partial(round, ndigits=3))]
Share = Annotated[float, AfterValidator(partial(round, ndigits=6))]


class BatchSize(BaseModel):
    """A compiled batch size and its measured time, while all instances run."""

    size: int
    ms: float


State = Literal["available", "remote", "loading", "ready", "failed"]
STATE_TEXTS: Mapping[State, str] = {
    "available": "on disk; the first request loads it",
    "remote": "not in the store; it can be fetched",
    "loading": "being loaded or fetched",
    "ready": "in memory",
    "failed": "failed; the reason says why, and a later request tries again",
}


class PlannedBatch(BatchSize):
    """A batch size of a model's plan."""

    precision: Annotated[str | None, Field(description="What it computes in, where not in the model's.")] = None


class ReferenceCheck(BaseModel):
    """How far the logits are from float32's for the model's reference images: the worst of the batch plan's graphs.

    Of a model without a head it is the embeddings.
    """

    images: Annotated[int, Field(description="That were tried; from the plan cache as many as time allows.")]
    cosine: Annotated[Share, Field(description="Similarity of all logits as one vector; 16 bits must have 0.999.")]
    deviation: Annotated[
        Share,
        Field(description="Largest difference of a logit, as a share of the logits' spread; 16 bits may have 0.03."),
    ]
    changed: Annotated[int, Field(description="Images whose top class is another one; without a head 0.")]
    worst_swap: Annotated[
        Share,
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
    state_text: str
    reason: Annotated[str | None, Field(description="Why it failed.")] = None
    aliases: Annotated[list[str] | None, Field(description="The aliases that stand for it.")] = None
    leases: Annotated[int | None, Field(description="Requests that use it, or wait for it.")] = None
    pinned: bool | None = None
    idle_seconds: Annotated[Seconds | None, Field(description="Since it was last used.")] = None
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
        State,
        Field(description="`remote` is not in the store, and `pvt-serve pull` or PVT_PULL=on_demand fetches it."),
    ]
    state_text: Annotated[str, Field(description="The same in words.")]
    default: bool
    reason: Annotated[str | None, Field(description="Why the model failed.")] = None
    pull: Annotated[PullProgress | None, Field(description="While it is being fetched into the store.")] = None
    num_classes: Annotated[int | None, Field(description="0: the model has no classification head.")] = None
    tasks: Annotated[
        list[Literal["predict", "explain", "features"]] | None,
        Field(description="The endpoints that it answers; without a head only `features`."),
    ] = None
    activation: Annotated[
        Activation | None,
        Field(
            description="What makes scores of logits: `softmax` for one class of several, `sigmoid` for several at "
            "once, `none` for the logits themselves; absent without a head."
        ),
    ] = None
    temperature: Annotated[float | None, Field(description="Divides logits before the activation; 1 if absent.")] = None
    unknown_below: Annotated[
        float | None, Field(description="The best score below which `/predict` calls an image `unknown`.")
    ] = None
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
    idle_seconds: Annotated[Seconds | None, Field(description="Since it was last used.")] = None
    versions: Annotated[list[VersionInfo] | None, Field(description="All versions, the newest first.")] = None
    aliases: Annotated[list[str] | None, Field(description="The aliases that stand for it.")] = None
    batch_plan: list[PlannedBatch] | None = None
    alone_ms: Annotated[
        float | None, Field(description="Measured time of a lone image on all cores, where that pays.")
    ] = None
    layout: CoreLayout | None = None
    plan_cached: Annotated[bool | None, Field(description="Whether plan and graphs came from PVT_CACHE_DIR.")] = None
    notes: Annotated[list[str] | None, Field(description="What was tried and left out, and why.")] = None
    load_seconds: Seconds | None = None
    improving: Annotated[
        bool | None, Field(description="Whether faster graphs are still being made, while it serves.")
    ] = None


class ModelDetails(ModelInfo):
    """A model, and what its card says beside that."""

    labels: Annotated[
        list[str] | None, Field(description="The name of each class, in order; empty without a head.")
    ] = None
    thresholds: Annotated[
        float | list[float] | None,
        Field(description="The score that a class must have to be in an answer: one for all, or one for each."),
    ] = None
    preprocessing: Annotated[Preprocessing | None, Field(description="How images become the model's input.")] = None
    explain_size: Annotated[
        tuple[int, int] | None,
        Field(description="The input size of `/explain` where a request names none, if it is not `input_size`."),
    ] = None


class ModelList(BaseModel):
    """Every model of the store."""

    models: list[ModelInfo]


_get = partial(router.get, response_model_exclude_none=True)


StatesQuery = Annotated[
    str | None,
    Query(description="Only models in one of these states, separated by commas.", examples=["ready", "ready,loading"]),
]


@_get("", summary="List the models", responses=documented(401, 422, 503))
async def list_models(request: Request, engine: EngineDep, state: StatesQuery = None) -> ModelList:
    """Every model of the store, and where it stands; then the published ones that could be fetched into it."""
    states = {*STATE_TEXTS} if state is None else {each.strip() for each in state.split(",")}
    for each in sorted(states - {*STATE_TEXTS}):
        raise InvalidRequest(
            f"state {each[:100]!r}{meant(each, STATE_TEXTS) or ';'} there are {', '.join(STATE_TEXTS)}"
        )
    found = await engine.models()
    remote = [_remote_info(each, request) for each in engine.remote_models(found)]
    models = [*(model_info(each, request) for each in found), *remote]
    return ModelList(models=[each for each in models if each.state in states])


@_get("/{model_id}", summary="Describe one model", responses=documented(401, 404, 422, 503))
async def get_model(request: Request, model_id: str, engine: EngineDep) -> ModelDetails:
    """One model, with its labels and preprocessing; a variant alone finds what it would find in a request."""
    try:
        model = await engine.model(model_id)
    except WeightsUnavailable:
        if remote := engine.remote_model(model_id):
            return ModelDetails(**vars(_remote_info(remote, request)))
        raise
    details: dict[str, Any] = {}
    if card := model.stored.card:
        details = {"labels": card.labels, "thresholds": card.least_scores, "preprocessing": card.preprocessing}
        details["explain_size"] = card.explain_size
    return ModelDetails(**vars(model_info(model, request)), **details)


def model_info(model: ModelStatus, request: Request | None = None) -> ModelInfo:
    """What is known of `model`: from its card, and from memory once loaded; as the sender of `request` may read it."""
    known: dict[str, Any] = {}
    if card := model.stored.card:
        known["input_size"] = (card.preprocessing.height, card.preprocessing.width)
        known["num_classes"] = len(card.labels)
        known["tasks"] = ["predict", "explain", "features"] if card.labels else ["features"]
        if card.labels:
            known |= {"activation": card.activation, "unknown_below": card.unknown_below}
            known["temperature"] = card.temperature if card.temperature != 1 else None
        known |= {"parameters": card.parameters, "accuracy": card.accuracy, "licence": card.licence}
    if (report := model.report) and (plan := model.plan):  # it is loaded
        known |= {name: getattr(report, name) for name in ("backend", "device", "precision", "load_seconds")}
        known["batch_plan"] = [
            PlannedBatch(size=n, ms=milliseconds(seconds), precision=model.other_precisions.get(n))
            for n, seconds in plan.seconds.items()
        ]
        known["alone_ms"] = plan.alone_seconds and milliseconds(plan.alone_seconds)
        if found := report.deviation:
            worst = {"cosine": found.cosine, "deviation": found.share, "worst_swap": found.swap}
            known["reference_check"] = ReferenceCheck(images=found.images, changed=found.changed, **worst)
        known["layout"] = CoreLayout(**report.layout._asdict())
        known |= {"plan_cached": report.cached, "notes": list(model.notes), "improving": model.optimizing or None}
    versions = [VersionInfo(**_standing(version, request)) for version in model.versions]
    known |= {"id": model.id, "variant": model.stored.variant, "default": model.default}
    return ModelInfo(versions=versions, **_standing(model, request), **known)


def _standing(status: VersionStatus, request: Request | None) -> dict[str, Any]:
    """What is known of a model and of each version; how it is used only while it is in memory or being loaded."""
    standing: dict[str, Any] = {
        "version": status.version,
        "state": status.state,
        "state_text": STATE_TEXTS[status.state],
        "reason": shown(request, status.failure) if status.failure else None,
        "aliases": list(status.aliases) or None,
        "memory_bytes": status.memory_bytes,
    }
    if status.state in {"ready", "loading"}:
        standing |= {name: getattr(status, name) for name in ("leases", "pinned", "idle_seconds")}
    return standing


def _remote_info(model: RemoteModel, request: Request) -> ModelInfo:
    """What is known of published weights that are not in the store."""
    published = model.published
    return ModelInfo(
        id=published.id,
        variant=published.variant,
        version="",
        state=model.state,
        state_text=STATE_TEXTS[model.state],
        default=model.default,
        reason=shown(request, model.failure) if model.failure else None,
        pull=None if model.pulled_bytes is None else PullProgress(bytes=model.pulled_bytes, total=model.total_bytes),
        num_classes=published.num_classes,
        tasks=["predict", "explain", "features"],
        input_size=published.input_size,
        parameters=published.parameters,
        accuracy=published.accuracy,
        licence=published.licence,
    )


def milliseconds(seconds: float) -> float:
    """`seconds` as a response has them."""
    return round(seconds * 1000, 3)
