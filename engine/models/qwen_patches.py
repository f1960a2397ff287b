"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, and a decoder that knows their rows.

An image token is a cell of a picture resized to whole cells (``pictures.patches``); the decoder is
Qwen2's or Qwen3's, with rotary embedding over time, rows and columns (``mrope``). Qwen3-VL's tower
gives features of inner layers too, which are added to a picture's tokens behind the decoder's first
layers: they lie beside the embeddings, and whoever drops tokens in between drops theirs as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.config import ConfigReader
from ..pictures.patches import Cells
from ..pictures.preprocess import Pixels
from .decoder import Decoder, DecoderConfig, Grid, Rotation, Slices, Step
from .mrope import MRotation, blocked, interleaved
from .patch_tower import FRAMES, PatchTower, TowerConfig
from .vision_language import VisionLanguageModel

# The generations by model_type: the decoder that each has.
_DECODERS = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}
# Frequencies of time, rows and columns where a file is silent.
_SECTIONS = {"qwen2": (16, 24, 24), "qwen3": (24, 20, 20)}


@dataclass(frozen=True)
class PatchesConfig:
    """A model of one of the three generations; ``axes`` are those of its rotary frequencies, and
    ``rate`` is that of ``VideoRules``.
    """

    decoder: DecoderConfig
    vision: TowerConfig
    cells: Cells
    axes: tuple[int, ...]
    image_token: int
    end_tokens: tuple[int, ...]
    rate: float = 0.0

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> PatchesConfig:
        """Read config.json, flat or with a text_config; raises CheckpointError naming the key."""
        top = ConfigReader(config, "config.json")
        kind = top.text("model_type", choices=tuple(_DECODERS))
        text = top.section("text_config") if "text_config" in config else top
        rope = _rope(text)
        tied = top.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False))
        decoder = _parse_decoder(text, rope, _DECODERS[kind], tied)
        vision = top.section("vision_config")
        cells = Cells(
            vision.integer("patch_size", 16 if kind == "qwen3_vl" else 14),
            vision.integer("spatial_merge_size", 2),
        )
        _check_frames(vision)
        tower = _TOWERS[kind](vision, cells)
        if tower.output != decoder.hidden:
            problem = (
                f"make tokens of {tower.output}, the decoder's hidden_size is {decoder.hidden}"
            )
            raise vision.fail("the tower's sizes", problem)
        return cls(
            decoder=decoder,
            vision=tower,
            cells=cells,
            axes=_axes(rope, _DECODERS[kind], decoder.head_dim),
            image_token=top.integer("image_token_id", 151655, low=0, high=decoder.vocab - 1),
            end_tokens=text.tokens("eos_token_id", ()),
            rate=vision.number("tokens_per_second", 4) if kind == "qwen2_5_vl" else 0.0,
        )


def _rope(text: ConfigReader) -> ConfigReader:
    """Where a file says how it rotates: rope_scaling, or since transformers 5 rope_parameters."""
    name = "rope_parameters" if text.values.get("rope_parameters") else "rope_scaling"
    rope = text.section(name)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise rope.unsupported("rope_type", f"is {kind!r:.40}; 'default' and 'mrope' are supported")
    return rope


def _parse_decoder(text: ConfigReader, rope: ConfigReader, kind: str, tied: bool) -> DecoderConfig:
    given = {key: value for key, value in text.values.items() if value is not None}
    for other in ("rope_scaling", "rope_parameters"):
        given.pop(other, None)
    theta = rope.values.get("rope_theta", 5e6 if kind == "qwen3" else 1e6)
    own = {"model_type": kind, "rope_theta": given.get("rope_theta", theta)}
    if kind == "qwen3":
        own["head_dim"] = given.get("head_dim", 128)
    own["tie_word_embeddings"] = tied
    return DecoderConfig.parse(ConfigReader(given | own, text.where))


def _axes(rope: ConfigReader, kind: str, head_dim: int) -> tuple[int, ...]:
    sections = rope.integers("mrope_section", _SECTIONS[kind])
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        problem = f"are {list(sections)}; three that make up half of a head of {head_dim}"
        raise rope.fail("mrope_section", problem)
    return tuple((interleaved if kind == "qwen3" else blocked)(sections))


def _check_frames(vision: ConfigReader) -> None:
    if vision.integer("temporal_patch_size", FRAMES) != FRAMES:
        raise vision.unsupported("temporal_patch_size", f"must be {FRAMES}")


def _heads(vision: ConfigReader, hidden: int) -> int:
    heads = vision.integer("num_heads", 16)
    if hidden % heads or hidden // heads % 4:
        raise vision.fail("num_heads", f"is {heads}; of {hidden} each gets no multiple of four")
    return heads


def _of_layers(
    vision: ConfigReader, key: str, default: tuple[int, ...], layers: int
) -> tuple[int, ...]:
    numbers = vision.integers(key, default)
    if sorted(set(numbers)) != list(numbers) or max(numbers, default=0) >= layers:
        raise vision.fail(key, f"are {list(numbers)}; they must ascend and be below {layers}")
    return numbers


def _qwen2_tower(vision: ConfigReader, cells: Cells) -> TowerConfig:
    hidden = vision.integer("embed_dim", 1280)
    return TowerConfig(
        hidden=hidden,
        layers=vision.integer("depth", 32, high=1000),
        heads=_heads(vision, hidden),
        mlp=int(hidden * vision.number("mlp_ratio", 4)),
        output=vision.integer("hidden_size", 3584),
        activation=vision.text("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
    )


def _qwen25_tower(vision: ConfigReader, cells: Cells) -> TowerConfig:
    hidden, window = vision.integer("hidden_size", 1280), vision.integer("window_size", 112)
    if window < cells.side:
        raise vision.fail("window_size", f"is {window}, smaller than a cell of {cells.side}")
    layers = vision.integer("depth", 32, high=1000)
    return TowerConfig(
        hidden=hidden,
        layers=layers,
        heads=_heads(vision, hidden),
        mlp=vision.integer("intermediate_size", 3420),
        output=vision.integer("out_hidden_size", 3584),
        gated=True,
        activation=vision.text("hidden_act", "silu", ("silu",)),
        window=window,
        whole=_of_layers(vision, "fullatt_block_indexes", (7, 15, 23, 31), layers),
    )


def _qwen3_tower(vision: ConfigReader, cells: Cells) -> TowerConfig:
    hidden, layers = vision.integer("hidden_size", 1152), vision.integer("depth", 27, high=1000)
    positions = vision.integer("num_position_embeddings", 2304)
    side = round(positions**0.5)
    if side**2 != positions:
        raise vision.fail("num_position_embeddings", f"is {positions}; it must be a square number")
    deep = _of_layers(vision, "deepstack_visual_indexes", (8, 16, 24), layers)
    return TowerConfig(
        hidden=hidden,
        layers=layers,
        heads=_heads(vision, hidden),
        mlp=vision.integer("intermediate_size", 4304),
        output=vision.integer("out_hidden_size", 3584),
        activation=vision.text("hidden_act", "gelu_pytorch_tanh", ("gelu_pytorch_tanh", "gelu")),
        patch_bias=True,
        positions=side,
        deepstack=deep,
    )


_TOWERS = {"qwen2_vl": _qwen2_tower, "qwen2_5_vl": _qwen25_tower, "qwen3_vl": _qwen3_tower}


class PatchesDecoder(Decoder):
    """The decoder that rotates by rows and columns, and takes in what lies beside embeddings."""

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__(config.decoder)
        self.axes = config.axes

    def make_rotation(self, device: torch.device) -> Rotation:
        """See ``Decoder.make_rotation``."""
        return MRotation(self.config.head_dim, self.config.rope_theta, device, self.axes)

    def slices(self, hidden: Tensor, step: Step) -> Slices[Tensor]:
        """See ``Decoder.slices``; behind its embedding a token may have what is added to it behind
        the first layers.
        """
        embedded, *beside = hidden.split(self.config.hidden, 1)
        tables = self.rotation.tables(step.positions, step.rotary, hidden.dtype)
        return (yield from self.through(embedded, tables, step, beside))


class QwenPatches(VisionLanguageModel):
    """The joined model; ``cells`` are the rules that pictures are resized by."""

    vision: PatchTower

    def __init__(self, config: PatchesConfig, cells: Cells) -> None:
        super().__init__()
        self.config, self.cells = config, cells
        self.image_token = config.image_token
        self.vision = PatchTower(config.vision, cells)
        self.decoder = PatchesDecoder(config)

    def image_tokens(self, pixels: Pixels) -> int:
        """A token for each cell."""
        return len(pixels.tiles) // self.cells.merge**2

    def encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Features ``[cells, (1 + deepstack) * hidden]``, picture by picture, slice by slice."""
        return [self._encoded(each) for each in pictures]

    def _encoded(self, picture: Pixels) -> Tensor:
        weight, grid = self.decoder.norm.weight, self._grid(picture.size, picture.times)
        slices = picture.tiles.chunk(len(grid.times))
        place = grid.rows, grid.columns
        return torch.cat([self.vision(x.to(weight.device, weight.dtype), place) for x in slices])

    def _grid(self, size: tuple[int, int], times: tuple[int, ...]) -> Grid:
        """Of a picture, or of a video's slices, whose frames are resized already."""
        if not times:
            return Grid(*self.cells.grid(size))
        return Grid(size[1] // self.cells.side, size[0] // self.cells.side, times)

    def embed(
        self, token_ids: Tensor, spans: Sequence[tuple[int, int]], features: Sequence[Tensor]
    ) -> Tensor:
        """Embeddings, and beside them what is added behind the first layers: zeros for text."""
        hidden = self.decoder.embed(token_ids)
        deep = len(self.config.vision.deepstack)
        if features and deep:
            hidden = F.pad(hidden, (0, deep * hidden.shape[1]))
        for (start, end), picture in zip(spans, features, strict=True):
            hidden[start:end] = picture
        return hidden

    def grids(
        self, sizes: Sequence[tuple[int, int]], times: Sequence[tuple[int, ...]] = ()
    ) -> list[Grid]:
        """See ``VisionLanguageModel.grids``."""
        return [self._grid(*each) for each in zip(sizes, times or [()] * len(sizes), strict=True)]
