"""Small videos whose frames can be told apart: frame n is grey of 10 + 4 n."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image


def grey(number: int) -> int:
    return 10 + 4 * number


def number_of(frame: Image.Image) -> int:
    """Which frame it is, by its middle."""
    value = frame.getpixel((frame.width // 2, frame.height // 2))
    assert isinstance(value, tuple)
    return round((value[1] - 10) / 4)


def frame_of(number: int, size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, (grey(number),) * 3)


def write_video(
    path: Path | io.BytesIO,
    frames: int = 50,
    *,
    kind: str | None = None,
    codec: str = "libx264",
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    times: Sequence[int] | None = None,
    sound: bool = False,
    pictures: Sequence[Image.Image] | None = None,
    key_every: int = 12,
) -> Path | io.BytesIO:
    """Write one; ``times`` are those of its frames in thousandths of a second, if uneven."""
    container = av.open(path if isinstance(path, io.BytesIO) else str(path), "w", format=kind)
    stream: Any = container.add_stream(codec, rate=rate)
    stream.width, stream.height = size
    stream.pix_fmt = "rgb24" if codec == "gif" else "yuv420p"
    stream.codec_context.gop_size = key_every
    if times is not None:
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
    if codec == "gif":
        stream.pix_fmt = "rgb8"
    audio = container.add_stream("aac", rate=8000) if sound else None
    for number in range(frames):
        picture = pictures[number] if pictures else frame_of(number, size)
        frame = av.VideoFrame.from_image(picture)
        if times is not None:
            frame.pts, frame.time_base = times[number], Fraction(1, 1000)
        container.mux(stream.encode(frame))
        if audio is not None:
            container.mux(audio.encode(silence(number, rate)))
    container.mux(stream.encode())
    if audio is not None:
        container.mux(audio.encode())
    container.close()
    return path


def write_sound(path: Path, seconds: int = 2, kind: str | None = None) -> Path:
    """A container that holds no video."""
    container = av.open(str(path), "w", format=kind)
    stream: Any = container.add_stream("aac", rate=8000)
    for number in range(seconds * 10):
        container.mux(stream.encode(silence(number, 10)))
    container.mux(stream.encode())
    container.close()
    return path


def silence(number: int, rate: int) -> av.AudioFrame:
    samples = 8000 // rate
    frame = av.AudioFrame(format="s16", layout="mono", samples=samples)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    frame.sample_rate, frame.pts = 8000, number * samples
    frame.time_base = Fraction(1, 8000)
    return frame


def turned(path: Path, quarters: int) -> Path:
    """Write a rotation tag into an MP4's track header: shown turned clockwise so many times."""
    data = bytearray(path.read_bytes())
    one, matrices = 1 << 16, {}
    matrices[1] = (0, one, 0, -one, 0, 0)
    matrices[2] = (-one, 0, 0, 0, -one, 0)
    matrices[3] = (0, -one, 0, one, 0, 0)
    at = data.index(b"tkhd") + 4 + 40  # the matrix of a version 0 header
    for number, value in enumerate(matrices[quarters]):
        data[at + 4 * number : at + 4 * number + 4] = (value & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(data)
    return path
