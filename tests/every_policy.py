"""What is asked of every policy, whatever it keeps: by name, on a small model."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch

from engine import Engine
from engine.cache.prefill import most_slots
from engine.cache.row import Row
from engine.policies.layout import Layout
from engine.policies.specs import parse
from engine.result import Result
from engine.running.stepping import Stepping
from tests.cache_run import CacheRun, embeddings, seeded_decoder
from tests.checkpoints import Shape, write_llava
from tests.mllama_checkpoint import write_mllama
from tests.noise import noise

WORDS = "What is in this picture, and what is left of it?"


@cache
def small_engine(*, cross: bool = False) -> Engine:
    """A LLaVA with random weights, or a Llama-3.2-Vision, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path = write_mllama(path) if cross else write_llava(path, Shape())
        return Engine.load(path, device="cpu", dtype="float32", cache="full")


def engine_for(spec: str) -> Engine:
    """An engine under a policy, of a model that it is made for."""
    return small_engine(cross=parse(spec).trims).with_cache(spec)


def ask_everything(spec: str) -> None:
    """All of it, one after the other."""
    for ask in (spells_itself, keeps_its_promise, answers_alike, goes_on):
        ask(spec)


def spells_itself(spec: str) -> None:
    """Its spec parses back to it."""
    policy = parse(spec)
    assert parse(policy.spec) == policy


def keeps_its_promise(spec: str) -> None:
    """No layer takes more slots than were promised; the second turn stands on the first."""
    run, past = CacheRun(seeded_decoder(3), parse(spec)), Row()
    for number, (tokens, spans) in enumerate([(40, [(3, 12), (15, 30)]), (25, [(2, 14)])]):
        layout = Layout.of_tokens(tokens, spans, torch.device("cpu"))
        most = most_slots(run.policy, layout, 6, past)
        run.prefill(embeddings(tokens, number), spans, 6)
        past = run.row or past
        assert max(stored.extent.size for stored in past.layers) <= most


def answers_alike(spec: str) -> None:
    """Alone, in a batch and by captured steps: the same tokens."""
    engine = engine_for(spec)
    options = {"max_new_tokens": 9, "ignore_eos": True}
    requests = [{"prompt": WORDS[: 20 + 9 * n], "images": [noise(60, 50, n)]} for n in range(3)]
    alone = [_ids(engine.generate(r["prompt"], r["images"], **options)) for r in requests]
    batch = {r.index: _ids(r) for r in engine.generate_batch([r | options for r in requests], 3)}
    assert [batch[n] for n in range(3)] == alone
    captured = engine.with_cache(spec)
    captured.stepping = Stepping(graphs=True)
    assert _ids(captured.generate(WORDS[:20], [noise(60, 50, 0)], **options)) == alone[0]


def goes_on(spec: str) -> None:
    """A conversation with a new picture in it; what is used is never more than what is held."""
    chat = engine_for(spec).chat()
    for images in ([noise(50, 40)], [], [noise(40, 50, 2)]):
        result = chat.send(WORDS, images, max_new_tokens=5, ignore_eos=True)
        assert len(result.token_ids) == 5
        assert result.cache.bytes_used <= result.cache.bytes_allocated


def _ids(result: object) -> list[int]:
    assert isinstance(result, Result), result
    return result.token_ids
