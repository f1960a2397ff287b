"""One picture, many questions: what the server reads once, and what nobody shares."""

from __future__ import annotations

import base64
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.engine import Engine
from tests.mllama_checkpoint import write_mllama
from tests.qwen_patches_checkpoint import write_qwen_patches

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")  # which comes with openai
openai = pytest.importorskip("openai")

from tests.served import KEY, SHAPE, asked, data_url, post, serving, settled  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def engine(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(SHAPE)


def ask_about(server: Any, text: str, spec: str, seed: int = 3, **options: Any) -> Any:
    body = {"messages": asked(text, data_url(seed)), "max_tokens": 8, "ignore_eos": True}
    answer = post(server, body | {"cache": spec}, **options).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]


@pytest.mark.parametrize("spec", ["full", "sift:format=k16v16,skip=0"])
def test_questions_about_one_picture_read_it_once(engine: Engine, spec: str) -> None:
    """In 16 bits or more each answer is the plain one's; the second prefill is the question's."""
    with serving(engine) as server:
        for number, text in enumerate(("What is it?", "And what else is there?", "Why?")):
            said, usage = ask_about(server, text, spec)
            alone = engine.with_cache(spec).generate(
                text, [data_url(3)], max_new_tokens=8, ignore_eos=True
            )
            assert said == alone.text
            assert usage["prompt_tokens"] == alone.prompt_tokens
            details = usage["prompt_tokens_details"]
            assert details["image_tokens"] == alone.image_tokens
            cached = details["cached_tokens"]
            # What the first question had to read itself was nowhere before.
            assert cached > alone.image_tokens if number else cached == 0
            assert server.worker.now()["prefix_misses"] == 1
            assert server.worker.now()["prefix_hits"] == number


def test_questions_about_a_picture_of_rows_and_columns_share_its_coordinates(
    tmp_path: Path,
) -> None:
    """The stored beginning's rotary state goes on with the question."""
    folder = write_qwen_patches(tmp_path / "m", "qwen3_vl")
    engine = Engine.load(folder, device="cpu", dtype="float32", cache="full")
    cached = list[int]()
    with serving(engine) as server:
        for text in ("What is it?", "And what else is there?"):
            said, usage = ask_about(server, text, "full")
            alone = engine.generate(text, [data_url(3)], max_new_tokens=8, ignore_eos=True)
            assert said == alone.text
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == 0
        assert cached[1] > alone.image_tokens
        assert server.worker.now()["prefix_misses"] == 1


@pytest.mark.parametrize("spec", ["full", "sift"])
def test_questions_about_a_picture_that_cross_layers_see(tmp_path: Path, spec: str) -> None:
    """Its features lie in the pools of cross layers, held by the stored beginning too."""
    folder = write_mllama(tmp_path / "m")
    engine = Engine.load(folder, device="cpu", dtype="float32", cache=spec)
    with serving(engine) as server:
        for text in ("What is it?", "And what else is there?", "What is it?"):
            said, usage = ask_about(server, text, spec)
            alone = engine.generate(text, [data_url(3)], max_new_tokens=8, ignore_eos=True)
            assert said == alone.text
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0
        assert server.worker._prefixes.nbytes > alone.cache.feature_bytes > 0


def test_pictures_of_one_colour_and_other_shapes_are_told_apart(tmp_path: Path) -> None:
    """Their features are the same, cell by cell: what differs is where the cells lie."""
    folder = write_qwen_patches(tmp_path / "m", "qwen2_vl")
    engine = Engine.load(folder, device="cpu", dtype="float32", cache="full")
    with serving(engine) as server:
        for size in ((336, 28), (28, 336)):
            file = BytesIO()
            Image.new("RGB", size, (90, 120, 40)).save(file, "PNG")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            body = {"messages": asked("What?", url), "max_tokens": 8, "ignore_eos": True}
            answer = post(server, body | {"cache": "full"}).json()
            alone = engine.generate("What?", [url], max_new_tokens=8, ignore_eos=True)
            assert answer["choices"][0]["message"]["content"] == alone.text
        assert server.worker.now()["prefix_misses"] == 2


def test_few_bits_are_shared_in_place_and_answers_repeat(engine: Engine) -> None:
    with serving(engine) as server:
        first = ask_about(server, "What is it?", "sift")[0]
        pages = [len(pool.of("k4v4").data) for pool in server.worker._scheduler.pools]
        other = ask_about(server, "And what else is there?", "sift")[0]
        assert ask_about(server, "What is it?", "sift")[0] == first
        assert ask_about(server, "And what else is there?", "sift")[0] == other
        assert [len(pool.of("k4v4").data) for pool in server.worker._scheduler.pools] == pages


def test_policies_that_choose_by_the_question_share_nothing(engine: Engine) -> None:
    with serving(engine) as server:
        for spec in ("avl:floor=4", "h2o", "zipvl"):
            for _ in range(2):
                details = ask_about(server, "What?", spec)[1]["prompt_tokens_details"]
                assert details["cached_tokens"] == 0 < details["image_tokens"]


def test_nobody_learns_what_others_have_asked(engine: Engine) -> None:
    """Beginnings are kept by key."""
    with serving(engine, keys=("other", KEY)) as server:
        for key in (KEY, "other", KEY):
            ask_about(server, "What?", "sift", headers={"authorization": f"Bearer {key}"})
        assert server.worker.now()["prefix_misses"] == 2


def test_kept_beginnings_make_room(engine: Engine) -> None:
    """By bytes, the oldest first; and wherever a request needs the room."""
    per_slot = engine.model.decoder.config.kv_bytes_per_token * 4
    with serving(engine, budget=200 * per_slot, rows=1) as server:
        for seed in range(5):
            ask_about(server, "What?", "full", seed)
        assert server.worker.now()["prefix_misses"] == 5
        assert 0 < server.worker.now()["shared_bytes"] < 200 * per_slot
        said = ask_about(server, "What?", "full", 4)[0]
        alone = engine.generate("What?", [data_url(4)], max_new_tokens=8, ignore_eos=True)
        assert said == alone.text
        settled(server)
        while server.worker._prefixes.drop():
            pass
        for pool in server.worker._scheduler.pools:
            assert pool.holes.free == [(0, 400)]
