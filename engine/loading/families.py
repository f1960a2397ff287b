"""Which model a checkpoint folder holds, and what goes with it: names, pictures, prompts, ends.

A family is recognised by config.json alone. Adding one means one function here and one row in the
table at the end. LLaVA's original layout is told by its ``mm_vision_tower``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.adapters import refuse_adapter
from ..checkpoint.config import ConfigReader, shown
from ..checkpoint.folder import read_folder
from ..checkpoint.folder_files import read_file, read_json
from ..checkpoint.hub import resolve
from ..checkpoint.mllama_names import mllama_names
from ..checkpoint.names import Rename, clip_names, llava_names
from ..checkpoint.packed import settings_of
from ..checkpoint.qwen_names import qwen_names
from ..checkpoint.qwen_patches_names import qwen_patches_names
from ..errors import CheckpointError, OptionError
from ..models.llava import Llava, decoder_kind, parse_hub, parse_original
from ..models.llava_next import LlavaNext, parse_next_hub, parse_next_original
from ..models.llava_onevision import (
    LlavaOnevision,
    most_tiles,
    parse_onevision,
)
from ..models.llava_video import (
    LlavaNextVideo,
    LongVa,
    parse_longva,
    parse_next_video,
)
from ..models.mllama import Mllama, MllamaConfig
from ..models.qwen_patches import PatchesConfig, QwenPatches
from ..models.qwen_vl import QwenVl, QwenVlConfig
from ..models.siglip import SiglipConfig
from ..models.vision_language import VisionLanguageModel
from ..pictures.anyres import TileProcessor, check_same, read_pinpoints
from ..pictures.boxes import Box, Reads, parse_boxes, parse_json_boxes
from ..pictures.canvas import CanvasProcessor
from ..pictures.patches import PatchProcessor, VideoRules
from ..pictures.preprocess import ImageProcessor, Mode
from ..prompts.chat_template import find_template
from ..prompts.templates import OWN, Style, find_style

Config = Mapping[str, Any]

# The towers that the published LLaVAs of the original layout name, by their published
# configurations: a checkpoint that brings the weights along needs nothing else of that model.
# Trainers write the path that it had on their machine.
CLIP_L_336_NAME = "openai/clip-vit-large-patch14-336"
CLIP_L_336 = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
_PUBLISHED_TOWERS: dict[str, Config] = {
    CLIP_L_336_NAME: CLIP_L_336,
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}


@dataclass(frozen=True)
class Family:
    """A recognised checkpoint: its model on the meta device, and how to feed it.

    Attributes:
        model: built, without memory for its weights.
        rename: names on disk to names of ``model``.
        processor: pictures to pixels.
        style: prompt style; "template": that of the checkpoint's own chat template.
        own: what that template makes, once it has been read with the tokenizer.
        end_tokens: ids that end an answer, as far as the configuration names them.
        tower: folder and names of a vision tower that the checkpoint may leave out.
        window: earlier turns are left out of a prompt so that they have fewer tokens; None: never.
        strip: whether white space around an answer is dropped.
        boxes: what reads the regions that an answer names, of a model that does; see
            ``pictures.boxes``.
        image_marks: special tokens before and behind a picture's place, or none.
        new_tokens: special tokens that the vocabulary is longer by if the tokenizer lacks them.
        original: the original repository's layout; its tokenizer may still hold its base's prompt.
    """

    model: VisionLanguageModel
    rename: Rename
    processor: ImageProcessor
    style: str
    end_tokens: frozenset[int]
    tower: tuple[Path, Rename] | None = None
    window: int | None = None
    strip: bool = False
    boxes: Reads | None = None
    image_marks: tuple[str, ...] = ()
    new_tokens: tuple[str, ...] = ()
    original: bool = False
    own: Style | None = None

    @property
    def prompts(self) -> str | Style:
        """The style, by its name or as it is."""
        return self.own or self.style


@dataclass(frozen=True)
class Wishes:
    """What the caller says in place of the checkpoint; see ``Engine.load``."""

    style: str | None = None
    vision_tower: str | None = None
    offline: bool = False
    max_image_tokens: int | None = None


def recognise(folder: Path, wishes: Wishes | None = None) -> Family:
    """Read ``folder``'s config.json and build what it describes, as far as nobody wishes otherwise.

    Raises CheckpointError for an unknown model type, a wrong key, an adapter or quantised weights.
    """
    wishes = wishes or Wishes()
    if wishes.style not in (None, OWN):
        find_style(str(wishes.style))
    refuse_adapter(folder)
    path = folder / "config.json"
    if not path.exists():
        _refuse_metas(folder)
        raise CheckpointError(
            f"{folder} is no model folder: it has no config.json",
            hint="give the folder with config.json and the weights, or a hub name",
        )
    config = read_json(path)
    settings_of(folder, config)
    build = (
        _original if "mm_vision_tower" in config else FAMILIES.get(str(config.get("model_type")))
    )
    if build is None:
        supported = f"supported: {', '.join(FAMILIES)}, and LLaVA's original layout"
        raise CheckpointError(
            f"{path}: model_type is {shown(config.get('model_type'))}",
            hint=_INSTEAD.get(str(config.get("model_type")), supported),
        )
    if wishes.vision_tower is not None and build is not _original:
        raise OptionError(
            f"{folder} has a vision tower of its own; another one would change the model",
            hint="leave out --vision-tower",
        )
    most = wishes.max_image_tokens
    if most is not None and (most < 1 or build is not _qwen_patches):
        fixed = "" if build is _qwen_patches else "; this model's pictures have tokens of their own"
        raise OptionError(
            f"max_image_tokens is {most}{fixed}",
            hint="use 1 or more" if not fixed else "leave it out",
        )
    try:
        return build(folder, config, wishes)
    except RuntimeError as error:  # each size is in its range, but their product is no size
        if "overflow" not in str(error):
            raise
        raise CheckpointError(
            f"{path}: no tensor can have its sizes together",
            hint="compare the file with the published one",
        ) from None


def _refuse_metas(folder: Path) -> None:
    """Raise CheckpointError for what Meta's repositories have in a folder ``original`` as well."""
    if (folder / "params.json").exists() or any(folder.glob("consolidated.*")):
        raise CheckpointError(
            f"{folder} holds Meta's own layout (consolidated.*.pth, params.json): it is not read",
            hint="give the folder above it, with config.json and .safetensors files",
        )


def _llava_hub(folder: Path, config: Config, wishes: Wishes) -> Family:
    """``llava-hf/llava-1.5-*`` and what transformers saves."""
    style = wishes.style or _style(folder, _text_model(config), "llava-hf")
    return _llava(folder, partial(Llava, parse_hub(config)), style)


def _next_hub(folder: Path, config: Config, wishes: Wishes) -> Family:
    """``llava-hf/llava-v1.6-*``."""
    style = wishes.style or _trained(folder, _text_model(config))
    return _llava(folder, partial(LlavaNext, *parse_next_hub(config)), style)


def _next_video(folder: Path, config: Config, wishes: Wishes) -> Family:
    """``llava-hf/LLaVA-NeXT-Video-*``."""
    style = wishes.style or _trained(folder, _text_model(config))
    return _llava(folder, partial(LlavaNextVideo, *parse_next_video(config)), style)


def _onevision(folder: Path, config: Config, wishes: Wishes) -> Family:
    """``llava-hf/llava-onevision-qwen2-*``; the original code's prompts are the style chatml."""
    template = find_template(folder, with_tokenizers=True)
    # The hub's first template has a space behind a role, later conversions have new lines.
    lines = template is not None and "+ ' '" not in template.text
    style = wishes.style or ("chatml" if lines else "onevision")
    return _llava(folder, partial(LlavaOnevision, *parse_onevision(config)), style)


def _original(folder: Path, config: Config, wishes: Wishes) -> Family:
    """``liuhaotian/llava-v1.*``: a flat configuration, whose vision tower may lie elsewhere."""
    tower, vision = _tower(folder, config, wishes)
    reader = ConfigReader(config, "config.json")
    model = _original_model(config, vision)
    style = wishes.style or _trained(folder, decoder_kind(reader))
    aspect = "crop"
    if not _is_anyres(config):
        aspect = reader.text("image_aspect_ratio", "square", tuple(_ASPECTS))
    elif wishes.vision_tower is None:
        tower = None  # LLaVA-1.6 has trained its tower further: no other one is right
    family = _llava(folder, model, style, _ASPECTS.get(aspect, "crop"), tower)
    start_end = reader.flag("mm_use_im_start_end", False)
    marks = ("<im_start>", "<im_end>") if start_end else ()
    patch = ("<im_patch>",) if reader.flag("mm_use_im_patch_token", False) else ()
    return replace(family, image_marks=marks, new_tokens=(*patch, *marks), original=True)


def _original_model(config: Config, vision: Config) -> Callable[[], Llava]:
    """What builds the model that an original layout describes."""
    if not _is_anyres(config):
        return partial(Llava, parse_original(config, vision))
    if config.get("mm_patch_merge_type") == "unires":
        return partial(LongVa, *parse_longva(config, vision))
    parsed = parse_next_original(config, vision)
    if config["image_aspect_ratio"] == "anyres":
        return partial(LlavaNext, *parsed)
    tiles = most_tiles(ConfigReader(config, "config.json"), "image_aspect_ratio", "anyres")
    return partial(LlavaOnevision, *parsed, tiles)


# How LLaVA-1.5's original code makes a picture square, by its image_aspect_ratio.
_ASPECTS: dict[str, Mode] = {"pad": "pad", "square": "crop"}


def _is_anyres(config: Config) -> bool:
    return str(config.get("image_aspect_ratio")).startswith("anyres")


def _text_model(config: Config) -> str:
    text = config.get("text_config")
    return str(text.get("model_type", "llama")) if isinstance(text, Mapping) else "llama"


def _trained(folder: Path, decoder: str) -> str:
    """The prompts that the original repository trains a decoder with."""
    return _style(
        folder, decoder, {"mistral": "mistral", "qwen2": "chatml"}.get(decoder, "llava-v1")
    )


def _style(folder: Path, decoder: str, usual: str) -> str:
    """The style whose tokens the checkpoint's own template holds, or its tokenizer without one; a
    template that holds none that we know decides itself.

    Vicuna, Yi and Llama 3 are all Llamas; only Yi's tokenizer knows ChatML.
    """
    template = _content(folder, "chat_template.jinja", "chat_template.json")
    tokenizers = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
    held = template or _content(folder, *tokenizers)
    if b"<|start_header_id|>" in held:
        return "llama3"
    if b"<|im_start|>" in held:
        return "chatml" if decoder == "qwen2" else "yi"
    return OWN if template and _TOLD_BY[usual] not in template else usual


# What is written in the templates of these styles.
_TOLD_BY = {
    "llava-hf": b"ASSISTANT",
    "llava-v1": b"ASSISTANT",
    "mistral": b"[INST]",
    "chatml": b"<|im_start|>",
}


def _content(folder: Path, *names: str) -> bytes:
    """The files of these names that are there, one after the other."""
    return b"".join(read_file(folder / name) for name in names if (folder / name).is_file())


def _llava(
    folder: Path,
    model: Callable[[], Llava],
    style: str,
    mode: Mode | None = None,
    tower: Path | None = None,
) -> Family:
    """Join the halves of a LLaVA, and its ``tower`` if that lies elsewhere."""
    with torch.device("meta"):
        built = model()
    config = built.config
    layers = config.vision.used_layers
    return Family(
        model=built,
        rename=llava_names(layers, image_newline=isinstance(built, LlavaNext)),
        processor=_llava_processor(folder, built, mode),
        style=style,
        end_tokens=end_tokens(folder, config.end_tokens),
        tower=(tower, clip_names(layers)) if tower else None,
    )


def _qwen(folder: Path, config: Config, wishes: Wishes) -> Family:
    """``Qwen/Qwen-VL-Chat``, and ``Qwen/Qwen-VL``, whose chat_format is "raw"."""
    parsed = QwenVlConfig.parse(config)
    path = folder / "generation_config.json"
    values = ConfigReader(read_json(path) if path.exists() else {}, str(path))
    form = values.text("chat_format", "raw", ("raw", "chatml"))
    style = wishes.style or {"raw": "qwen-vl", "chatml": "qwen-vl-chat"}[form]
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
        boxes=parse_boxes,
    )


def _mllama(folder: Path, config: Config, wishes: Wishes) -> Family:
    """``meta-llama/Llama-3.2-*-Vision-Instruct``, and the base models, which have no template."""
    parsed = MllamaConfig.parse(config)
    asked = find_template(folder, with_tokenizers=True) is not None
    with torch.device("meta"):
        model = Mllama(parsed)
    return Family(
        model=model,
        rename=mllama_names(),
        processor=_canvas_processor(folder, parsed),
        style=wishes.style or ("mllama" if asked else "mllama-base"),
        end_tokens=end_tokens(folder, parsed.end_tokens),
    )


def _qwen_patches(folder: Path, config: Config, wishes: Wishes) -> Family:
    """``Qwen/Qwen2-VL-*``, ``Qwen/Qwen2.5-VL-*`` and ``Qwen/Qwen3-VL-*``, dense ones."""
    parsed = PatchesConfig.parse(config)
    third = config["model_type"] == "qwen3_vl"
    processor = _patch_processor(folder, parsed, third=third).limited(wishes.max_image_tokens)
    with torch.device("meta"):
        model = QwenPatches(parsed, processor.cells)
    resized = processor.cells.resized

    def boxes(text: str, size: tuple[int, int]) -> list[Box]:
        return parse_json_boxes(text, size, (1000, 1000) if third else resized(size))

    return Family(
        model=model,
        boxes=boxes if config["model_type"] != "qwen2_vl" else None,
        rename=qwen_patches_names(),
        processor=processor,
        style=wishes.style or ("qwen3-vl" if third else "qwen2-vl"),
        end_tokens=end_tokens(folder, parsed.end_tokens),
        image_marks=("<|vision_start|>", "<|vision_end|>"),
    )


def _patch_processor(folder: Path, config: PatchesConfig, *, third: bool) -> PatchProcessor:
    """The checkpoint's own limits of a picture's pixels, else the published ones."""
    least, most = (65536, 16777216) if third else (3136, 12845056)
    half: Config = HALF if third else {}
    where, values = _picture_rules(folder, half)
    read = ConfigReader(values, where)
    size = values.get("size")
    if isinstance(size, Mapping) and {"shortest_edge", "longest_edge"} <= set(size):
        # So they are called, and are numbers of pixels.
        limits = read.section("size")
        least, most = (limits.integer(f"{side}_edge", low=1) for side in ("shortest", "longest"))
    least, most = read.integer("min_pixels", least), read.integer("max_pixels", most)
    if (patch := read.integer("patch_size", config.cells.patch)) != config.cells.patch:
        raise read.fail("patch_size", f"is {patch}, config.json says {config.cells.patch}")
    cells = replace(config.cells, least=least, most=most)
    video = _video_rules(folder, config, third=third)
    if not cells.side**2 <= least <= most:
        raise read.fail("min_pixels", f"and max_pixels are {least} and {most}")
    exact = {"size": {"height": 1, "width": 1}, "do_center_crop": False}
    plain = ImageProcessor.from_config({**half, **values, **exact}, "crop", where)
    return PatchProcessor(**vars(plain), cells=cells, video=video)


def _video_rules(folder: Path, config: PatchesConfig, *, third: bool) -> VideoRules:
    """The checkpoint's own limits of a video's pixels, else those of the published tools."""
    rules = VideoRules(rate=config.rate)
    if third:
        rules = VideoRules(4096, 25165824, together=True, stamped=True)
    path = folder / "video_preprocessor_config.json"
    if not path.exists():
        return rules
    read = ConfigReader(read_json(path), path.name)
    if (patch := read.integer("patch_size", config.cells.patch)) != config.cells.patch:
        raise read.fail("patch_size", f"is {patch}, config.json says {config.cells.patch}")
    least, most = read.integer("min_pixels", rules.least), read.integer("max_pixels", rules.most)
    if "size" in read.values:
        read = read.section("size")
        least = read.integer("shortest_edge", least, low=1)
        most = read.integer("longest_edge", most, low=1)
    if least > most:
        raise read.fail("shortest_edge", f"is {least}, longest_edge {most}")
    return replace(rules, least=least, most=most)


def _canvas_processor(folder: Path, config: MllamaConfig) -> CanvasProcessor:
    """The checkpoint's own rules for tiles, which must be those of the tower."""
    side, tiles = config.vision.image, config.vision.tiles
    usual = {"resample": 2, "size": {"height": side, "width": side}}
    where, values = _picture_rules(folder, usual)
    rules = {**usual, **values, "do_center_crop": False}
    plain = ImageProcessor.from_config(rules, "crop", where)
    most = ConfigReader(values, where).integer("max_image_tiles", 4)
    if (plain.output_size, most) != ((side, side), tiles):
        raise CheckpointError(
            f"{where}: tiles are {plain.output_size}, up to {most} of them; the vision tower takes "
            f"{side} x {side}, up to {tiles}",
            hint="this file and config.json may be of different models",
        )
    return CanvasProcessor(**vars(plain), most=most)


def _tower(folder: Path, config: Config, wishes: Wishes) -> tuple[Path | None, Config]:
    """Where the original layout's vision tower lies, and its configuration.

    ``_test_only_vision_config`` stands in for the published tower's in small tests.
    """
    reader = ConfigReader(config, "config.json")
    if "_test_only_vision_config" in config:
        return None, reader.section("_test_only_vision_config").values
    inside = _holds_tower(folder)
    if inside and wishes.vision_tower is not None:
        raise OptionError(
            f"{folder} has a vision tower of its own; another one would change the model",
            hint="leave out --vision-tower",
        )
    name = wishes.vision_tower or reader.text("mm_vision_tower")
    named = (tower for known, tower in _PUBLISHED_TOWERS.items() if _same_name(known, name))
    published = next(named, None)
    if published and wishes.vision_tower is None and (inside or _is_anyres(config)):
        return None, published
    tower = _find_tower(folder, name, wishes)
    vision = read_json(tower / "config.json")
    nested = vision.get("vision_config", vision)
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"{tower / 'config.json'}: vision_config must be an object")
    return tower, nested


def _same_name(known: str, name: str) -> bool:
    return Path(name).name == Path(known).name


def _find_tower(folder: Path, name: str, wishes: Wishes) -> Path:
    """The folder of a tower; a name of config.json may be a folder beside that."""
    if wishes.vision_tower is not None:
        return resolve(name, offline=wishes.offline)
    beside = folder / name
    try:
        return beside if beside.is_dir() else resolve(name, offline=wishes.offline)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: mm_vision_tower, the vision tower it leaves out, is "
            f"{shown(name)}: {error}",
            hint=f"name its folder or hub name, such as --vision-tower {CLIP_L_336_NAME}",
        ) from error


def _holds_tower(folder: Path) -> bool:
    """Whether the weights hold a vision tower; damaged ones are for whoever loads them."""
    try:
        return any("vision_tower." in name for name in read_folder(folder))
    except CheckpointError:
        return False


# SigLIP's and Qwen3-VL's pictures lie from -1 to 1.
HALF: Config = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _llava_processor(folder: Path, model: Llava, mode: Mode | None) -> ImageProcessor:
    """The checkpoint's own picture rules, else the tower's at its size; ``mode`` overrides."""
    vision, pinpoints = model.config.vision, model.pinpoints
    size = vision.image
    siglip = _siglip_rules(size) if isinstance(vision, SiglipConfig) else {}
    usual = siglip or {"size": {"shortest_edge": size}, "crop_size": size}
    where, values = _picture_rules(folder, usual)
    values = siglip | dict(values)
    if pinpoints and "image_grid_pinpoints" in values:
        own = read_pinpoints(values, where, size, width_first=False)
        check_same(pinpoints, own, where)
    # Of tiles, do_pad of the file is about their number in a batch, not about the picture.
    processor = ImageProcessor.from_config(values, "crop" if pinpoints else mode, where)
    if issubclass(model.processor, TileProcessor):
        processor = model.processor(**vars(processor), pinpoints=pinpoints)
    if processor.output_size != (size, size):
        raise CheckpointError(
            f"{where}: crop_size is {processor.output_size}, the vision tower takes "
            f"{size} x {size}",
            hint="this file and config.json may be of different models",
        )
    return processor


def _siglip_rules(size: int) -> dict[str, Any]:
    """What SigLIP was trained with: pictures stretched to a square."""
    return {"size": {"height": size, "width": size}, "do_center_crop": False, **HALF}


def _picture_rules(folder: Path, usual: Config) -> tuple[str, Config]:
    """Where the picture rules stand, and the rules; transformers 5 writes them into one file more.

    As there, what it has nested comes before a file of its own; without either they are as usual.
    """
    path = folder / "processor_config.json"
    if path.exists():
        nested = ConfigReader(read_json(path), str(path)).section("image_processor")
        if nested.values:
            return nested.where, nested.values
    path = folder / "preprocessor_config.json"
    if path.exists():
        return str(path), read_json(path)
    return str(path), usual


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


# What to take in place of models that look like those of the table and are not.
_EXPERTS = "its layers choose among experts, which is not supported; take a dense Qwen3-VL: "
_EXPERTS += "Qwen/Qwen3-VL-8B-Instruct, -32B-Instruct"
_DELTA = "most of its layers have no keys and values (gated delta nets), which is not supported; "
_DELTA += "take Qwen/Qwen3-VL-2B-Instruct, -4B-Instruct or -8B-Instruct"
_INSTEAD = {
    "qwen3_vl_moe": _EXPERTS,
    "qwen3_5": _DELTA,
    "qwen3_5_moe": _DELTA,
}

FAMILIES: dict[str, Callable[[Path, Config, Wishes], Family]] = {
    "llava": _llava_hub,
    "llava_next": _next_hub,
    "llava_next_video": _next_video,
    "llava_onevision": _onevision,
    "mllama": _mllama,
    "qwen": _qwen,
    "qwen2_vl": _qwen_patches,
    "qwen2_5_vl": _qwen_patches,
    "qwen3_vl": _qwen_patches,
}
