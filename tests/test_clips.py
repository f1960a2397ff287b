"""Clips that are drawn for training: their answers, and the prompt in which they are learnt."""

from __future__ import annotations

import pytest
import torch

from engine.engine import Engine
from training.clips import FRAMES, TASKS, Clip, make_clip
from training.evaluate import load_model
from training.page import Question
from training.scene_questions import NUMBERS
from training.tokenizer import load
from training.tune_clips import PATCHES, TINY, Clips, batch_of, chosen

SEEDS = range(40)


def asked(clip: Clip, task: str) -> Question:
    (question,) = (each for each in clip.questions if each.task == task)
    return question


def colours_of(clip: Clip, kind: str) -> list[str]:
    return [thing.colour for page in clip.frames for thing in page.things if thing.kind == kind]


@pytest.mark.parametrize("seed", SEEDS)
def test_answers_are_what_the_frames_show(seed: int) -> None:
    clip = make_clip(seed)
    assert len(clip.frames) == FRAMES
    assert sorted(question.task for question in clip.questions) == sorted(TASKS)
    kind = asked(clip, "becomes").answer.split()[1]
    colours = colours_of(clip, kind)
    assert asked(clip, "becomes").answer == f"The {kind} becomes {colours[-1]}."
    assert asked(clip, "first").answer == f"The {kind} is {colours[0]} at first."
    changed = next(n for n, colour in enumerate(colours) if colour != colours[0])
    assert asked(clip, "when").answer == f"In picture {NUMBERS[changed + 1]}."
    word = asked(clip, "count").text.removesuffix("?").split()[-1]
    there = len(clip.frames[NUMBERS.index(word) - 1].things)
    assert NUMBERS[there] in asked(clip, "count").answer.split()
    first, second = (w.strip("?,") for w in asked(clip, "order").text.split()[4::3])
    seen = {k: FRAMES - len(colours_of(clip, k)) for k in (first, second)}
    assert asked(clip, "order").answer == f"The {min(seen, key=seen.__getitem__)}."


@pytest.mark.parametrize("seed", SEEDS)
def test_the_number_stands_in_one_frame(seed: int) -> None:
    clip = make_clip(seed)
    frame, (left, top, *_) = clip.label
    at = int(left) + 3, int(top) + 3
    paper = [page.image.getpixel(at) == (246, 246, 240) for page in clip.frames]
    assert paper == [number == frame for number in range(FRAMES)]


def test_a_seed_is_a_clip() -> None:
    first, again, other = make_clip(3), make_clip(3), make_clip(4)
    assert first.questions == again.questions != other.questions
    assert [a.tobytes() for a in first.images] == [a.tobytes() for a in again.images]


def test_what_is_shown_is_fed() -> None:
    import random

    clip = make_clip(5)
    frame, (left, top, right, bottom) = clip.label
    fed = chosen(clip, frame, 120, random.Random(0))
    assert len(fed) == 120 == len(set(fed))
    middle = int((top + bottom) / 2 // 14) * 24 + int((left + right) / 2 // 14)
    assert middle in fed


@torch.inference_mode()
def test_clips_are_learnt_in_the_prompt_that_the_engine_writes() -> None:
    """The same scores from the training form, with all patches, and from the engine."""
    tokenizer, clip = load(), make_clip(11)
    batch = batch_of(range(11, 12), PATCHES, tokenizer)
    scores = Clips(load_model(TINY), tokenizer).scores(batch)[0]
    engine = Engine.load(dtype="float32", cache="full")
    for number, question in enumerate(clip.questions[:2]):
        known = (batch["segment"][0] == number) & (batch["target"][0] != -100)
        answer = batch["target"][0][known]
        expected = engine.logits(question.text, clip.images, answer.tolist())
        found = scores[known][:, : expected.shape[1]]
        torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=0, atol=2e-3)
