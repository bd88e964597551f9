"""Requests as data: what is sent, and what its response means. Nothing here talks to the network.

Each function here is a method of `Client` and `AsyncClient`, which send the call that it returns.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack, overload
from urllib.parse import quote

import numpy as np

from pvt_client import results
from pvt_client.errors import ImageTooLarge, InvalidImage, Problem, PvtError
from pvt_client.images import AnyImage, Image, Images, Upload, upload
from pvt_client.results import Embedding, Explanation, Features, Health, Model, Prediction, Response

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_UNHEALTHY = 503
_FIELD = "image"
_BINARY = "application/octet-stream"


class CommonOptions(TypedDict, total=False):
    """Options of every call that sends images; the service decides on those left out."""

    model: str | None
    """`<variant>.<tag>`, a variant alone, or an alias; the service's default model if left out."""
    size: int | tuple[int, int] | str | None
    """Side of the square model input in pixels, or its height and width (also as `"256x384"`); multiples of 32. The
    model's own if left out."""


class PredictOptions(CommonOptions, total=False):
    """Options of `predict`."""

    top_k: int
    """How many classes to return, best first; 5 if left out."""


class FeaturesOptions(CommonOptions, total=False):
    """Options of `features`."""

    stages: Sequence[int]
    """The stages of the pyramid to return, 1 to 4; none if left out."""
    pool: Literal["avg", "none"]
    """Whether stages are returned as means over their maps."""
    normalize: bool
    """Whether vectors are scaled to length 1."""
    dtype: Literal["float32", "float16"]
    """The type of the arrays."""


class MapOptions(CommonOptions, total=False):
    """Options of `explain_map`."""

    class_id: int | None
    """The class to explain; the best one if left out."""


class ExplainOptions(MapOptions, total=False):
    """Options of `explain`."""

    alpha: float | None
    """How opaque the map lies on the image, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T_co]):
    """A request without its server, and how its response is read.

    `accepted`: statuses that `read` takes, beside those below 400. `recover` turns a problem into a result, or into
    None where it is an error.
    """

    method: str
    path: str
    read: Callable[[Response], T_co]
    """Raises LookupError, TypeError or ValueError when the response is not of the form it expects."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    accept: str = "application/json"
    uploads: Sequence[Upload] = ()
    accepted: frozenset[int] = frozenset()
    timed: bool = True
    """Whether the service takes `timeout_ms`."""
    recover: Callable[[Problem], T_co | None] = lambda _: None

    def content(self) -> tuple[bytes | None, list[tuple[str, tuple[str, bytes, str]]]]:
        """The raw body, or the files of the form; a single image is the body."""
        if len(self.uploads) == 1:
            return self.uploads[0].data, []
        names = (each.filename or str(number) for number, each in enumerate(self.uploads))
        return None, [(_FIELD, (name, each.data, _BINARY)) for name, each in zip(names, self.uploads, strict=True)]

    def headers(self) -> dict[str, str]:
        """The headers that depend on the call."""
        typed = {"Content-Type": _BINARY} if len(self.uploads) == 1 else {}
        return {"Accept": self.accept, **typed}


@overload
def predict(image: Images[AnyImage], **options: Unpack[PredictOptions]) -> Call[list[Prediction | PvtError]]: ...


@overload
def predict(image: Image, **options: Unpack[PredictOptions]) -> Call[Prediction]: ...


def predict(
    image: Image | Images[AnyImage], **options: Unpack[PredictOptions]
) -> Call[Prediction] | Call[list[Prediction | PvtError]]:
    """The best classes of an image; of each image of a list in one request, where a bad one becomes its error."""
    uploads = _uploads(image)

    def read_all(response: Response) -> list[Prediction | PvtError]:
        body = json.loads(response.body)
        pairs = zip(body["results"], uploads, strict=True)
        return [results.read_prediction(each, sent.filename, body["model"], body["version"]) for each, sent in pairs]

    def read_one(response: Response) -> Prediction:
        (result,) = read_all(response)
        if isinstance(result, PvtError):
            raise result
        return result

    if isinstance(image, list | tuple):
        return _post("/predict", uploads, read_all, options, recover=_in_place)
    return _post("/predict", uploads, read_one, options)


def features(image: Image | Images[AnyImage], **options: Unpack[FeaturesOptions]) -> Call[Features]:
    """The embedding and the requested stages; those of a list are stacked, and one bad image fails them all."""
    several = isinstance(image, list | tuple)
    stages = options.pop("stages", ())

    def read(response: Response) -> Features:
        arrays, metadata = results.read_tensors(response.body)
        arrays = arrays if several else {name: array[0] for name, array in arrays.items()}
        maps = {number: arrays[f"stage{number}"] for number in stages}
        return Features(arrays["embedding"], maps, metadata["model"], metadata["version"])

    parameters = {**options, "stages": ",".join(map(str, stages)) or None}
    return _post("/features", _uploads(image), read, parameters, accept=results.SAFETENSORS)


def embedding(image: Image, **options: Unpack[FeaturesOptions]) -> Call[Embedding]:
    """The embedding of an image, with the size of the image."""

    def read(response: Response) -> Embedding:
        body = json.loads(response.body)
        (result,) = body["results"]
        vector = np.array(result["embedding"], np.float32)
        return Embedding(result["width"], result["height"], vector, body["model"], body["version"])

    return _post("/features", _uploads(image), read, options)


def explain(image: Image, **options: Unpack[ExplainOptions]) -> Call[bytes]:
    """The exact class activation map laid over the image, as a PNG."""
    return _post("/explain", _uploads(image), lambda response: response.body, options, accept="image/png")


def explain_map(image: Image, **options: Unpack[MapOptions]) -> Call[Explanation]:
    """The exact class activation map in numbers."""
    uploads = _uploads(image)

    def read(response: Response) -> Explanation:
        body = json.loads(response.body)
        (result,) = body["results"]
        own = {"filename": uploads[0].filename, "map": np.array(result["map"], np.float32)}
        return Explanation(**{**result, **own}, model=body["model"], version=body["version"])

    return _post("/explain", uploads, read, options)


def models() -> Call[list[Model]]:
    """Every model that the service has."""
    return _get("/models", lambda body: [results.read_model(each) for each in body["models"]])


def model(name: str) -> Call[Model]:
    """One model."""
    return _get(f"/models/{quote(name, safe='@')}", results.read_model)


def health() -> Call[Health]:
    """Whether the service is live and ready, and if not, why."""
    return _get("/health", lambda body: Health(body["live"], body["ready"], tuple(body["reasons"])), _UNHEALTHY)


def _uploads(image: Image | Images[AnyImage]) -> list[Upload]:
    return [upload(each) for each in image] if isinstance(image, list | tuple) else [upload(image)]


def _in_place(problem: Problem) -> list[Prediction | PvtError] | None:
    """In a list of one image the error takes its place, as it does among several."""
    of_the_image = isinstance(problem, InvalidImage | ImageTooLarge) and not problem.type.endswith(":body-too-large")
    return [problem] if of_the_image else None


def _get(path: str, read: Callable[[Any], T], *accepted: int) -> Call[T]:
    """A call whose response is JSON."""

    def parsed(response: Response) -> T:
        return read(json.loads(response.body))

    return Call(method="GET", path=path, read=parsed, accepted=frozenset(accepted), timed=False)


def _post(
    path: str,
    uploads: Sequence[Upload],
    read: Callable[[Response], T],
    parameters: Mapping[str, object],
    *,
    accept: str = "application/json",
    recover: Callable[[Problem], T | None] = lambda _: None,
) -> Call[T]:
    texts = {name: _text(value) for name, value in parameters.items() if value is not None}
    return Call(method="POST", path=path, read=read, parameters=texts, accept=accept, uploads=uploads, recover=recover)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
