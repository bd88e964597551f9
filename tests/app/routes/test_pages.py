import re
from gzip import compress
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.routes.page import FILES
from tests.app.conftest import MakeClient, png


def addresses_of(page: str) -> set[str]:
    """What a page links to or loads, and where its forms go."""
    return {each for each in re.findall(r'(?:src|href|action)="(.*?)"', page) if not each.startswith("#")}


def test_the_page_says_what_this_is_and_everything_that_it_links_to_is_there(client: TestClient) -> None:
    response = client.get("/")

    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "Pyramid Vision Transformer v2" in response.text
    assert "curl -F image=@image.png http://testserver/predict" in response.text
    assert {"./static/main.js", "./static/page.css", "./docs", "./predict"} <= addresses_of(response.text)
    found = {each: client.get(each.removeprefix(".")).status_code for each in addresses_of(response.text)}
    assert {each for each, status in found.items() if status != 200} == {"./predict"}  # which takes POST


def test_the_page_allows_nothing_but_its_own_files(client: TestClient) -> None:
    for path in ("/", "/static/main.js", "/static/page.css", "/static/samples/seven.png"):
        response = client.get(path)
        policy = dict(each.strip().split(" ", 1) for each in response.headers["Content-Security-Policy"].split(";"))

        assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
        assert (policy["connect-src"], policy["img-src"]) == ("'self'", "'self' blob: data:")
        assert (policy["form-action"], policy["base-uri"], policy["frame-ancestors"]) == ("'self'", "'none'", "'none'")
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_has_no_inline_script_or_style(client: TestClient) -> None:
    page = client.get("/").text

    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", page)
    assert re.findall(r"<script(.*?)>(.*?)</script>", page) == [(' type="module" src="./static/main.js"', "")]


def test_a_file_of_the_page_is_sent_once_until_it_changes(client: TestClient) -> None:
    first = client.get("/static/main.js")
    again = client.get("/static/main.js", headers={"If-None-Match": f'"other", W/{first.headers["ETag"]}'})
    changed = client.get("/static/main.js", headers={"If-None-Match": '"other"'})

    assert first.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", first.headers["ETag"])
    assert (changed.status_code, changed.content) == (200, first.content)


@pytest.mark.parametrize(
    "name", ["nothing.js", "../main.py", "..%2fmain.py", "%2e%2e/main.py", "/etc/passwd", "samples", "samples/", ""]
)
def test_nothing_but_files_of_the_page_is_below_static(client: TestClient, name: str) -> None:
    response = client.get(f"/static/{name}")

    assert response.status_code == 404
    assert response.headers["Content-Type"] == "application/problem+json"


def test_below_a_prefix_the_page_works_with_and_without_a_slash_at_its_end(make_client: MakeClient) -> None:
    client = make_client(root_path="/team/images")
    for path in ("/team/images", "/team/images/", "/"):
        page = client.get(path)

        assert "curl -F image=@image.png http://testserver/team/images/predict" in page.text
        assert "/team/images/static/main.js" in addresses_of(page.text)
        assert all(each.startswith("/team/images/") for each in addresses_of(page.text))
    assert client.get("/team/images/static/main.js").status_code == 200


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({}, "refused"),
        ({"management_keys": ("root",)}, "key"),
        ({"management_port": 8001}, "refused"),
        ({"management_port": 8001, "management_keys": ("root",)}, "refused"),
        ({"management_keys": ("root",), "workers": 2}, "refused"),
    ],
)
def test_the_page_says_whether_it_can_manage_models_in_the_words_of_a_refusal(
    make_client: MakeClient, settings: dict[str, Any], way: str
) -> None:
    client = make_client(**settings)
    match = re.search(r'<p id="manage-note" data-way="(.*?)">(.*?)</p>', client.get("/").text)
    refused = client.post("/models/pvt_v2_b0.digits/load", headers={"Authorization": "Bearer root"})

    assert match
    assert match[1] == way
    assert (refused.status_code == 403) == (way == "refused")
    if way == "refused":
        assert unescape(match[2]).startswith(refused.json()["detail"])


def test_on_the_port_of_management_the_page_needs_no_key_for_it(make_client: MakeClient) -> None:
    client = make_client(management_port=80)

    assert 'data-way="open"' in client.get("http://localhost/").text
    assert 'data-way="refused"' in client.get("/").text  # at a name that another site could have given it


def test_a_host_of_the_client_is_no_markup(client: TestClient) -> None:
    assert "<script>x" not in client.get("/", headers={"Host": '"><script>x</script>'}).text


def test_the_page_is_at_most_60_kilobytes_compressed() -> None:
    assert sum(len(compress(content)) for content in FILES.values()) <= 60_000


def test_without_the_page_there_are_no_docs_either(make_client: MakeClient) -> None:
    client = make_client(ui="off")
    gone = {path: client.get(path) for path in ("/", "/docs", "/static/main.js", "/static-offline-docs/swagger-ui.css")}

    assert {path: response.status_code for path, response in gone.items()} == dict.fromkeys(gone, 404)
    assert "GET /openapi.json lists what there is" in gone["/"].json()["detail"]
    assert client.get("/openapi.json").status_code == 200
    assert client.post("/predict", files={"image": png()}).status_code == 200


def test_the_docs_load_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs").text

    addresses = re.findall(r'(?:src|href)="(.*?)"', page)
    assert len(addresses) >= 3
    assert all(client.get(address).status_code == 200 for address in addresses if address.startswith("/"))
    assert not [address for address in addresses if not address.startswith("/")]


def test_the_schema_describes_all_three_forms_of_a_body(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/predict"]["post"]

    content = operation["requestBody"]["content"]
    assert set(content) == {
        "multipart/form-data",
        "image/png",
        "image/jpeg",
        "application/octet-stream",
        "application/json",
    }
    assert {"200", "404", "413", "415", "422", "429", "503", "504"} <= set(operation["responses"])


def test_files_of_the_page_count_for_no_limit_of_clients(make_client: MakeClient) -> None:
    client = make_client(client_rate=0.001, client_burst=1)

    assert [client.get(path).status_code for path in ("/", "/static/main.js", "/static/try.js", "/")] == [200] * 4
    assert client.post("/predict", files={"image": png()}).status_code == 200
    assert client.post("/predict", files={"image": png()}).status_code == 429


def test_the_samples_are_the_digits_of_the_docs(client: TestClient, digits: Path) -> None:
    names = sorted(path.name for path in digits.iterdir())

    assert names == sorted(name.removeprefix("samples/") for name in FILES if name.startswith("samples/"))
    assert [
        name for name in names if client.get(f"/static/samples/{name}").content != (digits / name).read_bytes()
    ] == []
