"""What weights in few bits cost: `python -m bench.weights`.

On the embedded model: how far the next token's distribution moves along greedy answers about
held-out pages, and how many of those tokens stay the likeliest. On SmolLM2-135M (`bench.smollm2`,
needs the package `gguf`): perplexity of English prose that it was asked nothing about, and the same
two figures. Both read texts the way a prompt is read (weights rounded, inputs not) and token by
token, where q4 rounds inputs to 8 bits as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import common
from bench.common import progress, write_report
from engine import Engine
from engine.loading.quantising import LAYERS
from engine.models.matrix import Linear
from engine.ops.formats import Affine

KINDS = ("q8", "q8+head", "q4", "q4+head", "q4 of 64", "q4 of 128")


def main() -> None:
    """Measure, and write the table."""
    options = read_options()
    torch.set_num_threads(options.threads)
    rows = [*on_pages(options)]
    if not options.pages_only:
        rows += on_prose(options)
    settings = {"pages": options.pages, "texts": options.texts, "tokens": options.tokens}
    settings |= {"dtype": "bfloat16", "seed": "of the pages", "threads": options.threads}
    notes = [
        "KL in nats of bf16's distribution from that of the weights, mean over tokens.",
        "SmolLM2's file has 4 bits in groups of 32 itself: on it q4 of 32 would say nothing.",
    ]
    path = write_report(options.name, settings, rows, notes, options.out)
    print(path.with_suffix(".md").read_text())


def read_options() -> argparse.Namespace:
    parser = common.make_parser(__doc__, name="weights")
    parser.add_argument("--pages", type=int, default=24, help="held-out pictures per task")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="of a text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pages-only", action="store_true", help="without SmolLM2")
    return common.read_options(parser)


def engine_of(folder: Path | None, kind: str) -> Engine:
    """An engine whose layers are rounded; groups that are no format of ours on paper alone."""
    format_, _, group = kind.partition(" of ")
    weights = "auto" if group else format_
    engine = Engine.load(folder, device="cpu", dtype="bf16", cache="full", weights=weights)
    if group:
        regroup(engine, int(group))
    return engine


def regroup(engine: Engine, group: int) -> None:
    """Round the layers to 4 bits in groups of another size, and write them out again."""
    row = Affine("q4", torch.uint8, run=group, bytes=4 + group // 2)
    for name, layer in engine.model.named_modules():
        if name.startswith(LAYERS) and isinstance(layer, Linear):
            weight = layer.weight.detach()
            if weight.shape[1] % group == 0:
                numbers = row.unpack(row.pack(weight)).to(weight.dtype)
                layer.weight = nn.Parameter(numbers, requires_grad=False)


# -- the embedded model ---------------------------------------------------------------------------


def on_pages(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """KL and agreement along the exact model's own answers."""
    from training.evaluate import questions_of

    exact = engine_of(None, "auto")
    asked = []
    for task in ("read", "field"):
        for page, question in questions_of(task, options.pages, "test"):
            answer = exact.generate(question.text, [page.image], max_new_tokens=96)
            asked.append((question.text, page.image, answer.token_ids))
    want = [exact.logits(text, [image], ids) for text, image, ids in asked]
    for kind in progress(KINDS, "formats"):
        engine = engine_of(None, kind)
        found = [engine.logits(text, [image], ids) for text, image, ids in asked]
        answers = [engine.generate(t, [i], max_new_tokens=96).token_ids for t, i, _ in asked]
        same = [ids == answer for (_, _, ids), answer in zip(asked, answers, strict=True)]
        yield row("embedded", kind, want, found, same_answer=sum(same) / len(same))


def row(
    model: str,
    kind: str,
    want: list[Tensor],
    found: list[Tensor],
    same_answer: float | str = "",
    lost: float | str = "",
) -> dict[str, Any]:
    """A line of the table: how far distributions ``[tokens, vocab]`` are from each other."""
    moved, changed = [], []
    for mine, theirs in zip(found, want, strict=True):
        p, q = theirs.log_softmax(-1), mine.log_softmax(-1)
        moved.append((p.exp() * (p - q)).sum(-1))
        changed.append((p.argmax(-1) != q.argmax(-1)).float())
    kl = torch.cat(moved)
    return {
        "model": model,
        "weights": kind,
        "KL": float(kl.mean()),
        "KL median": float(kl.median()),
        "likeliest changed": float(torch.cat(changed).mean()),
        "same answer": same_answer,
        "perplexity": lost,
    }


# -- a trained decoder ----------------------------------------------------------------------------


def on_prose(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Perplexity of prose, read as prompts are and token by token."""
    from bench.smollm2 import checkpoint

    folder = checkpoint()
    exact = engine_of(folder, "auto")
    texts = [exact.tokenizer.encode(text)[: options.tokens] for text in prose(options.texts)]
    want = [scores(exact, ids) for ids in texts]
    yield row("SmolLM2", "bf16", want, want, lost=perplexity(want, texts))
    for kind in progress(("q8", "q8+head", *KINDS[2:]), "formats"):
        engine = engine_of(folder, kind)
        found = [scores(engine, ids) for ids in texts]
        yield row("SmolLM2", kind, want, found, lost=perplexity(found, texts))
    few = texts[: max(1, options.texts // 4)]
    exactly = [scores(exact, ids) for ids in few]
    for kind in progress(("auto", "q8", "q4"), "formats"):
        engine = engine_of(folder, kind)
        found = [stepped(engine, ids) for ids in few]
        name = kind.replace("auto", "bf16")
        yield row("SmolLM2, stepped", name, exactly, found, lost=perplexity(found, few))


@torch.inference_mode()
def scores(engine: Engine, ids: list[int]) -> Tensor:
    """Scores ``[tokens - 1, vocab]`` of every next token of a text."""
    text = engine.tokenizer.decode(ids)
    known = engine.render(text, raw=True).token_ids
    assert known[-len(ids) :] == ids, "the text is not its tokens"
    return engine.logits(text, raw=True)[-len(ids) : -1]


def stepped(engine: Engine, ids: list[int]) -> Tensor:
    """The same, decoded one by one."""
    return engine.logits(engine.tokenizer.decode(ids[:1]), continuation=ids[1:], raw=True)


def perplexity(found: list[Tensor], texts: list[list[int]]) -> float:
    """Of all tokens but the first of every text."""
    lost = [
        F.cross_entropy(scored, torch.tensor(ids[1:]), reduction="none")
        for scored, ids in zip(found, texts, strict=True)
    ]
    return float(torch.cat(lost).mean().exp())


def prose(count: int) -> list[str]:
    """English that Python's packages ship, each text from another file."""
    places = [Path(place) for place in sys.path if place.endswith("site-packages")]
    found = sorted(
        path
        for place in places
        for pattern in ("*.dist-info/licenses/**/LICENSE*", "*.dist-info/LICENSE*", "**/README.rst")
        for path in place.glob(pattern)
        if path.is_file() and path.stat().st_size > 4000
    )
    different: dict[str, str] = {}  # by what their letters begin with
    for path in found:
        text = path.read_text("utf-8", "replace")[:20_000]
        different.setdefault("".join(filter(str.isalpha, text))[:60].lower(), text)
    return sorted(different.values(), key=len)[:count]


if __name__ == "__main__":
    if importlib.util.find_spec("gguf") is None:
        print("note: without the package gguf only the embedded model is measured")
    main()
