"""Long use: memory stays flat, answers stay the same, interrupts at any moment do no harm."""

import gc
import itertools
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.policies.specs import POLICIES as NAMED
from engine.result import Result
from tests.checkpoints import Shape
from tests.noise import noise

SHAPE = Shape(kv_heads=2, layers=2, vision_layers=2)
POLICIES = tuple(name for name, policy in NAMED.items() if not policy().trims)
SIZES = ((9, 9), (70, 50), (30, 150), (1, 40), (200, 120))
PROMPTS = ("What is this?", "Read the text.", "a", "Describe the picture in the image here. " * 6)


@pytest.fixture
def engine(engine_of: Callable[..., Engine]) -> Iterator[Engine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield engine_of(SHAPE)
    torch.set_num_threads(threads)


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def ask(engine: Engine, number: int) -> Result:
    """One of many kinds of request; `number` alone decides which."""
    draw = random.Random(number)
    pictures = [noise(*draw.choice(SIZES), seed=number % 11) for _ in range(draw.randrange(4))]
    other = engine.with_cache(POLICIES[number % len(POLICIES)])
    options = {"max_new_tokens": draw.randint(1, 12), "temperature": draw.choice([0.0, 0.8])}
    prompt = draw.choice(PROMPTS)
    if number % 3 == 0:
        (result,) = other.generate_batch([{"prompt": prompt, "images": pictures, **options}])
        assert isinstance(result, Result)
        return result
    if number % 3 == 1:
        chat = other.chat()
        chat.send(prompt, pictures, **options)
        return chat.send("And then?", **options)
    return other.generate(prompt, pictures, **options)


def soak(engine: Engine, rounds: int, kinds: int = 42) -> None:
    """Asks `kinds` questions `rounds` times over; the first rounds warm the allocator up."""
    first: dict[int, list[int]] = {}
    sizes = []
    for _ in range(rounds):
        for number in range(kinds):
            ids = ask(engine, number).token_ids
            assert first.setdefault(number, ids) == ids
        gc.collect()
        sizes.append(resident())
    assert len({tuple(ids) for ids in first.values()}) > kinds // 3  # they are not all alike
    warm = sizes[len(sizes) // 3]
    assert sizes[-1] - warm < 8 << 20, [size >> 20 for size in sizes]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_short_soak(engine: Engine) -> None:
    soak(engine, rounds=3, kinds=21)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_long_soak(engine: Engine) -> None:
    soak(engine, rounds=15)  # 630 generations, a third of them of two turns


# -- interrupts -----------------------------------------------------------------------------------


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raises KeyboardInterrupt in the block after so long, as Ctrl-C does, whatever runs then."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()  # an exception in one of the test tools' is swallowed, and so reported
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.callbacks[:] = callbacks


def stream(engine: Engine) -> None:
    for _ in engine.stream("What?", [noise(70, 50)], max_new_tokens=25, ignore_eos=True):
        pass


def batch(engine: Engine) -> None:
    requests = [
        {"prompt": f"What {n}?", "images": [noise(40, 30, n)], "max_new_tokens": 8 + n}
        for n in range(4)
    ]
    for _ in engine.generate_batch(requests, rows=2):
        pass


def chat(engine: Engine) -> None:
    conversation = engine.chat()
    for n in range(3):
        conversation.send("What?", [noise(40, 30, n)], max_new_tokens=8, ignore_eos=True)


WAYS = (stream, batch, chat)


def seconds_of(way: Callable[[Engine], None], engine: Engine) -> float:
    """How long a way of asking takes here."""
    began = time.perf_counter()
    way(engine)
    return time.perf_counter() - began


def interrupt(engine: Engine, times: int, seed: int) -> None:
    """Interrupts each way of asking at random moments; answers after it are those before it."""
    draw, count = random.Random(seed), 0
    expected = [ask(engine, number).token_ids for number in range(len(POLICIES))]
    lasts = {way: seconds_of(way, engine) for way in WAYS}
    for attempt, way in zip(range(times), itertools.cycle(WAYS), strict=False):
        policy = POLICIES[attempt % len(POLICIES)]
        try:
            with interrupted_after(max(0.001, draw.uniform(0, 1.2) * lasts[way])):
                way(engine.with_cache(policy))
        except KeyboardInterrupt:
            count += 1
        number = attempt % len(POLICIES)
        assert ask(engine, number).token_ids == expected[number]
    assert count > times // 4, f"only {count} of {times} came before the end"


def test_interrupts_leave_the_engine_usable(engine: Engine) -> None:
    interrupt(engine, times=30, seed=1)


@pytest.mark.slow
def test_many_interrupts_leave_the_engine_usable(engine: Engine) -> None:
    interrupt(engine, times=500, seed=2)


def test_interrupted_chat_goes_on(engine: Engine) -> None:
    """What was said before the interrupt stays in the conversation, whenever it comes."""
    draw = random.Random(3)
    for policy in ("full", "avl", "h2o"):
        conversation = engine.with_cache(policy).chat()
        for turn in range(6):
            before = list(conversation.token_ids)
            pictures = [noise(40, 30, turn)] if turn % 2 else []
            try:
                with interrupted_after(draw.uniform(0.001, 0.06)):
                    conversation.send("What?", pictures, max_new_tokens=12, ignore_eos=True)
            except KeyboardInterrupt:
                assert conversation.token_ids[: len(before)] == before
        result = conversation.send("And now?", max_new_tokens=4, ignore_eos=True)
        assert len(result.token_ids) == 4
        assert conversation.token_ids[-4:] == result.token_ids


def test_random_answers_are_repeated_by_their_seed(engine: Engine) -> None:
    """The soak compares drawn answers too: a seed must decide them, not what came before."""
    one = engine.generate("What?", temperature=1.0, seed=5, max_new_tokens=12, ignore_eos=True)
    two = engine.generate("What?", temperature=1.0, seed=5, max_new_tokens=12, ignore_eos=True)
    other = engine.generate("What?", temperature=1.0, seed=6, max_new_tokens=12, ignore_eos=True)
    assert one.token_ids == two.token_ids != other.token_ids
