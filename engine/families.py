"""Which model a checkpoint folder holds, and what goes with it: names, pictures, prompts, end tokens.

A family is recognised by config.json alone. Adding one means one function here and one row in the
table at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.models.llava import Llava, LlavaConfig, parse_hub, parse_original
from engine.preprocess import ImageProcessor
from weights.checkpoint import read_json
from weights.hub import resolve
from weights.names import Rename, clip_names, llava_names

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A recognised checkpoint: its model on the meta device, and how to feed it.

    Attributes:
        model: built, without memory for its weights.
        rename: names on disk to names of ``model``.
        processor: pictures to pixels.
        style: prompt style.
        end_tokens: ids that end an answer.
        tower: folder and names of a vision tower that the checkpoint may leave out.
    """

    model: Llava
    rename: Rename
    processor: ImageProcessor
    style: str
    end_tokens: frozenset[int]
    tower: tuple[Path, Rename] | None = None


def recognise(folder: Path, style: str | None) -> Family:
    """Read ``folder``'s config.json and build what it describes; ``style`` overrides its prompts.

    Raises CheckpointError for an unknown model type or a wrong key.
    """
    config = read_json(folder / "config.json")
    kind = "llava_original" if "mm_vision_tower" in config else config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {kind!r}",
            hint=f"supported: {', '.join(FAMILIES)}",
        )
    return FAMILIES[kind](folder, config, style)


def _llava_hub(folder: Path, config: Config, style: str | None) -> Family:
    """``llava-hf/llava-1.5-*`` and what transformers saves."""
    parsed = parse_hub(config)
    return _llava(folder, parsed, style or "llava-hf", None)


def _llava_original(folder: Path, config: Config, style: str | None) -> Family:
    """``liuhaotian/llava-v1.5-*``: the vision tower usually lies elsewhere."""
    tower, vision = _tower_config(folder, config)
    parsed = parse_original(config, vision)
    names = clip_names(parsed.vision.used_layers)
    return _llava(folder, parsed, style or "llava-v1", (tower, names) if tower else None)


def _llava(
    folder: Path, config: LlavaConfig, style: str, tower: tuple[Path, Rename] | None
) -> Family:
    with torch.device("meta"):
        model = Llava(config)
    return Family(
        model=model,
        rename=llava_names(config.vision.used_layers),
        processor=_llava_processor(folder, config, style),
        style=style,
        end_tokens=end_tokens(folder, config.end_tokens),
        tower=tower,
    )


def _tower_config(folder: Path, config: Config) -> tuple[Path | None, Config]:
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


def _llava_processor(folder: Path, config: LlavaConfig, style: str) -> ImageProcessor:
    """The checkpoint's own picture rules, else CLIP's at the tower's size."""
    path = folder / "preprocessor_config.json"
    size = config.vision.image
    values: Config = {"size": {"shortest_edge": size}, "crop_size": size}
    if path.exists():
        values = read_json(path)
    processor = ImageProcessor.from_config(values, "pad" if style == "llava-v1" else None)
    if processor.output_size != (size, size):
        raise CheckpointError(
            f"{path}: crop_size is {processor.output_size}, the vision tower takes {size} x {size}",
            hint="preprocessor_config.json and config.json may be of different models",
        )
    return processor


def end_tokens(folder: Path, default: tuple[int, ...]) -> frozenset[int]:
    """End tokens of generation_config.json, else of the model's configuration."""
    path = folder / "generation_config.json"
    value = read_json(path).get("eos_token_id") if path.exists() else None
    if value is None:
        return frozenset(default)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in values):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}; it must be token ids")
    return frozenset(values)


FAMILIES: dict[str, Callable[[Path, Config, str | None], Family]] = {
    "llava": _llava_hub,
    "llava_original": _llava_original,
}
