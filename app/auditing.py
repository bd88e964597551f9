"""A line in the log for everything that changes what the service does: who did what."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from fastapi import Request

from service.engine import Engine

log = structlog.get_logger(component="management")


@contextmanager
def audited(request: Request, engine: Engine, action: str, **what: str) -> Iterator[None]:
    """Leave a line in the log, whatever comes of it: who did what. A shutdown waits for it."""
    who = {
        "by": request.state.manager,
        "client": request.client.host if request.client else None,
        "request_id": request.state.request_id,
    }
    try:
        with engine.request():
            yield
    except BaseException as error:
        log.warning(
            "management", action=action, **what, **who, outcome="failed", reason=f"{type(error).__name__}: {error}"
        )
        raise
    log.info("management", action=action, **what, **who, outcome="done")
