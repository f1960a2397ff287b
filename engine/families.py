"""Which model a checkpoint folder holds, and what goes with it: names, pictures, prompts, ends.

A family is recognised by config.json alone. Adding one means one function here and one row in the
table at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.anyres import Canvas, TileProcessor, check_same, read_pinpoints
from engine.errors import CheckpointError
from engine.models.config import ConfigReader, shown
from engine.models.llava import Llava, LlavaConfig, parse_hub, parse_original
from engine.models.llava_next import LlavaNext, parse_next_hub, parse_next_original
from engine.models.qwen_vl import QwenVl, QwenVlConfig
from engine.models.vision_language import VisionLanguageModel
from engine.preprocess import ImageProcessor
from engine.templates import find_style
from weights.checkpoint import read_json
from weights.hub import resolve
from weights.names import Rename, clip_names, llava_names
from weights.qwen_names import qwen_names

Config = Mapping[str, Any]

# The tower that all published LLaVAs of the original layout name, by its published configuration:
# LLaVA-1.6 brings the weights along, so that nothing else of that model is needed.
CLIP_L_336_NAME = "openai/clip-vit-large-patch14-336"
CLIP_L_336 = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}


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
        window: earlier turns are left out of a prompt so that they have fewer tokens; None: never.
        strip: whether white space around an answer is dropped.
        boxes: whether an answer may name regions of the picture; see ``engine.boxes``.
    """

    model: VisionLanguageModel
    rename: Rename
    processor: ImageProcessor
    style: str
    end_tokens: frozenset[int]
    tower: tuple[Path, Rename] | None = None
    window: int | None = None
    strip: bool = False
    boxes: bool = False


def recognise(folder: Path, style: str | None) -> Family:
    """Read ``folder``'s config.json and build what it describes; ``style`` overrides its prompts.

    Raises CheckpointError for an unknown model type or a wrong key.
    """
    if style is not None:
        find_style(style)
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if "mm_vision_tower" in config:
        anyres = str(config.get("image_aspect_ratio")).startswith("anyres")
        kind = "llava_next_original" if anyres else "llava_original"
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {shown(kind)}",
            hint=f"supported: {', '.join(FAMILIES)}",
        )
    try:
        return FAMILIES[kind](folder, config, style)
    except RuntimeError as error:  # each size is in its range, but their product is no size
        if "overflow" not in str(error):
            raise
        raise CheckpointError(
            f"{folder / 'config.json'}: no tensor can have its sizes together",
            hint="compare the file with the published one",
        ) from None


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


def _next_hub(folder: Path, config: Config, style: str | None) -> Family:
    """``llava-hf/llava-v1.6-*``."""
    parsed, pinpoints = parse_next_hub(config)
    kind = (config.get("text_config") or {}).get("model_type", "llama")
    return _llava(folder, parsed, style or _next_style(folder, kind), None, pinpoints)


def _next_original(folder: Path, config: Config, style: str | None) -> Family:
    """``liuhaotian/llava-v1.6-*``: its vision tower was trained further and lies inside."""
    if config["mm_vision_tower"] == CLIP_L_336_NAME:
        vision: Config = CLIP_L_336
    else:
        vision = _tower_config(folder, config)[1]
    parsed, pinpoints = parse_next_original(config, vision)
    kind = str(config.get("model_type")).removeprefix("llava_")
    return _llava(folder, parsed, style or _next_style(folder, kind), None, pinpoints)


def _next_style(folder: Path, decoder: str) -> str:
    """The prompts that LLaVA-1.6 was trained with, by its decoder.

    Vicuna and Yi are both Llamas; only Yi's tokenizer knows ChatML.
    """
    known = {"mistral": "mistral", "qwen2": "chatml", "qwen": "chatml"}
    if decoder in known:
        return known[decoder]
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    files = [folder / name for name in names if (folder / name).is_file()]
    return "yi" if any(b"<|im_start|>" in file.read_bytes() for file in files) else "llava-v1"


def _llava(
    folder: Path,
    config: LlavaConfig,
    style: str,
    tower: tuple[Path, Rename] | None,
    pinpoints: tuple[Canvas, ...] | None = None,
) -> Family:
    """Join the parts of a LLaVA; with ``pinpoints`` it is a LLaVA-1.6."""
    with torch.device("meta"):
        model: Llava = LlavaNext(config, pinpoints) if pinpoints else Llava(config)
    return Family(
        model=model,
        rename=llava_names(config.vision.used_layers, image_newline=bool(pinpoints)),
        processor=_llava_processor(folder, config, style, pinpoints),
        style=style,
        end_tokens=end_tokens(folder, config.end_tokens),
        tower=tower,
    )


def _qwen(folder: Path, config: Config, style: str | None) -> Family:
    """``Qwen/Qwen-VL-Chat``, and ``Qwen/Qwen-VL``, whose chat_format is "raw"."""
    parsed = QwenVlConfig.parse(config)
    path = folder / "generation_config.json"
    values = ConfigReader(read_json(path) if path.exists() else {}, str(path))
    form = values.text("chat_format", "raw", ("raw", "chatml"))
    style = style or {"raw": "qwen-vl", "chatml": "qwen-vl-chat"}[form]
    ends = ["<|endoftext|>"]
    if style == "qwen-vl-chat":
        ends += ["<|im_start|>", "<|im_end|>"]
    with torch.device("meta"):
        model = QwenVl(parsed)
    side = parsed.vision.image
    return Family(
        model=model,
        rename=qwen_names(),
        processor=ImageProcessor(shortest_edge=None, exact_size=(side, side), crop_size=None),
        style=style,
        end_tokens=end_tokens(folder, ()) | {parsed.specials[token] for token in ends},
        window=values.integer("max_window_size", 6144) if style == "qwen-vl-chat" else None,
        strip=True,
        boxes=True,
    )


def _tower_config(folder: Path, config: Config) -> tuple[Path | None, Config]:
    """Where the original layout's vision tower lies, and its configuration.

    ``_test_only_vision_config`` stands in for the published tower's in small tests.
    """
    reader = ConfigReader(config, "config.json")
    if "_test_only_vision_config" in config:
        return None, reader.section("_test_only_vision_config").values
    name = reader.text("mm_vision_tower")
    beside = folder / name
    tower = beside if beside.is_dir() else resolve(name)
    vision = read_json(tower / "config.json")
    nested = vision.get("vision_config", vision)
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"{tower / 'config.json'}: vision_config must be an object")
    return tower, nested


def _llava_processor(
    folder: Path, config: LlavaConfig, style: str, pinpoints: tuple[Canvas, ...] | None
) -> ImageProcessor:
    """The checkpoint's own picture rules, else CLIP's at the tower's size."""
    path = folder / "preprocessor_config.json"
    size = config.vision.image
    values: Config = {"size": {"shortest_edge": size}, "crop_size": size}
    if path.exists():
        values = read_json(path)
    if pinpoints:
        # Here do_pad of the file is about the number of tiles in a batch, not about the picture.
        plain = ImageProcessor.from_config(values, "crop")
        if "image_grid_pinpoints" in values:
            own = read_pinpoints(values, str(path), size, width_first=False)
            check_same(pinpoints, own, str(path))
        processor: ImageProcessor = TileProcessor(**vars(plain), pinpoints=pinpoints)
    else:
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
    if not all(type(token) is int for token in values):
        raise CheckpointError(f"{path}: eos_token_id is {shown(value)}; it must be token ids")
    return frozenset(values)


FAMILIES: dict[str, Callable[[Path, Config, str | None], Family]] = {
    "llava": _llava_hub,
    "llava_original": _llava_original,
    "llava_next": _next_hub,
    "llava_next_original": _next_original,
    "qwen": _qwen,
}
