"""`pvt-serve top`: what a service does, from `GET /stats`, anew each second."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Annotated, Any

from typer import Option

from cli import options
from cli.environment import service_url
from cli.listing import megabytes
from cli.table import Column, table_lines
from cli.terminal import output_console, print_line, reason, thousands
from pvt_client import Client, ConnectionFailed, Retries, TimedOut
from pvt_client.calls import Call

Stats = Mapping[str, Any]
_TIMEOUT_SECONDS = 10.0
_WIDTH, _BATCHES, _ROUTES = 80, 8, 8  # where standard output is no terminal; lines
_ONCE = Retries(attempts=1)


def top(
    url: options.ServiceUrl = None,
    key: options.Key = None,
    seconds: Annotated[float, Option(min=0.1, max=3600, help="Time from one look to the next.")] = 1,
    times: Annotated[
        int | None, Option("-n", "--times", min=1, help="Looks in all; by default until Ctrl-C on a terminal, else 1.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Write what GET /stats answers, one object a line.")] = False,
) -> None:
    """Show what a service does, anew each second.

    Requests of the last minute with their rates, failures and latencies; images in the queues; busy instances; memory;
    the last batches. The service sums its workers up. Ctrl-C ends it.
    """
    address, console = service_url(url), output_console()
    live = console.is_interactive and not as_json
    looks = range(times or 1) if times or not live else count()
    call = Call("/stats", _stats)
    with Client(address, api_key=key, timeout=_TIMEOUT_SECONDS, retries=_ONCE) as client:
        found = client.send(call)  # a service that is not there ends the command
        if not live:
            for look in looks:
                if look:
                    time.sleep(seconds)
                    found = client.send(call)
                text = json.dumps(found) if as_json else "\n".join(screen(found, address, _WIDTH))
                print_line(text)
                sys.stdout.flush()
            return
        _watch(client, call, found, address, seconds, times)


def _watch(client: Client, call: Call[Stats], found: Stats, address: str, seconds: float, times: int | None) -> None:
    """Show it on the whole terminal until Ctrl-C, or `times` times; a service that goes away may come back."""
    from rich.live import Live
    from rich.text import Text

    console, trouble = output_console(), ""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            for look in count(1):
                lines = screen(found, address, console.width)[: console.height - 1]
                live.update(Text("\n".join([trouble, *lines[1:]] if trouble else lines), no_wrap=True), refresh=True)
                if look == times:
                    break
                time.sleep(seconds)
                try:
                    found, trouble = client.send(call), ""
                except (ConnectionFailed, TimedOut) as error:
                    trouble = f"trying again: {address}: {reason(error)}"
        except KeyboardInterrupt:  # which is how it ends
            return


def _stats(body: Stats) -> Stats:
    if not {"routes", "queues", "instances", "batches", "memory"} <= {*body}:
        raise ValueError("no stats")
    return body


def screen(stats: Stats, address: str, width: int) -> list[str]:
    """The lines for `stats` of the service at `address`, in at most `width` columns."""
    batches, instances = stats["batches"], stats["instances"]
    workers = f", {stats['workers']} workers" if stats["workers"] > 1 else ""
    mean = f" of {batches['mean_size']:g} images" if batches["mean_size"] else ""
    return [
        f"{address}  pvt-serve {stats['version']}{workers}, up {_duration(stats['uptime_seconds'])}",
        f"{stats['in_flight']} requests in flight, {instances['busy']} of {instances['total']} instances busy",
        _memory(stats["memory"]),
        f"{batches['batches']} batches{mean} in the last {stats['window_seconds']} s",
        "",
        *(table_lines(_ROUTE_COLUMNS, stats["routes"][:_ROUTES], width) or ["no requests in the last minute"]),
        "",
        *(table_lines(_QUEUE_COLUMNS, stats["queues"], width) or ["no queues: no model is loaded"]),
        *(
            ["", *table_lines(_batch_columns(stats["at"]), batches["last"][:_BATCHES], width)]
            if batches["last"]
            else []
        ),
    ]


_ROUTE_COLUMNS: Sequence[Column[Stats]] = (
    Column("route", lambda row: row["route"]),
    Column("per s", lambda row: f"{row['per_second']:,.1f}", right=True),
    Column("p50 ms", lambda row: f"{row['p50_ms']:,.1f}", right=True),
    Column("p99 ms", lambda row: f"{row['p99_ms']:,.1f}", right=True),
    Column("requests", lambda row: thousands(row["requests"]), drop=2, right=True),
    Column("4xx", lambda row: thousands(row["client_errors"]), drop=1, right=True),
    Column("refused", lambda row: thousands(row["refused"]), right=True),
    Column("5xx", lambda row: thousands(row["server_errors"]), right=True),
)
_QUEUE_COLUMNS: Sequence[Column[Stats]] = (
    Column("queue", lambda row: row["model"]),
    Column("to decode", lambda row: thousands(row["waiting_decode"]), drop=2, right=True),
    Column("decoding", lambda row: thousands(row["decoding"]), drop=1, right=True),
    Column("queued", lambda row: thousands(row["queued"]), right=True),
    Column("running", lambda row: thousands(row["running"]), right=True),
    Column("capacity", lambda row: thousands(row["capacity"]), drop=3, right=True),
)


def _batch_columns(now: float) -> Sequence[Column[Stats]]:
    return (
        Column("batch of", lambda row: row["model"]),
        Column("images", lambda row: thousands(row["size"]), right=True),
        Column("waited ms", lambda row: f"{row['wait_ms']:,.1f}", right=True),
        Column("ran ms", lambda row: "runs" if row["run_ms"] is None else f"{row['run_ms']:,.1f}", right=True),
        Column("because", lambda row: row["reason"], drop=2),
        Column("ago", lambda row: f"{max(now - row['at'], 0):.1f} s", drop=1, right=True),
    )


def _memory(memory: Stats) -> str:
    models = sum(memory["models_bytes"].values())
    budget = f" of {megabytes(memory['models_budget_bytes'])}" if memory["models_budget_bytes"] else ""
    reserved = sum(memory["reserved_bytes"].values())
    limit = f" of {megabytes(memory['reservable_bytes'])}" if memory["reservable_bytes"] else ""
    return (
        f"{megabytes(memory['resident_bytes'])} MB resident, models {megabytes(models)}{budget} MB, "
        f"reserved {megabytes(reserved)}{limit} MB"
    )


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if days:
        return f"{days:.0f} d {hours % 24:.0f} h"
    if hours:
        return f"{hours:.0f} h {minutes % 60:.0f} min"
    return f"{minutes:.0f} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"
