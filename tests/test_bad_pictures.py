"""Bad and odd pictures, rows 1 to 23 of the table of bad inputs: exit code 3 or the right pixels.

A picture that is refused costs less than half a second and 100 MB, from a process that never
imports torch. One that is accepted is compared with a plain picture of the pixels that the model
should see: the same log-probabilities, to the last bit.
"""

import errno
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from engine.engine import Engine
from engine.errors import EngineError, ImageError
from engine.pictures import remote
from engine.pictures.image import open_image
from tests.asking import Ask, refused
from tests.checkpoints import Shape, write_llava
from tests.noise import noise

ROOT = Path(__file__).parents[1]
HTML = b"<!DOCTYPE html><html><body>Not found</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(layers=2, vision_layers=2, context=400)
    return write_llava(tmp_path_factory.mktemp("good") / "model", shape)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def plain(width: int, height: int, mode: str = "RGB") -> bytes:
    return encoded(Image.new(mode, (width, height)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A one-bit PNG of a few kilobytes; whoever decodes it takes width x height / 8 bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    packer, row = zlib.compressobj(9), bytes(1 + width // 8)
    rows = min(height, 18_000_000 // len(row))
    packed = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


GOOD = encoded(noise(24, 18))
JPEG = encoded(noise(64, 48), "JPEG")


def with_chunk(data: bytes) -> bytes:
    """The good PNG with one more chunk behind its header."""
    return GOOD[:33] + data + GOOD[33:]


def flipped(at: int) -> bytes:
    return GOOD[:at] + bytes([GOOD[at] ^ 4]) + GOOD[at + 1 :]


# -- refused --------------------------------------------------------------------------------------

DATA = GOOD.index(b"IDAT")
REFUSED: dict[str, tuple[bytes, str]] = {
    "row03-empty": (b"", "empty (0 bytes)"),
    "row03-one byte": (b"\x89", "too short to be an image (1 bytes)"),
    "row03-five bytes": (b"\x89PNG\r", "too short to be an image (5 bytes)"),
    "row04-text": (b"just words, no picture at all", "is text"),
    "row04-web page": (HTML, "a web page"),
    "row04-LFS pointer": (POINTER, "Git LFS pointer"),
    "row06-truncated PNG": (GOOD[:-20], "truncated"),
    "row06-truncated JPEG": (JPEG[: len(JPEG) // 2], "a truncated JPEG file"),
    "row07-flipped bit": (flipped(DATA + 6), "damaged"),
    "row07-wrong checksum": (flipped(GOOD.index(b"IEND") - 6), "damaged"),
    "row08-bomb of 144 MP": (bomb(12_000, 12_000), "12000 x 12000 = 144,000,000 pixels"),
    "row08-bomb of 65,500 squared": (bomb(65_500, 65_500), "has 4,290,250,000 pixels; at most"),
    "row09-no side": (bomb(0, 10), "PNG"),
    "row11-32-bit grey": (encoded(Image.new("I", (9, 9), 7), "TIFF"), "32-bit grey"),
    "row11-float beyond 1": (encoded(Image.new("F", (9, 9), 7.0), "TIFF"), "from 7 to 7"),
    "row16-PDF": (b"%PDF-1.7\n" + bytes(200), "a PDF document"),
    "row16-HEIC": (b"\0\0\0\x18ftypheic" + bytes(200), "HEI"),
    "row16-AVIF": (b"\0\0\0\x18ftypavif" + bytes(200), "AVIF"),
    "row16-SVG": (b"<svg xmlns='x'></svg>" + b" " * 50, "an SVG drawing"),
    "row16-PSD": (b"8BPS\0\x01" + bytes(200), "a Photoshop file"),
    "row16-FITS": (b"SIMPLE  =                    T" + bytes(200), "a FITS file"),
    "row18-huge text": (
        with_chunk(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20), 1))),
        "damaged or unsupported PNG",
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_bad_picture(row: str, ask: Ask, tmp_path: Path) -> None:
    content, words = REFUSED[row]
    path = tmp_path / "car.jpg"
    path.write_bytes(content)
    asked = ask("--image", path, "--prompt", "What?", "--model", "nowhere")
    refused(asked, 3, str(path), words)
    assert ("convert it first: " in asked.hints[0]) == row.startswith("row16")
    assert asked.seconds < 0.5


def test_row01_a_typo_names_the_nearest_file(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "car.jpg").write_bytes(GOOD)
    asked = ask("--image", tmp_path / "cat.jpg", "--prompt", "What?")
    refused(asked, 3, "cat.jpg does not exist", f"did you mean {tmp_path}/car.jpg?")


def test_row02_only_regular_files_are_opened(ask: Ask, tmp_path: Path) -> None:
    """Opening the pipe would wait for ever."""
    refused(ask("--image", tmp_path, "--prompt", "What?"), 3, "is a folder")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        refused(ask("--image", path, "--prompt", "What?"), 3, "not a regular file")


def test_row19_names_are_printed_escaped_on_one_line(ask: Ask, tmp_path: Path) -> None:
    name = tmp_path / "a\nb\x1b[31m\u202e.jpg"
    asked = ask("--image", name, "--prompt", "What?")
    refused(asked, 3, "a\\nb\\x1b[31m\\u202e.jpg does not exist")
    name.write_bytes(HTML)
    refused(ask("--image", name, "--prompt", "What?"), 3, "is a web page")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"x" * 30])
def test_row21_standard_input_without_a_picture(
    content: bytes, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    refused(ask("--image", "-", "--prompt", "What?"), 3, "stdin is ")


@pytest.mark.parametrize("allowed", [(), ("--allow-url",)])
@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/a.png",
        "https://169.254.169.254/a.png",
        "https://10.0.0.1/a.png",
        "https://[::1]/a.png",
        "file:///etc/passwd",
    ],
)
def test_row22_addresses_are_refused_without_a_request(
    url: str, allowed: tuple[str, ...], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket", no_network)
    refused(ask("--image", url, "--prompt", "What?", *allowed), 3, url)


class Redirecting:
    """A connection to a server that answers every request with a redirect."""

    sock, status, length = None, 302, 0

    def __init__(self, target: str) -> None:
        self.target = target

    def request(self, *_: object, **__: object) -> None:
        pass

    def getresponse(self) -> "Redirecting":
        return self

    def getheader(self, _: str) -> str:
        return self.target

    def close(self) -> None:
        pass


@pytest.mark.parametrize("target", ["https://10.0.0.1/x", "http://8.8.8.8/x", "file:///etc/passwd"])
def test_row22_a_redirect_inwards_is_not_followed(
    target: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def connect(host: str, *_: object) -> Redirecting:
        asked.append(host)
        return Redirecting(target)

    monkeypatch.setattr(remote, "_connect", connect)
    refused(ask("--image", "https://8.8.8.8/a.png", "-p", "What?", "--allow-url"), 3, target)
    assert asked == ["8.8.8.8"]


def test_row22_a_resolver_that_sleeps_meets_the_deadline(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken = threading.Event()
    monkeypatch.setattr(remote, "SECONDS", 0.3)

    def sleep(*_: object, **__: object) -> list[object]:
        woken.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", sleep)
    began = time.monotonic()
    asked = ask("--image", "https://slow.example/a.png", "-p", "What?", "--allow-url")
    assert time.monotonic() - began < 5
    woken.set()
    refused(asked, 3, "slow.example", "did not arrive within")


@pytest.mark.parametrize("url", ["data:image/png;base64,%%%", "data:image/png;base64", "data:;b"])
def test_row23_malformed_data_is_cut(url: str, ask: Ask) -> None:
    asked = ask("--image", url + "A" * 5000, "--prompt", "What?")
    refused(asked, 3, "data:")
    assert "A" * 41 not in asked.err, asked.err


# -- refused fast, in little memory ---------------------------------------------------------------

# The peak is VmHWM: what getrusage says begins with the parent's size at the fork.
EACH = """
import json, sys, time
from engine.app.cli import main
found, began = {}, 0.0  # the first one pays for the imports
for row, arguments in json.load(sys.stdin).items():
    code = main(arguments)
    found[row] = code, time.process_time() - began
    began = time.process_time()
assert "torch" not in sys.modules
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([found, int(peak.split()[1]) / 1e3]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_row08_every_bad_picture_costs_little_time_and_memory(tmp_path: Path) -> None:
    rows = {"row01-missing": ["--image", str(tmp_path / "nowhere.png"), "-p", "What?"]}
    for number, (row, (content, _)) in enumerate(REFUSED.items()):
        (tmp_path / f"{number}.png").write_bytes(content)
        rows[row] = ["--image", str(tmp_path / f"{number}.png"), "-p", "What?"]
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        cwd=ROOT,
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        check=True,
    )
    found, megabytes = json.loads(done.stdout)
    assert found.keys() == rows.keys()
    assert {code for code, _ in found.values()} == {3}
    assert max(seconds for _, seconds in found.values()) < 1, found  # 0.25 on a quiet machine
    assert megabytes < 100
    assert done.stderr.count("error: ") == done.stderr.count("hint: ") == len(rows)


# -- accepted -------------------------------------------------------------------------------------

PICTURE = noise(24, 18)


def exif(orientation: int) -> bytes:
    made = Image.Exif()
    made[0x0112] = orientation
    return made.tobytes()


# EXIF orientation: what was done to the upright picture before it was stored.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(orientation: int) -> bytes:
    method = STORED[orientation]
    turned = PICTURE if method is None else PICTURE.transpose(method)
    return encoded(turned, exif=exif(orientation))


def solid(colour: Any, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (20, 20), colour)


def halves(left: Any, right: Any, mode: str) -> Image.Image:
    """A picture of two colours, so that a lost channel cannot hide."""
    image = Image.new(mode, (20, 20), left)
    image.paste(right, (10, 0, 20, 20))
    return image


def palette() -> bytes:
    image = Image.new("P", (20, 20), 0)
    image.putpalette([9, 9, 9, 0, 0, 255])
    image.paste(1, (10, 0, 20, 20))
    return encoded(image, transparency=0)


WIDE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
FRAMES = [solid((0, 0, 255)), solid((0, 255, 0))]
WHITE_BLUE = halves((255, 255, 255), (0, 0, 255), "RGB")

# Name: what is given, the pixels that the model should see, and a word of the note ("" for none).
ACCEPTED: dict[str, tuple[bytes, Image.Image, str]] = {
    "row05-wrong extension": (encoded(PICTURE, "WEBP", lossless=True), PICTURE, ""),
    "row09-one pixel": (plain(1, 1), Image.new("RGB", (1, 1)), ""),
    "row09-thin": (plain(1, 300), Image.new("RGB", (1, 300)), ""),
    "row09-flat": (plain(300, 1), Image.new("RGB", (300, 1)), ""),
    "row09-20,000 x 1": (plain(20_000, 1), Image.new("RGB", (20_000, 1)), ""),
    "row10-RGBA": (
        encoded(halves((9, 9, 9, 0), (0, 0, 255, 255), "RGBA")),
        WHITE_BLUE,
        "transparent",
    ),
    "row10-LA": (
        encoded(halves((9, 0), (77, 255), "LA")),
        halves((255,) * 3, (77,) * 3, "RGB"),
        "transparent",
    ),
    "row10-P": (palette(), WHITE_BLUE, "transparent"),
    "row11-16-bit": (encoded(solid(257 * 50, "I;16")), solid((50, 50, 50)), "16-bit"),
    "row11-float": (encoded(solid(0.2, "F"), "TIFF"), solid((51, 51, 51)), "float"),
    "row12-CMYK": (
        encoded(halves((255, 0, 0, 0), (0, 255, 0, 0), "CMYK"), "TIFF"),
        halves((0, 255, 255), (255, 0, 255), "RGB"),
        "",
    ),
    "row12-CMYK that Adobe inverts": (  # white has no frequencies: the JPEG is exact
        encoded(solid((0, 0, 0, 0), "CMYK"), "JPEG", quality=100),
        solid((255, 255, 255)),
        "",
    ),
    "row13-grey": (encoded(PICTURE.convert("L")), PICTURE.convert("L").convert("RGB"), ""),
    "row13-one bit": (encoded(PICTURE.convert("1")), PICTURE.convert("1").convert("RGB"), ""),
    **{f"row14-orientation {n}": (stored(n), PICTURE, "") for n in STORED},
    "row14-broken EXIF": (encoded(PICTURE, exif=b"Exif\0\0" + b"\xff" * 9), PICTURE, "EXIF"),
    **{
        f"row15-{kind}": (
            encoded(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:], **options),
            FRAMES[0],
            "2 frames",
        )
        for kind, options in {"GIF": {}, "WEBP": {"lossless": True}, "TIFF": {}}.items()
    },
    "row17-ICC profile": (encoded(PICTURE, icc_profile=WIDE), PICTURE, ""),
    "row17-gamma chunk": (with_chunk(chunk(b"gAMA", struct.pack(">I", 99_999))), PICTURE, ""),
}


def seen(ask: Ask, model: Path, path: Path) -> tuple[list[float], str]:
    """How likely the model finds its answer, which tells two pictures apart; and the notes."""
    flags = ["-p", "What?", "-m", model, "-n", "3", "--cache", "full", "--device", "cpu"]
    asked = ask("--image", path, *flags, "--json", "--logprobs")
    assert asked.code == 0, asked.err
    assert not asked.errors
    return json.loads(asked.out)["logprobs"], asked.err


@pytest.mark.parametrize("row", ACCEPTED)
def test_odd_picture_is_seen_as_it_should_be(
    row: str, ask: Ask, model: Path, tmp_path: Path
) -> None:
    content, pixels, note = ACCEPTED[row]
    path = tmp_path / "car.jpg"
    path.write_bytes(content)
    pixels.save(tmp_path / "plain.png")
    found, notes = seen(ask, model, path)
    assert found == seen(ask, model, tmp_path / "plain.png")[0]
    assert (f"note: {path}" in notes and note in notes) if note else not notes
    noise(24, 18, seed=5).save(tmp_path / "other.png")
    assert found != seen(ask, model, tmp_path / "other.png")[0]


@pytest.mark.parametrize("name", [b"caf\xe9 \xff.png", "\U0001f600 漢.png".encode(), b"a\nb.png"])
def test_row19_any_name_works(name: bytes, ask: Ask, model: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(encoded(Image.new("RGBA", (9, 9))))  # transparent, so that a note names it
    notes = seen(ask, model, path)[1]
    assert notes.count("\n") == notes.count("note: ") == 1
    assert notes.rstrip("\n").isprintable()


def test_row20_the_same_picture_twice_and_twenty_pictures(
    ask: Ask, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(GOOD)
    rest = ["--prompt", "What?", "--model", model, "-n", "2", "--device", "cpu"]
    assert ask("--image", path, "--image", path, *rest).code == 0
    assert ask(*["--image", path] * 20, *rest).code == 0
    refused(ask(*["--image", path] * 25, *rest), 5, "400 image", "context of 400")


# -- the decoders' own dangers --------------------------------------------------------------------


def test_pillow_is_new_enough_and_reaches_eight_decoders_only() -> None:
    from importlib.metadata import version

    from engine.pictures.image import _DECODERS
    from engine.pictures.sniff import _BRANDS, FORMATS

    assert tuple(map(int, version("pillow").split(".")[:2])) >= (12, 2)
    assert set(FORMATS) == {"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"}
    assert {name for name, _ in _BRANDS} == {"AVIF", "HEIF"}
    assert set(_DECODERS) < {*FORMATS, "AVIF", "HEIF"}


@pytest.mark.parametrize(
    "error",
    [OSError, SyntaxError, ValueError, MemoryError, struct.error, Image.DecompressionBombError],
)
def test_pillow_may_raise_what_it_likes(
    error: type[Exception], ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("cannot identify image file <_io.BytesIO object at 0x7f>")

    (tmp_path / "a.png").write_bytes(GOOD)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    refused(ask("--image", tmp_path / "a.png", "--prompt", "What?"), 3, "a.png")


def test_pillow_says_nothing_by_itself(ask: Ask, tmp_path: Path) -> None:
    """A TIFF of 300 samples per pixel is logged by its decoder."""
    content = bytearray(encoded(solid((1, 2, 3)), "TIFF"))
    at = content.index(struct.pack("<HHI", 277, 3, 1))
    content[at + 8 : at + 10] = struct.pack("<H", 300)
    (tmp_path / "a.tiff").write_bytes(content)
    refused(ask("--image", tmp_path / "a.tiff", "--prompt", "What?"), 3, "a.tiff")


VIEW = np.broadcast_to(np.uint8(3), (200_000, 200_000, 3))
ARRAYS: dict[str, tuple[Any, str]] = {
    "on no device": (torch.zeros(4, 4, 3, dtype=torch.uint8, device="meta"), "on meta"),
    "sparse": (torch.ones(4, 4, dtype=torch.uint8).to_sparse(), "torch.sparse_coo on cpu"),
    "a view of one number": (VIEW, "200000 x 200000 = 40,000,000,000 pixels"),
    "a tensor of one number": (torch.ones(1, dtype=torch.uint8).expand(3, 100_000, 100_000), "pix"),
    "a closed picture": (None, "4x4 image is closed"),
    "many of none": ({}, "images are dict"),
    "no values": (SimpleNamespace(shape=(4, 4), dtype="uint8", ndim=2), "images are SimpleN"),
    "without a dimension": (np.array(3), "array of int64 [] is no picture"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_without_pixels_is_refused(case: str, model: Path) -> None:
    given, message = ARRAYS[case]
    if given is None:
        given = Image.new("RGB", (4, 4))
        given.close()
    engine = Engine.load(model, device="cpu")
    with pytest.raises(EngineError) as caught:
        engine.generate("What?", given, max_new_tokens=1)
    assert message in str(caught.value)


def test_a_picture_is_not_blamed_for_what_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(plain(4, 4))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match="cannot be read: Too many open files") as caught:
        open_image(path)
    assert "close some" in caught.value.hint
