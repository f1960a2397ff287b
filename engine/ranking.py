"""The policy launch: rank and age the cached tokens of all layers at once, after a step.

Every layer leaves its scaled logits and log-sum-exp (``selective_attention`` with ``want_logits``);
``exp(logit - lse)`` are then the step's attention weights. Two operators turn them into decisions:
``rank`` chooses the next core list (A-VL, arXiv 2409.14846), ``age`` accumulates the attention that
text tokens receive and evicts the lightest (H2O, arXiv 2306.14048). A *problem* is one layer of one
row of the batch. One launch replaces several small ones per layer; nothing waits for the host, so
on a GPU both can run on a side stream or inside a captured graph. Each has a torch twin.

Out-of-range entries: on a CPU ValueError; on a GPU the flag ``error`` (int32 [1]) is set to 1.
"""

import torch
from torch import Tensor

from engine import native
from engine.native import describe


def rank(
    logits: Tensor,
    lse: Tensor,
    first: Tensor,
    last: Tensor,
    keep: Tensor,
    slots: Tensor,
    out: Tensor,
    out_count: Tensor,
    *,
    error: Tensor | None = None,
    stream: int | None = None,
) -> None:
    """Write the slots of the ``keep`` entries with the highest head-mean weight, in list order.

    logits fp32 ``[problems, heads, width]``; lse fp32 ``[problems, heads]``; first, last, keep
    int32 ``[problems]``: entries first..last (exclusive) compete; slots int32
    ``[problems, width]`` is the list. Written: out int32 ``[problems, most]`` up to out_count int32
    ``[problems]``, which is ``min(keep, last - first)``. Exact; ties go to the lower entry, NaN
    counts as 0.
    """
    ints = {"first": first, "last": last, "keep": keep, "out_count": out_count}
    problems, heads, width = logits.shape
    _check(logits, lse, slots=slots, out=out, **ints)
    if not native.loaded():
        rank_torch(logits, lse, first, last, keep, slots, out, out_count)
        return
    tensors = {"logits": logits, "lse": lse, "slots": slots, "out": out, **ints}
    sizes = {"problems": problems, "heads": heads, "width": width, "most": out.shape[1]}
    native.run_policy("rank", logits, tensors, sizes, error, stream)


def age(
    logits: Tensor,
    lse: Tensor,
    first: Tensor,
    used: Tensor,
    budget: Tensor,
    recent: Tensor,
    scores: Tensor,
    positions: Tensor,
    victim: Tensor,
    *,
    error: Tensor | None = None,
    stream: int | None = None,
) -> None:
    """Add this step's weights to the scores of text tokens; where over budget, evict one per head.

    first, used, budget, recent int32 ``[problems]``: text is entries first.. of the list, ``used``
    of them; budget -1 never evicts. Changed in place: scores fp32 and positions int32
    ``[problems, kv_heads, places]``, victim int32 ``[problems, kv_heads]``. Weights are summed over
    the query heads of a kv head. The victim is the lowest score outside the ``recent`` latest
    positions (the youngest if tied): its score becomes inf, its position -1, and its place is the
    head's next free one; -1 where nothing is evicted.
    """
    ints = {"first": first, "used": used, "budget": budget, "recent": recent}
    problems, heads, width = logits.shape
    _check(logits, lse, scores=scores, positions=positions, victim=victim, **ints)
    if not native.loaded():
        age_torch(logits, lse, first, used, budget, recent, scores, positions, victim)
        return
    tensors = {"logits": logits, "lse": lse, "scores": scores, "positions": positions}
    tensors |= {"victim": victim, **ints}
    sizes = {"problems": problems, "heads": heads, "width": width}
    sizes |= {"kv_heads": scores.shape[1], "text": scores.shape[2]}
    native.run_policy("age", logits, tensors, sizes, error, stream)


def rank_torch(
    logits: Tensor,
    lse: Tensor,
    first: Tensor,
    last: Tensor,
    keep: Tensor,
    slots: Tensor,
    out: Tensor,
    out_count: Tensor,
) -> None:
    """Define ``rank``, one problem at a time."""
    for p, (begin, end, count) in enumerate(_rows(first, last, keep)):
        count = min(count, end - begin)
        if not 0 <= begin <= begin + count <= end <= logits.shape[2] or count > out.shape[1]:
            raise ValueError(f"rank: entries {begin}..{end}, keep {count} do not fit problem {p}")
        mean = _weights(logits[p], lse[p])[:, begin:end].mean(0)
        chosen = mean.sort(descending=True, stable=True).indices[:count].sort().values
        out[p, :count] = slots[p, begin:end][chosen]
        out_count[p] = count


def age_torch(
    logits: Tensor,
    lse: Tensor,
    first: Tensor,
    used: Tensor,
    budget: Tensor,
    recent: Tensor,
    scores: Tensor,
    positions: Tensor,
    victim: Tensor,
) -> None:
    """Define ``age``: all problems and heads at once, what is not in use masked."""
    kv_heads, places = scores.shape[1:]
    if ((first < 0) | (used < 0) | (used > places) | (first + used > logits.shape[2])).any():
        raise ValueError("age: the text's entries do not fit the list or the places")
    place = torch.arange(places, device=logits.device)
    in_use = (place < used[:, None])[:, None]
    entries = (first[:, None] + place).clamp(max=max(0, logits.shape[2] - 1)).long()
    shape = (*logits.shape[:2], places)
    gathered = logits.gather(2, entries[:, None].expand(shape))
    received = _weights(gathered, lse).unflatten(1, (kv_heads, -1)).sum(2)
    scores += received.masked_fill(~in_use, 0)
    lightest = _lightest(scores, positions, in_use, recent)
    over = ((budget >= 0) & (budget < used))[:, None]
    victim.copy_(torch.where(over, lightest, -1))
    gone = (place == victim[..., None]) & (victim >= 0)[..., None]
    scores.masked_fill_(gone, float("inf"))
    positions.masked_fill_(gone, -1)


def _lightest(scores: Tensor, positions: Tensor, in_use: Tensor, recent: Tensor) -> Tensor:
    """For each head the place with the lowest score, then the highest position, that is not recent.

    ``scores`` and ``positions`` ``[problems, kv_heads, places]``; -1 where every place is recent.

    >>> every = torch.ones(1, 1, 3, dtype=torch.bool)
    >>> scores, positions = torch.tensor([[[5.0, 1.0, 0.0]]]), torch.tensor([[[0, 1, 2]]])
    >>> _lightest(scores, positions, every, recent=torch.tensor([1]))
    tensor([[1]])
    """
    age_rank = positions.masked_fill(~in_use, -1).argsort(-1, descending=True).argsort(-1)
    open_to_eviction = in_use & (positions >= 0) & (age_rank >= recent[:, None, None])
    lowest = scores.masked_fill(~open_to_eviction, float("inf")).amin(-1, keepdim=True)
    tied = open_to_eviction & (scores == lowest)
    youngest = positions.masked_fill(~tied, -1).max(-1)
    return torch.where(youngest.values >= 0, youngest.indices, -1)


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """This step's attention weights, in the shape of logits; 0 where a list was empty."""
    return (logits - lse[..., None]).exp().nan_to_num(nan=0.0)


def _rows(*columns: Tensor) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _check(logits: Tensor, lse: Tensor, **others: Tensor) -> None:
    """Raise ValueError where shapes, dtypes or devices do not fit."""
    problems = logits.shape[0]
    if logits.ndim != 3 or lse.shape != logits.shape[:2]:
        raise ValueError(f"logits is {describe(logits)} but lse is {describe(lse)}")
    named = {"logits": logits, "lse": lse, **others}
    for name, t in named.items():
        wanted = torch.float32 if name in ("logits", "lse", "scores") else torch.int32
        if t.dtype != wanted or t.shape[0] != problems or t.device != logits.device:
            raise ValueError(f"{name} must be {wanted}, {problems} problems, got {describe(t)}")
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if "slots" in others and others["slots"].shape != (problems, logits.shape[2]):
        raise ValueError(f"slots is {describe(others['slots'])} but logits {describe(logits)}")
    if "scores" in others:
        scores, positions, victim = (others[n] for n in ("scores", "positions", "victim"))
        if scores.shape != positions.shape or victim.shape != scores.shape[:2]:
            raise ValueError(f"scores is {describe(scores)}, positions {describe(positions)}")
