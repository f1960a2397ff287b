"""`weights/cross`: as small as promised, right, and what transformers computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bench.common import ROOT
from engine.engine import Engine
from tests.checkpoints import edit_json
from tests.test_mllama import MllamaOracle
from training.evaluate import questions_of
from training.page import Page, Question

FOLDER = ROOT / "weights" / "cross"
MOST_BYTES = 12_000_000


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(FOLDER, device="cpu", dtype="float32", cache="full")


def drawn(task: str, count: int) -> list[tuple[Page, Question]]:
    return list(questions_of(task, count, "test"))


def test_it_is_small() -> None:
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES + 60_000  # and the tokenizer
    assert (FOLDER / "model.safetensors").stat().st_size <= MOST_BYTES


@pytest.mark.parametrize("task", ["colour", "shape", "where"])
def test_it_answers_questions_about_drawn_scenes(task: str, engine: Engine) -> None:
    """A few of many: docs/quality.md has the figures."""
    requests = [
        {"prompt": question.text, "images": [page.image], "max_new_tokens": 24}
        for page, question in drawn(task, 12)
    ]
    done = {result.index: result for result in engine.generate_batch(requests, 6)}
    right = [
        done[number].text.strip() == question.answer
        for number, (_, question) in enumerate(drawn(task, 12))
    ]
    assert sum(right) >= 10


def test_transformers_computes_the_same(tmp_path: Path) -> None:
    """Under its own accounts of the two rules (see engine/models/mllama.py): as published files."""
    folder = Path(shutil.copytree(FOLDER, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"] | {"features_after_layer": True}
    words = config["text_config"] | {"blind_tokens_attend": True}
    edit_json(folder / "config.json", vision_config=vision, text_config=words)
    ours = Engine.load(folder, device="cpu", dtype="float32", cache="full")
    theirs = MllamaOracle(FOLDER)
    for page, question in drawn("field", 2):
        messages = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": question.text}],
            }
        ]
        given = theirs.inputs(messages, [page.image])
        assert given["input_ids"][0].tolist() == ours.render(messages, [page.image]).token_ids
        expected = theirs.logits(given)
        got = ours.logits(messages, [page.image])
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


def test_training_starts_and_goes_on(tmp_path: Path) -> None:
    """A step of every stage, and the exported folder loads."""
    from training.cross_losses import CrossTrainee
    from training.cross_model import CrossConfig
    from training.data import TRAINING_SEEDS, build_batch
    from training.evaluate import load_model
    from training.losses import total
    from training.train_cross import PLAN, TINY, begin_from

    teacher = load_model(TINY).requires_grad_(False)
    trainee = CrossTrainee(CrossConfig(), teacher)
    begin_from(trainee.model, teacher)
    tokenizer = PLAN[0].mix.form.tokenizer()
    for stage in PLAN[::2]:
        batch = build_batch([TRAINING_SEEDS, TRAINING_SEEDS + 1], stage.mix, tokenizer)
        loss = total(trainee(batch, stage.vision_only), stage.weights)
        loss.backward()
        assert loss.isfinite()
    assert all(p.grad is not None for p in trainee.model.parameters())
