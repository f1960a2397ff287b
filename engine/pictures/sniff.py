"""What a file is, judged by its first bytes and never by its name.

A wrong extension is harmless (a PNG called .jpg opens), and a file that is no picture can be named
for what it is. This module imports only the standard library.
"""

import shlex
from collections.abc import Callable
from pathlib import PurePath

# The formats that are opened. Rare decoders are never reached: most advisories are about those.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

# Opened as well where this Pillow has the decoder, and for HEIC where pillow-heif is installed:
# what their files call themselves ("brands").
_BRANDS = (
    ("AVIF", {b"avif", b"avis"}),
    ("HEIF", {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}),
)

# How many bytes the functions below look at.
HEAD = 1024

# (offset, signature, format): enough to choose one decoder, which then checks the rest.
_PICTURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
)

_MAGICK = "magick {source} {png}"
_FRAME = "ffmpeg -i {source} -frames:v 1 {png}; or give it with --video"

# Pictures we do not open: (offset, signature, name, command that converts the first page to PNG).
_REFUSED = (
    (4, b"ftypmif1", "a HEIC picture", "heif-convert {source} {png}"),
    (4, b"ftypmsf1", "a HEIC picture", "heif-convert {source} {png}"),
    (4, b"ftyp", "a video", _FRAME),
    (0, b"\x1aE\xdf\xa3", "a video", _FRAME),
    (0, b"%PDF-", "a PDF document", "pdftoppm -png -r 150 -singlefile {source} {stem}"),
    (0, b"8BPS", "a Photoshop file", "magick {source}'[0]' {png}"),
    (0, b"SIMPLE  =", "a FITS file", _MAGICK),
    (0, b"%!PS", "a PostScript file", _MAGICK),
    (0, b"\xff\x0a", "a JPEG XL picture", "djxl {source} {png}"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture", "djxl {source} {png}"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 picture", _MAGICK),
    (0, b"\0\0\x01\0", "an icon file", _MAGICK),
)

# The same for formats whose decoder is missing or fails, with what would bring it.
_MISSING = {
    "HEIF": ("a HEIC picture", "pip install pillow-heif, or ", "heif-convert {source} {png}"),
    "AVIF": ("an AVIF picture", "pip install -U pillow, or ", "avifdec {source} {png}"),
}

_SVG = ("an SVG drawing", "rsvg-convert {source} -o {png}")


def picture_format(head: bytes) -> str:
    """Return which format the first bytes announce: of ``FORMATS``, AVIF or HEIF; "" for others.

    >>> picture_format(b"GIF89a" + bytes(20))
    'GIF'
    """
    for offset, signature, name in _PICTURES:
        if head[offset : offset + len(signature)] == signature:
            return name if name != "WEBP" or head[:4] == b"RIFF" else ""
    if kind := _by_brand(head):
        return kind
    # "BM" alone also starts texts: the length of the second header must be one that exists.
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in (
        12,
        40,
        52,
        56,
        64,
        108,
        124,
    ):
        return "BMP"
    return ""


def _by_brand(head: bytes) -> str:
    """AVIF or HEIF, which share a container: its first box lists what it is compatible with."""
    if head[4:8] != b"ftyp":
        return ""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, end, 4))}
    return next((name for name, known in _BRANDS if brands & known), "")


def describe_other(head: bytes, file_name: str) -> tuple[str, str]:
    """Say what a file that cannot be opened is, and one thing to do about it.

    ``head`` is its first ``HEAD`` bytes; ``file_name`` appears in the suggested command.

    >>> describe_other(b"%PDF-1.7", "bill.pdf")
    ('a PDF document', 'convert it first: pdftoppm -png -r 150 -singlefile bill.pdf bill')
    """
    if kind := _by_brand(head):
        name, install, command = _MISSING[kind]
        return name, install + _conversion(command, file_name)
    for offset, signature, name, command in _REFUSED:
        if head[offset : offset + len(signature)] == signature:
            return name, _conversion(command, file_name)
    return _describe_text(head, file_name)


def _conversion(command: str, file_name: str) -> str:
    path = PurePath(file_name)
    values = {"source": path, "png": path.with_suffix(".png"), "stem": path.with_suffix("")}
    return "convert it first: " + command.format(
        **{key: shlex.quote(str(value)) for key, value in values.items()}
    )


def _describe_text(head: bytes, file_name: str) -> tuple[str, str]:
    formats = f"pictures may be {', '.join(FORMATS)} or AVIF"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in start):
        return _SVG[0], _conversion(_SVG[1], file_name)
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page", "the download saved a page instead of the picture; fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", "run 'git lfs pull' to fetch the picture itself"
    return ("text" if _is_text(head) else "not a known picture format"), formats


def _is_text(head: bytes) -> bool:
    printable: Callable[[int], bool] = lambda byte: byte >= 32 or byte in b"\t\n\r\f"  # noqa: E731
    # A multi-byte character may be cut at the end of the head: ignore up to three bytes there.
    for cut in range(4):
        try:
            head[: len(head) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return all(map(printable, head))
    return False
