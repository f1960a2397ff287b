"""A server under thousands of mixed requests, some of them broken: what is lost, and what grows.

    python -m bench.faults [--requests 10000] [--clients 32] [--idle 1000]

Every kind of request is answered once by itself first; then all come mixed, streamed and whole,
under several cache policies, while others are wrong, leave in the middle, or take nothing, and idle
connections stay open. An answer that differs from the one given alone is *mixed up*. At last a
signal ends the server under load: what runs then is complete, what comes later is refused.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx

from bench import common
from bench.serve import QUESTIONS, pictures, serving

PATH = "/v1/chat/completions"
POLICIES = ("full", "sift", "avl", "h2o", "zipvl", "avl:format=k4v4,minor=k4v2")
BROKEN: list[bytes] = [
    b"{",
    b"[]",
    b'{"messages": []}',
    b'{"messages": [{"role": "robot", "content": "hi"}]}',
    b'{"messages": [{"role": "user", "content": "hi"}], "cache": "nope"}',
    b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 0}',
    b'{"messages": [{"role": "user", "content": "hi"}], "colour": 1}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url":'
    b' "data:image/png;base64,AAAA"}}]}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url":'
    b' "file:///etc/passwd"}}]}]}',
    b'{"messages": [{"role": "user", "content": "' + b"word " * 20_000 + b'"}]}',
    b"[" * 50_000,
]


@dataclass
class Counts:
    """What has become of the requests."""

    found: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # what should not be, in words

    def check(self, right: bool, words: str) -> None:
        """Note what should not be."""
        if not right:
            self.wrong.append(words[:200])


def kinds(urls: Sequence[str]) -> list[dict[str, Any]]:
    """Requests that have answers, no two alike."""
    made = []
    for number, url in enumerate(urls):
        for policy in POLICIES:
            texts = QUESTIONS if policy in ("full", "sift") else QUESTIONS[:1]
            for text in texts:
                image = {"type": "image_url", "image_url": {"url": url}}
                content = [image, {"type": "text", "text": text}]
                made.append(
                    {
                        "messages": [{"role": "user", "content": content}],
                        "max_tokens": 6 + number,
                        "ignore_eos": True,
                        "cache": policy,
                        "temperature": 0.7 * (number % 2),
                        "seed": number,
                    }
                )
    made.append({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "n": 3})
    return made


async def whole(session: httpx.AsyncClient, body: dict[str, Any]) -> list[str]:
    """All texts of an answer."""
    answer = await session.post(PATH, json=body)
    answer.raise_for_status()
    return [choice["message"]["content"] for choice in answer.json()["choices"]]


async def streamed(
    session: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None
) -> list[str] | None:
    """The same in pieces; None if it was left before its end."""
    texts, seen = [""] * body.get("n", 1), 0
    async with session.stream("POST", PATH, json=body | {"stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return texts
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
            seen += 1
            if seen == leave_after:
                return None
    raise RuntimeError("the stream ended without [DONE]")


async def one(
    session: httpx.AsyncClient, draw: random.Random, known: list[Any], counts: Counts
) -> None:
    """A request: right, left, or broken."""
    kind = draw.choices(("whole", "streamed", "left", "broken"), (45, 45, 5, 5))[0]
    counts.found[kind] += 1
    if kind == "broken":
        headers = {"content-type": "application/json"}
        answer = await session.post(PATH, content=draw.choice(BROKEN), headers=headers)
        counts.statuses[answer.status_code] += 1
        message = answer.json()["error"]["message"]
        right = 400 <= answer.status_code < 500 and message and "\n" not in message
        counts.check(right, f"a broken request got {answer.status_code}: {message}")
        return
    body, expected = draw.choice(known)
    for _ in range(100):  # a full queue says to come again
        try:
            if kind == "whole":
                texts: list[str] | None = await whole(session, body)
            else:
                leave = draw.randrange(1, 4) if kind == "left" else None
                texts = await streamed(session, body, leave)
            break
        except httpx.HTTPStatusError as error:
            counts.statuses[error.response.status_code] += 1
            if error.response.status_code != 429:
                raise
            await asyncio.sleep(float(error.response.headers["retry-after"]) * draw.random())
    counts.statuses[200] += 1
    if texts is not None:
        counts.check(texts == expected, f"mixed up: {body.get('cache')} {texts} is not {expected}")


async def worker(
    session: httpx.AsyncClient, todo: list[int], known: list[Any], counts: Counts
) -> None:
    """A client: one request after the other."""
    while todo:
        number = todo.pop()
        try:
            await one(session, random.Random(number), known, counts)
        except (httpx.HTTPError, RuntimeError, ValueError) as error:
            counts.check(False, f"request {number}: {type(error).__name__} {error}")


def memory(process: subprocess.Popen[str]) -> float:
    """MB that a process holds."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def silent(url: str, count: int) -> list[socket.socket]:
    """Connections that say nothing."""
    place = urlsplit(url)
    return [socket.create_connection((place.hostname, place.port)) for _ in range(count)]


def taking_nothing(url: str, urls: Sequence[str], count: int) -> list[socket.socket]:
    """Connections that have asked for long streams, and take nothing of them."""
    held = silent(url, count)
    for number, connection in enumerate(held):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        image = {"type": "image_url", "image_url": {"url": urls[number % len(urls)]}}
        body = {
            "messages": [{"role": "user", "content": [image]}],
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 20,
        }
        text = json.dumps(body).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(head.encode() + f"content-length: {len(text)}\r\n\r\n".encode() + text)
    return held


async def ended_under_load(
    process: subprocess.Popen[str], session: httpx.AsyncClient, known: list[Any], counts: Counts
) -> None:
    """A signal while answers are in the making."""
    long = [(body | {"max_tokens": 200, "stream": True}, None) for body, _ in known[:8]]
    asked = [asyncio.ensure_future(streamed(session, body, None)) for body, _ in long]
    await asyncio.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    for texts in await asyncio.gather(*asked, return_exceptions=True):
        counts.check(isinstance(texts, list), f"ended under load: {texts!r}")
        counts.found["answers ended by SIGTERM" if isinstance(texts, list) else "lost"] += 1
    code = await asyncio.to_thread(process.wait, 60)
    counts.check(code == 0, f"the server ended with {code}")


async def attack(options: Any, process: subprocess.Popen[str], url: str) -> dict[str, Any]:
    """All of it; the row of the table."""
    urls = pictures(6)
    limits = httpx.Limits(max_connections=options.clients)
    counts, held = Counts(), list[float]()
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as session:
        known = []
        for body in kinds(urls):  # the second time over the stored beginning, as all later ones
            await whole(session, body)
            known.append((body, await whole(session, body)))
        idle = silent(url, options.idle) + taking_nothing(url, urls, options.slow)
        began = perf_counter()
        for tenth in common.progress(range(10), "tenths of the requests"):
            some = list(range(tenth, options.requests, 10))
            async with asyncio.TaskGroup() as group:
                for _ in range(options.clients):
                    group.create_task(worker(session, some, known, counts))
            held.append(round(memory(process), 1))
        seconds = perf_counter() - began
        now = (await session.get("/metrics")).text
        running = [line for line in now.splitlines() if line.startswith("lvlm:requests_running")]
        await ended_under_load(process, session, known, counts)
    for connection in idle:
        connection.close()
    for words in counts.wrong[:20]:
        print(words)
    return {
        "requests": options.requests,
        "of which": ", ".join(f"{count} {kind}" for kind, count in sorted(counts.found.items())),
        "statuses": ", ".join(f"{count} x {status}" for status, count in counts.statuses.items()),
        "wrong": len(counts.wrong),
        "seconds": round(seconds, 1),
        "MB after each tenth": " ".join(map(str, held)),
        "running at the end": running[-1].split()[-1] if running else "?",
    }


def main() -> None:
    """Serve, attack, and write the table."""
    parser = common.make_parser(__doc__, name="faults")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--idle", type=int, default=1000, help="connections that say nothing")
    parser.add_argument("--slow", type=int, default=8, help="connections that take nothing")
    options = common.read_options(parser)
    flags = ["--rows", "8", "--queue", "16", "--model", str(common.ROOT / "weights" / "tiny")]
    with serving([*flags, "--dtype", "float32"]) as (process, url):
        row = asyncio.run(attack(options, process, url))
    settings = {"model": "weights/tiny", "dtype": "float32", "clients": options.clients}
    settings |= {"idle": options.idle, "slow": options.slow}
    path = common.write_report(options.name, settings, [row], [], options.out)
    print(path.with_suffix(".md").read_text())
    sys.exit(row["wrong"] > 0)


if __name__ == "__main__":
    main()
