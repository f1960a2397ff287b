"""A second question about the same picture: what the first one let go is missing then.

    python -m bench.turns [--pages 200]

On held-out pages with two fields or more the first turn asks for the first field, the second one
for the last; both answers are scored. A policy that frees tokens chooses them by the first one.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench import common
from bench.quality import paired_interval
from engine import Engine
from training.documents import DocumentStyle, make_document
from training.evaluate import FIRST_SEED, similarity
from training.page import Page, Question

POLICIES = (
    "full",
    "avl:secondary=0.9,core=0.6,prefill=1,text=1",
    "avl:secondary=0.45,core=0.3,prefill=1,text=1",
    "avl:secondary=0.2,core=0.1333,prefill=1,text=1",
    "snapkv:keep=0.5",
    "sift:format=k4v4,skip=0.1",
    "sift:format=k4v2,skip=0.1",
)


def pairs(count: int) -> list[tuple[Page, Question, Question]]:
    """Pages with their first and their last field."""
    found, seed = list[tuple[Page, Question, Question]](), FIRST_SEED["test"]
    while len(found) < count:
        page = make_document(seed, DocumentStyle())
        fields = [question for question in page.questions if question.task == "field"]
        if len(fields) > 1 and fields[0].text != fields[-1].text:
            found.append((page, fields[0], fields[-1]))
        seed += 1
    return found


def asked(engine: Engine, page: Page, questions: tuple[Question, ...]) -> list[float]:
    """How right each answer of a conversation is."""
    chat, found = engine.chat(), []
    for number, question in enumerate(questions):
        result = chat.send(question.text, [page.image] if number == 0 else [], max_new_tokens=48)
        found.append(similarity(result.text.strip(), question.answer))
    return found


def line(spec: str, scores: list[list[float]], exact: list[list[float]]) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"policy": spec}
    for turn in (0, 1):
        mine, theirs = ([each[turn] for each in found] for found in (scores, exact))
        lost = [a - b for a, b in zip(mine, theirs, strict=True)]
        low, high = paired_interval(lost)
        row[f"turn {turn + 1}: characters"] = round(statistics.fmean(mine), 4)
        row[f"turn {turn + 1}: exact"] = round(statistics.fmean(s == 1 for s in mine), 4)
        row[f"turn {turn + 1}: - full"] = f"{statistics.fmean(lost):+.4f} [{low:+.4f}, {high:+.4f}]"
    return row


def main() -> None:
    """Ask, score and write the table."""
    parser = common.make_parser(__doc__, name="turns")
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--cache", action="append", metavar="SPEC")
    args = common.read_options(parser)
    loaded, rows, exact = Engine.load(dtype="fp32"), list[dict[str, Any]](), None
    conversations = pairs(args.pages)
    for spec in args.cache or POLICIES:
        engine = loaded.with_cache(spec)
        turns = common.progress(conversations, spec[:40])
        scores = [asked(engine, page, (first, last)) for page, first, last in turns]
        exact = scores if exact is None else exact
        rows.append(line(spec, scores, exact))
    settings = {"pages": args.pages, "seed": FIRST_SEED["test"], "dtype": "fp32"}
    path = common.write_report(args.name, settings, rows, (), args.out)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
