"""Llama-3.2-Vision as it is described, slowly: every tile padded, every mask written out.

Nothing is shared with the engine. ``after`` and ``blind`` choose between the two accounts of the
intermediate states, and of tokens that see no picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.mllama_checkpoint import CANVASES, MllamaShape

LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Seen:
    """A picture at a place of the sequence, as (rows, columns) of tiles ``[tiles, 3, px, px]``."""

    place: int
    tiles: Tensor
    canvas: tuple[int, int]


class MllamaReference:
    """Logits of whole sequences."""

    def __init__(
        self,
        shape: MllamaShape,
        tensors: dict[tuple[str, str], Tensor],
        *,
        after: bool = False,
        blind: bool = False,
    ) -> None:
        self.shape, self.tensors, self.after, self.blind = shape, tensors, after, blind

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], pictures: Sequence[Seen]) -> Tensor:
        shape, count = self.shape, len(ids)
        x = self._get("decoder", "embed_tokens.weight")[list(ids)]
        vision = [self.features(picture) for picture in pictures]
        for n in range(shape.layers):
            if n not in shape.cross:
                x = x + self._self_attention(f"layers.{n}", self._norm(x, f"layers.{n}.input"))
                x = x + self._mlp(f"layers.{n}", self._norm(x, f"layers.{n}.post_attention"))
            elif pictures:
                x = self._cross(f"layers.{n}", x, vision, self.mask(count, pictures))
        x = self._rms(x, self._get("decoder", "norm.weight"))
        return x @ self._get("head", "weight").T

    def greedy(self, ids: Sequence[int], pictures: Sequence[Seen], count: int) -> list[int]:
        said: list[int] = []
        for _ in range(count):
            said.append(int(self.logits([*ids, *said], pictures)[-1].argmax()))
        return said

    # -- which tokens see which tiles -------------------------------------------------------------

    def mask(self, count: int, pictures: Sequence[Seen]) -> Tensor:
        """``[tokens, pictures * 4 tiles * features]``, true where a token sees a feature."""
        places = [picture.place for picture in pictures]
        ends = [*places[1:], count]
        for n in reversed(range(len(places) - 1)):
            if places[n] + 1 == places[n + 1]:  # side by side: seen as long as the next one
                ends[n] = ends[n + 1]
        mask = torch.zeros(count, len(pictures), 4, dtype=torch.bool)
        for n, picture in enumerate(pictures):
            mask[places[n] : ends[n], n, : len(picture.tiles)] = True
        return mask.repeat_interleave(self.shape.tile_features, 2).flatten(1)

    # -- text -------------------------------------------------------------------------------------

    def _get(self, part: str, name: str) -> Tensor:
        return self.tensors[part, name]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self._get("decoder", f"{name}.weight").T

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return self._rms(x, self._get("decoder", f"{name}_layernorm.weight"))

    def _mlp(self, layer: str, x: Tensor) -> Tensor:
        gate, up = (self._linear(x, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        return self._linear(gate * gate.sigmoid() * up, f"{layer}.mlp.down_proj")

    def _heads(self, x: Tensor) -> Tensor:
        """``[n, heads * size]`` to ``[heads, n, size]``, KV heads repeated."""
        size = self.shape.hidden // self.shape.heads
        x = x.unflatten(-1, (-1, size)).transpose(0, 1)
        return x.repeat_interleave(self.shape.heads // len(x), 0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + added).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def _self_attention(self, layer: str, x: Tensor) -> Tensor:
        q, k, v = (self._heads(self._linear(x, f"{layer}.self_attn.{name}_proj")) for name in "qkv")
        causal = torch.full((len(x), len(x)), LEAST).triu(1)
        out = self._attend(self._turn(q), self._turn(k), v, causal)
        return self._linear(out, f"{layer}.self_attn.o_proj")

    def _turn(self, x: Tensor) -> Tensor:
        """Rotary embedding with Llama 3's scaling (factor 8, low 1, high 4, original 32)."""
        half = x.shape[-1] // 2
        angles = []
        for i in range(half):
            frequency = 500000.0 ** (-2 * i / x.shape[-1])
            wavelength = 2 * math.pi / frequency
            if wavelength > 32 / 1:
                frequency /= 8
            elif wavelength > 32 / 4:
                smooth = (32 / wavelength - 1) / (4 - 1)
                frequency = (1 - smooth) * frequency / 8 + smooth * frequency
            angles.append(torch.arange(x.shape[1]) * frequency)
        turn = torch.stack(angles, -1)
        low, high = x[..., :half], x[..., half:]
        cos, sin = turn.cos(), turn.sin()
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def _cross(self, layer: str, x: Tensor, vision: Sequence[Tensor], mask: Tensor) -> Tensor:
        name, all_features = f"{layer}.cross_attn", torch.cat(list(vision))
        q, k, v = (
            self._heads(self._linear(y, f"{name}.{kind}_proj"))
            for y, kind in (
                (self._norm(x, f"{layer}.input"), "q"),
                (all_features, "k"),
                (all_features, "v"),
            )
        )
        q, k = (
            self._rms(y, self._get("decoder", f"{name}.{kind}_norm.weight"))
            for y, kind in ((q, "q"), (k, "k"))
        )
        sees = mask.any(-1)
        added = torch.zeros(mask.shape).masked_fill(~mask, LEAST)
        added[~sees] = 0  # blind tokens attend everything ...
        out = self._attend(q, k, v, added)
        if not self.blind:
            out = out * sees[:, None]  # ... and get nothing of it
        gates = [
            self._get("decoder", f"{layer}.cross_attn_{kind}_gate").tanh()
            for kind in ("attn", "mlp")
        ]
        x = x + gates[0] * self._linear(out, f"{name}.o_proj")
        mlp = self._mlp(layer, self._norm(x, f"{layer}.post_attention"))
        return x + gates[1] * mlp * sees[:, None]

    # -- pictures ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def features(self, picture: Seen) -> Tensor:
        """``[4 * features of a tile, hidden]``, absent tiles included."""
        shape, ratio, used = self.shape, 1 + CANVASES.index(picture.canvas), len(picture.tiles)
        get = {name: t for (part, name), t in self.tensors.items() if part == "vision"}
        pixels = torch.cat([picture.tiles, torch.zeros(4 - used, *picture.tiles.shape[1:])])
        x = F.conv2d(pixels, get["patch_embedding.weight"], stride=shape.patch).flatten(2).mT
        x = x + self._tile_embedding(get, "pre", ratio)
        x = torch.cat([get["class_embedding"].expand(4, 1, -1), x], 1)
        place = "gated_positional_embedding"
        gate = get[f"{place}.gate"].tanh()
        x = x + (1 - gate) * get[f"{place}.embedding"]
        x = x + gate * get[f"{place}.tile_embedding.weight"][ratio].view_as(x)
        x = self._layer_norm(get, "layernorm_pre", x)
        padding = -x.shape[1] % 8
        x = F.pad(x, (0, 0, 0, padding))
        each = x.shape[1]
        real = torch.zeros(4, each, dtype=torch.bool)
        real[:used, : shape.tile_features] = True
        real = real.flatten()
        mask = torch.zeros(4 * each, 4 * each).masked_fill(~real[:, None] & ~real[None], LEAST)
        x, before, after = x.flatten(0, 1), [], []
        for n in range(shape.vision_layers):
            before.append(x)
            x = self._tower_layer(get, f"transformer.layers.{n}", x, mask)
            after.append(x)
        x = self._layer_norm(get, "layernorm_post", x)
        x = (x.view(4, each, -1) + self._tile_embedding(get, "post", ratio)).flatten(0, 1)
        for n in range(shape.global_layers):
            x = self._tower_layer(get, f"global_transformer.layers.{n}", x, mask)
        states = [(after if self.after else before)[n] for n in shape.states]
        together = torch.cat([x, torch.stack(states, -1).flatten(1)], -1)
        together = together.view(4, each, -1)[:, : shape.tile_features].flatten(0, 1)
        return together @ self._get("projector", "weight").T + self._get("projector", "bias")

    def _tile_embedding(self, get: dict[str, Tensor], when: str, ratio: int) -> Tensor:
        name = f"{when}_tile_positional_embedding"
        vectors = get[f"{name}.embedding.weight"][ratio].view(4, 1, -1)
        return vectors * get[f"{name}.gate"].tanh()

    def _layer_norm(self, get: dict[str, Any], name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], get[f"{name}.weight"], get[f"{name}.bias"], 1e-5)

    def _tower_layer(self, get: dict[str, Any], layer: str, x: Tensor, mask: Tensor) -> Tensor:
        size = self.shape.vision_hidden // self.shape.vision_heads
        gates = [get.get(f"{layer}.gate_{kind}") for kind in ("attn", "ffn")]
        attn_gate, mlp_gate = (1.0 if gate is None else gate.tanh() for gate in gates)
        normed = self._layer_norm(get, f"{layer}.input_layernorm", x)
        q, k, v = (
            (normed @ get[f"{layer}.self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, size))
            for n in "qkv"
        )
        out = self._attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask)
        x = x + attn_gate * (out @ get[f"{layer}.self_attn.o_proj.weight"].T)
        normed = self._layer_norm(get, f"{layer}.post_attention_layernorm", x)
        inner = F.linear(normed, get[f"{layer}.mlp.fc1.weight"], get[f"{layer}.mlp.fc1.bias"])
        outer = F.linear(
            F.gelu(inner), get[f"{layer}.mlp.fc2.weight"], get[f"{layer}.mlp.fc2.bias"]
        )
        return x + mlp_gate * outer
