"""What a server is told at its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Limits


@dataclass(frozen=True)
class Settings:
    """How a server serves.

    Attributes:
        model: the name that requests call the model by.
        keys: of which every request must bring one; empty: anybody may ask.
        body: bytes of a request's body at most.
        pixels: of a picture at most.
        seconds: that a request may take from its arrival to its end.
        hosts: from which pictures are fetched over https; empty: from none.
        origins: whose pages may ask from a browser.
        limits: of what a request may ask for.
    """

    model: str
    keys: tuple[str, ...] = ()
    body: int = 32_000_000
    pixels: int = 40_000_000
    seconds: float = 600.0
    hosts: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
