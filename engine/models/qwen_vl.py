"""Qwen-VL and Qwen-VL-Chat, first generation (Bai et al. 2023).

The decoder is the one decoder with two rules for sequences longer than its training length of 2048:
the rotary base grows with the prompt (dynamic NTK), and queries at later positions are scaled by
the logarithm of their position (logn). A picture is 256 tokens between ``<img>`` and ``</img>``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.config import ConfigReader
from ..ops.rotary import Tables, turned
from ..pictures.preprocess import Pixels
from ..prompts.rank_vocabulary import SPECIALS, special_ids
from .decoder import Decoder, DecoderConfig, Grid, Rotation
from .qwen_vision import QwenVision, QwenVisionConfig
from .vision_language import VisionLanguageModel


@dataclass(frozen=True)
class QwenVlConfig:
    """A Qwen-VL.

    ``trained`` is the training length; ``ntk`` and ``logn`` say whether the two rules for longer
    sequences are on.
    """

    decoder: DecoderConfig
    vision: QwenVisionConfig
    image_start: int
    trained: int
    ntk: bool
    logn: bool

    @property
    def specials(self) -> dict[str, int]:
        """Ids of the special tokens."""
        return special_ids(self.image_start)

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> QwenVlConfig:
        """Read config.json; raises CheckpointError naming the key that is wrong."""
        top = ConfigReader(config, "config.json")
        _refuse_others(top)
        vision = QwenVisionConfig.parse(top.section("visual"))
        decoder = _parse_decoder(top)
        if vision.output != decoder.hidden:
            problem = f"is {vision.output}, the decoder's hidden_size is {decoder.hidden}"
            raise top.section("visual").fail("output_dim", problem)
        low = SPECIALS.index("<img>") + 256
        start = top.section("visual").integer("image_start_id", low=low, high=decoder.vocab - 3)
        return cls(
            decoder=decoder,
            vision=vision,
            image_start=start,
            trained=top.integer("seq_length", 2048),
            ntk=top.flag("use_dynamic_ntk", True),
            logn=top.flag("use_logn_attn", True),
        )


def _refuse_others(top: ConfigReader) -> None:
    """Refuse relatives that share the model type."""
    if "visual" not in top.values:
        raise top.unsupported(
            "visual", "is missing: a Qwen without a vision tower is not supported"
        )
    if not top.flag("no_bias", True):
        raise top.unsupported("no_bias", "is false: biases in every linear layer are not supported")
    if top.number("rotary_pct", 1.0) != 1.0:
        raise top.unsupported("rotary_pct", "must be 1.0: partly rotated heads are not supported")


def _parse_decoder(top: ConfigReader) -> DecoderConfig:
    """The decoder's shape; ``intermediate_size`` counts both halves of the gated MLP."""
    heads = top.integer("num_attention_heads")
    return DecoderConfig(
        vocab=top.integer("vocab_size"),
        hidden=top.integer("hidden_size"),
        layers=top.integer("num_hidden_layers", high=1000),
        heads=heads,
        kv_heads=heads,
        head_dim=top.integer("kv_channels"),
        mlp=top.integer("intermediate_size") // 2,
        rope_theta=top.number("rotary_emb_base", 10000.0),
        norm_eps=top.number("layer_norm_epsilon", 1e-6),
        qkv_bias=True,
        tied_head=top.flag("tie_word_embeddings", False),
        context=top.integer("max_position_embeddings", 8192),
    )


class QwenRotation(Rotation):
    """Rotary embedding whose base follows the prompt, and queries that grow with their position.

    With a prompt of n tokens and training length t, ``alpha = 2^ceil(log2(n / t) + 1) - 1``, at
    least 1, and the base is ``theta * alpha^(d / (d - 2))``. It is chosen at a sequence's first
    prefill and kept while it is decoded, because the cached keys are rotated with it: how many
    tokens that prefill had is the one word of the rotary state.
    At t = 2048, prompts of up to 2048 / 4096 / 8192 tokens give 1 / 3 / 7.
    A query at position p >= t is multiplied by ``log(p + 1) / log(t)``.
    """

    def __init__(self, config: QwenVlConfig, device: torch.device | str) -> None:
        decoder = config.decoder
        super().__init__(decoder.head_dim, decoder.rope_theta, device)
        self.config = config

    def begin(
        self,
        tokens: int,
        past: Tensor | None = None,
        spans: Sequence[tuple[int, int]] = (),
        grids: Sequence[Grid] = (),
    ) -> Tensor:
        """See ``Rotation.begin``."""
        first = torch.tensor([tokens], device=self.frequencies.device)
        return first if past is None or not len(past) else past

    def tables(self, positions: Tensor, rotary: Tensor, dtype: torch.dtype) -> Tables:
        """See ``Rotation.tables``: in fp32 whatever the model is in, as published."""
        angles = positions[:, None].float() * self._frequencies(rotary[:, 0])
        tables = turned(angles, torch.float32)
        if not self.config.logn:
            return tables
        length = (positions + 1).clamp(min=self.config.trained).double()
        scale = length.log() / math.log(self.config.trained)
        return tables._replace(scale=scale.to(dtype)[:, None, None])

    def _frequencies(self, opening: Tensor) -> Tensor:
        """Frequencies ``[1 or rows, head_dim / 2]`` for prompts of ``opening`` tokens."""
        if not self.config.ntk:
            return self.frequencies
        ratio = opening.double() / self.config.trained
        alpha = ((ratio.log2() + 1).ceil().exp2() - 1).clamp(min=1)
        size = 2 * len(self.frequencies)
        exponent = torch.arange(0, size, 2, device=opening.device) / (size - 2)
        return self.frequencies * (alpha[:, None] ** -exponent.double()).float()


class QwenDecoder(Decoder):
    """The decoder with Qwen's rules for long sequences."""

    def __init__(self, config: QwenVlConfig) -> None:
        super().__init__(config.decoder)
        self.rules = config

    def make_rotation(self, device: torch.device) -> Rotation:
        """See ``Decoder.make_rotation``."""
        return QwenRotation(self.rules, device)


class QwenVl(VisionLanguageModel):
    """The joined model."""

    vision: QwenVision

    def __init__(self, config: QwenVlConfig) -> None:
        super().__init__()
        self.config = config
        self.image_token = config.specials["<imgpad>"]
        self.vision = QwenVision(config.vision)
        self.decoder = QwenDecoder(config)

    def image_tokens(self, pixels: Pixels) -> int:
        """Tokens that a picture takes between its tags: 256."""
        return self.config.vision.queries * len(pixels.tiles)

    def encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Image tokens ``[256, hidden]`` of every picture; all pass the vision tower at once."""
        weight = self.vision.patch_embedding.weight
        tiles = torch.cat([picture.tiles for picture in pictures]).to(weight.device, weight.dtype)
        features = self.vision(tiles).split([len(picture.tiles) for picture in pictures])
        return [picture.flatten(0, 1) for picture in features]
