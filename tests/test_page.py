"""The attention page: what it holds, that it stays small, and that it works in a real browser."""

import base64
import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.browser import Browser, find_chromium
from bench.common import ROOT
from bench.qwen_checkpoint import QwenShape, write_qwen
from engine.app.cli import main
from engine.cache.cross_steps import CrossStepView
from engine.cache.looking import LookView
from engine.cache.observe import Observed
from engine.engine import Engine
from engine.errors import OptionError
from engine.insight.compare import first_difference
from engine.insight.page import mean_over_layers, pack, render, stream_with_page
from engine.insight.panels import panels_of
from engine.insight.recorder import Recorder, find_sinks, image_heads
from engine.models.llava_next import LlavaNext
from engine.models.mllama import Mllama
from engine.result import Result
from tests.checkpoints import Shape
from tests.mllama_checkpoint import write_mllama
from tests.next_checkpoints import write_next
from tests.oracle import noise

SHAPE = Shape(kv_heads=2)
CACHE = "avl:secondary=0.6,core=0.3,every=2,floor=3"
HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp;</b> \u2028"


def answer(engine: Engine, path: Path, prompt: str = "What is this?", **options: Any) -> Result:
    *_, result = stream_with_page(
        engine, path, prompt, [noise(70, 50)], max_new_tokens=9, ignore_eos=True, **options
    )
    assert isinstance(result, Result)
    return result


def data_in(path: Path) -> dict[str, Any]:
    found = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text()
    )
    assert len(found) == 1
    return dict(json.loads(found[0]))


def part(data: dict[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    """One of the page's arrays, read by its own offsets."""
    blob = data["blob"]
    start, length = blob["arrays"][name]
    whole = zlib.decompress(base64.b64decode(blob["bytes"]))
    return torch.frombuffer(bytearray(whole[start : start + length]), dtype=dtype)


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


# -- in a browser ---------------------------------------------------------------------------------


def test_where_apt_is_not_to_be_had_the_set_up_goes_on_and_says_so(tmp_path: Path) -> None:
    """The Makefile's rule, with an apt-get that fails and no browser on the path."""
    make, stamps, tools = shutil.which("make"), tmp_path / "stamps", tmp_path / "tools"
    if make is None:
        pytest.skip("needs make")
    tools.mkdir()
    for name in ("sh", "id", "mkdir", "touch"):
        (tools / name).symlink_to(shutil.which(name) or name)
    for name in ("apt-get", "sudo"):
        (tools / name).write_text("#!/bin/sh\necho no network >&2\nexit 100\n")
        (tools / name).chmod(0o755)
    rule = [make, f"STAMPS={stamps}", f"{stamps}/browser"]
    for said in ("note: no chromium (apt failed, see above): the browser tests will be", "up to"):
        done = subprocess.run(
            rule, cwd=ROOT, env={"PATH": str(tools)}, capture_output=True, text=True, check=True
        )
        assert said in done.stdout, "and the second time it does not try again"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def text(browser: Browser, name: str) -> str:
    return str(browser.run(f"document.getElementById({name!r}).innerText"))


def test_the_page_works_in_a_browser(
    browser: Browser, written: tuple[Path, Result], tmp_path: Path
) -> None:
    path, result = written
    data = data_in(path)
    before = len(browser.requested())
    browser.open(path)
    assert text(browser, "question") == HOSTILE
    assert browser.run("document.querySelectorAll('#answer span').length") == 9
    assert text(browser, "now").startswith("token 1 of 9")
    assert len(text(browser, "top").splitlines()) == 10
    pictures = {name: canvas(browser, name) for name in ("kept", "heat")}
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert text(browser, "now").startswith("token 3 of 9")
    assert browser.run("document.querySelector('#slider').value") == "2"
    assert canvas(browser, "heat") != pictures["heat"]
    assert canvas(browser, "kept") != pictures["kept"], "the core was chosen anew"
    slide(browser, 8)
    assert text(browser, "now").startswith("token 9 of 9")
    choose(browser, "layer", data["headLayer"])
    core, stored = result.cache.core, result.cache.stored
    expected = f"{core.mean:.0f} core, {stored.mean - core.mean:.0f} secondary"
    assert text(browser, "counts").startswith(expected)
    means = text(browser, "top")
    choose(browser, "head", 1)
    assert text(browser, "top") != means
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert browser.complaints() == []
    assert browser.requested()[before:] == [path.as_uri()]


def test_the_page_obeys_the_keyboard(browser: Browser, written: tuple[Path, Result]) -> None:
    browser.open(written[0])
    shown = []
    for key in ("End", "ArrowLeft", "Home", "ArrowRight"):
        browser.press(key)
        shown.append(text(browser, "now").split(":")[0])
    assert shown == ["token 9 of 9", "token 8 of 9", "token 1 of 9", "token 2 of 9"]
    playing = "document.querySelector('#play').getAttribute('aria-pressed')"
    browser.press(" ")
    assert browser.run(playing) == "true"
    browser.run("new Promise((done) => setTimeout(done, 600))")
    browser.press(" ")
    assert browser.run(playing) == "false"
    assert int(text(browser, "now").split()[1]) > 2, "it has moved on"
    assert browser.complaints() == []


def test_tiers_on_the_page_differ_without_their_colours(
    browser: Browser, written: tuple[Path, Result]
) -> None:
    """Lighter and darker than their own mean: what is left when all tiers have one colour."""
    browser.open(written[0])
    patterns = browser.run(
        """[...document.querySelectorAll('canvas.key')].map((canvas) => {
            const pixels = canvas.getContext('2d').getImageData(1, 1, 14, 14).data, grey = [];
            for (let i = 0; i < pixels.length; i += 4) {
                const alpha = pixels[i + 3] / 255;
                const light = 0.3 * pixels[i] + 0.59 * pixels[i + 1] + 0.11 * pixels[i + 2];
                grey.push(light * alpha + 255 * (1 - alpha));
            }
            const mean = grey.reduce((a, b) => a + b) / grey.length;
            return grey.map((light) => (light > mean + 1 ? 1 : 0));
        })"""
    )
    assert len(patterns) == 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        different = sum(a != b for a, b in zip(patterns[one], patterns[other], strict=True))
        assert different > 0.1 * len(patterns[one])


def test_masked_sinks_leave_the_list_until_they_are_wanted(
    browser: Browser, written: tuple[Path, Result], tmp_path: Path
) -> None:
    browser.open(written[0])
    first, second = text(browser, "top").splitlines()[:2]
    row, column = (int(n) - 1 for n in re.findall(r"row (\d+), column (\d+)", first)[0])
    sink = row * data_in(written[0])["panels"][0]["columns"] + column
    page, count = re.subn(r'"sinks": ?\[[^\]]*\]', f'"sinks": [{sink}]', written[0].read_text())
    assert count == 1
    (tmp_path / "sink.html").write_text(page)
    browser.open(tmp_path / "sink.html")
    assert "ten times the mean whatever is said (1)" in text(browser, "sinks")
    assert text(browser, "top").splitlines()[0] == second
    masked = canvas(browser, "heat")
    browser.run("document.querySelector('#mask').click()")
    assert text(browser, "top").splitlines()[0] == first
    assert canvas(browser, "heat") != masked
    assert browser.complaints() == []


def test_the_most_attended_patch_in_the_browser_is_that_of_the_trace(
    browser: Browser, engine: Engine, tmp_path: Path
) -> None:
    path, recorder = tmp_path / "page.html", Recorder(0)
    answer(engine, path)
    image = noise(70, 50)
    list(
        engine.stream(
            "What is this?", [image], observer=recorder, max_new_tokens=9, ignore_eos=True
        )
    )
    browser.open(path)
    slide(browser, 4)
    best = mean_over_layers(recorder)[4]
    row, column = divmod(int(best.argmax()), int(len(best) ** 0.5))
    first = text(browser, "top").splitlines()[0]
    assert first.startswith(f"row {row + 1}, column {column + 1}: {100 * best.max():.2f} %")


def test_what_is_said_of_a_patch_agrees_with_the_counts(
    browser: Browser, written: tuple[Path, Result]
) -> None:
    """Of all layers: shares of them, in the list, under the pointer and in the strip alike."""
    browser.open(written[0])
    slide(browser, 8)
    tiers = ("core", "secondary", "minor")
    counted = dict(zip(tiers, map(int, re.findall(r"\d+", text(browser, "counts"))), strict=False))
    strip = str(browser.run("document.querySelector('#strip').textContent"))
    assert {tier: int(re.search(rf"{tier} (\d+)", strip)[1]) for tier in tiers} == counted  # type: ignore[index]
    layers = data_in(written[0])["layers"]
    summed = dict.fromkeys(tiers, 0)
    point_at(browser, "kept", 0, 0)
    columns = data_in(written[0])["panels"][0]["columns"]
    for row in range(columns):
        for column in range(columns):
            point_at(browser, "kept", row, column)
            said = text(browser, "hover")
            assert said.startswith(f"row {row + 1}, column {column + 1}: ")
            found = re.findall(r"(core|secondary|minor) in (\d+)", said)
            assert sum(int(count) for _, count in found) == layers
            assert f"of {layers} layers" in said
            for tier, count in found:
                summed[tier] += int(count)
    assert {tier: round(count / layers) for tier, count in summed.items()} == counted


def test_what_is_pointed_at_follows_the_step(
    browser: Browser, written: tuple[Path, Result]
) -> None:
    browser.open(written[0])
    point_at(browser, "heat", 1, 1)
    before = text(browser, "hover")
    slide(browser, 8)
    after = text(browser, "hover")
    assert before.split(":")[0] == after.split(":")[0] == "row 2, column 2"
    assert before != after
    point_at(browser, "heat", 1, 1)
    assert text(browser, "hover") == after
    browser.run("document.querySelector('#heat canvas').dispatchEvent(new Event('mouseleave'))")
    assert text(browser, "hover").startswith("Point at a patch")


@pytest.mark.parametrize("width", [320, 375, 800])
def test_nothing_overflows_a_narrow_screen(
    browser: Browser, written: tuple[Path, Result], width: int
) -> None:
    screen = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", **screen)
    try:
        browser.open(written[0])
        assert browser.run("document.documentElement.scrollWidth") <= width
        outside = browser.run(
            "[...document.querySelectorAll('main *')]"
            f".filter((node) => node.getBoundingClientRect().right > {width} + 1)"
            ".map((node) => node.id || node.tagName)"
        )
        assert outside == []
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable_in_either_scheme(
    browser: Browser, written: tuple[Path, Result], scheme: str
) -> None:
    """WCAG 2.2's contrast of every text against the first background behind it: 4.5 at least."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", features=features)
    try:
        browser.open(written[0])
        worst, back = browser.run(
            """(() => {
                const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
                const light = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
                    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
                    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
                const behind = (node) => {
                    const found = numbers(getComputedStyle(node).backgroundColor);
                    return found.length < 4 || found[3] > 0 ? found : behind(node.parentElement);
                };
                let worst = 100;
                const texts = 'p, li, td, th, h1, h2, figcaption, kbd, label, button, select, mark';
                for (const node of document.querySelectorAll(texts + ', #answer span')) {
                    if (!node.innerText) continue;
                    const a = light(getComputedStyle(node).color), b = light(behind(node).join());
                    worst = Math.min(worst, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
                }
                return [worst, light(behind(document.body).join())];
            })()"""
        )
        assert worst >= 4.5
        assert back > 0.7 if scheme == "light" else back < 0.05
    finally:
        browser.call("Emulation.setEmulatedMedia", features=[])


def test_tiles_and_queries_are_drawn_too(browser: Browser, tmp_path: Path) -> None:
    """LLaVA-1.6 with two pictures, and Qwen-VL, whose queries are a list beside the picture."""
    for name, folder, pictures in (
        ("next", write_next(tmp_path / "next", "vicuna"), [noise(90, 41), noise(30, 70)]),
        ("qwen", write_qwen(tmp_path / "qwen", QwenShape()), [noise(70, 50)]),
    ):
        model = Engine.load(folder, device="cpu", cache="avl:floor=3")
        page = tmp_path / f"{name}.html"
        list(stream_with_page(model, page, "What?", pictures, max_new_tokens=2, ignore_eos=True))
        data = data_in(page)
        shown = [token for panel in data["panels"] for token in panel["tokens"] + panel["newlines"]]
        assert sorted(shown) == list(range(len(data["positions"])))
        assert [panel["placed"] for panel in data["panels"]] == [name == "next"] * len(
            data["panels"]
        )
        before = len(browser.requested())
        browser.open(page)
        places = [line.split()[0] for line in text(browser, "top").splitlines()]
        assert len(places) == 10
        assert set(places) <= ({"row", "newline"} if name == "next" else {"query"})
        assert browser.requested()[before:] == [page.as_uri()]
    assert browser.complaints() == []


def canvas(browser: Browser, name: str) -> str:
    return str(browser.run(f"document.querySelector('#{name} canvas').toDataURL()"))


def slide(browser: Browser, step: int) -> None:
    browser.run(
        f"document.querySelector('#slider').value = {step};"
        "document.querySelector('#slider').dispatchEvent(new Event('input'))"
    )


def point_at(browser: Browser, name: str, row: int, column: int) -> None:
    """Move the mouse over a cell of the first grid; the picture of SHAPE has 4 x 4."""
    browser.run(
        f"""(() => {{
            const canvas = document.querySelector('#{name} canvas');
            const box = canvas.getBoundingClientRect(), cell = box.width / 4;
            const clientX = box.left + ({column} + 0.5) * cell;
            const clientY = box.top + ({row} + 0.5) * cell;
            canvas.dispatchEvent(new MouseEvent('mousemove', {{ clientX, clientY }}));
        }})()"""
    )


def choose(browser: Browser, name: str, value: int) -> None:
    browser.run(
        f"document.querySelector('#{name}').value = {value};"
        f"document.querySelector('#{name}').dispatchEvent(new Event('change'))"
    )


# -- pictures that are looked at sideways ---------------------------------------------------------


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
