"""What answers look like, for the OpenAPI document; long lists are cut short."""

from typing import Any

_MODEL: dict[str, Any] = {"model": "pvt_v2_b0.digits", "version": "1"}
_PICTURE: dict[str, Any] = {"filename": "seven.png", "width": 64, "height": 64}

PREDICTED: dict[str, Any] = {
    **_MODEL,
    "results": [
        {
            **_PICTURE,
            "predictions": [
                {"class_id": 7, "label": "7", "score": 0.9713},
                {"class_id": 8, "label": "8", "score": 0.0069},
            ],
        }
    ],
}
FEATURES: dict[str, Any] = {
    **_MODEL,
    "size": [64, 64],
    "results": [
        {**_PICTURE, "embedding": [-0.2731, 1.204], "stages": {"4": {"shape": [2, 1, 1], "data": [-0.2731, 1.204]}}}
    ],
}
EXPLAINED: dict[str, Any] = {
    **_MODEL,
    "size": [64, 64],
    "results": [
        {
            **_PICTURE,
            "class_id": 7,
            "label": "7",
            "score": 0.9713,
            "logit": 5.5,
            "bias": -0.5,
            "map": [[4.0, 8.0], [5.0, 7.0]],
        }
    ],
}
EMBEDDED: dict[str, Any] = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [-0.2731, 1.204]}],
    "model": "pvt_v2_b0.digits",
    "usage": {"prompt_tokens": 0, "total_tokens": 0},
}
INFERRED: dict[str, Any] = {
    "model_name": "pvt_v2_b0.digits",
    "model_version": "1",
    "outputs": [
        {"name": "probabilities", "datatype": "BYTES", "shape": [1, 2], "data": ["0.971299:7:7", "0.006864:8:8"]}
    ],
}
