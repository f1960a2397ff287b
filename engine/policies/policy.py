"""What a policy may decide: it turns scores into index sets; storage belongs to the cache.

Policies import torch where they compute: a wrong spec is refused before it is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import OptionError
from ..naming import told
from ..options import as_number, parse_bits

if TYPE_CHECKING:
    from torch import Tensor

    from .layout import Kept, Layout
    from .received import Received


# Instead of a format: as text lies; kept no longer.
PLAIN, FREED = "plain", "freed"


@dataclass(frozen=True)
class Budget:
    """How many text tokens a head may keep, and how many of them for being the latest."""

    total: int
    recent: int


class Policy:
    """The base: keep everything, attend everything. Subclasses override what they change.

    The order within a forward pass: for each layer ``attending`` before its attention, ``retain``
    and then ``narrow`` behind it during prefill; for each decode step (counted from 1)
    ``attends_core``, then after the step ``text_budget`` evicts and ``reranks`` lets the step's own
    weights choose the next core.
    """

    name: ClassVar[str]

    @property
    def stores(self) -> bool:
        """Whether this policy decides what is stored."""
        return type(self).retain is not Policy.retain

    def for_sequence(self) -> Policy:
        """The policy of one sequence, asked once, before its first prefill.

        What one layer has found may serve later ones: a policy that remembers it between calls
        returns a copy here, and sequences that are decoded together stay apart.
        """
        return self

    def check_depth(self, layers: int, cross_layers: int = 0) -> None:
        """Raise OptionError if this policy is of a layer that a model lacks, of its ``layers`` or
        its ``cross_layers``.
        """

    @property
    def impartial(self) -> bool:
        """Whether what is stored of a picture depends on no later token, so that whatever is asked
        about it may begin with the same keys and values.
        """
        return not self.stores

    @property
    def in_one_piece(self) -> bool:
        """Whether all tokens of a prefill must pass a layer at once: ``attending`` is asked."""
        return False

    def attending(self, layer: int, layout: Layout, received: Received) -> Tensor | None:
        """Ascending columns that attend each other in a prefill's ``layer``, the last among them;
        the others get nothing of its attention. None: all of them.
        """
        return None

    @property
    def packs_every(self) -> int:
        """After every so many decode steps ``retain`` is asked again, of the text that came since
        and by the weights of the step; 0: never.
        """
        return 0

    def most_plain(self, tokens: int) -> int:
        """How many of ``tokens`` decoded ones lie in plain slots at any time at most."""
        return tokens

    def retain(self, layer: int, layout: Layout, received: Received) -> Kept:
        """What ``layer`` stores once its attention over ``layout``'s columns has run."""
        from .layout import Kept

        return Kept.everything(layout)

    def most_kept(self, layout: Layout) -> tuple[int, int]:
        """How many columns for all heads, and how many of evictable text, ``retain`` keeps of a
        layout at most, in any layer: known before a prompt is read.
        """
        return layout.text_start, layout.columns - layout.text_start

    def most_packed(self, layout: Layout) -> dict[str, int]:
        """How many columns ``retain`` has written in formats of the cache at most, by format; they
        are not counted by ``most_kept``.
        """
        return {}

    def leaves_out(self) -> float:
        """Share of what a tier of formats gets of a head's attention whose values a decode step may
        leave unread (``ops.native.Sifting``).
        """
        return 0.0

    def narrow(self, layer: int, layout: Layout, received: Received) -> Tensor | None:
        """Ascending new tokens whose hidden states go on after ``layer``; None: all of them."""
        return None

    @property
    def trims(self) -> bool:
        """Whether this policy chooses among the features that cross layers look at."""
        return type(self).features is not Policy.features

    def features(self, received: Tensor) -> Tensor:
        """Ascending features of a picture that cross layers keep, all of them alike. ``received
        [heads, features]`` fp32 is what the first of these layers gave them, summed over the tokens
        of the prompt that see the picture.
        """
        raise NotImplementedError

    def feature_format(self) -> str:
        """The format that cross layers' features are written in (``ops.pages``), or PLAIN."""
        return PLAIN

    def feature_core(self, features: int) -> int | None:
        """How many of a picture's ``features`` a cross layer attends in steps that attend the core,
        each its own, chosen as image tokens are; None: all of them in every step.
        """
        return None

    def text_budget(self, text_seen: int | None, seen: int) -> Budget | None:
        """Tokens a head may keep of the evictable text; None: no limit.

        ``text_seen`` counts tokens after the last picture (None without a picture), ``seen`` all.
        """
        return None

    def attends_core(self, step: int) -> bool:
        """Whether decode step ``step`` (1, 2, ...) attends the core only."""
        return False

    def reranks(self, step: int) -> bool:
        """Whether decode step ``step`` chooses a new core, which serves from the next step on."""
        return False

    def core_size(self, image_tokens: int) -> int:
        """Core tokens of a picture that had ``image_tokens``."""
        return image_tokens

    @property
    def spec(self) -> str:
        """The text that parses back to this policy: ``name:key=value,...``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        pairs = ",".join(f"{key}={_spelled(value)}" for key, value in values.items())
        return f"{self.name}:{pairs}" if pairs else self.name


# No model has as many tokens; steps and kernels count in 32 bits.
MOST = 1_000_000_000


def check_share(
    policy: Policy, key: str, low: float = 0.0, high: float = 1.0, limit: str = ""
) -> None:
    """Refuse a share outside [low, high]; ``limit`` names the parameter that bounds it."""
    value = _plain(policy, key, float)
    if not low <= value <= high:
        bound = f" ({limit})" if limit else ""
        raise OptionError(
            f"cache policy {policy.name}: {key} is {value}",
            hint=f"use a share from {low:g} to {high:g}{bound}",
        )


def check_count(policy: Policy, key: str, low: int = 0, high: int = MOST) -> None:
    """Refuse a count outside [low, high], or not whole."""
    value = _plain(policy, key, int)
    if not low <= value <= high:
        raise OptionError(
            f"cache policy {policy.name}: {key} is {value}",
            hint=f"use a whole number from {low} to {high}",
        )


def _plain(policy: Policy, key: str, kind: type) -> Any:
    """A parameter as Python's own number, which it becomes: numpy's are taken too."""
    value = as_number(f"cache policy {policy.name}: {key}", getattr(policy, key), kind)
    object.__setattr__(policy, key, value)
    return value


def check_bits(policy: Policy, key: str, *others: str) -> None:
    """Refuse what names no format of the cache and is none of ``others``."""
    value = getattr(policy, key)
    if value in others:
        return
    try:
        parse_bits(value)
    except OptionError as error:
        raise OptionError(
            f"cache policy {policy.name}: {key} is {told(value)}",
            hint=" or ".join([str(error.hint), *others]),
        ) from None


def check_layer(policy: Policy, layer: int, layers: int) -> None:
    """Refuse a layer beyond the model's last."""
    if layer > layers:
        raise OptionError(
            f"cache policy {policy.name}: layer is {layer}, the model has {layers}",
            hint=f"use 1 to {layers}",
        )


def _spelled(value: object) -> str:
    return "none" if value is None else str(value)
