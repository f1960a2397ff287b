"""A headless Chromium, driven through its debugging pipe with the standard library alone.

python main.py --image examples/scene.jpg --prompt "Describe the picture in detail." \\
    --attention page.html
python -m bench.browser page.html docs/attention.png --token 21
"""

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-default-apps",
    "--no-default-browser-check",
    "--metrics-recording-only",
    "--remote-debugging-pipe",
]


def find_chromium() -> str | None:
    """Where the browser lies, if anywhere."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in a browser of its own; ``events`` are all that it reported."""

    def __init__(self, program: str, profile: Path, width: int = 1280, height: int = 1150) -> None:
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        # The browser takes commands on descriptor 3 and answers on 4.
        script = f'exec "$0" "$@" 3</dev/fd/{read_there} 4>/dev/fd/{write_there}'
        size = f"--window-size={width},{height}"
        self._process = subprocess.Popen(
            ["sh", "-c", script, program, *FLAGS, size, f"--user-data-dir={profile}"],
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self._read, self._write, self._left = read_here, write_here, b""
        self._number, self._session = 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Run a command of the debugging protocol and wait for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._read], [], [], 60)
            chunk = os.read(self._read, 1 << 20) if ready else b""
            assert chunk, "the browser does not answer"
            self._left += chunk
        message, self._left = self._left.split(b"\0", 1)
        return dict(json.loads(message))

    def run(self, script: str) -> Any:
        """The value of a script, promises awaited."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, place: Path | str) -> None:
        """Go to a file or an address and wait until it says that it is ready."""
        self.call("Page.navigate", url=place.as_uri() if isinstance(place, Path) else place)
        for _ in range(300):
            if self.run("document.body && document.body.dataset.ready") == "yes":
                return
            time.sleep(0.1)
        raise AssertionError(f"the page is not ready: {self.complaints()}")

    def press(self, key: str) -> None:
        """Press and release a key such as ArrowRight."""
        code = "Space" if key == " " else key
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code)

    def complaints(self) -> list[dict[str, Any]]:
        """Errors, warnings and console output so far."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in kinds]

    def requested(self) -> list[str]:
        """Addresses that were asked for; data inside the page is no request."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        """Save what the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(30)
        os.close(self._read)
        os.close(self._write)


def shrink(path: Path) -> None:
    """Rewrite a PNG in 256 colours of its own: a third of the size, and it looks the same."""
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def main() -> None:
    """Save a picture of an attention page."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("page", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--token", type=int, default=1, help="which token is shown, from 1")
    options = parser.parse_args()
    program = find_chromium()
    if program is None:
        sys.exit("error: no Chromium here\nhint: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, Path(profile), height=1240)
        try:
            browser.open(options.page.resolve())
            browser.run(f"document.body.style.overflow = 'hidden'; go({options.token - 1})")
            browser.screenshot(options.output)
            shrink(options.output)
        finally:
            browser.close()


if __name__ == "__main__":
    main()
