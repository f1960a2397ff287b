"""A Llama-like decoder's arithmetic, slowly, from its weights; attention is left to who asks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.models.decoder import Decoder


class Arithmetic(Protocol):
    """A decoder around its attention; ``tests.qwen_reference.QwenReference`` is one as well."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def begin(self, prompt: int) -> None:
        """A sequence begins with a prompt of so many tokens."""

    def inputs(
        self, layer: int, x: Tensor, positions: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def outputs(self, layer: int, x: Tensor, attended: Tensor) -> Tensor: ...

    def head(self, x: Tensor) -> Tensor: ...


class ReferenceDecoder:
    """The decoder that Llama, Mistral and Qwen2 share, in ``dtype``."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype) -> None:
        self.config, self.dtype = decoder.config, dtype
        self.layers, self.heads = self.config.layers, self.config.heads
        self.kv_heads, self.head_dim = self.config.kv_heads, self.config.head_dim
        self.weights = {name: p.detach().to(dtype) for name, p in decoder.named_parameters()}

    def begin(self, prompt: int) -> None:
        """The prompt's length changes nothing."""

    def inputs(self, layer: int, x: Tensor, positions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[tokens, heads, head_dim]``, keys and values ``[tokens, kv_heads, head_dim]``.

        Queries and keys are rotated to their positions.
        """
        normed = self._norm(x, f"layers.{layer}.attn_norm")
        q = self._rotated(self._linear(normed, f"layers.{layer}.q_proj"), positions)
        k = self._rotated(self._linear(normed, f"layers.{layer}.k_proj"), positions)
        v = self._linear(normed, f"layers.{layer}.v_proj")
        return q, k, v.view(len(x), self.kv_heads, -1)

    def outputs(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's new hidden states from its old ones and ``attended [tokens, width]``."""
        x = x + self._linear(attended, f"layers.{layer}.o_proj")
        normed = self._norm(x, f"layers.{layer}.mlp_norm")
        gate = self._linear(normed, f"layers.{layer}.gate_proj")
        up = self._linear(normed, f"layers.{layer}.up_proj")
        return x + self._linear(gate * torch.sigmoid(gate) * up, f"layers.{layer}.down_proj")

    def head(self, x: Tensor) -> Tensor:
        """Logits of the last layer's hidden states."""
        return self._linear(self._norm(x, "norm"), "head")

    def _rotated(self, x: Tensor, positions: list[int]) -> Tensor:
        """RoPE as pairs (i, i + d/2) turned by position * theta^(-2i/d)."""
        half = self.head_dim // 2
        x = x.view(len(x), -1, self.head_dim)
        exponent = torch.arange(half, dtype=torch.float64) * 2 / self.head_dim
        angle = torch.tensor(positions, dtype=torch.float64)[:, None] / (
            self.config.rope_theta**exponent
        )
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
        return torch.cat([turned.real, turned.imag], -1).to(self.dtype)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.config.norm_eps)
        return x / scale * self.weights[f"{name}.weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return out if bias is None else out + bias
