"""A server under load on this machine: tokens per second, first tokens, and gaps between tokens.

    python -m bench.serve                                    the embedded model
    python -m bench.serve --preset 1b --dtype bf16 --weights q4 --clients 1 4 16
    python -m bench.serve --theirs                           and `transformers serve` beside it

So many clients ask one question after the other (a closed loop), streamed, each about one of a few
pictures; a further client asks as soon as its answer is complete. The server is a process of its
own, its clients share the machine with it. Latencies are what clients see: a first token is counted
from sending the request, a gap between two pieces of an answer.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx2 as httpx

from bench import common, subject
from training.scenes import make_scene

QUESTIONS = (
    "What is in the picture?",
    "Describe the picture in detail.",
    "What colours are there?",
)


@dataclass
class Seen:
    """What clients have seen."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    again: list[float] = field(default_factory=list)  # first tokens about a picture asked about
    errors: int = 0


@contextmanager
def serving(flags: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server; yields its process and address."""
    command = [sys.executable, str(common.ROOT / "main.py"), "serve", "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        if "http://" not in line:
            raise RuntimeError(line + process.stderr.read())
        try:
            yield process, line.split()[-1]
        finally:
            process.terminate()


def serving_theirs(folder: Path, dtype: str) -> AbstractContextManager[str]:
    """`transformers serve` of the same weights (needs fastapi); yields its address."""
    program = Path(sys.executable).with_name("transformers")
    dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(dtype, dtype)
    flags = {"device": "cpu", "dtype": dtype}
    return foreign([sys.executable, str(program), "serve", str(folder)], flags, "health")


@contextmanager
def foreign(command: Sequence[str], flags: Mapping[str, object], page: str) -> Iterator[str]:
    """Somebody else's server with these ``--flags``, at a free port; yields its address as soon as
    ``page`` answers.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    every = {**flags, "host": "127.0.0.1", "port": port}
    whole = [*command, *(str(part) for name, flag in every.items() for part in (f"--{name}", flag))]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(whole, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **quiet) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            _await(process, f"{url}/{page}")
            yield url
        finally:
            process.terminate()


def _await(process: subprocess.Popen[str], page: str, seconds: float = 120) -> None:
    until = perf_counter() + seconds
    while perf_counter() < until:
        time.sleep(0.2)
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ends with {process.returncode}")
        try:
            if httpx.get(page).status_code == 200:
                return
        except httpx.HTTPError:
            continue
    raise RuntimeError(f"{page} does not answer in {seconds:g} s")


def pictures(count: int) -> list[str]:
    """Drawn scenes as data: URLs."""
    urls = []
    for seed in range(count):
        file = BytesIO()
        make_scene(900_000 + seed).image.save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


async def client(
    session: httpx.AsyncClient, bodies: Iterator[dict[str, Any]], until: float, seen: Seen
) -> None:
    """Ask until the time is over; an answer that is not complete by then has no tokens to count."""
    known: set[str] = set()
    while perf_counter() < until:
        body = next(bodies)
        picture = body["messages"][0]["content"][0]["image_url"]["url"]
        began, last = perf_counter(), 0.0
        async with session.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                seen.errors += 1
                await answer.aread()
                continue
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                now = perf_counter()
                if now > until:
                    return
                if chunk.get("usage"):
                    seen.tokens += chunk["usage"]["completion_tokens"]
                elif chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    if last:
                        seen.gaps.append(now - last)
                    else:
                        seen.first.append(now - began)
                        if picture in known:
                            seen.again.append(now - began)
                        known.add(picture)
                    last = now


async def load(url: str, bodies: Iterator[dict[str, Any]], clients: int, seconds: float) -> Seen:
    """So many clients for so long."""
    seen = Seen()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as session:
        until = perf_counter() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client(session, bodies, until, seen))
    return seen


def requests(model: str, urls: Sequence[str], cache: str, tokens: int) -> Iterator[dict[str, Any]]:
    """Bodies without end: every picture and question in turn."""
    number = 0
    while True:
        url, text = urls[number % len(urls)], QUESTIONS[number % len(QUESTIONS)]
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        yield {
            "model": model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache": cache,
        }
        number += 1


def their_requests(
    model: str, urls: Sequence[str], cache: str, tokens: int
) -> Iterator[dict[str, Any]]:
    """The same as transformers takes them: as many tokens, greedy."""
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    for body in requests(model, urls, cache, tokens):
        kept = {key: body[key] for key in ("model", "messages", "stream", "stream_options")}
        yield kept | {"generation_config": json.dumps(length)}


def row(cache: str, clients: int, seconds: float, seen: Seen) -> dict[str, Any]:
    """A line of the table."""

    def at(values: Sequence[float], share: float) -> float | None:
        return round(1e3 * sorted(values)[int(share * (len(values) - 1))], 1) if values else None

    return {
        "cache": cache,
        "clients": clients,
        "tokens/s": round(seen.tokens / seconds, 1),
        "answers": len(seen.first),
        "first token ms, median": at(seen.first, 0.5),
        "p99": at(seen.first, 0.99),
        "about a known picture": at(seen.again, 0.5),
        "gap ms, median": at(seen.gaps, 0.5),
        "p99 ": at(seen.gaps, 0.99),
        "mean": round(1e3 * statistics.fmean(seen.gaps), 2) if seen.gaps else None,
        "errors": seen.errors,
    }


def main() -> None:
    """Serve, ask, and write the table."""
    parser = common.make_parser(__doc__, name="serve")
    subject.add_arguments(parser)
    parser.set_defaults(model=str(common.ROOT / "weights" / "tiny"))
    parser.add_argument("--cache", action="append", help="policies (default: full, sift)")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=20.0, help="of every line")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--theirs", action="store_true", help="transformers serve as well")
    options = common.read_options(parser)
    if options.preset != "tiny-test":
        options.model = None
    folder, caches = subject.checkpoint(options), options.cache or ["full", "sift"]
    flags = ["--model", str(folder), "--rows", str(options.rows), "--queue", "1000", "--name", "it"]
    flags += ["--dtype", options.dtype, "--weights", options.weights]
    urls, rows = pictures(options.pictures), []
    for cache in caches:
        for clients in common.progress(options.clients, f"loads, {cache}"):
            with serving(flags) as (_, url):
                bodies = requests("it", urls, cache, options.tokens)
                asyncio.run(load(url, bodies, 1, 3))  # kernels are built, pages are touched
                seen = asyncio.run(load(url, bodies, clients, options.seconds))
            rows.append(row(cache, clients, options.seconds, seen))
            print(rows[-1], flush=True)
    for clients in options.clients if options.theirs else ():
        with serving_theirs(folder, options.dtype) as url:
            bodies = their_requests(str(folder), urls, "", options.tokens)
            asyncio.run(load(url, bodies, 1, 3))
            seen = asyncio.run(load(url, bodies, clients, options.seconds))
        rows.append(row("transformers serve", clients, options.seconds, seen))
        print(rows[-1], flush=True)
    settings = subject.about(options) | {
        key: getattr(options, key) for key in ("dtype", "weights", "rows", "tokens", "pictures")
    }
    note = "Clients and server share the machine; rows bounds the answers in the making at once."
    path = common.write_report(options.name, settings, rows, [note], options.out)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
