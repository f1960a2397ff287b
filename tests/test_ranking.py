"""The policy launch against plain Python: exact sets, ties, budgets, wrong arguments."""

import math

import pytest
import torch

from engine.ops import native, ranking

needs_native = pytest.mark.skipif(not native.loaded(), reason="the native module is not built")
WAYS = [
    "torch",
    *(pytest.param(isa, marks=needs_native) for isa in ("baseline", "avx2", "avx512")),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_native]),
]


@pytest.fixture(params=WAYS)
def way(request) -> str:
    if request.param == "cuda" and native.backend().name != "cuda":
        pytest.skip("needs a CUDA device and the CUDA kernels")
    module, _ = native.load()
    if module is not None and "avx" in request.param and not module.has_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def call(way: str, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Run one implementation; results are written back into the tensors."""
    if way == "torch":
        getattr(ranking, f"{name}_torch")(**tensors)
        return
    device = "cuda" if way == "cuda" else "cpu"
    there = {key: t.to(device) for key, t in tensors.items()}
    error = torch.zeros(1, dtype=torch.int32, device=device) if way == "cuda" else None
    isa = "" if way == "cuda" else way
    getattr(ranking, f"plan_{name}")(**there, error=error, isa=isa)()
    if error is not None and int(error):
        raise ValueError(f"{name}: the flag is set")
    for key, t in there.items():
        tensors[key].copy_(t)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rank_inputs(weights: torch.Tensor, first, last, keep, at, wanted) -> dict[str, torch.Tensor]:
    """Weights [problems, heads, width] as logits, lists of distinct slots, a poisoned output."""
    problems, _, width = weights.shape
    slots = torch.stack([torch.randperm(10 * width + 1)[:width].sort()[0] for _ in range(problems)])
    return {
        "logits": weights.log(),
        "lse": torch.zeros(weights.shape[:2]),
        "slots": slots.int(),
        "out": torch.full((problems, width), -7, dtype=torch.int32),
        "first": first,
        "last": last,
        "keep": keep,
        "at": at,
        "wanted": wanted,
    }


def ranked(x: dict[str, torch.Tensor], weights: torch.Tensor, p: int) -> list[int]:
    """What must be written for problem p, by sorting in Python."""
    begin, end, keep = (int(x[name][p]) for name in ("first", "last", "keep"))
    total = weights[p].double().nan_to_num(nan=0.0).sum(0).tolist()
    best = sorted(range(begin, end), key=lambda i: (-total[i], i))[:keep]
    return (
        [int(x["slots"][p, i]) for i in sorted(best)] if x["wanted"][p % len(x["wanted"])] else []
    )


def check_rank(way: str, weights: torch.Tensor, *runs) -> None:
    x = rank_inputs(weights, *runs)
    call(way, "rank", x)
    for p in range(len(weights)):
        want = torch.full_like(x["out"][p], -7)  # around the run it stays as it was
        run = ints(*ranked(x, weights, p))
        at = int(x["at"][p])
        want[at : at + len(run)] = run
        assert torch.equal(x["out"][p], want)


@pytest.mark.parametrize("width", [1, 7, 255, 256, 257, 1296])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rank_takes_the_highest(way, width, rows):
    """Four problems: of one row in four layers, of two rows in two, or of four."""
    generator = torch.Generator().manual_seed(width)
    # Whole numbers of 2^-12, far enough apart for every order of summation.
    levels = torch.randperm(width * 4, generator=generator).view(4, 1, width)
    weights = (levels + 1) / 4096 * torch.ones(4, 3, width)
    first = ints(0, 0, width // 3, 0)
    last = ints(width, width, width, width - width // 4)
    keep = ints(width // 3 + 1, 0, width // 2, width // 2)
    at = ints(width - width // 3 - 1, width, 0, width // 4)
    wanted = ints(1, 1, 1, width % 2)[-rows:]
    check_rank(way, weights, first, last, keep, at, wanted.clone())


def test_rank_settles_ties_by_the_lower_entry(way):
    """Weights are 0 or 1 exactly: exp(0) and exp(-inf)."""
    weights = torch.randint(0, 2, (5, 4, 300), generator=torch.Generator().manual_seed(1)).float()
    keep, none, all_ = ints(1, 100, 150, 299, 300), ints(*[0] * 5), ints(*[300] * 5)
    check_rank(way, weights, none, all_, keep, none, ints(*[1] * 5))


def test_rank_counts_not_a_number_as_nothing(way):
    weights = torch.ones(1, 1, 20)
    weights[0, 0, [3, 4]] = 0
    x = rank_inputs(weights, ints(0), ints(20), ints(18), ints(1), ints(1))
    x["logits"][0, 0, 4] = math.nan
    call(way, "rank", x)
    best = [int(x["slots"][0, i]) for i in range(20) if i not in (3, 4)]
    assert x["out"].tolist() == [[-7, *best, -7]]


WRONG = [{"last": ints(21)}, {"first": ints(-1)}, {"keep": ints(21)}, {"keep": ints(-1)}]
WRONG += [{"at": ints(16)}, {"at": ints(-1)}, {"first": ints(2**31 - 1)}, {"last": ints(4)}]
WRONG += [{"last": ints(2**31 - 1)}, {"last": ints(-(2**31))}]


@pytest.mark.parametrize("wrong", WRONG)
def test_rank_refuses_what_does_not_fit(way, wrong):
    x = rank_inputs(torch.ones(1, 2, 20), ints(0), ints(20), ints(5), ints(0), ints(1)) | wrong
    with pytest.raises(ValueError, match="rank"):
        call(way, "rank", x)
    assert bool((x["out"] == -7).all())
    call(way, "rank", x | {"wanted": ints(0)})  # nobody asks


def age_inputs(
    problems: int, rows: int, heads: int, kv_heads: int, places: int
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(places)
    logits = torch.randn(problems, heads, places + 30, generator=generator)
    used = torch.tensor([max(1, places - 1 - 3 * r) for r in range(rows)], dtype=torch.int32)
    order = torch.rand(problems, kv_heads, places, generator=generator).argsort(-1)
    return {
        "logits": logits,
        "lse": logits.logsumexp(-1),
        "first": ints(*[p % 30 for p in range(problems)]),
        "start": torch.arange(problems) * 1000 + 17,
        "used": used,
        "budget": ints(*[-1 if r == 1 else int(used[r]) - 1 for r in range(rows)]),
        "recent": ints(*[(50 * r) % (3 * places) for r in range(rows)]),
        "position": ints(*[3 * places + 40] * rows),
        "scores": torch.rand(problems, kv_heads, places, generator=generator) * 0.1,
        "positions": (order * 3 + 40).int(),
        "write": torch.full((problems, kv_heads), -7),
    }


@pytest.mark.parametrize(("places", "heads", "kv_heads"), [(2, 2, 2), (20, 8, 2), (300, 4, 4)])
@pytest.mark.parametrize("rows", [2, 4])
def test_age_accumulates_and_finds_a_place(way, places, heads, kv_heads, rows):
    x = age_inputs(4, rows, heads, kv_heads, places)
    before = {name: t.clone() for name, t in x.items()}
    call(way, "age", x)
    for p in range(4):
        begin, row = int(x["first"][p]), p % rows
        used, budget, recent, position = (
            int(x[name][row]) for name in ("used", "budget", "recent", "position")
        )
        weights = (x["logits"][p] - x["lse"][p][:, None]).double().exp()[:, begin : begin + used]
        scores, positions = before["scores"][p].double(), before["positions"][p].long()
        scores[:, :used] += weights.view(kv_heads, heads // kv_heads, used).sum(1)
        for head in range(kv_heads):
            old = [i for i in range(used) if positions[head, i] <= position - recent]
            order = sorted(old, key=lambda i: (float(scores[head, i]), -int(positions[head, i])))
            place = order[0] if order and 0 <= budget < used else used
            scores[head, place], positions[head, place] = 0, position + 1
            slot = int(x["start"][p]) + place
            assert x["write"][p, head] == slot * kv_heads + head
        torch.testing.assert_close(x["scores"][p].double(), scores, rtol=1e-5, atol=1e-6)
        assert torch.equal(x["positions"][p].long(), positions)


def test_age_evicts_the_youngest_of_equals(way):
    x = age_inputs(1, 1, 2, 2, 11)
    x["logits"].fill_(-math.inf)
    x["lse"].zero_()
    x["scores"].fill_(1.0)
    x["positions"][..., :10] = torch.tensor([4, 9, 1, 7, 0, 3, 8, 2, 6, 5], dtype=torch.int32)
    x["recent"][:], x["position"][:], x["used"][:], x["budget"][:] = 2, 9, 10, 9
    call(way, "age", x)
    # Positions 9 and 8 are recent, 7 is the next; it lies at place 3, slot 17 + 3.
    assert x["write"].tolist() == [[40, 41]]
    assert x["positions"][0, :, 3].tolist() == [10, 10]
    assert x["scores"][0, :, 3].tolist() == [0, 0]


def test_age_of_an_empty_list_adds_nothing(way):
    """-inf minus -inf is NaN, and no weight at all."""
    x = age_inputs(2, 2, 4, 2, 20)
    x["logits"].fill_(-math.inf)
    x["lse"].fill_(-math.inf)
    scores = x["scores"].clone()
    call(way, "age", x)
    assert int((x["scores"] != scores).sum()) == 4  # one place for each head


@pytest.mark.parametrize(
    "wrong", [{"used": ints(11)}, {"used": ints(-1)}, {"first": ints(32)}, {"first": ints(-1)}]
)
def test_age_refuses_what_does_not_fit(way, wrong):
    with pytest.raises(ValueError, match="age"):
        call(way, "age", age_inputs(1, 1, 2, 2, 11) | wrong)


def test_wrong_tensors_are_named():
    rows = [ints(0, 0), ints(20, 20), ints(5, 5), ints(0, 0), ints(1, 1)]
    x = rank_inputs(torch.ones(2, 2, 20), *rows)
    bad = [("slots", x["slots"].long()), ("keep", ints(1)), ("lse", x["lse"][:, :1])]
    bad += [("out", x["out"][:, 1:].clone()), ("out", x["out"].T), ("first", x["first"].float())]
    for name, wrong in bad:
        with pytest.raises(ValueError, match=name):
            ranking.plan_rank(**(x | {name: wrong}))
    with pytest.raises(ValueError, match="2 problems are no whole layers of 3 rows"):
        ranking.plan_rank(**(x | {"wanted": ints(0, 0, 0)}))
    y = age_inputs(2, 2, 4, 2, 20)
    bad = [
        ("start", y["start"].int()),
        ("write", y["write"].int()),
        ("scores", y["scores"][..., 1:]),
    ]
    for name, wrong in bad:
        with pytest.raises(ValueError, match=name):
            ranking.plan_age(**(y | {name: wrong.contiguous()}))


def test_a_module_without_cuda_leaves_a_gpu_to_torch(monkeypatch):
    class Module:
        with_cuda = False

    monkeypatch.setattr(native, "load", lambda: (Module, ""))
    assert native.loaded()
    assert not native.loaded("cuda")
    assert not native.loaded("meta")
    monkeypatch.setattr(Module, "with_cuda", True)
    assert native.loaded("cuda")


@needs_native
@pytest.mark.parametrize(
    ("op", "wrong", "said"),
    [
        ("rank", {"first": 0}, "null"),
        ("rank", {"lse": 0}, "null"),
        ("age", {"write": 0}, "null"),
        ("age", {"start": 0}, "null"),
        ("age", {"kv_heads": 3}, "multiple of kv_heads"),
        ("rank", {"rows": 3}, "multiple of rows"),
        ("rank", {"problems": 0}, "problems"),
        ("age", {"places": 0}, "places"),
        ("sort", {}, "no such operator"),
    ],
)
def test_the_module_checks_numbers_again(op, wrong, said):
    module, _ = native.load()
    assert module is not None
    names = ["logits", "lse", "slots", "out", "first", "last", "keep", "at", "wanted", "start"]
    names += ["used", "budget", "recent", "position", "scores", "positions", "write", "error"]
    sizes = {"problems": 4, "rows": 2, "heads": 4, "width": 8, "kv_heads": 2, "places": 5}
    right = dict.fromkeys(names, 64) | sizes | {"threads": 1, "device": 0}
    with pytest.raises(ValueError, match=said):
        module.PolicyPlan(op, False, "", right | wrong)
