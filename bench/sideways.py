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

import statistics
from dataclasses import dataclass, replace
from time import perf_counter
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from bench import common
from bench.headline import PEAKED, SHAPES, Given, fill, numbers
from engine.cache.crossing import CrossPools, Sight
from engine.cache.looking import Looking
from engine.cache.pool import Pool
from engine.cache.report import CacheReport, report
from engine.cache.row import Row
from engine.models.matrix import matrices
from engine.models.mllama import MllamaConfig, MllamaDecoder
from engine.models.mllama_vision import MllamaVisionConfig
from engine.policies.composed import Composed
from engine.policies.layout import Layout
from engine.policies.policy import Policy
from engine.policies.specs import parse
from engine.running.stepping import Stepper, Stepping

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


class Cell:
    """Rows under one policy in the middle of answers."""

    def __init__(self, decoder: MllamaDecoder, policy: Policy, rows: int, steps: int) -> None:
        config, weight = decoder.config, decoder.norm.weight
        given = config.kv_heads, config.head_dim, weight.dtype, weight.device
        self.decoder, self.rows, self.policy = decoder, rows, policy
        self.pools = [Pool(*given) for _ in range(LAYERS)]
        self.cross = CrossPools([Pool(*given) for _ in CROSS])
        model: Any = SimpleNamespace(decoder=decoder)
        self.stepper = Stepper(model, self.pools, Stepping())
        for _ in range(rows):
            self.stepper.join(self._filled(steps + 4))
        self.go_on(2)

    def _filled(self, steps: int) -> Row:
        """A row that sees a picture of its own."""
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

    def go_on(self, steps: int) -> float:
        """Seconds of a step, mean of so many."""
        tokens, began = torch.zeros(self.rows, dtype=torch.int64), perf_counter()
        for _ in range(steps):
            logits = self.stepper.step(tokens)
        seconds = (perf_counter() - began) / steps
        assert logits.isfinite().all()
        return seconds

    def end(self) -> tuple[float, CacheReport]:
        """Bytes that a step has read, and what the last row held."""
        rows = [self.stepper.leave(0) for _ in range(self.rows)]
        reports = [report(row, self.pools, self.cross.pools) for row in rows]
        weights = sum(matrix.bytes_read(self.rows) for matrix in matrices(self.decoder))
        return weights + sum(map(_read, reports)), reports[-1]


def _read(cache: CacheReport) -> float:
    """Bytes of keys and values that a step has read of a row."""
    whole = cache.feature_bytes / cache.image_stored_share
    return cache.image_read_share * whole + cache.bytes_used - cache.feature_bytes


def measure(decoder: MllamaDecoder, rows: int, args: Any) -> list[dict[str, Any]]:
    """A line for every policy at so many rows."""
    steps = args.steps * args.blocks
    cells = {name: Cell(decoder, policy, rows, steps) for name, policy in POLICIES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cells}
    for block in common.progress(range(args.blocks), f"blocks of {rows} rows"):
        for name, cell in list(cells.items())[:: 1 if block % 2 == 0 else -1]:
            seconds[name].append(cell.go_on(args.steps))
    ends = {name: cell.end() for name, cell in cells.items()}
    lines = []
    for name, spent in seconds.items():
        read, cache = ends[name]
        ratio, limit = common.paired_ratio(spent, seconds["full"]), read / ends["full"][0]
        lines.append(
            {
                "rows": rows,
                "policy": name,
                "ms per step": round(1e3 * statistics.median(spent), 1),
                "step / full": round(ratio["ratio"], 3),
                "95 %": common.interval(ratio),
                "limit": round(limit, 3),
                "picture MB of a row": round(cache.feature_bytes / 1e6, 1),
                "stored %": round(100 * cache.image_stored_share, 1),
                "read %": round(100 * cache.image_read_share, 1),
                "values read %": round(100 * cache.values_read, 1),
                "GB read": round(read / 1e9, 2),
            }
        )
    return lines


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
