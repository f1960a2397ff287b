"""Decode throughput by batch size: tokens per second per row and in all, and the bytes held.

    python -m bench.batch --model weights/tiny
    python -m bench.batch --preset 1b --dtype bfloat16 --sizes 1 2 4 8

Every block measures each policy at each size once, in turn, with different questions about one
picture in the rows. Only decode steps are timed; prefill is per sequence whatever the batch.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench import common
from bench.common import paired_ratio, progress, write_report
from bench.decode import QUESTION, picture, seeded
from engine.batch import Batch
from engine.cache.report import allocated_bytes
from engine.engine import Engine


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    folder = Path(options.model) if options.model else seeded(options.preset)
    engine = Engine.load(folder, device=options.device, dtype=options.dtype, offline=True)
    cells = [(spec, size) for spec in options.cache for size in options.sizes]
    samples: dict[tuple[str, int], list[dict[str, float]]] = {cell: [] for cell in cells}
    for block in progress(range(options.blocks), "blocks"):
        for spec, size in cells if block % 2 == 0 else cells[::-1]:
            samples[spec, size].append(measure(engine.with_cache(spec), size, options.tokens))
    rows = [row(samples, spec, size, options) for spec, size in cells]
    settings = {
        key: getattr(options, key) for key in ("dtype", "threads", "tokens", "blocks", "device")
    }
    settings["model"] = options.model or f"seeded {options.preset}"
    settings["seed"] = None if options.model else common.SEED
    notes = [
        f"Ratios are within blocks. Limit: the bytes that a step reads, weights and attended keys "
        f"and values, against those of {options.cache[0]}: the ratio if a step were reading alone."
    ]
    path = write_report(options.name, settings, rows, notes, options.out)
    print(path.with_suffix(".md").read_text())


def read_options() -> argparse.Namespace:
    parser = common.make_parser(__doc__, name="batch")
    parser.add_argument("--model", help="a checkpoint folder")
    parser.add_argument("--preset", default="tiny-test", help="a shape of bench/seeded.py instead")
    parser.add_argument("--cache", action="append", help="policies (default: full, avl)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tokens", type=int, default=30, help="decode steps: whole cycles of K = 3"
    )
    parser.add_argument("--blocks", type=int, default=5)
    options = common.read_options(parser)
    options.cache = options.cache or ["full", "avl"]
    return options


def measure(engine: Engine, size: int, tokens: int) -> dict[str, float]:
    """Seconds of one decode step over ``size`` rows, and the cache's bytes at the end."""
    batch = Batch(engine)
    image = engine.encode(picture())
    for index in range(size):
        request = {
            "prompt": f"{QUESTION} ({index})",
            "images": [image],
            "max_new_tokens": tokens + 3,
            "ignore_eos": True,
        }
        failed = batch.admit(index, request)
        assert failed is None
    batch.step()  # packs the rows and plans the attention
    began = perf_counter()
    for _ in range(tokens):
        batch.step()
    seconds = (perf_counter() - began) / tokens
    batch.step()
    reports = [result.cache for result in batch.finished()]
    return {
        "step": seconds,
        "used": sum(report.bytes_used for report in reports),
        "attended": sum(report.used_share * report.bytes_full for report in reports),
        "weights": decode_weights(engine, size),
        "allocated": allocated_bytes(batch.pools),
    }


def decode_weights(engine: Engine, rows: int) -> int:
    """Bytes of weights that a step over ``rows`` reads; a few rows of the embedding aside."""
    decoder = engine.model.decoder
    weights = [*decoder.layers.parameters(), *decoder.head.parameters()]
    narrow = decoder.head.narrow is not None and rows <= 4  # see engine/native.py:narrowed
    return sum(w.numel() * (2 if narrow else w.element_size()) for w in weights)


def row(
    samples: dict[tuple[str, int], list[dict[str, float]]],
    spec: str,
    size: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One line of the table."""
    mine = [sample["step"] for sample in samples[spec, size]]
    rates = [size / step for step in mine]
    one = [1 / sample["step"] for sample in samples[spec, options.sizes[0]]]
    full = [sample["step"] for sample in samples[options.cache[0], size]]
    gain, against = paired_ratio(rates, one), paired_ratio(mine, full)
    last, last_full = samples[spec, size][-1], samples[options.cache[0], size][-1]
    return {
        "policy": spec,
        "batch": size,
        "ms per step": 1e3 * statistics.median(mine),
        "tokens/s per row": statistics.median(1 / step for step in mine),
        "tokens/s in all": statistics.median(rates),
        f"x batch {options.sizes[0]}": gain["ratio"],
        "95 %": f"{gain['low']:.3g}-{gain['high']:.3g}",
        f"step / {options.cache[0]}": against["ratio"],
        "95 % ": f"{against['low']:.3g}-{against['high']:.3g}",
        "limit": bytes_read(last) / bytes_read(last_full),
        "KV used MB": last["used"] / 1e6,
        "KV allocated MB": last["allocated"] / 1e6,
    }


def bytes_read(sample: dict[str, float]) -> float:
    """Bytes of weights and of attended keys and values that a step reads."""
    return sample["weights"] + sample["attended"]


if __name__ == "__main__":
    main()
