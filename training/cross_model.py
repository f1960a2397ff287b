"""The small Llama-3.2-Vision in training form: tower over four tiles, text layers, cross layers.

Every page is 336 pixels wide and high: a canvas of 2 x 2 tiles of 168, each of 12 x 12 patches.
Any subset of the patches may be fed, as in `model.py`. The rows that fill up a tile are alike
within it, so one of each stands for all seven, with a bias on its logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model import MEAN, STD, RMSNorm, by_head, grid_positions, rotated
from training.page import GRID, PATCH

TILES = 4
SIDE = GRID // 2  # patches along a tile
TILE_FEATURES = SIDE * SIDE + 1
FILLING = -TILE_FEATURES % 8  # rows that fill up a tile
CANVAS = 6  # the row of (2, 2) in the tables of tiles; row 0 is of no picture


@dataclass(frozen=True)
class CrossConfig:
    """Sizes; the defaults are those of `weights/cross`."""

    vocab: int = 1088
    vision_dim: int = 128
    vision_layers: int = 5
    global_layers: int = 1
    vision_heads: int = 4
    vision_mlp: int = 384
    states: tuple[int, ...] = (2, 4)
    dim: int = 256
    layers: int = 7
    cross: tuple[int, ...] = (1, 3, 5)
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 384
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def width(self) -> int:
        """Numbers in a feature."""
        return self.vision_dim * (1 + len(self.states))


def tile_places(index: Tensor) -> Tensor:
    """Patches of the page's grid as places among all tiles' features, class tokens counted.

    >>> tile_places(torch.tensor([0, 11, 12, 24, 575])).tolist()
    [1, 12, 146, 13, 579]
    """
    row, column = index // GRID, index % GRID
    tile = (row // SIDE) * 2 + column // SIDE
    return tile * TILE_FEATURES + 1 + (row % SIDE) * SIDE + column % SIDE


class TowerLayer(nn.Module):
    """One pre-norm layer without biases in attention; ``gated``: both halves through gates."""

    def __init__(self, c: CrossConfig, gated: bool) -> None:
        super().__init__()
        self.heads = c.vision_heads
        self.norm1, self.norm2 = nn.LayerNorm(c.vision_dim), nn.LayerNorm(c.vision_dim)
        self.qkv = nn.Linear(c.vision_dim, 3 * c.vision_dim, bias=False)
        self.out = nn.Linear(c.vision_dim, c.vision_dim, bias=False)
        self.fc1 = nn.Linear(c.vision_dim, c.vision_mlp)
        self.fc2 = nn.Linear(c.vision_mlp, c.vision_dim)
        self.gates = nn.Parameter(torch.full((2,), 0.5)) if gated else None

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``x [B, own + TILES, dim]``, the filling rows last; ``bias [own + TILES]`` of keys."""
        q, k, v = (by_head(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        own = x.shape[1] - TILES
        both = bias.to(q.dtype).expand(own, -1)
        y = F.scaled_dot_product_attention(q[:, :, :own], k, v, both)
        fill = F.scaled_dot_product_attention(q[:, :, own:], k[:, :, :own], v[:, :, :own])
        y = torch.cat([y, fill], 2).transpose(1, 2).flatten(2)
        attn, mlp = (1.0, 1.0) if self.gates is None else self.gates.tanh()
        x = x + attn * self.out(y)
        return x + mlp * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TileTable(nn.Module):
    """A vector for each of so many places of the 2 x 2 tiles, added through a gate."""

    def __init__(self, places: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(TILES, places, dim))
        self.gate = nn.Parameter(torch.full((1,), 0.5))

    def forward(self) -> Tensor:
        """``[tiles, places, dim]``."""
        return self.table * self.gate.tanh()


class CrossTower(nn.Module):
    """The tower; takes raw uint8 patches so that only the chosen ones are computed."""

    mean: Tensor
    std: Tensor

    def __init__(self, c: CrossConfig) -> None:
        super().__init__()
        self.states = c.states
        self.patch = nn.Linear(3 * PATCH * PATCH, c.vision_dim, bias=False)
        self.class_token = nn.Parameter(0.02 * torch.randn(c.vision_dim))
        self.position = nn.Parameter(0.02 * torch.randn(TILE_FEATURES, c.vision_dim))
        self.places = TileTable(TILE_FEATURES, c.vision_dim)
        with torch.no_grad():  # the grid of the whole page, as tiny's tower had at the start
            grid = grid_positions(c.vision_dim)[1:] / math.tanh(0.5)
            flat = self.places.table.view(-1, c.vision_dim)
            flat[tile_places(torch.arange(GRID * GRID))] = grid
        self.pre_tile, self.post_tile = TileTable(1, c.vision_dim), TileTable(1, c.vision_dim)
        self.pre_norm, self.post_norm = nn.LayerNorm(c.vision_dim), nn.LayerNorm(c.vision_dim)
        self.blocks = nn.ModuleList(TowerLayer(c, False) for _ in range(c.vision_layers))
        self.global_blocks = nn.ModuleList(TowerLayer(c, True) for _ in range(c.global_layers))
        for name, values in (("mean", MEAN), ("std", STD)):
            flat = torch.tensor(values).repeat_interleave(PATCH * PATCH)
            self.register_buffer(name, flat, persistent=False)

    def forward(self, pixels: Tensor, index: Tensor) -> Tensor:
        """Pixels ``[B, N, 588]`` uint8, index ``[B, N]`` -> ``[B, TILES + N, width]``: the tiles'
        class tokens first.
        """
        b, place = len(index), tile_places(index)
        tile, within = place // TILE_FEATURES, place % TILE_FEATURES
        every = torch.arange(TILES, device=index.device).expand(b, -1)
        tile, within = torch.cat([every, tile], 1), torch.cat([0 * every, within], 1)
        x = self.patch((pixels.float() / 255 - self.mean) / self.std)
        x = x + self.pre_tile()[tile[:, TILES:], 0]
        x = torch.cat([self.class_token.expand(b, TILES, -1).to(x.dtype), x], 1)
        shared = self.position * (1 - self.places.gate.tanh())
        x = self.pre_norm(x + shared[within] + self.places()[tile, within])
        own = x.shape[1]
        x = torch.cat([x, x.new_zeros(b, TILES, x.shape[2])], 1)
        bias = torch.zeros(own + TILES, device=x.device)
        bias[own:] = math.log(FILLING)
        before = []
        for number, block in enumerate(self.blocks):
            if number in self.states:
                before.append(x)
            x = block(x, bias)
        x = self.post_norm(x) + self.post_tile()[torch.cat([tile, every], 1), 0]
        for block in self.global_blocks:
            x = block(x, bias)
        inner = torch.stack(before, -1).flatten(2)
        return torch.cat([x, inner], -1)[:, :own]


class Mlp(nn.Module):
    """Llama's gated MLP behind its norm."""

    def __init__(self, c: CrossConfig) -> None:
        super().__init__()
        self.norm2 = RMSNorm(c.dim, c.norm_eps)
        self.gate_up = nn.Linear(c.dim, 2 * c.mlp, bias=False)
        self.down = nn.Linear(c.mlp, c.dim, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, dim]``, to be added to ``x``."""
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def _weighed(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Attention weights ``[B, heads, L, M]``, every key head serving so many heads in a row."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    return scores.softmax(-1)


class SelfLayer(nn.Module):
    """One Llama layer with grouped heads."""

    def __init__(self, c: CrossConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = c.heads, c.kv_heads
        self.norm1 = RMSNorm(c.dim, c.norm_eps)
        self.q = nn.Linear(c.dim, c.dim, bias=False)
        self.kv = nn.Linear(c.dim, 2 * c.dim // c.heads * c.kv_heads, bias=False)
        self.out = nn.Linear(c.dim, c.dim, bias=False)
        self.mlp = Mlp(c)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """``[B, L, dim]``; ``mask [B, 1, L, L]``."""
        normed = self.norm1(x)
        q = rotated(by_head(self.q(normed), self.heads), cos, sin)
        k, v = (by_head(t, self.kv_heads) for t in self.kv(normed).chunk(2, -1))
        weights = _weighed(q, rotated(k, cos, sin), mask).to(v.dtype)
        y = weights @ v.repeat_interleave(self.heads // self.kv_heads, 1)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class CrossLayer(nn.Module):
    """Gated attention over features, queries and keys normed head by head, and a gated MLP."""

    def __init__(self, c: CrossConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = c.heads, c.kv_heads
        head_dim = c.dim // c.heads
        self.norm1 = RMSNorm(c.dim, c.norm_eps)
        self.q = nn.Linear(c.dim, c.dim, bias=False)
        self.kv = nn.Linear(c.dim, 2 * head_dim * c.kv_heads, bias=False)
        self.out = nn.Linear(c.dim, c.dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head_dim, c.norm_eps), RMSNorm(head_dim, c.norm_eps)
        for norm in (self.q_norm, self.k_norm):  # sharp from the start: logits up to 20
            nn.init.constant_(norm.weight, 1.9)
        self.gates = nn.Parameter(torch.full((2,), 0.7))
        self.mlp = Mlp(c)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, features: Tensor, sees: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, L, dim]`` and attention's weights; ``sees [L, 1]`` is 0 where nothing is seen."""
        q = self.q_norm(by_head(self.q(self.norm1(x)), self.heads))
        k, v = (by_head(t, self.kv_heads) for t in self.kv(features).chunk(2, -1))
        weights = _weighed(q, self.k_norm(k), None)
        y = weights.to(v.dtype) @ v.repeat_interleave(self.heads // self.kv_heads, 1)
        attn, mlp = self.gates.tanh()
        x = x + sees * attn * self.out(y.transpose(1, 2).flatten(2))
        return x + sees * mlp * self.mlp(x), weights


class TinyMllama(nn.Module):
    """Tower, projector, decoder and head."""

    frequency: Tensor

    def __init__(self, c: CrossConfig) -> None:
        super().__init__()
        self.config = c
        self.vision = CrossTower(c)
        self.linear_1 = nn.Linear(c.width, c.dim)
        self.embed = nn.Embedding(c.vocab + 8, c.dim)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.blocks = nn.ModuleList(
            CrossLayer(c) if i in c.cross else SelfLayer(c) for i in range(c.layers)
        )
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.head = nn.Linear(c.dim, c.vocab, bias=False)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(c.dim) / 4)
        half = c.dim // c.heads // 2
        frequency = c.rope_theta ** (-torch.arange(half) / half)
        self.register_buffer("frequency", frequency, persistent=False)

    def project(self, features: Tensor) -> Tensor:
        """What cross layers look at."""
        return self.linear_1(features)

    def forward(
        self, ids: Tensor, features: Tensor, position: Tensor, mask: Tensor, sees: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """States ``[B, L, dim]``, and every cross layer's weights ``[B, heads, L, M]``."""
        angle = (position[..., None].float() * self.frequency)[:, None]
        cos, sin = angle.cos(), angle.sin()
        x, looked = self.embed(ids), []
        for block in self.blocks:
            if isinstance(block, CrossLayer):
                x, weights = block(x, features, sees)
                looked.append(weights)
            else:
                x = block(x, cos, sin, mask)
        return self.norm(x), looked
