"""Batches change no answer: rows of any size and order, every policy, files that resume."""

import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.app.batch_file import BatchRun
from engine.app.cli import main
from engine.app.job import Job
from engine.cache import pool as pool_file
from engine.cache.decode import Decoding
from engine.cache.pool import Pool
from engine.cache.report import allocated_bytes
from engine.engine import Engine
from engine.errors import OptionError
from engine.result import Result, Timings
from engine.running.batch import Failure
from engine.running.generation import Answer
from engine.running.turn import make_pools, prefill
from tests.checkpoints import Shape
from tests.noise import noise

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
    "zipvl:tau=0.8,every=4",
    "zipvl:tau=0.8,every=4,format=plain,minor=freed",
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
    decoding, decoder = Decoding(pools, rows), engine.model.decoder
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


def test_rows_of_different_sizes_waste_little_memory(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(SHAPE).with_cache("avl")
    shared, alone = make_pools(engine.model), 0
    for request in mixed_requests(8):
        turn = engine.turn(request["prompt"], request["images"], Timings())
        prefill(engine.model, shared, engine.policy, turn, request["max_new_tokens"])
        own = make_pools(engine.model)
        prefill(engine.model, own, engine.policy, turn, request["max_new_tokens"])
        alone += allocated_bytes(own)
    assert allocated_bytes(shared) <= 1.5 * alone  # a pool grows by half at least


def test_a_pool_that_cannot_grow_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out after the keys and before the values."""
    pool = Pool(2, 4, torch.float32, torch.device("cpu"))
    first = pool.take(6)
    pool.take(3).give()
    real, calls = pool_file.extended, itertools.count()

    def extended(*arguments: Any) -> torch.Tensor:
        if next(calls) == 1:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(pool_file, "extended", extended)
    with pytest.raises(MemoryError):
        pool.take(10)
    assert len(pool.k) == len(pool.v) == pool.slots == 9
    assert pool.take(10).start == first.start + 6  # into the hole, which grows
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
    assert list(BatchRun(engine, Job.read(requests), 4).into(whole))[-1] == 12
    records = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(12))
    assert {i for i, record in enumerate(records) if "error" in record} == {2, 4}
    size = len(whole.read_bytes())
    for cut in (0, 1, 12, size // 2, size - 2, size - 1, size):
        resumed.write_bytes(whole.read_bytes()[:cut])
        list(BatchRun(engine, Job.read(requests), 3).into(resumed))
        assert resumed.read_bytes() == whole.read_bytes()


def test_answers_of_another_job_are_not_overwritten(
    engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_requests(requests, 6)
    begun = '{"index": 0, '  # as our lines begin, and those of many others
    for text in (
        "something else\n",
        "something else",
        '{"index": 1, "from": {',
        "[1]",
        "\n",
        begun + '"text": "mine',
        begun + '"text": "mine"}',
        begun + '"error": "mine"}\n',
        begun + '"from": {"request": "0123456789abcdef"',
        begun + '"from": "a friend"',
    ):
        answers.write_text(text)
        with pytest.raises(OptionError, match=r"another job|no answer|made from"):
            list(BatchRun(engine_of(SHAPE), Job.read(requests), 2).into(answers))
        assert answers.read_text() == text


def asked(*values: Any) -> Job:
    return Job("".join(json.dumps(value) + "\n" for value in values), ROOT)


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_answers_to_other_requests_models_and_caches_are_refused(
    stopped_after: int, engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    engine, answers = engine_of(SHAPE), tmp_path / "answers.jsonl"
    values = [{"prompt": f"Hi {number}", "max_new_tokens": 2} for number in range(3)]
    run = BatchRun(engine, asked(*values), 1).into(answers)
    while next(run) < stopped_after:
        pass
    run.close()  # type: ignore[attr-defined]
    before = answers.read_bytes()
    others = {
        "request": (engine, asked({**values[0], "max_new_tokens": 3}, *values[1:])),
        "cache": (engine.with_cache("h2o"), asked(*values)),
        "model": (engine_of(Shape(kv_heads=2, layers=2)), asked(*values)),
    }
    for what, (other, job) in others.items():
        with pytest.raises(OptionError, match=f"line 1 was made from another {what}"):
            list(BatchRun(other, job, 2).into(answers))
        assert answers.read_bytes() == before
    same = asked(*[dict(reversed(value.items())) for value in values])  # spelled in another order
    assert list(BatchRun(engine, same, 2).into(answers))[-1] == 3
    assert answers.read_bytes().startswith(before)


def test_what_failed_is_tried_again(engine_of: Callable[..., Engine], tmp_path: Path) -> None:
    """In its place, once what it lacked is there or the request is mended."""
    engine, answers = engine_of(SHAPE), tmp_path / "answers.jsonl"
    values: list[Any] = [{"prompt": "Hi", "max_new_tokens": 2} for _ in range(4)]
    values[1] |= {"images": ["late.png"]}
    values[2] |= {"top_p": 7}
    text = "".join(json.dumps(value) + "\n" for value in values)
    first = BatchRun(engine, Job(text, tmp_path), 2)
    assert list(first.into(answers))[-1] == 4
    assert sorted(failure.index for failure in first.failures) == [1, 2]
    good = answers.read_bytes().splitlines()
    noise(30, 20).save(tmp_path / "late.png")
    second = BatchRun(engine, Job(text.replace('"top_p": 7', '"top_p": 0.7'), tmp_path), 2)
    assert list(second.into(answers)) == [2, 3, 4]
    assert not second.failures
    lines = answers.read_bytes().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3]
    assert not any(b'"error"' in line for line in lines)
    assert [lines[0], lines[3]] == [good[0], good[3]]


def test_two_processes_do_not_share_a_file(
    engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    engine, answers = engine_of(SHAPE), tmp_path / "answers.jsonl"
    job = asked(*[{"prompt": f"Hi {number}", "max_new_tokens": 2} for number in range(4)])
    first = BatchRun(engine, job, 1).into(answers)
    while next(first) < 2:
        pass
    with pytest.raises(OptionError, match="another process writes to"):
        list(BatchRun(engine, job, 1).into(answers))
    assert list(first)[-1] == 4
    assert lines_in(answers) == 4


@pytest.mark.parametrize("moment", ["prompt", "first token", "later token", "text"])
def test_whatever_goes_wrong_in_a_row_is_that_rows_failure(
    moment: str, engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(SHAPE)
    good = {"prompt": "Hi", "max_new_tokens": 4, "ignore_eos": True}
    expected = engine.generate(**good).token_ids
    place, name = {"prompt": (Engine, "turn")}.get(moment, (Answer, "choose"))
    place, name = (Answer, "take") if moment == "text" else (place, name)
    real, calls = getattr(place, name), itertools.count()
    broken = {"prompt": 1, "first token": 1, "later token": 4, "text": 4}[moment]

    def breaking(*arguments: Any, **options: Any) -> Any:
        if next(calls) == broken:
            raise ZeroDivisionError("what nobody expected")
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, breaking)
    results = sorted(engine.generate_batch([good] * 3, rows=3), key=lambda result: result.index)
    failed = [result for result in results if isinstance(result, Failure)]
    assert [failure.index for failure in failed] == [1]
    assert str(failed[0].error) == "unexpected ZeroDivisionError: what nobody expected"
    assert [r.token_ids for r in results if isinstance(r, Result)] == [expected] * 2


EXTREME: list[dict[str, Any]] = [
    {"top_p": 1e-300},
    {"temperature": 1e-300},
    {"temperature": 1e300},
    {"repetition_penalty": 1e-320},
    {"repetition_penalty": 1e300},
    {"top_k": 10**30},
    {"seed": 2**63 - 1},
]


@pytest.mark.parametrize("options", EXTREME)
def test_extreme_numbers_are_answered(
    options: dict[str, Any], engine_of: Callable[..., Engine]
) -> None:
    request = {"prompt": "Hi", "max_new_tokens": 3, "temperature": 1.0, **options}
    (result,) = engine_of(SHAPE).generate_batch([request])
    assert isinstance(result, Result), result


WRONG: list[dict[str, Any]] = [
    {"raw": "false"},
    {"raw": 1},
    {"raw": True, "prompt": [{"role": "user", "content": "Hi"}]},
    {"ignore_eos": "no"},
    {"logprobs": 0},
    {"cancel": True},
    {"cancel": None},
    {"observer": None},
    {"stop": 5},
    {"stop": [5]},
    {"seed": 1.0},
    {"temperature": float("nan")},
    {"temperature": "1"},
    {"max_new_tokens": True},
    {"images": {"a": 1}},
    {"images": [5]},
    {"images": ["-"]},
    {"images": [""]},
    {"system": 5},
    {"system": "Be brief.", "raw": True},
]
# A line's own fault, which is no other line's: bytes that are no text, two values of one key.
LINES = [b'{"prompt": "caf\xe9"}', b'{"prompt": "Hi", "prompt": "Ho"}', b"{", b"[1]", b'"Hi"']
WORDS = ["not UTF-8", "gives prompt twice", "no JSON object", "no JSON object", "no JSON object"]
LINES.append(b'{"prompt": "Hi", "seed": ' + b"9" * 5000 + b"}")
WORDS.append("a number of 5,000 digits")


def test_a_line_that_is_no_request_fails_alone(
    engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    source, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    good = json.dumps({"prompt": "Hi", "max_new_tokens": 1}).encode()
    source.write_bytes(b"\n".join([good, *LINES, good]))
    run = BatchRun(engine_of(SHAPE), Job.read(source), 2)
    list(run.into(answers))
    assert [failure.index for failure in run.failures] == [1, 2, 3, 4, 5, 6]
    for failure, words in zip(run.failures, WORDS, strict=True):
        assert words in str(failure.error)
    assert lines_in(answers) == 8
    list(run.into(answers))  # the same again: they fail again, in their places
    assert lines_in(answers) == 8


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_values_in_a_job_are_refused_by_name(
    wrong: dict[str, Any], engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    job = asked({"prompt": "Hi", "max_new_tokens": 1}, {"prompt": "Hi", **wrong})
    run = BatchRun(engine_of(SHAPE), job, 2)
    list(run.into(tmp_path / "answers.jsonl"))
    (failure,) = run.failures
    assert failure.index == 1
    assert failure.error.exit_code == 2
    key = next(iter(wrong))
    assert key in str(failure.error) or (key == "images" and "picture" in str(failure.error))


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture
def small(checkpoint: Callable[..., Path], tmp_path: Path) -> list[str]:
    """A command on a job of two requests, in a folder of its own with its picture."""
    folder = tmp_path / "job"
    folder.mkdir()
    noise(70, 50).save(folder / "a.png")
    lines = [{"images": ["a.png"]}, {"prompt": "Own", "max_new_tokens": 2, "seed": 1}]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = ["--model", str(checkpoint(SHAPE)), "--device", "cpu", "--quiet"]
    return ["--batch", str(folder / "jobs.jsonl"), *model]


def test_flags_stand_for_what_requests_lack(
    small: list[str], engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    flags = ["-n", "7", "--temperature", "0.9", "--top-k", "50", "--top-p", "0.99", "--seed", "3"]
    flags += ["--repetition-penalty", "1.1", "--stop", "q", "--logprobs", "--cache", "h2o"]
    flags += ["--system", "Be brief.", "--prompt", "What?", "--image", str(tmp_path / "b.png")]
    noise(40, 90).save(tmp_path / "b.png")
    assert main([*small, *flags]) == 0
    lines = (tmp_path / "job" / "jobs.answers.jsonl").read_text().splitlines()
    engine = engine_of(SHAPE).with_cache("h2o")
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 50, "top_p": 0.99, "stop": ["q"]}
    options |= {"repetition_penalty": 1.1, "logprobs": True, "seed": 3, "max_new_tokens": 7}
    asked = [("What?", noise(70, 50), options)]
    asked += [("Own", noise(40, 90), options | {"max_new_tokens": 2, "seed": 1})]
    for line, (text, picture, given) in zip(lines, asked, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": content},
        ]
        expected, found = engine.generate(messages, [picture], **given), json.loads(line)
        assert found["token_ids"] == expected.token_ids
        assert found["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)


def test_requests_and_answers_may_be_streams(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*small, "-p", "What?", "-n", "3"]) == 0
    expected = (tmp_path / "job" / "jobs.answers.jsonl").read_text()
    capsys.readouterr()
    requests = (tmp_path / "job" / "jobs.jsonl").read_bytes()
    monkeypatch.chdir(tmp_path / "job")
    for output in ([], ["--output", "-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(requests)))
        assert main(["--batch", "-", *small[2:], "-p", "What?", "-n", "3", *output]) == 0
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize("place", ["pipe", "/dev/stdin", "/dev/null"])
def test_what_is_no_file_is_refused_and_never_waited_for(
    place: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    name = place if place.startswith("/") else str(tmp_path / place)
    for arguments in (["--batch", name, *small[2:]], [*small, "--output", name]):
        assert main([*arguments, "-p", "What?"]) == 2
        error, hint = capsys.readouterr().err.splitlines()
        assert "not a regular file" in error
        assert hint.startswith("hint: ")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_job_without_requests_is_refused(
    text: str, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(small[1]).write_text(text)
    assert main(small) == 2
    assert "holds no requests" in capsys.readouterr().err


def test_a_failed_request_decides_the_exit_code(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "job" / "a.png"
    picture.rename(tmp_path / "b.png")
    assert main([*small, "-p", "What?", "-n", "2"]) == 3
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: 1 of 2 requests failed, the first at index 0: ")
    assert "tries again" in hint
    (tmp_path / "b.png").rename(picture)
    assert main([*small, "-p", "What?", "-n", "2"]) == 0


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
    assert done.returncode == 2, done.stderr  # that of the first request that failed
    assert done.stderr.startswith(b"error: 2 of 60 requests failed, the first at index 2: ")
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(60))
    whole = tmp_path / "whole.jsonl"
    list(BatchRun(Engine.load(checkpoint(SHAPE), device="cpu"), Job.read(requests), 3).into(whole))
    assert whole.read_bytes() == answers.read_bytes()


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_answers_go_on_in_a_folder_that_was_renamed_meanwhile(
    engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    engine, requests, folder = engine_of(SHAPE), tmp_path / "requests.jsonl", tmp_path / "here"
    write_requests(requests, 12)
    folder.mkdir()
    whole = tmp_path / "whole.jsonl"
    list(BatchRun(engine, Job.read(requests), 4).into(whole))
    run = BatchRun(engine, Job.read(requests), 4).into(folder / "answers.jsonl")
    while next(run) < 5:
        pass
    folder.rename(tmp_path / "there")
    with pytest.raises(OptionError, match=r"folder of .* was renamed while") as caught:
        list(run)
    assert "with its new name" in caught.value.hint
    moved = tmp_path / "there" / "answers.jsonl"
    assert whole.read_bytes().startswith(moved.read_bytes())
    list(BatchRun(engine, Job.read(requests), 3).into(moved))
    assert moved.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("what", ["removed", "folder removed", "replaced", "added to"])
def test_answers_survive_what_becomes_of_their_file_meanwhile(
    engine_of: Callable[..., Engine], tmp_path: Path, what: str
) -> None:
    """It is an error, nobody's file is touched, and what there is of the answers goes on."""
    engine, requests = engine_of(SHAPE), tmp_path / "requests.jsonl"
    write_requests(requests, 12)
    whole, answers = tmp_path / "whole.jsonl", tmp_path / "a" / "b" / "answers.jsonl"
    answers.parent.mkdir(parents=True)
    list(BatchRun(engine, Job.read(requests), 4).into(whole))
    run = BatchRun(engine, Job.read(requests), 4).into(answers)
    while next(run) < 5:
        pass
    if what == "removed":
        answers.unlink()
    elif what == "folder removed":
        shutil.rmtree(tmp_path / "a")
    elif what == "replaced":
        (tmp_path / "mine").write_text("mine\n")
        (tmp_path / "mine").replace(answers)
    else:
        with answers.open("a") as file:
            file.write("mine\n")
    said = "writes to" if what == "added to" else "removed or replaced"
    with pytest.raises(OptionError, match=said) as caught:
        list(run)
    if what == "added to":
        return
    if what == "replaced":
        assert answers.read_text() == "mine\n"
        [answers] = answers.parent.glob("answers.*.jsonl")
    assert str(answers) in caught.value.hint
    assert whole.read_bytes().startswith(answers.read_bytes())
    assert answers.read_bytes().count(b"\n") >= 6
    list(BatchRun(engine, Job.read(requests), 3).into(answers))
    assert answers.read_bytes() == whole.read_bytes()
