"""A slow Qwen-VL written from its description: one head after the other.

It knows the published tensor names only, and shares no code with the engine.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def erf_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def cubic_weights(source: int, target: int) -> Tensor:
    """Bicubic interpolation with a = -0.75, half-pixel centres, edges repeated."""
    weights = torch.zeros(target, source, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            t = abs(centre - tap)
            near = 1.25 * t**3 - 2.25 * t**2 + 1
            far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[row, min(max(tap, 0), source - 1)] += near if t <= 1 else far
    return weights


def stretched(table: Tensor, side: int) -> Tensor:
    """Positions ``[n * n, width]`` on a grid of ``side * side``."""
    n = math.isqrt(len(table))
    if n == side:
        return table
    weights = cubic_weights(n, side)
    return torch.einsum("yr,xc,rcw->yxw", weights, weights, table.view(n, n, -1)).flatten(0, 1)


class QwenReference:
    """Forward passes in float64 over the tensors of a checkpoint.

    Around its attention it is a ``tests.reference_decoder.Arithmetic``.
    """

    dtype = torch.float64

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config, self.layers = config, config["num_hidden_layers"]
        self.heads = self.kv_heads = config["num_attention_heads"]
        self.head_dim = config["kv_channels"]
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.tensors[f"{name}.weight"].T
        return out + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else out

    def norm(self, x: Tensor, name: str) -> Tensor:
        return layer_norm(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    # -- vision -----------------------------------------------------------------------------------

    def features(self, pixels: Tensor) -> Tensor:
        """``[256, hidden]`` of ``pixels [3, size, size]``."""
        visual, t = "transformer.visual.", self.tensors
        side = pixels.shape[-1] // 14
        patches = pixels.double().unfold(1, 14, 14).unfold(2, 14, 14)  # 3, rows, columns, 14, 14
        patches = patches.permute(1, 2, 0, 3, 4).reshape(side * side, -1)
        x = patches @ t[f"{visual}conv1.weight"].flatten(1).T
        x = self.norm(x + stretched(t[f"{visual}positional_embedding"], side), f"{visual}ln_pre")
        for n in range(self.config["visual"]["layers"]):
            x = self.vision_layer(x, f"{visual}transformer.resblocks.{n}.")
        x = self.norm(self.resample(x, side), f"{visual}ln_post")
        return x @ t[f"{visual}proj"]

    def vision_layer(self, x: Tensor, name: str) -> Tensor:
        packed = self.linear(self.norm(x, f"{name}ln_1"), f"{name}attn.in_proj")
        size = x.shape[-1] // self.config["visual"]["heads"]
        outs = []
        for head in range(self.config["visual"]["heads"]):
            own = packed[:, 3 * size * head : 3 * size * (head + 1)]
            q, k, v = own[:, :size], own[:, size : 2 * size], own[:, 2 * size :]
            outs.append((q @ k.T / math.sqrt(size)).softmax(-1) @ v)
        x = x + self.linear(torch.cat(outs, 1), f"{name}attn.out_proj")
        inner = erf_gelu(self.linear(self.norm(x, f"{name}ln_2"), f"{name}mlp.c_fc"))
        return x + self.linear(inner, f"{name}mlp.c_proj")

    def resample(self, x: Tensor, side: int) -> Tensor:
        pool, t = "transformer.visual.attn_pool.", self.tensors
        x = self.norm(x @ t[f"{pool}kv_proj.weight"].T, f"{pool}ln_kv")
        positions, hidden = t[f"{pool}pos_embed"], x.shape[-1]
        inputs = (
            self.norm(t[f"{pool}query"], f"{pool}ln_q") + positions,
            x + stretched(positions, side),
            x,
        )
        weight, bias = t[f"{pool}attn.in_proj_weight"], t[f"{pool}attn.in_proj_bias"]
        q, k, v = (
            each @ weight[n * hidden : (n + 1) * hidden].T + bias[n * hidden : (n + 1) * hidden]
            for n, each in enumerate(inputs)
        )
        outs = []
        for at in range(0, hidden, 128):
            scores = q[:, at : at + 128] @ k[:, at : at + 128].T / math.sqrt(128)
            outs.append(scores.softmax(-1) @ v[:, at : at + 128])
        return self.linear(torch.cat(outs, 1), f"{pool}attn.out_proj")

    # -- language ---------------------------------------------------------------------------------

    def base(self, prompt: int) -> float:
        """The rotary base for a prompt of so many tokens."""
        size, trained = self.config["kv_channels"], self.config["seq_length"]
        alpha = 1
        while prompt > trained:  # 1, 3, 7, ... for up to 1, 2, 4, ... training lengths
            alpha, trained = 2 * alpha + 1, 2 * trained
        return float(self.config["rotary_emb_base"] * alpha ** (size / (size - 2)))

    def logits(self, ids: list[int], pictures: list[tuple[int, Tensor]], prompt: int) -> Tensor:
        """Logits ``[tokens, vocab]``; ``pictures`` are (first position, features).

        The first ``prompt`` ids were prefilled, the others decoded.
        """
        self.begin(prompt)
        x = self.tensors["transformer.wte.weight"][ids].clone()
        for start, features in pictures:
            x[start : start + len(features)] = features
        for layer in range(self.layers):
            q, k, v = self.inputs(layer, x, list(range(len(x))))
            outs = []
            for head in range(self.heads):
                scores = q[:, head] @ k[:, head].T / math.sqrt(self.head_dim)
                ahead = torch.ones_like(scores).triu(1).bool()
                outs.append(scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v[:, head])
            x = self.outputs(layer, x, torch.cat(outs, 1))
        return self.head(x)

    def rms(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.tensors[f"{name}.weight"]

    def begin(self, prompt: int) -> None:
        self.theta = self.base(prompt)

    def inputs(self, layer: int, x: Tensor, positions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[tokens, heads, size]``; a query grows with its position."""
        name = f"transformer.h.{layer}."
        packed = self.linear(self.rms(x, f"{name}ln_1"), f"{name}attn.c_attn").chunk(3, 1)
        q, k, v = (part.view(len(x), self.heads, self.head_dim) for part in packed)
        trained = self.config["seq_length"]
        factors = [max(1.0, math.log(p + 1) / math.log(trained)) for p in positions]
        q = self.rotated(q, positions) * torch.tensor(factors, dtype=self.dtype)[:, None, None]
        return q, self.rotated(k, positions), v

    def outputs(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        name = f"transformer.h.{layer}."
        x = x + self.linear(attended, f"{name}attn.c_proj")
        inner = self.rms(x, f"{name}ln_2")
        first, second = self.linear(inner, f"{name}mlp.w1"), self.linear(inner, f"{name}mlp.w2")
        return x + self.linear(first * second / (1 + (-second).exp()), f"{name}mlp.c_proj")

    def head(self, x: Tensor) -> Tensor:
        return self.rms(x, "transformer.ln_f") @ self.tensors["lm_head.weight"].T

    def rotated(self, x: Tensor, positions: list[int]) -> Tensor:
        half = x.shape[-1] // 2
        out = torch.empty_like(x)
        places = torch.tensor(positions, dtype=self.dtype)[:, None]
        for i in range(half):
            angle = places * self.theta ** (-i / half)
            a, b = x[..., i], x[..., i + half]
            out[..., i] = a * angle.cos() - b * angle.sin()
            out[..., i + half] = b * angle.cos() + a * angle.sin()
        return out
