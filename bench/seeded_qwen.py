"""Writes Qwen-VL checkpoints with seeded random weights, under the published names.

The vocabulary is a small one made in code; the model's own has room for more.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from bench.qwen_checkpoint import QwenShape, tensor_shapes, write_around
from bench.seeded import write_once, write_shards

PRESETS = {
    "qwen-tiny": QwenShape(),
    # 1.00e9 decoder parameters with a small vision tower; pictures are the real 448 pixels wide and
    # the real 256 image tokens.
    "qwen-1b": QwenShape(
        hidden=2048,
        layers=16,
        heads=16,
        mlp=6144,
        width=512,
        vision_layers=6,
        vision_heads=8,
        trained=2048,
        vocab=32064,
    ),
}


def write_seeded_qwen(folder: Path, preset: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes the checkpoint of a preset, unless it is already there; returns the folder."""
    shape = PRESETS[preset]

    def write() -> None:
        write_shards(folder, tensor_shapes(shape), dtype)
        write_around(folder, shape)

    return write_once(folder, {"preset": asdict(shape), "dtype": str(dtype)}, write)
