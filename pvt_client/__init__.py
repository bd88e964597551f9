"""A typed client of pvt-serve, on httpx and numpy alone.

>>> from pvt_client import Client
>>> with Client("http://127.0.0.1:8000") as client:
...     client.predict("seven.png").best.label
"""

from pvt_client.answers import ClassScore, Explanation, Features, Health, Model, Prediction
from pvt_client.asynchronous import AsyncClient
from pvt_client.client import Client
from pvt_client.errors import (
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    Forbidden,
    ImageTooLarge,
    ImageUnreadable,
    InvalidImage,
    InvalidRequest,
    InvalidUrl,
    ModelNotFound,
    ModelUnavailable,
    NotAcceptable,
    Problem,
    PvtError,
    QueueFull,
    ServiceFailed,
    TimedOut,
    Unauthorized,
    UnexpectedAnswer,
    UnsupportedMediaType,
)
from pvt_client.images import Image
from pvt_client.retries import Retries

__all__ = [
    "AsyncClient",
    "ClassScore",
    "Client",
    "ConnectionFailed",
    "ConnectionLost",
    "DeadlineExceeded",
    "Explanation",
    "Features",
    "Forbidden",
    "Health",
    "Image",
    "ImageTooLarge",
    "ImageUnreadable",
    "InvalidImage",
    "InvalidRequest",
    "InvalidUrl",
    "Model",
    "ModelNotFound",
    "ModelUnavailable",
    "NotAcceptable",
    "Prediction",
    "Problem",
    "PvtError",
    "QueueFull",
    "Retries",
    "ServiceFailed",
    "TimedOut",
    "Unauthorized",
    "UnexpectedAnswer",
    "UnsupportedMediaType",
]
