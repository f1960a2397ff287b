"""The A-VL cache against a slow reference: the same logits, the same kept sets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from engine.errors import OptionError
from engine.policies.avl import Avl
from engine.policies.layout import Kept
from engine.policies.policy import Policy
from tests.cache_run import CacheRun, embeddings, seeded_decoder
from tests.reference_cache import ReferenceAvl, Settings
from tests.reference_decoder import ReferenceDecoder

TOLERANCE = 2e-4


def pair(settings, dtype=torch.float64, seed=0, **shape):
    decoder = seeded_decoder(seed, **shape)
    run = CacheRun(decoder, Avl(**vars(settings)))
    return run, ReferenceAvl(ReferenceDecoder(decoder, dtype), settings)


def turn(run, reference, tokens, spans, steps, seed):
    """Prefill and teacher-forced steps on both; every logit and every kept set is compared."""
    width = run.decoder.config.hidden
    hidden = embeddings(tokens, seed, width)
    real = run.prefill(hidden, spans, new_tokens=steps + 1)
    close(real, reference.prefill(hidden, spans, run))
    same_sets(run, reference)
    for step in range(steps):
        hidden = embeddings(1, seed * 1000 + step + 1, width)
        real = run.decode(hidden)
        close(real, reference.decode(hidden, run))
        same_sets(run, reference)


def close(real, expected):
    assert (real.double() - expected.double()).abs().max() < TOLERANCE


def same_sets(run, reference):
    for layer in range(run.decoder.config.layers):
        stored = reference.stored[layer]
        pictures = torch.tensor(reference.picture_of) >= 0
        if reference.text_from is not None:
            assert run.images(layer) == (stored[0] & pictures).nonzero()[:, 0].tolist()
            text = stored[:, reference.text_from :]
            kept = [(head.nonzero()[:, 0] + reference.text_from).tolist() for head in text]
            assert run.text(layer) == kept
        assert run.core(layer) == reference.core[layer]


def nearly_always_equal(reference):
    """Near ties are rare: the sets agree because the rule is the same, not by the margin."""
    for near in (reference.vision, reference.heads):
        assert near.differed <= max(1, near.compared // 200)


PAPER = {"secondary": 0.45, "core": 0.30, "every": 3, "prefill": 0.9, "layer": 2, "text": 0.7}
CASES = {
    "paper": Settings(**PAPER),
    "paper-low-floor": Settings(**PAPER, floor=4),
    "no-core": Settings(**PAPER | {"core": None}, floor=4),
    "never-again": Settings(**PAPER | {"every": 0}, floor=4),
    "always": Settings(**PAPER | {"every": 1}, floor=4),
    "core-of-nothing": Settings(**PAPER | {"core": 0.0}, floor=4),
    "store-nothing": Settings(**PAPER | {"secondary": 0.0, "core": 0.0}, floor=4),
    "core-is-all": Settings(**PAPER | {"core": 0.45, "every": 5}, floor=4),
    "small": Settings(0.2, 0.13, 4, 0.5, 1, 0.5, 0.5, 3),
    "late-filter": Settings(0.6, 0.1, 2, 0.6, 3, 0.4, 0.9, 2),
    "filter-after-all": Settings(0.5, 0.3, 7, 0.7, 4, 0.6, 0.0, 5),
    "heavy-only": Settings(0.5, 0.3, 3, 0.8, 2, 0.5, 1.0, 1),
    "no-filter-no-text": Settings(0.45, 0.3, 3, 1.0, 2, 1.0),
    "tiny-text": Settings(0.45, 0.3, 3, 0.9, 2, 0.0, 0.7, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_one_picture_and_forty_steps(name):
    run, reference = pair(CASES[name], seed=len(name))
    turn(run, reference, tokens=57, spans=[(6, 42)], steps=40, seed=3)
    nearly_always_equal(reference)


SHARES = 0.8, 0.6, 0.45, 0.35  # of every layer


class Tapering(Avl):
    """A-VL that stores fewer of a picture's tokens in every layer; promised is the most."""

    def retain(self, layer, layout, received):
        return Avl(**vars(self) | {"secondary": SHARES[layer]}).retain(layer, layout, received)


class TaperingReference(ReferenceAvl):
    def _after_prefill(self, layer, weights, alive, actual):
        self.s = replace(self.s, secondary=SHARES[layer])
        return super()._after_prefill(layer, weights, alive, actual)


def test_layers_need_not_be_alike():
    """The core is chosen again among what each layer stores."""
    settings = Settings(**PAPER | {"secondary": SHARES[0]}, floor=4)
    decoder = seeded_decoder(4)
    run = CacheRun(decoder, Tapering(**vars(settings)))
    reference = TaperingReference(ReferenceDecoder(decoder, torch.float64), settings)
    turn(run, reference, tokens=57, spans=[(6, 24), (24, 42)], steps=40, seed=3)
    assert len({len(run.images(layer)) for layer in range(4)}) == 4
    nearly_always_equal(reference)


@dataclass(frozen=True)
class Uneven(Policy):
    """What a step cannot serve: more text in one layer than in another."""

    name = "uneven"

    def retain(self, layer, layout, received):
        kept = Kept.everything(layout)
        return replace(kept, text=kept.text[..., layer:])


def test_text_must_be_alike_in_every_layer():
    run = CacheRun(seeded_decoder(4), Uneven())
    with pytest.raises(OptionError, match="layer 1 keeps 10 tokens of the text, earlier layers 11"):
        run.prefill(embeddings(20, 1), [(3, 9)], 4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_of_query_heads(heads, kv_heads, dtype):
    settings = Settings(**PAPER, floor=6)
    run, reference = pair(settings, dtype, seed=heads + kv_heads, heads=heads, kv_heads=kv_heads)
    turn(run, reference, tokens=60, spans=[(5, 45)], steps=40, seed=9)


@pytest.mark.parametrize("name", ["paper-low-floor", "small", "no-core", "core-of-nothing"])
def test_several_pictures_with_text_between(name):
    run, reference = pair(CASES[name], seed=21)
    turn(run, reference, tokens=90, spans=[(4, 30), (30, 41), (49, 76)], steps=40, seed=5)
    nearly_always_equal(reference)


def test_a_prompt_without_a_picture_loses_nothing():
    run, reference = pair(Settings(**PAPER, floor=2), seed=2)
    turn(run, reference, tokens=30, spans=[], steps=12, seed=8)
    layout = run.settle().layers[0].layout
    assert layout.positions[0].tolist() == list(range(42))


def test_a_picture_at_the_very_end_and_at_the_very_start():
    run, reference = pair(Settings(**PAPER, floor=2), seed=4)
    turn(run, reference, tokens=36, spans=[(0, 36)], steps=12, seed=1)
    run, reference = pair(Settings(**PAPER, floor=2), seed=4)
    turn(run, reference, tokens=40, spans=[(10, 40)], steps=12, seed=1)


@pytest.mark.parametrize("name", ["paper-low-floor", "small", "no-core", "never-again"])
def test_a_later_turn_goes_on_from_what_is_kept(name):
    run, reference = pair(CASES[name], seed=31)
    turn(run, reference, tokens=57, spans=[(6, 42)], steps=13, seed=3)
    turn(run, reference, tokens=11, spans=[], steps=14, seed=4)
    turn(run, reference, tokens=1, spans=[], steps=8, seed=5)
    assert run.settle().seen == 57 + 13 + 11 + 14 + 1 + 8


@pytest.mark.parametrize("name", ["paper-low-floor", "small", "no-core", "never-again"])
def test_a_new_picture_makes_earlier_text_fixed(name):
    run, reference = pair(CASES[name], seed=32)
    turn(run, reference, tokens=57, spans=[(6, 42)], steps=13, seed=3)
    before = run.text(0)
    turn(run, reference, tokens=50, spans=[(7, 39)], steps=14, seed=4)
    layout = run.settle().layers[0].layout
    fixed = layout.positions[:, layout.fixed()].expand(len(before), -1)
    for head, kept in enumerate(before):
        assert set(kept) <= set(fixed[head].tolist())
    turn(run, reference, tokens=9, spans=[], steps=9, seed=6)


def test_a_picture_after_a_turn_without_one():
    run, reference = pair(Settings(**PAPER, floor=3), seed=33)
    turn(run, reference, tokens=12, spans=[], steps=5, seed=3)
    turn(run, reference, tokens=44, spans=[(3, 33)], steps=12, seed=4)


def test_no_step_between_two_turns():
    run, reference = pair(Settings(**PAPER, floor=3), seed=34)
    turn(run, reference, tokens=44, spans=[(3, 33)], steps=0, seed=3)
    turn(run, reference, tokens=12, spans=[], steps=9, seed=4)


def test_the_worked_example_of_the_design():
    """35 fixed + 576 image + 22 text at S45 C30 T70: 314 slots in full, 227 in the core list."""
    decoder = seeded_decoder(layers=3)
    run = CacheRun(decoder, Avl(**PAPER))
    run.prefill(embeddings(633, 0), [(35, 611)], new_tokens=8)
    for stored in run.row.layers:
        assert stored.layout.columns == 314
        assert len(stored.layout.fixed()) == 35
        assert len(stored.core) == 172
        assert stored.layout.columns - 259 + len(stored.core) == 227
    run.decode(embeddings(1, 1))
    assert run.decoding.state.lists.shared == [[[35 + 259] * 3], [[35 + 172] * 3]]
