"""A second question about a picture, through the server: how soon its first token comes.

    python -m bench.second                                          the embedded model
    python -m bench.second --preset 1b --dtype bf16 --weights q4    a seeded model of 1e9 parameters

Every picture is asked about twice, in other words, for one token: the request's time is that of the
first token. The second question finds the picture's keys and values in the cache of prefixes, and
passes neither the tower nor the decoder again but with its own words.
"""

from __future__ import annotations

import statistics
from time import perf_counter
from typing import Any

import httpx2 as httpx

from bench import common, subject
from bench.serve import pictures, serving

FIRST, SECOND = "What is in the picture?", "Which colours does it have?"


def ask(session: httpx.Client, url: str, question: str, cache: str) -> float:
    """Seconds of a request for one token."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "cache": cache}
    began = perf_counter()
    answer = session.post("/v1/chat/completions", json=body)
    seconds = perf_counter() - began
    answer.raise_for_status()
    return seconds


def measure(address: str, urls: list[str], cache: str) -> dict[str, Any]:
    """A line: medians, and the ratio within pictures."""
    first, second = list[float](), list[float]()
    with httpx.Client(base_url=address, timeout=600) as session:
        for number, url in enumerate(common.progress(urls, f"pictures, {cache}")):
            times = [ask(session, url, question, cache) for question in (FIRST, SECOND)]
            if number:  # the first one touches pages and builds plans
                first.append(times[0])
                second.append(times[1])
    ratio = common.paired_ratio(second, first)
    return {
        "cache": cache,
        "pictures": len(first),
        "first question ms": round(1e3 * statistics.median(first), 1),
        "second question ms": round(1e3 * statistics.median(second), 1),
        "second / first": round(ratio["ratio"], 3),
        "95 %": common.interval(ratio),
    }


def main() -> None:
    """Serve, ask, and write the table."""
    parser = common.make_parser(__doc__, name="second")
    subject.add_arguments(parser)
    parser.set_defaults(model=str(common.ROOT / "weights" / "tiny"))
    parser.add_argument("--cache", action="append", help="policies (default: full, sift)")
    parser.add_argument("--pictures", type=int, default=9)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--weights", default="auto")
    options = common.read_options(parser)
    if options.preset != "tiny-test":
        options.model = None
    folder, urls, rows = subject.checkpoint(options), pictures(options.pictures), []
    flags = ["--model", str(folder), "--dtype", options.dtype, "--weights", options.weights]
    for cache in options.cache or ["full", "sift"]:
        with serving(flags) as (_, address):
            rows.append(measure(address, urls, cache))
    settings = subject.about(options) | {"dtype": options.dtype, "weights": options.weights}
    path = common.write_report(options.name, settings, rows, (), options.out)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
