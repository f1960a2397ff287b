"""Attention over a chosen set of cache slots: the operators every cache policy is built on.

A-VL keeps most cached tokens but multiplies with few of them. These operators take the *list of
slots* to use and leave the rest of the pool unread, instead of slicing the pool and multiplying
with the copy. Each has a plain torch twin here (``*_torch``, the readable definition, always
tested) and native versions for CPU and CUDA behind ``ops.native``, chosen when available.

Shapes, everywhere: q ``[rows, heads, head_dim]``, one query per row; k and v
``[pool_slots, kv_heads, head_dim]``, token-major, shared by all rows; slots int32
``[rows, 1 or kv_heads, max]``, pool-absolute (None: every slot of the pool, in order); count int32
``[rows, 1 or kv_heads]``, how many entries of each list are used (None: all). Query head ``h``
reads kv head ``h // (heads // kv_heads)``. Entries beyond count are never read.

A pool with its lists is a ``Tier``. Rows may attend several pools in one call, under one softmax:
tiers are walked in order with one running maximum, sum and accumulator, and their logits lie one
tier after another. Their dtype, kv heads and head size are the same.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .few_bits import seen
from .formats import FORMATS, PLAIN
from .native import AttentionPlan, AttentionResult, Tier
from .pages import Side
from .products import faster_in_float32

__all__ = [
    "AttentionPlan",
    "AttentionResult",
    "Tier",
    "selective_attention",
    "selective_pv",
    "selective_qk",
    "tiered_attention",
    "whole_attention",
]


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
    return tiered_attention(q, [Tier(k, v, slots, count)], scale=scale, want_logits=want_logits)


def tiered_attention(
    q: Tensor, tiers: Sequence[Tier], *, scale: float | None = None, want_logits: bool = False
) -> AttentionResult:
    """``selective_attention`` of every row over its slots of several pools together.

    >>> pools = torch.full((1, 1, 2), 3.0), torch.full((2, 1, 2), 6.0)
    >>> still = torch.zeros(1, 1, 2)  # the same logit everywhere: the mean of three values
    >>> tiered_attention(still, [Tier(pool, pool) for pool in pools]).out.round(decimals=3)
    tensor([[[5., 5.]]])
    """
    if not tiers or not all(native.serves(q, tier) for tier in tiers):
        return tiered_attention_torch(q, tiers, scale=scale, want_logits=want_logits)
    plan = AttentionPlan(q, tiers, scale=scale, want_logits=want_logits)
    _run(plan, q)
    return plan.result()


def selective_qk(
    q: Tensor, k: Tensor, slots: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Dot products of q with the listed rows of k: fp32 ``[rows, heads, max]``, unscaled.

    The first of A-VL's two operators (arXiv 2409.14846). Entries beyond count are -inf.
    """
    if not native.usable(q, k):
        return selective_qk_torch(q, k, slots, count)
    plan = AttentionPlan(q, [Tier(k, None, slots, count)], op="qk")
    _run(plan, q)
    assert plan.logits is not None
    return plan.logits


def selective_pv(
    p: Tensor, v: Tensor, slots: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Sum the listed rows of v, weighted by p ``[rows, heads, max]``: fp32, in the shape of q.

    The second of A-VL's two operators. Weights beyond count are not read.
    """
    if not native.usable(p, v):
        return selective_pv_torch(p, v, slots, count)
    plan = AttentionPlan(None, [Tier(None, v, slots, count)], op="pv", p=p)
    _run(plan, p)
    assert plan.out is not None
    return plan.out


def _run(plan: AttentionPlan, q: Tensor) -> None:
    """Run a plan used once; a plain call reports a wrong slot at once, also on a GPU."""
    plan.run()
    if q.is_cuda:
        plan.check()


def whole_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    grouped: bool = False,
) -> Tensor:
    """Torch's attention of many queries ``[..., heads, queries, head_dim]``, each over everything.

    For a prefill and for towers: nothing is listed. ``mask`` is true where a query sees a column;
    ``grouped``: query heads share kv heads.
    """
    dtype = q.dtype
    if faster_in_float32(q):
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    ).to(dtype)


# -- the torch twins ------------------------------------------------------------------------------


def tiered_attention_torch(
    q: Tensor, tiers: Sequence[Tier], *, scale: float | None = None, want_logits: bool = False
) -> AttentionResult:
    """Define ``tiered_attention``: the two products of every tier, with one softmax between."""
    native.check_tiers(q, q, tiers)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    pairs = list(zip(tiers, _selections(tiers), strict=True))
    logits = [_qk(q, *pair).mul_(scale) for pair in pairs]
    lse = torch.cat(logits, -1).logsumexp(-1)
    shift = lse.masked_fill(lse == -math.inf, 0)  # nothing listed: exp(-inf - 0) = 0, not NaN
    weights = [(each - shift[..., None]).exp() for each in logits]
    mixed = [
        _pv(p, *pair) if pair[0].sifting is None else _sifted(each, p, *pair)
        for each, p, pair in zip(logits, weights, pairs, strict=True)
    ]
    out = functools.reduce(operator.add, mixed).to(q.dtype)
    if not want_logits:
        return AttentionResult(out)
    wide = [_widen(each, used) for each, (_, used) in zip(logits, pairs, strict=True)]
    return AttentionResult(out, torch.cat(wide, -1), lse)


def selective_qk_torch(
    q: Tensor, k: Tensor, slots: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Define ``selective_qk``: gather the rows, multiply in fp32, mask what lies beyond count."""
    tier = Tier(k, None, slots, count)
    native.check_tiers(q, q, [tier])
    used = _select(tier)
    return _widen(_qk(q, tier, used), used)


def selective_pv_torch(
    p: Tensor, v: Tensor, slots: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Define ``selective_pv``: gather the rows, multiply in fp32, leave out those beyond count."""
    tier = Tier(None, v, slots, count)
    native.check_tiers(p, None, [tier])
    used = _select(tier)
    if p.shape[-1] != used.width:
        raise ValueError(f"p has {p.shape[-1]} weights for each head, the lists {used.width}")
    return _pv(p[..., : used.longest], tier, used)


# Thresholds of ``Sifting``: so many to a nat, and how many at most.
STEPS, MOST_STEPS = 16, 255


class _Selection(NamedTuple):
    """Checked lists: trimmed to the longest one in use, None for the pool in its own order."""

    slots: Tensor | None  # [rows, 1 or kv_heads, longest]
    valid: Tensor | None  # bool [rows, 1 or kv_heads, longest]; None when every entry is used
    longest: int
    width: int  # of the lists as given


def _selections(tiers: Sequence[Tier]) -> list[_Selection]:
    found = []
    for number, tier in enumerate(tiers):
        with native.naming_tier(number, tiers):
            found.append(_select(tier))
    return found


def _select(tier: Tier) -> _Selection:
    """Find which entries of the lists are used; refuse a slot or a count that is out of range."""
    pool, slots, count = tier.pool, tier.slots, tier.count
    longest, valid, width = tier.width, None, tier.width
    if count is not None:
        least, longest = (int(x) for x in count.aminmax()) if count.numel() else (0, 0)
        if least < 0 or longest > width:
            raise ValueError(f"count must be within 0..{width}, got {least}..{longest}")
        if least < longest:
            valid = torch.arange(longest, device=pool.device) < count[..., None]
    if slots is None:
        return _Selection(None, valid, longest, width)
    slots = slots[..., :longest]
    if valid is not None:
        slots = slots.masked_fill(~valid, 0)
    if slots.numel():
        low, high = (int(x) for x in slots.aminmax())
        if low < 0 or high >= tier.pool_slots:
            raise ValueError(f"slots must be within 0..{tier.pool_slots - 1}, got {low}..{high}")
    return _Selection(slots, valid, longest, width)


def _qk(q: Tensor, tier: Tier, used: _Selection) -> Tensor:
    """Scores ``[rows, heads, longest]``; beside keys in few bits queries are rounded (``seen``)."""
    rows, heads, size = q.shape
    key = tier.pages.key if tier.pages else None
    if key and key.by_channel:
        scores = _gathered(_by_channel(q, key, tier.pool), used)
        return scores if used.valid is None else scores.masked_fill(~_each(used, heads), -math.inf)
    few = key is not None and FORMATS[key.format] not in PLAIN
    q = seen(q, key.format) if key and few else q.float()
    k = key.unpack(tier.pool) if key else tier.pool
    keys = _gather(k, used).float()  # [rows or 1, kv_heads, longest, head_dim]
    scores = q.reshape(rows, k.shape[1], heads // k.shape[1], size) @ keys.mT
    if used.valid is not None:
        scores = scores.masked_fill(~used.valid[:, :, None], -math.inf)
    return scores.reshape(rows, heads, used.longest)


def _by_channel(q: Tensor, key: Side, packed: Tensor) -> Tensor:
    """Scores ``[rows, heads, slots]`` with all keys of pages whose channels have scales.

    A query is multiplied by a page's scales and then rounded.
    """
    rows, heads, size = q.shape
    scale, zero = (part.float()[..., 0] for part in key.channels(packed))  # [pages, kv_heads, wide]
    wide = F.pad(q.float(), (0, key.wide - size)).view(rows, key.heads, -1, 1, key.wide)
    scaled = wide * scale.transpose(0, 1)[None, :, None]  # [rows, kv_heads, group, pages, wide]
    codes = key.whole_codes(packed).float()  # [pages, kv_heads, 32, wide]
    whole = torch.einsum("rhgpc,phtc->rhgpt", seen(scaled, key.format), codes)
    base = torch.einsum("rhgpc,phc->rhgp", scaled, zero)
    return (whole - base[..., None]).reshape(rows, heads, -1)


def _gathered(scores: Tensor, used: _Selection) -> Tensor:
    """Of scores ``[rows, heads, slots]`` those of the used slots."""
    if used.slots is None:
        return scores[..., : used.longest]
    group = scores.shape[1] // used.slots.shape[1]
    return scores.gather(2, used.slots.long().repeat_interleave(group, 1))


def _each(used: _Selection, heads: int) -> Tensor:
    """Which entries are used, for every query head."""
    assert used.valid is not None
    return used.valid.repeat_interleave(heads // used.valid.shape[1], 1)


def _pv(p: Tensor, tier: Tier, used: _Selection) -> Tensor:
    v, (rows, heads, longest) = tier.v, p.shape
    assert v is not None
    if tier.pages:
        v = tier.pages.value.unpack(v)
    values = _gather(v, used).float()
    weights = p.float().reshape(rows, v.shape[1], heads // v.shape[1], longest)
    if used.valid is not None:  # a weight of zero does not hide a NaN: 0 * NaN is NaN
        values = values.masked_fill(~used.valid[..., None], 0)
        weights = weights.masked_fill(~used.valid[:, :, None], 0)
    return (weights @ values).reshape(rows, heads, v.shape[2])


def _sifted(logits: Tensor, p: Tensor, tier: Tier, used: _Selection) -> Tensor:
    """``_pv`` of what ``Sifting`` reads, and the mean for what it leaves out."""
    sifting, (kv_heads, _) = tier.sifting, tier.heads
    assert sifting is not None
    group = p.shape[1] // kv_heads
    needed = _worth_reading(logits, sifting.most).unflatten(1, (kv_heads, group)).any(2)
    read = needed.repeat_interleave(group, 1)
    left = (p * ~read).sum(-1)
    shares = left.unflatten(1, (kv_heads, group)).mean(2)
    counts = (read & (logits > -math.inf))[:, ::group].sum(-1)
    sifts = (sifting.most > 0)[:, None, None]
    sifting.spent.add_(torch.stack([shares, counts.float()], -1) * sifts)
    mean = sifting.mean.repeat_interleave(group, 1)
    return _pv(p * read, tier, used) + left[..., None] * mean


def _worth_reading(logits: Tensor, most: Tensor) -> Tensor:
    """Which of ``logits [rows, heads, n]`` each head needs: not below its threshold."""
    top = (
        logits.amax(-1, keepdim=True)
        if logits.shape[-1]
        else logits.new_zeros(*logits.shape[:2], 1)
    )
    relative = (logits - top).exp().nan_to_num(nan=0.0)
    steps = ((top - logits) * STEPS).ceil().nan_to_num(nan=MOST_STEPS + 1).clamp(max=MOST_STEPS + 1)
    mass = relative.new_zeros(*logits.shape[:2], MOST_STEPS + 2).scatter_add_(
        2, steps.long(), relative
    )
    enough = mass.cumsum(-1) >= ((1 - most)[:, None] * relative.sum(-1))[..., None]
    enough[..., -1] = True
    first = enough.int().argmax(-1, keepdim=True)
    everything = (first > MOST_STEPS) | (most[:, None, None] <= 0)
    return (steps <= first) | everything


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
    return F.pad(scores, (0, used.width - used.longest), value=-math.inf)
