"""The attention page where cross layers look at pictures: features, and who sees them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.cache.cross_steps import CrossStepView
from engine.cache.looking import LookView
from engine.engine import Engine
from engine.insight.page import stream_with_page
from engine.insight.panels import panels_of
from engine.insight.recorder import Recorder
from engine.models.mllama import Mllama
from tests.mllama_checkpoint import write_mllama
from tests.noise import noise
from tests.written_page import answer, data_in, part


@pytest.fixture(scope="module")
def sideways(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = write_mllama(tmp_path_factory.mktemp("mllama") / "m")
    return Engine.load(folder, device="cpu", dtype="float32", cache="full")


@pytest.mark.parametrize("size", [(160, 50), (100, 100), (30, 40), (50, 160)])
def test_a_canvas_shows_every_feature_where_it_lies(
    size: tuple[int, int], sideways: Engine
) -> None:
    """A patch of a colour of its own is found again in its tile's row of patches."""
    pixels = sideways.processor.prepare(noise(*size))
    (panel,) = panels_of(sideways.model, sideways.processor, pixels)
    assert isinstance(sideways.model, Mllama)
    features = sideways.model.seen(pixels.size)
    assert sorted([*panel.tokens, *panel.newlines]) == list(range(features))
    side, patch = 4, 14
    for cell, token in enumerate(panel.tokens):
        tile, place = divmod(token, side * side + 1)
        row, column = divmod(place - 1, side)
        one = pixels.tiles[tile, :, row * patch : (row + 1) * patch]
        one = one[..., column * patch : (column + 1) * patch]
        y, x = divmod(cell, panel.columns)
        box = (x * patch, y * patch, (x + 1) * patch, (y + 1) * patch)
        shown = sideways.processor.prepare(panel.picture.crop(box).resize((56, 56), 0)).tiles[0]
        torch.testing.assert_close(shown[:, ::4, ::4], one, rtol=0, atol=0.02)


@pytest.mark.parametrize("cache", ["full", "avl:cross=0.3,every=2", "trimmed:ratio=0.1", "sift"])
def test_the_page_shows_what_cross_layers_look_at(
    cache: str, sideways: Engine, tmp_path: Path
) -> None:
    """Weights are those of the model's own products, tiers those that are stored and read."""
    engine, path = sideways.with_cache(cache), tmp_path / "page.html"
    result = answer(engine, path)
    data = data_in(path)
    assert (data["across"], data["layers"], len(data["steps"])) == (True, 2, 9)
    features = result.cache.features_whole
    assert data["positions"] == list(range(features))
    passes = len(data["steps"])
    tiers = part(data, "tiers", torch.uint8).view(passes, 2, features).clone()
    bits = part(data, "bits", torch.uint8).view(passes, 2, features).clone()
    for step in range(1, passes):
        tiers[step] ^= tiers[step - 1]
        bits[step] ^= bits[step - 1]
    stored = (tiers > 0).sum(2)
    assert (stored == result.cache.features).all()
    assert ((bits > 0) == (tiers > 0)).all()
    assert set(bits.unique().tolist()) - {0} == {8 if cache == "sift" else 64}
    if cache.startswith("avl"):
        assert ((tiers == 2).sum(2) == int(0.3 * features)).all()
        assert (tiers[2] != tiers[0]).any(), "the core was ranked again"
    assert data["bytes"]["kept"] == [result.cache.feature_bytes] * passes
    share = result.cache.feature_bytes / data["bytes"]["full"][0]
    assert share == pytest.approx(result.cache.image_stored_share, rel=1e-3)


def test_only_pictures_that_are_seen_are_shown(sideways: Engine, tmp_path: Path) -> None:
    """Of a picture, a text and a picture, cross layers see the last."""
    path, content = tmp_path / "page.html", [{"type": "image"}, {"type": "text", "text": "or"}]
    messages = [{"role": "user", "content": [*content, {"type": "image"}]}]
    images = [noise(160, 50), noise(30, 40)]
    list(stream_with_page(sideways, path, messages, images, max_new_tokens=3, ignore_eos=True))
    data = data_in(path)
    (panel,) = data["panels"]
    assert sorted(panel["tokens"] + panel["newlines"]) == data["positions"] == list(range(17))


def test_weights_of_cross_layers_are_the_models_own(
    sideways: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against products of queries and keys caught on the way, one step at a time."""
    caught: list[tuple[Tensor, Tensor]] = []
    recorder = Recorder(0, across=True)
    attend, look = CrossStepView.attend, LookView.attend

    def stepped(view: CrossStepView, q: Tensor, project: Any) -> tuple[Tensor, Tensor]:
        caught.append((q.clone(), keys[view._layer]))
        return attend(view, q, project)

    def looked(view: LookView, q: Tensor, project: Any) -> tuple[Tensor, Tensor]:
        result = look(view, q, project)
        keys[view._layer] = torch.cat([k for k, _ in view._pairs])
        caught.append((q[-1:].clone(), keys[view._layer]))
        return result

    keys: dict[int, Tensor] = {}
    monkeypatch.setattr(CrossStepView, "attend", stepped)
    monkeypatch.setattr(LookView, "attend", looked)
    images = [noise(70, 50)]
    for _ in sideways.stream("What?", images, observer=recorder, max_new_tokens=4, ignore_eos=True):
        pass
    moments = [moment for row in recorder.passes for moment in row]
    assert len(moments) == len(caught) == 8
    for moment, (q, k) in zip(moments, caught, strict=True):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = torch.einsum("hd,nhd->hn", q[0].double(), k.double()) * q.shape[2] ** -0.5
        expected = logits.softmax(-1).mean(0)
        found = moment.attention[: len(k)].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
