"""What the cache shows of itself, against weights computed apart; and the measures taken of it."""

from __future__ import annotations

import pytest
import torch

from engine.cache.decode import Decoding
from engine.cache.observe import CORE, MINOR, SECONDARY
from engine.cache.prefill import Prefill
from engine.errors import OptionError
from engine.insight.measures import (
    agreement_between_layers,
    agreement_between_steps,
    attention_share,
    ppci,
    share_per_layer,
    sparsity_curve,
    sparsity_per_layer,
    tokens_for,
)
from engine.insight.trace import Trace
from engine.policies.avl import Avl
from engine.policies.fastv import FastV
from engine.policies.full import Full
from engine.policies.h2o import H2o
from engine.policies.layout import Layout
from engine.policies.snapkv import SnapKv
from engine.policies.streaming import Streaming
from tests.cache_run import CacheRun, embeddings, seeded_decoder
from tests.reference_cache import ReferenceAvl, Settings
from tests.reference_decoder import ReferenceDecoder

CPU = torch.device("cpu")
SPANS = [(5, 29)]
EXACT = Settings(1.0, None, 0, 1.0, 2, 1.0)


class Run(CacheRun):
    """A cache run with a trace hung on its row."""

    def __init__(self, policy, seed=3):
        super().__init__(seeded_decoder(seed), policy)
        self.trace = Trace()

    @torch.inference_mode()
    def start(self, tokens=40, spans=SPANS, new_tokens=30):
        layout = Layout.of_tokens(tokens, spans, CPU)
        with Prefill(self.pools, self.policy, layout, new_tokens, self.row, self.trace) as step:
            self.decoder(embeddings(tokens, 1), step)
        self.row = step.row

    def go(self, steps):
        for step in range(steps):
            self.decode(embeddings(1, 50 + step))


class Weights(ReferenceAvl):
    """The reference, noting each pass's head-mean last row by layer."""

    def __init__(self, run, settings):
        super().__init__(ReferenceDecoder(run.decoder, torch.float64), settings)
        self.rows = []

    def _layer(self, layer, x, positions):
        out, weights = super()._layer(layer, x, positions)
        if layer == 0:
            self.rows.append([])
        self.rows[-1].append(weights[:, -1].mean(0))
        return out, weights


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        (EXACT, Full()),
        (Settings(0.5, 0.25, 3, 0.8, 2, 0.5, floor=4), None),
        (Settings(0.5, None, 3, 1.0, 2, 0.5, floor=4), None),
    ],
)
def test_the_trace_holds_the_attention_of_every_layer_and_step(settings, policy):
    run = Run(policy or Avl(**vars(settings)))
    reference = Weights(run, settings)
    run.start()
    run.step = Watch(run.trace)
    reference.prefill(embeddings(40, 1), SPANS, run)
    for step in range(10):
        run.decode(embeddings(1, 50 + step))
        reference.decode(embeddings(1, 50 + step), run)
    assert len(run.trace.passes) == 11
    for moments, rows in zip(run.trace.passes, reference.rows, strict=True):
        for layer, (moment, row) in enumerate(zip(moments, rows, strict=True)):
            torch.testing.assert_close(moment.attention.double(), row, atol=1e-5, rtol=0)
            assert moment.attention.sum() == pytest.approx(1, abs=1e-5)
            assert moment.query == len(row) - 1
            if moments is run.trace.passes[-1]:
                assert moment.text.expand(2, -1).tolist() == run.text(layer)
                assert tiers(moment, CORE) == (run.core(layer) or run.images(layer))
                assert tiers(moment, CORE, SECONDARY) == run.images(layer)


class Watch:
    """Stands for the watched prefill: who survived layer 2 is who layer 3 attended."""

    def __init__(self, trace):
        self.let_through = {1: trace.passes[0][2].attention.nonzero()[:, 0].tolist()}


def tiers(moment, *wanted):
    return [SPANS[0][0] + i for i, tier in enumerate(moment.tiers.tolist()) if tier in wanted]


def test_tiers_and_text_at_the_papers_shares():
    run = Run(Avl(secondary=0.5, core=0.25, every=2, prefill=0.75, text=0.5, floor=3))
    run.start()
    run.go(6)
    cores = []
    for number, moments in enumerate(run.trace.passes):
        for moment in moments:
            counts = [(moment.tiers == tier).sum().item() for tier in (MINOR, SECONDARY, CORE)]
            assert counts == [12, 6, 6]
            kept = max(3, round(0.5 * (11 + number)))
            assert moment.text.shape == (2, kept)
            assert moment.text[:, -1].tolist() == [moment.query] * 2
        cores.append(moments[0].tiers.tolist())
    assert cores[0] == cores[1], "steps of the core leave it as it is"
    assert cores[1] != cores[2], "the second step ranks anew (seeded)"


@pytest.mark.parametrize("policy", [H2o(), Streaming(), SnapKv(), FastV(drop=0.5)])
def test_every_policy_can_be_watched(policy):
    run = Run(policy)
    run.start()
    run.go(5)
    kept = run.settle()
    assert len(run.trace.passes) == 6
    for moment, stored in zip(run.trace.passes[-1], kept.layers, strict=True):
        assert moment.attention.sum() == pytest.approx(1, abs=1e-5)
        held = set(stored.layout.positions.flatten().tolist())
        assert tiers(moment, CORE) == sorted(held & set(range(*SPANS[0])))
        assert set(moment.attention.nonzero()[:, 0].tolist()) >= held - {moment.query + 1}


def test_a_watched_run_answers_the_same():
    answers = []
    for watched in (True, False):
        run = Run(Avl(floor=3))
        if watched:
            run.start()
        else:
            run.prefill(embeddings(40, 1), SPANS, 30)
        answers.append([run.decode(embeddings(1, 50 + step)) for step in range(7)])
    for mine, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_unwatched_steps_compute_no_weights():
    """Free when off: an unwatched full step asks the operator for no logits at all."""
    run = Run(Full())
    run.prefill(embeddings(40, 1), SPANS, 9)
    run.go(2)
    assert run.decoding.scores is None
    run = Run(Full())
    run.start()
    run.go(2)
    assert run.decoding.scores is not None


def test_rows_are_watched_one_by_one():
    alone, beside = Run(Avl(floor=3)), Run(Avl(floor=3))
    alone.start()
    alone.go(5)
    beside.start()
    watched, beside.row = beside.row, None
    beside.prefill(embeddings(21, 9), [(3, 12)], 30)
    with torch.inference_mode():
        decoding = Decoding(beside.pools, [beside.row, watched])
        for step in range(5):
            both = torch.cat([embeddings(1, 500 + step), embeddings(1, 50 + step)])
            beside.decoder(both, decoding)
            decoding.advance()
    assert len(beside.trace.passes) == len(alone.trace.passes) == 6
    for ours, theirs in zip(beside.trace.passes, alone.trace.passes, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.attention, other.attention, atol=1e-5, rtol=0)
            assert torch.equal(mine.tiers, other.tiers)
            assert torch.equal(mine.text, other.text)


# -- measures -------------------------------------------------------------------------------------


def test_ppci_of_the_papers_example():
    """Nine tokens, 30 %: {8, 6, 5} and {6, 5, 9} have two of three in common."""
    first, second = torch.zeros(9), torch.zeros(9)
    first[torch.tensor([8, 6, 5]) - 1] = torch.tensor([0.5, 0.3, 0.1])
    second[torch.tensor([6, 5, 9]) - 1] = torch.tensor([0.4, 0.3, 0.2])
    assert ppci(first, second, 0.3) == pytest.approx(2 / 3)
    assert ppci(first, first, 0.3) == 1
    assert ppci(first, second, 1.0) == 1


@pytest.mark.parametrize(("tokens", "share"), [(9, 0.0), (9, 0.05), (9, 1.1), (0, 0.5)])
def test_ppci_of_nothing_is_refused(tokens, share):
    with pytest.raises(OptionError):
        ppci(torch.zeros(tokens), torch.zeros(tokens), share)
    with pytest.raises(OptionError):
        ppci(torch.zeros(9), torch.zeros(8), 0.5)


def test_sparsity_curve():
    attention = torch.tensor([0.02, 0.1, 0.05, 0.03])
    expected = torch.tensor([0.0, 0.5, 0.75, 0.9, 1.0])
    torch.testing.assert_close(sparsity_curve(attention), expected)
    assert [tokens_for(attention, mass) for mass in (0.0, 0.5, 0.6, 1.0)] == [0, 0.25, 0.5, 1]
    assert sparsity_curve(torch.zeros(3)).tolist() == [0, 0, 0, 0]
    assert tokens_for(torch.zeros(3), 0.8) == 0
    assert tokens_for(torch.zeros(0), 0.8) == 0


def test_attention_share():
    attention = torch.arange(10.0)
    found = attention_share(attention, [(2, 4), (5, 7)], prompt_end=8)
    assert found == {"system": 0 + 1 + 4, "image": 16, "instruction": 7, "output": 17}
    found = attention_share(attention, [], prompt_end=8)
    assert found == {"system": 0, "image": 0, "instruction": 28, "output": 17}


def test_measures_of_a_trace():
    run = Run(Full())
    run.start()
    run.go(4)
    between = agreement_between_layers(run.trace, 0, 0.25)
    assert between.shape == (4, 4)
    assert torch.equal(between, between.T)
    assert (between.diagonal() == 1).all()
    rows = [run.trace.passes[0][layer].attention[5:29] for layer in (0, 1)]
    best = [set(row.argsort(descending=True)[:6].tolist()) for row in rows]
    assert between[0, 1] == pytest.approx(len(best[0] & best[1]) / 6)
    steps = agreement_between_steps(run.trace, 1, 0.5)
    assert len(steps) == 4
    assert all(0 <= value <= 1 for value in steps)
    assert all(0 < value <= 1 for value in sparsity_per_layer(run.trace, 2, 0.8))
    for shares in share_per_layer(run.trace, 4):
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert min(shares.values()) > 0
    assert share_per_layer(run.trace, 0)[0]["output"] == 0


def test_a_trace_goes_on_through_turns():
    run = Run(Avl(floor=3))
    run.start()
    run.go(3)
    run.prefill(embeddings(20, 8), [(2, 14)], 9)
    run.go(2)
    trace = run.trace
    assert [moments[0].step for moments in trace.passes] == [0, 1, 2, 3, 0, 1, 2]
    assert [moments[0].query for moments in trace.passes] == [39, 40, 41, 42, 62, 63, 64]
    assert trace.prompt_ends == [40, 63]
    assert trace.image_spans == ((5, 29), (45, 57))
    assert [len(trace.image_attention(number, 0)) for number in (3, 4)] == [24, 36]
    assert share_per_layer(trace, 6)[0]["output"] > 0
