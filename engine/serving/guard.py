"""What is seen to before a request's body is read: the key, its kind, its size."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from .metrics import Metrics
from .refusal import RefusalError
from .settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Nobody needs a key for these: they tell nothing about anybody.
_OPEN = ("/health", "/")


class Guard:
    """Lets through what has a key, says what it is, and is not too large."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            await self._app(scope, _measured(receive, self._settings.body), send)
        except RefusalError as refusal:
            self._metrics.count("rejected_total", status=str(refusal.status))
            await refused(refusal)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._settings.keys and scope["path"] not in _OPEN:
            given = headers.get(b"authorization", b"")
            known = [b"Bearer " + key.encode() for key in self._settings.keys]
            # All of them are compared, so that the time says nothing.
            same = [hmac.compare_digest(given, each) for each in known]
            scope["asker"] = str(same.index(True)) if any(same) else ""
            if not any(same):
                raise RefusalError(401, "the API key is missing or wrong", code="invalid_api_key")
        if scope["method"] != "POST":
            return
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise RefusalError(415, "send application/json as content-type")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._settings.body:
            raise _too_large(self._settings.body)


def refused(refusal: RefusalError) -> JSONResponse:
    """The response that says so."""
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def _measured(receive: Receive, most: int) -> Receive:
    """``receive``, which reads no further than ``most`` bytes."""
    read = 0

    async def measured() -> MutableMapping[str, Any]:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > most:
            raise _too_large(most)
        return message

    return measured


def _too_large(most: int) -> RefusalError:
    return RefusalError(413, f"the body is larger than {most:,} bytes", code="body_too_large")
