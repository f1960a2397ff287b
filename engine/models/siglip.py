"""SigLIP's vision transformer (Zhai et al. 2023), as LLaVA-OneVision uses it: all its patches.

The same layers as CLIP's; the patch embedding has a bias, nothing is normed before the first layer,
and pixels that fill no patch at the right and the bottom are left out (384 = 27 * 14 + 6).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..checkpoint.config import ConfigReader
from .clip import ClipConfig, ClipLayer
from .layers import Embedding, Patches


def parse_siglip(config: ConfigReader, feature_layer: int) -> ClipConfig:
    """Read a vision_config; absent keys take SiglipVisionConfig's defaults."""
    usual = {
        "hidden_size": 768,
        "image_size": 224,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "patch_size": 16,
    }
    act = config.text("hidden_act", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    given = {key: value for key, value in config.values.items() if value is not None}
    values = {**usual, **given, "model_type": "clip_vision_model", "hidden_act": "gelu"}
    parsed = ClipConfig.parse(ConfigReader(values, config.where), feature_layer)
    return replace(parsed, activation=act)


class SiglipVision(nn.Module):
    """The vision tower up to its feature layer."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.patch_embedding = Patches(config.patch, config.hidden, bias=True)
        self.position_embedding = Embedding(config.patches, config.hidden)
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.used_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """Features ``[pictures, patches, hidden]`` of ``pixels [pictures, 3, size, size]``."""
        hidden: Tensor = self.patch_embedding(pixels) + self.position_embedding.weight
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden
