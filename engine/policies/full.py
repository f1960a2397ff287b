"""The reference: every token is kept and attended. The exact model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .policy import Policy


@dataclass(frozen=True)
class Full(Policy):
    """No compression."""

    name: ClassVar[str] = "full"
