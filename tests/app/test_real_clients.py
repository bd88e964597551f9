"""What real clients send when they are used as people use them, right and wrong, to a real server."""

import asyncio
import json
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import requests
import urllib3

CURL = ("curl", "--silent", "--max-time", "30", "--write-out", "\n%{http_code}")
NAME = 'été 数字 "7".png'
NODE = """
const [url, path, name] = process.argv.slice(1), bytes = require('fs').readFileSync(path);
const form = new FormData(); form.append('image', new Blob([bytes]), name);
const text = new FormData(); text.append('image', bytes.toString('base64'));
const object = JSON.stringify({images: [bytes.toString('base64')]});
const bodies = [[form, {}], [bytes, {}], [new Blob([bytes]), {}], [object, {}],
                [form, {'Content-Type': 'multipart/form-data'}], [bytes.toString('utf8'), {}], [text, {}]];
(async () => {
  const answers = [];
  for (const [body, headers] of bodies) {
    const response = await fetch(url + '/predict', {method: 'POST', body, headers});
    answers.push([response.status, await response.json()]);
  }
  console.log(JSON.stringify(answers));
})();
"""


@pytest.fixture
def seven(digits: Path, tmp_path: Path) -> Path:
    """An image of a seven under a name that is not ASCII."""
    return Path(shutil.copy(digits / "seven.png", tmp_path / NAME))


def labels(answer: Any) -> list[tuple[str | None, str]]:
    return [(each["filename"], each["predictions"][0]["label"]) for each in answer["results"]]


def curl(*arguments: str | Path, stdin: bytes | None = None) -> tuple[int, Any]:
    """Status and content of the response."""
    ran = subprocess.run([*CURL, *arguments], capture_output=True, input=stdin, check=True)
    body, _, status = ran.stdout.rpartition(b"\n")
    return int(status), json.loads(body)


@pytest.mark.parametrize(
    "options",
    [
        ["--data-binary", "@{file}"],
        ["--data-binary", "@{file}", "-H", "Content-Type:"],
        ["-X", "POST", "-T", "{file}"],
        ["-X", "POST", "-T", "-"],
        ["-F", "image=<{file}"],
        ["-F", "image=@-;filename=a"],
        ["-F", "image=@{file};encoder=base64"],
        ["-F", "image=@{file};encoder=quoted-printable"],
        ["-F", "image=@{file};type=text/plain"],
        ["-F", "image=@{file}", "-H", "Content-Type: multipart/form-data"],
        ["-F", "image=@{file}", "-H", "Content-Type: application/json"],
        ["-F", "image=@{file}", "-H", "Content-Type:"],
        ["--http1.0", "--data-binary", "@{file}"],
        ["--http2", "--data-binary", "@{file}"],
        ["-H", "Expect: 100-continue", "--data-binary", "@{file}"],
        ["-H", "Transfer-Encoding: chunked", "--data-binary", "@{file}"],
    ],
)
def test_curl_gets_an_answer_however_it_sends_a_file(service_url: str, digits: Path, options: list[str]) -> None:
    file = digits / "seven.png"

    status, answer = curl(f"{service_url}/predict", *(each.format(file=file) for each in options),
                          stdin=file.read_bytes())  # fmt: skip

    assert (status, [label for _, label in labels(answer)]) == (200, ["7"])


def test_curl_through_a_proxy_sends_absolute_targets(service_url: str, digits: Path) -> None:
    """The service is its own proxy here."""
    proxied = curl(
        "--proxy", service_url, "--noproxy", "", "http://example.org/predict", "-F", f"image=@{digits}/six.png"
    )

    assert (proxied[0], labels(proxied[1])) == (200, [("six.png", "6")])


@pytest.mark.parametrize(
    ("options", "path", "status", "way"),
    [
        (["-T", "{file}"], "/predict", 405, "curl -F image=@FILE {url}/predict, or curl -X POST -T FILE {url}/predict"),
        (["-T", "{file}"], "/predict/", 404, "to send a file: curl -X POST -T FILE {url}/predict"),
        (["-T", "{file}"], "/invocations", 405, "to send a file: curl -X POST -T FILE {url}/invocations"),
        (["-T", "{file}"], "", 404, "to send a file: curl -X POST -T FILE {url}/predict"),
        (["-T", "-"], "/predict", 405, "curl -X POST -T FILE {url}/predict"),
        ([], "/predict", 405, "it takes POST, of a file: curl -F image=@FILE {url}/predict"),
        (["--data", "@{file}"], "/predict", 422, "with curl by --data-binary, not by --data"),
        (["--data", "@{file}", "-H", "Content-Type: image/png"], "/predict", 422, "with curl by --data-binary"),
        (["--data", "image=@{file}"], "/predict", 415, "curl -F image=@FILE"),
        (["-X", "POST"], "/predict", 422, "the request carries no image; send"),
        (["-F", "image={file}"], "/predict", 422, "put an @ before the file's name: -F image=@FILE"),
        (["-F", "file=@{file}"], "/predict", 422, "unknown form field 'file'; files go in 'image': curl -F"),
        (["-F", "image[]=@{file}"], "/predict", 422, "files go in 'image'"),
        (["-F", "image=@{file},{file}"], "/predict", 422, "send each file in a field of its own (-F image=@A -F"),
        (["-F", "image=@{file}", "-F", "topk=2"], "/predict", 422, "parameters go in the query: ?topk="),
        (["-F", "image=@{file}"], "/predict?topk=2", 422, "did you mean 'top_k'?"),
        (["-F", "image=@{file}"], "/predict?model=b2", 404, "did you mean 'pvt_v2_b2'?"),
        (["-H", "Expect: tea", "-F", "image=@{file}"], "/predict", 417, "only `Expect: 100-continue`"),
        (["-H", "Host: a b"], "/health", 400, "'a b' is no `Host`"),
        (["-H", "Host:"], "/health", 400, "no `Host`"),
        (["-X", "BREW"], "/health", 501, "knows the method 'BREW'"),
        (["-F", "image=@{file}"], "/Predict", 404, "did you mean '/predict'?"),
    ],
)  # fmt: skip
def test_curl_is_told_what_to_type(  # noqa: PLR0917  a row of the table
    service_url: str, digits: Path, options: list[str], path: str, status: int, way: str
) -> None:
    arguments = [each.format(file=digits / "seven.png") for each in options]
    answered, problem = curl(service_url + path, *arguments, stdin=b"abc")

    assert answered == status
    assert way.format(url=service_url) in problem["detail"]


@pytest.mark.parametrize("extension", ["jpg", "gif", "webp", "bmp", "tif"])
def test_an_image_that_curl_has_spoiled_is_told_so_whatever_its_format(
    service_url: str, digits: Path, tmp_path: Path, extension: str
) -> None:
    from PIL import Image  # noqa: PLC0415

    Image.open(digits / "seven.png").convert("RGB").resize((90, 80)).save(tmp_path / f"a.{extension}")

    status, problem = curl(f"{service_url}/predict", "--data", f"@{tmp_path}/a.{extension}")

    assert (status, "sent as text" in problem["detail"]) == (422, True), problem


def test_requests_gets_an_answer(service_url: str, seven: Path) -> None:
    url, data = f"{service_url}/predict", seven.read_bytes()
    with requests.Session() as session, seven.open("rb") as file:
        sent: list[dict[str, Any]] = [
            {"files": {"image": file}},
            {"data": data},
            {"data": iter([data[:100], data[100:]])},
            {"files": {"image": data}, "headers": {"Content-Type": "multipart/form-data"}},
            {"files": [("image", ("a", data)), ("image", ("b", data, "image/x"))]},
        ]
        answers = [labels(session.post(url, **each).json()) for each in sent]
        put = session.put(url, data=data)

    assert answers[:3] == [[(NAME, "7")], [(None, "7")], [(None, "7")]]
    assert answers[3:] == [[("image", "7")], [("a", "7"), ("b", "7")]]
    assert put.status_code == 405


def test_urllib3_gets_an_answer_in_its_old_way_with_names_too(service_url: str, seven: Path) -> None:
    from urllib3.fields import RequestField, format_header_param_rfc2231  # noqa: PLC0415

    data = seven.read_bytes()
    field = RequestField("image", data, NAME, {"Content-Type": "image/png"})
    with pytest.warns(FutureWarning, match="deprecated"):  # version 1.x did so
        name = format_header_param_rfc2231("filename", NAME)
    field.headers["Content-Disposition"] = f'form-data; name="image"; {name}'
    assert "filename*=utf-8''" in str(field.render_headers())

    with urllib3.PoolManager() as pool:
        old = pool.request("POST", f"{service_url}/predict", fields=[field])
        new = pool.request("POST", f"{service_url}/predict", fields={"image": (NAME, data)})
        raw = pool.request("POST", f"{service_url}/predict", body=data)

    assert labels(old.json()) == labels(new.json()) == [(NAME, "7")]
    assert labels(raw.json()) == [(None, "7")]


def test_httpx_gets_an_answer(service_url: str, seven: Path) -> None:
    data = seven.read_bytes()
    url = f"{service_url}/predict"

    with httpx.Client() as client:
        form = client.post(url, files={"image": (NAME, data)})
        raw = client.post(url, content=data)
        unlabelled = client.post(url, files={"image": data}, headers={"Content-Type": "multipart/form-data"})

    assert labels(form.json()) == [(NAME, "7")]
    assert labels(raw.json()) == [(None, "7")]
    assert [label for _, label in labels(unlabelled.json())] == ["7"]


def test_aiohttp_gets_an_answer(service_url: str, seven: Path) -> None:
    data, url = seven.read_bytes(), f"{service_url}/predict"

    async def run() -> list[Any]:
        form = aiohttp.FormData()
        form.add_field("image", data, filename=NAME)
        unnamed = aiohttp.FormData()
        unnamed.add_field("image", BytesIO(data))
        quoted = aiohttp.FormData(quote_fields=False)
        quoted.add_field("image", data, filename="a b.png", content_type="image/png")
        async with aiohttp.ClientSession() as session:
            found = []
            for body in (form, unnamed, quoted, data, {"image": BytesIO(data)}):
                async with session.post(url, data=body) as response:
                    found.append(labels(await response.json()))
            return found

    form, unnamed, quoted, raw, mapping = asyncio.run(run())

    assert [each[0][1] for each in (form, unnamed, quoted, raw, mapping)] == ["7"] * 5
    assert quoted == [("a b.png", "7")]


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_nodes_fetch_gets_an_answer_or_is_told_what_is_wrong(service_url: str, seven: Path) -> None:
    ran = subprocess.run(
        ["node", "-e", NODE, service_url, str(seven), NAME], capture_output=True, text=True, check=True
    )

    *good, as_text, as_base64 = json.loads(ran.stdout)
    assert [(status, labels(answer)[0][1]) for status, answer in good] == [(200, "7")] * 5
    assert labels(good[0][1])[0][0] == NAME
    assert (as_text[0], "sent as text" in as_text[1]["detail"]) == (422, True)
    assert (as_base64[0], "base64 of an image; send the bytes" in as_base64[1]["detail"]) == (422, True)
