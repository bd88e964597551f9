"""What routes under `/v2` and `/v1` document as their errors: `app.problems.documented` for those protocols' forms."""

from typing import Any

from pydantic import BaseModel

from app.dialects import DIALECTS
from app.problems import MEANING

_WRONG = {400: "The request, a parameter or a picture is wrong."}


def refusals(prefix: str, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route under `prefix` that may answer with errors of these statuses."""
    form: type[BaseModel] = DIALECTS[prefix].model
    return {status: {"model": form, "description": {**_WRONG, **MEANING}[status]} for status in statuses}
