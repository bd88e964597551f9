"""A response whose body is there in pieces, so that a large one is never copied into one."""

from collections.abc import Sequence

from fastapi import Response
from starlette.types import Receive, Scope, Send


class InPieces(Response):
    """The `pieces`, one after the other, with their length in the head; each waits until the client has taken more."""

    def __init__(self, pieces: Sequence[bytes], media_type: str) -> None:
        super().__init__(None, headers={"content-length": str(sum(map(len, pieces)))}, media_type=media_type)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  ASGI's signature
        """See the ASGI specification."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
