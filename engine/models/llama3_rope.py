"""Llama 3's rotary frequencies for contexts longer than those it was first trained with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..checkpoint.config import ConfigReader


@dataclass(frozen=True)
class Llama3Rope:
    """How frequencies are slowed down (Llama 3.1, 2024).

    A frequency that turns more than ``high`` times within ``original`` tokens stays, one that turns
    less than ``low`` times is divided by ``factor``, and between the two the share of either goes
    linearly with the number of turns.
    """

    factor: float
    low: float
    high: float
    original: int

    @classmethod
    def parse(cls, section: ConfigReader) -> Llama3Rope:
        """Read ``rope_scaling`` or, since transformers 5, ``rope_parameters``."""
        rope = cls(
            factor=section.number("factor"),
            low=section.number("low_freq_factor"),
            high=section.number("high_freq_factor"),
            original=section.integer("original_max_position_embeddings"),
        )
        if rope.low >= rope.high:
            raise section.fail(
                "low_freq_factor", f"is {rope.low:g}; it must be below high_freq_factor"
            )
        return rope

    def slowed(self, frequencies: Tensor) -> Tensor:
        """Fp32 ``frequencies``, in radians a token, as the model was trained with them."""
        turns = self.original * frequencies / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)
