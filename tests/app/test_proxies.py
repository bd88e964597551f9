"""Where trusted proxies say the service is, and how its path is told from theirs."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from app.proxies import Proxies, base_url
from app.settings import Settings, SettingsInvalid
from tests.app.conftest import MakeClient

ENDPOINTS = {"models", "predict", "v1"}


def placed(
    path: str, *headers: tuple[str, str], root_path: str = "", mounted: str = "", peer: str = "10.0.0.1"
) -> dict[str, Any]:
    scope: dict[str, Any] = {
        "type": "http", "path": path, "raw_path": path.encode(), "root_path": mounted, "scheme": "http",
        "headers": [(name.lower().encode(), value.encode()) for name, value in (("Host", "inside:8000"), *headers)],
        "client": (peer, 1), "state": {},
    }  # fmt: skip
    settings = Settings(trusted_proxies="10.0.0.0/8", root_path=root_path)  # type: ignore[arg-type]  # as from a variable
    Proxies(settings, ENDPOINTS).place(scope)
    return scope


@pytest.mark.parametrize(
    ("path", "full"),
    [
        ("/predict", "/pvt/predict"),
        ("/pvt/predict", "/pvt/predict"),
        ("/pvt", "/pvt/"),
        ("/pvt/", "/pvt/"),
        ("/", "/pvt/"),
        ("/pvtx", "/pvt/pvtx"),
        ("//predict", "/pvt/predict"),
        ("/pvt//predict", "/pvt/predict"),
        ("*", "*"),
        ("/pvt/pvt", "/pvt/pvt"),
    ],
)
def test_a_path_has_the_prefix_once_whether_it_was_removed_or_not(path: str, full: str) -> None:
    for scope in (placed(path, root_path="/pvt"), placed(path, ("X-Forwarded-Prefix", "/pvt"))):
        assert (scope["path"], scope["raw_path"]) == (full, full.encode())
        assert scope["root_path"] == ("" if path == "*" else "/pvt")


def test_a_prefix_like_an_endpoint_was_removed() -> None:
    assert placed("/models/b0", root_path="/models")["path"] == "/models/models/b0"
    assert placed("/v1/models", root_path="/v1/ai")["path"] == "/v1/ai/v1/models"


@pytest.mark.parametrize(
    ("values", "root"),
    [
        (["/pvt/"], "/pvt"),
        (["/a", "/b"], "/a/b"),
        (["/a, /b/"], "/a/b"),
        (["/"], "/set"),
        ([""], "/set"),
        (["pvt"], "/set"),
        (["//evil.example"], "/set"),
        (["/../x"], "/set"),
        (["/a/./b"], "/set"),
        (["/a//b"], "/set"),
        (["/<script>"], "/set"),
        (["/a b"], "/set"),
        (["/\\evil"], "/set"),
        (["/" + "a" * 300], "/set"),
        (["/a"] * 3000, "/set"),
    ],
)
def test_a_prefix_in_another_than_its_usual_form_does_not_count(values: list[str], root: str) -> None:
    headers = [("X-Forwarded-Prefix", value) for value in values]

    assert placed("/predict", *headers, root_path="/set")["root_path"] == root


@pytest.mark.parametrize(
    ("headers", "url"),
    [
        ([("X-Forwarded-Proto", "https"), ("X-Forwarded-Host", "example.org")], "https://example.org"),
        (
            [("X-Forwarded-Proto", "HTTPS, http"), ("X-Forwarded-Host", "example.org:8443, in")],
            "https://example.org:8443",
        ),
        ([("Forwarded", 'for=1.2.3.4;proto=https;host="example.org:8443", for=10.0.0.2')], "https://example.org:8443"),
        ([("Forwarded", "proto=https"), ("X-Forwarded-Proto", "https")], "https://inside:8000"),
        ([("Forwarded", "proto=https"), ("X-Forwarded-Proto", "http")], "http://inside:8000"),
        ([("Forwarded", "host=a.example"), ("X-Forwarded-Host", "b.example")], "http://inside:8000"),
        ([("X-Forwarded-Host", "[2001:db8::1]:80")], "http://[2001:db8::1]:80"),
        ([("X-Forwarded-Proto", "javascript")], "http://inside:8000"),
        ([("X-Forwarded-Host", "evil/<script>")], "http://inside:8000"),
        ([("X-Forwarded-Host", "a@evil.example")], "http://inside:8000"),
        ([("Forwarded", ';;==,"')], "http://inside:8000"),
        ([("X-Forwarded-Host", "")], "http://inside:8000"),
    ],
)
def test_scheme_and_host_are_those_of_the_outermost_proxy(headers: list[tuple[str, str]], url: str) -> None:
    assert base_url(placed("/", *headers)) == url


def test_who_is_no_trusted_proxy_says_nothing() -> None:
    said = [("X-Forwarded-Prefix", "/evil"), ("X-Forwarded-Proto", "https"), ("X-Forwarded-Host", "evil.example")]
    scope = placed("/", *said, peer="192.0.2.1")

    assert (scope["root_path"], scope["path"], base_url(scope)) == ("", "/", "http://inside:8000")


def test_below_another_application_both_paths_count() -> None:
    scope = placed("/images/predict", root_path="/pvt", mounted="/images")
    again = placed("/pvt/predict", root_path="/pvt", mounted="/pvt")  # the server knows the prefix too

    assert (scope["root_path"], scope["path"]) == ("/pvt/images", "/pvt/images/predict")
    assert (again["root_path"], again["path"]) == ("/pvt", "/pvt/predict")


@pytest.mark.parametrize("host", ["<script>alert(1)</script>", "a b", "", "x" * 300, "evil.example/path"])
def test_the_start_page_shows_no_host_that_is_none(client: TestClient, host: str) -> None:
    page = client.get("/", headers={"Host": host}).text

    assert "curl -F image=@image.png http://localhost/predict" in page
    assert host == "" or host not in page


def test_errors_have_their_protocols_form_below_a_prefix(make_client: MakeClient) -> None:
    client = make_client(root_path="/pvt")

    for path in ("/v2/models/none", "/pvt/v2/models/none"):
        assert [*client.get(path).json()] == ["error"]
    assert [*client.get("/pvt/v1/models/none").json()["error"]] == ["message", "type", "param", "code"]


@pytest.mark.parametrize("value", ["pvt", "//x", "/a b", "/a/../b", "http://x/pvt", "/ä"])
def test_a_root_path_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PVT_ROOT_PATH", value)

    with pytest.raises(SettingsInvalid, match="a path such as /images or /team/images"):
        Settings.from_environment()
