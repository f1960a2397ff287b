"""The server's own page, in a real browser: asked by mouse and keyboard, watched, compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench.browser import Browser
from engine.engine import Engine

pytest.importorskip("uvicorn")
pytest.importorskip("httpx2")

from tests.served import KEY, SHAPE, data_url, serving

POLICY = "avl:floor=4,prefill=1"
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def engine(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(SHAPE)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Any]:
    with serving(engine, keys=(KEY,)) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: Any) -> Browser:
    """The page, with a picture and the key in its fields."""
    browser.open(server.url)
    browser.run(f"find('key').value = {KEY!r}; find('tokens').value = 9; null")
    browser.run(picture_script(data_url(4)))
    waited(browser, "picture !== ''")
    return browser


def picture_script(url: str) -> str:
    """Drop a picture: what the page may fetch is its own server's alone."""
    base64 = url.split(",")[1]
    return f"show(new File([bytes({base64!r})], 'a.png', {{ type: 'image/png' }})); null"


def waited(browser: Browser, condition: str) -> None:
    for _ in range(300):
        if browser.run(condition):
            return
        time.sleep(0.05)
    raise AssertionError(f"never: {condition}; {browser.complaints()}")


def done(browser: Browser) -> None:
    waited(browser, "!find('ask').disabled && find('answers').children.length > 0")


def said(browser: Browser, number: int = 0) -> str:
    script = f"find('answers').children[{number}].querySelector('p:not(.told)').textContent"
    return str(browser.run(script))


def alone(engine: Engine, policy: str) -> str:
    """The same request's answer, without a server."""
    asked = engine.with_cache(policy)
    return asked.generate(QUESTION, [data_url(4)], max_new_tokens=9).text


def test_an_answer_is_asked_for_watched_and_compared(
    engine: Engine, server: Any, page: Browser
) -> None:
    assert not page.run("find('other').offsetParent || find('lock').offsetParent")
    page.run("find('policy').value = '?'; find('policy').onchange(); null")
    assert page.run("find('other').offsetParent !== null")
    page.run(f"find('spec').value = {POLICY!r}; find('watch').checked = true; null")
    page.run("find('compare').checked = true; find('ask').click(); null")
    done(page)
    assert page.run("find('answers').children.length") == 2
    assert [said(page, 0), said(page, 1)] == [alone(engine, POLICY), alone(engine, "full")]
    figures = page.run("[...document.querySelectorAll('dd')].map(each => each.textContent)")
    assert figures[0].startswith("avl:")
    told = page.run("document.querySelector('.told').textContent")
    assert told.startswith("Step ")
    assert "are core" in told
    # A patch that was freed in every layer is darker than one that is kept.
    shade = """(number => {
      const mine = boards[0], { spec, canvas } = mine.panels[0];
      const cell = spec.tokens.findIndex(token => mine.now.stored[token] === number);
      if (cell < 0) return null;
      const x = cell % spec.columns * 14 + 7, y = Math.floor(cell / spec.columns) * 14 + 7;
      return [...canvas.getContext('2d').getImageData(x, y, 1, 1).data];
    })"""
    assert sum(page.run(f"{shade}(0)")[:3]) < 300
    before = page.run("boards[0].panels[0].canvas.toDataURL()")
    page.run("find('view').value = 'attention'; find('view').onchange(); null")
    assert page.run("boards[0].panels[0].canvas.toDataURL()") != before
    within = "[...document.querySelectorAll('article')].every(a => a.scrollWidth <= a.clientWidth)"
    assert page.run(within)
    assert all(address.startswith(server.url) for address in page.requested())
    assert page.complaints() == []


def test_it_is_used_by_keyboard_and_read_aloud(engine: Engine, page: Browser) -> None:
    """Every field has a label, answers are announced, and Control and Enter ask."""
    fields = "[...document.querySelectorAll('input, select, textarea')]"
    assert page.run(f"{fields}.every(each => each.labels.length === 1)")
    assert page.run("find('answers').getAttribute('aria-live')") == "polite"
    page.run("find('policy').value = 'full'; find('question').focus(); null")
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 2}
    page.call("Input.dispatchKeyEvent", type="keyDown", **key)
    done(page)
    assert said(page) == alone(engine, "full")


def test_a_wrong_key_is_asked_for(page: Browser) -> None:
    page.run("find('key').value = 'wrong'; find('ask').click(); null")
    done(page)
    assert page.run("find('lock').offsetParent !== null")
    assert "wants an API key" in page.run("document.querySelector('.error').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(page: Browser, scheme: str) -> None:
    size = {"width": 360, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.call("Emulation.setEmulatedMedia", features=features)
    try:
        page.run("find('watch').checked = true; find('compare').checked = true; null")
        page.run("find('policy').value = 'sift'; find('ask').click(); null")
        done(page)
        assert page.run("document.documentElement.scrollWidth") <= 360
        colours = "getComputedStyle(document.body)"
        text, ground = page.run(f"[{colours}.color, {colours}.backgroundColor]")
        assert text != ground
        dark = page.run("matchMedia('(prefers-color-scheme: dark)').matches")
        assert dark == (scheme == "dark")
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
        page.call("Emulation.setEmulatedMedia", features=[])
