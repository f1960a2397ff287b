"""Formats of the cache on a trained decoder: the beginning of a text stands for a picture.

    python -m bench.prefix [--texts 16] [--picture 763] [--answer 256]

SmolLM2-135M (``bench.smollm2``) reads the beginning of texts that it has not seen. What of it would
be image tokens is stored and attended as a cache policy has it; the rest of the text is decoded
token by token, and its perplexity is what the policy costs. The embedded model has no outlier
channels; this decoder has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bench import common
from bench.smollm2 import checkpoint
from bench.weights import prose
from engine import Engine
from engine.cache.decode import Decoding
from engine.cache.pool import Pool
from engine.cache.prefill import Prefill
from engine.cache.report import report
from engine.cache.row import Row, Stored
from engine.policies.layout import Kept, Layout
from engine.policies.specs import parse
from engine.running.turn import make_pools

FIRST = 5  # tokens before the picture
POLICIES = (
    "full",
    *(f"sift:format={form},skip=0" for form in ("k8v8", "k8v4", "k4v4", "k4v2", "k2v4", "k2v2")),
    *(f"sift:format=k16v16,skip={skip}" for skip in (0.05, 0.1, 0.2)),
    *(f"sift:format={form},skip=0.1" for form in ("k8v8", "k4v4", "k4v2")),
    *(f"sift:format=k4v4,skip={skip}" for skip in (0.05, 0.2)),
    "zipvl:tau=0.975",
    "avl:secondary=0.9,core=0.6,prefill=1,text=1",
    "avl:secondary=0.45,core=0.3,prefill=1,text=1",
    "avl:secondary=0.3,core=none,prefill=1,text=1,format=k8v4,minor=k4v2",
)
# Bits and how many numbers of a head share a step, rounded as asymmetric formats do: what the table
# of formats has no row for.
GROUPS = {
    f"k{bits}v{bits}, groups of {group}": (bits, group)
    for bits, group in ((4, 32), (4, 64), (3, 32), (3, 64), (2, 32))
}
NOTES = ("Perplexity of the decoded tokens; its interval is a bootstrap's over texts, paired.",)


class Rounded(Prefill):
    """Stores what rounding to so many bits in such groups leaves of image tokens, in full width."""

    bits, group = 4, 32

    def _store(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, layout: Layout, kept: Kept
    ) -> Stored:
        image = (layout.image_of >= 0)[:, None, None]
        k, v = (torch.where(image, rounded(x, self.bits, self.group), x) for x in (k, v))
        return super()._store(layer, k, v, layout, kept)


def rounded(numbers: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Steps of a group's range: a scale and a zero in fp16, and codes of so many bits."""
    runs = numbers.unflatten(-1, (-1, group))
    low, high = runs.amin(-1, keepdim=True), runs.amax(-1, keepdim=True)
    step, zero = (x.half().float() for x in ((high - low) / (2**bits - 1), low))
    codes = ((runs - zero) / step.clamp(min=1e-7)).round().clamp(0, 2**bits - 1)
    return (codes * step + zero).flatten(-2)


def started(engine: Engine, pools: Sequence[Pool], spec: str, ids: torch.Tensor, more: int) -> Row:
    """A sequence whose tokens but the first ones are a picture's."""
    decoder = engine.model.decoder
    layout = Layout.of_tokens(len(ids), [(FIRST, len(ids))], ids.device)
    rotary = decoder.rotation.begin(len(ids))
    if spec in GROUPS:
        step = Rounded(pools, parse("full"), layout, more, rotary=rotary)
        step.bits, step.group = GROUPS[spec]
    else:
        step = Prefill(pools, parse(spec), layout, more, rotary=rotary)
    with step:
        decoder(decoder.embed(ids), step)
    return step.row


@torch.inference_mode()
def losses(engine: Engine, spec: str, texts: torch.Tensor, begin: int) -> tuple[Any, list[Any]]:
    """Loss of every decoded token ``[texts, tokens]``, and what the cache reports of each text."""
    decoder, more = engine.model.decoder, texts.shape[1] - begin
    pools = make_pools(engine.model)
    rows = [started(engine, pools, spec, ids[:begin], more) for ids in texts]
    decoding, found = Decoding(pools, rows), []
    for at in range(begin, texts.shape[1] - 1):
        logits = decoder.logits(decoder(decoder.embed(texts[:, at]), decoding))
        decoding.advance()
        found.append(F.cross_entropy(logits, texts[:, at + 1], reduction="none"))
    settled = [decoding.settle(r) for r in range(len(rows))]
    return torch.stack(found, 1), [report(row, pools) for row in settled]


def line(spec: str, lost: Any, reports: list[Any], exact: Any) -> dict[str, Any]:
    """A row of the table."""
    changes = (lost.mean(1) - exact.mean(1)).tolist()
    draws = torch.randint(len(changes), (2000, len(changes)))
    means = torch.tensor(changes)[draws].mean(1).sort().values
    low, high = (100 * float(means[at].exp() - 1) for at in (50, 1949))
    wide = 2 if ("format=k" in spec or "zipvl" in spec) and "k16" not in spec else 1  # of fp32

    def mean(name: str) -> float:
        return sum(getattr(each, name) for each in reports) / len(reports)

    return {
        "policy": spec,
        "perplexity": round(float(lost.mean().exp()), 3),
        "change %": round(100 * float((lost.mean() - exact.mean()).exp() - 1), 2),
        "interval %": f"[{low:+.2f}, {high:+.2f}]",
        "picture stored %": round(100 * wide * mean("image_stored_share"), 1),
        "picture read %": round(100 * wide * mean("image_read_share"), 1),
        "left out %": round(100 * mean("left_out"), 2),
        "values read %": round(100 * mean("values_read"), 1),
    }


def main() -> None:
    """Measure, print and write the report."""
    parser = common.make_parser(__doc__, name="prefix")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--picture", type=int, default=763, help="tokens that stand for a picture")
    parser.add_argument("--answer", type=int, default=256, help="tokens that are decoded")
    parser.add_argument("--cache", action="append", metavar="SPEC")
    args = common.read_options(parser)
    torch.manual_seed(0)
    engine = Engine.load(checkpoint(), device="cpu", dtype="float32", cache="full")
    begin = FIRST + args.picture
    size = begin + args.answer
    ids = [engine.tokenizer.encode(text)[:size] for text in prose(10 * args.texts)]
    texts = torch.tensor([each for each in ids if len(each) == size][: args.texts])
    rows, exact = [], None
    for spec in common.progress(args.cache or [*POLICIES, *GROUPS], "policies"):
        lost, reports = losses(engine, spec, texts, begin)
        exact = lost if exact is None else exact
        rows.append(line(spec, lost, reports, exact))
        print(rows[-1], flush=True)
    settings = {"texts": len(texts), "picture": args.picture, "answer": args.answer}
    settings |= {"seed": 0, "dtype": "fp32"}
    path = common.write_report(args.name, settings, rows, NOTES, args.out)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
