"""The contestants of a decode benchmark: our rows and transformers', stepped with forced tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from bench.common import SEED
from bench.device_weights import DEVIATION, DecoderOnly, transformers_twin
from bench.gpu_timing import timed
from bench.predict import Prompt, Shape, Way, stored
from engine.cache.pool import Pool
from engine.cache.row import Row
from engine.ops import fused
from engine.policies.policy import Policy
from engine.policies.specs import parse
from engine.running.stepping import Stepper, Stepping
from engine.running.turn import Turn, make_pools, prefill


def switched(way: Way) -> AbstractContextManager[object]:
    """A block in which the small kernels are fused, or not, as ``way`` wants them."""
    return mock.patch.object(fused, "switched_on", return_value=way.fused)


class Rows(Protocol):
    """A batch after its prefill.

    Attributes:
        logits: ``[rows, vocab]`` of the first new token.
        prefill: seconds that a row's prefill took, the median of what can be told apart.
    """

    logits: Tensor
    prefill: float

    def step(self, index: int) -> Tensor:
        """Decode one forced token per row; returns the tokens ``[rows]`` it would have chosen."""


def start(model: DecoderOnly, shape: Shape, way: Way, prompt: Prompt) -> Rows:
    """Prefill the rows of a contestant."""
    if way.side == "ours":
        return OurRows(model, shape, way, prompt)
    return TheirRows(model, shape, way, prompt)


def make_turn(model: DecoderOnly, prompt: Prompt, number: int) -> Turn:
    """Row ``number``'s prompt: random text around a picture of random embeddings."""
    weight, vocab = model.decoder.norm.weight, model.decoder.config.vocab
    generator = torch.Generator(weight.device).manual_seed(SEED + number)
    made = {"device": weight.device, "generator": generator}
    text = torch.randint(vocab, (prompt.before + prompt.after,), **made).tolist()
    picture = torch.randn(prompt.image, model.decoder.config.hidden, **made).to(weight.dtype)
    ids = [*text[: prompt.before], *[model.image_token] * prompt.image, *text[prompt.before :]]
    span = (prompt.before, prompt.before + prompt.image)
    return Turn(ids, [span], [picture * DEVIATION])


def forced_tokens(model: DecoderOnly, prompt: Prompt, batch: int) -> Tensor:
    """The tokens ``[steps, rows]`` that everybody decodes, whatever they would have chosen."""
    weight, vocab = model.decoder.norm.weight, model.decoder.config.vocab
    generator = torch.Generator(weight.device).manual_seed(SEED)
    size = (prompt.new, batch)
    return torch.randint(vocab, size, device=weight.device, generator=generator)


class OurRows:
    """Rows in the engine's cache."""

    def __init__(self, model: DecoderOnly, shape: Shape, way: Way, prompt: Prompt) -> None:
        policy, pools = parse(way.policy), make_pools(model)
        reserve(pools, way.batch * stored(way.policy, prompt))
        turns = (make_turn(model, prompt, number) for number in range(way.batch))
        begun = [
            timed(partial(prefill, model, pools, policy, turn, prompt.new), pools[0].k.device)
            for turn in turns
        ]
        self.rows = [row for (row, _), _ in begun]
        self.logits = torch.stack([logits for (_, logits), _ in begun])
        self.prefill = statistics.median(seconds for _, seconds in begun)
        self._decode = decoder_of(model, pools, policy, self.rows, way)
        self._forced = forced_tokens(model, prompt, way.batch)

    @torch.inference_mode()
    def step(self, index: int) -> Tensor:
        """See ``Rows.step``."""
        return self._decode(self._forced[index]).argmax(-1)


def decoder_of(
    model: DecoderOnly, pools: list[Pool], policy: Policy, rows: list[Row], way: Way
) -> Callable[[Tensor], Tensor]:
    """The engine's step as ``way`` asks for it: tokens ``[rows]`` to logits ``[rows, vocab]``."""
    stepper = Stepper(model, pools, Stepping(way.selection, way.graphs))
    for row in rows:
        stepper.join(row)
    if way.graphs and stepper.eager_because:
        raise RuntimeError(f"steps are not replayed: {stepper.eager_because}")
    return stepper.step


def reserve(pools: list[Pool], slots: int) -> None:
    """Give every pool its final size at once: growing row by row would copy, and hold both."""
    for pool in pools:
        pool.take(slots).give()


class TheirRows:
    """The same rows in transformers, prefilled as one batch."""

    @torch.inference_mode()
    def __init__(self, model: DecoderOnly, shape: Shape, way: Way, prompt: Prompt) -> None:
        self._twin = transformers_twin(model, shape)
        self._cache = make_cache(self._twin.config, way.cache, prompt)
        turns = [make_turn(model, prompt, number) for number in range(way.batch)]
        device = model.decoder.norm.weight.device
        embedded = [
            model.embed(torch.tensor(turn.token_ids, device=device), turn.spans, turn.features)
            for turn in turns
        ]
        rows = torch.stack(embedded)
        self.logits, seconds = timed(lambda: self._run(inputs_embeds=rows), device)
        self.prefill = seconds / way.batch
        if way.cache == "static" and device.type == "cuda":
            self._twin.forward = torch.compile(self._twin.forward, mode="reduce-overhead")
        self._forced = forced_tokens(model, prompt, way.batch)
        ends = torch.arange(prompt.read, prompt.length, device=device)
        self._positions = ends[:, None].repeat(1, way.batch)

    @torch.inference_mode()
    def step(self, index: int) -> Tensor:
        """See ``Rows.step``."""
        ids, positions = self._forced[index, :, None], self._positions[index, :, None]
        return self._run(input_ids=ids, position_ids=positions).argmax(-1)

    def _run(self, **inputs: Tensor) -> Tensor:
        cache = self._cache
        made = self._twin(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return made.logits[:, -1].float()


def make_cache(config: Any, kind: str, prompt: Prompt) -> Any:
    """transformers' cache: "dynamic" is its default, "static" what it compiles with."""
    from transformers import DynamicCache, StaticCache

    if kind == "static":
        return StaticCache(config=config, max_cache_len=prompt.length)
    return DynamicCache(config=config)
