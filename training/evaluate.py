"""Held-out figures by real greedy generation: `python -m training.evaluate weights/tiny`.

Pages come from seeds that training never uses (below 1,000,000); every task gets `--pages`
questions, one per page. Style `held-out` draws documents with faces and a layout never trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from training.documents import HELD_OUT_STYLE, DocumentStyle, make_document
from training.export import load_tensors
from training.generate import greedy
from training.model import ModelConfig, TinyLlava
from training.page import Page, Question
from training.scenes import make_scene
from training.tokenizer import load

SCENE_TASKS = ("colour", "shape", "where", "zone", "count", "yesno", "relation", "describe")
PAGE_TASKS = ("field", "which", "read")
FIRST_SEED = {"test": 500_000, "held-out": 700_000}
LIMIT = 160


def load_model(folder: Path) -> TinyLlava:
    """The training form of an exported checkpoint, in fp32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text, vision = config["text_config"], config["vision_config"]
    model = TinyLlava(
        ModelConfig(
            vocab=text["vocab_size"],
            vision_dim=vision["hidden_size"],
            vision_layers=vision["num_hidden_layers"],
            vision_heads=vision["num_attention_heads"],
            vision_mlp=vision["intermediate_size"],
            dim=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            mlp=text["intermediate_size"],
        )
    )
    load_tensors(model, load_file(folder / "model.safetensors"))
    return model.eval()


def distance(a: str, b: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def similarity(answer: str, truth: str) -> float:
    """1 - normalised edit distance."""
    return 1 - distance(answer, truth) / max(len(answer), len(truth), 1)


def objects_right(answer: str, truth: str) -> float:
    """Share of the described objects whose kind, colour and place are all right."""
    told = set(re.findall(r"An? [^.]*\.", answer))
    true = re.findall(r"An? [^.]*\.", truth)
    return sum(sentence in told for sentence in true) / max(len(true), len(told), 1)


def questions_of(task: str, pages: int, style: str) -> Iterator[tuple[Page, Question]]:
    """`pages` held-out pages that have a question of this task, with one such question each."""
    document = HELD_OUT_STYLE if style == "held-out" else DocumentStyle()
    seed, found = FIRST_SEED[style], 0
    while found < pages:
        page = make_scene(seed) if task in SCENE_TASKS else make_document(seed, document)
        fitting = [q for q in page.questions if q.task == task]
        if fitting:
            found += 1
            yield page, random.Random(seed).choice(fitting)
        seed += 1


def score(task: str, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Figures of a task from (answer, truth) pairs."""
    n = len(pairs)
    out = {"n": float(n), "exact": sum(a == t for a, t in pairs) / n}
    if task in ("field", "read", "describe"):
        out["characters"] = sum(similarity(a, t) for a, t in pairs) / n
    if task == "describe":
        out["objects"] = sum(objects_right(a, t) for a, t in pairs) / n
    return out


def evaluate_task(
    model: TinyLlava, task: str, args: argparse.Namespace
) -> tuple[dict[str, float], list[dict[str, str]]]:
    tokenizer = load(args.folder / "tokenizer.json")
    items = list(questions_of(task, args.pages, args.style))
    items.sort(key=lambda item: len(item[1].answer))  # rows of a batch end at about the same time
    pairs, wrong = [], []
    for start in range(0, len(items), args.batch):
        part = items[start : start + args.batch]
        questions = [q for _, q in part]
        device = model.head.weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            answers = greedy(
                model, [p for p, _ in part], [q.text for q in questions], tokenizer, LIMIT
            )
        for q, answer in zip(questions, answers, strict=True):
            pairs.append((answer, q.answer))
            if answer != q.answer:
                wrong.append({"question": q.text, "answer": answer, "truth": q.answer})
    return score(task, pairs), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pages", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--style", default="test", choices=sorted(FIRST_SEED))
    parser.add_argument("--tasks", nargs="*", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16 (faster, not exact)")
    parser.add_argument("--json", type=Path, default=None, help="write figures and wrong answers")
    args = parser.parse_args()
    model = load_model(args.folder).to(args.device)
    every = PAGE_TASKS if args.style == "held-out" else SCENE_TASKS + PAGE_TASKS
    report: dict[str, Any] = {"style": args.style, "tasks": {}, "wrong": {}}
    for task in args.tasks or every:
        began = time.time()
        figures, wrong = evaluate_task(model, task, args)
        report["tasks"][task], report["wrong"][task] = figures, wrong
        shown = "  ".join(f"{k} {v:.3f}" for k, v in figures.items() if k != "n")
        line = f"{task:10} n {int(figures['n']):5}  {shown}  ({time.time() - began:.0f} s)"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if args.json:
            args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
