import base64
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_network
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.app.conftest import MakeClient
from tests.service.hub import QuietServer
from tests.service.stores import add_model

HOLD = Event()


class Images(BaseHTTPRequestHandler):
    """`/seven.png`, `/text`, `/slow`, which never ends, and nothing else."""

    digits = Path(__file__).parent.parent.parent.parent / "docs" / "digits"

    def do_GET(self) -> None:
        if self.path == "/slow":
            HOLD.wait(30)
        if self.path not in {"/seven.png", "/text"}:
            self.send_error(404, "no secret here")
            return
        body = (self.digits / "seven.png").read_bytes() if self.path == "/seven.png" else b"some secret text"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        pass


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """A server of images on this machine, which is a private network."""
    HOLD.clear()
    with QuietServer(("127.0.0.1", 0), Images) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"localhost:{server.server_address[1]}"
        HOLD.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Those of a service whose model is quickly loaded."""
    root = tmp_path_factory.mktemp("store")
    add_model(root)
    return {"model_store": root, "default_model": "pvt_v2_b0.tiny", "backend": "torch", "max_batch_size": 1}


@pytest.fixture(scope="module")
def client(settings: dict[str, Any], store: str) -> Iterator[TestClient]:
    """A service that may fetch from there."""
    private = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    app = create_app(Settings(**settings, url_hosts=(store,), url_private_networks=private, url_timeout_ms=500))
    with TestClient(app) as client:
        yield client


def test_an_image_by_url_is_answered_with_its_name_and_the_time_that_fetching_took(
    client: TestClient, store: str
) -> None:
    response = client.post("/predict", json={"images": [{"url": f"http://{store}/seven.png"}]})

    (result,) = response.json()["results"]
    assert (result["filename"], result["width"], len(result["predictions"])) == ("seven.png", 64, 3)
    assert response.headers["Server-Timing"].startswith("read;dur=")
    assert ", fetch;dur=" in response.headers["Server-Timing"]


def test_one_url_that_fails_is_an_error_in_its_place(client: TestClient, store: str, digits: Path) -> None:
    seven = base64.b64encode((digits / "seven.png").read_bytes()).decode()
    urls = ["seven.png", "missing", "text"]

    response = client.post(
        "/predict", json={"images": [*({"url": f"http://{store}/{name}"} for name in urls), seven, {"url": "ftp://x"}]}
    )

    assert response.status_code == 200
    good, missing, text, encoded, refused = response.json()["results"]
    assert good["predictions"] == encoded["predictions"]
    assert [each["error"]["status"] for each in (missing, text, refused)] == [502, 422, 422]
    assert missing["error"]["detail"] == "the URL's host localhost answered 404"
    assert "secret" not in response.text
    assert "127.0.0.1" not in response.text


@pytest.mark.parametrize("path", ["/predict", "/features", "/explain"])
def test_a_single_url_that_fails_is_the_response_of_every_endpoint(client: TestClient, store: str, path: str) -> None:
    response = client.post(path, json={"images": [{"url": f"http://{store}/missing"}]})

    assert response.status_code == 502
    assert response.json()["type"] == "urn:pvt-serve:problem:image-unreachable"


def test_urls_are_off_unless_hosts_are_named(make_client: MakeClient, settings: dict[str, Any], store: str) -> None:
    response = make_client(**settings).post("/predict", json={"images": [{"url": f"http://{store}/seven.png"}]})

    assert response.status_code == 422
    assert "images by URL are off; PVT_URL_HOSTS is to name the hosts" in response.json()["detail"]


def test_a_host_that_is_named_is_not_reached_at_a_private_address_unless_its_network_is_named_too(
    make_client: MakeClient, settings: dict[str, Any], store: str
) -> None:
    client = make_client(**settings, url_hosts=(store,))

    response = client.post("/predict", json={"images": [{"url": f"http://{store}/seven.png"}]})

    assert response.status_code == 502
    assert response.json()["detail"] == "the URL's host localhost can't be reached at a public address"


def test_fetching_counts_against_the_requests_own_time(client: TestClient, store: str) -> None:
    response = client.post("/predict?timeout_ms=50", json={"images": [{"url": f"http://{store}/slow"}]})

    assert response.status_code == 504
    assert response.json()["detail"] == "no answer within 50 ms; allow more with timeout_ms or PVT_TIMEOUT_MS"


def test_an_image_that_takes_too_long_is_its_own_error(client: TestClient, store: str) -> None:
    response = client.post("/predict", json={"images": [{"url": f"http://{store}/{n}"} for n in ("slow", "seven.png")]})

    slow, seven = response.json()["results"]
    assert slow["error"]["status"] == 504
    assert seven["predictions"]
    assert 'pvt_url_fetches_total{outcome="ImageTimedOut"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("name", "value"), [("url_hosts", "http://example.org"), ("url_private_networks", "10.0.0.0/99")]
)
def test_a_setting_that_is_no_host_or_network_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]  # as the environment gives it
