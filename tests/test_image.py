"""Opening pictures: every bad input ends in one clear ImageError, every odd one in plain RGB."""

import io
import os
import random
import resource
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import AvifImagePlugin, ExifTags, Image, ImageFile, ImageOps, PngImagePlugin

from engine.errors import ImageError
from engine.naming import display_name
from engine.pictures.image import LoadedImage, open_image

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
LOSSLESS = ["PNG", "BMP", "TIFF"]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def scene(size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture whose four corners differ, so that turning it shows."""
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.paste((255, 0, 0), (0, 0, size[0] // 3, size[1] // 3))
    image.paste((0, 0, 255), (size[0] // 2, 0, size[0], size[1] // 4))
    return image


def pixel(loaded: LoadedImage) -> Any:
    assert loaded.pixels.mode == "RGB"
    return loaded.pixels.getpixel((0, 0))


def refusal(source: Any, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        open_image(source, **options)
    assert "\n" not in str(caught.value)
    assert "object at 0x" not in str(caught.value)
    assert caught.value.exit_code == 3
    return caught.value


# --- paths ---------------------------------------------------------------------------------------


def test_missing_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    for name in ("car.jpg", "receipt.png", "notes.txt"):
        (tmp_path / name).touch()
    error = refusal(tmp_path / "cra.jpg")
    assert str(error) == f"{tmp_path}/cra.jpg does not exist"
    assert error.hint == f"did you mean {tmp_path}/car.jpg?"
    assert refusal(tmp_path / "zebra").hint == "check the path"
    assert refusal(tmp_path / "no" / "car.jpg").hint == f"no folder {tmp_path}/no"
    assert "does not exist" in str(refusal(tmp_path / "car.jpg" / "x"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "is not a regular file" in str(refusal(tmp_path / "pipe.jpg"))  # and does not block
    assert "is not a regular file" in str(refusal("/dev/zero"))
    assert "is a folder" in str(refusal(tmp_path))
    with socket.socket(socket.AF_UNIX) as server:
        short = Path(os.path.relpath(tmp_path / "s"))
        if len(str(short)) < 100:
            server.bind(str(short))
            assert "is not a regular file" in str(refusal(short))


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    scene().save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert open_image(tmp_path / "b.png").pixels.size == (40, 30)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert "does not exist" in str(refusal(tmp_path / "gone.png"))


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "http://169.254.169.254/a.png"])
def test_impossible_paths(name: str) -> None:
    refusal(name)


def test_urls_are_refused_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", no_network)
    for url in (
        "http://169.254.0.1/a.png",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "ftp://a/b",
    ):
        assert "is a URL" in str(refusal(url))


def test_strange_file_names_work_and_print_escaped(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9\n\x1b[31m\xf0\x9f\x98\x80.png"
    Path(os.fsdecode(raw)).write_bytes(encoded(scene(), "PNG"))
    loaded = open_image(os.fsdecode(raw))
    assert loaded.name.endswith("/caf\\udce9\\n\\x1b[31m😀.png")
    assert loaded.pixels.size == (40, 30)
    assert display_name("a\u202eb") == "a\\u202eb"
    assert "\\n" in str(refusal(os.fsdecode(raw[:-4])))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all files")
def test_unreadable_file_gives_the_systems_reason(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch(mode=0)
    assert "Permission denied" in str(refusal(tmp_path / "a.png"))


@pytest.mark.parametrize("source", [3, None, ["a.png"]])
def test_other_types_are_refused(source: Any) -> None:
    assert type(source).__name__ in str(refusal(source))


def test_opening_needs_no_torch() -> None:
    code = (
        "import sys; from engine.pictures.image import open_image\n"
        "try: open_image('missing.jpg')\n"
        "except Exception as error: print(error.exit_code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]


# --- contents that are no picture ----------------------------------------------------------------


@pytest.fixture
def no_newer_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pillow built without AVIF, and no pillow-heif."""
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


@pytest.mark.parametrize(
    ("content", "words", "hint"),
    [
        (b"", "is empty (0 bytes)", "again"),
        (b"\xff", "too short to be an image (1 bytes)", "again"),
        (b"\xff\xd8\xff\xe0\0", "too short to be an image (5 bytes)", "again"),
        (b"a plain text of some length", "is text", "JPEG, PNG, WEBP, BMP, GIF, TIFF or AVIF"),
        ("ein längerer Text, äöü".encode() * 60, "is text", "JPEG"),
        (b"BMW is a maker of cars, BM the start of a bitmap", "is text", "JPEG"),
        (b"  <!DOCTYPE html><html>", "is a web page", "fetch it again"),
        (b"<html lang=en>", "is a web page", "fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer", "git lfs"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "is a HEIC picture", "heif-convert {} {stem}.png"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0heic", "is a HEIC picture", "pip install pillow-heif, or"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0miaf", "is a HEIC picture", "heif-convert"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0miafavif", "is an AVIF picture", "pip install -U pillow"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "is an AVIF picture", "avifdec {} {stem}.png"),
        (b"\0\0\0\x20ftypisom\0\0\0\0", "is a video", "ffmpeg"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing", "rsvg-convert {}"),
        (b"<?xml version='1.0'?>\n<!-- x --><svg/>", "is an SVG drawing", "rsvg-convert"),
        (b"%PDF-1.7\n%\xe2\xe3", "is a PDF document", "pdftoppm -png"),
        (b"8BPS\0\x01\0\0\0\0", "is a Photoshop file", "magick {}"),
        (b"SIMPLE  =                    T", "is a FITS file", "magick {} {stem}.png"),
        (b"\xff\x0a\0\0\0\0\0\0\0", "is a JPEG XL picture", "djxl"),
        (b"\x93NUMPY\x01\0v\0{'descr'", "is not a known picture format", "JPEG"),
        (bytes(500), "is not a known picture format", "JPEG"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "is not a known picture format", "JPEG"),
    ],
    ids=lambda value: repr(value[:16]),
)
def test_what_is_no_picture_is_named(
    tmp_path: Path, content: bytes, words: str, hint: str, no_newer_decoders: None
) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    error = refusal(path)
    assert words in str(error)
    assert str(path) in str(error)
    assert hint.format(path, stem=path.with_suffix("")) in error.hint
    assert words in str(refusal(content))


def test_suggested_command_quotes_the_name(tmp_path: Path, no_newer_decoders: None) -> None:
    path = tmp_path / "my $(rm) photo.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1")
    assert f"'{path}'" in refusal(path).hint


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(kind: str, kept: float) -> None:
    noise = Image.effect_noise((64, 48), 80).convert("RGB")
    content = encoded(noise, kind)
    error = refusal(content[: int(len(content) * kept)])
    assert "truncated" in str(error) or f"damaged or unsupported {kind} file" in str(error)


def test_truncated_jpeg_is_refused_even_if_pillow_is_told_to_fill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    content = encoded(Image.effect_noise((64, 48), 80), "JPEG")
    assert "is a truncated JPEG file" in str(refusal(content[: len(content) // 2]))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True  # the caller's setting is left as it was


def test_png_checksums_are_checked() -> None:
    content = encoded(Image.effect_noise((64, 48), 80), "PNG")
    for at in range(16, len(content) - 12, len(content) // 40):
        flipped = bytearray(content)
        flipped[at] ^= 0x10
        assert "PNG file" in str(refusal(bytes(flipped)))


def test_png_with_a_wrong_checksum_alone_is_refused() -> None:
    content = encoded(scene(), "PNG")
    at = content.index(b"IEND") - 5  # the last byte of the checksum of the pixel data
    assert "PNG file" in str(refusal(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]))


def test_huge_text_chunk_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    for number in range(70):
        info.add_text(f"note{number}", "x" * 1_000_000, zip=True)
    assert "PNG file" in str(refusal(encoded(scene(), "PNG", pnginfo=info)))


# --- size ----------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def test_bombs_are_refused_from_the_header() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refusal(png_header(12_000, 12_000))
    assert "is 12000 x 12000 = 144,000,000 pixels; at most 89,478,485 are read" in str(error)
    huge = str(refusal(png_header(65_500, 65_500)))
    assert "has 4,290,250,000 pixels; at most 89,478,485 are read" in huge
    assert "pixels" in str(refusal(png_header(2**31 - 1, 2**31 - 1)))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000  # kilobytes; decoded, the first alone takes 144 MB


def test_max_pixels() -> None:
    content = encoded(scene((40, 30)), "PNG")
    assert open_image(content, max_pixels=1200).pixels.size == (40, 30)
    assert "40 x 30 = 1,200 pixels; at most 1,199" in str(refusal(content, max_pixels=1199))
    assert "at most 1,199" in str(refusal(scene((40, 30)), max_pixels=1199))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (20_000, 1)], ids=str)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_thin_pictures_open(size: tuple[int, int], kind: str) -> None:
    loaded = open_image(encoded(Image.new("RGB", size, "red"), kind))
    assert (loaded.pixels.size, pixel(loaded)) == (size, (255, 0, 0))


def test_empty_picture_is_refused() -> None:
    assert "has no pixels (0 x 5)" in str(refusal(Image.new("RGB", (0, 5))))


# --- what becomes RGB ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_opens_whatever_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded(scene(), kind))
    loaded = open_image(path)
    assert loaded.pixels.size == (40, 30)
    assert loaded.notes == ()
    if kind in LOSSLESS:
        assert loaded.pixels.tobytes() == scene().tobytes()
    for source in (str(path), path.read_bytes()):
        assert open_image(source).pixels.tobytes() == loaded.pixels.tobytes()


def test_pillow_images_are_copied_not_changed() -> None:
    image = scene()
    loaded = open_image(image)
    loaded.pixels.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert loaded.name == "40x30 image"


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("RGBX", (1, 2, 3, 4), (1, 2, 3)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("LA", (9, 255), (9, 9, 9)),
    ],
)
def test_opaque_modes(mode: str, colour: Any, expected: tuple[int, int, int]) -> None:
    loaded = open_image(Image.new(mode, (3, 2), colour))
    assert pixel(loaded) == expected
    assert loaded.notes == ()


def palette_png(**options: Any) -> bytes:
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    return encoded(image, options.pop("kind", "PNG"), **options)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Image.new("RGBA", (3, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 128)), (255, 127, 127)),
        (Image.new("LA", (3, 2), (0, 0)), (255, 255, 255)),
        (Image.new("La", (3, 2), (0, 0)), (255, 255, 255)),
        (Image.new("RGBa", (3, 2), (100, 0, 0, 100)), (255, 155, 155)),
        (Image.new("RGBA", (3, 2), (9, 9, 9, 0)).convert("PA"), (255, 255, 255)),
        (encoded(Image.new("RGBA", (3, 2), (0, 0, 255, 0)), "WEBP", exact=True), (255, 255, 255)),
        (palette_png(transparency=1), (255, 255, 255)),
        (palette_png(transparency=bytes([255, 0, 255])), (255, 255, 255)),
        (palette_png(kind="GIF", transparency=1), (255, 255, 255)),
        (encoded(Image.new("RGB", (3, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), (255,) * 3),
        (encoded(Image.new("L", (3, 2), 5), "PNG", transparency=5), (255, 255, 255)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_transparency_is_shown_on_white(source: Any, expected: tuple[int, int, int]) -> None:
    loaded = open_image(source)
    assert pixel(loaded) == expected
    assert "partly transparent; it is shown on white" in loaded.notes[0]


def test_unused_transparency_makes_no_note() -> None:
    loaded = open_image(palette_png(transparency=2))
    assert (pixel(loaded), loaded.notes) == ((255, 0, 0), ())


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize(
    ("ink", "expected"),
    [
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 255, 0), (0, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_cmyk_colours(kind: str, ink: Any, expected: tuple[int, int, int]) -> None:
    # Adobe writes the inks of a JPEG inverted (its marker is in the file), those of a TIFF not.
    content = encoded(Image.new("CMYK", (16, 16), ink), kind)
    assert (b"Adobe" in content) == (kind == "JPEG")
    red, green, blue = pixel(open_image(content))
    assert max(abs(red - expected[0]), abs(green - expected[1]), abs(blue - expected[2])) <= 2


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
@pytest.mark.parametrize("value", [0, 1, 128, 129, 257 * 100, 32768, 65406, 65407, 65535])
def test_sixteen_bit_grey_is_scaled(mode: str, value: int) -> None:
    order = "big" if mode == "I;16B" else "little"
    image = Image.frombytes(mode, (2, 1), value.to_bytes(2, order) * 2)
    loaded = open_image(image)
    assert pixel(loaded) == (round(value / 257),) * 3
    assert "16-bit grey; 0..65535 is scaled" in loaded.notes[0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_files(kind: str) -> None:
    image = Image.frombytes("I;16", (2, 1), struct.pack("<2H", 65535, 257 * 7))
    loaded = open_image(encoded(image, kind))
    assert [loaded.pixels.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (7,) * 3]


def test_float_grey() -> None:
    image = Image.frombytes("F", (3, 1), struct.pack("<3f", 0.0, 0.5, 1.0))
    for source in (image, encoded(image, "TIFF")):
        loaded = open_image(source)
        values = [loaded.pixels.getpixel((x, 0)) for x in range(3)]
        assert values == [(0,) * 3, (128,) * 3, (255,) * 3]
        assert "0..1 is scaled" in loaded.notes[0]


@pytest.mark.parametrize("values", [(0.0, 255.0), (-0.1, 1.0), (0.0, 1.5), (float("inf"), 0.0)])
def test_float_grey_of_unknown_range_is_refused(values: tuple[float, float]) -> None:
    image = Image.frombytes("F", (2, 1), struct.pack("<2f", *values))
    assert "float grey" in str(refusal(image))
    for nan in [(float("nan"), 0.5), (0.5, float("nan"))]:
        image = Image.frombytes("F", (2, 1), struct.pack("<2f", *nan))
        assert "not numbers" in str(refusal(image))


def test_unknown_ranges_and_spaces_are_refused() -> None:
    assert "32-bit grey" in str(refusal(Image.new("I", (2, 2), 70_000)))
    assert "32-bit grey" in str(refusal(encoded(Image.new("I", (2, 2), 5), "TIFF")))
    assert "CIELAB" in str(refusal(Image.new("LAB", (2, 2))))


# --- orientation, frames, metadata ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(scene(), kind, exif=exif)
    loaded = open_image(content)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)).convert("RGB"))
    if kind == "TIFF":  # Pillow turns these while decoding
        expected = Image.open(io.BytesIO(content)).convert("RGB")
    assert loaded.pixels.size == ((40, 30) if orientation < 5 else (30, 40))
    assert loaded.pixels.tobytes() == expected.tobytes()
    assert loaded.notes == ()


def test_an_upright_picture_is_not_turned_again() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for kind in ("PNG", "JPEG"):
        once = open_image(encoded(scene((40, 30)), kind, exif=exif)).pixels
        assert once.size == (30, 40)
        assert open_image(once).pixels.tobytes() == once.tobytes()


def test_orientation_by_corners() -> None:
    # Independent of Pillow's own function: the red corner is top left once upright.
    stored = {1: (0, 0), 2: (39, 0), 3: (39, 29), 4: (0, 29)}
    stored |= {5: (0, 0), 6: (0, 39), 7: (29, 39), 8: (29, 0)}
    for orientation, corner in stored.items():
        size = (40, 30) if orientation < 5 else (30, 40)
        image = Image.new("RGB", size)
        image.putpixel(corner, (255, 0, 0))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        loaded = open_image(encoded(image, "PNG", exif=exif))
        assert loaded.pixels.size == (40, 30)
        assert pixel(loaded) == (255, 0, 0), orientation


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0junkjunkjunk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"],
)
def test_broken_exif_leaves_the_picture(exif: bytes) -> None:
    loaded = open_image(encoded(scene(), "JPEG", exif=exif))
    assert loaded.pixels.size == (40, 30)


def test_unreadable_orientation_makes_a_note() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 77
    loaded = open_image(encoded(scene(), "JPEG", exif=exif))
    assert "unreadable EXIF data; its orientation is ignored" in loaded.notes[0]
    junk = open_image(encoded(scene(), "JPEG", exif=b"Exif\0\0junkjunkjunk"))
    assert "unreadable EXIF data" in junk.notes[0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_is_taken_with_a_note(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    loaded = open_image(
        encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    )
    assert pixel(loaded) == (255, 0, 0)
    assert "has 3 frames; only the first is used" in loaded.notes[0]


def test_colour_profile_is_ignored() -> None:
    content = encoded(scene(), "PNG", icc_profile=b"not really a profile")
    assert open_image(content).pixels.tobytes() == scene().tobytes()


# --- hostile bytes -------------------------------------------------------------------------------

SEEDS = [encoded(scene((12, 9)), kind) for kind in FORMATS]
SEEDS.append(encoded(scene((12, 9)).quantize(4), "GIF"))
SEEDS.append(encoded(Image.new("CMYK", (9, 9)), "JPEG"))
SEEDS.append(encoded(Image.new("I;16", (9, 9)), "TIFF"))


def open_or_refuse(content: bytes) -> None:
    try:
        loaded = open_image(content, max_pixels=1_000_000)
    except ImageError:
        return
    assert loaded.pixels.mode == "RGB"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100), st.sampled_from(SEEDS), st.integers(0, 60))
def test_any_bytes_raise_our_error_only(junk: bytes, seed: bytes, at: int) -> None:
    open_or_refuse(junk)
    open_or_refuse(seed[:at] + junk)


def test_mutated_files_raise_our_error_only() -> None:
    rng = random.Random(5)
    for _ in range(400):
        content = bytearray(rng.choice(SEEDS))
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(min(len(content), 400))] = rng.choice([0, 1, 127, 255])
        open_or_refuse(bytes(content))
