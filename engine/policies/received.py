"""How much attention each column received: the raw material of every policy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.ranks import ALONE, Ranks

Rows = range | tuple[int, ...]  # which queries, counted from a pass's first


class Received:
    """Softmax weights that the last queries of a prefill gave to every column.

    Fused attention does not return its weights, so the rows a policy asks for are computed again
    from the queries and keys: one row for A-VL, all rows for H2O, in chunks so that memory stays
    small.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        earlier: Tensor | None = None,
        chunk: int = 128,
        ranks: Ranks = ALONE,
    ) -> None:
        """Hold ``q [tokens, heads, head_dim]`` and ``k [columns, kv_heads, head_dim]``.

        The last ``tokens`` columns are the queries' own, which are causal; earlier ones are visible
        to all. ``earlier [kv_heads, columns]`` is what earlier turns accumulated. Where several
        ``ranks`` share the heads, these are one's own, and only ``mean_given_by`` is of all.
        """
        self.ranks = ranks
        self.q, self.k, self.earlier, self.chunk = q, k, earlier, chunk
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
            total = torch.zeros(self.q.shape[1], len(self.k), device=self.q.device)
            for start in range(0, len(rows), self.chunk):
                total += self._weights(rows[start : start + self.chunk]).sum(1)
            self._sums[rows] = total
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

    def _weights(self, rows: Rows) -> Tensor:
        """Softmax rows of some queries: ``[heads, rows, columns]`` fp32."""
        k, mine = self.k.float(), torch.tensor(rows, device=self.k.device)
        columns, kv_heads, head_dim = k.shape
        q = (self.q[mine].float() * self.scale).unflatten(1, (kv_heads, -1))
        # [kv_heads, group * queries, columns]: the query heads of a group share their keys.
        flat = q.permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        logits = torch.bmm(flat, k.permute(1, 2, 0)).view(-1, len(rows), columns)
        own_column = mine[:, None] + columns - self.queries
        hidden = torch.arange(columns, device=k.device) > own_column
        return logits.masked_fill_(hidden, float("-inf")).softmax(-1)


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
