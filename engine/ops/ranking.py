"""The policy launch: rank and age the cached tokens of all layers at once, after a step.

Every layer leaves its scaled logits and log-sum-exp (``selective_attention`` with ``want_logits``);
``exp(logit - lse)`` are then the step's attention weights. Two operators turn them into decisions:
``rank`` chooses the next core list (A-VL, arXiv 2409.14846), ``age`` accumulates the attention that
text tokens receive and evicts the lightest (H2O, arXiv 2306.14048). A *problem* is one layer of one
row of the batch, layer by layer: problem ``p`` is of row ``p % rows``. One launch replaces several
small ones per layer; nothing waits for the host, so on a GPU both can run on a side stream or
inside a captured graph. Each has a torch twin.

Both change tensors in place, the same ones step after step: ``plan_rank`` and ``plan_age`` check
them once and return the call that may then be repeated. Entries out of range raise ValueError on a
CPU; on a GPU the flag ``error`` (int32 [1]) is set to 1.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import native
from .native import describe


def plan_rank(
    logits: Tensor,
    lse: Tensor,
    slots: Tensor,
    out: Tensor,
    first: Tensor,
    last: Tensor,
    keep: Tensor,
    at: Tensor,
    wanted: Tensor,
    *,
    error: Tensor | None = None,
    isa: str = "",
) -> Callable[[], None]:
    """Write the slots of the ``keep`` entries with the highest head-mean weight, in list order.

    logits fp32 ``[problems, heads, width]``; lse fp32 ``[problems, heads]``; slots and out int32
    ``[problems, width]`` are lists. wanted int32 ``[rows]``; first, last, keep, at int32
    ``[problems]``: where a row is wanted (not 0), of each of its lists' entries first..last
    (exclusive), which ``slots`` names, the best are written to ``out`` from entry ``at`` on.
    Exact; ties go to the lower entry, NaN counts as 0.
    """
    rows = {"wanted": wanted}
    runs = {"first": first, "last": last, "keep": keep, "at": at}
    lists = {"slots": slots, "out": out}
    _check(logits, lse, rows, runs | lists)
    for name, list_ in lists.items():
        if list_.shape != (len(logits), logits.shape[2]):
            raise ValueError(f"{name} is {describe(list_)} but logits {describe(logits)}")
    if not native.loaded(logits.device.type):
        return partial(rank_torch, logits, lse, slots, out, first, last, keep, at, wanted)
    tensors = {"logits": logits, "lse": lse} | lists | runs | rows
    return native.PolicyPlan("rank", tensors, _sizes(logits, rows), error, isa).run


def plan_age(
    logits: Tensor,
    lse: Tensor,
    first: Tensor,
    start: Tensor,
    used: Tensor,
    budget: Tensor,
    recent: Tensor,
    position: Tensor,
    scores: Tensor,
    positions: Tensor,
    write: Tensor,
    *,
    error: Tensor | None = None,
    isa: str = "",
) -> Callable[[], None]:
    """Credit this step's weights to text tokens, then find each head a place for the next token.

    first int32 and start int64 ``[problems]``: text is entries first.. of a list, and its place 0
    is pool slot start. used, budget, recent, position int32 ``[rows]``: how many tokens there are,
    how many may stay (-1: all), and the newest one's position. Changed in place: scores fp32 and
    positions int32 ``[problems, kv_heads, places]``, write int64 ``[problems, kv_heads]``. Weights
    are summed over the query heads of a kv head. Over budget, a head's next token takes the place
    of the lowest score (the youngest if tied) outside the ``recent`` last positions; else, or where
    all are recent, the place behind the last. There its score is 0, its position ``position + 1``,
    and write is ``slot * kv_heads + head``.
    """
    rows = {"used": used, "budget": budget, "recent": recent, "position": position}
    state = {"scores": scores, "positions": positions, "write": write}
    _check(logits, lse, rows, {"first": first, "start": start} | state)
    if scores.shape != positions.shape or write.shape != scores.shape[:2]:
        raise ValueError(f"scores is {describe(scores)}, positions {describe(positions)}")
    if not native.loaded(logits.device.type):
        return partial(age_torch, logits, lse, first, start, *rows.values(), *state.values())
    tensors = {"logits": logits, "lse": lse, "first": first, "start": start} | state | rows
    sizes = {"kv_heads": scores.shape[1], "places": scores.shape[2]}
    return native.PolicyPlan("age", tensors, _sizes(logits, rows) | sizes, error, isa).run


def rank_torch(
    logits: Tensor,
    lse: Tensor,
    slots: Tensor,
    out: Tensor,
    first: Tensor,
    last: Tensor,
    keep: Tensor,
    at: Tensor,
    wanted: Tensor,
) -> None:
    """Define ``rank``, one problem at a time."""
    runs = zip(*(each.tolist() for each in (first, last, keep, at)), strict=True)
    chosen, width = wanted.tolist(), logits.shape[2]
    for p, (begin, end, count, place) in enumerate(runs):
        if not chosen[p % len(chosen)]:
            continue
        if not (0 <= begin <= begin + count <= end <= width and 0 <= place <= width - count):
            raise ValueError(f"rank: entries {begin}..{end}, keep {count} do not fit problem {p}")
        mean = _weights(logits[p], lse[p])[:, begin:end].mean(0)
        best = mean.sort(descending=True, stable=True).indices[:count].sort().values
        out[p, place : place + count] = slots[p, begin:end][best]


def age_torch(
    logits: Tensor,
    lse: Tensor,
    first: Tensor,
    start: Tensor,
    used: Tensor,
    budget: Tensor,
    recent: Tensor,
    position: Tensor,
    scores: Tensor,
    positions: Tensor,
    write: Tensor,
) -> None:
    """Define ``age``: all problems and heads at once, what is not in use masked."""
    layers = len(logits) // len(used)
    used, budget, recent, position = (
        row.repeat(layers) for row in (used, budget, recent, position)
    )
    kv_heads, places = scores.shape[1:]
    if ((first < 0) | (used < 0) | (used >= places) | (first + used > logits.shape[2])).any():
        raise ValueError("age: the text's entries do not fit the list or the places")
    place = torch.arange(places, device=logits.device)
    in_use = (place < used[:, None])[:, None]
    entries = (first[:, None] + place).clamp(max=logits.shape[2] - 1).long()
    shape = (*logits.shape[:2], places)
    gathered = logits.gather(2, entries[:, None].expand(shape))
    received = _weights(gathered, lse).unflatten(1, (kv_heads, -1)).sum(2)
    scores += received.masked_fill(~in_use, 0)
    old = in_use & (positions <= (position - recent)[:, None, None])
    lightest = _lightest(scores, positions, old)
    over = ((budget >= 0) & (budget < used))[:, None] & (lightest >= 0)
    chosen = torch.where(over, lightest, used[:, None])[..., None]
    scores.scatter_(2, chosen, 0.0)
    positions.scatter_(2, chosen, (position + 1)[:, None, None].expand_as(chosen).int())
    head = torch.arange(kv_heads, device=logits.device)
    write.copy_((start[:, None] + chosen[..., 0]) * kv_heads + head)


def _lightest(scores: Tensor, positions: Tensor, old: Tensor) -> Tensor:
    """For each head the place with the lowest score, then the highest position, among ``old``.

    All ``[problems, kv_heads, places]``; -1 where no token is old.

    >>> scores, positions = torch.tensor([[[5.0, 1.0, 0.0]]]), torch.tensor([[[0, 1, 2]]])
    >>> _lightest(scores, positions, old=torch.tensor([[[True, True, False]]]))
    tensor([[1]])
    """
    lowest = scores.masked_fill(~old, float("inf")).amin(-1, keepdim=True)
    youngest = positions.masked_fill(~(old & (scores == lowest)), -1).max(-1)
    return torch.where(youngest.values >= 0, youngest.indices, -1)


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """This step's attention weights, in the shape of logits; 0 where a list was empty."""
    return (logits - lse[..., None]).exp().nan_to_num(nan=0.0)


def _sizes(logits: Tensor, rows: dict[str, Tensor]) -> dict[str, int]:
    problems, heads, width = logits.shape
    return {
        "problems": problems,
        "rows": len(next(iter(rows.values()))),
        "heads": heads,
        "width": width,
    }


_DTYPES = dict.fromkeys(("logits", "lse", "scores"), torch.float32)
_DTYPES |= dict.fromkeys(("start", "write"), torch.int64)


def _check(
    logits: Tensor, lse: Tensor, rows: dict[str, Tensor], problems: dict[str, Tensor]
) -> None:
    """Raise ValueError where sizes, dtypes or devices do not fit.

    ``rows`` and ``problems``: tensors by name, with an entry for each row or problem.
    """
    if logits.ndim != 3 or lse.shape != logits.shape[:2]:
        raise ValueError(f"logits is {describe(logits)} but lse is {describe(lse)}")
    count = len(next(iter(rows.values())))
    if not count or not len(logits) or len(logits) % count:
        raise ValueError(f"{len(logits)} problems are no whole layers of {count} rows")
    problems = {"logits": logits, "lse": lse, **problems}
    for length, tensors in ((count, rows), (len(logits), problems)):
        for name, t in tensors.items():
            dtype = _DTYPES.get(name, torch.int32)
            if t.dtype != dtype or len(t) != length or t.device != logits.device:
                raise ValueError(f"{name} must be {length} of {dtype}, got {describe(t)}")
            if not t.is_contiguous():
                raise ValueError(f"{name} must be contiguous")
