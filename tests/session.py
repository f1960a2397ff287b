"""One sequence with pools of its own, driven by hand: what a test asks of it and no more."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.cache.observe import Observer
from engine.cache.row import Row
from engine.models.vision_language import VisionLanguageModel
from engine.policies.policy import Policy
from engine.running.stepping import Stepper, Stepping
from engine.running.turn import Turn, make_pools, prefill


class Session:
    """Prefill a turn, then decode tokens one by one."""

    def __init__(
        self,
        model: VisionLanguageModel,
        policy: Policy,
        observer: Observer | None = None,
        stepping: Stepping | None = None,
    ) -> None:
        self.model, self.policy, self.observer = model, policy, observer
        self.pools = make_pools(model)
        self.row: Row | None = None
        self.stepper = Stepper(model, self.pools, stepping or Stepping())

    def prefill(self, turn: Turn, new_tokens: int) -> Tensor:
        """The next token's logits ``[vocab]``."""
        if self.stepper.rows:
            self.row = self.stepper.leave(0)
        arguments = self.model, self.pools, self.policy, turn, new_tokens, self.row, self.observer
        self.row, logits = prefill(*arguments)
        return logits

    def decode(self, token_id: int) -> Tensor:
        """The next token's logits ``[vocab]``."""
        if not self.stepper.rows:
            assert self.row is not None, "prefill comes first"
            self.stepper.join(self.row)
        return self.stepper.step(torch.tensor([token_id])).flatten()
