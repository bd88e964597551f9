"""The metrics of the HTTP layer."""

from prometheus_client import CollectorRegistry, Counter, Histogram

REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class HttpMetrics:
    """Requests by route template, never by path, so that no caller can make new time series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "pvt_http_requests", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "pvt_http_request_seconds",
            "Seconds from a request's head to its response's end.",
            ["route"],
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        # Mutable state: the series that were counted before, since finding them costs more than counting.
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def record(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        series = self._series.get((route, method, status)) or self._find(route, method, status)
        series[0].inc()
        series[1].observe(seconds)

    def _find(self, route: str, method: str, status: int) -> tuple[Counter, Histogram]:
        known = method if method in METHODS else "other"
        series = self.requests.labels(route, known, str(status)), self.request_seconds.labels(route)
        if known == method:  # any caller can make up others
            self._series[route, method, status] = series
        return series


class FetchMetrics:
    """Pictures fetched by URL."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._fetches = Counter("pvt_url_fetches", "Pictures asked for by URL.", ["outcome"], registry=registry)
        self._seconds = Histogram("pvt_url_fetch_seconds", "Seconds that fetching one took.", registry=registry)

    def record(self, outcome: str, seconds: float) -> None:
        """Count one picture; `outcome` is `fetched`, or the class of its error."""
        self._fetches.labels(outcome).inc()
        self._seconds.observe(seconds)
