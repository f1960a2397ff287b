"""Conversations: turns share one cache, positions go on, and nothing is lost on the way."""

from collections.abc import Callable

import pytest
import torch

from engine.cache.prefill import Uncached
from engine.cache.row import no_rotary
from engine.engine import Engine
from engine.errors import CapacityError
from engine.result import Result
from tests.checkpoints import Shape
from tests.noise import noise

SHAPE = Shape(kv_heads=2)
OPTIONS = {"max_new_tokens": 5, "ignore_eos": True}


@pytest.mark.parametrize("with_picture", [False, True])
def test_the_full_cache_continues_exactly(
    engine_of: Callable[..., Engine], with_picture: bool
) -> None:
    """Three turns over one cache choose what one pass over the whole sequence would choose."""
    engine = engine_of(SHAPE)
    chat, images = engine.chat(), [noise(70, 50)]
    chat.send("What is this?", images, **OPTIONS)
    chat.send("And now?", images if with_picture else [], **OPTIONS)
    last = chat.send("Sure?", **OPTIONS)
    ids = torch.tensor(chat.token_ids[:-1])
    starts = (ids == engine.model.config.image_token).nonzero()[:, 0]
    size = engine.model.config.vision.patches
    spans = [(int(start), int(start) + size) for start in starts[::size]]
    features = [engine.encode(images[0]).features] * len(spans)
    with torch.inference_mode():
        hidden = engine.model.embed(ids, spans, features)
        exact = engine.model.decoder.logits(
            engine.model.decoder(hidden, Uncached(len(ids), no_rotary()))
        )
    assert exact[-5:].argmax(-1).tolist() == last.token_ids


def test_turns_read_like_the_whole_conversation(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(SHAPE)
    chat = engine.chat()
    first = chat.send("Hello", **OPTIONS)
    before = len(chat.token_ids)
    chat.send("world", **OPTIONS)
    prompt = engine.render([{"role": "user", "content": "Hello"}]).token_ids
    assert chat.token_ids[:before] == [*prompt, *first.token_ids]
    turn = engine.tokenizer.decode(chat.token_ids[before:])
    assert turn.startswith("USER: world ASSISTANT:")


@pytest.mark.parametrize("policy", ["avl:text=0.5,floor=4", "h2o", "fastv:layer=1", "streaming"])
def test_an_evicting_cache_stays_small_over_turns(
    engine_of: Callable[..., Engine], policy: str
) -> None:
    chat = engine_of(SHAPE).with_cache(policy).chat()
    results = [chat.send("What?", [noise(70, 50)], **OPTIONS)]
    results += [chat.send("And?", **OPTIONS) for _ in range(3)]
    for result in results:
        assert result.cache.bytes_used < result.cache.bytes_full
        assert result.cache.bytes_used <= result.cache.bytes_allocated
    stored = [result.cache.stored.mean for result in results]
    assert sorted(stored, reverse=True) == stored  # what was freed does not come back


def test_a_refused_turn_leaves_the_conversation_as_it_was(
    engine_of: Callable[..., Engine],
) -> None:
    engine = engine_of(SHAPE)
    chat, twin = engine.chat(), engine.chat()
    for each in (chat, twin):
        each.send("Hello", **OPTIONS)
    with pytest.raises(CapacityError):
        chat.send("Hello", max_new_tokens=10**6)
    assert chat.send("world", **OPTIONS).token_ids == twin.send("world", **OPTIONS).token_ids


def test_an_answer_may_be_left_early(engine_of: Callable[..., Engine]) -> None:
    chat = engine_of(SHAPE).chat()
    pieces = chat.stream("Hello", max_new_tokens=20, ignore_eos=True)
    next(iter(pieces))
    pieces.close()  # type: ignore[attr-defined]
    assert isinstance(chat.send("world", **OPTIONS), Result)
