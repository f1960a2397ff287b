"""Videos of 16 to 128 frames through a LongVA of 0.5B: prefill, its attention, memory, steps.

    python -m bench.video [--frames 16 64 128] [--blocks 3]

The shapes are those of Qwen2-0.5B behind a CLIP ViT-L/14-336 whose frames are 144 tokens each; the
weights are random, so that attention is as even as it never is in a trained model: nearly all
tokens are important then, and `share=0.421` is forced beside it, which ZipVL's paper reports of
LongVA-7B at 128 frames. Every policy reads the same prompt in turn. *attention* is everything
between the projections of a layer but storing: rotation, choosing, attending. *r²* is the mean of
the squared shares of tokens that attend, the arithmetic of attention that is left; *beside r²* is
how much longer the attention took than that share of the first policy's.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench import common
from engine.cache.prefill import LayerView, Prefill
from engine.cache.report import report
from engine.loading.families import CLIP_L_336
from engine.loading.preparing import prepare
from engine.models.llava_video import LongVa, parse_longva
from engine.pictures.preprocess import Pixels
from engine.policies.policy import Policy
from engine.policies.specs import DEFAULT_CACHE, parse
from engine.policies.zipvl import ZipVl
from engine.running.stepping import Stepper, Stepping
from engine.running.turn import Turn, make_pools, prefill

SECOND = "zipvl:format=plain,minor=freed"
PAPER = "zipvl:share=0.421"
POLICIES = ("full", "zipvl", SECOND, PAPER, "avl", DEFAULT_CACHE)
LONG = ("full", "zipvl", PAPER)  # from 128 frames on
SYSTEM, QUESTION = 14, 20  # tokens around a video
STEPS = 8
CONFIG: dict[str, Any] = {
    "model_type": "llava_qwen",
    "mm_patch_merge_type": "unires",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "tower",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 224000,
    "rope_theta": 1e9,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def make_model(dtype: torch.dtype, layers: int) -> LongVa:
    """The model with random weights, biases of 0 and norms of 1."""
    with torch.device("meta"):
        model = LongVa(*parse_longva({**CONFIG, "num_hidden_layers": layers}, CLIP_L_336))
    model.to(dtype).to_empty(device="cpu").requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1)
        else:
            # About 1 / sqrt(inputs): the stream neither fades nor explodes.
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    model.decoder.head.weight = model.decoder.embed.weight
    prepare(model.decoder, torch.device("cpu"))
    return model


@dataclass
class Spent:
    """Seconds of one prefill by what they went to, and the shares of tokens that attended."""

    attending: float = 0.0
    storing: float = 0.0
    shares: list[float] = field(default_factory=list)

    @property
    def squared(self) -> float:
        """Mean of the squared shares: what is left of attention's arithmetic."""
        return statistics.mean(share**2 for share in self.shares) if self.shares else 1.0


@contextmanager
def watched(spent: Spent) -> Iterator[None]:
    """Count what a prefill does in ``spent``."""
    attend, keep, attending = LayerView.attend, Prefill._keep, ZipVl.attending

    def timed(work: Callable[..., Any], key: str) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            began = perf_counter()
            result = work(*given)
            setattr(spent, key, getattr(spent, key) + perf_counter() - began)
            return result

        return run

    def chosen(policy: ZipVl, layer: int, layout: Any, received: Any) -> Any:
        found = attending(policy, layer, layout, received)
        if found is not None:
            spent.shares.append(len(found) / layout.columns)
        return found

    LayerView.attend = timed(attend, "attending")  # type: ignore[method-assign]
    Prefill._keep = timed(keep, "storing")  # type: ignore[method-assign]
    ZipVl.attending = chosen  # type: ignore[method-assign]
    try:
        yield
    finally:
        LayerView.attend, Prefill._keep = attend, keep  # type: ignore[method-assign]
        ZipVl.attending = attending  # type: ignore[method-assign]
        spent.attending -= spent.storing  # which happens inside


def forget_peak() -> int:
    """Begin the peak of resident memory anew; returns what is resident."""
    ctypes.CDLL(None).malloc_trim(0)  # or it would begin with what was freed before
    Path("/proc/self/clear_refs").write_text("5")
    return common.rss()


def run(model: LongVa, policy: Policy, turn: Turn) -> dict[str, float]:
    """One prefill and a few steps."""
    pools, spent, before = make_pools(model), Spent(), forget_peak()
    began = perf_counter()
    with watched(spent):
        row, logits = prefill(model, pools, policy, turn, STEPS + 2)
    whole = perf_counter() - began
    peak = common.peak_rss() - before
    assert logits.isfinite().all()
    stepper = Stepper(model, pools, Stepping())
    stepper.join(row)
    token, seconds = torch.zeros(1, dtype=torch.int64), []
    for _ in range(STEPS):
        began = perf_counter()
        stepper.step(token)
        seconds.append(perf_counter() - began)
    cache = report(stepper.leave(0), pools)
    return {
        "prefill": whole,
        "attention": spent.attending,
        "squared": spent.squared,
        "share": statistics.mean(spent.shares) if spent.shares else 1.0,
        "step": statistics.median(seconds[2:]),
        "peak": peak,
        "bytes": cache.bytes_used,
        "full": cache.bytes_full,
    }


def measure(model: LongVa, frames: int, args: Any) -> list[dict[str, Any]]:
    """A line for every policy at so many frames."""
    generator = torch.Generator().manual_seed(frames)
    tiles = torch.randn(frames, 3, 336, 336, generator=generator)
    began = perf_counter()
    (features,) = model.encode([Pixels(tiles, (336, 336), video=True)])
    encoding = perf_counter() - began
    tokens = SYSTEM + len(features) + QUESTION
    ids = torch.randint(0, 150000, (tokens,), generator=generator).tolist()
    turn = Turn(ids, [(SYSTEM, SYSTEM + len(features))], [features], [(336, 336)])
    specs = args.cache or (POLICIES if frames < 128 else LONG)
    found: dict[str, list[dict[str, float]]] = {spec: [] for spec in specs}
    for block in common.progress(range(args.blocks), f"blocks of {frames} frames"):
        for spec in specs[:: 1 if block % 2 == 0 else -1]:
            found[spec].append(run(model, parse(spec), turn))
    return [line(frames, len(features), encoding, spec, found) for spec in specs]


def line(
    frames: int, tokens: int, encoding: float, spec: str, found: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    """What was measured of a policy, beside the first."""
    mine, first = found[spec], next(iter(found.values()))

    def median(key: str) -> float:
        return statistics.median(each[key] for each in mine)

    def ratio(key: str) -> float:
        return common.paired_ratio([x[key] for x in mine], [x[key] for x in first])["ratio"]

    reached = encoding + median("prefill")
    return {
        "frames": frames,
        "video tokens": tokens,
        "policy": spec,
        "important %": round(100 * median("share"), 1),
        "r²": round(median("squared"), 3),
        "attention s": round(median("attention"), 2),
        "attention ratio": round(ratio("attention"), 3),
        "beside r²": round(ratio("attention") / median("squared"), 2),
        "prefill s": round(median("prefill"), 2),
        "prefill ratio": round(ratio("prefill"), 3),
        "encoding s": round(encoding, 1),
        "TTFT s": round(reached, 1),
        "KV MB": round(median("bytes") / 1e6, 1),
        "KV %": round(100 * median("bytes") / median("full"), 1),
        "peak MB": round(median("peak") / 1e6),
        "step ms": round(1e3 * median("step"), 1),
        "step ratio": round(ratio("step"), 3),
    }


@torch.inference_mode()
def main() -> None:
    """Measure, print and write the report."""
    parser = common.make_parser(__doc__, name="video")
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 64, 128])
    parser.add_argument("--cache", action="append", help="policies, the first beside all others")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = common.read_options(parser)
    torch.set_num_threads(args.threads)
    torch.manual_seed(common.SEED)
    model = make_model(getattr(torch, args.dtype), args.layers)
    lines = [each for frames in args.frames for each in measure(model, frames, args)]
    config = model.decoder.config
    layer = 2 * config.kv_heads * config.head_dim * model.decoder.norm.weight.element_size()
    settings = {
        "shape": "Qwen2-0.5B, ViT-L/14-336",
        "layers": config.layers,
        "dtype": args.dtype,
        "threads": args.threads,
        "blocks": args.blocks,
        "bytes of a token in one layer": layer,
        "seed": common.SEED,
    }
    path = common.write_report(args.name, settings, lines, NOTES, args.out)
    print(path.with_suffix(".md").read_text())


NOTES = (
    "Ratios are within blocks. *peak MB* is what a prefill needed beside weights and features; "
    "*encoding* is the tower's and the projector's, once a length.",
)


if __name__ == "__main__":
    main()
