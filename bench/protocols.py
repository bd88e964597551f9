"""What a image costs through the other protocols, beside `POST /predict`.

    python -m bench.protocols [--variant pvt_v2_b0] [--rounds 5] [--seconds 3] [--clients 8]

One server with random weights at 224. wrk sends 640x427 JPEGs to /predict, raw and as a form, the same JPEGs and
ready-made 224x224 pixels as the binary tensors of the Open Inference Protocol, the pixels as a list of numbers in JSON,
and the JPEGs as data: URLs to /v1/embeddings. Each round goes over all of them in turn; a ratio is that to the raw
JPEGs of the same round.
"""

import argparse
import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median
from struct import pack
from tempfile import TemporaryDirectory

import numpy as np
import orjson
from PIL import Image

from bench.bodies import Body, bodies
from bench.http_overhead import ROOT, WHOLE, serving
from bench.images import jpegs
from bench.load import Wrk
from bench.make_store import TAG, make_store

IMAGES = 32
SIDE = 224
HEADER_BYTES = 300  # what the JSON in front of each binary tensor is padded to, so that one length fits all
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Way:
    """How a image is sent; `binary` with a tensor behind JSON."""

    name: str
    path: str
    make: Callable[[Sequence[bytes]], list[Body]]
    binary: bool = False


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="pvt_v2_b0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each way in each round")
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    ways, images = _ways(arguments.variant), jpegs(IMAGES)
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder / "store", arguments.variant)
        loads = [(way, Wrk(folder / way.name, way.make(images), **_headers(way))) for way in ways]
        with serving(ROOT, folder, "server", WHOLE, arguments.variant) as server:
            for _ in range(arguments.rounds):
                for way, wrk in loads:
                    load = wrk.run(server.url + way.path, arguments.clients, arguments.seconds)
                    if load.failed or not load.requests:
                        raise RuntimeError(f"not every request was answered: {way.name}, {load}")
                    rates[way.name].append(load.images_per_second)
    first = rates[ways[0].name]
    for name, each in rates.items():
        ratios = [mine / raw for mine, raw in zip(each, first, strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:24} {median(each):7.1f} images/s  {spread}")


def _ways(variant: str) -> list[Way]:
    infer = f"/v2/models/{variant}.{TAG}/infer"
    return [
        Way("predict, raw JPEG", "/predict", lambda images: bodies(images, "raw")),
        Way("predict, form", "/predict", lambda images: bodies(images, "multipart")),
        Way("v2, binary JPEG", infer, lambda images: [_encoded(each) for each in images], binary=True),
        Way("v2, binary pixels", infer, lambda images: [_pixels(each) for each in images], binary=True),
        Way("v2, pixels in JSON", infer, lambda images: [_numbers(each) for each in images]),
        Way("v1 embeddings, data URL", "/v1/embeddings", lambda images: [_data_url(each) for each in images]),
    ]


def _headers(way: Way) -> dict[str, str]:
    return {"Inference_Header_Content_Length": str(HEADER_BYTES)} if way.binary else {}


def _seen(jpeg: bytes) -> Image.Image:
    with Image.open(BytesIO(jpeg)) as image:
        return image.convert("RGB").resize((SIDE, SIDE))


def _encoded(jpeg: bytes) -> Body:
    return _binary({"name": "encoded", "datatype": "BYTES", "shape": [1]}, pack("<I", len(jpeg)) + jpeg)


def _pixels(jpeg: bytes) -> Body:
    return _binary({"name": "images", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3]}, _seen(jpeg).tobytes())


def _binary(tensor: dict[str, object], data: bytes) -> Body:
    inputs = [tensor | {"parameters": {"binary_data_size": len(data)}}]
    head = orjson.dumps({"inputs": inputs, "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}]})
    return Body("application/octet-stream", head.ljust(HEADER_BYTES) + data)


def _numbers(jpeg: bytes) -> Body:
    data = np.asarray(_seen(jpeg)).ravel()
    inputs = [{"name": "images", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3], "data": data}]
    content = {"inputs": inputs, "outputs": [{"name": "probabilities"}]}
    return Body(JSON, orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))


def _data_url(jpeg: bytes) -> Body:
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    return Body(JSON, orjson.dumps({"input": url, "encoding_format": "base64"}))


if __name__ == "__main__":
    main()
