"""ZipVL against its rule written out slowly: prefill, formats, packing while decoding, turns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from engine.cache.pool import Pool
from engine.ops.pages import Pages
from engine.policies.specs import parse
from engine.policies.zipvl import ZipVl, probes
from tests.cache_run import CacheRun, embeddings, seeded_decoder
from tests.slow_cache import DIM, GROUP, HEADS, KV, LAYERS, Cache, draw


class SlowZipVl:
    """One layer: every token's numbers and where it lies, as Algorithm 1 has it."""

    def __init__(self, layer, policy):
        self.layer, self.policy = layer, policy
        self.lies = {}  # format by position
        self.k, self.v = {}, {}

    def rows(self, positions, places):
        """Softmax weights of queries over those of ``places`` that they can see, by head."""
        found = {}
        for position in positions:
            q = draw(self.layer, [position], HEADS)[0].double()
            mine = [p for p in places if p <= position]
            keys = torch.stack([self.k[p] for p in mine])
            found[position] = [
                dict(
                    zip(
                        mine,
                        torch.softmax(keys[:, h // GROUP] @ q[h] / math.sqrt(DIM), 0).tolist(),
                        strict=True,
                    )
                )
                for h in range(HEADS)
            ]
        return found

    def out(self, row):
        """What a query takes up by its weights."""
        heads = [sum(w * self.v[p][h // GROUP] for p, w in row[h].items()) for h in range(HEADS)]
        return torch.stack(heads)

    def important(self, rows, places):
        """As many as receive tau of the attention, those that receive most of who can see them."""
        sums = {
            p: sum(row[h].get(p, 0.0) for row in rows.values() for h in range(HEADS)) / HEADS
            for p in places
        }
        count, reached = 0, 0.0
        for value in sorted(sums.values(), reverse=True):
            if reached >= self.policy.tau * len(rows):
                break
            count, reached = count + 1, reached + value
        seen_by = {p: sum(q >= p for q in rows) for p in places}
        order = sorted(places, key=lambda p: (p != places[-1], -sums[p] / seen_by[p], p))
        return sorted(order[:count])

    def prefill(self, positions):
        """Returns outputs by position; those of unimportant tokens are zero."""
        for position in positions:
            k = draw(self.layer, [position], KV)[0]
            self.k[position], self.v[position] = k.double(), k.flip(-1).double()
        places = sorted(self.k)
        probing = [positions[i] for i in probes(len(positions), 8, 6, 0)]
        chosen = self.important(self.rows(probing, places), places)
        rows = self.rows([p for p in positions if p in chosen], chosen)
        nothing = torch.zeros(HEADS, DIM, dtype=torch.float64)
        outs = {p: self.out(rows[p]) if p in rows else nothing for p in positions}
        self.compress([p for p in places if p not in self.lies], chosen)
        return outs

    def compress(self, new, chosen):
        """Write new tokens in their formats; tokens that are freed are forgotten."""
        for form, mine in (
            (self.policy.format, [p for p in new if p in chosen]),
            (self.policy.minor, [p for p in new if p not in chosen]),
        ):
            self.lies.update(dict.fromkeys(mine, form))
            if form == "freed":
                for position in mine:
                    del self.k[position], self.v[position], self.lies[position]
            elif form != "plain" and mine:
                pages = Pages.of(form, KV, DIM, torch.float32)
                numbers = [torch.stack([x[p] for p in mine]).float() for x in (self.k, self.v)]
                k, v = pages.unpack(pages.pack(*numbers))
                self.k.update(zip(mine, k.double(), strict=False))
                self.v.update(zip(mine, v.double(), strict=False))

    def decode(self, position, step):
        k = draw(self.layer, [position], KV)[0]
        self.k[position], self.v[position] = k.double(), k.flip(-1).double()
        places = sorted(self.k)
        rows = self.rows([position], places)
        out = self.out(rows[position])
        if step % self.policy.every == 0:
            new = [p for p in places if p not in self.lies]
            self.compress(new, self.important(rows, places))
        return out


RULE = ZipVl(tau=0.8, recent=8, random=6, every=5)
WHOLE = replace(RULE, format="k16v16", minor="k16v16")
V2 = replace(RULE, format="plain", minor="freed")


def lies(cache):
    """For each layer the format of every token, by position."""
    found = []
    for stored in cache.settled().layers:
        mine = dict.fromkeys(stored.layout.positions[0].tolist(), "plain")
        for part in stored.parts:
            mine.update(dict.fromkeys(part.positions[0].tolist(), part.format))
        found.append(mine)
    return found


def expected(slow):
    """The same of the slow one: what is not classified yet is plain."""
    return [{p: layer.lies.get(p, "plain") for p in layer.k} for layer in slow]


# Beside keys in few bits a step rounds its queries, see ``ops.attention``.
@pytest.mark.parametrize(("policy", "error"), [(WHOLE, 2e-5), (V2, 2e-5), (RULE, 0.2)])
def test_rule_as_it_reads(policy, error):
    """A prompt, steps through three packings, a turn behind them, and steps again."""
    cache, slow = Cache(policy), [SlowZipVl(layer, policy) for layer in range(LAYERS)]
    position = 0
    for turn, spans in ((46, [(5, 36)]), (9, [])):
        outs = cache.prefill(turn, spans, 18)
        new = list(range(position, position + turn))
        for layer in range(LAYERS):
            wanted = slow[layer].prefill(new)
            for p in new:
                torch.testing.assert_close(outs[layer][p].double(), wanted[p], atol=2e-5, rtol=1e-4)
        position += turn
        assert lies(cache) == expected(slow)
        for step in range(1, 18):
            for real, layer in zip(cache.decode(), slow, strict=True):
                torch.testing.assert_close(
                    real.double(), layer.decode(position, step), atol=error, rtol=1e-4
                )
            position += 1
            if step in (5, 7, 15):
                assert lies(cache) == expected(slow)
    counts = [
        sum(form == "k4v4" or form == "plain" for form in layer.values()) for layer in lies(cache)
    ]
    assert policy.format == policy.minor or len(set(counts)) > 1, "layers keep what they need"


# -- what it stores --------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "published", "stored"), [(0.286, 6.18, 4.48), (0.7, 4.69, 3.64)])
def test_published_ratios_are_those_of_codes_alone(share, published, stored):
    """Beside 16 bits, heads of 128: what the paper counts, and what lies in pages with scales."""
    high, low = (Pages.of(form, 8, 128, torch.bfloat16) for form in ("k4v4", "k2v2"))
    plain, few, all_of_it = 2 * 2 * 8 * 128, 0.0, 0.0
    for part, pages in ((share, high), (1 - share, low)):
        few += part * 8 * (pages.key.codes + pages.value.codes)
        all_of_it += part * (pages.key.token_bytes + pages.value.token_bytes)
    assert plain / few == pytest.approx(published, rel=0.01)
    assert plain / all_of_it == pytest.approx(stored, rel=0.01)


def test_generated_tokens_are_packed_and_their_slots_serve_again():
    """Plain slots for one packing's tokens, however long the answer; all that is seen is held."""
    cache = Cache(RULE)
    cache.prefill(30, [(3, 20)], 200)
    for _ in range(62):
        cache.decode()
    for stored in cache.settled().layers:
        assert stored.extent.size == RULE.every
        assert stored.layout.columns == 62 % RULE.every
        assert stored.tokens == 92


def test_a_pool_without_room_keeps_plain_what_it_cannot_pack():
    """The promised slots are there, and the answer goes on."""
    cache = Cache(RULE)
    cpu = torch.device("cpu")
    cache.pools = [Pool(KV, DIM, torch.float32, cpu, limit=160) for _ in range(LAYERS)]
    cache.prefill(30, [(3, 20)], 20)
    for pool in cache.pools:
        pool.holes.free.clear()
    for _ in range(20):
        assert torch.stack(cache.decode()).isfinite().all()
    assert [stored.layout.columns for stored in cache.settled().layers] == [20] * LAYERS


@pytest.mark.parametrize("sparse", [0, 1])
def test_everything_important_is_the_full_cache(sparse):
    """With tau 1 and 16 bits nothing is left out, whether or not the rest attends."""
    whole = [CacheRun(seeded_decoder(3), parse(spec)) for spec in (
        "full", f"zipvl:tau=1,format=plain,minor=freed,every=4,sparse={sparse}"
    )]  # fmt: skip
    outs = []
    for run in whole:
        found = [run.prefill(embeddings(50, 1), [(3, 30)], 12)]
        found += [run.decode(embeddings(1, 10 + n)) for n in range(12)]
        outs.append(torch.stack(found))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)
