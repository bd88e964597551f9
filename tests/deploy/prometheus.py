"""Prometheus itself, which scrapes a server and evaluates the project's rules, over windows of seconds."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
WINDOW = "6s"


@dataclass
class Prometheus:
    client: httpx.Client

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query; fails where Prometheus has an error or a warning to report."""
        answer = self.client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        assert not answer.get("warnings"), (expression, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def value(self, expression: str) -> float:
        """The one number of an instant query; 0 of none."""
        values = [float(each["value"][1]) for each in self.query(expression)]
        assert len(values) <= 1, expression
        return values[0] if values else 0.0

    def alerts(self) -> dict[str, dict[str, Any]]:
        """Those that fire, by name."""
        found = self.client.get("/api/v1/alerts").json()["data"]["alerts"]
        return {each["labels"]["alertname"]: each for each in found if each["state"] == "firing"}


def hastened(text: str) -> str:
    """Configuration or rules whose windows of minutes and hours last seconds."""
    text = re.sub(r"\[\d+[mh]\]", f"[{WINDOW}]", text)
    text = re.sub(r"\bfor: \d+m", "for: 1s", text)
    return re.sub(r"interval: \d+s", "interval: 1s", text)


@contextmanager
def scraping(url: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the project's configuration, which scrapes the server at `url`."""
    folder.mkdir(exist_ok=True)
    for path in PROMETHEUS.glob("*.yml"):
        text = hastened(path.read_text()).replace("pvt-serve:8000", url.removeprefix("http://"))
        (folder / path.name).write_text(text)
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
               "--web.listen-address=127.0.0.1:0", "--enable-feature=exemplar-storage"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        try:
            address = _address(process)
            Thread(target=process.communicate, daemon=True).start()  # a full pipe would stop it
            with httpx.Client(base_url=address, timeout=60) as client:
                yield Prometheus(client)
        finally:
            process.kill()


def _address(process: "subprocess.Popen[str]") -> str:
    """Where it listens, once it is ready."""
    assert process.stderr
    url, seen = "", []
    for line in process.stderr:
        seen.append(line)
        if match := re.search(r'msg="Listening on" address=(\S+)', line):
            url = f"http://{match[1]}"
        if "ready to receive web requests" in line:
            return url
    pytest.fail("Prometheus ended: " + "".join(seen[-5:]))
