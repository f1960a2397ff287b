"""Batches change no answer: rows of any size and order, every policy, files that resume."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import Failure
from engine.batch_file import run_batch
from engine.cache import pool as pool_file
from engine.cache.decode import Decoding
from engine.cache.pool import Pool
from engine.cache.report import allocated_bytes
from engine.engine import Engine
from engine.errors import OptionError
from engine.result import Result, Timings
from engine.session import make_pools, prefill
from tests.checkpoints import Shape
from tests.oracle import noise

SHAPE = Shape(kv_heads=2)
ROOT = Path(__file__).parents[1]
POLICIES = (
    "full",
    "avl:secondary=0.5,core=0.3,every=3,prefill=0.8,text=0.5,floor=4",
    "avl:core=none,text=1",
    "h2o",
    "fastv:layer=1",
    "streaming",
    "snapkv:window=4",
    "random",
)


def mixed_requests(count: int) -> list[dict[str, Any]]:
    """Requests of all kinds: no picture to two, short and long, greedy and drawn."""
    draw = random.Random(5)
    pictures = [noise(70, 50, seed=1), noise(40, 90, seed=2)]
    return [
        {
            "prompt": "What? " * draw.randint(1, 6) + str(number),
            "images": [draw.choice(pictures) for _ in range(draw.choice([0, 1, 1, 2]))],
            "max_new_tokens": draw.randint(1, 16),
            "temperature": draw.choice([0.0, 0.8]),
            "seed": number,
            "ignore_eos": True,
        }
        for number in range(count)
    ]


def outcome(result: Result) -> tuple[Any, ...]:
    cache = result.cache
    return result.token_ids, result.text, cache.bytes_used, cache.stored, round(cache.used_share, 9)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_answers_as_single_requests_do(
    engine_of: Callable[..., Engine], policy: str
) -> None:
    engine, requests = engine_of(SHAPE).with_cache(policy), mixed_requests(10)
    single = [outcome(engine.generate(**request)) for request in requests]
    for rows in (3, 10):
        order = list(range(10))
        random.Random(rows).shuffle(order)
        results = list(engine.generate_batch([requests[i] for i in order], rows))
        assert all(isinstance(result, Result) for result in results)
        together = {order[r.index]: outcome(r) for r in results if isinstance(r, Result)}
        assert together == dict(enumerate(single))


@pytest.mark.parametrize("policy", POLICIES)
@torch.inference_mode()
def test_forced_logits_do_not_depend_on_the_company(
    engine_of: Callable[..., Engine], policy: str
) -> None:
    """Rows of different lengths, forced along the same ids, against each row alone."""
    engine, forced = engine_of(SHAPE).with_cache(policy), [7, 30, 11, 4, 52, 9, 18]
    asked = [("Hi", []), ("What is this? " * 4, [noise(70, 50)]), ("So?", [noise(40, 90)] * 2)]
    alone = [engine.logits(prompt, images, forced) for prompt, images in asked]
    pools, rows = make_pools(engine.model), []
    for prompt, images in asked:
        turn = engine.turn(prompt, images, Timings())
        rows.append(prefill(engine.model, pools, engine.policy, turn, len(forced) + 1)[0])
    decoding, decoder = Decoding(pools, engine.policy, rows), engine.model.decoder
    for step, token in enumerate(forced[:-1]):
        hidden = decoder(decoder.embed(torch.tensor([token] * len(rows))), decoding)
        decoding.advance()
        together = decoder.logits(hidden)
        expected = torch.stack([logits[step + 1] for logits in alone])
        torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)


def test_results_come_as_soon_as_they_are_done(engine_of: Callable[..., Engine]) -> None:
    lengths = [12, 3, 7]
    requests = [{"prompt": "Hi", "max_new_tokens": n, "ignore_eos": True} for n in lengths]
    results = engine_of(SHAPE).generate_batch(requests, rows=3)
    assert [result.index for result in results] == [1, 2, 0]


def test_a_bad_request_fails_alone(engine_of: Callable[..., Engine]) -> None:
    good = {"prompt": "Hi", "max_new_tokens": 2}
    bad: list[Any] = [
        {"promt": "Hi"},
        "Hi",
        {"prompt": "Hi", "top_p": 7},
        {"prompt": "Hi", "max_new_tokens": "many"},
        {"prompt": "Hi", "images": ["/nowhere/cat.png"]},
        {"prompt": "Hi", "max_new_tokens": 100_000},
    ]
    results = list(engine_of(SHAPE).generate_batch([good, *bad, good], rows=2))
    failed = {result.index for result in results if isinstance(result, Failure)}
    assert failed == set(range(1, 7))
    assert {result.index for result in results} == set(range(8))
    with pytest.raises(OptionError, match="rows is 0"):
        list(engine_of(SHAPE).generate_batch([good], rows=0))


def test_rows_of_different_sizes_waste_no_memory(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(SHAPE).with_cache("avl")
    shared, alone = make_pools(engine.model), 0
    for request in mixed_requests(8):
        turn = engine.turn(request["prompt"], request["images"], Timings())
        prefill(engine.model, shared, engine.policy, turn, request["max_new_tokens"])
        own = make_pools(engine.model)
        prefill(engine.model, own, engine.policy, turn, request["max_new_tokens"])
        alone += allocated_bytes(own)
    assert allocated_bytes(shared) <= 1.05 * alone


def test_a_pool_that_cannot_grow_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out after the keys and before the values."""
    pool = Pool(2, 4, torch.float32, torch.device("cpu"))
    first = pool.take(6)
    pool.give(pool.take(3), 3)
    real, calls = pool_file._extended, itertools.count()

    def extended(*arguments: Any) -> torch.Tensor:
        if next(calls) == 1:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(pool_file, "_extended", extended)
    with pytest.raises(MemoryError):
        pool.take(10)
    assert len(pool.k) == len(pool.v) == pool.slots == 9
    assert pool.take(10) == first + 6  # into the hole, which grows
    assert len(pool.k) == len(pool.v) == 16


# -- pictures -------------------------------------------------------------------------------------


def test_a_picture_is_encoded_once(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, calls = engine_of(SHAPE), []
    original = engine.model.encode
    monkeypatch.setattr(engine.model, "encode", lambda p: calls.append(len(p)) or original(p))
    wide, tall = noise(150, 30, seed=9), noise(30, 150, seed=9)
    first = engine.logits("What?", [wide])
    assert torch.equal(engine.logits("What?", [wide]), first)
    assert torch.equal(engine.logits("What?", [engine.encode(wide)]), first)
    assert calls == [1]
    assert not torch.equal(engine.logits("What?", [tall]), first)
    engine.logits("What?", [wide, tall, noise(9, 9, seed=3), wide])
    assert calls == [1, 1, 1]


# -- files ----------------------------------------------------------------------------------------


def write_requests(path: Path, count: int) -> None:
    lines = [
        json.dumps({key: value for key, value in request.items() if key != "images"})
        for request in mixed_requests(count)
    ]
    lines[2] = "{broken"
    lines[4] = json.dumps({"prompt": "Hi", "images": ["nowhere.png"]})
    path.write_text("\n".join(lines) + "\n")


def test_a_killed_job_ends_with_the_same_file(
    engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    engine, requests = engine_of(SHAPE), tmp_path / "requests.jsonl"
    write_requests(requests, 12)
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    assert list(run_batch(engine, requests, whole, 4))[-1] == 12
    records = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(12))
    assert {i for i, record in enumerate(records) if "error" in record} == {2, 4}
    for cut in (0, 1, len(whole.read_bytes()) // 2, len(whole.read_bytes()) - 1):
        resumed.write_bytes(whole.read_bytes()[:cut])
        list(run_batch(engine, requests, resumed, 3))
        assert resumed.read_bytes() == whole.read_bytes()


def test_answers_of_another_job_are_not_overwritten(
    engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_requests(requests, 6)
    answers.write_text("something else\n")
    with pytest.raises(OptionError, match="another job"):
        list(run_batch(engine_of(SHAPE), requests, answers, 2))
    assert answers.read_text() == "something else\n"


# -- killed ---------------------------------------------------------------------------------------


def test_a_process_killed_again_and_again_loses_nothing(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGKILL at whatever moment; the same command goes on until the file is whole."""
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_requests(requests, 60)
    command = [sys.executable, "main.py", "--batch", str(requests), "--output", str(answers)]
    command += ["--model", str(checkpoint(SHAPE)), "--device", "cpu", "--rows", "3", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    held = [0]
    for goal in (3, 30):  # lines at which it is killed
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and lines_in(answers) < goal:
            time.sleep(0.002)
        process.kill()
        process.wait()
        held.append(lines_in(answers))
    assert held == sorted(held)
    assert 0 < held[1] < 60
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(60))
    whole = tmp_path / "whole.jsonl"
    list(run_batch(Engine.load(checkpoint(SHAPE), device="cpu"), requests, whole, 3))
    assert whole.read_bytes() == answers.read_bytes()


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
