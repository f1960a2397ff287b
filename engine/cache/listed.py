"""Attention of one layer over a list of slots, repeated step after step: planned once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..ops import native, tape
from ..ops.attention import selective_attention
from ..ops.native import AttentionPlan
from .pool import Pool


class ListedAttention:
    """Attends the same list of ``pool`` in every step; entries and counts may change in place.

    Checking shapes and passing addresses costs more than attending a few hundred slots, so a native
    call is planned at its first use and then only run. The result lies in a buffer that the next
    call overwrites.
    """

    def __init__(
        self, pool: Pool, slots: Tensor, count: Tensor, run: Callable[[], int] | None = None
    ) -> None:
        """``slots [rows, 1, max]`` and ``count [rows, 1]`` int32, as ``selective_attention`` takes.

        ``run`` says where the list begins if it is one row's unbroken run of slots: then plain
        torch need not gather it.
        """
        self._pool, self._slots, self._count, self._run = pool, slots, count, run
        self._plans: dict[bool, tuple[AttentionPlan, Tensor]] = {}

    def __call__(self, q: Tensor, scores: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attend with ``q [rows, heads, head_dim]``; the same shape comes back.

        Logits ``[rows, heads, max]`` and their log-sum-exp are written into ``scores``, which must
        be the same tensors in every call.
        """
        wanted = scores is not None
        if wanted not in self._plans and not native.usable(q, self._pool.k):
            return self._in_torch(q, scores)
        if tape.recording():  # a copy would not be recorded, but q stays where it is
            plan, _ = tape.kept(self._planned(q, scores))
        else:
            if wanted not in self._plans:
                self._plans[wanted] = self._planned(q.clone(), scores)
            plan, queries = self._plans[wanted]
            queries.copy_(q)
        plan.run()
        assert plan.out is not None
        return plan.out

    def _planned(
        self, queries: Tensor, scores: tuple[Tensor, Tensor] | None
    ) -> tuple[AttentionPlan, Tensor]:
        pool = self._pool
        logits, lse = scores or (None, None)
        plan = AttentionPlan(
            queries,
            pool.k,
            pool.v,
            self._slots,
            self._count,
            want_logits=scores is not None,
            logits=logits,
            lse=lse,
        )
        return plan, queries

    def _in_torch(self, q: Tensor, scores: tuple[Tensor, Tensor] | None) -> Tensor:
        k, v, slots, count = self._pool.k, self._pool.v, self._slots, self._count
        if self._run is None:
            result = selective_attention(q, k, v, slots, count, want_logits=scores is not None)
        else:
            first = self._run()
            run = slice(first, first + int(count))
            result = selective_attention(q, k[run], v[run], want_logits=scores is not None)
        if scores is not None and result.logits is not None and result.lse is not None:
            scores[0].fill_(float("-inf"))
            scores[0][..., : result.logits.shape[-1]] = result.logits
            scores[1].copy_(result.lse)
        return result.out
