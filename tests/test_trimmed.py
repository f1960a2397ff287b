"""Trimmed Llama against its rule, written out over masks; and what is held and given back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.engine import Engine
from engine.errors import OptionError
from engine.pictures.canvas import canvas_of
from engine.policies.specs import parse
from engine.running.batch import job_of
from tests.checkpoints import Shape, write_llava
from tests.mllama_checkpoint import DEFAULT, draw, write_mllama
from tests.mllama_reference import LEAST, MllamaReference, Seen
from tests.noise import noise
from tests.test_transactions import taken

WORDS = "What is this picture, and what is there beside it?"
FEATURES = DEFAULT.tile_features
WIDE, SMALL, LARGE = (160, 50), (30, 40), (100, 100)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = write_mllama(tmp_path_factory.mktemp("mllama") / "m")
    return Engine.load(folder, device="cpu", dtype="float32", cache="full")


class Trimming(MllamaReference):
    """The reference, whose first cross layer chooses by the first ``prompt`` tokens."""

    def __init__(self, ratio: float, prompt: int, sizes: Sequence[int]) -> None:
        super().__init__(DEFAULT, draw(DEFAULT))
        self.ratio, self.prompt, self.sizes = ratio, prompt, sizes
        self.kept = torch.empty(0, dtype=torch.bool)

    def _cross(self, layer: str, x: Tensor, vision: Sequence[Tensor], mask: Tensor) -> Tensor:
        mask = mask.clone()
        if layer == f"layers.{min(self.shape.cross)}":
            self.kept = self.chosen(layer, x[: self.prompt], vision, mask[: self.prompt])
            mask[self.prompt :] &= self.kept
        else:
            mask &= self.kept
        return super()._cross(layer, x, vision, mask)

    def chosen(self, layer: str, x: Tensor, vision: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Which of all pictures' features stay: ``[features]``."""
        name = f"{layer}.cross_attn"
        q = self._linear(self._norm(x, f"{layer}.input"), f"{name}.q_proj")
        k = self._linear(torch.cat(list(vision)), f"{name}.k_proj")
        q, k = (
            self._rms(self._heads(y), self._get("decoder", f"{name}.{kind}_norm.weight")).double()
            for y, kind in ((q, "q"), (k, "k"))
        )
        kept = torch.zeros(mask.shape[1], dtype=torch.bool)
        for head in range(len(q)):
            received = torch.zeros(mask.shape[1], dtype=torch.float64)
            for token in range(len(x)):
                if mask[token].any():
                    logits = (k[head] @ q[head, token]) / math.sqrt(q.shape[-1])
                    received += logits.masked_fill(~mask[token], LEAST).softmax(0)
            start = 0
            for size in self.sizes:  # of a picture that are there
                best = received[start : start + size].argsort(descending=True)
                kept[start + best[: max(1, int(self.ratio * size))]] = True
                start += 4 * FEATURES
        return kept


def seen(engine: Engine, prompt: Any, images: Sequence[Any]) -> tuple[list[int], list[Seen]]:
    """A prompt's ids, and its pictures as the reference takes them."""
    rendered = engine.render(prompt, images)
    places = [
        place for place, id_ in enumerate(rendered.token_ids) if id_ == engine.model.image_token
    ]
    found = []
    for place, image in zip(places, images, strict=True):
        tiles = engine.processor.prepare(image).tiles
        found.append(Seen(place, tiles, canvas_of(image.size, DEFAULT.image, 4)))
    return list(rendered.token_ids), found


def conversation(*sizes: tuple[int, int]) -> tuple[Any, list[Any]]:
    """One user turn about pictures side by side."""
    images = [noise(*size, seed=n) for n, size in enumerate(sizes)]
    content = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": WORDS}]
    return [{"role": "user", "content": content}], images


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("sizes", [[WIDE], [LARGE], [SMALL, WIDE]], ids=str)
def test_answers_are_those_of_the_rule(
    engine: Engine, ratio: float, sizes: list[tuple[int, int]]
) -> None:
    """Of one picture and of two that are seen together; every head keeps its own best."""
    prompt, images = conversation(*sizes)
    ids, pictures = seen(engine, prompt, images)
    counts = [len(picture.tiles) * FEATURES for picture in pictures]
    reference = Trimming(ratio, len(ids), counts)
    result = engine.with_cache(f"trimmed:ratio={ratio}").generate(
        prompt, images, max_new_tokens=6, ignore_eos=True
    )
    assert result.token_ids == reference.greedy(ids, pictures, 6)
    assert result.cache.features == int(reference.kept.sum())
    assert result.cache.features_whole == sum(counts)
    each = DEFAULT.kv_heads * (DEFAULT.hidden // DEFAULT.heads) * 2 * 4 * len(DEFAULT.cross)
    assert result.cache.feature_bytes == each * result.cache.features
    saved = each * (sum(counts) - result.cache.features)
    assert result.cache.bytes_full - result.cache.bytes_used == saved


def test_all_of_the_features_are_the_full_cache(engine: Engine) -> None:
    prompt, images = conversation(WIDE)
    options = {"max_new_tokens": 9, "ignore_eos": True}
    whole = engine.generate(prompt, images, **options)
    kept = engine.with_cache("trimmed:ratio=1").generate(prompt, images, **options)
    assert kept.token_ids == whole.token_ids
    assert kept.cache.features == kept.cache.features_whole == 3 * FEATURES


def test_a_union_keeps_more_than_a_head_and_more_with_a_larger_ratio(engine: Engine) -> None:
    prompt, images = conversation(LARGE)
    shares = []
    for ratio in (0.05, 0.1, 0.25, 0.5, 0.9):
        cache = (
            engine.with_cache(f"trimmed:ratio={ratio}").generate(prompt, images, max_new_tokens=1)
        ).cache
        shares.append(cache.features / cache.features_whole)
        assert shares[-1] >= int(ratio * cache.features_whole) / cache.features_whole
    assert shares == sorted(shares)


def test_a_later_question_sees_what_the_first_has_kept(engine: Engine) -> None:
    chat = engine.with_cache("trimmed:ratio=0.1").chat()
    first = chat.send(WORDS, [noise(*LARGE)], max_new_tokens=4, ignore_eos=True).cache
    assert 0 < first.features < 4 * FEATURES
    second = chat.send("And beside it?", max_new_tokens=4, ignore_eos=True).cache
    assert second.features == first.features
    third = chat.send("This one?", [noise(*WIDE)], max_new_tokens=4, ignore_eos=True).cache
    assert third.features_whole == 3 * FEATURES
    assert third.features < 3 * FEATURES
    cross = chat._scheduler.cross
    assert cross is not None
    held = [sum(end - start for start, end in each) for each in taken(list(cross.pools))]
    assert held == [third.features] * len(DEFAULT.cross)
    chat._row.give()
    assert taken([*chat._scheduler.pools, *cross.pools]) == [[]] * DEFAULT.layers


def test_rows_are_trimmed_by_their_own_questions_and_whole_ones_are_shared(engine: Engine) -> None:
    """Beside each other, under policies of their own; each answers as alone."""
    scheduler, image = engine.scheduler(4), engine.encode(noise(*LARGE))
    options = {"max_new_tokens": 8, "ignore_eos": True, "images": [image]}
    specs = ["trimmed:ratio=0.1", "full", "trimmed:ratio=0.1", "full"]
    jobs = []
    for number, spec in enumerate(specs):
        asked = {"prompt": f"{number} {WORDS}", **options}
        jobs.append((scheduler.submit(job_of(engine.with_cache(spec), asked)), spec, asked))
    while len(scheduler.running) < 4:
        scheduler.step()
    held = [job.row.pictures[0] for job, *_ in jobs if job.row]
    assert held[1] is held[3]
    assert held[0] is not held[2]
    while not scheduler.idle:
        scheduler.step()
    for job, spec, asked in jobs:
        alone = engine.with_cache(spec).generate(**asked)
        assert job.answer.token_ids == alone.token_ids  # type: ignore[attr-defined]
    assert scheduler.cross is not None
    assert taken(list(scheduler.cross.pools)) == [[]] * len(DEFAULT.cross)


def test_text_may_be_another_policys(engine: Engine) -> None:
    prompt, images = conversation(WIDE)
    joined = engine.with_cache("trimmed:ratio=0.1+h2o:heavy=0.2,recent=0.3")
    result = joined.generate(prompt, images, max_new_tokens=9, ignore_eos=True)
    assert result.cache.features < 3 * FEATURES
    assert result.cache.stored_share < 0.6


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"trimmed: ratio is 1\.5"):
        parse("trimmed:ratio=1.5")
    with pytest.raises(OptionError, match="both decide what is stored"):
        parse("trimmed+trimmed")
    plain = Engine.load(write_llava(tmp_path / "m", Shape()), device="cpu", cache="full")
    with pytest.raises(OptionError, match="no cross-attention layers"):
        plain.with_cache("trimmed")
