"""Prompts of several sizes in one cache, decoded together: eagerly, as captured, or beside."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from engine.cache.pool import Pool
from engine.cache.prefill import Prefill
from engine.cache.row import Row
from engine.loading.preparing import prepare
from engine.models.decoder import Decoder
from engine.policies.layout import Layout
from engine.policies.specs import parse
from engine.running.stepping import Stepper, Stepping
from tests.cache_run import embeddings, seeded_decoder

# Tokens and pictures of four prompts of different sizes; one has no picture, one has two.
# Policies that write pictures in few bits, with values left unread and without.
FORMATS = [
    "sift:format=k4v4,skip=0.1",
    "sift:format=k2v2,skip=0",
    "avl:floor=3,format=k8v4,minor=k4v2,skip=0.2",
]
PROMPTS = [(40, [(5, 29)]), (17, []), (55, [(3, 15), (20, 44)]), (33, [(0, 24)])]


class Rows:
    """Some of PROMPTS, prefilled into pools of their own."""

    def __init__(
        self,
        spec: str,
        prompts: list[int],
        new_tokens: int,
        *,
        device: str = "cpu",
        **stepping: Any,
    ) -> None:
        self.device = torch.device(device)
        self.model = SimpleNamespace(decoder=_moved(seeded_decoder(seed=3), self.device))
        config = self.model.decoder.config
        self.pools = [
            Pool(config.kv_heads, config.head_dim, torch.float32, self.device)
            for _ in range(config.layers)
        ]
        self.policy, self.new_tokens = parse(spec), new_tokens
        self.rows = [self.admit(prompt) for prompt in prompts]
        self.stepper = Stepper(self.model, self.pools, Stepping(**stepping))

    @torch.inference_mode()
    def admit(self, prompt: int) -> Row:
        tokens, spans = PROMPTS[prompt]
        layout = Layout.of_tokens(tokens, spans, self.device)
        step = Prefill(self.pools, self.policy, layout, self.new_tokens)
        self.model.decoder(embeddings(tokens, prompt).to(self.device), step)
        return step.row

    def go(self, steps: int, tokens: list[int] | None = None) -> list[list[int]]:
        """Greedy tokens of ``steps`` steps."""
        for row in self.rows[self.stepper.rows :]:
            self.stepper.join(row)
        now = tokens or [5 + r for r in range(len(self.rows))]
        said = []
        for _ in range(steps):
            logits = self.stepper.step(torch.tensor(now, device=self.device))
            now = logits.argmax(-1).tolist()
            said.append(now)
        return said

    @torch.inference_mode()
    def forced(self, steps: int) -> torch.Tensor:
        """Logits ``[steps, rows, vocab]``, on the CPU, of the same tokens whoever decodes them."""
        self.go(0)
        tokens = torch.tensor([5 + r for r in range(len(self.rows))], device=self.device)
        return torch.stack([self.stepper.step(tokens + step).cpu() for step in range(steps)])

    def settle(self) -> list[Row]:
        """All rows, complete: none is decoded any more."""
        return [self.stepper.leave(r) for r in reversed(range(self.stepper.rows))][::-1]


def _moved(decoder: Decoder, device: torch.device) -> Decoder:
    """The decoder on a device, prepared for it."""
    if device.type == "cpu":
        return decoder
    moved = Decoder(decoder.config).requires_grad_(False)
    moved.load_state_dict(decoder.state_dict())
    prepare(moved.to(device), device)
    return moved


def state(rows: list[Row]) -> list[Any]:
    """All that settled rows hold, keys and values aside."""
    return [
        (row.step, row.attended_share, [_stored(stored) for stored in row.layers]) for row in rows
    ]


def _stored(stored: Any) -> Any:
    tensors = stored.layout.positions, stored.core, stored.text_scores
    return stored.layout.seen, *(None if x is None else x.tolist() for x in tensors)
