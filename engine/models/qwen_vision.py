"""Qwen-VL's vision tower (Bai et al. 2023): a ViT-bigG of open_clip, and a resampler.

448 x 448 pixels become 32 x 32 patches; 48 pre-norm layers without a class token; one layer of
cross-attention from 256 learned queries; 256 image tokens. Both position tables are stored for a
16 x 16 grid and interpolated to 32 x 32. All norms are LayerNorms with eps 1e-6, and GELU is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.config import ConfigReader
from ..ops.attention import whole_attention
from ..ops.products import many_rows
from .layers import Patches
from .matrix import Linear

NORM_EPS = 1e-6
# The resampler's heads are this wide, whatever the model's width.
HEAD_DIM = 128
# Both position tables are stored for a grid of this side.
STORED_GRID = 16


@dataclass(frozen=True)
class QwenVisionConfig:
    """Shape of the vision tower; ``width`` is the transformer's, ``output`` the decoder's."""

    width: int
    layers: int
    heads: int
    mlp: int
    patch: int
    image: int
    output: int
    queries: int

    @property
    def grid(self) -> int:
        """Patches along a side: 448 / 14 = 32."""
        return self.image // self.patch

    @classmethod
    def parse(cls, config: ConfigReader) -> QwenVisionConfig:
        """Read the ``visual`` section; the MLP is ``int(1664 * 4.9231)`` = 8192 wide."""
        width, heads = config.integer("width"), config.integer("heads")
        if width % heads:
            raise config.fail("width", f"is {width}, which {heads} heads do not divide")
        image, patch = config.integer("image_size", high=8192), config.integer("patch_size")
        if image < patch:
            raise config.fail("image_size", f"is {image}, smaller than one patch of {patch}")
        output = config.integer("output_dim")
        if output % HEAD_DIM:
            raise config.fail("output_dim", f"is {output}; it must be a multiple of {HEAD_DIM}")
        ratio = config.number("mlp_ratio")
        if not 1 <= width * ratio < 2**31:
            raise config.fail("mlp_ratio", f"is {ratio:g}; {width} times that is no width")
        queries = config.integer("n_queries", STORED_GRID**2)
        if math.isqrt(queries) ** 2 != queries:
            raise config.fail("n_queries", f"is {queries}; it must be a square number")
        return cls(
            width=width,
            layers=config.integer("layers", high=1000),
            heads=heads,
            mlp=int(width * ratio),
            patch=patch,
            image=image,
            output=output,
            queries=queries,
        )


def interpolate(table: Tensor, grid: int) -> Tensor:
    """Stretch positions ``[n * n, width]`` to ``[grid * grid, width]``: bicubic, in fp32."""
    side = math.isqrt(len(table))
    if side == grid:
        return table
    square = table.float().T.reshape(1, -1, side, side)
    stretched = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return stretched[0].flatten(1).T.to(table.dtype)


class QwenVisionLayer(nn.Module):
    """One pre-norm transformer layer; ``in_proj`` gives q, k and v head by head."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.in_proj = Linear(width, 3 * width)
        self.out_proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.fc1 = Linear(width, config.mlp)
        self.fc2 = Linear(config.mlp, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """One layer over ``hidden [pictures, patches, width]``."""
        packed = self.in_proj(self.norm1(hidden)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = packed.chunk(3, -1)
        attended = whole_attention(q, k, v).transpose(1, 2).flatten(2)
        hidden = hidden + self.out_proj(attended)
        return hidden + self.fc2(F.gelu(self.fc1(self.norm2(hidden))))


class Resampler(nn.Module):
    """Cross-attention from learned queries: any number of patches to 256 tokens.

    Positions are added to queries and keys, not to values; nothing is added back afterwards.
    """

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        output = config.output
        self.grid = config.grid
        self.query = nn.Parameter(torch.empty(config.queries, output))
        self.positions = nn.Parameter(torch.empty(config.queries, output))
        self.kv_proj = Linear(config.width, output, bias=False)
        self.q_norm = nn.LayerNorm(output, NORM_EPS)
        self.kv_norm = nn.LayerNorm(output, NORM_EPS)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(output, output) for _ in range(4)
        )

    def forward(self, patches: Tensor) -> Tensor:
        """``patches [pictures, patches, width]`` to ``[pictures, queries, output]``."""
        values = self.kv_norm(self.kv_proj(patches))
        keys = values + interpolate(self.positions, self.grid)
        queries = self.q_norm(self.query) + self.positions
        q, k, v = (
            x.unflatten(-1, (-1, HEAD_DIM)).transpose(-3, -2)
            for x in (self.q_proj(queries), self.k_proj(keys), self.v_proj(values))
        )
        q = q.expand(len(patches), -1, -1, -1)
        return self.out_proj(whole_attention(q, k, v).transpose(1, 2).flatten(2))


class QwenVision(nn.Module):
    """Pixels to image tokens in the decoder's width."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = Patches(config.patch, config.width)
        self.positions = nn.Parameter(torch.empty(STORED_GRID**2, config.width))
        self.pre_norm = nn.LayerNorm(config.width, NORM_EPS)
        self.layers = nn.ModuleList(QwenVisionLayer(config) for _ in range(config.layers))
        self.resampler = Resampler(config)
        self.post_norm = nn.LayerNorm(config.output, NORM_EPS)
        self.proj = nn.Parameter(torch.empty(config.output, config.output))

    def forward(self, pixels: Tensor) -> Tensor:
        """Image tokens ``[pictures, 256, output]`` of ``pixels [pictures, 3, size, size]``."""
        patches = self.patch_embedding(pixels)
        hidden = self.pre_norm(patches + interpolate(self.positions, self.config.grid))
        for layer in self.layers:
            hidden = layer(hidden)
        return many_rows(self.post_norm(self.resampler(hidden)), self.proj.T, None)
