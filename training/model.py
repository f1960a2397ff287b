"""The model in training form: CLIP tower, projector and Llama decoder with fused matrices.

It differs from the published form only in that q/k/v and gate/up are one matrix each, and that
any subset of the 576 patches may be fed (positions stay those of the full grid).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.page import GRID, PATCH

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes; the defaults are those of `weights/tiny`."""

    vocab: int = 1024
    vision_dim: int = 192
    vision_layers: int = 6
    vision_heads: int = 3
    vision_mlp: int = 768
    dim: int = 256
    layers: int = 8
    heads: int = 8
    mlp: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain attention on `[batch, heads, length, head_dim]`; returns output and weights."""
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1).to(v.dtype)
    return weights @ v, weights


def by_head(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


class VisionLayer(nn.Module):
    """One pre-norm CLIP block: attention with biases, then a quick_gelu MLP."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads = c.vision_heads
        self.norm1 = nn.LayerNorm(c.vision_dim)
        self.qkv = nn.Linear(c.vision_dim, 3 * c.vision_dim)
        self.out = nn.Linear(c.vision_dim, c.vision_dim)
        self.norm2 = nn.LayerNorm(c.vision_dim)
        self.fc1 = nn.Linear(c.vision_dim, c.vision_mlp)
        self.fc2 = nn.Linear(c.vision_mlp, c.vision_dim)

    def forward(self, x: Tensor) -> Tensor:
        """States `[B, N, dim]` -> the same shape."""
        q, k, v = (by_head(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y, _ = _attend(q, k, v, None)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.fc1(self.norm2(x))
        return x + self.fc2(h * torch.sigmoid(1.702 * h))


def grid_positions(dim: int) -> Tensor:
    """2-D sine/cosine start values for the learned positions, `[577, dim]` (class token first)."""
    quarter = dim // 4
    freq = 1.0 / 100.0 ** (torch.arange(quarter) / quarter)
    line = torch.arange(GRID)[:, None] * freq
    wave = torch.cat([line.sin(), line.cos()], -1)
    rows = wave[:, None].expand(-1, GRID, -1)
    columns = wave[None].expand(GRID, -1, -1)
    grid = torch.cat([rows, columns], -1).reshape(GRID * GRID, dim)
    return 0.3 * torch.cat([torch.zeros(1, dim), grid])


class Vision(nn.Module):
    """The tower; takes raw uint8 patches so that only the chosen ones are computed."""

    mean: Tensor
    std: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * PATCH * PATCH, c.vision_dim, bias=False)
        self.class_token = nn.Parameter(0.02 * torch.randn(c.vision_dim))
        self.position = nn.Parameter(grid_positions(c.vision_dim))
        self.pre_norm = nn.LayerNorm(c.vision_dim)
        self.blocks = nn.ModuleList(VisionLayer(c) for _ in range(c.vision_layers))
        area = PATCH * PATCH
        for name, values in (("mean", MEAN), ("std", STD)):
            flat = torch.tensor(values).repeat_interleave(area)
            self.register_buffer(name, flat, persistent=False)

    def forward(self, pixels: Tensor, index: Tensor) -> Tensor:
        """Pixels `[B, N, 588]` uint8 (channel-major), index `[B, N]` -> features `[B, N, dim]`."""
        x = self.patch((pixels.float() / 255 - self.mean) / self.std)
        first = self.class_token.expand(x.shape[0], 1, -1).to(x.dtype)
        place = torch.cat(
            [self.position[:1].expand(x.shape[0], 1, -1), self.position[1:][index]], 1
        )
        x = self.pre_norm(torch.cat([first, x], 1) + place)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the last axis is normalised."""
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE; cos and sin are `[B, 1, L, head_dim / 2]`."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


Cache = list[tuple[Tensor, Tensor]]


class DecoderLayer(nn.Module):
    """One Llama block; `cache` holds this layer's earlier keys and values, if any."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.norm1 = RMSNorm(c.dim, c.norm_eps)
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.out = nn.Linear(c.dim, c.dim, bias=False)
        self.norm2 = RMSNorm(c.dim, c.norm_eps)
        self.gate_up = nn.Linear(c.dim, 2 * c.mlp, bias=False)
        self.down = nn.Linear(c.mlp, c.dim, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """New states, attention weights, and all keys and values so far."""
        q, k, v = (by_head(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y, weights = _attend(q, k, v, mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up), weights, (k, v)


class Decoder(nn.Module):
    """The Llama decoder without its head."""

    frequency: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(c.vocab, c.dim)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.blocks = nn.ModuleList(DecoderLayer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        half = c.dim // c.heads // 2
        frequency = c.rope_theta ** (-torch.arange(half) / half)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        mask: Tensor,
        cache: Cache | None = None,
        watch: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Cache]:
        """States `[B, L, dim]`; also the attention weights of block `watch` and the new cache."""
        angle = (position[..., None].float() * self.frequency)[:, None]
        cos, sin = angle.cos(), angle.sin()
        seen, grown = None, []
        for i, block in enumerate(self.blocks):
            x, weights, pair = block(x, cos, sin, mask, cache[i] if cache else None)
            grown.append(pair)
            if i == watch:
                seen = weights
        return self.norm(x), seen, grown


class TinyLlava(nn.Module):
    """Tower, projector, decoder and head; output projections start at zero."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.vision = Vision(c)
        self.linear_1 = nn.Linear(c.vision_dim, c.dim)
        self.linear_2 = nn.Linear(c.dim, c.dim)
        self.decoder = Decoder(c)
        self.head = nn.Linear(c.dim, c.vocab, bias=False)
        for module in self.modules():
            if isinstance(module, VisionLayer):
                nn.init.zeros_(module.out.weight)
                nn.init.zeros_(module.fc2.weight)
            elif isinstance(module, DecoderLayer):
                nn.init.zeros_(module.out.weight)
                nn.init.zeros_(module.down.weight)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(c.dim) / 4)

    def project(self, features: Tensor) -> Tensor:
        """Tower features -> decoder inputs, by the two-layer projector."""
        return self.linear_2(F.gelu(self.linear_1(features)))


def parameters_in(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
