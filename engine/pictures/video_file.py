"""Frames of an untrusted video file, by PyAV (FFmpeg's libraries).

The order matters, as with pictures: the kind of file first, then its first bytes, which choose the
one demuxer that may read it (playlists, which name other files, have none), then what its header
announces, then all packets without decoding any of them, which tells every frame's time and whether
the file is whole, and only then pixels: of the frames that are shown, and those that they need.
Every failure is one ``ImageError``. FFmpeg never opens a file by itself: it reads from ours.
"""

from __future__ import annotations

import bisect
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from time import monotonic
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from ..errors import ImageError, OptionError
from ..progress import tell
from .image import check_regular_file
from .sniff import HEAD, describe_other, picture_format

Choose = Callable[[Sequence[float]], list[int]]

MOST_BYTES = 8 << 30
MOST_SECONDS = 12 * 3600
MOST_PACKETS = 2_000_000  # 11 hours at 50 frames a second
MOST_PIXELS = 8192 * 4352  # 8K and its cinema form
TIME_LIMIT = 120.0  # seconds that reading one video may take, the model's own time left out

# (offset, signature, demuxer)
_CONTAINERS = (
    (4, b"ftyp", "mov"),
    (4, b"moov", "mov"),
    (4, b"mdat", "mov"),
    (4, b"free", "mov"),
    (4, b"wide", "mov"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"OggS", "ogg"),
    (0, b"FLV\x01", "flv"),
    (0, b"GIF8", "gif"),
    (0, b"\0\0\x01\xba", "mpeg"),
)
_KINDS = "videos may be MP4, MOV, WebM, MKV, AVI, MPEG-TS, OGG, FLV or GIF"
_AGAIN = "fetch or save the video again"
_SOUND = (b"ID3", b"fLaC", b"\xff\xfb", b"\xff\xf3")


class _Key(NamedTuple):
    """A frame that needs no other: when it is shown, and when it is sent, which seeks go by."""

    time: int
    sent: int


class _Scan(NamedTuple):
    """All frames of a file: times in the stream's units, ascending, and the key frames."""

    times: list[int]
    keys: list[_Key]


class _Clock:
    """How long a file may still be read; the time between frames is the model's."""

    def __init__(self, name: str) -> None:
        self._name, self._left, self._since = name, TIME_LIMIT, monotonic()

    def resume(self) -> None:
        self._since = monotonic()

    def check(self) -> None:
        """Count what has passed, and raise ImageError if it was too much."""
        now = monotonic()
        self._left, self._since = self._left - (now - self._since), now
        if self._left < 0:
            raise ImageError(
                f"{self._name} takes longer than {TIME_LIMIT:.0f} s to read",
                hint="cut it, make it smaller, or ask for a part (--start, --end)",
            )


def frames_of(
    source: str | bytes, name: str, choose: Choose, max_pixels: int
) -> tuple[list[float], Iterator[Image.Image]]:
    """Frames of a file (a path, or its bytes), upright and RGB: those whose numbers ``choose``
    makes of the times of all, in seconds; and these times of theirs.

    Everything but the pixels is checked before this returns.
    """
    stream = BytesIO(source) if isinstance(source, bytes) else _opened(source, name)
    frames = _frames(stream, name, choose, min(max_pixels, MOST_PIXELS))
    seconds = next(frames)  # until the file has been scanned
    assert isinstance(seconds, list), "times come first"
    return seconds, (frame for frame in frames if not isinstance(frame, list))


def _opened(path: str, name: str) -> BinaryIO:
    check_regular_file(path, name, "video")
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise ImageError(
                f"{name} has {os.path.getsize(path):,} bytes; at most {MOST_BYTES:,} are read",
                hint="cut it, or make it smaller",
            )
        return open(path, "rb")
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}") from None


def _frames(
    stream: BinaryIO, name: str, choose: Choose, max_pixels: int
) -> Iterator[Image.Image | list[float]]:
    """The times once the file has been scanned, then the frames."""
    clock = _Clock(name)
    with stream, _own_errors(name), _container(stream, name) as container:
        track = _track(container, name, max_pixels)
        scan = _scanned(container, track, name, clock)
        unit = float(track.time_base)
        seconds = [(time - scan.times[0]) * unit for time in scan.times]
        numbers = choose(seconds)
        chosen = [scan.times[number] for number in numbers]
        if not chosen:
            raise OptionError(
                f"{name} ends at {seconds[-1]:.2f} s; no frame lies where frames are asked for",
                hint="choose another --start or --end",
            )
        yield [seconds[number] for number in numbers]
        clock.resume()
        decoded = _decoded(container, track, scan.keys, chosen, clock)
        for number, frame in enumerate(decoded, 1):
            tell("frames decoded", number, len(chosen))
            yield _upright(frame, name, max_pixels)
            clock.resume()


@contextmanager
def _own_errors(name: str) -> Iterator[None]:
    """Turn what PyAV raises into one ``ImageError`` with our own text."""
    av = _av()
    try:
        yield
    except av.FFmpegError as error:
        said = str(error.strerror or error)[:80]
        raise ImageError(f"{name} is damaged or cut off ({said})", hint=_AGAIN) from None


def _av() -> Any:
    """PyAV; it is heavy, and most never open a video."""
    try:
        return importlib.import_module("av")
    except ImportError:
        raise ImageError(
            "videos need the package av", hint="install it: pip install av; or give frames"
        ) from None


@contextmanager
def _container(stream: BinaryIO, name: str) -> Iterator[Any]:
    """The file, opened by the one demuxer that its first bytes ask for."""
    head = stream.read(HEAD)
    stream.seek(0)
    kind = _kind(head)
    if not kind:
        raise _no_video(head, name)
    # Tracks of a MOV may lie in other files; those are never opened.
    options = {"enable_drefs": "0", "use_absolute_path": "0"} if kind == "mov" else {}
    container = _av().open(
        stream,
        format=kind,
        container_options=options,
        metadata_errors="ignore",
        timeout=TIME_LIMIT,
    )
    try:
        yield container
    finally:
        container.close()


def _kind(head: bytes) -> str:
    for offset, signature, kind in _CONTAINERS:
        if head[offset : offset + len(signature)] == signature:
            return kind
    return "mpegts" if head[:1] == b"G" and head[188:189] == b"G" else ""


def _no_video(head: bytes, name: str) -> ImageError:
    if not head:
        return ImageError(f"{name} is empty (0 bytes)", hint=_AGAIN)
    if picture_format(head):
        return ImageError(f"{name} is a picture, no video", hint="give it with --image")
    if head.startswith(_SOUND) or head[8:12] == b"WAVE":
        return ImageError(f"{name} is sound without pictures", hint=_KINDS)
    what = describe_other(head, name)[0].replace("picture format", "video format")
    return ImageError(f"{name} is {what}", hint=_KINDS)


def _track(container: Any, name: str, most_pixels: int) -> Any:
    """The file's first video track, its announced size and length checked."""
    tracks = [track for track in container.streams.video if track.codec_context]
    if not tracks:
        sound = " but sound" if container.streams.audio else ""
        raise ImageError(f"{name} holds no video{sound}", hint="give another file")
    track, seconds = tracks[0], (container.duration or 0) / 1e6
    if seconds > MOST_SECONDS:
        raise ImageError(
            f"{name} lasts {seconds:,.0f} s; at most {MOST_SECONDS:,} are read", hint="cut it"
        )
    context = track.codec_context
    _check_size(context.width, context.height, name, most_pixels)
    context.options = {"max_pixels": str(most_pixels)}  # sizes may change in the stream
    context.thread_type = "AUTO"
    return track


def _check_size(width: int, height: int, name: str, most: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height})", hint=_AGAIN)
    if width * height > most:
        raise ImageError(
            f"{name} has frames of {width} x {height} = {width * height:,} pixels; at most "
            f"{most:,} are read",
            hint="make it smaller first",
        )


def _scanned(container: Any, track: Any, name: str, clock: _Clock) -> _Scan:
    """All packets, none decoded."""
    times, keys, last = list[int](), list[_Key](), 0.0
    for count, packet in enumerate(container.demux()):
        clock.check()
        time = packet.dts if packet.pts is None else packet.pts
        if count > MOST_PACKETS:
            raise ImageError(f"{name} has more than {MOST_PACKETS:,} packets", hint="cut it")
        if time is None or not packet.size:
            continue
        last = max(last, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream is track:
            times.append(time)
            if packet.is_keyframe:
                keys.append(_Key(time, time if packet.dts is None else packet.dts))
    if not times:
        raise ImageError(f"{name} holds no frames", hint=_AGAIN)
    announced = (container.duration or 0) / 1e6
    begins = (container.start_time or 0) / 1e6
    if announced - (last - begins) > max(1.0, announced / 10):
        raise ImageError(
            f"{name} is cut off: it holds {last - begins:.1f} s of {announced:.1f} s", hint=_AGAIN
        )
    return _Scan(sorted(set(times)), sorted(keys))


def _decoded(
    container: Any, track: Any, keys: Sequence[_Key], chosen: Sequence[int], clock: _Clock
) -> Iterator[Any]:
    """The frames at the ``chosen`` times, decoded from the key frame before each, where that is
    nearer than what has been decoded; one that is damaged is the next that is not.
    """
    decoder: Iterator[Any] = iter(())
    frame: Any = None
    for time in chosen:
        before = bisect.bisect_right(keys, time, key=lambda key: key.time)
        nearest = keys[before - 1].time if before else chosen[0]
        if frame is None or nearest > _time(frame):
            decoder, frame = _begun(container, track, keys[:before], time)
        while frame is None or _time(frame) < time:
            clock.check()
            following = next(decoder, None)
            if following is None:
                break
            frame = following
        if frame is None:
            raise ImageError("no frame of the video could be decoded", hint=_AGAIN)
        yield frame


def _begun(
    container: Any, track: Any, before: Sequence[_Key], time: int
) -> tuple[Iterator[Any], Any]:
    """A decoder that has been sent to a key frame, and its first frame, which is not behind
    ``time``. Some containers have no index and are missed by a little: then the key before.
    """
    for key in (*reversed(before[-3:]), _Key(0, -1 << 40)):
        container.seek(key.sent, stream=track, backward=True)
        decoder = container.decode(track)
        frame = next(decoder, None)
        if frame is not None and _time(frame) <= time:
            break
    return decoder, frame


def _time(frame: Any) -> int:
    time = frame.dts if frame.pts is None else frame.pts
    return int(time or 0)


def _upright(frame: Any, name: str, most_pixels: int) -> Image.Image:
    """The frame as its rotation tag wants it shown."""
    _check_size(frame.width, frame.height, name, most_pixels)
    image: Image.Image = frame.to_image()
    turned = round(frame.rotation / 90) * 90 % 360
    if turned:
        image = image.rotate(turned, expand=True)
    return image.convert("RGB")
