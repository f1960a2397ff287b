"""The embedded model: golden answers, the tokens of transformers, and that it can look."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.hub import TINY
from engine.engine import Engine
from engine.policies.specs import DEFAULT_CACHE
from training.evaluate import questions_of
from training.scenes import make_scene

EXAMPLES = Path(__file__).parent.parent / "examples"
GOLDEN = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
ASKED = [(item["file"], each) for item in GOLDEN for each in item["questions"]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(device="cpu", dtype="float32", cache="full")


@pytest.mark.parametrize(("file", "item"), ASKED, ids=lambda x: x if isinstance(x, str) else "")
def test_golden_answers(engine: Engine, file: str, item: dict[str, str]) -> None:
    result = engine.generate(item["question"], images=[EXAMPLES / file])
    assert result.text.encode() == item["answer"].encode()
    assert result.finish_reason == "stop"
    assert result.image_tokens == 576


@pytest.mark.parametrize(
    ("cache", "stored", "core"), [(DEFAULT_CACHE, 576, 576), ("avl", 259, 172)]
)
def test_the_demo_answers_right_under_approximations(
    engine: Engine, cache: str, stored: int, core: int
) -> None:
    approximate = engine.with_cache(cache)
    result = approximate.generate("What colour is the car?", images=[EXAMPLES / "car.jpg"])
    assert result.text == "The car is red."
    assert result.cache.stored.mean == stored
    assert result.cache.core.mean == core


def test_transformers_generates_the_same_tokens(engine: Engine) -> None:
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlavaForConditionalGeneration.from_pretrained(
            TINY, dtype=torch.float32
        ).eval()
        processor = transformers.AutoProcessor.from_pretrained(TINY, use_fast=False)
        for seed in range(400_000, 400_010):
            page = make_scene(seed)
            question = page.questions[seed % len(page.questions)].text
            ours = engine.generate(question, images=[page.image], max_new_tokens=24)
            prompt = f"USER: <image>\n{question} ASSISTANT:"
            inputs: Any = processor(images=page.image, text=prompt, return_tensors="pt")
            theirs = model.generate(**inputs, max_new_tokens=24, do_sample=False)
            answer = theirs[0, inputs["input_ids"].shape[1] :].tolist()
            end = answer.index(2) if 2 in answer else len(answer)
            assert ours.token_ids == answer[:end], question
            assert ours.prompt_tokens == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("task", ["colour", "shape", "where"])
def test_it_has_learnt_to_look(engine: Engine, task: str) -> None:
    """A spot check on held-out scenes; the figures for 500 are in training/README.md."""
    items = list(questions_of(task, 8, "test"))
    answers = [engine.generate(q.text, images=[p.image], max_new_tokens=24).text for p, q in items]
    right = sum(a == question.answer for a, (_, question) in zip(answers, items, strict=True))
    assert right >= 7
