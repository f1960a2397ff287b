"""Log-probabilities, repetition penalty, cancelling, and what may happen in several threads."""

import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.app.batch_file import BatchRun
from engine.app.job import Job
from engine.checkpoint.tensors import read_json
from engine.engine import Engine
from engine.errors import EngineError, OptionError
from engine.options import Sampling
from engine.result import Result
from engine.running.sampling import Sampler
from tests.checkpoints import Shape
from tests.noise import noise

SHAPE = Shape(kv_heads=2)


def test_logprobs_are_those_of_the_model(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(SHAPE)
    result = engine.generate(
        "What?", [noise(70, 50)], max_new_tokens=8, temperature=0.7, seed=3, logprobs=True
    )
    rows = engine.logits("What?", [noise(70, 50)], result.token_ids).log_softmax(-1)
    expected = rows[torch.arange(len(rows)), torch.tensor(result.token_ids)]
    torch.testing.assert_close(torch.tensor(result.logprobs), expected, rtol=0, atol=1e-4)
    assert engine.generate("What?", max_new_tokens=2).logprobs is None


def test_repetition_penalty_is_the_published_rule() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0, -1.1])
    sampler = Sampler(Sampling(repetition_penalty=2.0), prompt_ids=[0, 2, 99])
    assert sampler.choose(logits) == 1  # 2.0 / 2 < 1.9
    assert sampler.choose(logits) == 0  # now 1.9 / 2 < 2.0 / 2
    only_negative = torch.tensor([-9.0, -9.0, -1.0, -1.1])
    assert sampler.choose(only_negative) == 3  # -1.0 * 2 < -1.1
    with pytest.raises(OptionError, match="repetition_penalty"):
        Sampling(repetition_penalty=0.0)


def test_repetition_penalty_agrees_with_transformers(
    engine_of: Callable[..., Engine], checkpoint: Callable[..., Path]
) -> None:
    transformers = pytest.importorskip("transformers")
    engine = engine_of(SHAPE)
    ours = engine.generate("What?", max_new_tokens=12, repetition_penalty=1.7, ignore_eos=True)
    folder = checkpoint(SHAPE, "hub")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([engine.render("What?").token_ids])
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.7)
    assert theirs[0, ids.shape[1] :].tolist() == ours.token_ids
    assert read_json(folder / "config.json")["model_type"] == "llava"


def test_an_answer_can_be_cancelled_from_another_thread(engine_of: Callable[..., Engine]) -> None:
    engine, cancel = engine_of(SHAPE), threading.Event()
    pieces = engine.stream("What?", max_new_tokens=400, ignore_eos=True, cancel=cancel)
    for seen, piece in enumerate(pieces):
        if seen == 2:
            threading.Thread(target=cancel.set).start()
            cancel.wait()
        if isinstance(piece, Result):
            result = piece
    assert result.finish_reason == "cancelled"
    assert len(result.token_ids) < 50
    whole = engine.generate("What?", max_new_tokens=400, ignore_eos=True)
    assert whole.token_ids[: len(result.token_ids)] == result.token_ids


@pytest.mark.parametrize("policy", ["full", "avl:text=0.5,floor=4"])
def test_one_engine_answers_in_several_threads(
    engine_of: Callable[..., Engine], policy: str
) -> None:
    """An engine holds no state of a request; a chat or a stream belongs to one thread."""
    engine = engine_of(SHAPE).with_cache(policy)
    pictures = [noise(70, 50, seed=seed) for seed in range(3)]

    def ask(number: int) -> list[int]:
        image = pictures[number % 3]
        return engine.generate(f"What? {number}", [image], max_new_tokens=12).token_ids

    alone = [ask(number) for number in range(12)]
    engine.forget_pictures()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(12))) == alone


def test_200_mixed_requests_of_which_10_are_broken(
    engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    """190 answers identical to single runs, 10 error records, memory that does not grow."""
    engine, draw = engine_of(SHAPE).with_cache("avl:text=0.6,floor=6"), random.Random(11)
    for number in range(4):
        noise(30 + 40 * number, 60, seed=number).save(tmp_path / f"{number}.png")
    requests = [
        {
            "prompt": "What? " * draw.randint(1, 5) + str(number),
            "images": [str(tmp_path / f"{draw.randrange(4)}.png")] * draw.choice([0, 1, 1, 2]),
            "max_new_tokens": draw.randint(1, 10),
            "temperature": draw.choice([0.0, 0.9]),
            "seed": number,
        }
        for number in range(200)
    ]
    for broken in range(5, 200, 20):
        requests[broken]["images"] = [str(tmp_path / "missing.png")]
    source, target = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in requests))
    list(BatchRun(engine, Job.read(source), 8).into(target))
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(200))
    assert sum("error" in record for record in records) == 10
    for request, record in zip(requests, records, strict=True):
        if "error" in record:
            with pytest.raises(EngineError):
                engine.generate(**request)
        else:
            assert engine.generate(**request).token_ids == record["token_ids"]


# -- values of the wrong kind ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("name is 5", {"name": 5}),
        ("cache is 5", {"cache": 5}),
        ("cache is None", {"cache": None}),
        ("device is object", {"device": object()}),
        ("dtype is torch.float16", {"dtype": torch.float16}),
        ("style is 5", {"style": 5}),
        ("revision is 5", {"revision": 5}),
        ("vision_tower is 5", {"vision_tower": 5}),
        ("selection is None", {"selection": None}),
        ("offline is 'no'", {"offline": "no"}),
        ("graphs is 1", {"graphs": 1}),
        ("threads is 'all'", {"threads": "all"}),
    ],
)
def test_what_load_is_given_is_refused_by_name(words: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        Engine.load(**options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("words", "ask"),
    [
        ("cache is 5", lambda engine: engine.with_cache(5)),
        ("cache is object", lambda engine: engine.with_cache(object())),
        ("no option colour", lambda engine: engine.generate("Hi", colour=3)),
        ("no option colour", lambda engine: engine.chat().send("Hi", colour=3)),
        ("raw is 1", lambda engine: engine.generate("Hi", raw=1)),
        ("raw is 'yes'", lambda engine: engine.render("Hi", raw="yes")),
        ("raw is None", lambda engine: engine.logits("Hi", raw=None)),
        ("raw is of a prompt", lambda engine: engine.generate([{"role": "user"}], raw=True)),
        ("seed is object", lambda engine: engine.generate("Hi", seed=object())),
        ("stop is object", lambda engine: engine.generate("Hi", stop=object())),
        ("cancel is object", lambda engine: engine.generate("Hi", cancel=object())),
        ("seed is beyond", lambda engine: engine.generate("Hi", seed=10**5000)),
        ("requests are None", lambda engine: list(engine.generate_batch(None))),
        ("requests are 5", lambda engine: list(engine.generate_batch(5))),
        ("requests are 'Hi'", lambda engine: list(engine.generate_batch("Hi"))),
        ("rows is 'a'", lambda engine: list(engine.generate_batch([], rows="a"))),
        ("rows is 0", lambda engine: list(engine.generate_batch([], rows=0))),
        ("layer is 99", lambda engine: engine.with_cache("fastv:layer=99")),
        ("layer is 99", lambda engine: engine.with_cache("avl:layer=99")),
    ],
)
def test_what_an_engine_is_given_is_refused_by_name(
    words: str, ask: Callable[[Any], Any], engine_of: Callable[..., Engine]
) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        ask(engine_of(SHAPE))
    assert caught.value.hint
    assert "object at 0x" not in str(caught.value)


def test_a_layer_that_changes_nothing_is_not_asked_for(engine_of: Callable[..., Engine]) -> None:
    """The default avl drops nothing in prefill, on a model of one layer too."""
    engine = engine_of(Shape(layers=1))
    assert engine.with_cache("avl:prefill=1,layer=9").generate("Hi", max_new_tokens=1).token_ids


def test_numbers_of_numpy_are_numbers(engine_of: Callable[..., Engine]) -> None:
    numpy = pytest.importorskip("numpy")
    engine = engine_of(SHAPE)
    plain: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.5, "top_k": 9, "seed": 3}
    kinds = {int: numpy.int64, float: numpy.float32}
    theirs = {name: kinds[type(value)](value) for name, value in plain.items()}
    expected = engine.generate("What?", **plain).token_ids
    assert engine.generate("What?", **theirs).token_ids == expected
    with pytest.raises(OptionError, match="seed"):
        engine.generate("What?", seed=numpy.float32(3))


def test_a_chat_answers_one_at_a_time(engine_of: Callable[..., Engine]) -> None:
    chat = engine_of(SHAPE).chat()
    pieces = chat.stream("What?", max_new_tokens=20, ignore_eos=True)
    next(pieces)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(chat.send, "Hi") for _ in range(3)]
    for other in others:
        with pytest.raises(OptionError, match="this chat is busy"):
            other.result()
    *_, result = pieces
    alone = engine_of(SHAPE).chat().send("What?", max_new_tokens=20, ignore_eos=True)
    assert isinstance(result, Result)
    assert result.token_ids == alone.token_ids
    assert chat.send("Hi", max_new_tokens=2).token_ids  # and is free again
