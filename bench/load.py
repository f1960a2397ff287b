"""Time from a cold process to the first token, and the memory it takes, beside transformers.

    python -m bench.load [--preset 1b] [--rounds 5] [--threads N]

Both sides read the same seeded LLaVA-1.5 (2 GB in bf16) from the page cache, each run in a process
of its own that starts with nothing imported; rounds alternate. Ours: Engine.load and generate;
theirs: from_pretrained of processor and model, and generate(max_new_tokens=1).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import common, subject
from bench.common import ROOT, paired_ratio, peak_rss, progress, rss, summary, warm, write_report

QUESTION = "What is in the picture?"
OURS, THEIRS = "ours", "transformers"


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    folder = arguments.folder or subject.made_here() / arguments.preset
    largest, total, picture = prepare(folder, arguments.preset)
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
    for round_number in progress(range(arguments.rounds), "rounds"):
        for side in (OURS, THEIRS) if round_number % 2 == 0 else (THEIRS, OURS):
            warm(sorted(folder.glob("*.safetensors")))
            runs[side].append(start(side, folder, picture, arguments))
    report(arguments, runs, largest, total)


def parse_arguments() -> argparse.Namespace:
    parser = common.make_parser(__doc__, name=None)
    parser.add_argument("--preset", default="1b", help="shape, see bench/seeded.py")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept between runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--cache", default="full", help="cache policy of our side")
    parser.add_argument("--text-only", action="store_true", help="no picture in the prompt")
    parser.add_argument("--child", choices=[OURS, THEIRS], help=argparse.SUPPRESS)
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return common.read_options(parser, lambda o: [] if o.child else [report_name(o)])


def report_name(options: argparse.Namespace) -> str:
    """What the report is called, unless told otherwise."""
    return options.name or ("load_text" if options.text_only else "load")


def prepare(folder: Path, preset: str) -> tuple[int, int, Path]:
    """Writes the checkpoint once; returns its largest tensor and all of it in bytes, and a picture.

    Done before anything is measured, in this process: the measured ones start cold.
    """
    import torch
    from PIL import Image

    from bench.seeded import write_seeded_llava
    from engine.checkpoint.tensors import Checkpoint

    write_seeded_llava(folder, preset)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (30, 40, 3), generator=generator, dtype=torch.uint8)
    picture = folder / "picture.png"
    small = Image.frombytes("RGB", (40, 30), bytes(noise.flatten().tolist()))
    small.resize((640, 480)).save(picture)
    with Checkpoint.open(folder) as checkpoint:
        sizes = [info.nbytes for info in checkpoint.tensors.values()]
    return max(sizes), sum(sizes), picture


def start(side: str, folder: Path, picture: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one side in a fresh process and returns what it measured."""
    command = [sys.executable, "-m", "bench.load", "--child", side, "--folder", str(folder)]
    command += ["--picture", str(picture), "--dtype", arguments.dtype, "--cache", arguments.cache]
    command += ["--threads", str(arguments.threads), "--started", str(time.monotonic())]
    command += ["--text-only"] if arguments.text_only else []
    environment = os.environ | {
        "OMP_NUM_THREADS": str(arguments.threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    return result


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """One cold run: seconds since the parent started this process, and memory in MB."""
    since = lambda: time.monotonic() - arguments.started  # noqa: E731
    marks: dict[str, Any] = {"start": since()}

    def mark(name: str) -> None:
        marks[name], marks[f"{name} cpu"] = since(), time.process_time()
        marks[f"{name} peak"], marks[f"{name} rss"] = peak_rss() / 1e6, rss() / 1e6

    token = {OURS: run_ours, THEIRS: run_theirs}[arguments.child](arguments, mark)
    mark("first token")
    return marks | {"token": token}


def run_ours(arguments: argparse.Namespace, mark: Callable[[str], None]) -> int:
    """Load and generate one token with this engine."""
    from engine import Engine

    mark("imported")
    engine = Engine.load(
        arguments.folder, device="cpu", dtype=arguments.dtype, cache=arguments.cache
    )
    mark("loaded")
    images = [] if arguments.text_only else [arguments.picture]
    result = engine.generate(QUESTION, images=images, max_new_tokens=1, ignore_eos=True)
    return int(result.token_ids[0])


def run_theirs(arguments: argparse.Namespace, mark: Callable[[str], None]) -> int:
    """Load and generate one token with transformers, as its documentation does it."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    mark("imported")
    processor = AutoProcessor.from_pretrained(arguments.folder)
    model = LlavaForConditionalGeneration.from_pretrained(
        arguments.folder, dtype=getattr(torch, arguments.dtype)
    )
    mark("loaded")
    place = "" if arguments.text_only else "<image>\n"
    text = f"USER: {place}{QUESTION} ASSISTANT:"
    images = {} if arguments.text_only else {"images": Image.open(arguments.picture)}
    inputs = processor(text=text, return_tensors="pt", **images).to(model.dtype)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return int(output[0, -1])


def report(
    arguments: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], largest: int, total: int
) -> None:
    """Sums the rounds up and writes them; memory is that of the worst round."""
    ratio = paired_ratio(*([run["first token"] for run in runs[side]] for side in (OURS, THEIRS)))
    width = 2 if arguments.dtype == "float32" else 1
    rows = []
    for side, found in runs.items():
        seconds = summary([run["first token"] for run in found])
        above = max(run["loaded peak"] - run["imported rss"] for run in found)
        rows.append(
            {
                "side": side,
                "first token s": seconds["median"],
                "p10": seconds["p10"],
                "p90": seconds["p90"],
                "imported s": statistics.median(run["imported"] for run in found),
                "loaded s": statistics.median(run["loaded"] for run in found),
                "CPU s": statistics.median(run["first token cpu"] for run in found),
                "above the model MB": above - width * total / 1e6,
                "peak MB": max(run["first token peak"] for run in found),
            }
        )
    limit = (1.2 * width * largest + 300e6) / 1e6
    tokens = {side: sorted({run["token"] for run in found}) for side, found in runs.items()}
    notes = [
        f"First token, ours / transformers, median of paired rounds: {ratio['ratio']:.3f} "
        f"(95 % interval {ratio['low']:.3f} to {ratio['high']:.3f}); goal at most 0.6.",
        "Above the model: peak resident memory while loading, less what the process had after its "
        f"imports and less the model's {width * total / 1e6:.0f} MB; goal at most 1.2 x largest "
        f"tensor + 300 MB = {limit:.0f} MB.",
        f"First tokens: {tokens}.",
    ]
    settings = {
        "preset": arguments.preset,
        "dtype": arguments.dtype,
        "seed": common.SEED,
        "threads": arguments.threads,
        "cache": arguments.cache,
        "picture": not arguments.text_only,
        "rounds": arguments.rounds,
        "page cache": "warm",
        "checkpoint MB": total / 1e6,
    }
    name = report_name(arguments)
    path = write_report(name, {**settings, "ratio": ratio}, rows, notes, arguments.out)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
