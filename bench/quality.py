"""How much answer quality a cache policy costs.

    python -m bench.quality                          the main table
    python -m bench.quality --cache avl --cache h2o  these beside the full cache
    python -m bench.quality --group formats          formats of the cache
    python -m bench.quality --group bytes            other methods at equal bytes
    python -m bench.quality --group features         a model with cross layers
    python -m bench.quality --sweep core             what a figure of bench.figures draws

Every policy answers the same held-out pictures, greedily. Beside the score of the answers it is
compared with the full cache on the same pictures: paired bootstrap intervals of the difference, the
first differing token, and the mean KL divergence of the next-token distributions while both are
forced along the full cache's answer. Text pages and scenes are reported apart: on scenes even
random eviction does well, and a policy that beats the full cache is an alarm, not a success.

Answers are kept in `runs/quality/` as they come, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import common
from bench.common import ROOT, write_report
from engine import Engine, Result
from engine.cache.report import CacheReport
from engine.pictures.encoded import EncodedImage
from engine.policies.specs import parse
from training.evaluate import FIRST_SEED, SCENE_TASKS, objects_right, questions_of, similarity
from training.page import Page, Question

TASKS = ("read", "field", "describe")
POLICIES = (
    "full",
    # The paper's: 40 % without a core; S 45 % and C 30 %; with the filter, less text, both.
    "avl:secondary=0.4,core=none,prefill=1,text=1",
    "avl:secondary=0.45,core=0.3,prefill=1,text=1",
    "avl:secondary=0.45,core=0.3,prefill=0.9,text=1",
    "avl:secondary=0.45,core=0.3,prefill=1,text=0.7",
    "avl:secondary=0.45,core=0.3,prefill=0.9,text=0.7",
    # Milder ones.
    "avl:secondary=0.6,core=0.4,prefill=1,text=1",
    "avl:secondary=0.75,core=0.5,prefill=1,text=1",
    "avl:secondary=0.9,core=0.6,prefill=1,text=1",
    # The others at half of the cache.
    "h2o:heavy=0.125,recent=0.375",
    "fastv:drop=0.5",
    "snapkv:keep=0.5",
    "streaming:recent=0.5",
    "random:keep=0.5",
    # Where memory is short: 20 and 10 %.
    "avl:secondary=0.2,core=0.1333,prefill=1,text=1",
    "h2o:heavy=0.05,recent=0.15",
    "snapkv:keep=0.2",
    "random:keep=0.2",
    "avl:secondary=0.1,core=0.0667,prefill=1,text=1",
    "h2o:heavy=0.025,recent=0.075",
    "snapkv:keep=0.1",
    "random:keep=0.1",
)
# Nothing freed, fewer bits: alone, with values left unread, and with A-VL's core list.
_MIX = "avl:secondary=0.3,prefill=1,text=1,format=k8v4,minor=k4v2"
_FORMS = ("k8v8", "k4v4", "k4v2")
_SHARES = (0.1, 0.2, 0.3, 0.45)
_ALONE = "avl:core=none,prefill=1,text=1"  # A-VL's core of features, and nothing else of it
GROUPS = {
    "main": POLICIES,
    "formats": (
        "full",
        "avl:secondary=0.45,core=0.3,prefill=1,text=1",
        *(f"sift:format={form},skip=0" for form in _FORMS),
        f"{_MIX},core=none",
        *(f"sift:format={form},skip={skip}" for form in _FORMS for skip in (0.05, 0.1, 0.2)),
        *(f"{_MIX},core=none,skip={skip}" for skip in (0.05, 0.1, 0.2)),
        "sift:format=k16v16,skip=0.1",
        *(f"avl:secondary=1,core=0.3,prefill=1,text=1,format={form}" for form in _FORMS),
        f"{_MIX},core=0.3",
        "avl:secondary=0.45,core=0.3,prefill=1,text=1,format=k8v4,minor=k4v2",
        "avl:secondary=0.9,core=0.6,prefill=1,text=1",
    ),
    # The others where they store as many bytes. FastV's first layers keep everything: 10 % of the
    # embedded model's eight are out of its reach, 20 % are reached by cutting before the second.
    "bytes": (
        "full",
        "zipvl:tau=0.96",
        "zipvl:tau=0.975",
        "zipvl:tau=0.975,sparse=0",
        "zipvl:tau=0.96,format=plain,minor=freed",
        "zipvl:tau=0.975,format=plain,minor=freed",
        *(f"avl:secondary={share},core=none,prefill=1,text=1" for share in _SHARES),
        *(f"h2o:heavy={share / 4:g},recent={3 * share / 4:g}" for share in _SHARES),
        *(f"snapkv:keep={share}" for share in _SHARES),
        "fastv:layer=1,drop=0.9143",
        "fastv:layer=2,drop=0.9333",
        "fastv:layer=2,drop=0.7333",
        *(f"random:keep={share}" for share in _SHARES),
    ),
    # What cross layers hold: features of `trimmed`, in formats, and a core of them.
    "features": (
        "full",
        *(f"trimmed:ratio={ratio}" for ratio in (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5)),
        *(f"sift:format={form},skip=0" for form in _FORMS),
        "sift",
        *(f"{_ALONE},cross={share}" for share in (0.05, 0.1, 0.3)),
        "trimmed:ratio=0.1+sift",
        *(f"trimmed:ratio=0.1+{_ALONE},cross={share}" for share in (0.05, 0.1)),
    ),
}
LIMIT = 192  # tokens; the longest true answer has about 150
GENERATOR = ("documents", "evaluate", "fields", "fonts", "page", "scene_questions", "scenes")
KL_PAGES = 40  # forced decoding is done for the first pages of a task only: it costs a whole answer
NOTES = (
    "Answers are greedy. Right is the share of characters (1 - normalised edit distance), for "
    "descriptions the share of objects with kind, colour and place; intervals are 95 % bootstrap "
    "intervals of the paired difference from the full cache. KL is that of next-token "
    f"distributions along the full cache's answer, on the first {KL_PAGES} pictures of a task. "
    "On scenes even random eviction does well, so that text pages are the harder ground; a "
    "policy that beats the full cache is an alarm, not a success.",
)

# The paper's sweeps (its figures 9 and 10): lines of shares and the policy of each. One parameter
# moves, the others are the paper's or, where they would hide it, off.
SHARES = (0.05, 0.1, 0.2, 0.3, 0.45)
UPPER = (0.6, 0.8, 0.9, 1.0)
SWEEPS: dict[str, dict[str, dict[float, str]]] = {
    "secondary": {
        "all stored attended": {
            s: f"avl:secondary={s},core=none,prefill=1,text=1" for s in (*SHARES, *UPPER)
        }
    },
    "core": {
        name: {c: f"avl:secondary=0.45,core={c},every={every},prefill=1,text=1" for c in SHARES}
        for name, every in (("chosen again every 3rd step", 3), ("chosen once", 0))
    },
    "text": {
        "S 45%, C 30%, K 3": {
            t: f"avl:secondary=0.45,core=0.3,prefill=1,text={t}" for t in (0.2, 0.4, *UPPER)
        }
    },
    "prefill": {
        "S 45%, C 30%, K 3": {
            p: f"avl:secondary=0.45,core=0.3,prefill={p},text=1" for p in (0.45, *UPPER)
        }
    },
}
SWEEP_TASKS = ("read", "field")

Record = dict[str, Any]


class Item:
    """A held-out picture with its question; what every policy needs of it is computed once."""

    def __init__(self, loaded: Engine, page: Page, question: Question) -> None:
        self.question, self._page, self._loaded = question, page, loaded.with_cache("full")
        self._full: torch.Tensor | None = None

    @functools.cached_property
    def picture(self) -> EncodedImage:
        """The picture as image tokens."""
        return self._loaded.encode(self._page.image)

    def along(self, engine: Engine, ids: list[int]) -> torch.Tensor:
        """Log-probabilities ``[len(ids), vocab]`` of every next token while ``ids`` are forced."""
        return engine.logits(self.question.text, [self.picture], ids).log_softmax(-1)

    def full_along(self, ids: list[int]) -> torch.Tensor:
        """The same with the full cache, along its own answer ``ids``."""
        if self._full is None:
            self._full = self.along(self._loaded, ids)
        return self._full


def main() -> None:
    """Answer, score, compare, and write the table."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    loaded = Engine.load(args.model, device=args.device, dtype=args.dtype, offline=True)
    rows = []
    for task in args.tasks:
        items = [Item(loaded, *drawn) for drawn in questions_of(task, args.pages, args.style)]
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
        "seed": FIRST_SEED[args.style],
        "dtype": args.dtype,
        "threads": args.threads,
    }
    path = write_report(args.name, settings, rows, NOTES, args.out)
    print(path.with_suffix(".md").read_text())


def parse_arguments() -> argparse.Namespace:
    """The flags; the full cache always comes first, since the others are compared with it."""
    parser = common.make_parser(__doc__, name=None)
    parser.add_argument("--cache", action="append", default=[], metavar="SPEC")
    parser.add_argument("--group", choices=GROUPS, default="main", help="which table")
    parser.add_argument("--sweep", choices=SWEEPS, help="the policies of a figure")
    parser.add_argument("--tasks", nargs="+", help="default: those of the main table or the sweep")
    parser.add_argument("--pages", type=int, default=200, help="held-out pictures per task")
    parser.add_argument("--style", default="test", choices=sorted(FIRST_SEED))
    parser.add_argument("--model", help="default: weights/tiny, for features weights/cross")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=8, help="pictures decoded together")
    args = common.read_options(parser, lambda args: [report_name(args)])
    args.name = report_name(args)
    if args.group == "features":
        args.model = args.model or "weights/cross"
    args.tasks = args.tasks or list(SWEEP_TASKS if args.sweep else TASKS)
    chosen = args.cache or (specs_of(args.sweep) if args.sweep else GROUPS[args.group])
    specs = [parse(spec).spec for spec in ["full", *chosen]]
    args.cache = list(dict.fromkeys(specs))
    return args


def report_name(args: argparse.Namespace) -> str:
    """What the report is called, unless told otherwise."""
    which = args.sweep or ("" if args.group == "main" else args.group)
    return args.name or (f"quality-{which}" if which else "quality")


def specs_of(sweep: str) -> list[str]:
    """The policies of a sweep, each once."""
    return [spec for line in SWEEPS[sweep].values() for spec in line.values()]


def answer_all(
    engine: Engine,
    task: str,
    items: Sequence[Item],
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
        answers = in_order(engine, todo, args.rows)
        for result, seconds in common.progress(answers, f"{task}, {spec[:40]}", len(todo)):
            item = items[len(records)]
            record = make_record(item.question, result, seconds)
            if exact is not None:
                compare(engine, item, record, exact[len(records)], len(records))
            file.write(json.dumps(record) + "\n")
            file.flush()
            records.append(record)
    return records[: len(items)]


def work_file(spec: str, task: str, args: argparse.Namespace) -> Path:
    """Where the answers of one policy and task are kept: the name says what they depend on."""
    weights = (Path(args.model or ROOT / "weights" / "tiny") / "model.safetensors").read_bytes()
    what = hashlib.sha256(weights + f"{spec} {args.dtype} {args.style} {sources()}".encode())
    return ROOT / "runs" / "quality" / f"{task}-{spec.split(':')[0]}-{what.hexdigest()[:12]}.jsonl"


@functools.cache
def sources() -> str:
    """A digest of the code that answers depend on: the engine and the pictures' generator."""
    found = [ROOT / "training" / f"{name}.py" for name in GENERATOR]
    for folder, suffixes in (("engine", (".py",)), ("cuda", (".cpp", ".cu", ".cuh", ".h"))):
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(found))).hexdigest()


def read_records(path: Path) -> list[Record]:
    """Complete lines of an earlier run."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def in_order(engine: Engine, items: Sequence[Item], rows: int) -> Iterator[tuple[Result, float]]:
    """Results in the order of ``items``, each with the seconds since the one before."""
    requests = (
        {"prompt": item.question.text, "images": [item.picture], "max_new_tokens": LIMIT}
        for item in items
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
        "features": cache.features / cache.features_whole if cache.features else 1.0,
        **shares_of_pictures(cache),
        "seconds": seconds,
    }


def shares_of_pictures(cache: CacheReport) -> Record:
    """Bytes of image tokens stored and read beside those of 16 bits, and what was left out."""
    few = any(name.startswith("k") and name != "k16v16" for name in cache.formats)
    wide = 2 if few else 1  # answers are computed in fp32, whose bytes plain tokens are counted in
    return {
        "picture_stored": wide * cache.image_stored_share,
        "picture_read": wide * cache.image_read_share,
        "left_out": cache.left_out,
        "values_read": cache.values_read,
    }


def compare(engine: Engine, item: Item, record: Record, exact: Record, index: int) -> None:
    """Add how the answer departs from the full cache's."""
    ours, theirs = record["token_ids"], exact["token_ids"]
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if same is None and len(ours) != len(theirs):
        same = min(len(ours), len(theirs))
    record["first_difference"] = same
    if index < KL_PAGES and theirs:
        record["kl"] = divergence(item.full_along(theirs), item.along(engine, theirs))


def divergence(full: torch.Tensor, ours: torch.Tensor) -> float:
    """Mean KL(full || ours) of next-token log-probabilities ``[tokens, vocab]``, in nats."""
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
        "by line": by_line(records) if task == "read" else None,
        "stored %": round(100 * mean(records, "stored"), 1),
        "used %": round(100 * mean(records, "used"), 1),
        "MB": round(mean(records, "bytes") / 1e6, 3),
        "features kept %": round(100 * mean(records, "features"), 1),
        "picture stored %": round(100 * mean(records, "picture_stored"), 1),
        "picture read %": round(100 * mean(records, "picture_read"), 1),
        "left out %": round(100 * mean(records, "left_out"), 2),
        "values read %": round(100 * mean(records, "values_read"), 1),
        "seconds": round(sum(r["seconds"] for r in records), 1),
    }


def by_line(records: list[Record]) -> str:
    """Which share of a page's first, second, ... line is read right.

    >>> by_line([{"truth": "a\\nb", "answer": "a\\nc"}, {"truth": "d", "answer": "d"}])
    '1.00 0.00'
    """
    found: dict[int, list[bool]] = {}
    for record in records:
        said = record["answer"].splitlines()
        for number, line in enumerate(record["truth"].splitlines()):
            found.setdefault(number, []).append(said[number : number + 1] == [line])
    return " ".join(f"{statistics.fmean(found[number]):.2f}" for number in sorted(found))


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
