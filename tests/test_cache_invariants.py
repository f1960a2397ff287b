"""What must hold for every policy, every prompt and every step: driven with random q, k, v."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.cache.decode import CORE, FULL, Decoding
from engine.cache.pool import Pool
from engine.cache.prefill import Prefill
from engine.cache.report import report
from engine.cache.row import Row
from engine.errors import CapacityError
from engine.ops.attention import selective_attention
from engine.policies.avl import Avl
from engine.policies.fastv import FastV
from engine.policies.full import Full
from engine.policies.h2o import H2o
from engine.policies.layout import Layout
from engine.policies.random import Random
from engine.policies.select import heavy_and_recent, top
from engine.policies.sift import Sift
from engine.policies.snapkv import SnapKv
from engine.policies.streaming import Streaming
from engine.policies.zipvl import ZipVl
from tests.cache_run import attended
from tests.selection import lightest

LAYERS, HEADS, KV, DIM = 3, 4, 2, 16
CPU = torch.device("cpu")
QUICK = settings(max_examples=15, deadline=None)


@dataclass(frozen=True)
class Prompt:
    tokens: int
    spans: list[tuple[int, int]]
    steps: int
    seed: int


def make_pools():
    return [Pool(KV, DIM, torch.float32, CPU) for _ in range(LAYERS)]


def drawn(seed, count):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(count, HEADS, DIM, generator=generator) * 2
    return q, *torch.randn(2, count, KV, DIM, generator=generator)


def prefill(pools, policy, prompt, past=None):
    """Run a prefill's layers on random q, k, v; returns the row."""
    layout = Layout.of_tokens(prompt.tokens, prompt.spans, CPU)
    with Prefill(pools, policy, layout, prompt.steps + 1, past) as step:
        alive = torch.arange(prompt.tokens)
        for layer in range(LAYERS):
            q, k, v = drawn(prompt.seed * 100 + layer, prompt.tokens)
            out = attended(step.view(layer), q[alive], k[alive], v[alive])
            assert out.shape == (len(alive), HEADS, DIM)
            assert out.isfinite().all()
            kept = step.narrow(layer)
            alive = alive if kept is None else alive[kept]
            assert alive[-1] == prompt.tokens - 1, "the last token's states answer: it must go on"
    return step.row


def step_inputs(row_seeds, layer):
    parts = [drawn(seed * 1000 + layer, 1) for seed in row_seeds]
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def decode(decoding, row_seeds):
    """One step of all rows; returns ``[layers, rows, heads, head_dim]``."""
    outs = [
        attended(decoding.view(layer), *step_inputs(row_seeds, layer)).clone()
        for layer in range(LAYERS)
    ]
    decoding.advance()
    return torch.stack(outs)


# -- strategies -----------------------------------------------------------------------------------

shares = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


@st.composite
def avl_policies(draw):
    low, middle, high = sorted(draw(st.tuples(shares, shares, shares)))
    return Avl(
        secondary=middle,
        core=draw(st.sampled_from([None, low])),
        every=draw(st.integers(0, 4)),
        prefill=high,
        layer=draw(st.integers(1, LAYERS + 1)),
        text=draw(shares),
        heavy=draw(shares),
        floor=draw(st.integers(0, 12)),
    )


formats = st.sampled_from(["k16v16", "k8v8", "k8v4", "k4v4", "k4v2", "k2v2"])


@st.composite
def avl_in_formats(draw):
    form, minor = draw(st.tuples(formats | st.just("plain"), formats | st.just("freed")))
    skip = draw(shares) if (form, minor) != ("plain", "freed") else 0.0
    return replace(draw(avl_policies()), format=form, minor=minor, skip=skip)


def zipvl_policies():
    return st.builds(
        ZipVl,
        tau=shares,
        format=formats | st.just("plain"),
        minor=formats | st.just("freed"),
        recent=st.integers(1, 9),
        random=st.integers(0, 9),
        sparse=st.integers(0, 1),
        every=st.integers(0, 5),
    )


@st.composite
def h2o_policies(draw):
    heavy = draw(shares)
    return H2o(heavy=heavy, recent=draw(st.floats(0, 1 - heavy)))


policies = st.one_of(
    st.just(Full()),
    avl_policies(),
    avl_in_formats(),
    st.builds(Sift, format=formats, skip=shares),
    zipvl_policies(),
    h2o_policies(),
    st.builds(FastV, layer=st.integers(1, LAYERS), drop=shares),
    st.builds(Streaming, sink=st.integers(0, 6), recent=shares),
    st.builds(SnapKv, keep=shares, window=st.integers(1, 20), kernel=st.sampled_from([1, 3, 5, 7])),
    st.builds(Random, keep=shares, seed=st.integers(0, 5)),
)


@st.composite
def prompts(draw, most_steps=12):
    parts = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 14)), min_size=1, max_size=5))
    spans, at = [], 0
    for is_picture, length in parts:
        if is_picture:
            spans.append((at, at + length))
        at += length
    return Prompt(at, spans, draw(st.integers(0, most_steps)), draw(st.integers(0, 999)))


# -- one row --------------------------------------------------------------------------------------


def check_lists(decoding):
    """Slots sorted, unique and inside the extent; core inside secondary; writes inside the list."""
    for r, row in enumerate(decoding.rows):
        for layer, stored in enumerate(row.layers):
            end = stored.start + stored.extent.size
            listed = []
            for kind in (FULL, CORE):
                count = (
                    decoding.state.lists.shared[kind][r][layer] + decoding.state.lengths.texts[r]
                )
                slots = decoding.state.lists.slots[kind][layer, r, :count].tolist()
                assert slots == sorted(set(slots))
                assert all(stored.start <= slot < end for slot in slots)
                listed.append(set(slots))
            full, core = listed
            assert core <= full
            assert full == set(range(stored.start, stored.start + len(full)))
            first = stored.start + stored.layout.text_start
            for slot in decoding.state.text.slots(r)[layer].tolist():
                assert first <= slot <= first + decoding.state.lengths.texts[r]


def check_recent(decoding, policy):
    """The latest tokens of the budget are kept by every head, each token once."""
    for r, row in enumerate(decoding.rows):
        seen, n = decoding.seen[r], decoding.state.lengths.texts[r]
        layout = row.layers[0].layout
        more = seen - layout.seen
        budget = policy.text_budget(*layout.lengths(more))
        assert decoding.state.lengths.evicts[r] == (budget is not None)
        if budget is None:
            continue
        assert n <= budget.total
        places = decoding.state.text.positions[:, r, :, : n + 1].flatten(0, 1).tolist()
        evictable = seen if layout.text_seen == layout.seen else layout.text_seen + more
        recent = range(seen - min(budget.recent, n, evictable), seen)
        for head in places:
            kept = [p for p in head if p != seen]
            assert len(set(kept)) == n
            assert set(recent) <= set(kept)


@QUICK
@given(policies, prompts())
def test_every_step_keeps_the_invariants(policy, prompt):
    pools = make_pools()
    row = prefill(pools, policy, prompt)
    decoding = Decoding(pools, [row])
    for step in range(prompt.steps):
        assert decoding.positions.tolist() == [prompt.tokens + step]
        check_lists(decoding)
        assert decode(decoding, [prompt.seed + step]).isfinite().all()
        check_recent(decoding, policy)
    row = decoding.settle(0)
    assert row.seen == prompt.tokens + prompt.steps
    assert row.step == len(row.attended_share) == prompt.steps
    assert all(0 < share <= 1 for share in row.attended_share)
    check_settled(row, pools, policy)


def check_settled(row, pools, policy):
    """Positions lie below ``seen``, once per head; bytes reported are bytes held."""
    for stored in row.layers:
        layout = stored.layout
        assert layout.columns <= stored.extent.size
        for head in stored.whole_layout().positions.tolist():
            assert len(set(head)) == len(head)
            assert all(0 <= p < row.seen for p in head)
        if stored.core is not None:
            core = stored.core.tolist()
            assert core == sorted(set(core))
            assert (layout.image_of[core] >= 0).all()
    counted = report(row, pools)
    token = 2 * KV * DIM * 4
    used = sum(stored.layout.columns for stored in row.layers) * token
    for pool, stored in zip(pools, row.layers, strict=True):
        used += sum(p.tokens * pool.of(p.format).layout.nbytes // 32 for p in stored.parts)
    assert counted.bytes_used == used <= counted.bytes_allocated
    pages = sum(paged.data.nbytes for pool in pools for paged in pool.paged.values())
    assert counted.bytes_allocated == sum(len(p.k) for p in pools) * token + pages
    assert counted.bytes_full == LAYERS * row.seen * token


# Layers behind the cut hold no image token, and nothing in the format of those before it.
CUT = Avl(
    secondary=0.0,
    core=None,
    prefill=0.0,
    layer=1,
    text=0.0,
    floor=0,
    format="k16v16",
    minor="k16v16",
)


@QUICK
@given(policies, st.lists(prompts(most_steps=7), min_size=2, max_size=3))
@example(CUT, [Prompt(1, [], 0, 0), Prompt(2, [(0, 1)], 1, 0)])
def test_turns_follow_each_other(policy, turns):
    pools, row, seen = make_pools(), None, 0
    for prompt in turns:
        row = prefill(pools, policy, prompt, row)
        decoding = Decoding(pools, [row])
        for step in range(prompt.steps):
            check_lists(decoding)
            decode(decoding, [prompt.seed + step])
            check_recent(decoding, policy)
        row = decoding.settle(0)
        seen += prompt.tokens + prompt.steps
        assert row.seen == seen
        check_settled(row, pools, policy)
    for pool, stored in zip(pools, row.layers, strict=True):
        assert stored.start + stored.extent.size <= pool.slots


@QUICK
@given(policies, prompts())
def test_a_settled_row_goes_on_as_if_it_had_not_been_settled(policy, prompt):
    outs = []
    for settles in (False, True):
        pools = make_pools()
        decoding = Decoding(pools, [prefill(pools, policy, prompt)])
        steps = []
        for step in range(prompt.steps):
            if settles:
                decoding = Decoding(pools, [decoding.settle(0)])
            steps.append(decode(decoding, [prompt.seed + step]))
        outs.append(steps)
    for alone, settled in zip(*outs, strict=True):
        torch.testing.assert_close(alone, settled, atol=1e-5, rtol=1e-4)


def test_evicting_much_leaves_positions_equal_to_tokens_seen():
    policy = Avl(secondary=0.1, core=0.05, prefill=0.2, text=0.1, floor=1)
    pools, prompt = make_pools(), Prompt(60, [(2, 50)], 80, 1)
    decoding = Decoding(pools, [prefill(pools, policy, prompt)])
    for step in range(80):
        assert int(decoding.positions) == 60 + step
        decode(decoding, [step])
    row = decoding.settle(0)
    assert row.seen == 140
    assert [s.layout.columns for s in row.layers] == [2 + 4 + round(0.1 * 90)] * LAYERS


def test_exactly_the_promised_number_of_tokens_can_be_decoded():
    """``new_tokens`` steps fit, whatever the policy; nothing is ever written beyond an extent."""
    freeing = (Avl(text=0.9, floor=2), Avl(floor=99), H2o(), Streaming(), SnapKv())
    for policy in (Full(), *freeing, Sift(), ZipVl(every=4), ZipVl(every=3, minor="freed")):
        pools, prompt = make_pools(), Prompt(30, [(2, 20)], 0, 1)
        layout = Layout.of_tokens(30, prompt.spans, CPU)
        step = Prefill(pools, policy, layout, 9)
        for layer in range(LAYERS):
            attended(step.view(layer), *drawn(layer, len(layout.image_of)))
        decoding = Decoding(pools, [step.row])
        for n in range(9):
            decode(decoding, [n])
        row = decoding.settle(0)
        assert all(s.layout.columns <= s.extent.size for s in row.layers)


# -- several rows ---------------------------------------------------------------------------------


def alone(policy, prompt, lead, steps):
    """A row in a cache of its own: ``lead`` steps, then ``steps`` whose outputs are returned."""
    pools = make_pools()
    decoding = Decoding(pools, [prefill(pools, policy, prompt)])
    outs = [decode(decoding, [prompt.seed + step]) for step in range(lead + steps)]
    return outs[lead:], decoding.settle(0), pools


@settings(max_examples=12, deadline=None)
@given(
    policies,
    st.lists(st.tuples(prompts(), st.integers(0, 4)), min_size=2, max_size=3),
    st.integers(1, 8),
)
def test_rows_together_are_rows_alone(policy, starts, steps):
    pools, rows = make_pools(), []
    for prompt, lead in starts:
        room = Prompt(prompt.tokens, prompt.spans, lead + steps, prompt.seed)
        decoding = Decoding(pools, [prefill(pools, policy, room)])
        for step in range(lead):
            decode(decoding, [prompt.seed + step])
        rows.append(decoding.settle(0))
    together = Decoding(pools, rows)
    outs = []
    for step in range(steps):
        check_lists(together)
        outs.append(decode(together, [p.seed + lead + step for p, lead in starts]))
        check_recent(together, policy)
    for r, (prompt, lead) in enumerate(starts):
        room = Prompt(prompt.tokens, prompt.spans, lead + steps, prompt.seed)
        expected, row, _ = alone(policy, room, lead, steps)
        for step in range(steps):
            torch.testing.assert_close(outs[step][:, r], expected[step][:, 0], atol=1e-5, rtol=1e-4)
        same_row(together.settle(r), row)


def same_row(row, expected):
    assert row.step == expected.step
    assert row.attended_share == pytest.approx(expected.attended_share)
    for mine, theirs in zip(row.layers, expected.layers, strict=True):
        ours, other = (x.layout.positions.expand(KV, -1) for x in (mine, theirs))
        assert len(mine.parts) == len(theirs.parts)
        for part, like in zip(mine.parts, theirs.parts, strict=True):
            assert torch.equal(part.positions, like.positions)
            assert (part.core is None) == (like.core is None)
            assert part.core is None or torch.equal(part.core, like.core)
        start = mine.layout.text_start
        assert start == theirs.layout.text_start
        assert torch.equal(ours[:, :start], other[:, :start])
        assert torch.equal(ours[:, start:].sort().values, other[:, start:].sort().values)
        assert (mine.core is None) == (theirs.core is None)
        assert mine.core is None or torch.equal(mine.core, theirs.core)


# -- pools ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_extents_never_overlap_and_keep_what_was_written(actions):
    """Numbers below are arbitrary: take n slots, or give back the (n mod owned)-th extent."""
    pool, owned, mark = Pool(1, 1, torch.float32, CPU), {}, 0.0
    most = 0
    for takes, n in actions:
        if takes:
            extent, mark = pool.take(n), mark + 1
            assert extent.size == n
            used = slice(extent.start, extent.start + n)
            pool.k[used] = pool.v[used] = mark
            owned[mark] = extent
        elif owned:
            key = list(owned)[n % len(owned)]
            owned.pop(key).give()
        used = {mark: range(e.start, e.start + e.size) for mark, e in owned.items()}
        covered = [slot for slots in used.values() for slot in slots]
        assert len(covered) == len(set(covered))
        most = max(most, len(covered))
        assert most <= pool.slots == len(pool.k) == len(pool.v)
        for value, slots in used.items():
            assert (pool.k[list(slots)] == value).all()
            assert (pool.v[list(slots)] == value).all()
    for extent in owned.values():
        extent.give()
    if pool.slots:
        before = pool.slots
        assert pool.take(before).start == 0, "all holes join to one"
        assert pool.slots == before


def test_a_returned_extent_is_used_again():
    pool = Pool(1, 1, torch.float32, CPU)
    first, second = pool.take(10), pool.take(5)
    assert pool.slots == 15, "10, and half as much again"
    first.give()
    assert (pool.take(4).start, pool.take(6).start) == (0, 4)
    assert second.start == 10
    second.give()
    assert pool.take(20).start == 10, "the last hole is extended, not skipped"
    assert pool.slots == 30


def test_a_shared_extent_is_free_once_its_last_holder_has_given_it_back():
    pool = Pool(1, 1, torch.float32, CPU, limit=8)
    extent = pool.take(8)
    shared = extent.share()
    extent.give()
    assert not pool.has(1)
    with pytest.raises(CapacityError, match="no 1 consecutive slots are free in a pool of 8"):
        pool.take(1)
    shared.give()
    assert pool.take(8).start == 0
    with pytest.raises(AssertionError, match="given back once"):
        shared.give()


def test_a_pool_with_a_limit_never_moves_and_another_says_so_before_it_does():
    class Holder:
        told = 0

        def void(self):
            self.told += 1

    for limit, expected in ((40, 0), (None, 2)):
        pool, holder = Pool(1, 1, torch.float32, CPU, limit=limit), Holder()
        pool.holders.add(holder)
        where = pool.k.data_ptr()
        for size in (10, 2, 3):  # the second adds five slots, of which it leaves three
            pool.take(size)
        assert (holder.told, pool.k.data_ptr() == where) == (expected, limit is not None)


# -- selections -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 14))
def test_top_is_a_stable_sort(scores, count):
    expected = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])
    assert top(torch.tensor(scores, dtype=torch.float32), count).tolist() == expected


@given(st.data())
def test_heavy_and_recent_and_lightest_are_one_rule(data):
    """Keeping n - 1 of n tokens and evicting the lightest are the same choice, ties included."""
    n = data.draw(st.integers(1, 10))
    scores = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    positions = data.draw(st.permutations(range(n)))
    recent = data.draw(st.integers(0, n - 1))
    values = torch.tensor([scores], dtype=torch.float32), torch.tensor([positions])
    kept = heavy_and_recent(*values, n - 1, recent)[0].tolist()
    gone = int(lightest(*values, recent))
    assert sorted([*kept, gone]) == list(range(n))
    latest = sorted(range(n), key=lambda i: -positions[i])[:recent]
    others = [i for i in range(n) if i not in latest]
    assert gone == max(others, key=lambda i: (-scores[i], positions[i]))


def test_nothing_attended_gives_zeros():
    q, k, v = drawn(0, 3)
    nothing = torch.zeros(3, 1, dtype=torch.int32)
    slots = torch.zeros(3, 1, 4, dtype=torch.int32)
    result = selective_attention(q, k, v, slots, nothing, want_logits=True)
    assert (result.out == 0).all()
    assert (result.lse == -torch.inf).all()


def test_a_budget_of_nothing_attends_the_token_itself():
    """A prompt that is all picture, none of it kept: the only value left is the token's own."""
    policy = Avl(secondary=0.0, core=0.0, prefill=0.0, text=0.0, floor=0)
    pools, prompt = make_pools(), Prompt(12, [(0, 12)], 3, 4)
    decoding = Decoding(pools, [prefill(pools, policy, prompt)])
    assert [s.layout.columns for s in decoding.rows[0].layers] == [0] * LAYERS
    for step in range(3):
        out = decode(decoding, [step])
        for layer in range(LAYERS):
            v = step_inputs([step], layer)[2]
            torch.testing.assert_close(out[layer], v.repeat_interleave(HEADS // KV, 1))


def test_an_empty_row_reports_nothing():
    assert Row().seen == 0
