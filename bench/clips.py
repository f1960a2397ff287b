"""What cache policies cost on short clips, asked of a model that has learned them.

    python -m training.tune_clips runs/clips      half an hour: the embedded model learns clips
    python -m bench.clips runs/clips/model

Each held-out clip (`training/clips.py`) is four frames, 2,304 image tokens, and six questions that
no frame alone answers; they are shown as four pictures. *right* is the share of exact answers, *as
full* that of answers that are the full cache's to the letter.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bench import common
from engine import Engine, Result
from engine.pictures.encoded import EncodedImage
from training.clips import TASKS, make_clip
from training.page import Question

FIRST = 900_000  # held-out: training begins at a million
# About 31 % of a picture's bytes but for the first, the paper's A-VL, and the last ones, of 22 %.
POLICIES = (
    "full",
    "zipvl",
    "zipvl:sparse=0",
    "zipvl:format=plain,minor=freed",
    "sift",
    "avl:secondary=0.31,core=0.2,prefill=1,text=1",
    "avl",
    "zipvl:share=0.421",
    "sift:format=k4v2",
    "random:keep=0.31",
)

Shown = tuple[Question, list[EncodedImage]]


def shown(engine: Engine, clips: int) -> list[Shown]:
    """The questions of so many held-out clips, with the frames encoded once."""
    found = []
    for number in common.progress(range(clips), "clips encoded"):
        clip = make_clip(FIRST + number)
        frames = [engine.encode(image, beside=True) for image in clip.images]
        found += [(question, frames) for question in clip.questions]
    return found


def answers(engine: Engine, asked: Sequence[Shown], rows: int) -> list[Result]:
    """One answer to each question, in order."""
    requests = [
        {"prompt": question.text, "images": frames, "max_new_tokens": 24}
        for question, frames in asked
    ]
    found: dict[int, Result] = {}
    made = engine.generate_batch(requests, rows)
    for result in common.progress(made, engine.policy.spec[:40], len(requests)):
        if not isinstance(result, Result):
            raise result.error
        found[result.index] = result
    return [found[number] for number in range(len(requests))]


def line(
    spec: str, asked: Sequence[Shown], mine: Sequence[Result], full: Sequence[Result]
) -> dict[str, Any]:
    """One policy's figures."""
    right = [
        a.text.strip() == question.answer for (question, _), a in zip(asked, mine, strict=True)
    ]
    exact = [
        a.text.strip() == question.answer for (question, _), a in zip(asked, full, strict=True)
    ]
    same = [a.token_ids == b.token_ids for a, b in zip(mine, full, strict=True)]
    difference = statistics.mean(a - b for a, b in zip(right, exact, strict=True))
    values: dict[str, Any] = {
        "policy": spec,
        "pictures stored %": percent([stored(each) for each in mine]),
        "right %": percent(right),
        "beside full": round(100 * difference, 1),
        "as full %": percent(same),
    }
    for task in TASKS:
        of_task = [
            r for (question, _), r in zip(asked, right, strict=True) if question.task == task
        ]
        values[f"{task} %"] = percent(of_task)
    return values


def stored(result: Result) -> float:
    """Bytes of image tokens beside those of 16 bits; plain ones are counted in fp32's here."""
    few = any(name.startswith("k") and name != "k16v16" for name in result.cache.formats)
    return (2 if few else 1) * result.cache.image_stored_share


def percent(values: Sequence[float]) -> float:
    """The mean as a percentage."""
    return round(100 * statistics.mean(values), 1)


def main() -> None:
    """Answer, compare, and write the table."""
    parser = common.make_parser(__doc__, name="clips")
    parser.add_argument("model", help="the folder that training.tune_clips has made")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--cache", action="append", help="policies, the first beside all others")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = common.read_options(parser)
    torch.set_num_threads(args.threads)
    engine = Engine.load(args.model, dtype="fp32", offline=True)
    asked = shown(engine, args.clips)
    lines: list[dict[str, Any]] = []
    full: list[Result] = []
    for spec in args.cache or POLICIES:
        mine = answers(engine.with_cache(spec), asked, args.rows)
        full = full or mine
        lines.append(line(spec, asked, mine, full))
    settings = {
        "clips": args.clips,
        "questions": len(asked),
        "seed": FIRST,
        "dtype": "fp32",
        "threads": args.threads,
    }
    path = common.write_report(args.name, settings, lines, NOTES, args.out)
    print(path.with_suffix(".md").read_text())


NOTES = (
    "Answers are greedy; a question's chance is one in eleven for colours, one in three for "
    "*when*, one in two for *order*, one in three for *count*, and none for *number*.",
)


if __name__ == "__main__":
    main()
