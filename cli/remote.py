"""The commands that look after the models of a running service: `pvt-serve ps`, `load`, `unload`, `pin` and `unpin`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
from typer import Exit

from cli import options
from cli.environment import TIMEOUT_SECONDS, service_url
from cli.listing import Details, megabytes, runs_on, version_rows
from cli.table import Column, print_table
from cli.terminal import FAILED, SOME_FAILED, print_line, print_note, print_problem, reason, spinner
from pvt_client import Client, PvtError
from pvt_client.calls import JSON, Call

_IN_MEMORY = {"ready", "loading"}


@dataclass(frozen=True, slots=True)
class Change(Call[Details]):
    """A request of management, without a body; the service answers with the model as it is then."""

    method: str = "POST"

    def request(self, seconds: float | None) -> dict[str, Any]:
        """See `Call.request`."""
        headers, timeout = {"Accept": JSON}, httpx.Timeout(seconds)
        return {"method": self.method, "url": self.path, "headers": headers, "timeout": timeout}


def ps(url: options.ServiceUrl = None, key: options.Key = None, as_json: options.Json = False) -> None:
    """List the models that a service has in memory.

    With the memory that they take, as measured, their batch plan, what runs them, and the requests in flight that use
    them. Of several workers one answers, with its own. `pvt-serve ls --url` lists all models of the service.
    """
    with spinner("waiting for the service"), _client(url, key) as client:
        models = [model.details for model in client.models()]
    rows = [row for model in models for row in version_rows(model) if row["state"] in _IN_MEMORY]
    if as_json:
        print_line(json.dumps({"models": rows}, indent=2))
    elif rows:
        print_table(_COLUMNS, rows)
    else:
        print_note("no model is in memory; the first request for one loads it, and so does pvt-serve load")


_COLUMNS: Sequence[Column[Details]] = (
    Column("model", lambda row: f"{row['id']}@{row['version']}"),
    Column("state", lambda row: row["state"] + (", pinned" if row.get("pinned") else "")),
    Column("MB", lambda row: megabytes(row.get("memory_bytes")), right=True),
    Column("in flight", lambda row: str(row.get("leases", "")), right=True),
    Column("plan", lambda row: " ".join(str(each["size"]) for each in row.get("batch_plan") or ()), drop=1),
    Column("runs on", runs_on, drop=2),
    Column("idle", lambda row: "" if row.get("idle_seconds") is None else f"{row['idle_seconds']:.0f} s", drop=3),
    Column("aliases", lambda row: ", ".join(row.get("aliases") or ()), drop=4),
)


def load(
    models: options.Names, url: options.ServiceUrl = None, key: options.Key = None, as_json: options.Json = False
) -> None:
    """Load models into the memory of a service.

    It returns when they serve. The key is one of PVT_MANAGEMENT_KEYS; a service with PVT_MANAGEMENT_PORT needs that
    port in the URL.
    """
    _change("load", models, url, key, as_json=as_json)


def unload(
    models: options.Names, url: options.ServiceUrl = None, key: options.Key = None, as_json: options.Json = False
) -> None:
    """Free the memory that models take in a service.

    All versions are unloaded unless one is named, each once no request uses it. The next request loads it again.
    """
    _change("unload", models, url, key, as_json=as_json)


def pin(
    models: options.Names, url: options.ServiceUrl = None, key: options.Key = None, as_json: options.Json = False
) -> None:
    """Load models into a service that never evicts them.

    Nor does it evict versions that take their place, until the service ends; PVT_PINNED is for good.
    """
    _change("pin", models, url, key, as_json=as_json)


def unpin(
    models: options.Names, url: options.ServiceUrl = None, key: options.Key = None, as_json: options.Json = False
) -> None:
    """Let a service evict models again."""
    _change("pin", models, url, key, as_json=as_json, method="DELETE")


def _change(
    action: str, models: Sequence[str], url: str | None, key: str | None, *, as_json: bool, method: str = "POST"
) -> None:
    """Request `action` for each of `models`; where one fails the others go on."""
    done: list[Details] = []
    with _client(url, key, management=True) as client:
        for model in dict.fromkeys(models):
            try:
                with spinner(f"{action} {model}"):
                    path = f"/models/{quote(model, safe='@')}/{action}"
                    done.append(client.send(Change(path, _details, method=method)))
            except PvtError as error:
                if len(models) == 1:
                    raise
                print_problem(f"pvt-serve: {model}: {reason(error)}")
            else:
                if not as_json:
                    print_line(_standing(done[-1]))
    if as_json:
        print_line(json.dumps({"models": done}, indent=2))
    if len(done) < len({*models}):
        raise Exit(SOME_FAILED if done else FAILED)


def _client(url: str | None, key: str | None, *, management: bool = False) -> Client:
    return Client(service_url(url, management=management), api_key=key, timeout=TIMEOUT_SECONDS)


def _details(body: Mapping[str, Any]) -> Details:
    return {**body, "id": body["id"], "version": body["version"], "state": body["state"]}  # raises if it is no model


def _standing(model: Details) -> str:
    """Where a model stands, in a line."""
    memory = f"{megabytes(model['memory_bytes'])} MB" if model.get("memory_bytes") else ""
    words = [model["state"], "pinned" if model.get("pinned") else "", runs_on(model), memory, model.get("reason") or ""]
    return f"{model['id']}@{model['version']}: {', '.join(filter(None, words))}"
