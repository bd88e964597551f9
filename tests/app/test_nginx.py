"""A real nginx in front: idle connections, a path that is removed or kept, TLS, a Unix socket."""

import os
import re
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from socket import create_connection, create_server
from urllib.parse import urljoin

import httpx
import pytest

from app.settings import Settings
from tests.app.conftest import png
from tests.app.processes import LIGHT, serving

pytestmark = pytest.mark.skipif(
    not (shutil.which("nginx") and shutil.which("openssl")) and not os.environ.get("CI"),
    reason="needs nginx and openssl; CI has them",
)
NGINX_IDLE_SECONDS = 60  # how long nginx keeps an idle connection to an upstream, unless it is told otherwise
CONFIGURATION = """
daemon off;
pid {folder}/pid;
error_log stderr warn;
worker_processes 1;
events {{ worker_connections 256; }}
http {{
    access_log off;
    {temporary}
    upstream pvt {{ server {upstream}; keepalive 16; keepalive_timeout {idle}; }}
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header X-Forwarded-Prefix "{prefix}";
    server {{
        listen 127.0.0.1:{port} {tls};
        {locations}
    }}
}}
"""


def free_port() -> int:
    with create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def nginx(
    folder: Path, upstream: str, locations: str, *, prefix: str = "", idle: str = "60s", tls: bool = False
) -> Iterator[str]:
    """Nginx in front of `upstream`; where it listens."""
    port, secured = free_port(), ""
    if tls:
        certificate, key = str(folder / "certificate.pem"), str(folder / "key.pem")
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
                   "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        secured = f"ssl; ssl_certificate {certificate}; ssl_certificate_key {key}"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root;\n" if os.geteuid() == 0 else ""
    text = CONFIGURATION.format(folder=folder, temporary=temporary, upstream=upstream, idle=idle, port=port,
                                tls=secured, locations=locations, prefix=prefix)  # fmt: skip
    (folder / "nginx.conf").write_text(user + text)
    command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            _until_it_listens(process, port)
            yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        finally:
            process.terminate()
            _, log = process.communicate()
    assert "upstream prematurely closed" not in log


def _until_it_listens(process: "subprocess.Popen[str]", port: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if process.poll() is not None:
            assert process.stderr
            pytest.fail(f"nginx has ended: {process.stderr.read()}")
        try:
            create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            threading.Event().wait(0.02)
        else:
            return
    pytest.fail("nginx does not listen")


def upstream_of(url: str) -> str:
    return url if url.startswith("unix:") else url.removeprefix("http://")


class Links(HTMLParser):
    """Every address that a page loads or leads to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, _tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in {"href", "src"} and value]


def test_no_request_meets_a_connection_that_is_being_closed(tmp_path: Path) -> None:
    """Requests around the time at which nginx gives idle connections up, which the service keeps a bit longer.

    POSTs, since nginx sends others again by itself.
    """
    everything = "location / { proxy_pass http://pvt; }"
    with (
        serving(read_log=False, **LIGHT, keep_alive_seconds="1") as server,
        nginx(tmp_path, upstream_of(server.url), everything, idle="900ms") as url,
        httpx.Client(timeout=60) as client,
        ThreadPoolExecutor(16) as threads,
    ):

        def send(gap: float) -> int:
            threading.Event().wait(gap)
            return client.post(f"{url}/predict", files={"image": png()}).status_code

        gaps = [0.0] * 16 + [0.80 + 0.01 * n for n in range(48)]
        statuses = list(threads.map(send, gaps))

    assert statuses == [200] * len(gaps)


def test_idle_connections_stay_longer_than_those_of_nginx_and_load_balancers() -> None:
    assert Settings().keep_alive_seconds > NGINX_IDLE_SECONDS  # AWS has 60 too


@pytest.mark.parametrize(
    ("setting", "header", "location", "tls"),
    [
        ("/pvt", "", "location /pvt/ { proxy_pass http://pvt/; }", False),
        ("/pvt/", "", "location /pvt { proxy_pass http://pvt; }", True),
        ("", "/pvt", "location /pvt/ { proxy_pass http://pvt/; }", True),
        ("/other", "/pvt/", "location /pvt { proxy_pass http://pvt; }", False),
    ],
    ids=["set, removed", "set, kept, TLS", "header, removed, TLS", "header, kept"],
)
def test_every_link_works_below_a_path(tmp_path: Path, setting: str, header: str, location: str, *, tls: bool) -> None:
    """The service listens on a Unix socket, as it may beside its proxy."""
    socket = tmp_path / "pvt.sock"
    with (
        serving(**LIGHT, root_path=setting, host=f"unix:{socket}", trusted_proxies="unix") as server,
        nginx(tmp_path, upstream_of(server.url), location, prefix=header, tls=tls) as url,
    ):
        verify = ssl.create_default_context(cafile=tmp_path / "certificate.pem") if tls else False
        with httpx.Client(verify=verify, timeout=60) as client:
            start, docs = client.get(f"{url}/pvt/"), client.get(f"{url}/pvt/docs")
            found = {page.url: Links(page.text).found for page in (start, docs)}
            followed = [client.get(urljoin(str(at), link)) for at, links in found.items() for link in links
                        if not link.startswith("data:")]  # fmt: skip
            documents = re.findall(r"url: '([^']+)'", docs.text)
            document = client.get(urljoin(str(docs.url), documents[0]))
            below = urljoin(str(document.url), document.json()["servers"][0]["url"])
            predicted = client.post(f"{below}/predict", files={"image": png()})
            outside = client.get(f"{url}/docs")
            lost = client.get(f"{url}/pvt/models/")
        line = server.event("request")
        while line["path"] != "/predict":
            line = server.event("request")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as direct:
            health, metrics = direct.get("http://x/health/ready"), direct.get("http://x/metrics").text

    assert [each.status_code for each in (start, docs, document, predicted)] == [200] * 4
    assert len(followed) >= 7  # of the start page four, of the documentation its script, style and icon
    assert {str(each.url): each.status_code for each in followed if each.status_code != 200} == {}
    assert all(each.url.path.startswith("/pvt/") for each in followed)
    assert below == f"{url}/pvt"
    assert f"curl -F image=@image.png {url}/pvt/predict" in start.text
    assert not re.findall(r"['\"]/(?!pvt/)[\w-]+", docs.text)  # nothing in its script leads elsewhere
    assert outside.status_code == 404
    assert "send it to /pvt/models, without the slash" in lost.text
    assert not any(each.has_redirect_location or each.history for each in (*followed, lost, predicted))
    assert line["client"] == "ip:127.0.0.1"
    assert health.status_code == 200  # probes reach it without the path
    assert 'route="/predict"' in metrics
    assert "/pvt" not in metrics
