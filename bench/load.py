"""Closed-loop load by wrk, which costs little of the cores that the server needs."""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """\
local bodies = {}
for name in string.gmatch([[%s]], "[^\\n]+") do
  local file = assert(io.open(name, "rb"))
  bodies[#bodies + 1] = wrk.format("POST", nil, {["Content-Type"] = "image/jpeg"}, file:read("*a"))
  file:close()
end
local turn = 0
function request()
  turn = turn %% #bodies + 1
  return bodies[turn]
end
"""
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of wrk saw; `failed` counts answers other than 2xx and 3xx, and broken connections."""

    clients: int
    images_per_second: float
    p50_ms: float
    p99_ms: float
    failed: int


class Wrk:
    """Posts `pictures` in turn, one a request."""

    def __init__(self, folder: Path, pictures: Sequence[bytes]) -> None:
        """`folder` takes the pictures and the script."""
        paths = [folder / f"{i}.jpg" for i in range(len(pictures))]
        for path, picture in zip(paths, pictures, strict=True):
            path.write_bytes(picture)
        self._script = folder / "post.lua"
        self._script.write_text(_SCRIPT % "\n".join(map(str, paths)))

    def run(self, url: str, clients: int, seconds: int) -> Load:
        """Keep `clients` connections busy for `seconds`.

        Raises:
            RuntimeError: wrk is missing, or its report is not what it used to be.
        """
        command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}", "--latency", "-s", str(self._script), url]
        try:
            report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        except FileNotFoundError as error:
            raise RuntimeError("wrk is missing; install it (Debian: apt-get install wrk)") from error
        return Load(
            clients,
            float(_find(r"Requests/sec:\s+([\d.]+)", report)),
            _milliseconds(_find(r"^\s+50%\s+(\S+)", report)),
            _milliseconds(_find(r"^\s+99%\s+(\S+)", report)),
            sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", report)))
            + sum(map(int, re.findall(r"(?:connect|read|write|timeout) (\d+)", report))),
        )


def _find(pattern: str, report: str) -> str:
    match = re.search(pattern, report, re.MULTILINE)
    if not match:
        raise RuntimeError(f"no {pattern!r} in wrk's report:\n{report}")
    return match[1]


def _milliseconds(text: str) -> float:
    number, unit = _find(r"^([\d.]+)", text), _find(r"([a-z]+)$", text)
    return float(number) * _UNITS[unit]
