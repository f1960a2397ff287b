"""Servers on a cluster: what is refused without one; slowly, two that answer and are replaced."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from engine.app.cli import main

ASK = {
    "max_tokens": 16,
    "messages": [{"role": "user", "content": [{"type": "text", "text": "What colour is it?"}]}],
}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicas", "2"], "--replicas is 2"),
        (["--replicas", "0", "--ray", "local"], "--replicas is 0"),
        (["--port", "0", "--ray", "local"], "--port is 0"),
        (["--ray", "local"], 'install it: pip install "ray[serve]"'),
    ],
)
def test_what_replicas_need(
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", *flags]) == 2
    assert said in capsys.readouterr().err


def answered(port: int, **headers: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as models:
        name = json.load(models)["data"][0]["id"]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(ASK | {"model": name}).encode(),
        {"content-type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def replicas() -> list[int]:
    """Processes that Ray calls replicas."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::ServeReplica:avl"):
            found.append(int(entry.name))
    return found


@pytest.mark.slow(reason="needs the package ray, and starts a cluster")
def test_two_servers_answer_and_one_that_dies_is_replaced() -> None:
    pytest.importorskip("ray.serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "serve", "--ray", "local", "--replicas", "2"]
    server = subprocess.Popen([*command, "--threads", "1", "--port", str(port)])
    try:
        wait(lambda: answered(port))
        first, again = (answered(port, **{"x-session-id": "7"}) for _ in range(2))
        assert first["choices"] == again["choices"]
        old = replicas()
        assert len(old) == 2
        os.kill(old[0], signal.SIGKILL)
        wait(lambda: len(set(replicas()) - set(old)) == 1 and len(replicas()) == 2)
        for session in "abcdef":
            assert answered(port, **{"x-session-id": session})["choices"] == first["choices"]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert server.returncode == 0


def wait(ready: Any, seconds: float = 120) -> None:
    """Until it is true and nothing is refused."""
    end = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        assert time.monotonic() < end
        time.sleep(0.5)
