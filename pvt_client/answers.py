"""What the service answers, typed, and how it is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pvt_client.errors import Problem, PvtError, UnexpectedAnswer, kind_of

Floats = NDArray[np.floating[Any]]
_SHOWN = 200  # characters of an answer that is not understood


class ClassScore(NamedTuple):
    """One class and its share of the softmax over all classes."""

    class_id: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The best classes of one picture, best first; `width` and `height` are the picture's own, in pixels."""

    filename: str | None
    width: int
    height: int
    classes: tuple[ClassScore, ...]
    model: str
    version: str

    @property
    def best(self) -> ClassScore:
        """The first of `classes`."""
        return self.classes[0]


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Arrays of one picture, or of several stacked on a first axis, in the order of the pictures.

    `embedding` is (D,) or (n, D). `stages` has the stages asked for by number, with pool `none` (C, H, W) or
    (n, C, H, W), with `avg` (C,) or (n, C).
    """

    embedding: Floats
    stages: Mapping[int, Floats]
    model: str
    version: str


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """The embedding of one picture, `vector` (D,); `width` and `height` are the picture's own, in pixels."""

    width: int
    height: int
    vector: Floats
    model: str
    version: str


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """The exact class activation map of one class: `map.mean() + bias` is `logit`."""

    filename: str | None
    width: int
    height: int
    class_id: int
    label: str
    score: float
    logit: float
    bias: float
    map: Floats
    """(H, W), one value for each cell of the last stage."""
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model and where it stands; `details` is all that the service tells of it."""

    id: str
    variant: str
    version: str
    state: str
    """`available`, `remote`, `loading`, `ready` or `failed`."""
    default: bool
    details: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Health:
    """`reasons` says what keeps the service from being live or ready; empty when it is both."""

    live: bool
    ready: bool
    reasons: tuple[str, ...]


class Answer(NamedTuple):
    """What of a response is read; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def read_json(answer: Answer) -> Any:  # noqa: ANN401  JSON
    """The body as JSON.

    Raises:
        UnexpectedAnswer: it is none.
    """
    try:
        return json.loads(answer.body)
    except ValueError as error:
        raise UnexpectedAnswer(f"no JSON: {_excerpt(answer.body)}; is the URL this service's?") from error


def problem(fields: Mapping[str, Any], status: int, request_id: str | None, retry_after: float | None) -> Problem:
    """The error that a problem's fields make, of the class that its type and status name."""
    kind, status = str(fields.get("type", "about:blank")), int(fields.get("status", status))
    return kind_of(status, kind)(
        type=kind,
        title=str(fields.get("title", f"HTTP {status}")),
        status=status,
        detail=str(fields.get("detail", "")),
        request_id=fields.get("request_id") or request_id,
        retry_after=retry_after,
    )


def refusal(answer: Answer, retry_after: float | None) -> Problem:
    """The error that an answer of status 400 or more is, the service's own or a proxy's."""
    fields: Mapping[str, Any] = {"detail": _excerpt(answer.body)}
    if answer.headers.get("content-type", "").startswith("application/problem+json"):
        read = read_json(answer)
        fields = read if isinstance(read, dict) else fields
    return problem(fields, answer.status, answer.headers.get("x-request-id"), retry_after)


def prediction(result: Mapping[str, Any], filename: str | None, model: str, version: str) -> Prediction | PvtError:
    """One place of `results`; `filename` is used where the service was told none."""
    if "error" in result:
        return problem(result["error"], 0, None, None)
    classes = tuple(ClassScore(each["class_id"], each["label"], each["score"]) for each in result["predictions"])
    return Prediction(result["filename"] or filename, result["width"], result["height"], classes, model, version)


def explanation(result: Mapping[str, Any], filename: str | None, model: str, version: str) -> Explanation:
    """One place of `results`; the same."""
    return Explanation(
        **{**result, "filename": result["filename"] or filename, "map": np.array(result["map"], np.float32)},
        model=model,
        version=version,
    )


def described(fields: Mapping[str, Any]) -> Model:
    """A model, as `GET /models` tells of it."""
    known = {name: fields[name] for name in ("id", "variant", "version", "state", "default")}
    return Model(**known, details=fields)


def _excerpt(body: bytes) -> str:
    return body[: 4 * _SHOWN].decode("utf-8", "replace")[:_SHOWN].strip() or "an empty body"
