"""A-VL: image tokens in tiers, text in recent and heavy-hitter slots (arXiv 2409.14846, AAAI 2025).

Image tokens are ranked per layer by the attention of one query, averaged over heads:

- secondary: the best S of a picture's tokens at the last prompt token. Stored, the rest is freed.
- core: the best C of the picture, a subset of the secondary ones. Attended at every step.
- every K-th decode step attends all secondary tokens; its own weights choose the core that serves
  from the next step on. With K = 3 those are steps 3, 6, 9, ...

All shares are of the picture's original token count, truncated: S45 C30 of 576 store 259 and attend
172. Text after the last picture keeps round(T * its length) tokens per head, at least ``floor``, by
H2O's rule; everything before the last picture is never evicted. The filter P drops image tokens
from the hidden states after layer L, once, during prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import OptionError
from .cut import best, most_of_pictures, without_the_least
from .policy import FREED, PLAIN, Budget, Policy, check_bits, check_count, check_layer, check_share
from .select import heavy_and_recent

if TYPE_CHECKING:
    from torch import Tensor

    from .layout import Kept, Layout
    from .received import Received


@dataclass(frozen=True)
class Avl(Policy):
    """The paper's policy; the defaults are its S45 C30 K3 P90 T70 row.

    Attributes:
        secondary: S, share of the image tokens that is stored.
        core: C, share attended at every step; None: no core tier, all secondary are attended.
        every: K; 0: the core is chosen once and never again.
        prefill: P, share of image tokens whose hidden states go on after ``layer``; 1: all.
        layer: L, counted from 1.
        text: T, share of the text after the last picture that a head keeps; 1: all.
        heavy: share of the text budget that goes to heavy hitters, the rest to the most recent.
        floor: text tokens that are always kept.
        format: of the secondary tokens, the core among them (``ops.pages``); plain: as text.
        minor: what becomes of the others: freed, as the paper has it, or a format that they are
            kept in. They are read whenever all secondary tokens are, and never become core.
        cross: share of a picture's features that each cross layer attends, where a model has such,
            in steps that attend the core: ours, not the paper's; None: all of them.
        skip: share of a head's attention to what lies in a format whose values may stay unread.
    """

    name: ClassVar[str] = "avl"

    secondary: float = 0.45
    core: float | None = 0.30
    every: int = 3
    prefill: float = 0.90
    layer: int = 2
    text: float = 0.70
    heavy: float = 0.70
    floor: int = 20
    format: str = PLAIN
    minor: str = FREED
    cross: float | None = None
    skip: float = 0.0

    def __post_init__(self) -> None:
        check_bits(self, "format", PLAIN)
        check_bits(self, "minor", FREED)
        check_share(self, "skip")
        if self.skip and self.format == PLAIN and self.minor == FREED:
            raise OptionError(
                f"cache policy avl: skip is {self.skip}, and nothing is in a format",
                hint="give format= or minor= too, or leave out skip",
            )
        for key in ("secondary", "prefill", "text", "heavy"):
            check_share(self, key)
        if self.core is not None:
            check_share(self, "core", high=self.secondary, limit="secondary")
        check_share(self, "prefill", low=self.secondary, limit="secondary")
        if self.cross is not None:
            check_share(self, "cross")
        for key in ("every", "floor"):
            check_count(self, key)
        check_count(self, "layer", low=1)

    def check_depth(self, layers: int, cross_layers: int = 0) -> None:
        """Where tokens are dropped after a layer, it must be there."""
        if self.prefill < 1:
            check_layer(self, self.layer, layers)
        if self.minor != FREED and cross_layers:
            raise OptionError(
                f"cache policy avl: minor is {self.minor}, and features have no such tier",
                hint="leave it out; format= is of features too",
            )
        if self.cross is not None and not cross_layers:
            raise OptionError(
                f"cache policy avl: cross is {self.cross}, and this model has no cross layers",
                hint="leave it out, or use it with Llama-3.2-Vision",
            )

    def retain(self, layer: int, layout: Layout, received: Received) -> Kept:
        """Secondary and core of every picture, and the text budget."""
        import torch

        from .layout import InFormat, Kept

        nothing = torch.empty(0, dtype=torch.int64, device=layout.image_of.device)
        secondary, minor, core = [nothing], [nothing], []
        for index, size in enumerate(layout.image_sizes):
            columns, others = self._chosen(index, size, layout, received)
            secondary.append(columns)
            minor.append(others)
            if self.core is not None:
                core.append(best(columns, received, self.core_size(size)))
        text, scores = self._keep_text(layout, received)
        shared, packed = [layout.fixed()], list[InFormat]()
        if self.format == PLAIN:
            shared += secondary
        else:
            packed.append(InFormat(self.format, torch.cat(secondary).sort().values))
        if self.minor != FREED:
            packed.append(InFormat(self.minor, torch.cat(minor).sort().values, minor=True))
        return Kept(
            shared=torch.cat(shared).sort().values,
            text=text,
            core=torch.cat(core).sort().values if core else None,
            text_scores=scores,
            packed=tuple(packed),
        )

    def _chosen(
        self, index: int, size: int, layout: Layout, received: Received
    ) -> tuple[Tensor, Tensor]:
        """Secondary and minor columns of a picture; those of earlier turns are chosen already."""
        import torch

        columns = layout.picture(index)
        if index >= layout.settled:
            chosen = best(columns, received, int(self.secondary * size))
            return chosen, columns[~torch.isin(columns, chosen)]
        if layout.minor is None:
            return columns, columns[:0]
        minor = layout.minor[columns]
        return columns[~minor], columns[minor]

    def most_kept(self, layout: Layout) -> tuple[int, int]:
        """See ``Policy.most_kept``."""
        share = self.secondary if self.format == PLAIN else 0
        shared = most_of_pictures(layout, lambda size: int(share * size))
        budget, text = self.text_budget(*layout.lengths()), layout.columns - layout.text_start
        return shared, text if budget is None else min(budget.total, text)

    def most_packed(self, layout: Layout) -> dict[str, int]:
        """See ``Policy.most_packed``."""
        sizes = [layout.image_sizes[i] for i in range(layout.settled, len(layout.image_sizes))]
        kept = sum(int(self.secondary * size) for size in sizes)
        tokens = {self.minor: sum(sizes) - kept}
        tokens[self.format] = tokens.get(self.format, 0) + kept
        return {name: count for name, count in tokens.items() if name not in (PLAIN, FREED)}

    def leaves_out(self) -> float:
        """See ``Policy.leaves_out``."""
        return self.skip

    def _keep_text(self, layout: Layout, received: Received) -> tuple[Tensor, Tensor | None]:
        """The text columns each head keeps, and the attention they have received."""
        budget = self.text_budget(*layout.lengths())
        if budget is None:
            return layout.text(), None
        scores = received.accumulated(layout.text_seen)[:, layout.text_start :]
        positions = layout.positions[:, layout.text_start :].expand(len(scores), -1)
        total = min(budget.total, scores.shape[1])
        kept = heavy_and_recent(scores, positions, total, min(budget.recent, total))
        return kept + layout.text_start, scores.gather(1, kept)

    def narrow(self, layer: int, layout: Layout, received: Received) -> Tensor | None:
        """After layer L: the best P of every new picture, and everything that is no picture."""
        if layer + 1 != self.layer or self.prefill == 1:
            return None
        return without_the_least(layout, received, lambda size: int(self.prefill * size))

    def text_budget(self, text_seen: int | None, seen: int) -> Budget | None:
        """round(T * length) tokens, at least ``floor``; ``heavy`` of them heavy hitters.

        Without a picture nothing is evicted.
        """
        if self.text == 1 or text_seen is None:
            return None
        total = max(self.floor, round(self.text * text_seen))
        return Budget(total, total - int(self.heavy * total))

    def attends_core(self, step: int) -> bool:
        """All steps but every K-th."""
        return self._cored and not self.reranks(step)

    def reranks(self, step: int) -> bool:
        """Every K-th step."""
        return self._cored and self.every > 0 and step % self.every == 0

    @property
    def _cored(self) -> bool:
        return self.core is not None or self.cross is not None

    def core_size(self, image_tokens: int) -> int:
        """int(C * I)."""
        return image_tokens if self.core is None else int(self.core * image_tokens)

    def feature_format(self) -> str:
        """See ``Policy.feature_format``: that of secondary tokens."""
        return self.format

    def feature_core(self, features: int) -> int | None:
        """See ``Policy.feature_core``: int(cross * features)."""
        return None if self.cross is None else int(self.cross * features)
