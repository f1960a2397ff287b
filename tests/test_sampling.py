"""Sampling against its definition, written out with plain Python numbers."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import OptionError
from engine.options import Sampling
from engine.running.sampling import Sampler

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -1.5, 3.0]


def definition(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Sort, cut to k, softmax, cut to the fewest that reach p, scale to a sum of 1."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    heights = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in order}
    total = sum(heights.values())
    kept, reached = [], 0.0
    for i in order:
        kept.append(i)
        reached += heights[i] / total
        if reached >= top_p:
            break
    rest = sum(heights[i] for i in kept)
    return [heights[i] / rest if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_distribution_equals_the_definition(temperature: float, top_k: int, top_p: float) -> None:
    got = Sampler(Sampling(temperature, top_k, top_p)).probabilities(torch.tensor(LOGITS))
    expected = torch.tensor(definition(LOGITS, temperature, top_k, top_p))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-400, 400), min_size=1, max_size=30, unique=True),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 31),
    top_p=st.floats(0.05, 1.0),
)
def test_any_distribution_is_one(
    logits: list[int], temperature: float, top_k: int, top_p: float
) -> None:
    values = torch.tensor(logits) / 50
    got = Sampler(Sampling(temperature, top_k, top_p)).probabilities(values)
    assert float(got.sum()) == pytest.approx(1, abs=1e-5)
    assert got.min() >= 0
    if top_k:
        assert int((got > 0).sum()) <= top_k
    # Whatever is kept is likelier than whatever is not, and the likeliest is always kept.
    assert got[values.argmax()] > 0
    if (got == 0).any():
        assert values[got > 0].min() >= values[got == 0].max()


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(temperature=0.8, top_k=5, top_p=0.95, seed=3))
    counts = Counter(sampler.choose(torch.tensor(LOGITS)) for _ in range(6000))
    for token, share in enumerate(definition(LOGITS, 0.8, 5, 0.95)):
        # Five standard deviations of a binomial count.
        slack = 5 * math.sqrt(6000 * share * (1 - share))
        assert abs(counts[token] - 6000 * share) <= slack


def test_temperature_zero_is_the_likeliest_token_with_the_lowest_id() -> None:
    sampler = Sampler(Sampling(temperature=0, top_k=2, top_p=0.1))
    assert sampler.choose(torch.tensor([1.0, 5.0, 3.0, 5.0])) == 1


def test_tiny_temperature_and_extreme_logits_stay_finite() -> None:
    sampler = Sampler(Sampling(temperature=1e-4, top_p=0.9))
    assert sampler.choose(torch.tensor([-1e4, 1e4, 0.0])) == 1


def test_same_seed_draws_the_same_tokens() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.5, seed=seed))
        return [sampler.choose(torch.tensor(LOGITS)) for _ in range(50)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)


def test_samplers_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Sampler(Sampling(temperature=1.0)).choose(torch.tensor(LOGITS))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"^{name} is ") as caught:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert caught.value.hint
