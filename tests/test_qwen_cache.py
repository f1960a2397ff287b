"""Cache policies on Qwen-VL's decoder against their slow references: same logits, same kept sets.

The decoder is trained for 40 tokens here, so that all its rules for longer sequences are on: the
rotary base of the first prompt stays in later turns, and queries grow with their positions.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.qwen_checkpoint import QwenShape, config_of, draw, write_qwen
from engine.engine import Engine
from engine.policies.avl import Avl
from engine.policies.fastv import FastV
from engine.policies.h2o import H2o
from engine.result import Timings
from tests.cache_run import CacheRun, embeddings
from tests.noise import noise
from tests.qwen_reference import QwenReference
from tests.reference_cache import Reference, ReferenceAvl, ReferenceFastV, ReferenceH2o, Settings
from tests.test_cache_avl import close, nearly_always_equal, same_sets, turn

SHAPE = QwenShape(layers=4, vision_layers=1, image=140, trained=40, gain=1.5)
SETTINGS = {
    "paper": Settings(floor=4),
    "no core": Settings(core=None, floor=4),
    "small": Settings(0.2, 0.13, 4, 0.5, 1, 0.5, 0.5, 3),
    "late filter": Settings(0.6, 0.1, 2, 0.6, 3, 0.4, 0.9, 2),
    "always ranked": Settings(every=1, text=0.3, floor=2),
    "never ranked again": Settings(every=0, prefill=1.0, text=1.0),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(write_qwen(tmp_path_factory.mktemp("qwen") / "m", SHAPE), device="cpu")


@pytest.fixture(scope="module")
def arithmetic() -> QwenReference:
    return QwenReference(config_of(SHAPE), draw(SHAPE))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tokens", [38, 57, 90])  # bases of 1, 3 and 7; the first crosses 40
def test_avl_equals_the_slow_reference(
    name: str, tokens: int, engine: Engine, arithmetic: QwenReference
) -> None:
    settings = SETTINGS[name]
    run = CacheRun(engine.model.decoder, Avl(**vars(settings)))
    reference = ReferenceAvl(arithmetic, settings)
    turn(run, reference, tokens, spans=[(6, tokens - 9)], steps=40, seed=tokens)
    nearly_always_equal(reference)


def test_avl_over_two_turns_and_two_pictures(engine: Engine, arithmetic: QwenReference) -> None:
    settings = SETTINGS["paper"]
    run = CacheRun(engine.model.decoder, Avl(**vars(settings)))
    reference = ReferenceAvl(arithmetic, settings)
    turn(run, reference, tokens=36, spans=[(4, 30)], steps=7, seed=3)
    turn(run, reference, tokens=50, spans=[(5, 21), (25, 44)], steps=20, seed=4)
    assert run.settle().rotary.tolist() == [36]


def test_avl_on_a_rendered_prompt_with_its_256_image_tokens(
    engine: Engine, arithmetic: QwenReference
) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "How many people are on the left?"}]
    asked = engine.turn([{"role": "user", "content": content}], [noise(90, 61)], Timings())
    ((start, end),) = asked.spans
    assert end - start == 256
    settings = Settings(floor=4)
    run = CacheRun(engine.model.decoder, Avl(**vars(settings)))
    reference = ReferenceAvl(arithmetic, settings)
    embed = arithmetic.tensors["transformer.wte.weight"]
    hidden = embed[asked.token_ids].clone()
    pixels = engine.processor.prepare(noise(90, 61))
    hidden[start:end] = arithmetic.features(pixels.tiles[0])
    close(run.prefill(hidden.float(), asked.spans, 41), reference.prefill(hidden, asked.spans, run))
    for step in range(40):
        hidden = embed[[step * 7 % 300]]
        close(run.decode(hidden.float()), reference.decode(hidden, run))
        same_sets(run, reference)


def h2o_kept(run: CacheRun, layer: int) -> list[list[int]]:
    return run.text(layer)


def fastv_kept(run: CacheRun, layer: int) -> list[list[int]]:
    layout = run.row.layers[layer].layout
    return [sorted(head) for head in layout.positions.expand(2, -1).tolist()]


@pytest.mark.parametrize(
    ("policy", "slow", "kept"),
    [(H2o(), ReferenceH2o, h2o_kept), (FastV(), ReferenceFastV, fastv_kept)],
    ids=["h2o", "fastv"],
)
@pytest.mark.parametrize("tokens", [38, 90])
def test_baselines_equal_their_slow_references(
    policy: H2o | FastV,
    slow: type[Reference],
    kept: Callable[[CacheRun, int], list[list[int]]],
    tokens: int,
    engine: Engine,
    arithmetic: QwenReference,
) -> None:
    run, reference = CacheRun(engine.model.decoder, policy), slow(arithmetic)
    hidden, spans = embeddings(tokens, tokens, SHAPE.hidden), [(6, tokens - 9)]
    close(run.prefill(hidden, spans, 41), reference.prefill(hidden, spans, run))
    for step in range(40):
        hidden = embeddings(1, 1000 + step, SHAPE.hidden)
        close(run.decode(hidden), reference.decode(hidden, run))
    run.settle()
    for layer, stored in enumerate(reference.stored):
        assert kept(run, layer) == [head.nonzero()[:, 0].tolist() for head in stored]
    nearly_always_equal(reference)
