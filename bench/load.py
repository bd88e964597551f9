"""Closed-loop load by wrk, which costs little of the cores that the server needs."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.bodies import Body
from bench.results import Closed

_SCRIPT = """\
local bodies = {}
function init()  -- before, wrk does not know what Host to send, and a request without is refused
  for name in string.gmatch([[%s]], "[^\\n]+") do
    local file = assert(io.open(name, "rb"))
    bodies[#bodies + 1] = wrk.format("POST", nil, {Host = wrk.headers.Host, %s}, file:read("*a"))
    file:close()
  end
end
local turn = 0
function request()
  turn = turn %% #bodies + 1
  return bodies[turn]
end
"""
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3}
_TIMEOUT = "60s"  # wrk counts slower answers as errors


class Wrk:
    """Posts `bodies` in turn, one a request."""

    def __init__(self, folder: Path, bodies: Sequence[Body], accept: str = "*/*", **headers: str) -> None:
        """`folder`, which is made, takes the bodies and the script; `headers` with _ for -."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{i}.body" for i in range(len(bodies))]
        for path, body in zip(paths, bodies, strict=True):
            path.write_bytes(body.data)
        self._script = folder / "post.lua"
        headers = {"Content-Type": bodies[0].content_type, "Accept": accept, **headers}
        told = ", ".join(f'["{name.replace("_", "-")}"] = "{value}"' for name, value in headers.items())
        self._script.write_text(_SCRIPT % ("\n".join(map(str, paths)), told))

    def run(self, url: str, clients: int, seconds: int) -> Closed:
        """Keep `clients` connections busy for `seconds`.

        Raises:
            RuntimeError: wrk is missing, or its report is not what it used to be.
        """
        command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}", "--latency", "--timeout", _TIMEOUT]
        try:
            run = subprocess.run([*command, "-s", str(self._script), url], check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError("wrk is missing; install it (Debian: apt-get install wrk)") from error
        return parse(run.stdout, clients)


def parse(report: str, clients: int) -> Closed:
    """What wrk's report says; raises RuntimeError when it is of another shape."""
    errors = re.findall(r"Non-2xx or 3xx responses: (\d+)", report)
    errors += re.findall(r"(?:connect|read|write|timeout) (\d+)", report)
    return Closed(
        clients=clients,
        images_per_second=float(_find(r"Requests/sec:\s+([\d.]+)", report)),
        p50_ms=_milliseconds(_find(r"^\s+50%\s+(\S+)", report)),
        p99_ms=_milliseconds(_find(r"^\s+99%\s+(\S+)", report)),
        requests=int(_find(r"^\s+(\d+) requests in", report)),
        failed=sum(map(int, errors)),
    )


def _find(pattern: str, report: str) -> str:
    match = re.search(pattern, report, re.MULTILINE)
    if not match:
        raise RuntimeError(f"no {pattern!r} in wrk's report:\n{report}")
    return match[1]


def _milliseconds(text: str) -> float:
    number, unit = _find(r"^([\d.]+)", text), _find(r"([a-z]+)$", text)
    return float(number) * _UNITS[unit]
