"""Llama-3.2-Vision's tower: one encoder over all tiles of a picture, a gated one on top of it.

A picture always takes as many tiles as there may be; those its canvas lacks are zeros, and so are
the rows that fill up each tile to a multiple of eight. Such rows attend the picture's own rows
alone, and are attended by all: so it was trained, so they cannot be left out. Here the picture's
own rows come first, which makes of the published mask two unmasked calls.

The features are the final state and five intermediate ones. Which ones, there are two accounts of:
index i of ``intermediate_layers_indices`` means the state *before* layer i in Meta's own code
(llama-models, ``ImageTransformer.forward``) and in transformers 4.45 to 4.54, which were released
with the weights, and the state *after* layer i in transformers since 4.56, where a rewriting of
outputs (pull request 39643, then 40083) moved it by one. The weights were trained with the former,
which is what is read here unless config.json says ``"features_after_layer": true``: a key of ours,
for checkpoints that were trained further with a later transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.config import ConfigReader, shown
from ..ops.attention import whole_attention
from ..pictures.canvas import Canvas, canvases
from .layers import Embedding, Patches
from .matrix import Linear

_MULTIPLE = 8  # rows of a tile are filled up to one of these


@dataclass(frozen=True)
class MllamaVisionConfig:
    """Shape of the tower.

    ``states`` are the indices of intermediate states, in their order in the features; ``after``
    says whether they count states after their layers.
    """

    hidden: int
    layers: int
    global_layers: int
    heads: int
    mlp: int
    patch: int
    image: int
    tiles: int
    norm_eps: float
    states: tuple[int, ...]
    after: bool

    @property
    def tile_features(self) -> int:
        """Features of a tile, its class token's first: 40 * 40 + 1 = 1,601."""
        return (self.image // self.patch) ** 2 + 1

    @property
    def filling(self) -> int:
        """Rows that fill up a tile: 7 behind 1,601."""
        return -self.tile_features % _MULTIPLE

    @property
    def width(self) -> int:
        """Numbers in a feature: 6 * 1,280 = 7,680."""
        return self.hidden * (1 + len(self.states))

    @property
    def canvases(self) -> tuple[Canvas, ...]:
        """What a picture may be laid out on."""
        return canvases(self.tiles)

    @classmethod
    def parse(cls, config: ConfigReader) -> MllamaVisionConfig:
        """Read a vision_config; absent keys take transformers' defaults."""
        config.text("model_type", "mllama_vision_model", ("mllama_vision_model",))
        config.text("hidden_act", "gelu", ("gelu",))
        hidden, heads = config.integer("hidden_size", 1280), config.integer("attention_heads", 16)
        if hidden % heads:
            raise config.fail("hidden_size", f"is {hidden}, which {heads} heads do not divide")
        parsed = cls(
            hidden=hidden,
            layers=config.integer("num_hidden_layers", 32, high=1000),
            global_layers=config.integer("num_global_layers", 8, low=0, high=1000),
            heads=heads,
            mlp=config.integer("intermediate_size", 5120),
            patch=config.integer("patch_size", 14),
            image=config.integer("image_size", 448),
            tiles=config.integer("max_num_tiles", 4, high=64),
            norm_eps=config.number("norm_eps", 1e-5),
            states=config.integers("intermediate_layers_indices", (3, 7, 15, 23, 30)),
            after=config.flag("features_after_layer", False),
        )
        parsed._check(config)
        return parsed

    def _check(self, config: ConfigReader) -> None:
        if self.image < self.patch:
            problem = f"is {self.image}, smaller than one patch of {self.patch}"
            raise config.fail("image_size", problem)
        if not self.states or max(self.states) >= self.layers:
            problem = f"are {shown(self.states)}, of {self.layers} layers"
            raise config.fail("intermediate_layers_indices", problem)
        listed = config.values.get("supported_aspect_ratios")
        if listed is not None and listed != [list(canvas) for canvas in self.canvases]:
            problem = f"are not the canvases of up to {self.tiles} tiles"
            raise config.unsupported("supported_aspect_ratios", problem)
        width = config.integer("vision_output_dim", 7680)
        if width != self.width:
            raise config.fail("vision_output_dim", f"is {width}, the states make {self.width}")


class TileEmbedding(Embedding):
    """A vector for every tile, or every place of every tile, by canvas; added through a gate.

    Row 0 is of no picture, row i of canvas i - 1.
    """

    def __init__(self, config: MllamaVisionConfig, places: int = 1) -> None:
        super().__init__(len(config.canvases) + 1, config.tiles * places * config.hidden)
        self.gate = nn.Parameter(torch.empty(1))
        self._size = (config.tiles, places, config.hidden)

    def of(self, canvas: int) -> Tensor:
        """``[tiles, places, hidden]`` of a canvas, counted from 0, times the gate."""
        return self.weight[canvas + 1].view(self._size) * self.gate.tanh()


class MllamaVisionLayer(nn.Module):
    """One pre-norm layer, attention without biases; ``gated``: both halves added through gates."""

    def __init__(self, config: MllamaVisionConfig, gated: bool) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(hidden, config.norm_eps)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(hidden, hidden, bias=False) for _ in range(4)
        )
        self.norm2 = nn.LayerNorm(hidden, config.norm_eps)
        self.fc1 = Linear(hidden, config.mlp)
        self.fc2 = Linear(config.mlp, hidden)
        self.attn_gate = nn.Parameter(torch.empty(1)) if gated else None
        self.mlp_gate = nn.Parameter(torch.empty(1)) if gated else None

    def forward(self, hidden: Tensor, own: int) -> Tensor:
        """One layer over ``hidden [rows, hidden]``, the first ``own`` of them the picture's."""
        hidden = hidden + _gated(self._attention(self.norm1(hidden), own), self.attn_gate)
        mlp = self.fc2(F.gelu(self.fc1(self.norm2(hidden))))
        return hidden + _gated(mlp, self.mlp_gate)

    def _attention(self, normed: Tensor, own: int) -> Tensor:
        q, k, v = (
            project(normed).unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = whole_attention(q[:, :, :own], k, v)
        others = whole_attention(q[:, :, own:], k[:, :, :own], v[:, :, :own])
        return self.out_proj(torch.cat([attended, others], 2)[0].transpose(0, 1).flatten(1))


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate.tanh()


class MllamaVision(nn.Module):
    """The whole tower."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = Patches(config.patch, config.hidden)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden))
        self.positions = nn.Parameter(torch.empty(config.tile_features, config.hidden))
        self.tile_positions = TileEmbedding(config, config.tile_features)
        self.pre_tile, self.post_tile = TileEmbedding(config), TileEmbedding(config)
        self.pre_norm, self.post_norm = nn.LayerNorm(config.hidden), nn.LayerNorm(config.hidden)
        self.layers = nn.ModuleList(
            MllamaVisionLayer(config, gated=False) for _ in range(config.layers)
        )
        self.global_layers = nn.ModuleList(
            MllamaVisionLayer(config, gated=True) for _ in range(config.global_layers)
        )

    def forward(self, tiles: Tensor, canvas: int) -> Tensor:
        """Features ``[tiles that may be * tile_features, width]``, those of absent tiles last, of
        one picture's ``tiles [tiles, 3, size, size]``; ``canvas`` counts from 0.
        """
        config, used = self.config, len(tiles)
        rows = _Rows(used, config)
        hidden, states = rows.ordered(self._embedded(tiles, canvas)), dict[int, Tensor]()
        for number, layer in enumerate(self.layers):
            before, hidden = hidden, layer(hidden, rows.own)
            if number in config.states:
                states[number] = rows.features(hidden if config.after else before)
        hidden = self.post_norm(hidden) + rows.of_tiles(self.post_tile.of(canvas)[:, 0])
        for layer in self.global_layers:
            hidden = layer(hidden, rows.own)
        # The states are interleaved: number c of state s is number c * states + s of what follows.
        inner = torch.stack([states[number] for number in config.states], -1).flatten(1)
        return torch.cat([rows.features(hidden), inner], 1)

    def _embedded(self, tiles: Tensor, canvas: int) -> Tensor:
        """``[tiles that may be, tile_features, hidden]``."""
        config = self.config
        patches = self.patch_embedding(tiles)
        absent = patches.new_zeros(config.tiles - len(tiles), *patches.shape[1:])
        hidden = torch.cat([patches, absent]) + self.pre_tile.of(canvas)
        class_token = self.class_embedding.expand(config.tiles, 1, -1)
        hidden = torch.cat([class_token, hidden], 1)
        places = self.tile_positions
        hidden = hidden + self.positions * (1 - places.gate.tanh()) + places.of(canvas)
        return self.pre_norm(hidden)


class _Rows:
    """The order of rows in the encoders: the picture's own, then what fills up its tiles, then
    the absent tiles, filled up.
    """

    def __init__(self, used: int, config: MllamaVisionConfig) -> None:
        self._used, self._absent = used, config.tiles - used
        self._each, self._filling = config.tile_features, config.filling
        self.own = used * config.tile_features

    def ordered(self, hidden: Tensor) -> Tensor:
        """Rows of ``hidden [tiles, tile_features, hidden]``, filled up with zeros."""
        filled = F.pad(hidden[self._used :], (0, 0, 0, self._filling)).flatten(0, 1)
        filling = hidden.new_zeros(self._used * self._filling, hidden.shape[-1])
        return torch.cat([hidden[: self._used].flatten(0, 1), filling, filled])

    def of_tiles(self, vectors: Tensor) -> Tensor:
        """``vectors [tiles, hidden]``, each for all rows of its tile."""
        tiles = torch.arange(len(vectors), device=vectors.device)
        own, absent = tiles[: self._used], tiles[self._used :]
        counts = (own, self._each), (own, self._filling), (absent, self._each + self._filling)
        return vectors[torch.cat([which.repeat_interleave(count) for which, count in counts])]

    def features(self, hidden: Tensor) -> Tensor:
        """The rows of all tiles, without what fills them up."""
        start = self.own + self._used * self._filling
        shape = self._absent, self._each + self._filling, hidden.shape[-1]
        absent = hidden[start:].view(shape)
        return torch.cat([hidden[: self.own], absent[:, : self._each].flatten(0, 1)])
