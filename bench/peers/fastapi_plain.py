"""Plain FastAPI: the eager model in an endpoint of its thread pool, no batching."""

from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, UploadFile

from bench.peers.common import classify, make_model, port, prepare

app = FastAPI()
model = make_model()


@app.post("/predict")
def predict(image: UploadFile) -> dict[str, Any]:
    """The answer to one image."""
    return classify(model, torch.stack([prepare(image.file.read())]))[0]


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=port(), log_level="warning", access_log=False)
