"""Requests as data: what is sent, and what its answer means. Nothing here does I/O."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Generic, ParamSpec, TypeVar, Unpack
from urllib.parse import quote

import numpy as np

from pvt_client import answers, tensors
from pvt_client.answers import Answer, Embedding, Explanation, Features, Health, Model, Prediction
from pvt_client.errors import ImageTooLarge, InvalidImage, Problem, PvtError, UnexpectedAnswer
from pvt_client.images import AnyImage, Image, Images, Upload, upload
from pvt_client.options import ExplainOptions, FeaturesOptions, MapOptions, PredictOptions

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")

_UNHEALTHY = 503
_FIELD = "image"
_BINARY = "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T_co]):
    """A request without its server, and how its answer is read.

    `accepted`: statuses that are answers, beside 200. `recover` makes an answer of a problem, or None of it.
    """

    method: str
    path: str
    read: Callable[[Answer], T_co]
    parameters: Mapping[str, str] = field(default_factory=dict)
    accept: str = "application/json"
    uploads: Sequence[Upload] = ()
    accepted: frozenset[int] = frozenset()
    timed: bool = True
    """Whether the service takes `timeout_ms`."""
    recover: Callable[[Problem], T_co | None] = lambda _: None

    def content(self) -> tuple[bytes | None, list[tuple[str, tuple[str, bytes, str]]]]:
        """The raw body, or the form's files; of a single picture the bytes are the body."""
        if len(self.uploads) == 1:
            return self.uploads[0].data, []
        names = (each.filename or str(number) for number, each in enumerate(self.uploads))
        return None, [(_FIELD, (name, each.data, _BINARY)) for name, each in zip(names, self.uploads, strict=True)]

    def headers(self) -> dict[str, str]:
        """What depends on the call."""
        typed = {"Content-Type": _BINARY} if len(self.uploads) == 1 else {}
        return {"Accept": self.accept, **typed}


def _understood(read: Callable[P, T]) -> Callable[P, T]:
    """An answer that lacks what it must have becomes an error of ours."""

    @wraps(read)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except (LookupError, TypeError, ValueError) as error:
            raise UnexpectedAnswer(f"an answer that this client does not understand: {error!r}") from error

    return checked


def predict(image: Image, **options: Unpack[PredictOptions]) -> Call[Prediction]:
    """`POST /predict` with one picture, whose problem is the answer."""
    uploads = [upload(image)]

    def read(answer: Answer) -> Prediction:
        (result,) = _predictions(answer, uploads)
        if isinstance(result, PvtError):
            raise result
        return result

    return _post("/predict", uploads, read, options)


def predict_each(images: Sequence[Image], **options: Unpack[PredictOptions]) -> Call[list[Prediction | PvtError]]:
    """`POST /predict` with several; a lone one's own problem takes its place, as it does among several."""
    uploads = [upload(image) for image in images]

    def read(answer: Answer) -> list[Prediction | PvtError]:
        return _predictions(answer, uploads)

    return _post("/predict", uploads, read, options, recover=_in_place)


def features(images: Image | Images[AnyImage], **options: Unpack[FeaturesOptions]) -> Call[Features]:
    """`POST /features`; the arrays of a list keep their first axis, which counts the pictures."""
    several = isinstance(images, list | tuple)
    stages = options.pop("stages", ())

    @_understood
    def read(answer: Answer) -> Features:
        arrays, told = tensors.read(answer.body)
        arrays = arrays if several else {name: array[0] for name, array in arrays.items()}
        maps = {number: arrays[f"stage{number}"] for number in stages}
        return Features(arrays["embedding"], maps, told["model"], told["version"])

    wanted = {**options, "stages": ",".join(map(str, stages)) or None}
    return _post("/features", _uploads(images), read, wanted, accept=tensors.MEDIA_TYPE)


def embedding(image: Image, **options: Unpack[FeaturesOptions]) -> Call[Embedding]:
    """`POST /features` as JSON, which tells the picture's size and the model too."""
    uploads = [upload(image)]

    @_understood
    def read(answer: Answer) -> Embedding:
        body = answers.read_json(answer)
        (result,) = body["results"]
        vector = np.array(result["embedding"], np.float32)
        return Embedding(result["width"], result["height"], vector, body["model"], body["version"])

    return _post("/features", uploads, read, options)


def explain(image: Image, **options: Unpack[ExplainOptions]) -> Call[bytes]:
    """`POST /explain`, for the overlay."""
    return _post("/explain", [upload(image)], lambda answer: answer.body, options, accept="image/png")


def explain_map(image: Image, **options: Unpack[MapOptions]) -> Call[Explanation]:
    """`POST /explain`, for the map."""
    uploads = [upload(image)]

    @_understood
    def read(answer: Answer) -> Explanation:
        body = answers.read_json(answer)
        (result,) = body["results"]
        return answers.explanation(result, uploads[0].filename, body["model"], body["version"])

    return _post("/explain", uploads, read, options)


def models() -> Call[list[Model]]:
    """`GET /models`."""

    @_understood
    def read(answer: Answer) -> list[Model]:
        return [answers.described(each) for each in answers.read_json(answer)["models"]]

    return Call(method="GET", path="/models", read=read, timed=False)


def model(name: str) -> Call[Model]:
    """`GET /models/{id}`."""

    @_understood
    def read(answer: Answer) -> Model:
        return answers.described(answers.read_json(answer))

    return Call(method="GET", path=f"/models/{quote(name, safe='@')}", read=read, timed=False)


def health() -> Call[Health]:
    """`GET /health`, which answers 503 when something is wrong."""

    @_understood
    def read(answer: Answer) -> Health:
        body = answers.read_json(answer)
        return Health(body["live"], body["ready"], tuple(body["reasons"]))

    return Call(method="GET", path="/health", read=read, accepted=frozenset({_UNHEALTHY}), timed=False)


@_understood
def _predictions(answer: Answer, uploads: Sequence[Upload]) -> list[Prediction | PvtError]:
    body = answers.read_json(answer)
    pairs = zip(body["results"], uploads, strict=True)
    return [answers.prediction(each, sent.filename, body["model"], body["version"]) for each, sent in pairs]


def _uploads(images: Image | Images[AnyImage]) -> list[Upload]:
    return [upload(image) for image in images] if isinstance(images, list | tuple) else [upload(images)]


def _in_place(problem: Problem) -> list[Prediction | PvtError] | None:
    of_the_picture = isinstance(problem, InvalidImage | ImageTooLarge) and not problem.type.endswith(":body-too-large")
    return [problem] if of_the_picture else None


def _post(
    path: str,
    uploads: Sequence[Upload],
    read: Callable[[Answer], T],
    parameters: Mapping[str, object],
    *,
    accept: str = "application/json",
    recover: Callable[[Problem], T | None] = lambda _: None,
) -> Call[T]:
    given = {name: _text(value) for name, value in parameters.items() if value is not None}
    return Call(method="POST", path=path, read=read, parameters=given, accept=accept, uploads=uploads, recover=recover)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
