"""Cache policies as text: what is written is what is meant, and everything else is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import OptionError
from engine.policies.avl import Avl
from engine.policies.fastv import FastV
from engine.policies.full import Full
from engine.policies.h2o import H2o
from engine.policies.random import Random
from engine.policies.snapkv import SnapKv
from engine.policies.specs import POLICIES, parse
from engine.policies.streaming import Streaming
from engine.policies.zipvl import ZipVl


def test_every_policy_is_known_by_its_name():
    assert {"full", "avl", "h2o", "fastv", "streaming", "snapkv", "random"} <= POLICIES.keys()
    assert all(type(parse(name)) is policy for name, policy in POLICIES.items())


def test_the_default_is_the_papers_row():
    assert parse("avl") == Avl(0.45, 0.30, 3, 0.90, 2, 0.70, 0.70, 20)


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("full", Full()),
        (
            "avl:secondary=0.45,core=0.30,every=3,prefill=0.9,text=0.7",
            Avl(secondary=0.45, core=0.30, every=3, prefill=0.9, text=0.7),
        ),
        ("avl:core=none", Avl(core=None)),
        ("avl:core=0,every=0", Avl(core=0.0, every=0)),
        ("h2o:heavy=0.1,recent=0.1", H2o(heavy=0.1, recent=0.1)),
        ("fastv:layer=3,drop=0.75", FastV(layer=3, drop=0.75)),
        ("streaming:sink=8,recent=0.2", Streaming(sink=8, recent=0.2)),
        ("snapkv:keep=0.3,window=32,kernel=7", SnapKv(keep=0.3, window=32, kernel=7)),
        ("random:keep=0.2,seed=5", Random(keep=0.2, seed=5)),
    ],
)
def test_a_spec_names_a_policy(spec, policy):
    assert parse(spec) == policy


def test_a_policy_object_passes_through():
    policy = Avl(core=None)
    assert parse(policy) is policy


def test_numbers_of_numpy_are_numbers():
    given = Avl(secondary=np.float32(0.5), core=np.float64(0.25), every=np.int64(2), text=1)
    assert given == Avl(secondary=0.5, core=0.25, every=2, text=1.0)
    assert parse(given.spec) == given
    assert Random(seed=np.uint8(7)) == Random(seed=7)
    for wrong in (True, "0.5", np.array([0.5, 0.5]), None, float("nan")):
        with pytest.raises(OptionError, match="secondary is"):
            Avl(secondary=wrong)


shares = st.floats(0, 1)


@st.composite
def avl(draw):
    low, middle, high = sorted(draw(st.tuples(shares, shares, shares)))
    core = draw(st.sampled_from([None, low]))
    counts = draw(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(0, 99)))
    return Avl(middle, core, counts[0], high, counts[1], draw(shares), draw(shares), counts[2])


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        avl(),
        st.builds(FastV, layer=st.integers(1, 50), drop=shares),
        st.builds(Streaming, sink=st.integers(0, 50), recent=shares),
        st.builds(SnapKv, keep=shares, window=st.integers(1, 64), kernel=st.sampled_from([1, 9])),
        st.builds(Random, keep=shares, seed=st.integers(0, 10**9)),
        st.builds(ZipVl, tau=shares, share=st.none() | shares, every=st.integers(0, 9)),
    )
)
def test_a_policy_survives_its_own_spec(policy):
    assert parse(policy.spec) == policy


def refusal(spec):
    with pytest.raises(OptionError) as caught:
        parse(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.hint


@pytest.mark.parametrize("name", ["", "avll", "FULL", "none", " avl", "avl "])
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    message, hint = refusal(name)
    assert repr(name) in message
    assert all(known in hint for known in POLICIES)


def test_a_near_miss_is_suggested():
    assert "did you mean 'h2o'" in refusal("h20")[1]
    assert "did you mean 'secondary'" in refusal("avl:secondry=0.4")[1]


@pytest.mark.parametrize(
    ("spec", "keys"),
    [
        ("avl:S=0.4", ["secondary", "core", "every", "prefill", "layer", "text", "heavy", "floor"]),
        ("h2o:heavi=0.1", ["heavy", "recent"]),
        ("fastv:rate=0.5", ["layer", "drop"]),
        ("streaming:window=3", ["sink", "recent"]),
        ("snapkv:cap=1", ["keep", "window", "kernel"]),
        ("random:share=1", ["keep", "seed"]),
        ("avl:secondary", ["secondary"]),
        ("avl:=0.4", ["secondary"]),
        ("avl:name=x", ["secondary"]),
    ],
)
def test_an_unknown_key_is_answered_with_the_known_ones(spec, keys):
    _, hint = refusal(spec)
    assert all(key in hint for key in keys)


def test_full_has_no_keys():
    assert "no keys" in refusal("full:keep=1")[1]


RANGES = [
    *(f"avl:{key}={value}" for key in ("secondary", "core", "prefill", "text", "heavy")
      for value in ("-0.1", "1.1", "nan", "inf", "-inf")),
    *(f"avl:{key}={value}" for key in ("every", "floor") for value in ("-1", "1.5", "x", "")),
    "avl:layer=0",
    "avl:secondary=0.3,core=0.4",
    "avl:secondary=0.9,prefill=0.5",
    "h2o:heavy=-1",
    "h2o:heavy=0.6,recent=0.6",
    "fastv:layer=0",
    "fastv:drop=2",
    "streaming:sink=-4",
    "streaming:recent=1.5",
    "snapkv:keep=-0.5",
    "snapkv:window=0",
    "snapkv:kernel=4",
    "snapkv:kernel=0",
    "zipvl:tau=1.1",
    "zipvl:share=-0.1",
    "zipvl:sparse=2",
    "zipvl:recent=0",
    "zipvl:format=k3v3",
    "zipvl:minor=plain",
    "random:keep=50",
    "random:seed=-1",
    "h2o:heavy=none",
    "avl:every=none",
]  # fmt: skip


@pytest.mark.parametrize("spec", RANGES)
def test_a_value_out_of_range_is_refused_by_name(spec):
    message, hint = refusal(spec)
    key = spec.split(":")[1].split("=")[0]
    assert key in message or "core" in message or "prefill" in message or "recent" in message
    assert hint


def test_a_key_given_twice_is_refused():
    assert "twice" in refusal("avl:core=0.2,core=0.3")[0]


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        (Avl, {"secondary": -0.1}),
        (Avl, {"core": True}),
        (H2o, {"recent": "0.5"}),
        (FastV, {"layer": 2.0}),
    ],
)
def test_the_classes_check_too(policy, values):
    with pytest.raises(OptionError):
        policy(**values)
