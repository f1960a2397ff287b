"""From a model's name to all an engine needs: weights, tokenizer, picture and prompt rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from engine.errors import CheckpointError, OptionError
from engine.models.llava import Llava, LlavaConfig, parse_hub, parse_original
from engine.preprocess import ImageProcessor
from engine.tokenizer import Tokenizer
from weights.checkpoint import Checkpoint, load_weights, read_json
from weights.hub import resolve
from weights.names import clip_names, llava_names

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
# Below this many bytes of weights a CPU runs in fp32: exact, and small models are fast anyway.
FP32_LIMIT = 2_000_000_000


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and what surrounds it; ``seconds`` is how long loading took."""

    folder: Path
    model: Llava
    tokenizer: Tokenizer
    processor: ImageProcessor
    style: str
    end_tokens: frozenset[int]
    seconds: float


def load(
    name: str | PathLike[str] | None,
    device: str,
    dtype: str,
    style: str | None,
    revision: str | None,
    offline: bool,
) -> Loaded:
    """Load a model; see ``Engine.load``."""
    began = perf_counter()
    target = pick_device(device)
    wanted = None if dtype == "auto" else pick_dtype(dtype)
    folder = resolve(None if name is None else Path(name), revision, offline)
    config, tower = read_config(folder)
    tokenizer = Tokenizer.from_folder(folder)
    processor = _processor(folder, config, style)
    model = _build(folder, config, tower, target, wanted)
    return Loaded(
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        style=style or ("llava-v1" if config.original_layout else "llava-hf"),
        end_tokens=_end_tokens(folder, config),
        seconds=perf_counter() - began,
    )


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(
            f"unknown device {name!r}", hint="use auto, cpu, cuda or cuda:1"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if not torch.version.cuda else "no CUDA device"
        raise OptionError(f"device {name} is not available: {reason}", hint="use --device cpu")
    return device


def pick_dtype(name: str) -> torch.dtype:
    """The dtype called ``name``."""
    if name not in DTYPES:
        raise OptionError(f"unknown dtype {name!r}", hint=f"use auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def read_config(folder: Path) -> tuple[LlavaConfig, Path | None]:
    """The model's configuration, and the folder of its vision tower where that lies elsewhere."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if "mm_vision_tower" in config:
        tower, vision = _tower_config(folder, config)
        return parse_original(config, vision), tower
    if kind != "llava":
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {kind!r}", hint="supported: llava (LLaVA-1.5)"
        )
    return parse_hub(config), None


def _tower_config(folder: Path, config: Mapping[str, Any]) -> tuple[Path | None, Mapping[str, Any]]:
    """Where the original layout's vision tower lies, and its configuration.

    ``_test_only_vision_config`` stands in for the published tower's in small tests.
    """
    if "_test_only_vision_config" in config:
        return None, config["_test_only_vision_config"]
    name = str(config["mm_vision_tower"])
    beside = folder / name
    tower = beside if beside.is_dir() else resolve(name)
    vision = read_json(tower / "config.json")
    nested = vision.get("vision_config", vision)
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"{tower / 'config.json'}: vision_config must be an object")
    return tower, nested


def _build(
    folder: Path,
    config: LlavaConfig,
    tower: Path | None,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Llava:
    """Build the model on the meta device and fill it tensor by tensor."""
    layers = config.vision.used_layers
    with torch.device("meta"):
        model = Llava(config)
    with Checkpoint.open(folder) as checkpoint:
        dtype = dtype or _auto_dtype(checkpoint, device)
        tied = {"decoder.head.weight": "decoder.embed.weight"} if config.decoder.tied_head else {}
        rename = llava_names(layers)
        inside = any((rename(name) or "").startswith("vision.") for name in checkpoint.tensors)
        if tower is not None and not inside:
            with Checkpoint.open(tower) as tower_checkpoint:
                load_weights(model.vision, tower_checkpoint, clip_names(layers), device, dtype)
        load_weights(model, checkpoint, rename, device, dtype, tied)
    model.decoder.prepare(device)
    return model.eval()


def _auto_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The checkpoint's own dtype on CUDA; on CPU fp32 for small models, else bf16."""
    if device.type != "cpu":
        sizes: dict[torch.dtype, int] = {}
        for info in checkpoint.tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=lambda kind: sizes[kind])
    return torch.float32 if checkpoint.total_bytes < FP32_LIMIT else torch.bfloat16


def _processor(folder: Path, config: LlavaConfig, style: str | None) -> ImageProcessor:
    """The picture rules: the checkpoint's own file, else CLIP's at the tower's size."""
    path = folder / "preprocessor_config.json"
    size = config.vision.image
    values: Mapping[str, Any] = {"size": {"shortest_edge": size}, "crop_size": size}
    if path.exists():
        values = read_json(path)
    original = config.original_layout if style is None else style == "llava-v1"
    processor = ImageProcessor.from_config(values, "pad" if original else None)
    if processor.output_size != (size, size):
        raise CheckpointError(
            f"{path}: crop_size is {processor.output_size}, the vision tower takes {size} x {size}",
            hint="preprocessor_config.json and config.json may be of different models",
        )
    return processor


def _end_tokens(folder: Path, config: LlavaConfig) -> frozenset[int]:
    """End tokens of generation_config.json, else of the model's configuration."""
    path = folder / "generation_config.json"
    value = read_json(path).get("eos_token_id") if path.exists() else None
    if value is None:
        return frozenset(config.end_tokens)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in values):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}; it must be token ids")
    return frozenset(values)
