"""How much attention each column received during a prefill: the raw material of every policy."""

from __future__ import annotations

import torch
from torch import Tensor


class Received:
    """Softmax weights that the last queries of a prefill gave to every column.

    Fused attention does not return its weights, so the rows a policy asks for are computed again
    from the queries and keys: one row for A-VL, all rows for H2O, in chunks so that memory stays
    small.
    """

    def __init__(
        self, q: Tensor, k: Tensor, earlier: Tensor | None = None, chunk: int = 128
    ) -> None:
        """Hold ``q [tokens, heads, head_dim]`` and ``k [columns, kv_heads, head_dim]``.

        The last ``tokens`` columns are the queries' own, which are causal; earlier ones are visible
        to all. ``earlier [kv_heads, columns]`` is what earlier turns accumulated.
        """
        self.q, self.k, self.earlier, self.chunk = q, k, earlier, chunk
        self.scale = q.shape[-1] ** -0.5
        self._sums: dict[int, Tensor] = {}

    def from_last(self, rows: int) -> Tensor:
        """Sum of the weights given by the last ``rows`` queries: ``[heads, columns]`` fp32."""
        rows = min(rows, len(self.q))
        if rows not in self._sums:
            columns, heads = len(self.k), self.q.shape[1]
            total = torch.zeros(heads, columns, device=self.q.device)
            for start in range(len(self.q) - rows, len(self.q), self.chunk):
                total += self._weights(start, min(start + self.chunk, len(self.q))).sum(1)
            self._sums[rows] = total
        return self._sums[rows]

    def accumulated(self, rows: int) -> Tensor:
        """Heavy-hitter scores: weights of the last ``rows`` queries, summed over each KV head's
        query heads, on top of what earlier turns gave: ``[kv_heads, columns]`` fp32.
        """
        summed = self.from_last(rows).unflatten(0, (self.k.shape[1], -1)).sum(1)
        return summed if self.earlier is None else summed + self.earlier

    def _weights(self, start: int, end: int) -> Tensor:
        """Softmax rows of queries ``start`` to ``end``: ``[heads, end - start, columns]`` fp32."""
        k = self.k.float()
        columns, kv_heads, head_dim = k.shape
        q = self.q[start:end].float().unflatten(1, (kv_heads, -1))
        # [kv_heads, group * queries, columns]: the query heads of a group share their keys.
        flat = q.permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        logits = torch.bmm(flat, k.permute(1, 2, 0)).view(-1, end - start, columns) * self.scale
        own_column = torch.arange(start, end, device=k.device)[:, None] + columns - len(self.q)
        hidden = torch.arange(columns, device=k.device) > own_column
        return logits.masked_fill_(hidden, float("-inf")).softmax(-1)
