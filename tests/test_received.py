"""What columns receive, against softmax by its definition in float64, whatever the pieces."""

import pytest
import torch
from torch import Tensor

from engine.policies.received import Received, Rows


def defined(q: Tensor, k: Tensor, rows: Rows) -> Tensor:
    """Sums ``[heads, columns]`` of the weights that some queries give."""
    heads, columns = q.shape[1], len(k)
    k = k.double().repeat_interleave(heads // k.shape[1], 1)
    total = torch.zeros(heads, columns, dtype=torch.float64)
    for row in rows:
        seen = columns - len(q) + row + 1
        logits = torch.einsum("hd,nhd->hn", q[row].double(), k[:seen]) * q.shape[2] ** -0.5
        total[:, :seen] += logits.softmax(-1)
    return total


@pytest.mark.parametrize("piece", [1, 7, 200, None])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (5, 1)])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (1, 40), (23, 23), (17, 33)])
def test_sums_are_softmax_by_definition(
    tokens: int, columns: int, heads: int, kv_heads: int, piece: int | None
) -> None:
    generator = torch.Generator().manual_seed(tokens + heads)
    q = 2 * torch.randn(tokens, heads, 8, generator=generator)
    k = torch.randn(columns, kv_heads, 8, generator=generator)
    received = Received(q, k, piece=piece)
    some = tuple(range(0, tokens, 3))
    for rows in (range(tokens), range(tokens - 1, tokens), some):
        expected = defined(q, k, rows)
        torch.testing.assert_close(received.given_by(rows).double(), expected, rtol=0, atol=1e-5)
        mean = received.mean_given_by(rows).double()
        torch.testing.assert_close(mean, expected.mean(0), rtol=0, atol=1e-5)
    earlier = torch.rand(kv_heads, columns)
    again = Received(q, k, earlier, piece=piece).accumulated(tokens).double()
    grouped = defined(q, k, range(tokens)).unflatten(0, (kv_heads, -1)).sum(1)
    torch.testing.assert_close(again, grouped + earlier, rtol=0, atol=1e-5)
