"""The attention page in a real browser."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.browser import Browser
from bench.common import ROOT
from bench.qwen_checkpoint import QwenShape, write_qwen
from engine.engine import Engine
from engine.insight.page import mean_over_layers, stream_with_page
from engine.insight.recorder import Recorder
from engine.result import Result
from tests.next_checkpoints import write_next
from tests.noise import noise
from tests.written_page import CACHE, HOSTILE, SHAPE, answer, data_in


@pytest.fixture(scope="module")
def engine(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(SHAPE, "hub", "float32", CACHE)


@pytest.fixture(scope="module")
def written(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("page") / "page.html"
    return path, answer(engine, path, HOSTILE)


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
