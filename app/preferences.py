"""What a request prefers: the header `Prefer` of RFC 7240."""

import re
from typing import Annotated

from fastapi import Depends, Request

APPLIED = {"Preference-Applied": "respond-async"}
_WAIT = re.compile(r"wait\s*=\s*\"?([0-9]{1,9})\"?")


async def patience_seconds(request: Request) -> float | None:
    """How long to wait for a model that is not loaded: `wait=<seconds>`, none with `respond-async` alone, else None.

    Preferences that are not known, or not of their form, are ignored, as that standard demands.
    """
    if "prefer" not in request.headers:
        return None
    preferences = ",".join(request.headers.getlist("prefer")).lower().split(",")
    asked = [preference.partition(";")[0].strip() for preference in preferences]
    waits = [float(match[1]) for each in asked if (match := _WAIT.fullmatch(each))]
    return waits[0] if waits else 0.0 if "respond-async" in asked else None


PatienceDep = Annotated[float | None, Depends(patience_seconds)]
