"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one ViT over the patches of a picture.

Patches of any number, with rotary embedding over rows and columns; all of them attend each other,
in Qwen2.5-VL only those of a window of 112 pixels in most layers. At the end the patches of a cell
become one token. What the three differ in is said by ``TowerConfig``: Qwen2.5 has RMSNorm, a gated
MLP and windows, Qwen3 learned positions beside the rotary ones, and features of inner layers as
well, which the decoder takes in layer by layer (*deepstack*, arXiv 2406.04334).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import whole_attention
from ..ops.products import many_rows
from ..ops.rotary import Tables, rotated, turned
from ..pictures.patches import Cells
from .clip import ACTIVATIONS
from .layers import RMSNorm
from .matrix import Linear

NORM_EPS = 1e-6
FRAMES = 2  # of a patch: a still picture shows the same in both
_THETA = 10000.0


@dataclass(frozen=True)
class TowerConfig:
    """Shape of a tower.

    Attributes:
        hidden, layers, heads, mlp: of its blocks.
        output: width of an image token.
        gated: RMSNorm and a gated MLP, in place of LayerNorm and a plain one.
        activation: of the MLP.
        patch_bias: whether the patch embedding has one.
        window: side of a window in pixels; 0: no layer has windows.
        whole: layers that attend the whole picture where others have windows.
        positions: side of the grid of learned positions; 0: none.
        deepstack: layers behind which features are taken for the decoder's first layers.
    """

    hidden: int
    layers: int
    heads: int
    mlp: int
    output: int
    gated: bool = False
    activation: str = "quick_gelu"
    patch_bias: bool = False
    window: int = 0
    whole: tuple[int, ...] = ()
    positions: int = 0
    deepstack: tuple[int, ...] = ()


class TowerLayer(nn.Module):
    """One pre-norm block; ``qkv`` gives queries, keys and values one behind the other."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        hidden, mlp = config.hidden, config.mlp
        self.heads, self.gated = config.heads, config.gated
        self.activation = ACTIVATIONS[config.activation]
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.qkv, self.proj = Linear(hidden, 3 * hidden), Linear(hidden, hidden)
        if config.gated:
            self.gate_proj, self.up_proj = Linear(hidden, mlp), Linear(hidden, mlp)
            self.down_proj = Linear(mlp, hidden)
        else:
            self.fc1, self.fc2 = Linear(hidden, mlp), Linear(mlp, hidden)

    def forward(self, hidden: Tensor, tables: Tables, windows: list[Tensor] | None) -> Tensor:
        """One layer over ``hidden [patches, hidden]``; patches attend those of their window."""
        qkv = self.qkv(self.norm1(hidden)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, k = (rotated(x.float(), tables).to(x.dtype) for x in qkv[:2])
        hidden = hidden + self.proj(_attended(q, k, qkv[2], windows).flatten(1))
        return hidden + self._mlp(self.norm2(hidden))

    def _mlp(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.fc2(self.activation(self.fc1(x)))


def _norm(config: TowerConfig) -> nn.Module:
    kind = RMSNorm if config.gated else nn.LayerNorm
    return kind(config.hidden, NORM_EPS)


def _attended(q: Tensor, k: Tensor, v: Tensor, windows: list[Tensor] | None) -> Tensor:
    """Attention ``[patches, heads, size]`` within each window; None: over all patches."""
    if windows is None:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return whole_attention(q, k, v)[0].transpose(0, 1)
    out = torch.empty_like(q)
    for alike in windows:  # [windows, patches] of one size
        mine = (x[alike].transpose(1, 2) for x in (q, k, v))
        out[alike] = whole_attention(*mine).transpose(1, 2)
    return out


class Merger(nn.Module):
    """The patches of a cell to one token: normed one by one, or ``late`` as one vector."""

    def __init__(self, config: TowerConfig, cells: Cells, *, late: bool = False) -> None:
        super().__init__()
        width = config.hidden * cells.merge**2
        self.width, self.late = width, late
        self.norm = nn.LayerNorm(width, NORM_EPS) if late else _norm(config)
        self.fc1, self.fc2 = Linear(width, width), Linear(width, config.output)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[patches, hidden]`` to ``[cells, output]``."""
        if self.late:
            normed = self.norm(hidden.view(-1, self.width))
        else:
            normed = self.norm(hidden).view(-1, self.width)
        return self.fc2(F.gelu(self.fc1(normed)))


class PatchTower(nn.Module):
    """Pixels to image tokens, and what the decoder's first layers take in beside them."""

    def __init__(self, config: TowerConfig, cells: Cells) -> None:
        super().__init__()
        self.config, self.cells = config, cells
        size = (config.hidden, 3, FRAMES, cells.patch, cells.patch)
        self.patches = nn.Module()
        self.patches.weight = nn.Parameter(torch.empty(size))
        if config.patch_bias:
            self.patches.bias = nn.Parameter(torch.empty(config.hidden))
        if config.positions:
            self.positions = nn.Parameter(torch.empty(config.positions**2, config.hidden))
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.layers))
        self.merger = Merger(config, cells)
        self.deep_mergers = nn.ModuleList(
            Merger(config, cells, late=True) for _ in config.deepstack
        )

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features ``[cells, (1 + deepstack) * output]`` of one picture's ``patches [patches, 3,
        patch, patch]``, whose cells are ``grid`` (rows, columns); a slice's have two frames:
        ``[patches, 3, 2, patch, patch]``.
        """
        hidden = self._embedded(patches)
        places = patch_places(grid, self.cells.merge).to(hidden.device)
        if self.config.positions:
            hidden = hidden + self._learned(places, grid).to(hidden.dtype)
        tables = self._tables(places)
        windows = None if not self.config.window else self._windows(grid, hidden.device)
        deep = []
        for number, layer in enumerate(self.layers):
            inside = None if number in self.config.whole else windows
            hidden = layer(hidden, tables, inside)
            if number in self.config.deepstack:
                merger = self.deep_mergers[self.config.deepstack.index(number)]
                deep.append(merger(hidden))
        return torch.cat([self.merger(hidden), *deep], 1)

    def _embedded(self, patches: Tensor) -> Tensor:
        weight, bias = self.patches.weight, getattr(self.patches, "bias", None)
        assert isinstance(weight, Tensor)
        if patches.dim() == 4:
            patches = patches[:, :, None].expand(-1, -1, FRAMES, -1, -1)
        return many_rows(patches.flatten(1), weight.flatten(1), bias)

    def _tables(self, places: Tensor) -> Tables:
        """Half of a head's frequencies turn by rows, half by columns; in fp32."""
        quarter = self.config.hidden // self.config.heads // 4
        exponent = torch.arange(quarter, device=places.device, dtype=torch.float32) / quarter
        angles = places.float()[..., None] * _THETA**-exponent  # [patches, 2, quarter]
        return turned(angles.flatten(1), torch.float32)

    def _learned(self, places: Tensor, grid: tuple[int, int]) -> Tensor:
        """Learned positions, stretched from corner to corner of the picture, in fp32."""
        side, table = self.config.positions, self.positions.float()
        found = torch.zeros(len(places), table.shape[1], device=table.device)
        axes = []
        for axis, cells in enumerate(grid):
            length = cells * self.cells.merge
            stretched = torch.linspace(0, side - 1, length, device=table.device)[places[:, axis]]
            low = stretched.long()
            axes.append((low, (low + 1).clamp(max=side - 1), stretched - low))
        for row_high, column_high in itertools.product((False, True), repeat=2):
            (top, bottom, down), (left, right, across) = axes
            row, share = (bottom, down) if row_high else (top, 1 - down)
            column, part = (right, across) if column_high else (left, 1 - across)
            found += table[row * side + column] * (share * part)[:, None]
        return found

    def _windows(self, grid: tuple[int, int], device: torch.device) -> list[Tensor]:
        """The patches of each window, those of equal size together: ``[windows, patches]``."""
        return [each.to(device) for each in windows_of(grid, self.cells, self.config.window)]


def patch_places(grid: tuple[int, int], merge: int) -> Tensor:
    """Row and column ``[patches, 2]`` of patches that lie cell by cell.

    >>> patch_places((1, 2), 2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    """
    rows, columns = (torch.arange(cells * merge) for cells in grid)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
    cells = places.unflatten(1, (-1, merge)).unflatten(0, (-1, merge))
    return cells.transpose(1, 2).reshape(-1, 2)


def windows_of(grid: tuple[int, int], cells: Cells, window: int) -> list[Tensor]:
    """Indices of patches by window, which are ``window`` pixels wide and cut at the edges; those of
    equal size are rows of one tensor.

    >>> [each.shape for each in windows_of((4, 5), Cells(), 112)]
    [torch.Size([1, 64]), torch.Size([1, 16])]
    """
    rows, columns = grid
    side, each = window // cells.side, cells.merge**2
    numbers = torch.arange(rows * columns).view(rows, columns)
    found: dict[int, list[Tensor]] = {}
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            mine = numbers[top : top + side, left : left + side].flatten()
            patches = (mine[:, None] * each + torch.arange(each)).flatten()
            found.setdefault(len(patches), []).append(patches)
    return [torch.stack(alike) for alike in found.values()]
