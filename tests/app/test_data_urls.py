"""Against Node's `atob` and `fetch`, which follow the specifications that browsers follow."""

import base64
import json
import os
import random
import shutil
import subprocess
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from starlette.testclient import TestClient

from app.data_urls import from_base64
from service.errors import InvalidImage
from tests.app.conftest import png

_NODE = """
const [plain, urls] = JSON.parse(require('fs').readFileSync(0));
const hex = (bytes) => Buffer.from(bytes).toString('hex');
const decoded = (text) => { try { return hex(Buffer.from(atob(text), 'latin1')) } catch { return null } };
const fetched = async (url) => { try { return hex(await (await fetch(url)).arrayBuffer()) } catch { return null } };
Promise.all(urls.map(fetched)).then((found) => console.log(JSON.stringify([plain.map(decoded), found])));
"""
LETTERS = "ABCDwxyz0189+/"
ODDITIES = ("=", "=", "\n", "\r\n", "\t", " ", "\f", "%", "é", "\v", "\0", ".", ":", "\u2028", "𝄞")
HEADERS = (
    "data:", "DATA:", "Data:image/png", "data:image/png;charset=utf-8", "data:;charset=utf-8", "data: image/png ",
    " data:image/jpeg", "da\nta:image/png", "\x01data:text/plain;a=b", "data:nonsense", "data:image#part",
)  # fmt: skip
ENCODINGS = (
    "",
    ";base64",
    ";base64",
    ";BASE64",
    "; base64",
    ";base64 ",
    ";base 64",
    ";base64;",
    ";ba\u017fe64",
    "base64",
    ";b\nase64",
)
ENDS = ("", "", "", "#part", " ", "\x02", "\n", "%", "%4", "%zz")


def texts(count: int, seed: int) -> Iterator[str]:
    """Base64 of zero to a few bytes, most of it with something odd in it."""
    pick = random.Random(seed)  # noqa: S311  repeatable, not secret
    for _ in range(count):
        text = "".join(pick.choices(LETTERS, k=pick.randrange(14)))
        for _ in range(pick.randrange(4)):
            at = pick.randrange(len(text) + 1)
            text = text[:at] + pick.choice(ODDITIES) + text[at:]
        yield text + "=" * pick.choice((0, 0, 0, 1, 2, 3))


def escaped(text: str, pick: random.Random) -> str:
    share = pick.choice((0, 0.1, 1))
    return "".join(f"%{ord(c):02{pick.choice('xX')}}" if ord(c) < 128 and pick.random() < share else c for c in text)


def urls(count: int, seed: int) -> Iterator[str]:
    pick = random.Random(seed)  # noqa: S311
    for text in texts(count, seed):
        yield pick.choice(HEADERS) + pick.choice(ENCODINGS) + "," + escaped(text, pick) + pick.choice(ENDS)


@pytest.mark.skipif(not shutil.which("node") and not os.environ.get("CI"), reason="needs node; CI has it")
def test_base64_and_data_urls_are_read_as_browsers_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of 8 characters as well, so that each oddity is also where two of them meet."""
    plain, data_urls = [*texts(6000, 1)], ["data:image/png", "data:", *urls(9000, 2)]
    given = json.dumps([plain, data_urls])
    node = subprocess.run(["node", "-e", _NODE], input=given, capture_output=True, text=True, check=True, timeout=60)
    expected = [each for found in json.loads(node.stdout) for each in found]
    assert 3000 < sum(each is None for each in expected) < 12_000

    for pieces in (131_072, 8):
        monkeypatch.setattr("app.data_urls._AT_ONCE", pieces)
        for text, right in zip(plain + data_urls, expected, strict=True):
            found = from_base64(text)
            assert (found.hex() if isinstance(found, bytes) else None) == right, text


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_url_safe_alphabet_is_read_with_and_without_padding(wrapped: bool) -> None:
    for length in range(40):
        content = np.random.default_rng(length).bytes(length)
        text = base64.urlsafe_b64encode(content).decode()
        text = "\r\n".join(text[i : i + 7] for i in range(0, len(text), 7)) if wrapped else text

        for form in (text, text.replace("=", ""), f"data:image/png;base64,{text}"):
            assert from_base64(form) == content


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("abc%", "character 4 is '%'"),
        ("ab\r\ncé", "character 6 is 'é'"),
        ("ab+/cd-_", "character 7 is '-': it mixes + and /"),
        ("abc_" * 3 + "/abc", "character 13 is '/': it mixes + and /"),
        ("ab==cdef", "character 3 is '=', which only ends base64"),
        ("ab=", "character 3 begins 1 signs '=' after 2 letters; 2 are right, or none"),
        ("abcd=", "character 5 begins 1 signs '=' after 4 letters; 0 are right, or none"),
        ("ab =\n=\n=", "character 4 begins 3 signs '='"),
        ("abcde", "the number of its letters, 5, is one too many, or the text was cut"),
        ("http://example.org/a.png", "character 5 is ':'; an image's URL goes in {\"url\": ...}"),
        ("data:image/png;base64", "no comma ends the beginning of the data: URL"),
        ("data:image/png;base64,abc?", "character 4 is '?'"),
        ("data:image/png;base64,ab%2Bc%3f", "character 5 is '?'"),
    ],
)
def test_what_is_no_base64_is_refused_with_the_character(text: str, reason: str) -> None:
    found = from_base64(text)

    assert isinstance(found, InvalidImage)
    assert reason in str(found)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("abc?", "character 200004 is '?'"),
        ("ab+/cd-_", "character 200007 is '-'"),
        ("ab==cdef", "character 200003 is '=', which"),
        ("ab=", "character 200003 begins 1 signs"),
    ],
)
def test_the_character_counts_from_the_beginning_of_a_long_text(end: str, reason: str) -> None:
    for prefix in ("", "data:image/png;base64,"):
        found = from_base64(prefix + "A" * 200_000 + end)

        assert isinstance(found, InvalidImage)
        assert reason in str(found)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(lambda text: text, id="plain"),
        pytest.param(lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)), id="MIME"),
        pytest.param(lambda text: "data:image/png;base64," + text.replace("+", "%2B").replace("=", "%3D"), id="URL"),
        pytest.param(lambda text: "data:," + "".join(f"%{ord(c):02x}" for c in text[:1_000_000]), id="escaped"),
    ],
)
def test_a_long_text_takes_the_memory_of_its_bytes(form: object) -> None:
    assert callable(form)
    text = form(base64.b64encode(np.random.default_rng(0).bytes(6_000_000)).decode())
    tracemalloc.start()
    try:
        found = from_base64(text)
        assert isinstance(found, bytes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    # Growing in place takes an eighth more for a while; a piece that is all escapes takes ten megabytes.
    assert peak < 1.3 * len(found) + 10_000_000


FORMS = (
    pytest.param(lambda text: text.rstrip("="), id="without padding"),
    pytest.param(lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + "\r\n", id="MIME"),
    pytest.param(lambda text: text.replace("+", "-").replace("/", "_"), id="URL-safe"),
    pytest.param(lambda text: f" {text[:9]}\t{text[9:]} ", id="blanks"),
    pytest.param(lambda text: f"DATA:;charset=utf-8;BASE64,{text}", id="capitals and a parameter"),
    pytest.param(lambda text: f"data:image/png;base64,{text.replace('+', '%2b').replace('/', '%2F')}", id="escaped"),
    pytest.param(
        lambda text: "data:image/png," + "".join(f"%{byte:02X}" for byte in base64.b64decode(text)), id="no base64"
    ),
)


@pytest.mark.parametrize("form", FORMS)
def test_every_endpoint_that_reads_base64_reads_its_forms(client: TestClient, form: object) -> None:
    assert callable(form)
    text = form(base64.b64encode(png(size=(34, 31))).decode())
    inputs = [{"name": "encoded", "datatype": "BYTES", "shape": [1], "data": [text]}]

    predicted = client.post("/predict", json={"images": [text]})
    inferred = client.post("/v2/models/pvt_v2_b0.digits/infer", json={"inputs": inputs})

    assert predicted.status_code == inferred.status_code == 200
    assert (predicted.json()["results"][0]["width"], predicted.json()["results"][0]["height"]) == (34, 31)
    assert [each["shape"][0] for each in inferred.json()["outputs"]] == [1, 1, 1]


def test_the_character_is_in_the_answer(client: TestClient) -> None:
    inputs = [{"name": "encoded", "datatype": "BYTES", "shape": [1], "data": ["abc%"]}]

    predicted = client.post("/predict", json={"images": ["abc%"]})
    inferred = client.post("/v2/models/pvt_v2_b0.digits/infer", json={"inputs": inputs})

    assert (predicted.status_code, inferred.status_code) == (422, 400)
    assert "character 4 is '%'" in predicted.json()["detail"]
    assert "character 4 is '%'" in inferred.json()["error"]
