"""Pages of few bits: the layout against the formats' definitions, attention against float64."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from engine.errors import OptionError
from engine.ops.attention import tiered_attention_torch
from engine.ops.few_bits import seen
from engine.ops.formats import FORMATS, PLAIN, Affine
from engine.ops.native import AttentionPlan, AttentionResult, Scratch, Sifting, Tier
from engine.ops.pages import PAGE, Pages
from engine.options import CACHE_BITS, parse_bits
from tests.test_attention import (
    HAVE_NATIVE,
    NATIVE,
    available,
    device_of,
    isa_of,
    needs_native,
    run,
    served,
)

NAMES = [f"k{k}v{v}" for k in CACHE_BITS for v in CACHE_BITS]
SOME = ["k16v16", "k8v8", "k8v4", "k4v4", "k4v2", "k2v2", "k2v16", "k16v4"]
DIMS = (16, 32, 64, 80, 96, 128)


@pytest.fixture(params=["torch", *NATIVE])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The definition, every instruction set of the CPU, and a GPU, emulated and real."""
    yield from served(request)


@pytest.fixture(params=NATIVE)
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """All but the definition."""
    yield from served(request)


@dataclass
class Drawn:
    """A tier with what it is made of; ``k`` and ``v`` are the numbers that its pages say."""

    tier: Tier
    k: Tensor
    v: Tensor


def drawn(
    name: str,
    dim: int = 64,
    kv_heads: int = 2,
    tokens: int = 97,
    rows: int = 2,
    most: list[float] | None = None,
    heads: int = 2,
) -> Drawn:
    """Random tokens among poisoned ones, each row its own list of them, in no order."""
    pages = Pages.of(name, kv_heads, dim, torch.float32)
    k, v = (torch.randn(tokens, kv_heads, dim) * 2 + torch.randn(dim) for _ in range(2))
    data = pages.pack(k, v)
    known = pages.unpack(data)
    data = torch.cat([torch.full((1, pages.nbytes), 255, dtype=torch.uint8), data])
    lengths = [tokens, max(0, tokens // 2 - 1), 0, 1][:rows]
    slots = torch.full((rows, 1, tokens + 3), 2**30, dtype=torch.int32)
    for row, length in enumerate(lengths):
        slots[row, 0, :length] = torch.randperm(tokens)[:length].int() + PAGE
    count = torch.tensor(lengths, dtype=torch.int32)[:, None]
    sifting = None
    if most is not None:
        means = torch.randn(rows, kv_heads, dim)
        spent = torch.zeros(rows, kv_heads, 2)
        sifting = Sifting(torch.tensor(most), means, spent)
    return Drawn(Tier(*pages.sides(data), slots, count, pages, sifting), *known)


def attend(backend: str, q: Tensor, tiers: list[Tier]) -> AttentionResult:
    """Attend by one implementation, outputs poisoned before; what comes back is on the CPU."""
    if backend == "torch":
        return tiered_attention_torch(q, tiers, want_logits=True)
    device = device_of(backend)
    moved = [on(device, tier) for tier in tiers]
    plan = poisoned(AttentionPlan(q.to(device), moved, want_logits=True, isa=isa_of(backend)))
    run(plan)
    for tier, there in zip(tiers, moved, strict=True):
        if tier.sifting and there.sifting:
            tier.sifting.spent.copy_(there.sifting.spent)
    return AttentionResult(*(tensor.cpu() for tensor in plan.result()))


def poisoned(plan: AttentionPlan) -> AttentionPlan:
    for tensor in plan.result():
        if tensor is not None:
            tensor.fill_(math.nan)
    return plan


def on(device: str, tier: Tier) -> Tier:
    """A tier on a device; the sides of its pages are views of one tensor there too."""
    if device == "cpu":
        return tier
    k, v = tier.k.to(device), tier.v.to(device)
    if tier.pages:
        k, v = tier.pages.sides(torch.cat([k, v], 1))
    slots, count = (None if x is None else x.to(device) for x in (tier.slots, tier.count))
    sifting = tier.sifting and Sifting(*(x.to(device) for x in vars(tier.sifting).values()))
    return Tier(k, v, slots, count, tier.pages, sifting)


def assert_as_defined(backend: str, q: Tensor, tiers: list[Tier]) -> None:
    """An implementation gives what the definition gives, and counts what it counts."""
    counted = []
    for which in ("torch", backend):
        for tier in tiers:
            if tier.sifting:
                tier.sifting.spent.fill_(3)
        counted.append((attend(which, q, tiers), [spent(tier) for tier in tiers]))
    for mine, theirs in zip(counted[1][0], counted[0][0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(counted[1][1], counted[0][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def spent(tier: Tier) -> Tensor:
    return tier.sifting.spent.clone() if tier.sifting else torch.zeros(0)


def scores(q: Tensor, part: Drawn, listed: Tensor, kv_head: int) -> Tensor:
    """A query's products with listed keys in float64; queries are rounded as the format has it."""
    key = part.tier.pages.key if part.tier.pages else None
    if key is None or FORMATS[key.format] in PLAIN:
        return part.k[listed, kv_head].double() @ q.double()
    if not key.by_channel:
        return part.k[listed, kv_head].double() @ seen(q, key.format).double()
    assert part.tier.k is not None
    pages, slots = listed // PAGE + 1, listed % PAGE
    scale, zero = (x[pages, kv_head, :, 0].double() for x in key.channels(part.tier.k))
    codes = key.whole_codes(part.tier.k)[pages, kv_head, slots].double()
    wide = torch.nn.functional.pad(q, (0, key.wide - len(q)))
    scaled = (wide * scale.float()).double()
    return (seen(scaled.float(), "q2").double() * codes).sum(-1) - (scaled * zero).sum(-1)


def reference(q: Tensor, parts: list[Drawn]) -> list[list[tuple[Tensor, Tensor]]]:
    """For each row and head its logits and values in float64, tier after tier."""
    rows, heads, dim = q.shape
    found: list[list[tuple[Tensor, Tensor]]] = []
    for row in range(rows):
        found.append([])
        for head in range(heads):
            logits, values = [], []
            for part in parts:
                kv_head = head // (heads // part.k.shape[1])
                assert part.tier.slots is not None
                assert part.tier.count is not None
                n = int(part.tier.count[row, 0])
                listed = part.tier.slots[row, 0, :n].long() - (PAGE if part.tier.pages else 0)
                logits.append(scores(q[row, head], part, listed, kv_head) / math.sqrt(dim))
                values.append(part.v[listed, kv_head].double())
            found[-1].append((torch.cat(logits), torch.cat(values)))
    return found


def assert_near(q: Tensor, got: AttentionResult, parts: list[Drawn]) -> None:
    """Outputs and the log of weights are the reference's.

    A scaled query that lies between two codes may become either: by channel less is promised.
    """
    assert got.lse is not None
    by_channel = any(part.tier.pages and part.tier.pages.key.by_channel for part in parts)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=5e-3 if by_channel else 5e-5)
    for row, heads in enumerate(reference(q, parts)):
        for head, (logits, values) in enumerate(heads):
            close(got.out[row, head].double(), logits.softmax(-1) @ values)
            lse = logits.logsumexp(-1) if len(logits) else torch.tensor(-math.inf).double()
            close(got.lse[row, head].double(), lse)


# -- the layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33, 64])
def test_pages_hold_what_the_formats_say(name: str, tokens: int) -> None:
    pages = Pages.of(name, 3, 64, torch.bfloat16)
    k, v = torch.randn(2, tokens, 3, 64)
    data = pages.pack(k, v)
    assert data.shape == (-(-tokens // PAGE), pages.nbytes)
    for side, numbers, got in zip(
        (pages.key, pages.value), (k, v), pages.unpack(data), strict=True
    ):
        row = FORMATS[side.format]
        if side.by_channel:
            whole = torch.cat([numbers, numbers[-1:].expand(-tokens % PAGE, -1, -1)])
            runs = whole.unflatten(0, (-1, PAGE)).movedim(1, -1)
            want = row.unpack(row.pack(runs)).movedim(-1, 1).flatten(0, 1)[:tokens]
        elif side.format == "q8":
            scale = (numbers.abs().amax(-1, keepdim=True) / 127).half().float()
            want = (numbers / scale).round().clamp(-127, 127) * scale
        else:
            want = row.unpack(row.pack(numbers))
        assert torch.equal(got[:tokens], want)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", SOME)
def test_any_size_of_head_fits(name: str, dim: int) -> None:
    """Heads that are no whole runs are filled up, which costs their last run no step."""
    pages = Pages.of(name, 3, dim, torch.float32)
    k, v = torch.randn(2, 40, 3, dim)
    for side, numbers, got in zip(
        (pages.key, pages.value), (k, v), pages.unpack(pages.pack(k, v)), strict=True
    ):
        row = FORMATS[side.format]
        steps = 2**row.bits - 1 if isinstance(row, Affine) else 127
        span = numbers.amax() - numbers.amin()
        most = 1e-6 if row in PLAIN else float(span) / steps
        assert (got[:40] - numbers).abs().max() <= most


def test_bytes_of_a_token_are_those_of_the_formats() -> None:
    """7B: 32 heads of 128; shares of what 16 bits take."""
    shares = {
        name: Pages.of(name, 32, 128, torch.bfloat16).nbytes / (PAGE * 2 * 2 * 32 * 128)
        for name in ("k16v16", "k8v8", "k8v4", "k4v4", "k4v2", "k2v2")
    }
    assert {name: round(share, 4) for name, share in shares.items()} == {
        "k16v16": 1.0,
        "k8v8": 0.5078,
        "k8v4": 0.4102,
        "k4v4": 0.3125,
        "k4v2": 0.25,
        "k2v2": 0.1875,
    }


@pytest.mark.parametrize("name", ["", "k4", "v4k4", "k3v4", "k4v4 ", "K4V4", "k44v4"])
def test_an_unknown_format_is_named(name: str) -> None:
    with pytest.raises(OptionError, match="unknown format of the cache") as caught:
        parse_bits(name)
    assert "k4v4" in caught.value.hint


# -- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [1, 3])
def test_pages_match_float64(backend: str, name: str, group: int) -> None:
    part = drawn(name, rows=4)
    q = torch.randn(4, 2 * group, 64)
    assert_near(q, attend(backend, q, [part.tier]), [part])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", SOME)
def test_pages_of_any_head_size(backend: str, name: str, dim: int) -> None:
    part = drawn(name, dim=dim, kv_heads=3, tokens=50)
    q = torch.randn(2, 3, dim)
    assert_near(q, attend(backend, q, [part.tier]), [part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiers_of_several_formats_beside_plain_ones(backend: str, dtype: torch.dtype) -> None:
    """In 16 bits, where the plain kernels sum in an order of their own."""
    parts = [drawn(name) for name in ("k4v4", "k8v2", "k2v8")]
    plain_k, plain_v = torch.randn(2, 20, 2, 64).to(dtype)
    slots = torch.randperm(20)[:14].int().expand(2, 1, 14).contiguous()
    count = torch.tensor([[14], [5]], dtype=torch.int32)
    plain = Drawn(Tier(plain_k, plain_v, slots, count), plain_k, plain_v)
    q = torch.randn(2, 4, 64).to(dtype)
    for order in ([plain, *parts], [parts[0], plain, parts[1], parts[2]]):
        got = attend(backend, q, [part.tier for part in order])
        assert got.out.dtype is dtype
        for row, heads in enumerate(reference(q, order)):
            for head, (logits, values) in enumerate(heads):
                want = logits.softmax(-1) @ values
                torch.testing.assert_close(got.out[row, head].double(), want, rtol=0.05, atol=0.05)


def test_pages_of_several_tiers_by_channel_are_told_apart(backend: str) -> None:
    """Each pool's page of a number has scales of its own."""
    parts = [drawn(name, tokens=32) for name in ("k2v4", "k2v2")]
    q = torch.randn(2, 2, 64)
    assert_near(q, attend(backend, q, [part.tier for part in parts]), parts)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 33, 129, 700])
@pytest.mark.parametrize("name", ["k8v8", "k4v2", "k2v4", "k16v8"])
def test_sanitize_pages_of_lists_of_any_length(backend: str, name: str, tokens: int) -> None:
    part = drawn(name, rows=4, tokens=tokens, dim=32)
    q = torch.randn(4, 2, 32)
    assert_near(q, attend(backend, q, [part.tier]), [part])


def test_the_kernels_are_the_definition(compiled: str) -> None:
    """To rounding of sums, by channel too."""
    for name in NAMES:
        part, q = drawn(name, rows=3), torch.randn(3, 6, 64)
        assert_as_defined(compiled, q, [part.tier])


def test_lists_of_every_kind(compiled: str) -> None:
    """Whole pages in order, their beginning, and a list for every head."""
    for name in ("k8v8", "k4v4", "k2v2"):
        tier, q = drawn(name).tier, torch.randn(2, 6, 64)
        pages, whole = tier.pages, tier.pages.pack(*torch.randn(2, 64, 2, 64))
        sides = pages.sides(whole)
        slots = torch.stack([torch.randperm(64)[:50].int() for _ in range(4)]).view(2, 2, 50)
        count = torch.tensor([[50, 0], [17, 33]], dtype=torch.int32)
        kinds = [(None, None), (None, count[:, 1:]), (slots, count), (slots[:, :1], None)]
        assert_as_defined(compiled, q, [Tier(*sides, *kind, pages) for kind in kinds])
        for kind in kinds:
            assert_as_defined(compiled, q, [Tier(*sides, *kind, pages)])


def test_nothing_listed_gives_zeros(backend: str) -> None:
    for most in (None, [0.3, 0.0]):
        tier, q = drawn("k4v4", most=most).tier, torch.randn(2, 4, 64)
        tier.count.zero_()
        got = attend(backend, q, [tier])
        assert torch.equal(got.out, torch.zeros_like(q))
        assert bool((got.lse == -math.inf).all())
        assert bool((got.logits == -math.inf).all())
    none = Tier(tier.k, tier.v, tier.slots[..., :0], None, tier.pages, tier.sifting)
    assert torch.equal(attend(backend, q, [none]).out, torch.zeros_like(q))


def test_a_plan_reads_its_pages_anew(compiled: str) -> None:
    """And leaves nothing behind: the next run gives the same to the last bit."""
    device = device_of(compiled)
    parts = [drawn("k4v4", tokens=400, most=[0.2, 0.0]), drawn("k2v8", tokens=400)]
    others = [drawn("k4v4", tokens=400, most=[0.0, 0.1]), drawn("k2v8", tokens=400)]
    q, other_q = torch.randn(2, 2, 6, 64)
    tiers = [on(device, part.tier) for part in parts]
    queries = q.to(device)
    plan = AttentionPlan(queries, tiers, want_logits=True, isa=isa_of(compiled))
    run(plan)
    queries.copy_(other_q)
    for tier, other in zip(tiers, others, strict=True):
        pairs = [(tier.k, other.tier.k), (tier.v, other.tier.v), (tier.slots, other.tier.slots)]
        if tier.sifting:
            pairs += zip(
                vars(tier.sifting).values(), vars(other.tier.sifting).values(), strict=True
            )
        for mine, theirs in pairs:
            mine.copy_(theirs)
    want = attend("torch", other_q, [other.tier for other in others])
    results = []
    for _ in range(2):
        run(poisoned(plan))
        results.append([tensor.cpu().clone() for tensor in plan.result()])
    for once, again, defined in zip(*results, want, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(once, defined, rtol=1e-4, atol=1e-4)


def test_plans_share_memory_to_work_in(compiled: str) -> None:
    """Of other sizes, in any order, made before or after it has grown."""
    device, scratch = device_of(compiled), Scratch()
    cases = []
    for rows, tokens in ((1, 30), (3, 400), (2, 100)):
        part = drawn("k4v4", rows=rows, tokens=tokens, most=[0.2, 0.1, 0.0][:rows])
        q = torch.randn(rows, 4, 64)
        tier = on(device, part.tier)
        isa = isa_of(compiled)
        plan = AttentionPlan(q.to(device), [tier], isa=isa, scratch=scratch)
        cases.append((plan, attend("torch", q, [part.tier]).out))
    for plan, want in [*cases, *cases[::-1]]:
        run(poisoned(plan))
        torch.testing.assert_close(plan.result().out.cpu(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most", [None, [0.3, 0.0]])
def test_a_slot_or_a_count_out_of_range_is_refused(backend: str, most: list[float] | None) -> None:
    q, parts = torch.randn(2, 2, 64), [drawn("k8v4"), drawn("k4v4", most=most)]
    tiers = [part.tier for part in parts]
    good = int(tiers[1].slots[0, 0, 3])
    for bad in (-1, tiers[1].pool_slots, 2**30, -(2**30)):
        tiers[1].slots[0, 0, 3] = bad
        with pytest.raises(ValueError, match=r"tier 1.*slot|slot.*tier 1"):
            attend(backend, q, tiers)
    tiers[1].slots[0, 0, 3] = good
    for bad in (-1, tiers[1].width + 1):
        tiers[1].count[1, 0] = bad
        with pytest.raises(ValueError, match=r"tier 1.*count|count.*tier 1"):
            attend(backend, q, tiers)


def test_wrong_pages_are_named() -> None:
    part, q = drawn("k4v4").tier, torch.randn(2, 2, 64)
    with pytest.raises(ValueError, match="k must be uint8"):
        tiered_attention_torch(q, [Tier(part.k[:, 1:], part.v, part.slots, part.count, part.pages)])
    with pytest.raises(ValueError, match=r"q is \[2, 2, 32\]"):
        tiered_attention_torch(q[..., :32], [part])
    bad = part.slots.clone()
    bad[0, 0, 3] = part.pool_slots
    with pytest.raises(ValueError, match="slot"):
        tiered_attention_torch(q, [Tier(part.k, part.v, bad, part.count, part.pages)])
    if HAVE_NATIVE:
        with pytest.raises(ValueError, match="two sides of the same pages"):
            attend("", q, [Tier(part.k.clone(), part.v, part.slots, part.count, part.pages)])
        with pytest.raises(ValueError, match="out of range"):
            attend("", q, [Tier(part.k, part.v, bad, part.count, part.pages)])


# -- sifting --------------------------------------------------------------------------------------


def sifted_by_rule(
    logits: Tensor, values: Tensor, most: float, mean: Tensor, needed: Tensor
) -> tuple[Tensor, Tensor]:
    """A head's output where ``needed`` values are read and the rest is the mean; its left share."""
    weights = logits.softmax(-1)
    left = weights[~needed].sum()
    return weights[needed] @ values[needed] + left * mean.double(), left


def needed_by_rule(logits: Tensor, most: float) -> Tensor:
    """The definition, threshold by threshold."""
    weights = logits.softmax(-1)
    for step in range(256):
        read = logits >= logits.max() - step / 16
        if weights[read].sum() >= 1 - most:
            return read
    return torch.ones_like(logits, dtype=torch.bool)


@pytest.mark.parametrize("name", ["k16v16", "k8v8", "k4v4", "k4v2"])
@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 300])
def test_sanitize_sifting_follows_its_rule(
    backend: str, name: str, group: int, tokens: int
) -> None:
    most = [0.1, 0.4, 0.0]
    part = drawn(name, rows=3, most=most, tokens=tokens)
    q = torch.randn(3, 2 * group, 64) * torch.tensor([1.0, 4.0, 1.0])[:, None, None]
    got = attend(backend, q, [part.tier])
    sifting = part.tier.sifting
    assert sifting is not None
    exact = reference(q, [part])
    for row, share in enumerate(most):
        for kv_head in range(2):
            mine = [exact[row][kv_head * group + g] for g in range(group)]
            if not len(mine[0][0]):
                continue
            needed = torch.stack([needed_by_rule(logits, share) for logits, _ in mine]).any(0)
            lefts = []
            for g, (logits, values) in enumerate(mine):
                want, left = sifted_by_rule(
                    logits, values, share, sifting.mean[row, kv_head], needed
                )
                lefts.append(left)
                assert left <= share + 1e-6
                torch.testing.assert_close(
                    got.out[row, kv_head * group + g].double(), want, rtol=1e-4, atol=1e-4
                )
            spent = sifting.spent[row, kv_head]
            assert int(spent[1]) == (int(needed.sum()) if share else 0)
            want = float(torch.stack(lefts).mean()) if share else 0.0
            assert float(spent[0]) == pytest.approx(want, abs=1e-5)


def test_tiers_are_sifted_each_by_itself(compiled: str) -> None:
    """Of pages and of plain numbers, beside others that are read whole; heads in parts of four."""
    plain = torch.randn(2, 90, 2, 64)
    slots = torch.randperm(90)[:70].int().expand(2, 1, 70).contiguous()
    sifting = Sifting(torch.tensor([0.0, 0.3]), torch.randn(2, 2, 64), torch.zeros(2, 2, 2))
    tiers = [
        Tier(*plain, slots),
        drawn("k4v4", most=[0.2, 0.1]).tier,
        Tier(*plain, slots, None, None, sifting),
        drawn("k2v2", most=[0.4, 0.0], tokens=200).tier,
    ]
    for group in (1, 4, 7):
        for order in (tiers, tiers[::-1], tiers[1:2]):
            assert_as_defined(compiled, torch.randn(2, 2 * group, 64), order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sifting_in_16_bits(compiled: str, dtype: torch.dtype) -> None:
    plain = torch.randn(2, 90, 2, 64).to(dtype)
    sifting = Sifting(torch.tensor([0.2, 0.3]), torch.randn(2, 2, 64), torch.zeros(2, 2, 2))
    tiers = [Tier(*plain, None, None, None, sifting), drawn("k8v4", most=[0.1, 0.2]).tier]
    q = torch.randn(2, 4, 64).to(dtype)
    want, got = attend("torch", q, tiers), attend(compiled, q, tiers)
    torch.testing.assert_close(got.out, want.out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-4)


def test_the_whole_softmax_takes_what_is_left_out(backend: str) -> None:
    """Beside a plain tier: the log of all weights is as if all had been read."""
    part = drawn("k4v4", most=[0.3, 0.3], tokens=200)
    plain = drawn("k16v16", tokens=40)
    q = torch.randn(2, 2, 64)
    got, want = (
        attend(backend, q, [plain.tier, tier])
        for tier in (
            part.tier,
            Tier(part.tier.k, part.tier.v, part.tier.slots, part.tier.count, part.tier.pages),
        )
    )
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=0)
    assert not torch.equal(got.out, want.out)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_choice_depends_neither_on_threads_nor_on_company(threads: int) -> None:
    most = [0.1, 0.2, 0.1]
    part, q = drawn("k4v4", rows=3, most=most, tokens=400, kv_heads=4), torch.randn(3, 4, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = attend("", q, [part.tier])
        counts = part.tier.sifting.spent[..., 1].clone()
        torch.set_num_threads(threads)
        got = attend("", q, [part.tier])
        torch.testing.assert_close(got.out, want.out, rtol=1e-5, atol=1e-5)
        assert torch.equal(part.tier.sifting.spent[..., 1], 2 * counts)
        for row in range(3):
            tier, mine = part.tier, slice(row, row + 1)
            sifting = Sifting(*(x[mine].clone() for x in vars(tier.sifting).values()))
            sifting.spent.zero_()
            one = Tier(tier.k, tier.v, tier.slots[mine], tier.count[mine], tier.pages, sifting)
            alone = attend("", q[mine], [one])
            torch.testing.assert_close(alone.out[0], want.out[row], rtol=1e-5, atol=1e-5)
            assert torch.equal(sifting.spent[0, :, 1], counts[row])
    finally:
        torch.set_num_threads(before)


def test_a_row_that_cannot_be_multiplied_shows(backend: str) -> None:
    """What is no number is not left out unseen."""
    part = drawn("k16v16", most=[0.2, 0.2])
    q = torch.randn(2, 2, 64)
    q[0, 0, 3] = math.nan
    got = attend(backend, q, [part.tier])
    assert got.out[0, 0].isnan().all()
    assert not got.out[1].isnan().any()


# -- on a GPU alone -------------------------------------------------------------------------------


def on_a_gpu(most: list[float]) -> tuple[AttentionPlan, Tensor, Tier]:
    """A plan over pages with what it reads, of many small splits."""
    available("cuda")
    tier = on("cuda", drawn("k4v4", dim=128, kv_heads=4, tokens=600, rows=2, most=most).tier)
    q = torch.randn(2, 4, 128, device="cuda")
    plan = AttentionPlan(q, [tier], want_logits=True)
    plan.run()
    torch.cuda.synchronize()
    return plan, q, tier


@pytest.mark.gpu
@pytest.mark.parametrize("most", [[0.0, 0.0], [0.2, 0.1]])
def test_a_captured_graph_chooses_anew(most: list[float]) -> None:
    """One replay for rows that are sifted and rows that are not: the device reads which."""
    plan, q, tier = on_a_gpu([0.3, 0.0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run()
    q.copy_(torch.randn(q.shape))
    tier.sifting.most.copy_(torch.tensor(most))
    poisoned(plan)
    graph.replay()
    plan.check()
    want = tiered_attention_torch(q, [tier], want_logits=True)
    for mine, theirs in zip(plan.result(), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("most", [[0.0, 0.0], [0.2, 0.1]])
def test_many_runs_never_vary(most: list[float]) -> None:
    """Blocks publish what they found to each other: a missing fence would show as a difference."""
    plan, _, _ = on_a_gpu(most)
    first = plan.result().out.clone()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(5_000):
        plan.run()
        differing += (plan.result().out != first).any()
    assert int(differing) == 0
