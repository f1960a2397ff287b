"""Open an untrusted picture: check it, decode it, and turn it into plain 8-bit RGB.

The order matters: the kind of file first (never block on a pipe), then its first bytes, then the
size its header announces, and only then the pixels. Every failure is one ``ImageError`` with our
own text. Imports Pillow and the standard library only, so that a mistyped path fails at once.

What happens to a picture, each with a note where it changes what the model sees:
    EXIF orientation    applied; an unreadable one is ignored
    transparency        composited on white (colours hidden under it never show)
    grey, palette, CMYK converted to RGB; JPEG CMYK is read as inverted (the Adobe convention)
    16-bit grey, float  scaled from 0..65535 and 0..1; other ranges are refused
    several frames      the first one
    colour profiles     ignored, as the reference implementations do
A flipped bit is found where the format has checksums (PNG); a JPEG has none.
"""

import difflib
import importlib
import logging
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

from PIL import Image, ImageFile

from ..errors import ImageError
from ..naming import display_name, shorten
from ..refusals import hint_for
from .arrays import Array, from_array, is_array
from .data_url import decode_data, is_data, is_url
from .sniff import FORMATS, HEAD, describe_other, picture_format

# Pillow's own warning threshold, 89.5 million: a decoded picture then takes at most 358 MB.
MAX_PIXELS = 89_478_485

# Decoders also log what is wrong with a file, and where nobody listens Python prints that.
logging.getLogger("PIL").addHandler(logging.NullHandler())

Source = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | Array

# No stream is read further: an uncompressed picture of the most pixels is not longer.
_MOST_BYTES = 4 * MAX_PIXELS

# Formats whose decoder Pillow does not import by itself; importing all of them is slow. The last
# two may be missing: Pillow can be built without AVIF, and HEIC is a package of its own.
_DECODERS = {
    "WEBP": "PIL.WebPImagePlugin",
    "TIFF": "PIL.TiffImagePlugin",
    "AVIF": "PIL.AvifImagePlugin",
    "HEIF": "pillow_heif",
}

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> how to undo it; 1 (and the 0 that some cameras write) means upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class LoadedImage:
    """A decoded picture, ready for preprocessing.

    ``pixels`` is in mode RGB, upright; ``name`` is safe to print (control characters are escaped);
    ``notes`` says in words what was changed on the way.
    """

    pixels: Image.Image
    name: str
    notes: tuple[str, ...] = ()


def open_image(source: Source, max_pixels: int = MAX_PIXELS, name: str = "") -> LoadedImage:
    """Open a picture, as upright 8-bit RGB.

    ``source`` is a path, a ``data:`` URL, the bytes of a picture file, a file opened in binary
    mode, a Pillow image, or an array or tensor of uint8 (see ``arrays``). ``max_pixels`` bounds
    width x height as the header states them, before anything is decoded; Pillow's own guard
    ``Image.MAX_IMAGE_PIXELS`` applies as well. ``name`` is what messages call bytes and streams.
    Raises ``ImageError``.

    >>> open_image(Image.new("L", (4, 2), 255)).pixels.getpixel((0, 0))
    (255, 255, 255)
    """
    limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
    if isinstance(source, Image.Image):
        return _from_pillow(source, limit)
    if isinstance(source, str) and is_data(source):
        return _from_stream(BytesIO(decode_data(source)), shorten(source), limit)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_stream(BytesIO(source), name or f"picture of {len(source)} bytes", limit)
    if isinstance(source, str | os.PathLike):
        return _from_path(os.fspath(source), limit)
    if hasattr(source, "read"):
        data = _read_all(cast(BinaryIO, source), name or "a picture's stream")
        return _from_stream(BytesIO(data), name or f"picture of {len(data)} bytes", limit)
    if is_array(source):

        def check_size(size: tuple[int, int]) -> None:
            _check_size(size, f"{size[0]}x{size[1]} array", limit)

        return _from_pillow(from_array(source, check_size), limit)
    raise ImageError(
        f"a picture cannot be opened from {type(source).__name__}",
        hint="give a path, bytes, an open file, a Pillow image or an array",
    )


def _read_all(stream: BinaryIO, name: str) -> bytes:
    """The content of an open file from its start, or of a stream from where it stands."""
    blocks: list[bytes] = []
    try:
        if stream.seekable():
            stream.seek(0)
        while block := stream.read(1 << 20):
            blocks.append(bytes(block))
            if sum(map(len, blocks)) > _MOST_BYTES:
                raise ImageError(f"{name} holds more than {_MOST_BYTES:,} bytes", "give a path")
    except TypeError:  # of bytes(): the stream gives texts
        hint = 'open it in binary mode: open(path, "rb")'
        raise ImageError(f"{name} gives text, not bytes", hint) from None
    except (OSError, ValueError, AttributeError) as error:
        raise ImageError(f"{name} cannot be read: {str(error)[:100]}") from None
    return b"".join(blocks)


def _from_path(path: str, limit: int) -> LoadedImage:
    name = display_name(path)
    check_regular_file(path, name)
    try:
        with open(path, "rb") as stream:
            return _from_stream(stream, name, limit)
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}", hint_for(error)) from None


def check_regular_file(path: str, name: str, what: str = "picture") -> None:
    """Refuse all but regular files before opening: opening a pipe would block."""
    if is_url(path) and not os.path.exists(path):
        problem = f"{name} is a URL; {what}s are opened from files only"
        raise ImageError(problem, f"download the {what} first and give its path")
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path, name) from None
    except ValueError:
        problem = f"{name or 'the empty path'} cannot be read: the name is not valid"
        raise ImageError(problem, hint="give another path") from None
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}", hint_for(error)) from None
    if stat.S_ISDIR(mode):
        raise ImageError(f"{name} is a folder", hint=f"name one {what} in it")
    if not stat.S_ISREG(mode):
        raise ImageError(f"{name} is not a regular file", hint=f"save the {what} to a file first")


def _missing(path: str, name: str) -> ImageError:
    """Name what does not exist, and the nearest file name beside it."""
    folder, wanted = Path(path).parent, Path(path).name
    if os.path.islink(path):
        target = display_name(os.readlink(path))
        return ImageError(f"{name} does not exist", f"it is a link to {target}, which is not there")
    try:
        present = [entry.name for entry in os.scandir(folder)]
    except OSError:
        missing = display_name(str(folder))
        return ImageError(f"{name or 'the empty path'} does not exist", f"no folder {missing}")
    close = difflib.get_close_matches(wanted, present, n=1)
    if close:
        suggestion = display_name(str(folder / close[0]))
        return ImageError(f"{name} does not exist", hint=f"did you mean {suggestion}?")
    return ImageError(f"{name or 'the empty path'} does not exist", hint="check the path")


def _from_stream(stream: BinaryIO, name: str, limit: int) -> LoadedImage:
    head = stream.read(HEAD)
    if len(head) < 8:
        what = f"too short to be an image ({len(head)} bytes)" if head else "empty (0 bytes)"
        raise ImageError(f"{name} is {what}", hint="fetch or save the picture again")
    kind = picture_format(head)
    if not kind or not _has_decoder(kind):
        what, hint = describe_other(head, name)
        raise ImageError(f"{name} is {what}", hint=hint)
    hint = "fetch or save the picture again"
    if kind not in FORMATS:  # whose decoders know less of what there is
        hint = describe_other(head, name)[1]
    with _own_errors(name, kind, hint):
        if kind == "PNG":  # the decoder itself skips the checksums of pixel data
            _open(stream, kind, name, limit).verify()
        image = _open(stream, kind, name, limit)
        # Phones store a second picture for depth or brightness in a JPEG: not worth a note.
        frames = 1 if kind == "JPEG" else getattr(image, "n_frames", 1)
        image.load()
        _check_size(
            image.size, name, limit
        )  # HEIC's decoder may find another one than the header's
        notes = (f"{name} has {frames} frames; only the first is used",) if frames > 1 else ()
        return _normalise(image, name, notes)


def _has_decoder(kind: str) -> bool:
    """Import the decoder for ``kind`` where Pillow does not by itself; whether there is one."""
    try:
        plugin = importlib.import_module(_DECODERS[kind]) if kind in _DECODERS else None
    except ImportError:
        return False
    if kind == "HEIF":
        plugin.register_heif_opener(thumbnails=False)  # type: ignore[union-attr]
    return bool(getattr(plugin, "SUPPORTED", True))


def _open(stream: BinaryIO, kind: str, name: str, limit: int) -> Image.Image:
    """Read the header only, with the one decoder for ``kind``, and check the size it states."""
    with warnings.catch_warnings():  # our own check follows, and its message has the numbers
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(stream, formats=(kind,))
    _check_size(image.size, name, limit)
    return image


def _from_pillow(image: Image.Image, limit: int) -> LoadedImage:
    name = f"{image.width}x{image.height} image"
    _check_size(image.size, name, limit)
    with _own_errors(name, image.mode, "give its file, or another picture"):
        image.load()
        return _normalise(image, name, ())


def _check_size(size: tuple[int, int], name: str, limit: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height})")
    if width * height > limit:
        raise ImageError(
            f"{name} is {width} x {height} = {width * height:,} pixels; at most {limit:,} are read",
            hint="make the picture smaller first",
        )


@contextmanager
def _own_errors(name: str, kind: str, hint: str) -> Iterator[None]:
    """Turn whatever Pillow raises or warns about a size into one ``ImageError`` with our own text.

    Its decoders raise many unrelated classes on hostile input, and its messages can hold object
    addresses. Its global switch that fills truncated pictures with grey is off meanwhile.
    """
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        # Pillow refuses such a header itself; its text is the only place that has the number.
        found = re.search(r"(\d+) pixels", str(error))
        count = f"{int(found[1]):,} pixels" if found else "too many pixels"
        raise ImageError(
            f"{name} has {count}; at most {Image.MAX_IMAGE_PIXELS:,} are read",
            hint="make the picture smaller first",
        ) from None
    except MemoryError:
        raise ImageError(f"{name} does not fit in memory", hint="make it smaller first") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not the decoder's
            raise ImageError(f"{name} cannot be read: {error.strerror}", hint_for(error)) from None
        if "closed" in str(error).lower():
            raise ImageError(f"{name} is closed", "give its file, or close it later") from None
        cut = "truncated" in str(error).lower()
        state = f"a truncated {kind} file" if cut else f"a damaged or unsupported {kind} file"
        raise ImageError(f"{name} is {state}", hint) from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _normalise(image: Image.Image, name: str, notes: tuple[str, ...]) -> LoadedImage:
    """Bring a decoded picture upright and into RGB."""
    upright, rotation_notes = _upright(image, name)
    pixels, colour_notes = _to_rgb(upright, image.info.get("transparency"), name)
    if pixels is image:
        pixels = image.copy()  # the caller's Pillow image stays the caller's
    pixels.info.clear()  # opened again, they must not be turned upright a second time
    return LoadedImage(pixels, name, notes + rotation_notes + colour_notes)


def _upright(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    try:
        exif = image.getexif()
        # The JPEG decoder swallows a broken block, which then seems to hold nothing.
        swallowed = "exif" in image.info and not exif
        orientation = 9 if swallowed else exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # as in _own_errors: the metadata is hostile input, the pixels are fine
        orientation = 9
    if orientation not in range(9):
        return image, (f"{name} has unreadable EXIF data; its orientation is ignored",)
    method = _UPRIGHT.get(orientation)
    return (image if method is None else image.transpose(method)), ()


def _to_rgb(
    image: Image.Image, transparency: object, name: str
) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert any mode to RGB; ``transparency``: the palette entry or colour for "none"."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_deep(image, name)
    if image.mode == "LAB":
        raise ImageError(f"{name} is in CIELAB colours", hint="convert it to RGB first")
    if image.mode in ("La", "RGBa"):  # alpha already multiplied in: undo it first
        image = image.convert(image.mode.replace("a", "A"))
    if transparency is None and "A" not in image.getbands():
        return (image if image.mode == "RGB" else image.convert("RGB")), ()
    layers = image.convert("RGBA")
    if layers.getchannel("A").getextrema() == (255, 255):
        return layers.convert("RGB"), ()
    white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, layers).convert("RGB")
    return flat, (f"{name} is partly transparent; it is shown on white",)


def _scale_deep(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Scale 16-bit grey (0..65535) and float grey (0..1) to 8 bits, rounding to nearest.

    Pillow's own conversion would clip all above 255 to white and all floats to black.
    """
    if image.mode == "F":
        _check_unit_range(image, name)
        scale, note = 255.0, f"{name} is float grey; 0..1 is scaled to 8 bits"
    elif image.mode.startswith("I;16") or image.format == "PNG":  # PNG has no 32-bit grey
        scale, note = 1 / 257, f"{name} is 16-bit grey; 0..65535 is scaled to 8 bits"
        image = image.convert("I")
    else:
        raise ImageError(
            f"{name} is 32-bit grey, whose range is not known",
            hint="scale it to 0..255 and save it as 8-bit grey first",
        )
    # For these modes Pillow does not call the function per pixel: it reads scale and offset off it.
    scaled = image.point(lambda value: value * scale + 0.5)
    return scaled.convert("I").convert("L").convert("RGB"), (note,)


def _check_unit_range(image: Image.Image, name: str) -> None:
    low, high = image.getextrema()
    # A box mean over all pixels is not finite as soon as one of them is not.
    mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    finite = isinstance(mean, float) and math.isfinite(mean)
    if not (finite and isinstance(low, float) and isinstance(high, float)):
        raise ImageError(f"{name} is float grey with values that are not numbers")
    if not 0 <= low <= high <= 1:
        raise ImageError(
            f"{name} is float grey from {low:g} to {high:g}; only 0..1 is a known range",
            hint="scale it to 0..255 and save it as 8-bit grey first",
        )
