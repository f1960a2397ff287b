"""Tokens per second and time to the first token, beside transformers on the same weights.

    python -m bench.decode --model weights/tiny             the embedded model, fp32
    python -m bench.decode --preset 1b --dtype bfloat16     a seeded model of 1e9 parameters
    python -m bench.decode --preset 1.6-small --dtype bfloat16 --batches 1 4 8
                                                            several rows at once, see bench/batch.py
    python -m bench.decode --preset qwen3-vl-2b --dtype bfloat16 --picture 1240 1754 --blocks 3
                                                            a page of A4 at 150 dpi
    python -m bench.decode --preset 1b --dtype bfloat16 --alone --weights auto q8 q4
                                                            weights in few bits beside 16

Every block measures each policy and transformers once, in turn, on the same prompt, picture and
forced length, greedy; alone, ratios are to the first line. Both sides are timed from outside in the
same way: the first token's time counts the picture's preprocessing, vision tower and prefill; the
rate counts everything after it, text included. Ratios are within blocks, their interval is
bootstrapped.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

from bench import common, subject
from bench.common import machine, paired_ratio, progress, summary, write_report
from bench.subject import QUESTION, THEIRS

if TYPE_CHECKING:
    from engine.engine import Engine

# What is compared -> the field of a sample.
SPEED_UPS = {"decode": "per_token", "TTFT": "ttft", "processor time": "cpu"}


@dataclass(frozen=True)
class Sample:
    """One answer: seconds to the first token and per token after it, its ids and KV bytes."""

    ttft: float
    per_token: float
    token_ids: list[int]
    kv_used: int
    kv_allocated: int
    cpu: float  # processor seconds of the whole answer: what is left to compare on a busy machine


def main() -> None:
    options = read_options()
    # Before torch is imported: its thread pools read these once.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    folder = subject.checkpoint(options)
    theirs = transformers_runner(folder, options)
    rows, remarks = (by_batch if options.batches else one_by_one)(folder, options, theirs)
    settings = subject.about(options) | {
        "dtype": options.dtype,
        "weights": " ".join(options.weights),
        "threads": options.threads,
        "new_tokens": options.tokens,
        "blocks": options.blocks,
        "load_at_start": options.load,
    }
    if theirs is None and not options.alone:
        remarks.append(f"Without transformers: it has no model_type {subject.model_type(folder)}.")
    path = write_report(report_name(options), settings, rows, remarks, options.out)
    print(path.with_suffix(".md").read_text())


def read_options() -> argparse.Namespace:
    parser = common.make_parser(__doc__, name=None)
    subject.add_arguments(parser)
    parser.add_argument("--batches", nargs="+", type=int, help="throughput at these batch sizes")
    parser.add_argument("--cache", action="append", help="policies of ours (default: full, avl)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--weights", nargs="+", default=["auto"], help="of ours, see Engine.load")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tokens", type=int, default=64, help="length of every answer: 1, and cycles of 3"
    )
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=1, help="blocks that are thrown away")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    options = common.read_options(parser, lambda options: [report_name(options)])
    options.cache = options.cache or ["full", "avl"]
    options.load = machine()["load_average"]
    return options


def report_name(options: argparse.Namespace) -> str:
    """What the report is called: by its model, unless told otherwise."""
    model = Path(options.model).name if options.model else options.preset
    return options.name or f"decode-{model}{'-batches' if options.batches else ''}"


# -- the two sides --------------------------------------------------------------------------------


def our_runners(folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], Sample]]:
    """One runner per policy and kind of weights."""
    from engine.policies.specs import parse

    engines = {weights: load(folder, options, weights) for weights in options.weights}
    image = subject.picture(options)

    def run(spec: str, weights: str) -> Sample:
        engine = engines[weights]
        engine.policy = parse(spec)
        engine.forget_pictures()
        began, cpu = perf_counter(), process_time()
        result = engine.generate(QUESTION, [image], max_new_tokens=options.tokens, ignore_eos=True)
        rest = perf_counter() - began - result.timings.ttft
        return Sample(
            result.timings.ttft,
            rest / (options.tokens - 1),
            result.token_ids,
            result.cache.bytes_used,
            result.cache.bytes_allocated,
            process_time() - cpu,
        )

    return {
        f"{spec}, {weights}".removesuffix(", auto"): partial(run, spec, weights)
        for weights in options.weights
        for spec in options.cache
    }


def load(folder: Path, options: argparse.Namespace, weights: str = "auto") -> "Engine":
    """Our side, with prompts as transformers gets them."""
    from engine.engine import Engine

    style = subject.style(folder)
    return Engine.load(
        folder,
        device=options.device,
        dtype=options.dtype,
        style=style,
        offline=True,
        weights=weights,
    )


class Clock:
    """A streamer of transformers that notes when the first token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        """Note when a token came."""
        self.times.append(perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def transformers_runner(folder: Path, options: argparse.Namespace) -> Callable[..., Sample] | None:
    """Transformers' own generate, with its default attention and cache; None where it is absent.

    What is returned answers one prompt, or so many alike together.
    """
    if options.alone or subject.model_type(folder) not in PREPARED:
        return None
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    model.generation_config.eos_token_id = None  # the forced length, without a mask on logits
    prepare, say = PREPARED[subject.model_type(folder)](folder, subject.picture(options))

    @torch.inference_mode()
    def run(rows: int = 1) -> Sample:
        clock, began, cpu = Clock(), perf_counter(), process_time()
        inputs = {name: tensor.to(options.device) for name, tensor in prepare(rows).items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        made = model.generate(
            **inputs,
            max_new_tokens=options.tokens,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
        )
        token_ids = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        say(token_ids)
        first = clock.times[1]  # the prompt itself is put first
        rest, kv = perf_counter() - first, cache_bytes(made.past_key_values)
        spent = process_time() - cpu
        return Sample(first - began, rest / (options.tokens - 1), token_ids, kv, kv, spent)

    return run


Prepared = tuple[Callable[[int], dict[str, Any]], Callable[[list[int]], object]]


def prepared_llava(folder: Path, image: Any) -> Prepared:
    """What transformers takes for so many rows alike, and how it says token ids."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"

    def prepare(rows: int) -> dict[str, Any]:
        return dict(processor([image] * rows, [prompt] * rows, return_tensors="pt"))

    return prepare, processor.decode


def prepared_qwen3(folder: Path, image: Any) -> Prepared:
    """The same; the whole processor would need torchvision, for videos."""
    import torch
    from tokenizers import Tokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixels = Qwen2VLImageProcessorPil.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    mark = "<|image_pad|>"
    begin, end = "<|im_start|>user\n<|vision_start|>", f"<|vision_end|>{QUESTION}<|im_end|>\n"

    def prepare(rows: int) -> dict[str, Any]:
        given = dict(pixels([image] * rows, return_tensors="pt"))
        count = int(given["image_grid_thw"][0].prod()) // 4
        text = f"{begin}{mark * count}{end}<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(text).ids] * rows)
        kinds = (ids == tokenizer.token_to_id(mark)).int()
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, **given}

    return prepare, tokenizer.decode


PREPARED = {"llava": prepared_llava, "llava_next": prepared_llava, "qwen3_vl": prepared_qwen3}


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that transformers holds."""
    return sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )


# -- measuring ------------------------------------------------------------------------------------


def one_by_one(
    folder: Path, options: argparse.Namespace, theirs: Callable[[], Sample] | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Whole answers, one after the other: lines of the table, and notes under it."""
    runners = {f"ours, {spec}": run for spec, run in our_runners(folder, options).items()}
    if theirs:
        runners[THEIRS] = theirs
    samples = measure(runners, options.blocks, options.warmup)
    return [row(name, samples) for name in samples], notes(samples)


def by_batch(
    folder: Path, options: argparse.Namespace, theirs: Callable[..., Sample] | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Steps over several rows at once, beside transformers' over as many."""
    from bench.batch import Plan, throughput

    plan = Plan(options.cache, options.batches, options.tokens - 1, options.blocks)
    steps = theirs and {
        size: (lambda size=size: theirs(size).per_token) for size in options.batches
    }
    return throughput(load(folder, options), subject.picture(options), plan, steps)


def measure(
    runners: Mapping[str, Callable[[], Sample]], blocks: int, warmup: int
) -> dict[str, list[Sample]]:
    """Each block runs everyone once; every other block in reverse, so that no place is favoured."""
    samples: dict[str, list[Sample]] = {name: [] for name in runners}
    for block in progress(range(-warmup, blocks), "blocks"):
        names = list(runners) if block % 2 == 0 else list(reversed(runners))
        for name in names:
            sample = runners[name]()
            if block >= 0:
                samples[name].append(sample)
    return samples


def row(name: str, samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """A line of the table; ratios above 1 mean that ours is faster."""
    base = THEIRS if THEIRS in samples else next(iter(samples))
    mine, theirs = samples[name], samples[base]
    values: dict[str, Any] = {"what": name}
    for label, pick, scale in (
        ("tokens/s", lambda s: 1 / s.per_token, 1),
        ("TTFT ms", lambda s: s.ttft, 1000),
    ):
        spread = summary([scale * pick(sample) for sample in mine])
        values[label] = spread["median"]
        values[f"{label} p10-p90"] = f"{spread['p10']:.4g}-{spread['p90']:.4g}"
    if name != base:
        for label, field in SPEED_UPS.items():
            pair = [[getattr(s, field) for s in side] for side in (theirs, mine)]
            ratio = paired_ratio(*pair)
            values[f"{label} speed-up"] = ratio["ratio"]
            values[f"{label} 95%"] = f"{ratio['low']:.3g}-{ratio['high']:.3g}"
    else:
        for label in SPEED_UPS:
            values |= {f"{label} speed-up": "", f"{label} 95%": ""}
    values["KV used MB"] = mine[-1].kv_used / 1e6
    values["KV allocated MB"] = mine[-1].kv_allocated / 1e6
    if len(samples) > 1:
        values["same ids"] = same_start(mine[-1].token_ids, theirs[-1].token_ids)
    return values


def same_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids agree from the start."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def notes(samples: Mapping[str, Sequence[Sample]]) -> list[str]:
    base = THEIRS if THEIRS in samples else next(iter(samples))
    lines = [f"Speed-ups are the time of {base} / that of a line, in a block; median over blocks."]
    if THEIRS in samples:
        lines.append(
            '"same ids": answer tokens equal to transformers\' from the start. A compressed cache '
            "approximates the model, and in 16 bits near ties fall either way."
        )
    return lines


if __name__ == "__main__":
    main()
