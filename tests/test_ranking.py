"""The policy launch against plain Python: exact sets, ties, budgets, wrong arguments."""

import math

import pytest
import torch

from engine import native, ranking
from tests.selection import lightest

needs_native = pytest.mark.skipif(not native.loaded(), reason="the native module is not built")
WAYS = [
    "torch",
    pytest.param("cpu", marks=needs_native),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_native]),
]


@pytest.fixture(params=WAYS)
def way(request) -> str:
    if request.param == "cuda" and native.backend().name != "cuda":
        pytest.skip("needs a CUDA device and the CUDA kernels")
    return request.param


def call(way: str, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Run one implementation; results are written back into the tensors."""
    if way == "torch":
        getattr(ranking, f"{name}_torch")(**tensors)
        return
    there = {key: t.to("cuda" if way == "cuda" else "cpu") for key, t in tensors.items()}
    getattr(ranking, name)(**there)
    for key, t in there.items():
        tensors[key].copy_(t)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rank_inputs(weights: torch.Tensor, first, last, keep, most: int) -> dict[str, torch.Tensor]:
    """Weights [problems, heads, width] as logits, lists of distinct slots, poisoned outputs."""
    problems, _, width = weights.shape
    slots = torch.stack([torch.randperm(10 * width + 1)[:width].sort()[0] for _ in range(problems)])
    return {
        "logits": weights.log(),
        "lse": torch.zeros(weights.shape[:2]),
        "first": first,
        "last": last,
        "keep": keep,
        "slots": slots.int(),
        "out": torch.full((problems, most), -7, dtype=torch.int32),
        "out_count": torch.full((problems,), -7, dtype=torch.int32),
    }


def ranked(x: dict[str, torch.Tensor], weights: torch.Tensor, p: int) -> list[int]:
    """What must be written for problem p, by sorting in Python."""
    begin, end, keep = (int(x[name][p]) for name in ("first", "last", "keep"))
    total = weights[p].double().nan_to_num(nan=0.0).sum(0).tolist()
    best = sorted(range(begin, end), key=lambda i: (-total[i], i))[:keep]
    return [int(x["slots"][p, i]) for i in sorted(best)]


def check_rank(way: str, weights: torch.Tensor, first, last, keep, most: int) -> None:
    x = rank_inputs(weights, first, last, keep, most)
    call(way, "rank", x)
    for p in range(len(weights)):
        want = ranked(x, weights, p)
        assert int(x["out_count"][p]) == len(want)
        assert x["out"][p, : len(want)].tolist() == want
        assert bool((x["out"][p, len(want) :] == -7).all())  # the tail stays as it was


@pytest.mark.parametrize("width", [1, 7, 255, 256, 257, 1296])
def test_rank_takes_the_highest(way, width):
    generator = torch.Generator().manual_seed(width)
    # Whole numbers of 2^-12, far enough apart for every order of summation.
    levels = torch.randperm(width * 4, generator=generator).view(4, 1, width)
    weights = (levels + 1) / 4096 * torch.ones(4, 3, width)
    first = ints(0, 0, width // 3, 0)
    last = ints(width, width, width, width - width // 4)
    keep = ints(width // 3 + 1, 0, 2 * width, width // 2)
    check_rank(way, weights, first, last, keep, most=width)


def test_rank_settles_ties_by_the_lower_entry(way):
    """Weights are 0 or 1 exactly: exp(0) and exp(-inf)."""
    weights = torch.randint(0, 2, (5, 4, 300), generator=torch.Generator().manual_seed(1)).float()
    keep = ints(1, 100, 150, 299, 300)
    check_rank(way, weights, ints(*[0] * 5), ints(*[300] * 5), keep, most=300)


def test_rank_counts_not_a_number_as_nothing(way):
    weights = torch.ones(1, 1, 20)
    weights[0, 0, [3, 4]] = 0
    x = rank_inputs(weights, ints(0), ints(20), ints(18), 18)
    x["logits"][0, 0, 4] = math.nan
    call(way, "rank", x)
    assert x["out"].tolist() == [[int(x["slots"][0, i]) for i in range(20) if i not in (3, 4)]]


@pytest.mark.parametrize("wrong", [{"last": ints(21)}, {"first": ints(-1)}, {"keep": ints(19)}])
def test_rank_refuses_what_does_not_fit(way, wrong):
    x = rank_inputs(torch.ones(1, 2, 20), ints(0), ints(20), ints(5), most=18) | wrong
    with pytest.raises(ValueError, match="rank"):
        call(way, "rank", x)


def age_inputs(problems: int, heads: int, kv_heads: int, text: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(text)
    logits = torch.randn(problems, heads, text + 30, generator=generator)
    used = torch.tensor([max(1, text - 3 * p) for p in range(problems)], dtype=torch.int32)
    places = torch.rand(problems, kv_heads, text, generator=generator).argsort(-1)
    return {
        "logits": logits,
        "lse": logits.logsumexp(-1),
        "first": ints(*[p % 30 for p in range(problems)]),
        "used": used,
        "budget": ints(*[-1 if p == 1 else int(used[p]) - 1 for p in range(problems)]),
        "recent": ints(*[(5 * p) % text for p in range(problems)]),
        "scores": torch.rand(problems, kv_heads, text, generator=generator) * 0.1,
        "positions": (places * 3 + 40).int(),
        "victim": torch.full((problems, kv_heads), -7, dtype=torch.int32),
    }


@pytest.mark.parametrize(("text", "heads", "kv_heads"), [(1, 2, 2), (20, 8, 2), (300, 4, 4)])
def test_age_accumulates_and_evicts(way, text, heads, kv_heads):
    x = age_inputs(4, heads, kv_heads, text)
    before = {name: t.clone() for name, t in x.items()}
    call(way, "age", x)
    for p in range(4):
        begin, used = int(x["first"][p]), int(x["used"][p])
        weights = (x["logits"][p] - x["lse"][p][:, None]).double().exp()[:, begin : begin + used]
        added = weights.view(kv_heads, heads // kv_heads, used).sum(1)
        scores = before["scores"][p, :, :used].double() + added
        positions = before["positions"][p, :, :used].long()
        recent, budget = int(x["recent"][p]), int(x["budget"][p])
        evicts = 0 <= budget < used and recent < used
        want = lightest(scores, positions, recent) if evicts else torch.full((kv_heads,), -1)
        assert x["victim"][p].tolist() == want.tolist()
        for head in range(kv_heads):
            if evicts:
                scores[head, want[head]] = math.inf
                positions[head, want[head]] = -1
        torch.testing.assert_close(x["scores"][p, :, :used].double(), scores, rtol=1e-5, atol=1e-6)
        assert torch.equal(x["positions"][p, :, :used].long(), positions)
        assert torch.equal(x["scores"][p, :, used:], before["scores"][p, :, used:])


def test_age_evicts_the_youngest_of_equals(way):
    x = age_inputs(1, 2, 2, 10)
    x["logits"].fill_(-math.inf)
    x["lse"].zero_()
    x["scores"].fill_(1.0)
    x["positions"][:] = torch.tensor([4, 9, 1, 7, 0, 3, 8, 2, 6, 5], dtype=torch.int32)
    x["recent"][:] = 2
    x["budget"][:] = 9
    call(way, "age", x)
    assert x["victim"].tolist() == [[3, 3]]  # positions 9 and 8 are recent, 7 is the next


def test_age_refuses_what_does_not_fit(way):
    for wrong in ({"used": ints(11)}, {"first": ints(31)}, {"first": ints(-1)}):
        with pytest.raises(ValueError, match="age"):
            call(way, "age", age_inputs(1, 2, 2, 10) | wrong)


def test_wrong_tensors_are_named():
    x = rank_inputs(torch.ones(2, 2, 20), ints(0, 0), ints(20, 20), ints(5, 5), most=18)
    for name, bad in (("slots", x["slots"].long()), ("keep", ints(1)), ("lse", x["lse"][:, :1])):
        with pytest.raises(ValueError, match=name):
            ranking.rank(**(x | {name: bad}))
