"""Several policies as one: what is stored is one's affair, which tokens go on may be another's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..errors import OptionError
from .policy import Budget, Policy

if TYPE_CHECKING:
    from torch import Tensor

    from .layout import Kept, Layout
    from .received import Received


@dataclass(frozen=True)
class Composed(Policy):
    """One of ``policies`` at most decides what is stored and attended; all may narrow.

    ``avl:prefill=1+fastv:layer=2`` stores A-VL's tiers of what FastV has left.
    """

    name: ClassVar[str] = "composed"

    policies: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        for what in ("stores", "trims"):
            both = [policy.name for policy in self.policies if getattr(policy, what)]
            if len(both) > 1:
                raise OptionError(
                    f"cache policies {' and '.join(both)} both decide what is stored",
                    hint="join one of them with a policy that only drops tokens, such as fastv",
                )

    @property
    def _storing(self) -> Policy:
        return next((policy for policy in self.policies if policy.stores), self.policies[0])

    def for_sequence(self) -> Policy:
        """See ``Policy.for_sequence``."""
        return replace(self, policies=tuple(policy.for_sequence() for policy in self.policies))

    def check_depth(self, layers: int, cross_layers: int = 0) -> None:
        """See ``Policy.check_depth``."""
        for policy in self.policies:
            policy.check_depth(layers, cross_layers)

    @property
    def in_one_piece(self) -> bool:
        """See ``Policy.in_one_piece``."""
        return self._storing.in_one_piece

    def attending(self, layer: int, layout: Layout, received: Received) -> Tensor | None:
        """See ``Policy.attending``."""
        return self._storing.attending(layer, layout, received)

    @property
    def packs_every(self) -> int:
        """See ``Policy.packs_every``."""
        return self._storing.packs_every

    def most_plain(self, tokens: int) -> int:
        """See ``Policy.most_plain``."""
        return self._storing.most_plain(tokens)

    def retain(self, layer: int, layout: Layout, received: Received) -> Kept:
        """See ``Policy.retain``."""
        return self._storing.retain(layer, layout, received)

    def most_kept(self, layout: Layout) -> tuple[int, int]:
        """See ``Policy.most_kept``."""
        return self._storing.most_kept(layout)

    def most_packed(self, layout: Layout) -> dict[str, int]:
        """See ``Policy.most_packed``."""
        return self._storing.most_packed(layout)

    def leaves_out(self) -> float:
        """See ``Policy.leaves_out``."""
        return self._storing.leaves_out()

    def narrow(self, layer: int, layout: Layout, received: Received) -> Tensor | None:
        """What the first policy that drops anything lets through."""
        found = (policy.narrow(layer, layout, received) for policy in self.policies)
        return next((onward for onward in found if onward is not None), None)

    @property
    def trims(self) -> bool:
        """See ``Policy.trims``."""
        return any(policy.trims for policy in self.policies)

    def features(self, received: Tensor) -> Tensor:
        """See ``Policy.features``."""
        return next(policy for policy in self.policies if policy.trims).features(received)

    def feature_format(self) -> str:
        """See ``Policy.feature_format``."""
        return self._storing.feature_format()

    def feature_core(self, features: int) -> int | None:
        """See ``Policy.feature_core``."""
        return self._storing.feature_core(features)

    def text_budget(self, text_seen: int | None, seen: int) -> Budget | None:
        """See ``Policy.text_budget``."""
        return self._storing.text_budget(text_seen, seen)

    def attends_core(self, step: int) -> bool:
        """See ``Policy.attends_core``."""
        return self._storing.attends_core(step)

    def reranks(self, step: int) -> bool:
        """See ``Policy.reranks``."""
        return self._storing.reranks(step)

    def core_size(self, image_tokens: int) -> int:
        """See ``Policy.core_size``."""
        return self._storing.core_size(image_tokens)

    @property
    def spec(self) -> str:
        """See ``Policy.spec``."""
        return "+".join(policy.spec for policy in self.policies)
