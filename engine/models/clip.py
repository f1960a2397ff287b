"""CLIP's vision transformer (Radford et al. 2021), as LLaVA uses it: patch features of an inner
layer.

Order: patch convolution, class token, learned positions, ``pre_norm``, pre-norm layers. LLaVA takes
the hidden state before the last layer and drops the class token, so the last layer and CLIP's
``post_layernorm`` are never built. SigLIP's tower has the same layers (``siglip``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.config import ConfigReader
from ..ops.attention import whole_attention
from .layers import Embedding, Patches
from .matrix import Linear


@dataclass(frozen=True)
class ClipConfig:
    """Shape of a vision tower; ``layers`` counts those on disk, ``used_layers`` those that run.

    ``dropped`` counts the features in front that are not used: the class token's, unless a model
    says otherwise.
    """

    leading: ClassVar[int] = 1  # features before the patches': the class token's
    activations: ClassVar[tuple[str, ...]] = ("quick_gelu", "gelu")

    hidden: int
    layers: int
    used_layers: int
    heads: int
    mlp: int
    patch: int
    image: int
    norm_eps: float
    activation: str
    dropped: int = 1

    @property
    def grid(self) -> int:
        """Patches along a side: 336 / 14 = 24."""
        return self.image // self.patch

    @property
    def patches(self) -> int:
        """Patches of one picture: 24 * 24 = 576."""
        return self.grid**2

    @property
    def features(self) -> int:
        """Image tokens of one picture: 576."""
        return self.patches + self.leading - self.dropped

    def tiles_within(self, memory: int, item: int) -> int:
        """Pictures, at least one, that a layer can take at once in ``memory`` bytes.

        Alive at a layer's widest place are the MLP's two wide tensors and about six narrow ones.
        ViT-L/14-336 in fp32: 577 * (2 * 4096 + 6 * 1024) * 4 = 33 MB each, so 32 in 1 GiB.
        """
        each = (self.patches + self.leading) * (2 * self.mlp + 6 * self.hidden) * item
        return max(1, memory // each)

    @classmethod
    def parse(cls, config: ConfigReader, feature_layer: int, dropped: int = 1) -> Self:
        """Read a vision_config; absent keys take CLIPVisionConfig's defaults (quick_gelu among
        them).

        ``feature_layer`` indexes the hidden states [after pre_norm, after layer 0, ...]: with 24
        layers, -2 is the state after layer 22, so 23 layers run.
        """
        config.text("model_type", "clip_vision_model", ("clip_vision_model", "clip"))
        return cls._parse(config, feature_layer, dropped, image=224, patch=32, eps=1e-5)

    @classmethod
    def _parse(
        cls,
        config: ConfigReader,
        feature_layer: int,
        dropped: int,
        *,
        image: int,
        patch: int,
        eps: float,
    ) -> Self:
        """What both towers name alike; ``image``, ``patch`` and ``eps`` are defaults."""
        layers = config.integer("num_hidden_layers", 12, high=1000)
        hidden = config.integer("hidden_size", 768)
        heads = config.integer("num_attention_heads", 12)
        if hidden % heads:
            raise config.fail("hidden_size", f"is {hidden}, which {heads} heads do not divide")
        used = feature_layer + layers + 1 if feature_layer < 0 else feature_layer
        if not 0 <= used <= layers:
            raise config.fail(
                "num_hidden_layers", f"is {layers}; feature layer {feature_layer} does not exist"
            )
        image, patch = config.integer("image_size", image), config.integer("patch_size", patch)
        if image < patch:
            raise config.fail("image_size", f"is {image}, smaller than one patch of {patch}")
        return cls(
            hidden=hidden,
            layers=layers,
            used_layers=used,
            heads=heads,
            mlp=config.integer("intermediate_size", 3072),
            patch=patch,
            image=image,
            norm_eps=config.number("layer_norm_eps", eps),
            activation=config.text("hidden_act", cls.activations[0], cls.activations),
            dropped=dropped,
        )


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class ClipLayer(nn.Module):
    """One pre-norm transformer layer with biases everywhere."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(hidden, config.norm_eps)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(hidden, hidden) for _ in range(4)
        )
        self.norm2 = nn.LayerNorm(hidden, config.norm_eps)
        self.fc1 = Linear(hidden, config.mlp)
        self.fc2 = Linear(config.mlp, hidden)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """One layer over ``hidden [pictures, patches + 1, hidden]``."""
        normed = self.norm1(hidden)
        q, k, v = (
            project(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = whole_attention(q, k, v).transpose(1, 2).flatten(2)
        hidden = hidden + self.out_proj(attended)
        return hidden + self.fc2(self.activation(self.fc1(self.norm2(hidden))))


class ClipVision(nn.Module):
    """The vision tower up to its feature layer."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.dropped = config.dropped
        self.patch_embedding = Patches(config.patch, config.hidden)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden))
        self.position_embedding = Embedding(config.patches + 1, config.hidden)
        self.pre_norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.used_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """Features ``[pictures, features, hidden]`` of ``pixels [pictures, 3, size, size]``."""
        patches = self.patch_embedding(pixels)
        class_token = self.class_embedding.expand(len(pixels), 1, -1)
        hidden = torch.cat([class_token, patches], 1) + self.position_embedding.weight
        hidden = self.pre_norm(hidden)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[:, self.dropped :]
