"""A decoder layer that looks at pictures: cross-attention over their features, and an MLP.

Llama-3.2-Vision has one before every fourth of its text layers (Grattafiori et al. 2024, section
7.2). Queries and keys are normed head by head and not rotated. Both halves are added through
learned gates; a token that sees no picture passes unchanged.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from ..ops.fused import silu_mul
from ..ops.rotary import Tables
from .decoder import CrossView, DecoderConfig, Step
from .layers import RMSNorm
from .matrix import Linear, Matrix


class CrossLayer(nn.Module):
    """Gated attention over features, and a gated MLP, each on the normed stream."""

    def __init__(self, config: DecoderConfig, number: int) -> None:
        """``number``: among the cross layers."""
        super().__init__()
        self.config, self.number = config, number
        hidden, head_dim = config.hidden, config.head_dim
        self.attn_norm = RMSNorm(hidden, config.norm_eps)
        self.q_proj = Linear(hidden, config.heads * head_dim, bias=False)
        self.k_proj = Linear(hidden, config.kv_heads * head_dim, bias=False)
        self.v_proj = Linear(hidden, config.kv_heads * head_dim, bias=False)
        self.o_proj = Linear(config.heads * head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(head_dim, config.norm_eps)
        self.k_norm = RMSNorm(head_dim, config.norm_eps)
        self.attn_gate = nn.Parameter(torch.empty(1))
        self.mlp_norm = RMSNorm(hidden, config.norm_eps)
        self.gate_proj = Linear(hidden, config.mlp, bias=False)
        self.up_proj = Linear(hidden, config.mlp, bias=False)
        self.down_proj = Linear(config.mlp, hidden, bias=False)
        self.mlp_gate = nn.Parameter(torch.empty(1))
        self.kv = Matrix(self.k_proj, self.v_proj)
        self.gate_up = Matrix(self.gate_proj, self.up_proj)

    def view(self, step: Step) -> CrossView | None:
        """See ``Layer``."""
        return step.cross(self.number)

    def narrow(self, step: Step) -> Tensor | None:
        """See ``Layer``: nothing is narrowed."""
        return None

    def forward(
        self, hidden: Tensor, delta: Tensor | None, tables: Tables, view: CrossView
    ) -> tuple[Tensor, Tensor]:
        """See ``Layer``; ``tables`` are for layers that rotate."""
        hidden, normed = self.attn_norm.after(hidden, delta)
        attended, sees = view.attend(self._by_head(self.q_proj(normed), self.q_norm), self.project)
        hidden, normed = self.mlp_norm.after(hidden, self.o_proj(attended.flatten(1)))
        gate, up = self.gate_up.product(normed)
        return hidden, self.down_proj(silu_mul(gate, up, sees, self.opening))

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Project``. Attention's gate is a factor of the values: it costs nothing later."""
        k, v = self.kv.product(features)
        values = v.unflatten(1, (-1, self.config.head_dim)) * self.attn_gate.tanh()
        return self._by_head(k, self.k_norm), values

    def _by_head(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """``x [n, heads * head_dim]`` as ``[n, heads, head_dim]``, every head normed."""
        head_dim = self.config.head_dim
        return norm(x.reshape(-1, head_dim)).view(len(x), -1, head_dim)

    @cached_property
    def opening(self) -> float:
        """How far the MLP's gate is open."""
        return float(self.mlp_gate.float().tanh())
