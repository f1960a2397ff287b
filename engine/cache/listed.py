"""Attention of one layer over a list of slots, repeated step after step: planned once."""

from __future__ import annotations

from torch import Tensor

from engine import native
from engine.attention import AttentionResult, selective_attention
from engine.cache.pool import Pool
from engine.native import AttentionPlan


class ListedAttention:
    """Attends the same list of ``pool`` in every step; entries and counts may change in place.

    Checking shapes and passing addresses costs more than attending a few hundred slots, so a native
    call is planned at its first use and then only run. Results lie in buffers that the next call
    overwrites.
    """

    def __init__(self, pool: Pool, slots: Tensor, count: Tensor, run: int | None = None) -> None:
        """``slots [rows, 1, max]`` and ``count [rows, 1]`` int32, as ``selective_attention`` takes.

        ``run`` is where the list begins if it is one row's unbroken run of slots: then plain torch
        need not gather it.
        """
        self._pool, self._slots, self._count, self._first = pool, slots, count, run
        self._plans: dict[bool, tuple[AttentionPlan, Tensor]] = {}

    def __call__(self, q: Tensor, want_logits: bool) -> AttentionResult:
        """Attend with ``q [rows, heads, head_dim]``."""
        if want_logits not in self._plans:
            if not native.usable(q, self._pool.k):
                return self._in_torch(q, want_logits)
            self._plans[want_logits] = self._planned(q, want_logits)
        plan, queries = self._plans[want_logits]
        queries.copy_(q)
        plan.run()
        return plan.result()

    def _planned(self, q: Tensor, want_logits: bool) -> tuple[AttentionPlan, Tensor]:
        pool, queries = self._pool, q.contiguous().clone()
        return (
            AttentionPlan(
                queries, pool.k, pool.v, self._slots, self._count, want_logits=want_logits
            ),
            queries,
        )

    def _in_torch(self, q: Tensor, want_logits: bool) -> AttentionResult:
        k, v = self._pool.k, self._pool.v
        if self._first is None:
            return selective_attention(q, k, v, self._slots, self._count, want_logits=want_logits)
        run = slice(self._first, self._first + int(self._count))
        return selective_attention(q, k[run], v[run], want_logits=want_logits)
