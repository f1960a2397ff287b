"""One of several processes that share a model: answers what it is asked, writes what it found.

``python -m tests.rank RANK SIZE MEETING ASKED FOUND``: ASKED is a JSON list of cases, each a
folder, a cache policy and a prompt; MEETING is a file by which the processes find each other.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.engine import Engine
from engine.errors import EngineError
from tests.noise import noise

STEPS = 24


def pictures(count: int) -> list[Any]:
    return [noise(70 + 30 * number, 90, seed=number) for number in range(count)]


def found(case: dict[str, Any], parallel: bool) -> dict[str, Any]:
    """Logits of a prompt, greedy ids, and those of a batch of four rows."""
    try:
        given = {"weights": case.get("weights", "auto"), "parallel": parallel}
        engine = Engine.load(
            case["folder"], device="cpu", dtype="float32", cache=case["cache"], **given
        )
    except EngineError as error:
        return {"refused": str(error)}
    options = {"max_new_tokens": STEPS, "ignore_eos": True}
    raw, shown = case["raw"], pictures(case["pictures"])
    one = engine.generate(raw, shown, raw=True, **options)
    requests = [
        {"prompt": raw + " ?" * number, "images": shown, "raw": True, **options}
        for number in range(4)
    ]
    batch = sorted(engine.generate_batch(requests, 4), key=lambda each: each.index)
    sampled = engine.generate(raw, shown, raw=True, temperature=0.9, seed=3, **options)
    return {
        "logits": engine.logits(raw, shown, raw=True),
        "decoded": engine.logits(raw, shown, one.token_ids[:8], raw=True),
        "ids": one.token_ids,
        "batch": [each.token_ids for each in batch],
        "sampled": sampled.token_ids,
        "bytes": one.cache.bytes_used,
        "weights": sum(engine.weights.values()),
    }


def main() -> None:
    rank, size, meeting, asked, into = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=120),
    )
    answers = []
    for case in json.loads(Path(asked).read_text()):
        answers.append(found(case, parallel=True))
        print("answered", flush=True)
    torch.save(answers, into)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
