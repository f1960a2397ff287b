"""What has been done to such servers, tried on this one: each is refused, and the next is answered.

The cases are published ones, of other servers: their numbers stand beside the tests.
"""

from __future__ import annotations

import base64
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from engine.engine import Engine
from engine.pictures import remote
from tests.noise import noise

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")

from engine.serving import streaming  # noqa: E402
from tests.served import KEY, SHAPE, asked, data_url, post, serving, settled  # noqa: E402

ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def engine(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(SHAPE)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Any]:
    hosts = frozenset({"pictures.example"})
    with serving(engine, keys=(KEY,), hosts=hosts, origins=(ORIGIN,)) as running:
        yield running


@pytest.fixture(autouse=True)
def still_answers(server: Any) -> Iterator[None]:
    """Whatever a test has done to the server."""
    yield
    assert post(server, {"messages": asked("hi"), "max_tokens": 1}).status_code == 200


def spoken(server: Any, request: bytes, most: int = 1 << 16) -> bytes:
    """What the server answers to bytes on a connection, up to its end or a second of silence."""
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=20) as connection:
        with contextlib.suppress(OSError):  # it has hung up
            connection.sendall(request)
        connection.settimeout(1)
        said = b""
        try:
            while len(said) < most and (more := connection.recv(4096)):
                said += more
        except OSError:
            pass
    return said


def refusal(server: Any, url: str) -> str:
    answer = post(server, {"messages": asked("hi", url), "max_tokens": 1})
    assert answer.status_code == 400
    message: str = answer.json()["error"]["message"]
    assert "\n" not in message
    return message


# -- fetching for strangers (CVE-2025-6242 and its followers) --------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example/a.png",
        "https://other.example/a.png",
        "https://pictures.example:22/a.png",
        "https://pictures.example.evil.example/a.png",
        "https://pictures.example@evil.example/a.png",
        "https://me:word@pictures.example/a.png",
        "https://127.0.0.1/a.png",
        "https://[::1]/a.png",
        "file:///etc/passwd",
        "ftp://pictures.example/a.png",
    ],
)
def test_nothing_is_fetched_but_from_named_hosts(
    server: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_connection(*_: Any) -> Any:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(remote, "_connect", no_connection)
    monkeypatch.setattr(remote, "_resolve", lambda *_: ["93.184.215.14"])
    assert "AssertionError" not in refusal(server, url)


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "127.0.0.1", "::ffff:10.0.0.1"])
def test_a_named_host_must_lie_outside(
    server: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One public address among those of the name is not enough."""
    monkeypatch.setattr(remote, "_resolve", lambda *_: ["93.184.215.14", address])
    assert "not a public address" in refusal(server, "https://pictures.example/a.png")


@pytest.mark.parametrize(
    "place", ["https://10.0.0.1/x", "http://pictures.example/x", "https://pictures.example:8443/x"]
)
def test_redirects_are_checked_like_the_first_address(
    server: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def redirecting(url: str, deadline: float) -> str:
        seen.append(url)
        return place

    monkeypatch.setattr(remote, "_ask", redirecting)
    refusal(server, "https://pictures.example/a.png")
    assert seen == ["https://pictures.example/a.png"]


# -- pictures (CVE-2026-22778, pixel bombs) --------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(100),
        b"\xff\x4f\xff\x51" + bytes(100),
        b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(100),
        b"\x00\x00\x00\x18ftypmp42" + bytes(100),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
    ids=["jpeg-2000", "jpeg-2000-stream", "postscript", "video", "svg"],
)
def test_only_well_known_kinds_are_decoded(server: Any, data: bytes) -> None:
    """And nothing of the memory they were in is told."""
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    assert "0x" not in refusal(server, url)


def test_the_key_is_asked_for_before_the_body_is_read(server: Any) -> None:
    """The answer comes though the body never does."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    said = spoken(server, head + b"content-length: 1000000\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 401 ")


# -- heads of requests (CVE-2025-48956, CVE-2026-48710) --------------------------------------------


def test_endless_headers_end(server: Any) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: x\r\n"
    said = spoken(server, head + b"x: " + b"y" * 300_000)
    assert not said or said.startswith(b"HTTP/1.1 4")
    many = b"".join(b"x-%d: y\r\n" % number for number in range(30_000))
    said = spoken(server, head + many + b"\r\n")
    assert not said or said.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("host", ["x/health?", "x/health#", "/health", "x\t/"])
def test_a_strange_host_opens_no_door(server: Any, host: str) -> None:
    request = f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
    assert spoken(server, request.encode()).split(b" ")[1] in (b"401", b"400")


@pytest.mark.parametrize("path", ["//", "/health/../v1/models", "/v1/models?x=/health", "/%2e"])
def test_a_strange_path_opens_no_door(server: Any, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert spoken(server, request.encode()).startswith(b"HTTP/1.1 401 ")


# -- pages of other origins ------------------------------------------------------------------------


def test_pages_of_other_origins_may_not_ask(engine: Engine, server: Any) -> None:
    def allowed(there: Any, origin: str) -> str | None:
        asks = {"origin": origin, "access-control-request-method": "POST"}
        asks["access-control-request-headers"] = "content-type"
        url = f"{there.url}/v1/chat/completions"
        answer = httpx.options(url, headers=asks)
        found: str | None = answer.headers.get("access-control-allow-origin")
        return found if answer.status_code == 200 else None

    assert allowed(server, ORIGIN) == ORIGIN
    assert allowed(server, "https://evil.example") is None
    with serving(engine) as closed:
        assert allowed(closed, ORIGIN) is None
        # What a page may send without asking is no JSON.
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            answer = post(closed, {"messages": asked("hi")}, headers={"content-type": kind})
            assert answer.status_code == 415


# -- what others have asked (CVE-2025-46570) -------------------------------------------------------


def test_features_of_pictures_are_kept_by_key(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long a first token takes does not tell that others have sent the picture."""
    towers: list[int] = []
    encode = engine.model.encode

    def counted(pictures: Any) -> Any:
        towers.append(len(pictures))
        return encode(pictures)

    monkeypatch.setattr(engine.model, "encode", counted)
    body = {"messages": asked("What?", data_url(77)), "max_tokens": 1, "cache": "avl:floor=4"}
    with serving(engine, keys=(KEY, "other")) as shared:
        for key in (KEY, "other", KEY, "other"):
            assert post(shared, body, headers={"authorization": f"Bearer {key}"}).is_success
    assert towers == [1, 1]


def test_the_same_bytes_in_another_shape_are_another_picture(engine: Engine, server: Any) -> None:
    from io import BytesIO

    from PIL import Image

    pixels = noise(60, 20, 5).tobytes()
    for size in ((60, 20), (20, 60)):
        picture = Image.frombytes("RGB", size, pixels)
        file = BytesIO()
        picture.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        body = {"messages": asked("What?", url), "max_tokens": 8, "ignore_eos": True}
        alone = engine.with_cache("full").generate(
            "What?", [picture], max_new_tokens=8, ignore_eos=True
        )
        answer = post(server, body | {"cache": "full"}).json()
        assert answer["choices"][0]["message"]["content"] == alone.text


# -- slow, silent and many -------------------------------------------------------------------------


def reading_nothing(server: Any, body: bytes) -> socket.socket:
    """A connection that has asked for a stream and takes nothing of it."""
    place = urlsplit(server.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((place.hostname, place.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_who_takes_nothing_is_dropped(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PATIENCE", 0.3)
    body = b'{"messages": [{"role": "user", "content": "A story."}], "max_tokens": 1900, '
    body += b'"ignore_eos": true, "stream": true, "logprobs": true, "top_logprobs": 20, "n": 4}'
    with reading_nothing(server, body) as connection:
        while not server.worker.now()["requests_running"]:
            time.sleep(0.01)
        settled(server)
        connection.settimeout(5)
        taken = b""
        try:
            while more := connection.recv(1 << 16):
                taken += more
        except OSError:  # hung up
            pass
    assert b"[DONE]" not in taken


def test_silence_is_filled_with_comments(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.running.scheduler import Scheduler

    step = Scheduler.step

    def slow(self: Scheduler) -> Any:
        time.sleep(0.2)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slow)
    monkeypatch.setattr(streaming, "SILENCE", 0.05)
    body = {"messages": asked("hi"), "max_tokens": 12, "ignore_eos": True, "stream": True}
    text = post(server, body).text
    assert ": waiting\n\n" in text
    assert text.endswith("data: [DONE]\n\n")


def test_idle_connections_take_no_places(server: Any) -> None:
    place = urlsplit(server.url)
    idle = [socket.create_connection((place.hostname, place.port)) for _ in range(200)]
    try:
        assert post(server, {"messages": asked("hi"), "max_tokens": 1}).status_code == 200
    finally:
        for connection in idle:
            connection.close()
