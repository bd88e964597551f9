"""A typed client of pvt-serve that needs httpx and numpy only.

>>> from pvt_client import Client
>>> with Client("http://127.0.0.1:8000") as client:
...     client.predict("seven.png").best.label
"""

from pvt_client.async_client import AsyncClient
from pvt_client.client import Client

from pvt_client.errors import (  # isort: skip
    ConnectionFailed, ConnectionLost, DeadlineExceeded, Forbidden, ImageTooLarge, ImageUnreadable, InvalidImage,
    InvalidRequest, InvalidUrl, ModelChanged, ModelNotFound, ModelUnavailable, NotAcceptable, Problem, PvtError,
    QueueFull, ServiceFailed, TimedOut, Unauthorized, UnexpectedResponse, UnsupportedMediaType,
)  # fmt: skip
from pvt_client.exchange import Retries
from pvt_client.images import Image
from pvt_client.results import Answer, ClassScore, Embedding, Explanation, Features, Health, Model, Prediction

__all__ = [
    "Answer", "AsyncClient", "ClassScore", "Client", "ConnectionFailed", "ConnectionLost", "DeadlineExceeded",
    "Embedding", "Explanation", "Features", "Forbidden", "Health", "Image", "ImageTooLarge", "ImageUnreadable",
    "InvalidImage", "InvalidRequest", "InvalidUrl", "Model", "ModelChanged", "ModelNotFound", "ModelUnavailable",
    "NotAcceptable", "Prediction", "Problem", "PvtError", "QueueFull", "Retries", "ServiceFailed", "TimedOut",
    "Unauthorized", "UnexpectedResponse", "UnsupportedMediaType",
]  # fmt: skip
