"""The attention operators, every implementation against a reference in float64.

One file for all of them: the torch twins, the native CPU kernels in each instruction set this
processor has, and the CUDA kernels in the block emulator and on a GPU (marker ``gpu``).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native
from engine.ops.attention import (
    selective_attention,
    selective_pv_torch,
    selective_qk_torch,
    tiered_attention,
    tiered_attention_torch,
)
from engine.ops.native import AttentionPlan, AttentionResult, Tier
from tests.emulated import standing_in

HAVE_NATIVE = native.backend().name != "torch"
needs_native = pytest.mark.skipif(not HAVE_NATIVE, reason="the native module is not built")
ISAS = [pytest.param(isa, marks=needs_native) for isa in ("baseline", "avx2", "avx512")]
NATIVE = [*ISAS, "emulated", pytest.param("cuda", marks=[pytest.mark.gpu, needs_native])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FAR = 2**30  # stands in list entries beyond count: reading it would be noticed


def available(name: str) -> str:
    if name == "cuda" and native.backend().name != "cuda":
        pytest.skip("needs a CUDA device and the CUDA kernels")
    if name not in ("torch", "cuda"):
        from engine import _native

        if not _native.has_isa(name):
            pytest.skip(f"this processor has no {name}")
    return name


def served(request: pytest.FixtureRequest) -> Iterator[str]:
    """An implementation by name, for a test's time."""
    if request.param != "emulated":
        yield available(request.param)
        return
    with standing_in(request.getfixturevalue("emulated_native"), order=2):
        yield "emulated"


@pytest.fixture(params=["torch", *NATIVE])
def backend(request) -> Iterator[str]:
    """Every implementation."""
    yield from served(request)


@pytest.fixture(params=NATIVE)
def compiled(request) -> Iterator[str]:
    """Every implementation that has plans."""
    yield from served(request)


@pytest.fixture(params=ISAS)
def isa(request) -> str:
    """Every instruction set of the CPU kernels."""
    return available(request.param)


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    slots: Tensor | None
    count: Tensor | None

    def to(self, device: str) -> "Inputs":
        parts = (self.q, self.k, self.v, self.slots, self.count)
        return Inputs(*(None if t is None else t.to(device) for t in parts))

    @property
    def tier(self) -> Tier:
        return Tier(self.k, self.v, self.slots, self.count)

    @property
    def width(self) -> int:
        return self.tier.width


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def isa_of(backend: str) -> str:
    return "" if backend in ("cuda", "emulated") else backend


def run(plan: AttentionPlan) -> None:
    """Run a plan, and raise what it met."""
    plan.run()
    plan.check()


def poisoned(plan: AttentionPlan) -> AttentionPlan:
    for t in (plan.out, plan.logits, plan.lse):
        if t is not None:
            t.fill_(math.nan)
    return plan


def attend(backend: str, *parts: Inputs, scale: float | None = None) -> AttentionResult:
    """Run one backend on the parts' tiers with the first's queries, outputs poisoned first.

    Results are back on the CPU.
    """
    q, tiers = parts[0].q, [part.tier for part in parts]
    if backend == "torch":
        return tiered_attention_torch(q, tiers, scale=scale, want_logits=True)
    moved = [part.to(device_of(backend)) for part in parts]
    isa, tiers = isa_of(backend), [part.tier for part in moved]
    plan = AttentionPlan(moved[0].q, tiers, scale=scale, want_logits=True, isa=isa)
    run(poisoned(plan))
    return AttentionResult(*(None if t is None else t.cpu() for t in plan.result()))


def listed(x: Inputs, row: int, kv_head: int) -> list[int]:
    """The slots a row attends to with one kv head, spelled out."""
    entries = list(range(x.k.shape[0]))
    if x.slots is not None:
        entries = x.slots[row, min(kv_head, x.slots.shape[1] - 1)].tolist()
    if x.count is None:
        return entries
    return entries[: int(x.count[row, min(kv_head, x.count.shape[1] - 1)])]


def gathered(parts: tuple[Inputs, ...], row: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values that a row attends to with one head, of all parts."""
    kv_head = head // (parts[0].q.shape[1] // parts[0].k.shape[1])
    used = [(part, listed(part, row, kv_head)) for part in parts]
    keys = torch.cat([part.k[slots, kv_head] for part, slots in used])
    return keys, torch.cat([part.v[slots, kv_head] for part, slots in used])


def reference(*parts: Inputs, scale: float | None = None) -> AttentionResult:
    """Attention in float64, one row and one head at a time."""
    q = parts[0].q
    rows, heads, dim = q.shape
    out = torch.zeros(rows, heads, dim, dtype=torch.float64)
    width = sum(part.width for part in parts)
    logits = torch.full((rows, heads, width), -math.inf, dtype=torch.float64)
    lse = torch.full((rows, heads), -math.inf, dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            keys, values = gathered(parts, row, head)
            scores = keys.double() @ q[row, head].double() * (scale or dim**-0.5)
            if not len(scores):
                continue
            logits[row, head, places(parts, row, head)] = scores
            lse[row, head] = scores.logsumexp(0)
            out[row, head] = scores.softmax(0) @ values.double()
    return AttentionResult(out, logits, lse)


def places(parts: tuple[Inputs, ...], row: int, head: int) -> list[int]:
    """Where a row's logits of one head lie: a part's begin where the widths before it end."""
    kv_head, at, found = head // (parts[0].q.shape[1] // parts[0].k.shape[1]), 0, []
    for part in parts:
        found += range(at, at + len(listed(part, row, kv_head)))
        at += part.width
    return found


def torch_error(parts: tuple[Inputs, ...], want: Tensor) -> float:
    """The error of programs without these operators at this dtype: SDPA, and by hand."""
    rows, heads, dim = parts[0].q.shape
    worst = 0.0
    for row in range(rows):
        for head in range(heads):
            q, (k, v) = parts[0].q[row, head][None], gathered(parts, row, head)
            if not len(k):
                continue
            fused = F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])
            eager = ((q @ k.T) * dim**-0.5).float().softmax(-1).to(q.dtype) @ v
            for out in (fused[0, 0], eager):
                worst = max(worst, float((out[0].double() - want[row, head]).abs().max()))
    return worst


def make(
    n: int,
    dim: int = 64,
    group: int = 1,
    kv_heads: int = 2,
    rows: int = 2,
    per_head: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Random inputs: n listed slots of a larger pool whose other slots are NaN."""
    g = torch.Generator().manual_seed(seed * 1000 + n)
    pool = n + n // 3 + 3
    q = torch.randn(rows, group * kv_heads, dim, generator=g)
    k, v = torch.randn(2, pool, kv_heads, dim, generator=g)
    lists = kv_heads if per_head else 1
    picked = torch.stack(
        [torch.randperm(pool, generator=g)[:n].sort()[0] for _ in range(rows * lists)]
    )
    slots = torch.full((rows, lists, n + 5), FAR, dtype=torch.int32)
    slots[..., :n] = picked.view(rows, lists, n)
    count = torch.full((rows, lists), n, dtype=torch.int32)
    count[-1] -= n // 2  # unequal rows
    if per_head and n > 1:
        count[0, 0] -= 1
    used = torch.zeros(pool, kv_heads, dtype=torch.bool)
    x = Inputs(q, k, v, slots, count)
    for row in range(rows):
        for head in range(kv_heads):
            used[listed(x, row, head), head] = True
    k[~used], v[~used] = math.nan, math.nan
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), slots, count)


def assert_close_as_torch(got: AttentionResult, want: AttentionResult, *parts: Inputs) -> None:
    """At most twice the error of plain torch at this dtype, plus half a unit in the last place."""
    dtype = parts[0].q.dtype
    floor = torch.finfo(dtype).eps * float(want.out.abs().max()) / 2
    allowed = 2 * torch_error(parts, want.out) + floor
    assert got.out.dtype == dtype
    assert float((got.out.double() - want.out).abs().max()) <= allowed
    torch.testing.assert_close(got.lse.double(), want.lse, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(got.logits.double(), want.logits, rtol=2e-6, atol=2e-5)


# rows listed, head size, query heads per kv head, lists per kv head
CASES = [
    (1, 16, 1, False),
    (7, 32, 4, True),
    (63, 64, 7, False),
    (64, 96, 8, True),
    (65, 128, 1, True),
    (65, 80, 2, False),
    (575, 64, 1, False),
    (575, 128, 4, True),
    (2880, 128, 1, False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "dim", "group", "per_head"), CASES)
def test_sanitize_matches_float64(backend, dtype, n, dim, group, per_head):
    x = make(n, dim, group, per_head=per_head, dtype=dtype)
    assert_close_as_torch(attend(backend, x), reference(x), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_list_is_the_whole_pool_bit_for_bit(backend, dtype):
    x = make(300, 64, 2, dtype=dtype)
    x.k, x.v = x.k.nan_to_num(), x.v.nan_to_num()
    pool = x.k.shape[0]
    every = torch.arange(pool, dtype=torch.int32).expand(2, 1, pool)
    all_slots = Inputs(x.q, x.k, x.v, None, None)
    whole = attend(backend, all_slots)
    assert_close_as_torch(whole, reference(all_slots), all_slots)
    for given, listed_ in zip(
        whole, attend(backend, Inputs(x.q, x.k, x.v, every, None)), strict=True
    ):
        assert torch.equal(given, listed_)


def test_count_without_a_list_takes_a_prefix(backend):
    x = make(70, 32, 2)
    x = Inputs(x.q, x.k.nan_to_num(), x.v.nan_to_num(), None, x.count)
    x.k[70:], x.v[70:] = math.nan, math.nan
    assert_close_as_torch(attend(backend, x), reference(x), x)


def test_nothing_to_attend_gives_zeros(backend):
    x = make(40, 64, 2)
    x.count[0] = 0
    got = attend(backend, x)
    assert torch.equal(got.out[0], torch.zeros_like(got.out[0]))
    assert bool((got.lse[0] == -math.inf).all())
    assert bool((got.logits[0] == -math.inf).all())
    assert_close_as_torch(got, reference(x), x)


def test_lists_of_no_entries_and_no_rows(backend):
    x = make(5)
    empty = attend(backend, Inputs(x.q, x.k, x.v, x.slots[..., :0], None))
    assert empty.logits.shape == (2, 2, 0)
    assert torch.equal(empty.out, torch.zeros_like(x.q))
    none = attend(backend, Inputs(x.q[:0], x.k, x.v, x.slots[:0], x.count[:0]))
    assert none.out.shape == (0, 2, 64)


def test_a_slot_named_twice_counts_twice(backend):
    x = make(20)
    x.slots[:, :, 3:9] = x.slots[:, :, 2:3]
    assert_close_as_torch(attend(backend, x), reference(x), x)


def test_order_of_the_list_changes_only_rounding(backend):
    x = make(300, 128, 4)
    x.count.fill_(300)
    x.k, x.v = x.k.nan_to_num(), x.v.nan_to_num()
    shuffled = Inputs(x.q, x.k, x.v, x.slots.clone(), x.count)
    shuffled.slots[..., :300] = x.slots[..., torch.randperm(300)]
    torch.testing.assert_close(
        attend(backend, shuffled).out, attend(backend, x).out, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(backend, dtype):
    """q as a slice of a fused projection, pools head-major, lists as slices of longer ones."""
    x = make(100, 64, 2, dtype=dtype)
    fused = torch.full((2, 3, 4, 64), math.nan, dtype=dtype)
    fused[:, 1] = x.q
    k, v = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x.k, x.v))
    long = torch.full((2, 2, 300), FAR, dtype=torch.int32)
    long[:, :1, :105] = x.slots
    strided = Inputs(fused[:, 1], k, v, long[:, :1, :105], x.count.repeat(1, 3)[:, :1])
    assert not k.is_contiguous()
    for a, b in zip(attend(backend, strided), attend(backend, x), strict=True):
        assert torch.equal(a, b)


def test_scale(backend):
    x = make(50)
    want = reference(x, scale=0.7)
    got = attend(backend, x, scale=0.7).out.double()
    torch.testing.assert_close(got, want.out, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow(backend):
    x = make(100, 64)
    x.q *= 500
    torch.testing.assert_close(
        attend(backend, x).out.double(), reference(x).out, rtol=1e-4, atol=1e-4
    )


def test_not_a_number_in_a_listed_row_shows(backend):
    x = make(40, 64)
    x.k[x.slots[0, 0, 3]] = math.nan
    assert bool(attend(backend, x).out[0].isnan().any())


def test_a_query_that_is_no_number_shows(backend):
    x = make(40, 64)
    x.q[0, 1, 5] = math.nan
    got = attend(backend, x)
    assert bool(got.out[0, 1].isnan().all())
    assert bool(got.lse[0, 1].isnan())
    assert not bool(got.out[0, 0].isnan().any())
    assert not bool(got.out[1].isnan().any())


@pytest.mark.parametrize("bad", [-1, 10_000, FAR, -FAR])
def test_a_slot_out_of_range_is_refused(backend, bad):
    x = make(40)
    x.slots[1, 0, 7] = bad
    with pytest.raises(ValueError, match="slot"):
        attend(backend, x)


@pytest.mark.parametrize("bad", [-1, 46, FAR])
def test_a_count_out_of_range_is_refused(backend, bad):
    x = make(40)
    x.count[0] = bad
    with pytest.raises(ValueError, match="count"):
        attend(backend, x)


def test_wrong_arguments_are_named(backend):
    x = make(40, 64, 2)
    wrong = {
        "slots must be int32": Inputs(x.q, x.k, x.v, x.slots.long(), x.count),
        "count must be int32": Inputs(x.q, x.k, x.v, x.slots, x.count.float()),
        "2 rows": Inputs(x.q, x.k, x.v, x.slots[:1], x.count),
        "1 or 2 lists": Inputs(x.q, x.k, x.v, x.slots.expand(2, 4, 45), x.count),
        "3 heads": Inputs(x.q[:, :3], x.k, x.v, x.slots, x.count),
        "v is": Inputs(x.q, x.k, x.v[:9], x.slots, x.count),
        "q is": Inputs(x.q[..., :32], x.k, x.v, x.slots, x.count),
        "3 dimensions": Inputs(x.q[0], x.k, x.v, x.slots, x.count),
    }
    for message, inputs in wrong.items():
        with pytest.raises(ValueError, match=message):
            attend(backend, inputs)


@needs_native
def test_wrong_outputs_and_devices_are_named():
    x = make(40)
    for name, given in (("out", torch.empty(2, 2, 32)), ("lse", torch.empty(2, 3))):
        with pytest.raises(ValueError, match=name):
            AttentionPlan(x.q, [x.tier], want_logits=True, **{name: given})
    with pytest.raises(ValueError, match="slots is on meta"):
        AttentionPlan(x.q, [Tier(x.k, x.v, x.slots.to("meta"), x.count)])
    with pytest.raises(ValueError, match=r"head size|native kernel"):
        AttentionPlan(x.q[..., :24], [Tier(x.k[..., :24], x.v[..., :24], x.slots, x.count)])
    with pytest.raises(ValueError, match=r"dtype|native kernel"):
        AttentionPlan(x.q.double(), [Tier(x.k.double(), x.v.double(), x.slots, x.count)])


@pytest.mark.parametrize(("n", "dim", "group", "per_head"), CASES)
def test_sanitize_products_match_float64(backend, n, dim, group, per_head):
    x = make(n, dim, group, per_head=per_head)
    want = reference(x, scale=1.0)
    # Drawn as the rest is: one sum of 2,880 numbers in fp32 out of many thousands misses 1e-4.
    p = torch.rand(want.logits.shape, generator=torch.Generator().manual_seed(n))
    p[want.logits == -math.inf] = math.nan  # beyond count: must not be read
    if backend == "torch":
        scores = selective_qk_torch(x.q, x.k, x.slots, x.count)
        mixed = selective_pv_torch(p, x.v, x.slots, x.count)
    else:
        y, isa = x.to(device_of(backend)), isa_of(backend)
        qk = AttentionPlan(y.q, [Tier(y.k, None, y.slots, y.count)], op="qk", isa=isa)
        weights = p.to(device_of(backend))
        pv = AttentionPlan(None, [Tier(None, y.v, y.slots, y.count)], op="pv", p=weights, isa=isa)
        for plan in (poisoned(qk), poisoned(pv)):
            run(plan)
        scores, mixed = qk.logits.cpu(), pv.out.cpu()
    torch.testing.assert_close(scores.double(), want.logits, rtol=1e-5, atol=1e-4)
    expected = torch.zeros(x.q.shape, dtype=torch.float64)
    for row in range(x.q.shape[0]):
        for head in range(x.q.shape[1]):
            used = listed(x, row, head // group)
            values = x.v[used, head // group].double()
            expected[row, head] = p[row, head, : len(used)].double() @ values
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_plan_reads_its_tensors_anew(compiled):
    """Changing q, the lists or the pool in place is all the engine does between two steps."""
    x = make(200, 128, 2).to(device_of(compiled))
    plan = AttentionPlan(x.q, [x.tier], want_logits=True, isa=isa_of(compiled))
    run(plan)
    other = make(200, 128, 2, seed=7)
    for mine, new in zip((x.q, x.k, x.v, x.slots, x.count), vars(other).values(), strict=True):
        mine.copy_(new)
    run(poisoned(plan))
    result = AttentionResult(*(t.cpu() for t in plan.result()))
    assert_close_as_torch(result, reference(other), other)
    again = plan.out.clone()
    run(poisoned(plan))
    assert torch.equal(plan.out, again)  # bit for bit: nothing is left over from a run


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("kv_heads", [1, 3, 9])
def test_any_number_of_threads(isa, threads, kv_heads):
    x = make(575, 64, 2, kv_heads=kv_heads, rows=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_close_as_torch(attend(isa, x), reference(x), x)
    finally:
        torch.set_num_threads(before)


def test_the_plain_call_takes_the_native_way():
    """What the engine calls gives the twin's result, and raises where a slot is wrong."""
    x = make(60, 64, 2)
    got = selective_attention(x.q, x.k, x.v, x.slots, x.count, want_logits=True)
    want = tiered_attention_torch(x.q, [x.tier], want_logits=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert selective_attention(x.q, x.k, x.v, x.slots, x.count).logits is None
    x.slots[0, 0, 0] = -3
    with pytest.raises(ValueError, match="slot"):
        selective_attention(x.q, x.k, x.v, x.slots, x.count)


# -- several tiers under one softmax --------------------------------------------------------------

# rows listed in each tier, head size, query heads per kv head, lists per kv head
TIERS = [
    ((7,), 32, 7, True),
    ((40, 25), 64, 1, False),
    ((1, 575, 7), 128, 4, True),
    ((5, 0, 9), 16, 2, False),
    ((33, 31, 64, 65), 80, 2, False),
]


def tiers(sizes: tuple[int, ...], dim: int = 64, **options: object) -> list[Inputs]:
    """Pools and lists of several sizes, each with numbers of its own."""
    return [make(n, dim, seed=i + 1, **options) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "dim", "group", "per_head"), TIERS)
def test_sanitize_tiers_match_float64(backend, dtype, sizes, dim, group, per_head):
    parts = tiers(sizes, dim, group=group, per_head=per_head, dtype=dtype)
    assert_close_as_torch(attend(backend, *parts), reference(*parts), *parts)


def test_tiers_of_several_kinds(backend):
    """Lists per head, one for all heads, a whole pool, and the beginning of a head-major one."""
    per_head, shared, whole, prefix = make(70, per_head=True), *tiers((30, 20, 50))
    for x in (whole, prefix):
        x.k, x.v, x.slots = x.k.nan_to_num(), x.v.nan_to_num(), None
    whole.count = None
    prefix.k, prefix.v = (
        t.transpose(0, 1).contiguous().transpose(0, 1) for t in (prefix.k, prefix.v)
    )
    parts = [per_head, shared, whole, prefix]
    assert_close_as_torch(attend(backend, *parts), reference(*parts), *parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tier_of_nothing_changes_no_bit(backend, dtype):
    x, empty = make(130, 128, 2, dtype=dtype), make(9, 128, 2, dtype=dtype)
    empty.count.zero_()
    want, got = attend(backend, x), attend(backend, x, empty)
    behind = attend(backend, Inputs(x.q, empty.k, empty.v, empty.slots, empty.count), x)
    for result, own in ((got, slice(x.width)), (behind, slice(empty.width, None))):
        assert torch.equal(result.out, want.out)
        assert torch.equal(result.lse, want.lse)
        assert torch.equal(result.logits[..., own], want.logits)
        assert int((result.logits == -math.inf).sum()) >= empty.width * 2 * 4


def test_nothing_in_any_tier_gives_zeros(backend):
    parts = tiers((40, 20))
    for part in parts:
        part.count.zero_()
    got = attend(backend, *parts)
    assert torch.equal(got.out, torch.zeros_like(got.out))
    assert bool((got.lse == -math.inf).all())
    assert bool((got.logits == -math.inf).all())


def test_a_list_cut_into_tiers_is_the_list(backend):
    x = make(301, 128, 4)
    x.count.fill_(301)
    x.k, x.v = x.k.nan_to_num(), x.v.nan_to_num()
    cuts = [Inputs(x.q, x.k, x.v, x.slots[..., n:301:3].contiguous(), None) for n in range(3)]
    torch.testing.assert_close(
        attend(backend, *cuts).out, attend(backend, x).out, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_tiers_in_any_number_of_threads(isa, threads):
    parts = tiers((300, 70, 205), rows=1, kv_heads=1, group=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_close_as_torch(attend(isa, *parts), reference(*parts), *parts)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_refusal_names_the_tier(backend, number):
    parts = tiers((40, 30, 20))
    good = parts[number].slots[1, 0, 7].item()
    parts[number].slots[1, 0, 7] = 10_000
    with pytest.raises(ValueError, match=f"slot.*tier {number}|tier {number}.*slot"):
        attend(backend, *parts)
    parts[number].slots[1, 0, 7] = good
    parts[number].count[0] = -1
    with pytest.raises(ValueError, match=f"count.*tier {number}|tier {number}.*count"):
        attend(backend, *parts)


def test_tiers_that_do_not_fit_together_are_refused(backend):
    x = make(40)
    wrong = {
        "1 to 8 tiers, got 9": [x] * 9,
        "tier 1: q is": [x, make(40, 32)],
        "tier 1: v is": [x, Inputs(x.q, x.k, x.v[:9], x.slots, x.count)],
        "tier 2: its pool is": [x, x, make(40, kv_heads=1)],
        "tier 1: slots must be int32": [x, Inputs(x.q, x.k, x.v, x.slots.long(), x.count)],
    }
    for message, parts in wrong.items():
        with pytest.raises(ValueError, match=message):
            attend(backend, *parts)
    with pytest.raises(ValueError, match="1 to 8 tiers, got 0"):
        tiered_attention(x.q, [])


@needs_native
def test_the_products_take_one_tier():
    x = make(40)
    with pytest.raises(ValueError, match="qk cannot take 2 tiers"):
        AttentionPlan(x.q, [Tier(x.k, None), Tier(x.k, None)], op="qk")


@pytest.mark.gpu
def test_a_captured_graph_reads_its_tensors_anew():
    available("cuda")
    x = make(300, 128, 2).to("cuda")
    plan = AttentionPlan(x.q, [x.tier], want_logits=True)
    plan.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run()
    other = make(300, 128, 2, seed=3)
    for mine, new in zip(vars(x).values(), vars(other).values(), strict=True):
        mine.copy_(new)
    poisoned(plan)
    graph.replay()
    plan.check()
    result = AttentionResult(*(None if t is None else t.cpu() for t in plan.result()))
    assert_close_as_torch(result, reference(other), other)


@pytest.mark.gpu
def test_the_merge_of_many_small_splits_never_varies():
    """Blocks publish partial results to each other: a missing fence would show as a difference."""
    available("cuda")
    x = make(575, 128, 1, kv_heads=4, rows=1, dtype=torch.bfloat16).to("cuda")
    plan = AttentionPlan(x.q, [x.tier])
    plan.run()
    first = plan.result().out.clone()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(20_000):
        plan.run()
        differing += (plan.result().out != first).any()
    assert int(differing) == 0
