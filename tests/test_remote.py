"""Pictures from URLs: what is fetched, and every guard that must hold before and while it is."""

import base64
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Thread

import pytest
from PIL import Image

from engine.errors import ImageError
from engine.pictures import remote
from engine.pictures.data_url import decode_data
from engine.pictures.image import MAX_PIXELS
from engine.pictures.remote import fetch, is_public, open_picture

PUBLIC = "93.184.216.34"


def png() -> bytes:
    stream = BytesIO()
    Image.new("RGB", (6, 4), (200, 10, 30)).save(stream, "PNG")
    return stream.getvalue()


# -- data: URLs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "DATA:;base64,", "data:x/y;a=b;BASE64,"]
)
def test_a_data_url_is_the_picture(head: str) -> None:
    url = head + base64.b64encode(png()).decode()
    picture = open_picture(url, MAX_PIXELS, allow_url=False)
    assert picture.pixels.size == (6, 4)
    assert picture.pixels.getpixel((0, 0)) == (200, 10, 30)


def test_percent_encoding_and_line_breaks_are_read() -> None:
    encoded = base64.b64encode(png()).decode()
    broken = "%0A".join(encoded[at : at + 20] for at in range(0, len(encoded), 20))
    assert decode_data("data:image/png;base64," + broken.replace("+", "%2B")) == png()
    assert decode_data("data:,a%20b") == b"a b"


@pytest.mark.parametrize(
    "url", ["data:image/png;base64", "data:image/png;base64,@@@@" + "A" * 500, "data:;base64,AAA"]
)
def test_a_malformed_data_url_is_quoted_briefly(url: str) -> None:
    with pytest.raises(ImageError) as caught:
        open_picture(url, MAX_PIXELS, allow_url=False)
    message = str(caught.value)
    assert url[:16] in message
    assert url[41:60] not in message or len(url) <= 41
    assert len(message) < 140


def test_a_data_url_of_something_else_or_too_much_is_refused() -> None:
    with pytest.raises(ImageError, match="too short to be an image"):
        open_picture("data:,hello", MAX_PIXELS, allow_url=False)
    with pytest.raises(ImageError, match="more than 20,000,000 bytes"):
        decode_data("data:;base64," + "A" * 27_000_000)


def test_max_pixels_holds_for_addresses() -> None:
    url = "data:;base64," + base64.b64encode(png()).decode()
    assert open_picture(url, 24, allow_url=False).pixels.size == (6, 4)
    with pytest.raises(ImageError, match="at most 23 are read"):
        open_picture(url, 23, allow_url=False)


# -- guards before a request ----------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(remote, "_connect", refuse)


@pytest.mark.parametrize("url", ["https://example.com/a.png", "HTTP://example.com/a.png"])
def test_urls_are_not_fetched_unless_allowed(url: str, no_network: None) -> None:
    with pytest.raises(ImageError, match="not fetched by default") as caught:
        open_picture(url, MAX_PIXELS, allow_url=False)
    assert "--allow-url" in caught.value.hint


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/a.png", "not an https URL"),
        ("https:///a.png", "not an https URL"),
        ("https://example.com:99999/", "not an https URL"),
        ("https://exam ple.com/", "not an https URL"),
        ("https://a\r\nHost: b/", "not an https URL"),
        ("https://user:secret@example.com/", "holds a user name"),
        ("https://127.0.0.1/a.png", "127.0.0.1, which is not a public address"),
        ("https://169.254.169.254/latest/meta-data", "not a public address"),
        ("https://10.1.2.3/", "not a public address"),
        ("https://[::1]/", "not a public address"),
        ("https://[::ffff:192.168.0.1]/", "not a public address"),
        ("https://2130706433/", "not a public address"),
        ("https://localhost/", "not a public address"),
    ],
)
def test_bad_urls_are_refused_without_a_request(url: str, reason: str, no_network: None) -> None:
    with pytest.raises(ImageError, match=reason):
        open_picture(url, MAX_PIXELS, allow_url=True)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("0.0.0.0", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("192.0.2.1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("64:ff9b::a00:1", False),  # NAT64 of 10.0.0.1
        ("2002:a00:1::", False),  # 6to4 of 10.0.0.1
        ("nonsense", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def resolves_to(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> None:
    def look_up(host: str, port: int, *_: object, **__: object) -> list[object]:
        found = names.get(host, [host])
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_a_name_that_resolves_inwards_is_refused(
    monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    resolves_to(monkeypatch, {"sneaky.example": [PUBLIC, "10.0.0.5"]})
    with pytest.raises(ImageError, match=r"leads to 10\.0\.0\.5"):
        fetch("https://sneaky.example/a.png")


# -- a server -------------------------------------------------------------------------------------


class Pictures(BaseHTTPRequestHandler):
    """Serves a picture, redirects, and every kind of trouble."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name, _, rest = self.path[1:].partition("/")
        if name == "hop":
            left = int(rest)
            self.reply(302, b"", {"Location": f"/hop/{left - 1}" if left else "/a.png"})
        elif name == "inwards":
            self.reply(301, b"", {"Location": "https://inside.example/secret"})
        elif name == "plain":
            self.reply(301, b"", {"Location": "http://pictures.example/a.png"})
        elif name == "huge":
            self.reply(200, b"x" * (remote.MAX_BYTES + 1))
        elif name == "short":
            self.reply(200, png()[:20], {"Content-Length": str(len(png()))})
        elif name == "missing":
            self.reply(404, b"no")
        elif name == "slow":
            self.trickle()
        else:
            self.reply(200, png())

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def trickle(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.05)


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """A server that stands for public hosts; yields the (host, address) of every connection."""
    server = Quiet(("127.0.0.1", 0), Pictures)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    connections: list[tuple[str, str]] = []

    def connect(host: str, port: int, address: str, seconds: float) -> HTTPConnection:
        connections.append((host, address))
        connection = HTTPConnection(*server.server_address[:2], timeout=seconds)
        connection.connect()
        return connection

    resolves_to(monkeypatch, {"pictures.example": [PUBLIC], "inside.example": ["192.168.1.1"]})
    monkeypatch.setattr(remote, "_connect", connect)
    yield connections
    server.shutdown()
    server.server_close()


def test_a_picture_is_fetched_from_the_address_that_was_checked(
    asked: list[tuple[str, str]],
) -> None:
    picture = open_picture("https://pictures.example/a.png?x=1", MAX_PIXELS, allow_url=True)
    assert picture.pixels.size == (6, 4)
    assert asked == [("pictures.example", PUBLIC)]


def test_three_redirects_are_followed_and_not_four(asked: list[tuple[str, str]]) -> None:
    assert fetch("https://pictures.example/hop/2") == png()
    assert len(asked) == 4
    with pytest.raises(ImageError, match="more than 3 redirects"):
        fetch("https://pictures.example/hop/3")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("inwards", r"leads to 192\.168\.1\.1"),
        ("plain", "not an https URL"),
        ("huge", "larger than 20 MB"),
        ("short", "the connection broke|cannot be fetched"),
        ("missing", "the server answers 404"),
    ],
)
def test_trouble_is_refused(path: str, reason: str, asked: list[tuple[str, str]]) -> None:
    with pytest.raises(ImageError, match=reason):
        fetch(f"https://pictures.example/{path}")
    assert asked == [("pictures.example", PUBLIC)]


def test_a_server_that_trickles_meets_the_deadline(
    asked: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SECONDS", 0.4)
    began = time.monotonic()
    with pytest.raises(ImageError, match="did not arrive within"):
        fetch("https://pictures.example/slow")
    assert time.monotonic() - began < 3
