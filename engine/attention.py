"""Attention over a chosen set of cache slots: the operators every cache policy is built on.

A-VL keeps most cached tokens but multiplies with few of them. These operators take the *list of
slots* to use and leave the rest of the pool unread, instead of slicing the pool and multiplying
with the copy. Each has a plain torch twin here (``*_torch``, the readable definition, always
tested) and native versions for CPU and CUDA behind ``engine.native``, chosen when available.

Shapes, everywhere: q ``[rows, heads, head_dim]``, one query per row; k and v
``[pool_slots, kv_heads, head_dim]``, token-major, shared by all rows; slots int32
``[rows, 1 or kv_heads, max]``, pool-absolute (None: every slot of the pool, in order); count int32
``[rows, 1 or kv_heads]``, how many entries of each list are used (None: all). Query head ``h``
reads kv head ``h // (heads // kv_heads)``. Entries beyond count are never read.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionResult(NamedTuple):
    """What one attention call returns: out, and logits and lse when asked for."""

    out: Tensor  # [rows, heads, head_dim], dtype of q
    logits: Tensor | None = None  # [rows, heads, max] fp32, scaled q.k; -inf beyond count
    lse: Tensor | None = None  # [rows, heads] fp32, log(sum(exp(logits))); -inf for an empty list


def selective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None = None,
    count: Tensor | None = None,
    *,
    scale: float | None = None,
    want_logits: bool = False,
) -> AttentionResult:
    """Softmax attention of every row over its own slots, computed in fp32.

    Shapes as in the module's docstring; scale defaults to ``1 / sqrt(head_dim)``. With
    ``want_logits`` the probabilities are ``exp(logits - lse[..., None])``. A row with nothing to
    attend to gives zeros and an lse of -inf. Raises ValueError naming a wrong argument.

    >>> one = torch.ones(1, 1, 2)
    >>> pool = torch.tensor([[[1.0, 3.0]], [[7.0, 7.0]]])  # two slots, one head of size 2
    >>> pick = torch.tensor([[[1]]], dtype=torch.int32)  # attend to slot 1 alone
    >>> selective_attention(one, pool, pool, pick).out.tolist()
    [[[7.0, 7.0]]]
    """
    return selective_attention_torch(q, k, v, slots, count, scale=scale, want_logits=want_logits)


def selective_qk(
    q: Tensor, k: Tensor, slots: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Dot products of q with the listed rows of k: fp32 ``[rows, heads, max]``, unscaled.

    The first of A-VL's two operators (arXiv 2409.14846). Entries beyond count are -inf.
    """
    return selective_qk_torch(q, k, slots, count)


def selective_pv(
    p: Tensor, v: Tensor, slots: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Sum the listed rows of v, weighted by p ``[rows, heads, max]``: fp32, in the shape of q.

    The second of A-VL's two operators. Weights beyond count are not read.
    """
    return selective_pv_torch(p, v, slots, count)


# -- the torch twins ------------------------------------------------------------------------------


def selective_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None = None,
    count: Tensor | None = None,
    *,
    scale: float | None = None,
    want_logits: bool = False,
) -> AttentionResult:
    """Define ``selective_attention``: the two products with a softmax between them."""
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v is {_describe(v)} but k is {_describe(k)}")
    used = _select("q", q, k, slots, count)
    logits = _qk(q, k, used).mul_(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    lse = logits.logsumexp(-1)
    shift = lse.masked_fill(lse == -math.inf, 0)  # an empty list: exp(-inf - 0) = 0, not NaN
    out = _pv((logits - shift[..., None]).exp(), v, used).to(q.dtype)
    if not want_logits:
        return AttentionResult(out)
    return AttentionResult(out, _widen(logits, used), lse)


def selective_qk_torch(
    q: Tensor, k: Tensor, slots: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Define ``selective_qk``: gather the rows, multiply in fp32, mask what lies beyond count."""
    used = _select("q", q, k, slots, count)
    return _widen(_qk(q, k, used), used)


def selective_pv_torch(
    p: Tensor, v: Tensor, slots: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Define ``selective_pv``: gather the rows, multiply in fp32, leave out those beyond count."""
    used = _select("p", p, v, slots, count)
    if p.shape[-1] != used.width:
        raise ValueError(f"p has {p.shape[-1]} weights for each head, the lists {used.width}")
    return _pv(p[..., : used.longest], v, used)


class _Selection(NamedTuple):
    """Checked lists: trimmed to the longest one in use, None for the pool in its own order."""

    slots: Tensor | None  # [rows, 1 or kv_heads, longest]
    valid: Tensor | None  # bool [rows, 1 or kv_heads, longest]; None when every entry is used
    longest: int
    width: int  # of the lists as given


def _select(
    name: str, q: Tensor, pool: Tensor, slots: Tensor | None, count: Tensor | None
) -> _Selection:
    """Check the arguments against each other; find which entries of the lists are used."""
    check_lists(name, q, pool, slots, count)
    width = pool.shape[0] if slots is None else slots.shape[-1]
    longest, valid = width, None
    if count is not None:
        longest = int(count.max()) if count.numel() else 0
        if int(count.min()) < longest:
            valid = torch.arange(longest, device=pool.device) < count[..., None]
    if slots is None:
        return _Selection(None, valid, longest, width)
    slots = slots[..., :longest]
    if valid is not None:
        slots = slots.masked_fill(~valid, 0)
    if slots.numel():
        low, high = (int(x) for x in slots.aminmax())
        if low < 0 or high >= pool.shape[0]:
            raise ValueError(f"slots must be within 0..{pool.shape[0] - 1}, got {low}..{high}")
    return _Selection(slots, valid, longest, width)


def _qk(q: Tensor, k: Tensor, used: _Selection) -> Tensor:
    rows, heads, size = q.shape
    keys = _gather(k, used).float()  # [rows or 1, kv_heads, longest, head_dim]
    scores = q.float().reshape(rows, k.shape[1], heads // k.shape[1], size) @ keys.mT
    if used.valid is not None:
        scores = scores.masked_fill(~used.valid[:, :, None], -math.inf)
    return scores.reshape(rows, heads, used.longest)


def _pv(p: Tensor, v: Tensor, used: _Selection) -> Tensor:
    rows, heads, longest = p.shape
    values = _gather(v, used).float()
    weights = p.float().reshape(rows, v.shape[1], heads // v.shape[1], longest)
    if used.valid is not None:  # a weight of zero does not hide a NaN: 0 * NaN is NaN
        values = values.masked_fill(~used.valid[..., None], 0)
        weights = weights.masked_fill(~used.valid[:, :, None], 0)
    return (weights @ values).reshape(rows, heads, v.shape[2])


def _gather(pool: Tensor, used: _Selection) -> Tensor:
    """Give the used rows as ``[rows or 1, kv_heads, longest, head_dim]``; without lists a view."""
    if used.slots is None:
        return pool[: used.longest].transpose(0, 1)[None]
    rows, lists, longest = used.slots.shape
    if lists == 1:
        picked = pool.index_select(0, used.slots.reshape(-1))
        return picked.view(rows, longest, *pool.shape[1:]).transpose(1, 2)
    return pool[used.slots.long(), torch.arange(lists, device=pool.device)[:, None]]


def _widen(scores: Tensor, used: _Selection) -> Tensor:
    """Give scores the width of the lists as they were passed."""
    return torch.nn.functional.pad(scores, (0, used.width - used.longest), value=-math.inf)


def check_lists(
    name: str, q: Tensor, pool: Tensor, slots: Tensor | None, count: Tensor | None
) -> None:
    """Raise ValueError where shapes, types or counts do not fit together (slots: see _select)."""
    rows, heads = q.shape[:2]
    kv_heads = pool.shape[1] if pool.ndim == 3 else 0
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{name} has {heads} heads, the pool is {_describe(pool)}")
    for label, lists, ndim in (("slots", slots, 3), ("count", count, 2)):
        if lists is None:
            continue
        if lists.dtype != torch.int32 or lists.ndim != ndim or lists.shape[0] != rows:
            raise ValueError(f"{label} must be int32 with {rows} rows, got {_describe(lists)}")
        if lists.shape[1] not in (1, kv_heads):
            raise ValueError(f"{label} must have 1 or {kv_heads} lists, got {_describe(lists)}")
    width = pool.shape[0] if slots is None else slots.shape[-1]
    if count is not None and count.numel():
        low, high = (int(x) for x in count.aminmax())
        if low < 0 or high > width:
            raise ValueError(f"count must be within 0..{width}, got {low}..{high}")


def _describe(t: Tensor) -> str:
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"
