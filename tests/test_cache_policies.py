"""Every baseline against its published rule written out slowly; and keeping 100 % is exact."""

from __future__ import annotations

import pytest
import torch

from engine.policies.avl import Avl
from engine.policies.fastv import FastV
from engine.policies.full import Full
from engine.policies.h2o import H2o
from engine.policies.layout import Layout
from engine.policies.random import Random
from engine.policies.snapkv import SnapKv
from engine.policies.streaming import Streaming
from tests.cache_run import CacheRun, embeddings, seeded_decoder
from tests.slow_cache import CPU, GROUP, HEADS, KV, LAYERS, Cache, Slow


class SlowH2o(Slow):
    """int(0.125 n) heavy hitters and int(0.375 n) recent tokens of n seen, at every step."""

    heavy, recent = 0.125, 0.375

    def after_prefill(self, rows, spans):
        for row in rows.values():
            self.accumulate(row)
        self.shrink()

    def after_step(self, rows):
        self.accumulate(rows)
        self.shrink()

    def accumulate(self, row):
        for head in range(HEADS):
            scores = self.weight[head // GROUP]
            for place, weight in row[head].items():
                scores[place] = scores.get(place, 0.0) + weight

    def shrink(self):
        heavy, recent = int(self.heavy * self.seen), int(self.recent * self.seen)
        for head in range(KV):
            places = sorted(self.kept[head])
            if len(places) <= heavy + recent:
                continue
            latest = places[len(places) - recent :]
            others = [p for p in places if p not in latest]
            best = sorted(others, key=lambda p: -self.weight[head][p])[:heavy]
            self.kept[head] = sorted(best + latest)


class SlowStreaming(Slow):
    """The first 4 tokens and the latest half of the tokens seen."""

    def after_prefill(self, rows, spans):
        self.after_step(rows)

    def after_step(self, rows):
        window = int(0.5 * self.seen)
        for head in range(KV):
            later = [p for p in self.kept[head] if p >= 4]
            self.kept[head] = [p for p in self.kept[head] if p < 4] + later[-window:]


class SlowSnapKv(Slow):
    """Window of 7, kernel 5, half of the prompt; what is generated stays."""

    def after_prefill(self, rows, spans):
        prompt = sorted(rows)
        window, before = prompt[-7:], prompt[:-7]
        for head in range(KV):
            sums = [
                sum(rows[q][h][p] for q in window for h in range(head * GROUP, (head + 1) * GROUP))
                for p in before
            ]
            padded = [0.0, 0.0, *sums, 0.0, 0.0]
            smooth = [sum(padded[i : i + 5]) / 5 for i in range(len(before))]
            best = sorted(range(len(before)), key=lambda i: -smooth[i])
            chosen = [before[i] for i in best[: int(0.5 * len(prompt)) - 7]]
            self.kept[head] = sorted(chosen + window)


class SlowFastV(Slow):
    """Before layer 2: round(I * 0.4) of each picture by layer 1's last row, mean over heads."""

    spans: list

    def after_prefill(self, rows, spans):
        self.last, self.spans = rows[max(rows)], spans

    def let_through(self, alive):
        if self.layer != 1:
            return alive
        going = [p for p in alive if not any(s <= p < e for s, e in self.spans)]
        for start, end in self.spans:
            mean = {p: sum(row[p] for row in self.last) / HEADS for p in range(start, end)}
            going += sorted(mean, key=lambda p: -mean[p])[: round((end - start) * (1 - 0.6))]
        return sorted(going)


def compare(policy, slow, count, spans, steps):
    cache, layers = Cache(policy), [slow(layer) for layer in range(LAYERS)]
    outs, alive = cache.prefill(count, spans, steps + 1), list(range(count))
    for layer in range(LAYERS):
        expected = layers[layer].prefill(alive, spans)
        assert list(outs[layer]) == alive
        for position in alive:
            torch.testing.assert_close(
                outs[layer][position].double(), expected[position], atol=2e-5, rtol=1e-4
            )
        alive = layers[layer].let_through(alive)
    assert cache.kept() == [[sorted(h) for h in layer.kept] for layer in layers]
    for step in range(steps):
        for real, layer in zip(cache.decode(), layers, strict=True):
            expected = layer.decode(count + step)
            torch.testing.assert_close(real.double(), expected, atol=2e-5, rtol=1e-4)
        if step % 5 == 4:  # reading settles the row, and decoding goes on from it
            assert cache.kept() == [[sorted(h) for h in layer.kept] for layer in layers]
    assert cache.kept() == [[sorted(h) for h in layer.kept] for layer in layers]


BASELINES = {
    "full": (Full(), Slow),
    "h2o": (H2o(), SlowH2o),
    "streaming": (Streaming(), SlowStreaming),
    "snapkv": (SnapKv(keep=0.5, window=7, kernel=5), SlowSnapKv),
    "fastv": (FastV(layer=2, drop=0.6), SlowFastV),
}


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_follows_its_published_rule(name):
    compare(*BASELINES[name], count=46, spans=[(5, 36)], steps=14)


@pytest.mark.parametrize("name", ["h2o", "fastv"])
def test_baseline_with_two_pictures(name):
    compare(*BASELINES[name], count=46, spans=[(3, 16), (20, 43)], steps=6)


def test_random_keeps_its_share_of_every_picture_and_all_text():
    spans = [(4, 25), (28, 41)]
    cache = Cache(Random(keep=0.5, seed=3))
    cache.prefill(50, spans, 6)
    kept = [layer[0] for layer in cache.kept()]
    for layer in kept:
        inside = [[p for p in layer if s <= p < e] for s, e in spans]
        assert [len(x) for x in inside] == [10, 6]
        text = [p for p in range(50) if not any(s <= p < e for s, e in spans)]
        assert set(text) <= set(layer)
    assert len({tuple(layer) for layer in kept}) == LAYERS, "every layer draws anew"
    slow = [Slow(layer) for layer in range(LAYERS)]
    for layer in range(LAYERS):
        slow[layer].kept = [list(kept[layer]) for _ in range(KV)]
    for real, layer in zip(cache.decode(), slow, strict=True):
        torch.testing.assert_close(real.double(), layer.decode(50), atol=2e-5, rtol=1e-4)


def test_random_depends_on_its_seed_and_on_nothing_else():
    def kept(seed):
        torch.rand(1)
        cache = Cache(Random(keep=0.5, seed=seed))
        cache.prefill(50, [(4, 40)], 1)
        return cache.kept()

    state = torch.random.get_rng_state()
    cache = Cache(Random())
    cache.prefill(50, [(4, 40)], 1)
    assert torch.equal(state, torch.random.get_rng_state()), "other random numbers are disturbed"
    assert kept(1) == kept(1) != kept(2)


def test_random_is_uniform():
    """Over many seeds every image token is kept about equally often (half of 200 times)."""
    times = torch.zeros(20)
    layout = Layout.of_tokens(24, [(2, 22)], CPU)
    for seed in range(200):
        kept = Random(keep=0.5, seed=seed).retain(0, layout, None)
        times[kept.shared[kept.shared >= 2] - 2] += 1
    assert times.sum() == 2000
    assert times.min() > 70
    assert times.max() < 130


EVERYTHING = {
    "avl": Avl(secondary=1.0, core=1.0, every=3, prefill=1.0, text=1.0),
    "avl-no-core": Avl(secondary=1.0, core=None, prefill=1.0, text=1.0),
    "avl-never-again": Avl(secondary=1.0, core=1.0, every=0, prefill=1.0, text=1.0),
    "avl-large-floor": Avl(secondary=1.0, core=1.0, prefill=1.0, text=0.5, floor=10_000),
    "h2o": H2o(heavy=0.25, recent=0.75),
    "fastv": FastV(drop=0.0),
    "streaming": Streaming(recent=1.0),
    "snapkv": SnapKv(keep=1.0),
    "random": Random(keep=1.0),
}


def logits_of(policy, heads, kv_heads):
    """Two turns' logits, so that later prefills are covered too."""
    run = CacheRun(seeded_decoder(7, heads=heads, kv_heads=kv_heads), policy)
    found = [run.prefill(embeddings(70, 1), [(6, 50)], 20)]
    found += [run.decode(embeddings(1, 100 + i)) for i in range(13)]
    found.append(run.prefill(embeddings(9, 2), [], 20))
    found += [run.decode(embeddings(1, 200 + i)) for i in range(7)]
    return torch.stack(found)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("name", EVERYTHING)
def test_keeping_everything_is_bit_identical_to_full(name, heads, kv_heads):
    assert torch.equal(
        logits_of(EVERYTHING[name], heads, kv_heads), logits_of(Full(), heads, kv_heads)
    )
