"""Attention of one layer over lists of slots, repeated step after step: planned once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ops import native, tape
from ..ops.attention import AttentionPlan, AttentionResult, Tier, tiered_attention
from ..ops.native import Scratch, Sifting
from .pool import PagedPool, Pool
from .sifted import Sifted
from .slot_lists import SlotLists


@dataclass(frozen=True, eq=False)
class Listed:
    """A pool and what rows attend of it: ``slots [rows, 1, max]``, ``count [rows, 1]`` int32."""

    pool: Pool | PagedPool
    slots: Tensor
    count: Tensor
    sifting: Sifting | None = None

    def tier(self) -> Tier:
        """The pool's tensors as they are now."""
        pool = self.pool
        if isinstance(pool, Pool):
            return Tier(pool.k, pool.v, self.slots, self.count)
        # Of a layer that holds nothing in a format, a page that no list names: none has no address.
        data = pool.data if len(pool.data) else pool.data.new_zeros(1, pool.layout.nbytes)
        k, v = pool.layout.sides(data)
        return Tier(k, v, self.slots, self.count, pool.layout, self.sifting)


def listed_in_formats(
    lists: SlotLists,
    sifted: Sifted,
    kind: int,
    layer: int,
    most: Tensor,
    pool_of: Callable[[str], Pool | PagedPool],
) -> Iterator[Listed]:
    """What a layer attends of each format behind the plain list: of as many rows as ``most``, what
    they may leave out, speaks of. ``pool_of`` a format is the layer's.
    """
    rows = slice(len(most))
    for tier, (name, part) in enumerate(lists.tiers):
        slots = lists.slots[kind, layer, rows, None, part]
        count = lists.counts[kind, tier, layer, rows, None]
        yield Listed(pool_of(name), slots, count, sifted.of(tier, layer, most))


class ListedAttention:
    """Attends the same lists of a layer's pools in every step; entries and counts may change in
    place.

    Checking shapes and passing addresses costs more than attending a few hundred slots, so a native
    call is planned at its first use and then only run. The result lies in a buffer that the next
    call overwrites.
    """

    def __init__(
        self,
        lists: Sequence[Listed],
        run: Callable[[], int] | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """Attend all ``lists``.

        ``run`` says where the list begins if it is one row's unbroken run of slots, and the only
        list: then plain torch need not gather it. ``scratch`` is shared with whoever never attends
        at the same time.
        """
        self._lists, self._run, self._scratch = lists, run, scratch
        self._plans: dict[bool, tuple[AttentionPlan, Tensor]] = {}

    def __call__(self, q: Tensor, scores: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attend with ``q [rows, heads, head_dim]``; the same shape comes back.

        Logits ``[rows, heads, max of all lists]`` and their log-sum-exp are written into
        ``scores``, which must be the same tensors in every call.
        """
        wanted = scores is not None
        if wanted not in self._plans and not self._native(q):
            return self._in_torch(q, scores)
        if tape.recording():  # a copy would not be recorded, but q stays where it is
            plan, _ = tape.alive(self._planned(q, scores))
        else:
            if wanted not in self._plans:
                self._plans[wanted] = self._planned(q.clone(), scores)
            plan, queries = self._plans[wanted]
            queries.copy_(q)
        plan.run()
        assert plan.out is not None
        return plan.out

    def _native(self, q: Tensor) -> bool:
        return all(native.serves(q, each.tier()) for each in self._lists)

    def _planned(
        self, queries: Tensor, scores: tuple[Tensor, Tensor] | None
    ) -> tuple[AttentionPlan, Tensor]:
        tiers, (logits, lse) = [each.tier() for each in self._lists], scores or (None, None)
        wanted = scores is not None
        plan = AttentionPlan(
            queries, tiers, want_logits=wanted, logits=logits, lse=lse, scratch=self._scratch
        )
        return plan, queries

    def _in_torch(self, q: Tensor, scores: tuple[Tensor, Tensor] | None) -> Tensor:
        result = tiered_attention(q, self._tiers_in_torch(), want_logits=scores is not None)
        _keep(result, scores)
        return result.out

    def _tiers_in_torch(self) -> list[Tier]:
        if self._run is None:
            return [each.tier() for each in self._lists]
        (only,), first = self._lists, self._run()
        run = slice(first, first + int(only.count))
        assert isinstance(only.pool, Pool), "only plain slots are a run"
        return [Tier(only.pool.k[run], only.pool.v[run])]


def _keep(result: AttentionResult, scores: tuple[Tensor, Tensor] | None) -> None:
    """Write what a result says beside its output into ``scores``, which may be wider."""
    if scores is None or result.logits is None or result.lse is None:
        return
    scores[0].fill_(float("-inf"))
    scores[0][..., : result.logits.shape[-1]] = result.logits
    scores[1].copy_(result.lse)
