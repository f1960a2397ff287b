"""ZipVL: as many tokens count as attention says, the others are kept in fewer bits, or not at all.

In every layer a few probe queries tell which tokens are important (He et al., arXiv 2410.08584,
ICCV 2025). *How many* follows from the attention that columns receive: the fewest that make up tau
of it. *Which* follows from the same sums, each divided by how many probes can see the column. Only
important tokens attend in the prefill; the others pass the layer without its attention. Then all
keys and values are compressed, text as well as pictures: important ones to 4 bits and the others to
2 (the paper's first version), or the others are dropped (its second). Every 100 generated tokens
those are classified by the attention of the step and compressed alike.

The paper leaves open which queries probe (here the last 64 and 64 random ones) and what happens to
the last token where it is not among the important ones: here it always is, since the answer begins
from its hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from .policy import FREED, PLAIN, Policy, check_bits, check_count, check_share
from .select import top

if TYPE_CHECKING:
    from torch import Tensor

    from .layout import Kept, Layout
    from .received import Received


@dataclass(frozen=True)
class ZipVl(Policy):
    """The first version; ``format=plain,minor=freed`` is the second.

    Attributes:
        tau: share of the attention that important tokens receive together.
        share: share of the tokens that is important, whatever they receive; None: tau decides.
        format: of important tokens (``ops.pages``); plain: as they are.
        minor: what becomes of the others: a format, or freed.
        recent, random: how many queries probe, the last ones and others.
        sparse: 1: only important tokens attend in the prefill; 0: all.
        every: generated tokens that are compressed together; 0: none are.
        seed: of the random probes.
    """

    name: ClassVar[str] = "zipvl"

    tau: float = 0.975
    share: float | None = None
    format: str = "k4v4"
    minor: str = "k2v2"
    recent: int = 64
    random: int = 64
    sparse: int = 1
    every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self, "tau")
        if self.share is not None:
            check_share(self, "share")
        check_bits(self, "format", PLAIN)
        check_bits(self, "minor", FREED)
        check_count(self, "recent", low=1)
        for key in ("random", "every", "seed"):
            check_count(self, key)
        check_count(self, "sparse", high=1)

    @property
    def in_one_piece(self) -> bool:
        """See ``Policy.in_one_piece``."""
        return bool(self.sparse)

    def attending(self, layer: int, layout: Layout, received: Received) -> Tensor | None:
        """The important columns."""
        return self.important(received) if self.sparse else None

    def important(self, received: Received) -> Tensor:
        """Ascending columns that are important, the last one among them."""
        import torch

        rows = probes(received.queries, self.recent, self.random, self.seed)
        sums = received.mean_given_by(rows)
        columns = len(sums)
        if self.share is None:
            reached = sums.sort(descending=True).values.cumsum(0)
            count = int((reached < self.tau * len(rows)).sum()) + 1
        else:
            count = int(self.share * columns)
        own = torch.tensor(rows, device=sums.device) + columns - received.queries
        seen_by = (own[:, None] >= torch.arange(columns, device=sums.device)).sum(0)
        normalised = sums / seen_by
        normalised[-1] = float("inf")
        return top(normalised, max(1, count))

    def retain(self, layer: int, layout: Layout, received: Received) -> Kept:
        """All that is important, and the rest as ``minor`` says."""
        import torch

        from .layout import InFormat, Kept

        columns = torch.arange(layout.columns, device=layout.image_of.device)
        important = self.important(received)
        others = columns[~torch.isin(columns, important)]
        shared, packed = columns[:0], list[InFormat]()
        if self.format == PLAIN:
            shared = important
        else:
            packed.append(InFormat(self.format, important))
        if self.minor == FREED:  # what was classified before stays
            classified = others[others < min(layout.text_start, layout.columns - received.queries)]
            shared = torch.cat([shared, classified]).sort().values
        else:
            packed.append(InFormat(self.minor, others, minor=True))
        return Kept(shared=shared, text=columns[:0], packed=tuple(packed))

    def most_kept(self, layout: Layout) -> tuple[int, int]:
        """See ``Policy.most_kept``."""
        return layout.columns if self.format == PLAIN or self.minor == FREED else 0, 0

    def most_packed(self, layout: Layout) -> dict[str, int]:
        """See ``Policy.most_packed``: how many are important is not known before."""
        formats = {self.format, self.minor} - {PLAIN, FREED}
        return dict.fromkeys(sorted(formats), layout.columns)

    @property
    def packs_every(self) -> int:
        """See ``Policy.packs_every``."""
        return self.every

    def most_plain(self, tokens: int) -> int:
        """See ``Policy.most_plain``: where all are packed, no more than ``every``."""
        stay = not self.every or self.format == PLAIN or self.minor == FREED
        return tokens if stay else min(tokens, self.every)


@lru_cache(maxsize=64)
def probes(queries: int, recent: int, random: int, seed: int) -> tuple[int, ...]:
    """Ascending queries that probe: the ``recent`` last ones and ``random`` others."""
    import torch

    before = max(0, queries - recent)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(before, generator=generator)[:random].sort().values
    return *drawn.tolist(), *range(before, queries)
