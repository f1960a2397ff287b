"""How much answer quality a cache policy costs: `python -m bench.quality --cache full --cache avl`.

Every policy answers the same held-out pictures, greedily. Beside the score of the answers it is
compared with the full cache on the same pictures: paired bootstrap intervals of the difference, the
first differing token, and the mean KL divergence of the next-token distributions while both are
forced along the full cache's answer. Text pages and scenes are reported apart: on scenes even
random eviction does well, and a policy that beats the full cache is an alarm, not a success.

Answers are kept in `runs/quality/` as they come, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.common import ROOT, commit, write_report
from engine import Engine, Result
from engine.cache.specs import parse
from training.evaluate import FIRST_SEED, SCENE_TASKS, objects_right, questions_of, similarity
from training.page import Page, Question

TASKS = ("read", "field", "describe", "colour", "where")
POLICIES = ("full", "avl", "random:keep=0.5")
LIMIT = 192  # tokens; the longest true answer has about 150
KL_PAGES = 40  # forced decoding is done for the first pages of a task only: it costs a whole answer

Record = dict[str, Any]


def main() -> None:
    """Answer, score, compare, and write the table."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    loaded = Engine.load(args.model, device=args.device, dtype=args.dtype, offline=True)
    rows = []
    for task in args.tasks:
        items = list(questions_of(task, args.pages, args.style))
        exact = None
        for spec in args.cache:
            engine = loaded.with_cache(spec)
            records = answer_all(engine, task, items, args, exact)
            exact = records if exact is None else exact
            rows.append(summarise(task, engine.policy.spec, records, exact))
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()))
    settings = {
        "model": args.model or "weights/tiny",
        "style": args.style,
        "pages per task": args.pages,
        "first seed": FIRST_SEED[args.style],
        "dtype": args.dtype,
        "threads": args.threads,
    }
    print(write_report(args.name, settings, rows, notes=__doc__.splitlines()[2:8]))


def parse_arguments() -> argparse.Namespace:
    """The flags; the full cache always comes first, since the others are compared with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", action="append", default=[], metavar="SPEC")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--pages", type=int, default=200, help="held-out pictures per task")
    parser.add_argument("--style", default="test", choices=sorted(FIRST_SEED))
    parser.add_argument("--model", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=8, help="pictures decoded together")
    parser.add_argument("--name", default="quality", help="of the report in bench/results")
    args = parser.parse_args()
    chosen = args.cache or list(POLICIES)
    specs = [parse(spec).spec for spec in ["full", *chosen]]
    args.cache = list(dict.fromkeys(specs))
    return args


def answer_all(
    engine: Engine,
    task: str,
    items: Sequence[tuple[Page, Question]],
    args: argparse.Namespace,
    exact: Sequence[Record] | None,
) -> list[Record]:
    """One record per picture, those of an earlier run taken from disk."""
    spec = engine.policy.spec
    path = work_file(spec, task, args)
    records = read_records(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        todo = items[len(records) :]
        bar = tqdm(total=len(items), initial=len(records), desc=f"{task} {spec[:30]}")
        for result, seconds in in_order(engine, todo, args.rows):
            page, question = items[len(records)]
            record = make_record(question, result, seconds)
            if exact is not None:
                compare(engine, page, question, record, exact[len(records)], len(records))
            file.write(json.dumps(record) + "\n")
            file.flush()
            records.append(record)
            bar.update()
        bar.close()
    return records[: len(items)]


def work_file(spec: str, task: str, args: argparse.Namespace) -> Path:
    """Where the answers of one policy and task are kept: the name says what they depend on."""
    weights = (Path(args.model or ROOT / "weights" / "tiny") / "model.safetensors").read_bytes()
    what = hashlib.sha256(weights + f"{spec} {args.dtype} {args.style} {commit()}".encode())
    return ROOT / "runs" / "quality" / f"{task}-{spec.split(':')[0]}-{what.hexdigest()[:12]}.jsonl"


def read_records(path: Path) -> list[Record]:
    """Complete lines of an earlier run."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def in_order(
    engine: Engine, items: Sequence[tuple[Page, Question]], rows: int
) -> Iterator[tuple[Result, float]]:
    """Results in the order of ``items``, each with the seconds since the one before."""
    requests = (
        {"prompt": question.text, "images": [page.image], "max_new_tokens": LIMIT}
        for page, question in items
    )
    waiting: dict[int, Result] = {}
    next_index, began = 0, time.perf_counter()
    for result in engine.generate_batch(requests, rows):
        if not isinstance(result, Result):
            raise result.error
        waiting[result.index] = result
        while next_index in waiting:
            now = time.perf_counter()
            yield waiting.pop(next_index), now - began
            began, next_index = time.perf_counter(), next_index + 1


def make_record(question: Question, result: Result, seconds: float) -> Record:
    """What is kept of one answer."""
    text = result.text.strip()
    cache = result.cache
    return {
        "truth": question.answer,
        "answer": text,
        "token_ids": result.token_ids,
        "exact": float(text == question.answer),
        "characters": similarity(text, question.answer),
        "objects": objects_right(text, question.answer),
        "stored": cache.stored_share,
        "used": cache.used_share,
        "bytes": cache.bytes_used,
        "seconds": seconds,
    }


def compare(
    engine: Engine, page: Page, question: Question, record: Record, exact: Record, index: int
) -> None:
    """Add how the answer departs from the full cache's."""
    ours, theirs = record["token_ids"], exact["token_ids"]
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if same is None and len(ours) != len(theirs):
        same = min(len(ours), len(theirs))
    record["first_difference"] = same
    if index < KL_PAGES and theirs:
        record["kl"] = divergence(engine, page, question, theirs)


def divergence(engine: Engine, page: Page, question: Question, ids: list[int]) -> float:
    """Mean KL(full || policy) of the next-token distributions along ``ids``, in nats."""
    images = [engine.encode(page.image)]
    ours = engine.logits(question.text, images, ids).log_softmax(-1)
    full = engine.with_cache("full").logits(question.text, images, ids).log_softmax(-1)
    return float((full.exp() * (full - ours)).sum(-1).mean())


def summarise(task: str, spec: str, records: list[Record], exact: list[Record]) -> Record:
    """One row; `right` is characters, for descriptions objects (kind, colour, place)."""
    measure = "objects" if task == "describe" else "characters"
    pairs = list(zip(records, exact, strict=True))
    low, high = paired_interval([ours["exact"] - full["exact"] for ours, full in pairs])
    soft = [ours[measure] - full[measure] for ours, full in pairs]
    soft_low, soft_high = paired_interval(soft)
    different = [r["first_difference"] for r in records if r.get("first_difference") is not None]
    divergences = [r["kl"] for r in records if "kl" in r]
    return {
        "kind": "scenes" if task in SCENE_TASKS else "text pages",
        "task": task,
        "policy": spec,
        "n": len(records),
        "tokens": round(statistics.fmean(len(r["token_ids"]) for r in records), 1),
        "exact": round(mean(records, "exact"), 4),
        "exact - full": f"[{low:+.3f}, {high:+.3f}]",
        "right": round(mean(records, measure), 4),
        "right - full": f"{statistics.fmean(soft):+.4f} [{soft_low:+.4f}, {soft_high:+.4f}]",
        "ANLS": round(
            statistics.fmean(r["characters"] * (r["characters"] >= 0.5) for r in records), 4
        ),
        "same answer as full": round(1 - len(different) / len(records), 4),
        "first difference": statistics.median(different) if different else None,
        "KL": round(statistics.fmean(divergences), 5) if divergences else None,
        "stored %": round(100 * mean(records, "stored"), 1),
        "used %": round(100 * mean(records, "used"), 1),
        "MB": round(mean(records, "bytes") / 1e6, 3),
        "seconds": round(sum(r["seconds"] for r in records), 1),
    }


def mean(records: list[Record], key: str) -> float:
    """Mean of a figure over records."""
    return statistics.fmean(record[key] for record in records)


def paired_interval(differences: list[float], resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of paired differences."""
    draw = random.Random(0)
    n = len(differences)
    means = sorted(sum(draw.choices(differences, k=n)) / n for _ in range(resamples))
    return means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]


if __name__ == "__main__":
    main()
