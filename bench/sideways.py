"""Whole decode steps of Llama-3.2-Vision's width, its pictures seen through cross layers.

    python -m bench.sideways [--sizes 1 8 16] [--weights bf16]

A fifth of the 11B: 8 of 40 layers, 2 of them cross layers, and a fifth of the head's rows. Every
row has a picture of its own of 6,404 features; there is no prefill: keys and values are random and
so peaked that a tenth of the features holds nine tenths of a head's attention, as in trained
models. Heads of random keys do not agree as trained ones do, so that a policy stands for `trimmed`
which keeps as many features as is published for the 11B at a ratio of .25. Every policy has its own
rows and takes its steps in turn; *limit* is the ratio of the bytes that steps read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from bench import common, in_turn
from bench.headline import PEAKED, SHAPES, Given, fill, numbers
from bench.in_turn import Cell
from engine.cache.crossing import CrossPools, Sight
from engine.cache.looking import Looking
from engine.cache.report import CacheReport, report
from engine.cache.row import Row
from engine.models.mllama import MllamaConfig, MllamaDecoder
from engine.models.mllama_vision import MllamaVisionConfig
from engine.policies.composed import Composed
from engine.policies.layout import Layout
from engine.policies.policy import Policy
from engine.policies.specs import parse

FEATURES, TEXT = 6404, 100
LAYERS, CROSS = 6, (3, 7)  # self-attention's, and where cross layers stand among all
PUBLISHED = 0.615  # of the features, at a ratio of .25 (arXiv 2504.00557)


@dataclass(frozen=True)
class KeepsShare(Policy):
    """Keeps the first of a picture's features, as many as ``trimmed`` is published to keep."""

    name: ClassVar[str] = "trimmed"

    def features(self, received: torch.Tensor) -> torch.Tensor:
        """See ``Policy.features``."""
        return torch.arange(int(PUBLISHED * received.shape[1]), device=received.device)


CORE = "avl:core=none,prefill=1,text=1,cross=0.3"
POLICIES: dict[str, Policy] = {
    "full": parse("full"),
    "trimmed to 61.5 %": KeepsShare(),
    "sift": parse("sift"),
    "trimmed to 61.5 % + sift": Composed((KeepsShare(), parse("sift"))),
    "avl:cross=0.3": parse(CORE),
    "trimmed to 61.5 % + avl:cross=0.3": Composed((KeepsShare(), parse(CORE))),
}


def make_decoder(weights: str) -> MllamaDecoder:
    """A fifth of the 11B's decoder, of random weights."""
    shape = replace(
        SHAPES["vicuna-7b"][0], vocab=25_600, layers=LAYERS, kv_heads=8, mlp=14336, rope_theta=5e5
    )
    vision: Any = MllamaVisionConfig  # which no decoder asks for
    with torch.device("meta"):
        decoder = MllamaDecoder(MllamaConfig(shape, vision, CROSS, shape.vocab, False, ()))
    return fill(decoder, weights)  # type: ignore[return-value]


class SidewaysCell(Cell):
    """Rows each of which sees a picture of its own."""

    def __init__(self, decoder: MllamaDecoder, policy: Policy, rows: int) -> None:
        super().__init__(decoder, LAYERS, rows)
        self.policy = policy
        self.cross = CrossPools([self.pool() for _ in CROSS])

    def filled(self, steps: int) -> Row:
        """See ``Cell``."""
        config = self.decoder.config
        layout = Layout.of_tokens(TEXT, [], torch.device("cpu"))
        features = torch.empty(FEATURES, 1)  # only keys and values are asked for
        looking = Looking([Sight(1, features, FEATURES)], self.cross, policy=self.policy)
        with Given(self.pools, self.policy, layout, steps, looking=looking) as step:
            for layer in range(LAYERS):
                step.fill(layer, *numbers(layer, 1.0, TEXT, config.kv_heads, config.head_dim))
            for layer in range(len(CROSS)):
                view = step.cross(layer)
                assert view is not None, "there is a picture"
                _, k, v = numbers(layer, PEAKED, FEATURES, config.kv_heads, config.head_dim)
                q = torch.randn(TEXT, config.heads, config.head_dim).to(k.dtype)
                view.attend(q, lambda given, k=k, v=v: (k[: len(given)], v[: len(given)]))
        return step.row

    def report(self, row: Row) -> CacheReport:
        """See ``Cell``."""
        return report(row, self.pools, self.cross.pools)

    def read(self, cache: CacheReport) -> float:
        """See ``Cell``."""
        whole = cache.feature_bytes / cache.image_stored_share
        return cache.image_read_share * whole + cache.bytes_used - cache.feature_bytes


def measure(decoder: MllamaDecoder, rows: int, args: Any) -> list[dict[str, Any]]:
    """A line for every policy at so many rows."""
    cells = {name: SidewaysCell(decoder, policy, rows) for name, policy in POLICIES.items()}
    measured = in_turn.measure(cells, args.steps, args.blocks)
    return [
        {
            "rows": rows,
            "policy": name,
            "ms per step": round(found.ms, 1),
            "step / full": round(found.ratio, 3),
            "95 %": found.interval,
            "limit": round(found.limit, 3),
            "picture MB of a row": round(found.cache.feature_bytes / 1e6, 1),
            **found.columns(),
        }
        for name, found in measured.items()
    ]


@torch.inference_mode()
def main() -> None:
    """Measure, print and write the report."""
    parser = common.make_parser(__doc__, name="sideways")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 8, 16], help="rows")
    parser.add_argument("--weights", default="bf16", choices=("bf16", "q8", "q4"))
    parser.add_argument("--steps", type=int, default=6, help="of a block: whole cycles of K = 3")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = common.read_options(parser)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    decoder = make_decoder(args.weights)
    lines = [line for rows in args.sizes for line in measure(decoder, rows, args)]
    settings = {"weights": args.weights, "layers": f"{LAYERS} and {len(CROSS)} cross layers"}
    settings |= {"features": FEATURES, "threads": args.threads, "seed": 0, "dtype": "bf16"}
    notes = ("Ratios are within blocks; a feature takes 4,096 bytes of a cross layer in bf16.",)
    path = common.write_report(args.name, settings, lines, notes, args.out)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
