"""What is measured: a checkpoint, given or seeded, and one question about one picture."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bench.common import ROOT, SEED

if TYPE_CHECKING:
    from PIL import Image

QUESTION = "What is in this image? Describe everything that you can see in it in detail."
THEIRS = "transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose the model and its picture."""
    parser.add_argument("--model", help="a checkpoint folder")
    parser.add_argument(
        "--preset",
        default="tiny-test",
        help="a shape of bench/seeded.py, seeded_qwen.py or seeded_qwen3.py",
    )
    parser.add_argument(
        "--picture",
        nargs=2,
        type=int,
        metavar=("WIDTH", "HEIGHT"),
        help="size of the picture (default: 672 672; 1000 300 for a seeded LLaVA-1.6)",
    )


def about(options: argparse.Namespace) -> dict[str, object]:
    """Settings of a report that say which model it is about."""
    if options.model:
        folder = Path(options.model)
        inside = folder.is_absolute() and folder.is_relative_to(ROOT)
        name = folder.relative_to(ROOT) if inside else folder
        return {"model": str(name), "seed": None}
    return {"model": f"seeded {options.preset}", "seed": SEED}


def made_here() -> Path:
    """Where this user's seeded checkpoints lie."""
    return Path(tempfile.gettempdir()) / f"avl-bench-{os.getuid()}"


def checkpoint(options: argparse.Namespace) -> Path:
    """The folder of the model; seeded weights are written once."""
    if options.model:
        return Path(options.model)
    from bench import seeded, seeded_qwen, seeded_qwen3

    folder = made_here() / options.preset
    if options.preset in seeded_qwen3.PRESETS:
        return seeded_qwen3.write_seeded_qwen3(folder, options.preset)
    if options.preset in seeded_qwen.PRESETS:
        return seeded_qwen.write_seeded_qwen(folder, options.preset)
    return seeded.write_seeded_llava(folder, options.preset)


def model_type(folder: Path) -> str:
    """What config.json calls the model."""
    return str(json.loads((folder / "config.json").read_text()).get("model_type"))


def style(folder: Path) -> str | None:
    """A prompt style that both sides share: the hub's of LLaVA-1.5; else the model's own."""
    return "llava-hf" if model_type(folder).startswith("llava") else None


def picture(options: argparse.Namespace) -> Image.Image:
    """The example of the README at the wanted size, or a plain picture where it is missing.

    At 1000 x 300 the published tiles of LLaVA-1.6 make 2,182 image tokens.
    """
    from PIL import Image

    path = ROOT / "examples" / "car.jpg"
    image = Image.open(path).convert("RGB") if path.exists() else Image.new("RGB", (672, 672))
    tiled = not options.model and options.preset.startswith("1.6")
    size = options.picture or ((1000, 300) if tiled else image.size)
    return image.resize(tuple(size))
