"""Server-sent events to a client that may be slow, silent or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response

from .guard import Receive, Scope, Send

SILENCE = 15.0  # seconds after which a comment keeps the connection alive
PATIENCE = 30.0  # seconds that a client may take to receive one event


class Events(Response):
    """A response that sends every mapping of ``pieces`` as an event, and [DONE] behind them.

    ``leave`` is called when it is over, however it ends: nobody listens any more.
    """

    def __init__(
        self,
        pieces: AsyncIterator[Mapping[str, Any]],
        leave: Callable[[], None],
        headers: Mapping[str, str],
    ) -> None:
        kind = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(None, 200, kind, "text/event-stream")
        del self.headers["content-length"]
        self._pieces, self._leave = pieces, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait([sending, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._leave()
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        following = asyncio.ensure_future(anext(self._pieces, None))
        try:
            while True:
                done, _ = await asyncio.wait([following], timeout=SILENCE)
                if not done:
                    await _put(send, b": waiting\n\n")
                    continue
                piece = following.result()
                if piece is None:
                    break
                text = json.dumps(piece, ensure_ascii=False, separators=(",", ":"))
                await _put(send, b"data: " + text.encode("utf-8", "backslashreplace") + b"\n\n")
                following = asyncio.ensure_future(anext(self._pieces, None))
        finally:
            following.cancel()
        await _put(send, b"data: [DONE]\n\n", more=False)


async def _put(send: Send, body: bytes, *, more: bool = True) -> None:
    message = {"type": "http.response.body", "body": body, "more_body": more}
    await asyncio.wait_for(send(message), PATIENCE)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
