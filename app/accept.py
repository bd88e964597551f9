"""Which form of answer a caller takes."""

from collections.abc import Sequence

import mimeparse
from fastapi import Request

from app.problems import NotAcceptable


def choose(request: Request, offered: Sequence[str]) -> str:
    """The media type of `offered`, the default first, that the request's `Accept` likes best.

    Raises:
        NotAcceptable: it takes none of them, or can't be read.
    """
    accept = ", ".join(request.headers.getlist("accept")) or "*/*"
    try:
        best: str = mimeparse.best_match(offered[::-1], accept)  # of equals the last one wins
    except mimeparse.MimeTypeParseException:
        best = ""
    if not best:
        raise NotAcceptable(f"Accept {accept[:200]!r}: this endpoint answers with {', '.join(offered)}")
    return best
