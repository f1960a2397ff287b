"""Pages of few bits: the layout against the formats' definitions, attention against float64."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from engine.errors import OptionError
from engine.ops import native
from engine.ops.attention import tiered_attention_torch
from engine.ops.few_bits import seen
from engine.ops.formats import FORMATS, PLAIN, Affine
from engine.ops.native import AttentionPlan, AttentionResult, Sifting, Tier
from engine.ops.pages import PAGE, Pages
from engine.options import CACHE_BITS, parse_bits
from tests.test_attention import HAVE_NATIVE, available

NAMES = [f"k{k}v{v}" for k in CACHE_BITS for v in CACHE_BITS]
SOME = ["k16v16", "k8v8", "k8v4", "k4v4", "k4v2", "k2v2", "k2v16", "k16v4"]
DIMS = (16, 32, 64, 80, 96, 128)
needs_native = pytest.mark.skipif(not HAVE_NATIVE, reason="the native module is not built")
ISAS = [pytest.param(isa, marks=needs_native) for isa in ("baseline", "avx2", "avx512")]


@pytest.fixture(params=["torch", *ISAS])
def backend(request: pytest.FixtureRequest) -> str:
    """The definition, and every instruction set of the CPU."""
    return available(request.param)


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
    """Attend by one implementation, outputs poisoned before."""
    if backend == "torch":
        return tiered_attention_torch(q, tiers, want_logits=True)
    plan = AttentionPlan(q, tiers, want_logits=True, isa=backend)
    for tensor in plan.result():
        assert tensor is not None
        tensor.fill_(math.nan)
    plan.run()
    return plan.result()


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


def test_the_kernels_are_the_definition() -> None:
    """To rounding of sums, in every instruction set, by channel too."""
    if not HAVE_NATIVE:
        pytest.skip("the native module is not built")
    for name in NAMES:
        part, q = drawn(name, rows=3), torch.randn(3, 6, 64)
        want = attend("torch", q, [part.tier])
        for isa in native.ISAS:
            if native.load()[0].has_isa(isa):
                got = attend(isa, q, [part.tier])
                for mine, theirs in zip(got, want, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


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
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 300])
def test_sifting_follows_its_rule(backend: str, name: str, group: int, tokens: int) -> None:
    most = [0.1, 0.4, 0.0]
    part = drawn(name, rows=3, most=most, tokens=tokens)
    q = torch.randn(3, 2 * group, 64)
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
