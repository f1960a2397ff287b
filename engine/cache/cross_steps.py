"""Cross-attention of decode steps: every row's token over the features of the pictures it sees.

What is done for tokens is done for features: a row attends several tiers, one for each format, in
one call; a policy may leave values unread, and may have a core that each layer ranks again by its
own weights. To the lists, pictures are the parts of a row that has no text (``Row.across``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops.native import Scratch, Sifting
from .core_lists import CoreRuns
from .crossing import Project
from .lengths import RERANKS
from .listed import Listed, ListedAttention
from .pool import Holder, PagedPool, Pool
from .row import Row, means_of
from .sizes import Group, Sizes, carry
from .slot_lists import CORE, FULL, MIXED, SlotLists


class CrossLists:
    """The features that rows attend, in tensors that stay.

    Attributes:
        pools: those of every cross layer, by format.
        sizes: how large the tensors are.
        lists, runs, means, spent: as those of tokens, see ``State``; the plain lists are empty.
        most: that of ``State``.
        sees: ``[rows]`` fp32, 1 where a row sees a picture.
        wanted: ``[rows]`` int32, 1 where the core is ranked again behind the step.
    """

    def __init__(self, like: Tensor, holder: Holder) -> None:
        """``like [slots, kv_heads, head_dim]``; ``holder`` is told before anything here moves."""
        self._like, self._holder = like[:0], holder
        self.pools: dict[str, Sequence[Pool | PagedPool]] = {}
        self._make(0, Sizes())

    def _make(self, layers: int, sizes: Sizes) -> None:
        self.layers, self.sizes = layers, sizes
        device, (_, kv_heads, head_dim) = self._like.device, self._like.shape
        self.lists = SlotLists(layers, sizes, device, spare=False)
        self.runs = CoreRuns(layers, sizes, device)
        self.sees = torch.zeros(sizes.rows, device=device)
        self.wanted = torch.zeros(sizes.rows, dtype=torch.int32, device=device)
        each = (len(sizes.tiers) if sizes.sifting else 0, layers, sizes.rows, kv_heads)
        self.means = torch.zeros(*each, head_dim, device=device)
        self.spent = torch.zeros(*each, 2, device=device)

    @property
    def tiered(self) -> bool:
        """Whether some row has a core tier."""
        return bool(self.sizes.pictures)

    def groups(self) -> list[Group]:
        """All tensors, in lists to the end of which larger ones add, each with its dimension that
        counts rows.
        """
        if not self.layers:
            return []
        return [
            ([self.runs.runs], 3),
            ([self.sees, self.wanted], 0),
            (self.lists.by_tier(), 2),
            (self.lists.counts.unbind(1), 2),
            (self.means.unbind(), 1),
            (self.spent.unbind(), 1),
        ]

    def join(self, row: Row, r: int, others: Sequence[Row]) -> None:
        """Write the lists of row ``r``, which is behind the ``others``."""
        across = row.across()
        layers = max(self.layers, len(across.layers))
        if not layers:  # nobody has seen a picture so
            return
        needed = (Sizes.of(across) if row.pictures else Sizes())._replace(rows=r + 1)
        if not self.layers or not self.sizes.covers(needed):
            self._enlarge(layers, self.sizes.covering(needed), others)
        self.sees[r] = float(bool(row.pictures))
        if not row.pictures:
            self.lists.counts[..., r] = 0
            self.runs.runs[..., r] = 0
            return
        for picture in row.pictures:
            self.pools[picture.format] = [extent.pool for extent in picture.extents]
            for pool in self.pools[picture.format]:
                pool.holders.add(self._holder)
        self.lists.join(across, r)
        self.runs.join(across, r)
        self.spent[:, :, r] = 0
        for tier in range(len(self.means)):
            name, like = self.lists.tiers[tier][0], self.means[tier, :, r]
            self.means[tier, :, r] = means_of(across, name, like)

    def _enlarge(self, layers: int, sizes: Sizes, rows: Sequence[Row]) -> None:
        self._holder.void()
        before = self.groups()
        self._make(layers, sizes)
        if before:
            carry(before, self.groups())
        for r, row in enumerate(rows):  # runs count from where lists begin
            if row.pictures:
                self.runs.join(row.across(), r)

    def sifted(self, r: int) -> Tensor | None:
        """What steps have left out and read of row ``r``'s values: fp32 ``[layers, 2]``."""
        return self.spent[:, :, r].sum((0, 2)) if len(self.spent) and r < self.sizes.rows else None


class CrossSteps:
    """Cross layers' attention in the steps of some rows, planned once; void when tensors move."""

    def __init__(self, lists: CrossLists, most: Callable[[], Tensor], scratch: Scratch) -> None:
        """``most`` says what rows may leave out (``State.most``); ``scratch`` is the steps'."""
        self.lists, self._most, self._scratch = lists, most, scratch
        self._kind, self._scored = FULL, False
        self.void()

    def void(self) -> None:
        """Let go of what was made for tensors where they lie."""
        self._attention: dict[tuple[int, int, int], ListedAttention] = {}
        self._scores: tuple[Tensor, Tensor] | None = None
        self._ranking: list[Callable[[], None]] = []

    def begin(self, kind: int, words: Tensor, *, scored: bool) -> None:
        """The coming step's course: which lists ``kind`` its rows attend by its ``words [WORDS,
        rows]``, and whether logits are wanted.
        """
        lists, tiered = self.lists, self.lists.tiered
        self._kind = (kind if kind in (FULL, MIXED) else CORE) if tiered else FULL
        self._scored = scored and tiered
        if self._kind == MIXED:
            lists.lists.complete(MIXED, slice(None), CORE, words)
        if self._scored:
            lists.wanted[: words.shape[1]] = words[RERANKS]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend the features that rows see, ``q [rows, heads, head_dim]``."""
        rows, key = len(q), (self._kind, layer, len(q))
        if key not in self._attention:
            self._attention[key] = ListedAttention(
                list(self._tiers(self._kind, layer, rows)), scratch=self._scratch
            )
        if not self._scored:
            return self._attention[key](q, None)
        if self._scores is None:
            self._scores = self._room(q.shape[1])
            self._ranking = list(self._ranked(*self._scores))
        logits, lse = self._scores
        return self._attention[key](q, (logits[layer, :rows], lse[layer, :rows]))

    def rank(self) -> None:
        """Behind the step: let its weights choose the core of all layers, where rows want it."""
        for work in self._ranking if self._scored else ():
            work()

    def _tiers(self, kind: int, layer: int, rows: int) -> Iterator[Listed]:
        crossed = self.lists
        for tier, (name, part) in enumerate(crossed.lists.tiers):
            sifting = None
            if len(crossed.means):
                means, spent = crossed.means[tier, layer, :rows], crossed.spent[tier, layer, :rows]
                sifting = Sifting(self._most()[:rows], means, spent)
            slots = crossed.lists.slots[kind, layer, :rows, None, part]
            count = crossed.lists.counts[kind, tier, layer, :rows, None]
            yield Listed(crossed.pools[name][layer], slots, count, sifting)

    def _room(self, heads: int) -> tuple[Tensor, Tensor]:
        """Where attention leaves logits and log-sum-exp, of all layers and rows."""
        crossed = self.lists
        size = crossed.layers, crossed.sizes.rows, heads
        device = crossed.sees.device
        logits = torch.zeros(*size, crossed.sizes.width, device=device)
        return logits, torch.zeros(size, device=device)

    def _ranked(self, logits: Tensor, lse: Tensor) -> Iterator[Callable[[], None]]:
        crossed, slots = self.lists, self.lists.lists.slots
        error = torch.zeros(1, dtype=torch.int32, device=logits.device)
        both = logits.flatten(0, 1), lse.flatten(0, 1)
        lists = slots[FULL], slots[CORE]
        yield from crossed.runs.ranking(slice(None), *both, *lists, crossed.wanted, error)


class CrossStepView:
    """A cross layer's view of a decode step; see ``CrossView``."""

    def __init__(self, steps: CrossSteps, layer: int, rows: int) -> None:
        self._steps, self._layer = steps, layer
        self._sees = steps.lists.sees[:rows]

    def attend(self, q: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """See ``CrossView.attend``; one query per row, and nothing is new."""
        return self._steps.attend(self._layer, q), self._sees
