"""A server in a thread of the test's own, and what its clients send."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import httpx2 as httpx
import uvicorn

from engine.app.serve_command import LISTENING
from engine.engine import Engine
from engine.serving.app import Server
from engine.serving.settings import Settings
from engine.serving.worker import Worker
from tests.checkpoints import Shape
from tests.noise import noise

SHAPE = Shape(kv_heads=2)
KEY = "a-key"


def data_url(seed: int = 0) -> str:
    file = BytesIO()
    noise(60, 50, seed).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asked(text: str, *pictures: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@contextmanager
def serving(engine: Engine, rows: int = 4, queue: int = 16, **options: Any) -> Iterator[Any]:
    """A server in a thread; yields it with its address as ``url``."""
    given = {key: options.pop(key) for key in ("budget", "slices") if key in options}
    worker = Worker(engine, rows, given.get("budget"), queue, given.get("slices", 2))
    server = Server(worker, Settings("tiny", **options))
    listening = uvicorn.Server(uvicorn.Config(server.app, port=0, **LISTENING))
    thread = threading.Thread(target=listening.run)
    worker.start()
    thread.start()
    while not listening.started:
        time.sleep(0.01)
    port = listening.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
    try:
        yield server
    finally:
        listening.should_exit = True
        thread.join()
        worker.stop()


def post(server: Any, body: Any, **options: Any) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    headers |= options.pop("headers", {})
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, content=content, headers=headers, timeout=60, **options)


def settled(server: Any) -> None:
    """Wait until nothing runs."""
    for _ in range(500):
        now = server.worker.now()
        if not (now["requests_running"] or now["requests_waiting"] or server.worker._begun):
            return
        time.sleep(0.02)
    raise AssertionError(f"still running: {now}")
