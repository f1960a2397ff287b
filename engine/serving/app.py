"""The routes: chat completions, the model's name, health, metrics, and a page to try it all on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..pictures.image import open_image
from ..pictures.remote import fetch
from ..result import Result
from .guard import Guard, refused
from .refusal import RefusalError, refusal_of
from .request import Asking, parse
from .settings import Settings
from .shapes import Shapes
from .streaming import Events
from .worker import Finished, News, Piece, Scores, Ticket, Watched, Worker

PAGE = Path(__file__).with_name("page.html")
MOST_NEWS = 4096  # of a request that nobody takes: it is given up
DECODERS = 2  # pictures that are decoded at once


class Server:
    """The application; ``draining`` is set once it takes no more requests."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.worker, self.settings, self.draining = worker, settings, False
        self._decoders = asyncio.Semaphore(DECODERS)
        self._began = int(time.time())
        middleware = [Middleware(Guard, settings=settings, metrics=worker.metrics)]
        if settings.origins:
            names, methods = [*settings.origins], ["GET", "POST"]
            given = {"allow_origins": names, "allow_methods": methods, "allow_headers": ["*"]}
            middleware.insert(0, Middleware(CORSMiddleware, **given))  # type: ignore[arg-type]
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/", self.page),
            ],
            middleware=middleware,
            exception_handlers={
                RefusalError: self.refuse,
                HTTPException: self.refuse,
                Exception: self.refuse,
            },
        )

    async def refuse(self, request: Request, error: Exception) -> Response:
        """An error in the one shape."""
        if isinstance(error, HTTPException):  # what Starlette refuses by itself
            error = RefusalError(error.status_code, str(error.detail))
        refusal = refusal_of(error)
        self.worker.metrics.count("rejected_total", status=str(refusal.status))
        return refused(refusal)

    # -- what needs no engine ----------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """What is known of it."""
        if request.path_params["name"] != self.settings.model:
            raise RefusalError(
                404, f"there is no such model, only {self.settings.model!r}", "model"
            )
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self._began,
            "owned_by": "local",
        }

    async def health(self, request: Request) -> Response:
        """200 while requests are taken, else 503."""
        status = "draining" if self.draining else "ok"
        return JSONResponse({"status": status}, 503 if self.draining else 200)

    async def metrics(self, request: Request) -> Response:
        """Counts and times for Prometheus."""
        return PlainTextResponse(self.worker.metrics.text(self.worker.now()))

    async def page(self, request: Request) -> Response:
        """A page to ask on."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        policy += "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'"
        return HTMLResponse(PAGE.read_text("utf-8"), headers={"content-security-policy": policy})

    # -- chat completions --------------------------------------------------------------------------

    async def complete(self, request: Request) -> Response:
        """Answer a request, whole or piece by piece."""
        if self.draining:
            raise RefusalError(503, "the server is going down", code="draining")
        asking = self._parsed(await request.body())
        images = [await self._opened(url) for url in asking.pictures]
        news: asyncio.Queue[News] = asyncio.Queue()
        ticket = self._ticket(asking, images, news, request.scope.get("asker", ""))
        self.worker.submit(ticket)
        name = f"chatcmpl-{secrets.token_hex(12)}"
        tokenizer = self.worker.engine.tokenizer
        shapes = Shapes(name, int(time.time()), self.settings.model, tokenizer)
        headers = {"x-without-effect": ", ".join(asking.without_effect)}
        headers = headers if asking.without_effect else {}
        if asking.stream:
            first = await self._first(request, ticket, news)
            pieces = _chunks(shapes, asking, first, news)
            return Events(pieces, ticket.cancel.set, headers)
        return await self._whole(request, ticket, shapes, news, headers)

    def _parsed(self, body: bytes) -> Asking:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            raise RefusalError(400, "the body is no JSON") from None
        settings = self.settings
        return parse(value, settings.model, settings.limits, urls=bool(settings.hosts))

    async def _opened(self, url: str) -> Image.Image:
        """A picture, decoded beside the loop; so many at once that memory is bounded."""

        def opened() -> Image.Image:
            source = url if url[:5].lower() == "data:" else fetch(url, self.settings.hosts)
            return open_image(source, self.settings.pixels).pixels

        async with self._decoders:
            try:
                return await asyncio.to_thread(opened)
            except Exception as error:
                raise refusal_of(error) from None

    def _ticket(
        self, asking: Asking, images: list[Image.Image], news: asyncio.Queue[News], asker: str
    ) -> Ticket:
        """A ticket whose news come into a queue of this loop."""
        loop = asyncio.get_running_loop()

        def put(item: News) -> None:
            if news.qsize() > MOST_NEWS:
                ticket.cancel.set()
            news.put_nowait(item)

        def tell(item: News) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(put, item)

        deadline = time.monotonic() + self.settings.seconds
        ticket = Ticket(asking, images, tell, deadline, asker)
        return ticket

    async def _first(self, request: Request, ticket: Ticket, news: asyncio.Queue[News]) -> News:
        """The first news, before the response begins: what is refused still has a status."""
        first = await self._next(request, ticket, news)
        if isinstance(first, RefusalError):
            raise first
        return first

    async def _whole(
        self,
        request: Request,
        ticket: Ticket,
        shapes: Shapes,
        news: asyncio.Queue[News],
        headers: dict[str, str],
    ) -> Response:
        """All answers at once."""
        results: dict[int, Result] = {}
        cached = 0
        scores: dict[int, Scores] = {choice: [] for choice in range(ticket.asking.choices)}
        while len(results) < ticket.asking.choices:
            item = await self._next(request, ticket, news)
            if isinstance(item, RefusalError):
                raise item
            assert not isinstance(item, Watched), "tiers are streamed"
            scores[item.choice] += item.scores
            if isinstance(item, Finished):
                results[item.choice], cached = item.result, item.cached
        ordered = [results[choice] for choice in sorted(results)]
        told = [scores[choice] for choice in sorted(scores)] if ticket.asking.logprobs else None
        return JSONResponse(shapes.completion(ordered, cached, told), headers=headers)

    async def _next(self, request: Request, ticket: Ticket, news: asyncio.Queue[News]) -> News:
        """The next news; the ticket is given up if the client has gone meanwhile."""
        while True:
            try:
                return await asyncio.wait_for(news.get(), 0.1)
            except TimeoutError:
                if await request.is_disconnected():
                    ticket.cancel.set()
                    raise RefusalError(499, "the client has gone") from None
            except asyncio.CancelledError:
                ticket.cancel.set()
                raise


async def _chunks(
    shapes: Shapes, asking: Asking, first: News, news: asyncio.Queue[News]
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a streamed response, from its first news on."""
    for choice in range(asking.choices):
        yield shapes.chunk(choice, {"role": "assistant", "content": ""}, usage=asking.usage)
    results: dict[int, Result] = {}
    item, cached = first, 0
    while True:
        if isinstance(item, RefusalError):  # the status is out already
            yield item.body
            return
        if isinstance(item, Piece):
            delta = {"content": item.text}
            yield shapes.chunk(item.choice, delta, None, item.scores, usage=asking.usage)
        elif isinstance(item, Watched):
            yield shapes.watched(item.value, usage=asking.usage)
        else:
            results[item.choice], cached = item.result, item.cached
            reason = item.result.finish_reason
            yield shapes.chunk(item.choice, {}, reason, item.scores, usage=asking.usage)
        if len(results) == asking.choices:
            break
        item = await news.get()
    if asking.usage:
        yield shapes.counts([results[choice] for choice in sorted(results)], cached)
