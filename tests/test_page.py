"""The attention page: what it holds, and that it stays small."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.app.cli import main
from engine.cache.observe import Observed
from engine.engine import Engine
from engine.errors import OptionError
from engine.insight.compare import first_difference
from engine.insight.page import mean_over_layers, pack, render, stream_with_page
from engine.insight.panels import panels_of
from engine.insight.recorder import Recorder, find_sinks, image_heads
from engine.models.llava_next import LlavaNext
from engine.result import Result
from tests.next_checkpoints import write_next
from tests.noise import noise
from tests.written_page import CACHE, HOSTILE, SHAPE, answer, data_in, part


@pytest.fixture(scope="module")
def engine(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(SHAPE, "hub", "float32", CACHE)


@pytest.fixture(scope="module")
def written(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("page") / "page.html"
    return path, answer(engine, path, HOSTILE)


# -- what the page holds --------------------------------------------------------------------------


def test_the_page_holds_the_answer_that_is_given(
    engine: Engine, written: tuple[Path, Result]
) -> None:
    path, result = written
    data = data_in(path)
    image = noise(70, 50)
    plain = engine.generate(HOSTILE, [image], max_new_tokens=9, ignore_eos=True)
    full = engine.with_cache("full").generate(HOSTILE, [image], max_new_tokens=9, ignore_eos=True)
    assert result.token_ids == plain.token_ids
    assert "".join(data["steps"]) == plain.text
    assert "".join(data["exact"]) == full.text
    assert data["differs"] == first_difference(plain.token_ids, full.token_ids)
    assert len(data["positions"]) == result.image_tokens


def test_bytes_and_tiers_agree_with_the_cache_report(written: tuple[Path, Result]) -> None:
    """The last step of the page is what the result's own count says of the cache."""
    path, result = written
    data = data_in(path)
    assert data["bytes"]["kept"][-1] == result.cache.bytes_used
    assert data["bytes"]["full"][-1] == result.cache.bytes_full
    assert data["text"][-1] == pytest.approx(result.cache.text.mean, abs=0.1)
    changes = part(data, "tiers", torch.uint8)
    tiers = changes.view(len(data["steps"]), data["layers"], -1).clone()
    for step in range(1, len(tiers)):
        tiers[step] ^= tiers[step - 1]
    counts = [(tiers[-1] == tier).sum().item() / data["layers"] for tier in range(3)]
    stored, core = result.cache.stored.mean, result.cache.core.mean
    assert counts == pytest.approx([result.cache.minor.mean, stored - core, core])
    assert (tiers[0] != tiers[-1]).any(), "the core has moved (seeded)"


def test_attention_on_the_page_is_the_attention_that_was_seen() -> None:
    recorder = made_up(passes=3, layers=2, heads=4, tokens=20)
    blob = pack(recorder, mean_over_layers(recorder))
    data = {"blob": blob}
    for name, exact in (
        (
            "layer",
            torch.stack([torch.stack([m.attention[2:22] for m in p]) for p in recorder.passes]),
        ),
        ("head", torch.stack(recorder.heads)),
    ):
        passes, rows, count = blob["shapes"][name]
        assert count == 20, "a short answer is stored in full"
        gaps = part(data, name + "Gap", torch.int16).view(passes, rows, count)
        levels = part(data, name, torch.uint8).view(passes, rows, count) / 255
        high = part(data, name + "High", torch.float32).view(passes, rows, 1)
        found = torch.zeros(passes, rows, 20)
        found.scatter_(2, gaps.long().cumsum(2), levels**2 * high)
        torch.testing.assert_close(found, exact, atol=5e-3 * float(high.max()), rtol=0)


def test_hostile_text_stays_text(written: tuple[Path, Result]) -> None:
    path, _ = written
    page = path.read_text()
    assert data_in(path)["prompt"] == HOSTILE
    assert "alert(1)</script>" not in page
    assert page.count("</script>") == 2
    assert page.count("<script") == 2


def test_the_page_names_no_other_file(written: tuple[Path, Result]) -> None:
    page = written[0].read_text()
    assert "default-src 'none'" in page
    script = page.replace('"http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|@import|url\((?!#)|(src|href)=\"(?!data:)", script)


def test_a_long_answer_of_a_large_model_stays_below_two_megabytes() -> None:
    """256 tokens, 32 layers, 32 heads, 576 patches of noise: nothing that would compress well."""
    recorder = made_up(passes=256, layers=32, heads=32, tokens=576)
    blob = pack(recorder, mean_over_layers(recorder))
    picture = "x" * 200_000
    page = render({"blob": blob, "panels": [picture]})
    assert len(page) < 2_000_000
    assert blob["shapes"]["layer"][2] == 32
    assert blob["shapes"]["head"][2] == 8


def made_up(passes: int, layers: int, heads: int, tokens: int) -> Recorder:
    """A recorder that has seen noise; the tiers of a third of the passes are drawn anew."""
    torch.manual_seed(0)
    recorder, tiers = Recorder(layers // 2), torch.zeros(layers, tokens, dtype=torch.uint8)
    for step in range(passes):
        if step % 3 == 0:
            tiers = (torch.rand(layers, tokens) * 3).to(torch.uint8)
        for layer in range(layers):
            query = tokens + 5 + step
            recorder.observe(
                Observed(
                    layer=layer,
                    step=step,
                    query=query,
                    weights=torch.rand(heads if layer == layers // 2 else 1, query + 1).softmax(1),
                    positions=torch.arange(query + 1)[None],
                    tiers=tiers[layer],
                    image_spans=((2, 2 + tokens),),
                    text=torch.arange(2 + tokens, query + 1)[None],
                    bytes=64 * (query + 1),
                    bits=torch.full((tokens,), 32, dtype=torch.uint8),
                )
            )
    return recorder


def test_heads_are_told_apart_by_position() -> None:
    """Four query heads over two key heads that hold different tokens."""
    seen = SimpleNamespace(
        query=5,
        weights=torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]),
        positions=torch.tensor([[0, 2], [1, 3]]),
        image_spans=((1, 3), (3, 5)),
    )
    found = image_heads(seen)  # type: ignore[arg-type]
    expected = [[0, 0.1, 0, 0], [0, 0.2, 0, 0], [0.7, 0, 0.3, 0], [0.6, 0, 0.4, 0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_sinks_are_attended_whatever_is_said() -> None:
    attention = torch.full((6, 100), 0.001)
    attention[:, 7] = 0.1  # always
    attention[2, 8] = 0.5  # once
    assert find_sinks(attention) == [7]
    assert find_sinks(attention[:3]) == []
    assert find_sinks(torch.zeros(6, 100)) == []
    assert find_sinks(torch.zeros(6, 0)) == []


def test_what_cannot_be_shown_is_refused(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with pytest.raises(OptionError, match="needs a picture"):
        list(stream_with_page(engine, path, "What?", []))
    with pytest.raises(OptionError, match="needs the pictures themselves"):
        list(stream_with_page(engine, path, "What?", [engine.encode(noise(9, 9))]))
    with pytest.raises(OptionError, match="layer 99"):
        list(stream_with_page(engine, path, "What?", [noise(9, 9)], head_layer=99))
    with pytest.raises(OptionError, match="no folder"):
        list(stream_with_page(engine, tmp_path / "no" / "page.html", "What?", [noise(9, 9)]))
    assert not path.exists()


def test_the_command_line_writes_the_page(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, page = tmp_path / "a.png", tmp_path / "page.html"
    noise(70, 50).save(picture)
    ask = ["--model", str(checkpoint(SHAPE)), "--prompt", "What?", "-n", "4", "--device", "cpu"]
    shown = ["--image", str(picture), "--attention", str(page)]
    assert main([*ask, *shown]) == 0
    said = capsys.readouterr().out
    data = data_in(page)
    assert "".join(text or "" for text in data["steps"]).strip() == said.strip()
    assert data["prompt"] == "What?"
    page.unlink()
    for wrong in (
        ["--attention", str(page)],
        [*shown, "--compare"],
        ["--image", str(picture), "--attention", str(tmp_path / "no" / "page.html")],
    ):
        assert main([*ask, *wrong]) == 2
        assert "--attention" in capsys.readouterr().err
    assert not page.exists()


# -- grids ----------------------------------------------------------------------------------------


def test_a_plain_picture_is_one_grid(engine: Engine) -> None:
    image = noise(56, 56)
    pixels = engine.processor.prepare(image)
    (panel,) = panels_of(engine.model, engine.processor, pixels)
    assert panel.tokens == list(range(engine.model.image_tokens(pixels)))
    assert panel.rows * panel.columns == len(panel.tokens)
    assert panel.picture.size == tuple(reversed(engine.processor.output_size))
    again = engine.processor.prepare(panel.picture)
    torch.testing.assert_close(again.tiles, pixels.tiles, atol=1e-5, rtol=0)


def test_tiles_lie_where_their_tokens_come_from(tmp_path: Path) -> None:
    """Numbers in place of features, joined by the model itself, must name the panels' cells."""
    engine = Engine.load(write_next(tmp_path / "next", "vicuna"), device="cpu")
    model = engine.model
    assert isinstance(model, LlavaNext)
    pixels = engine.processor.prepare(noise(90, 41))
    whole, tiles = panels_of(model, engine.processor, pixels)
    grid, side = model.grid(pixels), model.config.vision.grid
    numbers = torch.arange(len(pixels.tiles) * side * side).view(len(pixels.tiles), -1, 1).float()
    hidden = len(model.image_newline)
    with torch.no_grad():
        model.image_newline.fill_(-1)
        joined = model._join(numbers.expand(-1, -1, hidden), grid)[:, 0]
    assert sorted([*whole.tokens, *tiles.tokens, *tiles.newlines]) == list(range(len(joined)))
    assert joined[list(tiles.newlines)].unique().tolist() == [-1]
    for cell, token in enumerate(tiles.tokens):
        row, column = cell // tiles.columns + grid.top, cell % tiles.columns + grid.left
        tile = 1 + row // side * grid.tiles[1] + column // side
        assert joined[token] == (tile * side + row % side) * side + column % side
    tile_of = [int(joined[token]) // side**2 for token in tiles.tokens]
    across = [n for n in range(1, tiles.columns) if tile_of[n] != tile_of[n - 1]]
    first_column = tile_of[:: tiles.columns]
    down = [n for n in range(1, tiles.rows) if first_column[n] != first_column[n - 1]]
    assert (tiles.column_seams, tiles.row_seams) == (tuple(across), tuple(down))
    assert across or down, "there are several tiles"
    patch = model.config.vision.image // side
    assert tiles.picture.size == (tiles.columns * patch, tiles.rows * patch)
