"""Llama-3.2-Vision, 11B and 90B: a Llama 3.1 whose cross layers look at pictures sideways.

A picture takes one token, ``<|image|>``, whose own embedding stands there; its features are seen
through cross layers by that token and by those behind it, up to the next picture. A text that sees
no picture passes these layers by.

What tokens do that see no picture while later ones of the same pass do, there are two accounts of:
in Meta's own code (llama-models, ``CrossAttention.forward``) they get nothing of cross layers,
neither of attention nor of the MLP; in transformers the MLP is left out, but attention goes over
all features of the pass, those of absent tiles among them. The weights were trained with the
former, which is what is done here unless config.json says ``"blind_tokens_attend": true``: a key of
ours, for checkpoints that were trained further in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..cache.crossing import Sight
from ..checkpoint.config import ConfigReader, shown
from ..pictures.canvas import canvas_of
from ..pictures.preprocess import Pixels
from .cross_layer import CrossLayer
from .decoder import Decoder, DecoderConfig, DecoderLayer
from .layers import Embedding
from .matrix import Linear
from .mllama_vision import MllamaVision, MllamaVisionConfig
from .vision_language import VisionLanguageModel

# Rows of the embedding behind the vocabulary; the first is that of <|image|>.
_MORE_TOKENS = 8
_CROSS_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)


@dataclass(frozen=True)
class MllamaConfig:
    """A Llama-3.2-Vision.

    ``cross_layers`` are the cross layers' places among all layers; ``blind_attend`` is whether
    tokens that see no picture attend what later ones see.
    """

    decoder: DecoderConfig
    vision: MllamaVisionConfig
    cross_layers: tuple[int, ...]
    image_token: int
    blind_attend: bool
    end_tokens: tuple[int, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> MllamaConfig:
        """Read config.json; raises CheckpointError naming the key that is wrong."""
        top = ConfigReader(config, "config.json")
        text = top.section("text_config")
        cross, decoder = _parse_text(text)
        key = "image_token_id" if "image_token_id" in config else "image_token_index"
        highest = decoder.vocab + _MORE_TOKENS - 1
        return cls(
            decoder=decoder,
            vision=MllamaVisionConfig.parse(top.section("vision_config")),
            cross_layers=cross,
            image_token=top.integer(key, 128256, low=0, high=highest),
            blind_attend=text.flag("blind_tokens_attend", False),
            end_tokens=text.tokens("eos_token_id", ()),
        )


def _parse_text(text: ConfigReader) -> tuple[tuple[int, ...], DecoderConfig]:
    """Places of the cross layers among all, and the shape of the others."""
    text.text("model_type", "mllama_text_model", ("mllama_text_model",))
    layers = text.integer("num_hidden_layers", 40, high=1000)
    cross = text.integers("cross_attention_layers", _CROSS_LAYERS)
    if not 0 < len(set(cross)) == len(cross) < layers or max(cross) >= layers:
        problem = f"are {shown(cross)}; they must be some of {layers} layers"
        raise text.fail("cross_attention_layers", problem)
    given = {key: value for key, value in text.values.items() if value is not None}
    own = {"model_type": "llama", "num_hidden_layers": layers - len(cross)}
    values = _TEXT_DEFAULTS | given | own
    if "rope_theta" not in text.section("rope_parameters").values:
        values.setdefault("rope_theta", 500000.0)
    return tuple(sorted(cross)), DecoderConfig.parse(ConfigReader(values, text.where))


# What transformers' MllamaTextConfig says where a published file is silent.
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}


class MllamaDecoder(Decoder):
    """The decoder with cross layers among its layers, which keep their published numbers."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__(config.decoder)
        shape = config.decoder
        self.embed = Embedding(shape.vocab + _MORE_TOKENS, shape.hidden)
        own, cross = iter(range(shape.layers)), iter(range(len(config.cross_layers)))
        self.layers = nn.ModuleList(
            CrossLayer(shape, next(cross))
            if place in config.cross_layers
            else DecoderLayer(shape, next(own))
            for place in range(shape.layers + len(config.cross_layers))
        )


class Mllama(VisionLanguageModel):
    """The joined model."""

    vision: MllamaVision

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.config = config
        self.image_token = config.image_token
        self.cross_layers = len(config.cross_layers)
        self.most_features = config.vision.tiles * config.vision.tile_features
        self.vision = MllamaVision(config.vision)
        self.projector = Linear(config.vision.width, config.decoder.hidden)
        self.decoder = MllamaDecoder(config)

    def image_tokens(self, pixels: Pixels) -> int:
        """Tokens that a picture takes in the sequence: one."""
        return 1

    def encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Features ``[n, hidden]`` of every picture, up to 6,404; one picture after the other."""
        return [self._encoded(picture) for picture in pictures]

    def _encoded(self, picture: Pixels) -> Tensor:
        weight = self.projector.weight
        canvas = self.canvas(picture.size)
        number = self.config.vision.canvases.index(canvas)
        features = self.vision(picture.tiles.to(weight.device, weight.dtype), number)
        attended = len(features) if self.config.blind_attend else self.seen(picture.size)
        return self.projector(features[:attended])

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles that a picture of ``size`` (width, height) is laid out on."""
        return canvas_of(size, self.config.vision.image, self.config.vision.tiles)

    def seen(self, size: tuple[int, int]) -> int:
        """Features of a picture of ``size`` (width, height) that tokens attend: 1,601 a tile."""
        rows, columns = self.canvas(size)
        return rows * columns * self.config.vision.tile_features

    def embed(
        self, token_ids: Tensor, spans: Sequence[tuple[int, int]], features: Sequence[Tensor]
    ) -> Tensor:
        """Embeddings ``[tokens, hidden]``: features take no places in them."""
        return self.decoder.embed(token_ids)

    def sights(
        self,
        spans: Sequence[tuple[int, int]],
        features: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Sight]:
        """See ``VisionLanguageModel.sights``."""
        blind = [len(each) if self.config.blind_attend else 0 for each in features]
        seen = [self.seen(size) for size in sizes]
        both = zip(spans, features, seen, blind, strict=True)
        return [Sight(end - 1, each, *counts) for (_, end), each, *counts in both]
