"""The metrics of HTTP and of the process; `service.metrics` has the engine's.

Those of HTTP have the names, labels and buckets of OpenTelemetry's conventions where there are some
(https://opentelemetry.io/docs/specs/semconv/http/http-metrics/), as its Prometheus exporter writes them.
"""

import asyncio
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge

from app import logs
from app.stats import STREAM, VERSION, Traffic
from service.metrics import Histogram

DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)  # the conventions'
SIZE_BUCKETS = (1e3, 1e4, 1e5, 1e6, 1e7, 1e8)  # the conventions have none
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
OLD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
LAG_SECONDS = 0.25
SERVER_ERRORS = 500
NAMELESS: Mapping[str, str] = MappingProxyType({})
_MOST_CHARACTERS = 128  # that OpenMetrics allows in an exemplar, names and values of its labels together


class _Series(NamedTuple):
    """What is counted of one kind of request."""

    seconds: Histogram
    received: Histogram
    sent: Histogram
    old_requests: Counter
    old_seconds: Histogram


class HttpMetrics:
    """Requests by route template, never by path, so that no client can make new time series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.traffic = Traffic()
        labels = ["http_request_method", "http_route", "http_response_status_code", "url_scheme", "error_type"]
        histogram = partial(Histogram, registry=registry, labelnames=labels)
        self._seconds = histogram(
            "http_server_request_duration_seconds",
            "Seconds from a request's head to its response's end.",
            buckets=DURATION_BUCKETS,
        )
        self._received = histogram(
            "http_server_request_body_size_bytes", "Bytes of request bodies, as far as read.", buckets=SIZE_BUCKETS
        )
        self._sent = histogram("http_server_response_body_size_bytes", "Bytes of responses.", buckets=SIZE_BUCKETS)
        self._active = Gauge(
            "http_server_active_requests",
            "Requests under way.",
            ["http_request_method", "url_scheme"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._rejected = Counter(
            "pvt_rejected", "Requests that were refused or failed, by the type of their problem.", ["reason"],
            registry=registry,
        )  # fmt: skip
        old = "Replaced by http_server_request_duration_seconds."
        self._old_requests = Counter("pvt_http_requests", old, ["route", "method", "status"], registry=registry)
        self._old_seconds = Histogram(
            "pvt_http_request_seconds", old, ["route"], buckets=OLD_BUCKETS, registry=registry
        )
        # Mutable state: the series that were counted before, since finding them costs more than counting.
        self._series: dict[tuple[str, str, int, str], _Series] = {}
        self._gauges: dict[tuple[str, str], Gauge] = {}

    def active(self, method: str, scheme: str) -> Gauge:
        """How many such requests are under way; the caller counts."""
        gauge = self._gauges.get((method, scheme))
        if gauge is None:
            known = method if method in METHODS else "_OTHER"
            gauge = self._active.labels(known, scheme)
            if known == method:  # a client can make up any number of others
                self._gauges[method, scheme] = gauge
        return gauge

    def record(
        self, route: str, method: str, status: int, seconds: float, *,
        scheme: str = "http", received: int = 0, sent: int = 0, names: Mapping[str, str] = NAMELESS,
        reason: str | None = None,
    ) -> None:  # fmt: skip
        """Count one request, with the bytes of its body and of its response's, and why it was refused, if so.

        `names` are its ids, the most important first: its exemplar has as many as fit.
        """
        series = self._series.get((route, method, status, scheme)) or self._found(route, method, status, scheme)
        series.received.observe(received)
        series.sent.observe(sent)
        series.old_requests.inc()
        if route != STREAM:  # which lasts until its client goes: that says nothing of latency
            series.seconds.observe(seconds, _exemplar(names))
            series.old_seconds.observe(seconds)
        if reason:
            self.rejected(reason)

    def rejected(self, reason: str) -> None:
        """Count a refusal, by the last part of its problem's type; of what is no request it is all that is counted."""
        self._rejected.labels(reason).inc()

    def _found(self, route: str, method: str, status: int, scheme: str) -> _Series:
        known = method if method in METHODS else "_OTHER"
        labels = known, route, str(status), scheme, str(status) if status >= SERVER_ERRORS else ""
        series = _Series(
            self._seconds.labels(*labels),
            self._received.labels(*labels),
            self._sent.labels(*labels),
            self._old_requests.labels(route, "other" if known == "_OTHER" else known, str(status)),
            self._old_seconds.labels(route),
        )
        if known == method:
            self._series[route, method, status, scheme] = series
        return series


def _exemplar(names: Mapping[str, str]) -> dict[str, str] | None:
    exemplar, left = dict[str, str](), _MOST_CHARACTERS
    for name, value in names.items():
        left -= len(name) + len(value)
        if left < 0:
            break
        exemplar[name] = value
    return exemplar or None


class ProcessMetrics:
    """What the process itself is, and how well it keeps up."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # Of several worker processes each has the same: an info metric can't be summed, a gauge of 1 can be.
        info = Gauge("pvt_build_info", "1.", ["version"], registry=registry, multiprocess_mode="max")
        info.labels(VERSION).set(1)
        self._dropped = Counter(
            "pvt_log_lines_dropped", "Lines that nobody read from standard error in time.", registry=registry
        )
        self._lag = Histogram(
            "pvt_event_loop_lag_seconds",
            "How late the event loop runs what is due, four times a second.",
            buckets=LAG_BUCKETS,
            registry=registry,
        )
        # Mutable state: the dropped lines that were counted.
        self._counted = logs.dropped_lines()

    def collect(self) -> None:
        """Bring the counter up to date; call before it is read."""
        dropped = logs.dropped_lines()
        self._dropped.inc(max(0, dropped - self._counted))
        self._counted = dropped

    async def measure_lag(self) -> None:
        """Measure the event loop's lag until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self._lag.observe(max(0.0, loop.time() - due))
