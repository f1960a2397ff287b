"""Two servers over text, ours and llama.cpp's, on the same weights: `python -m bench.serve_text`.

The seeded decoder of 1e9 parameters, its layers in q4 here and in Q4_1 there, which has as many
bits (see bench/llamacpp.py, also for what has to be installed; its server needs
`pip install fastapi sse-starlette starlette-context pydantic-settings` as well). So many clients
ask one question after the other, whole answers of equal length; what counts is tokens per second in
all, and how long an answer takes. Clients share the machine with the server.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx2 as httpx

from bench import common, subject
from bench.llamacpp import KINDS, write_gguf
from bench.serve import foreign, serving

OURS, THEIRS = "ours", "llama.cpp"


def serving_theirs(path: Path, options: argparse.Namespace) -> AbstractContextManager[str]:
    """llama.cpp's server in Python; yields its address."""
    flags = {"model": path, "n_ctx": 4096, "verbose": False}
    flags |= {"n_threads": options.threads, "n_threads_batch": options.threads}
    return foreign([sys.executable, "-m", "llama_cpp.server"], flags, "v1/models")


def ask(url: str, side: str, tokens: int, number: int) -> tuple[int, float]:
    """Tokens of an answer, and its seconds."""
    text = f"{number}: {subject.QUESTION}"
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    body |= {"temperature": 0} | ({"ignore_eos": True, "cache": "full"} if side == OURS else {})
    began = perf_counter()
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    return answer.json()["usage"]["completion_tokens"], perf_counter() - began


def load(url: str, side: str, clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """A line: so many clients for so long."""
    numbers, until = itertools.count(), perf_counter() + options.seconds

    def client(_: int) -> list[tuple[int, float, float]]:
        seen = []
        while perf_counter() < until:
            tokens, seconds = ask(url, side, options.tokens, next(numbers))
            seen.append((tokens, seconds, perf_counter()))
        return seen

    began = perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [each for seen in pool.map(client, range(clients)) for each in seen]
    whole = max(end for _, _, end in answers) - began
    return {
        "server": side,
        "clients": clients,
        "tokens/s": round(sum(tokens for tokens, _, _ in answers) / whole, 1),
        "answers": len(answers),
        "answer s, median": round(statistics.median(seconds for _, seconds, _ in answers), 2),
        "longest": round(max(seconds for _, seconds, _ in answers), 2),
    }


def main() -> None:
    """Serve, ask, and write the table."""
    parser = common.make_parser(__doc__, name="serve-text")
    subject.add_arguments(parser)
    parser.set_defaults(preset="1b")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=30.0, help="of every line")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--weights", choices=KINDS, default="q4", help="of our layers")
    parser.add_argument("--threads", type=int, default=2)
    options = common.read_options(parser)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    folder, kind = subject.checkpoint(options), KINDS[options.weights][0]
    path = write_gguf(folder, folder / f"decoder-{kind}.gguf", kind)
    flags = ["--model", str(folder), "--dtype", "bf16", "--weights", options.weights]
    flags += ["--rows", "16", "--queue", "1000"]
    rows = []
    for clients in common.progress(options.clients, "loads"):
        with serving(flags) as (_, url):
            ask(url, OURS, 4, 0)
            rows.append(load(url, OURS, clients, options))
        with serving_theirs(path, options) as url:
            ask(url, THEIRS, 4, 0)
            rows.append(load(url, THEIRS, clients, options))
    settings = subject.about(options) | {
        "dtype": "bf16",
        "weights": options.weights,
        "theirs": kind,
        "threads": options.threads,
        "tokens": options.tokens,
    }
    note = "llama.cpp's server in Python answers one request at a time; ours up to 16 together."
    out = common.write_report(options.name, settings, rows, [note], options.out)
    print(out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
