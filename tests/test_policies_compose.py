"""Policies joined into one, and policies that remember per sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from engine.engine import Engine
from engine.errors import OptionError
from engine.policies.cut import best
from engine.policies.layout import Kept, Layout
from engine.policies.policy import Policy
from engine.policies.received import Received
from engine.policies.specs import parse
from engine.running.batch import Failure
from tests.cache_run import CacheRun, embeddings, seeded_decoder
from tests.checkpoints import Shape
from tests.noise import noise

SHAPE = Shape(layers=3, kv_heads=2)
SPANS = [(3, 30)]


def stored(spec: str | Policy) -> list[list[int]]:
    """Positions that each layer holds of a prompt with a picture of 27 tokens."""
    run = CacheRun(seeded_decoder(3), parse(spec))
    run.prefill(embeddings(40, 1), SPANS, 5)
    return [layer.layout.positions[0].tolist() for layer in run.settle().layers]


def test_a_composition_stores_as_one_does_of_what_another_lets_through() -> None:
    avl = "avl:secondary=0.5,core=none,prefill=1,text=1"
    alone, cut, both = stored(avl), stored("fastv:layer=1"), stored(f"{avl}+fastv:layer=1")
    assert both == stored(f"fastv:layer=1+{avl}")
    assert both[0] == alone[0]
    pictures = [[p for p in layer if 3 <= p < 30] for layer in both]
    assert [len(picture) for picture in pictures] == [13] * 4
    for layer in (1, 2, 3):  # of the 14 that FastV has left in these
        assert set(both[layer]) <= set(cut[layer])
        assert both[layer] != alone[layer]


def test_policies_without_storage_join_too() -> None:
    assert stored("fastv:layer=1+full") == stored("fastv:layer=1")


def test_a_composition_is_spelled_and_parsed_back() -> None:
    policy = parse("avl:prefill=1+fastv:layer=2")
    assert parse(policy.spec).spec == policy.spec
    with pytest.raises(OptionError, match="avl and h2o both decide what is stored"):
        parse("avl+h2o")
    with pytest.raises(OptionError, match="unknown cache policy 'fastw'"):
        parse("avl+fastw")
    with pytest.raises(OptionError, match="layer is 9, the model has 3"):
        parse("full+fastv:layer=9").check_depth(3)


def test_a_composition_answers(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(SHAPE).with_cache("avl:prefill=1,floor=3+fastv:layer=1,drop=0.0")
    plain = engine_of(SHAPE).with_cache("avl:prefill=1,floor=3")
    answers = [e.generate("What?", [noise(70, 50)], max_new_tokens=12) for e in (engine, plain)]
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize("spec", ["avl+fastv:drop=0.9,layer=1", "avl+fastv:drop=0.7"])
def test_layers_may_keep_fewer_image_tokens_than_others(
    engine_of: Callable[..., Engine], spec: str
) -> None:
    """Where one policy has dropped what the other would have kept: alone and in a batch."""
    engine = engine_of(SHAPE).with_cache(spec)
    asked = {"images": [noise(70, 50)], "max_new_tokens": 12, "ignore_eos": True}
    alone = [engine.generate(text, **asked) for text in ("What?", "And this?")]
    requests = [{"prompt": text, **asked} for text in ("What?", "And this?")]
    together = sorted(engine.generate_batch(requests, rows=2), key=lambda answer: answer.index)
    assert [each.token_ids for each in alone] == [each.token_ids for each in together]


@dataclass(frozen=True)
class FirstDecides(Policy):
    """Every layer stores the image tokens that the first one found best."""

    name: ClassVar[str] = "first"

    found: list[torch.Tensor] = field(default_factory=list)

    def for_sequence(self) -> Policy:
        return FirstDecides()

    def retain(self, layer: int, layout: Layout, received: Received) -> Kept:
        if layer == 0:
            self.found.append(best(layout.picture(0), received, 6).sort().values)
        shared = torch.cat([layout.fixed(), self.found[0]]).sort().values
        return Kept(shared=shared, text=layout.text())

    @property
    def spec(self) -> str:
        return "first"


def test_what_one_layer_has_found_serves_the_others_of_its_sequence() -> None:
    policy = FirstDecides()
    one = stored(policy)
    assert one[1:] == one[:1] * 3
    assert one[1] != stored("random:keep=0.23")[1]
    run = CacheRun(seeded_decoder(3), policy)
    run.prefill(embeddings(40, 7), SPANS, 5)
    other = [layer.layout.positions[0].tolist() for layer in run.settle().layers]
    assert other[1:] == other[:1] * 3
    assert other != one
    assert policy.found == []


@pytest.mark.parametrize(
    "spec",
    [
        "fastv:drop=1+snapkv:window=4",
        "fastv:drop=1+h2o:recent=0.8",
        "fastv:drop=0.9+streaming",
    ],
)
def test_layers_that_would_differ_are_refused_before_the_answer_begins(
    engine_of: Callable[..., Engine], spec: str
) -> None:
    """Alone and in a batch, where a request without a picture is answered all the same."""
    engine = engine_of(SHAPE).with_cache(spec)
    refused = pytest.raises(OptionError, match="tokens of the text, earlier layers")
    with refused:
        engine.generate("What?", [noise(70, 50)], max_new_tokens=9, ignore_eos=True)
    plain = {"prompt": "Hi?", "max_new_tokens": 5, "ignore_eos": True}
    answers = sorted(
        engine.generate_batch([plain, {**plain, "images": [noise(70, 50)]}, plain], rows=3),
        key=lambda answer: answer.index,
    )
    assert [isinstance(answer, Failure) for answer in answers] == [False, True, False]
    assert answers[0].token_ids == engine.generate(**plain).token_ids
