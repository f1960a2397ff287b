"""SigLIP's vision transformer (Zhai et al. 2023), as LLaVA-OneVision and many LLaVAs since use it.

CLIP's layers with a tanh GELU; no class token and no norm in front, but a bias of the patches. The
state that is taken lies before ``post_layernorm`` and the pooling head, which are never built. A
side that patches do not divide loses the rest: of 384 pixels 27 patches of 14 leave 6 unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, nn

from ..checkpoint.config import ConfigReader
from .clip import ClipConfig, ClipLayer
from .layers import Embedding, Patches


@dataclass(frozen=True)
class SiglipConfig(ClipConfig):
    """Shape of a tower; ``dropped`` is 1 where a model takes the first patch for a class token."""

    leading: ClassVar[int] = 0
    activations: ClassVar[tuple[str, ...]] = ("gelu_pytorch_tanh", "gelu", "quick_gelu")

    @classmethod
    def parse(cls, config: ConfigReader, feature_layer: int, dropped: int = 0) -> Self:
        """Read a vision_config; absent keys take SiglipVisionConfig's defaults. See ``ClipConfig``;
        the first hidden state is that after the positions.
        """
        config.text("model_type", "siglip_vision_model", ("siglip_vision_model", "siglip"))
        return cls._parse(config, feature_layer, dropped, image=224, patch=16, eps=1e-6)


class SiglipVision(nn.Module):
    """The vision tower up to its feature layer."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.dropped = config.dropped
        self.patch_embedding = Patches(config.patch, config.hidden, bias=True)
        self.position_embedding = Embedding(config.patches, config.hidden)
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.used_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """Features ``[pictures, features, hidden]`` of ``pixels [pictures, 3, size, size]``."""
        hidden = self.patch_embedding(pixels) + self.position_embedding.weight
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[:, self.dropped :]
