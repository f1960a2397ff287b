"""How much attention each column received: the raw material of every policy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.ranks import ALONE, Ranks

PIECE = 1 << 18  # weights that are computed at once on a CPU: 1 MiB
Rows = range | tuple[int, ...]  # which queries, counted from a pass's first


class Received:
    """Softmax weights that the last queries of a prefill gave to every column.

    Fused attention does not return its weights, so the rows a policy asks for are computed again
    from the queries and keys: one row for A-VL, all rows for H2O, in pieces that stay in a cache
    of the processor: softmax and sums then cost little beside the products.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        earlier: Tensor | None = None,
        piece: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Hold ``q [tokens, heads, head_dim]`` and ``k [columns, kv_heads, head_dim]``.

        The last ``tokens`` columns are the queries' own, which are causal; earlier ones are visible
        to all. ``earlier [kv_heads, columns]`` is what earlier turns accumulated. Where several
        ``ranks`` share the heads, these are one's own, and only ``mean_given_by`` is of all.
        ``piece``: weights that are computed at once (None: as many as suit the device).
        """
        self.ranks = ranks
        self.q, self.k, self.earlier = q, k, earlier
        self._piece = piece or (PIECE if q.device.type == "cpu" else 64 * PIECE)
        self.scale = q.shape[-1] ** -0.5
        self._sums: dict[Rows, Tensor] = {}

    @property
    def queries(self) -> int:
        """How many queries there are."""
        return len(self.q)

    def from_last(self, rows: int) -> Tensor:
        """Sum of the weights given by the last ``rows`` queries: ``[heads, columns]`` fp32."""
        return self.given_by(range(max(0, self.queries - rows), self.queries))

    def given_by(self, rows: Rows) -> Tensor:
        """Sum of the weights given by these queries: ``[heads, columns]`` fp32."""
        if rows not in self._sums:
            self._sums[rows] = self._summed(rows)
        return self._sums[rows]

    def mean_given_by(self, rows: Rows) -> Tensor:
        """The same ``[columns]``, averaged over all heads."""
        return self.ranks.mean(self.given_by(rows))

    def accumulated(self, rows: int) -> Tensor:
        """Heavy-hitter scores: weights of the last ``rows`` queries, summed over each KV head's
        query heads, on top of what earlier turns gave: ``[kv_heads, columns]`` fp32.
        """
        summed = self.from_last(rows).unflatten(0, (self.k.shape[1], -1)).sum(1)
        return summed if self.earlier is None else summed + self.earlier

    def _summed(self, rows: Rows) -> Tensor:
        """The sums of ``given_by``, piece by piece: of some rows, and some KV heads."""
        columns, kv_heads, _ = self.k.shape
        group = self.q.shape[1] // kv_heads
        total = torch.zeros(kv_heads, group, columns, device=self.q.device)
        k = self.k.float().permute(1, 2, 0)  # [kv_heads, head_dim, columns]
        few = max(1, self._piece // (group * columns))
        for start in range(0, len(rows), few):
            mine = torch.tensor(rows[start : start + few], device=k.device)
            q = (self.q[mine].float() * self.scale).unflatten(1, (kv_heads, -1))
            own_column = mine[:, None] + columns - self.queries
            hidden = torch.arange(columns, device=k.device) > own_column
            bias = torch.zeros(hidden.shape, device=k.device).masked_fill_(hidden, float("-inf"))
            heads = max(1, self._piece // (group * columns * len(mine)))
            for first in range(0, kv_heads, heads):
                some = slice(first, first + heads)
                # [KV heads, group * queries, ...]: the query heads of a group share their keys.
                flat = q[:, some].permute(1, 2, 0, 3).flatten(1, 2)
                logits = torch.baddbmm(bias.repeat(group, 1), flat, k[some])
                total[some] += logits.softmax(-1).unflatten(1, (group, -1)).sum(2)
        return total.flatten(0, 1)


class ReceivedInStep(Received):
    """The same of a decode step, whose one query sees all columns."""

    def __init__(self, weights: Tensor, ranks: Ranks = ALONE) -> None:
        """Hold ``weights [heads, columns]`` fp32."""
        self._weights_of_step, self.ranks = weights, ranks

    @property
    def queries(self) -> int:
        """See ``Received``."""
        return 1

    def given_by(self, rows: Rows) -> Tensor:
        """See ``Received``."""
        return self._weights_of_step
