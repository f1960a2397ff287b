"""Whole decode steps of a decoder of 7B width, of the full cache and of policies over it.

    python -m bench.headline [--sizes 8 16] [--weights q4] [--image 2880]
    python -m bench.headline --shape qwen3-vl-2b --sizes 1 8     an A4 page at 300 dpi

The A-VL paper's headline is a decode at 50.5 % of the original's time. What a policy can save
depends on how many bytes of a step are keys and values: on the rows, the picture, the bits of the
weights. Vicuna has as many heads of keys as of queries, here 8 of 32 layers; there is no prefill:
keys and values are random, so peaked that a tenth of the tokens holds nine tenths of a head's
attention, as in trained models (docs/quality.md); how many values are read is printed. Every policy
has its own rows and takes its steps in turn; *limit* is the ratio of the bytes that steps read,
weights and attended keys and values: the ratio if a step were reading alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench import common, in_turn
from bench.in_turn import Cell
from engine.cache.pool import Pool
from engine.cache.prefill import Prefill
from engine.cache.report import CacheReport
from engine.cache.row import Row
from engine.loading.preparing import prepare
from engine.models.decoder import Decoder, DecoderConfig
from engine.models.matrix import Linear
from engine.ops.few_bits import FewBits, quantise
from engine.policies.layout import Layout
from engine.policies.received import Received
from engine.policies.specs import parse

POLICIES = ("full", "sift", "sift:skip=0", "avl:prefill=1,text=1")
SYSTEM, TEXT = 35, 35  # tokens before the picture and behind it
PEAKED = 2.6  # standard deviation of logits
# A decoder, how many layers are measured, and image tokens of a row.
SHAPES: dict[str, tuple[DecoderConfig, int]] = {
    "vicuna-7b": (
        DecoderConfig(
            vocab=32000, hidden=4096, layers=8, heads=32, kv_heads=32, head_dim=128, mlp=11008,
            rope_theta=1e4, norm_eps=1e-5, qkv_bias=False, tied_head=False, context=32768,
        ),
        2880,
    ),
    "qwen3-vl-2b": (
        DecoderConfig(
            vocab=151936, hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, mlp=6144,
            rope_theta=5e6, norm_eps=1e-6, qkv_bias=False, tied_head=False, context=32768,
            qk_norm=True,
        ),
        8580,
    ),
}  # fmt: skip
NOTES = (
    "Ratios are within blocks. At 50.5 % lies the paper's figure; where the limit is above it no "
    "cache of this size can reach it.",
)


def make_decoder(config: DecoderConfig, weights: str) -> Decoder:
    """A decoder of random weights, its layers in few bits unless ``weights`` is bf16."""
    with torch.device("meta"):
        decoder = Decoder(config)
    return fill(decoder, weights)


def fill(decoder: Decoder, weights: str) -> Decoder:
    """Give a decoder that was built without memory random weights."""
    drawn: dict[tuple[tuple[int, ...], bool], torch.Tensor | FewBits] = {}
    for name, module in decoder.named_modules():
        few = weights != "bf16" and isinstance(module, Linear) and name != "head"
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            key = tuple(parameter.shape), few
            if key not in drawn:
                drawn[key] = random_weight(key[0], weights if few else "bf16")
            put(module, leaf, drawn[key])
    decoder.requires_grad_(False)
    prepare(decoder, torch.device("cpu"))
    return decoder


def random_weight(shape: tuple[int, ...], weights: str) -> torch.Tensor | FewBits:
    """A matrix, rounded to a format, or a norm's weights of 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn = torch.randn(shape).mul_(0.02)
    return drawn.bfloat16() if weights == "bf16" else quantise(drawn, weights)


def put(module: torch.nn.Module, leaf: str, drawn: torch.Tensor | FewBits) -> None:
    """Give a layer numbers of its own: every layer's are read from memory."""
    if isinstance(drawn, torch.Tensor):
        module.register_parameter(leaf, torch.nn.Parameter(drawn.clone(), requires_grad=False))
        return
    scale = None if drawn.scale is None else drawn.scale.clone()
    assert isinstance(module, Linear)
    module.quantised(replace(drawn, codes=drawn.codes.clone(), scale=scale))


class Given(Prefill):
    """A prefill that is given keys and values in place of computing them."""

    def fill(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Choose and store one layer's."""
        self._keep(layer, k, v, self._turn, Received(q, k))


def filled(pools: Sequence[Pool], config: DecoderConfig, spec: str, image: int, steps: int) -> Row:
    """A row with one picture, whose keys and values are random."""
    spans = [(SYSTEM, SYSTEM + image)]
    layout = Layout.of_tokens(SYSTEM + image + TEXT, spans, torch.device("cpu"))
    shape = layout.columns, config.kv_heads, config.head_dim
    # Of queries: they are normed, or sums over the stream of numbers of 0.02.
    deviation = 1.0 if config.qk_norm else 0.02 * config.hidden**0.5
    with Given(pools, parse(spec), layout, steps) as step:
        for layer in range(len(pools)):
            step.fill(layer, *numbers(layer, PEAKED / deviation, *shape))
    return step.row


@functools.cache
def numbers(layer: int, deviation: float, *shape: int) -> tuple[torch.Tensor, ...]:
    """A query, keys and values of a layer: the same in every row, whose memory is its own."""
    generator = torch.Generator().manual_seed(layer)
    k, v = torch.randn(2, *shape, generator=generator)
    q = torch.randn(1, *shape[1:], generator=generator)
    return q.bfloat16(), (k * deviation).bfloat16(), v.bfloat16()


class HeadlineCell(Cell):
    """Rows with a picture among their tokens."""

    def __init__(self, decoder: Decoder, spec: str, rows: int, image: int) -> None:
        super().__init__(decoder, decoder.config.layers, rows)
        self.spec, self.image = spec, image

    def filled(self, steps: int) -> Row:
        """See ``Cell``."""
        return filled(self.pools, self.decoder.config, self.spec, self.image, steps)

    def read(self, cache: CacheReport) -> float:
        """See ``Cell``: the picture's, and all text."""
        token = sum(pool.slot_bytes for pool in self.pools)
        text = cache.bytes_full / token - cache.image_tokens
        return token * (cache.image_read_share * cache.image_tokens + text)


def measure(decoder: Decoder, rows: int, args: Any) -> list[dict[str, Any]]:
    """A line for every policy at so many rows."""
    cells = {spec: HeadlineCell(decoder, spec, rows, args.image) for spec in args.cache}
    measured = in_turn.measure(cells, args.steps, args.blocks)
    return [
        {
            "rows": rows,
            "policy": spec,
            "ms per step": round(found.ms, 1),
            "tokens/s in all": round(1e3 * rows / found.ms, 1),
            f"step / {args.cache[0]}": round(found.ratio, 3),
            "95 %": found.interval,
            "limit": round(found.limit, 3),
            "beside the limit": round(found.ratio / found.limit, 2),
            **found.columns(),
        }
        for spec, found in measured.items()
    ]


@torch.inference_mode()
def main() -> None:
    """Measure, print and write the report."""
    parser = common.make_parser(__doc__, name="headline")
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 16], help="rows")
    parser.add_argument("--weights", default="q4", choices=("bf16", "q8", "q4"))
    parser.add_argument("--shape", default="vicuna-7b", choices=tuple(SHAPES))
    parser.add_argument("--image", type=int, help="image tokens of a row")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--cache", action="append", help="policies, the first beside all others")
    parser.add_argument("--steps", type=int, default=6, help="of a block: whole cycles of K = 3")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = common.read_options(parser)
    args.cache = args.cache or [*POLICIES]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config, image = SHAPES[args.shape]
    config = replace(config, layers=args.layers or config.layers)
    args.image = args.image or image
    decoder = make_decoder(config, args.weights)
    lines = [line for rows in args.sizes for line in measure(decoder, rows, args)]
    settings = {"shape": args.shape, "weights": args.weights, "layers": config.layers}
    settings |= {
        "kv heads": config.kv_heads,
        "image tokens": args.image,
        "threads": args.threads,
        "seed": 0,
        "dtype": "bf16",
    }
    path = common.write_report(args.name, settings, lines, NOTES, args.out)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
