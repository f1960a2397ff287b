"""Attention of one layer over cached tokens in every format, and with values left unread.

    python -m bench.formats [--threads N] [--quick]

One decode step of one row over a list of all tokens: pools in 16 bits (ours, and torch's SDPA),
pages in few bits, and the same with a tenth of the attention left out. Contestants are interleaved,
pools rotated over enough memory that no cache helps; medians, ratios within turns. Logits have a
standard deviation of 4, so that heads are as peaked as those of a trained model: how many values
are read is printed. Bytes are those that the list says, scales included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench import common
from bench.kernels import HEAD_DIM, HEADS, interleaved, read_bandwidth
from engine.ops.attention import AttentionPlan, Tier
from engine.ops.native import Sifting
from engine.ops.pages import PAGE, Pages

FORMATS = ("k8v8", "k8v4", "k4v4", "k4v2", "k2v2")
SKIP = 0.1
MEMORY = 400_000_000  # bytes that copies of a pool take together, at least
PEAKED = 4.0
Calls = dict[str, Callable[[int], object]]
NOTES = ("GB/s are bytes of keys and of the values that were read, in a median of time.",)


def contestants(tokens: int, copies: int) -> tuple[Calls, dict[str, Callable[[], float]]]:
    """The calls to time, and how many bytes each has read of late."""
    q = (torch.randn(1, HEADS, HEAD_DIM) * PEAKED).bfloat16()
    k, v = (torch.randn(tokens, HEADS, HEAD_DIM) for _ in range(2))
    slots = torch.arange(tokens, dtype=torch.int32)[None, None]
    wide = [(k.bfloat16(), v.bfloat16()) for _ in range(copies)]
    heads_first = [[x.transpose(0, 1)[None].contiguous() for x in pair] for pair in wide]
    plans = [AttentionPlan(q, [Tier(*pair, slots)]) for pair in wide]
    query = q[:, :, None]
    calls: Calls = {
        "sdpa, 16 bits": lambda t: F.scaled_dot_product_attention(query, *heads_first[t % copies]),
        "ours, 16 bits": lambda t: plans[t % copies].run(),
    }
    size = 4.0 * tokens * HEADS * HEAD_DIM
    bytes_: dict[str, Callable[[], float]] = dict.fromkeys(calls, lambda: size)
    for name in FORMATS:
        pages = Pages.of(name, HEADS, HEAD_DIM, torch.bfloat16)
        packed = pages.pack(k, v)
        pools = [packed.clone() for _ in range(copies * 2)]
        for skip in (0.0, SKIP):
            called = f"{name}, {skip:.0%} left out" if skip else name
            calls[called], bytes_[called] = over_pages(q, pools, pages, slots, v, skip)
    return calls, bytes_


def over_pages(
    q: torch.Tensor,
    pools: list[torch.Tensor],
    pages: Pages,
    slots: torch.Tensor,
    v: torch.Tensor,
    skip: float,
) -> tuple[Callable[[int], object], Callable[[], float]]:
    """A call over pages, and the bytes that a call reads."""
    tokens, sifting = slots.shape[-1], None
    spent = torch.zeros(1, HEADS, 2)
    if skip:
        sifting = Sifting(torch.tensor([skip]), v.mean(0)[None].contiguous(), spent)
    plans = [
        AttentionPlan(q, [Tier(*pages.sides(pool), slots, None, pages, sifting)]) for pool in pools
    ]
    runs = [0]

    def call(turn: int) -> None:
        runs[0] += 1
        plans[turn % len(plans)].run()

    def read() -> float:
        share = float(spent[..., 1].sum()) / (runs[0] * HEADS * tokens) if skip else 1.0
        per_token = pages.key.token_bytes + share * pages.value.token_bytes
        return tokens * per_token

    return call, read


def measure(tokens: int, turns: int, peak: float) -> list[dict[str, Any]]:
    """A row for every contestant."""
    copies = max(2, MEMORY // (4 * tokens * HEADS * HEAD_DIM))
    calls, bytes_ = contestants(tokens, copies)
    seconds = interleaved(calls, turns, "cpu")
    rows = []
    for name, spent in seconds.items():
        middle, read = statistics.median(spent), bytes_[name]()
        ours = common.paired_ratio(spent, seconds["ours, 16 bits"])
        sdpa = common.paired_ratio(spent, seconds["sdpa, 16 bits"])
        rows.append(
            {
                "tokens": tokens,
                "what": name,
                "ms": round(1e3 * middle, 3),
                "ours, 16 bits = 1": round(ours["ratio"], 3),
                "sdpa = 1": round(sdpa["ratio"], 3),
                "MB read": round(read / 1e6, 3),
                "GB/s": round(read / middle / 1e9, 1),
                "time / bytes at bandwidth": round(middle * peak * 1e9 / read, 2),
            }
        )
    return rows


def main() -> None:
    """Measure, print and write the report."""
    parser = common.make_parser(__doc__, name="formats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[600, 2400])
    parser.add_argument("--quick", action="store_true", help="a tenth of the turns")
    args = common.read_options(parser)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    assert all(tokens >= PAGE for tokens in args.tokens)
    rows, began = [], time.perf_counter()
    peak = read_bandwidth("cpu", args.quick)
    for tokens in common.progress(args.tokens, "lengths"):
        rows += measure(tokens, 20 if args.quick else 80, peak)
    settings = {
        "threads": args.threads,
        "seed": 0,
        "dtype": "bf16",
        "read bandwidth GB/s": round(peak, 1),
        "seconds": round(time.perf_counter() - began),
    }
    path = common.write_report(args.name, settings, rows, NOTES, args.out)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
