"""Pictures that are no paths to the six old formats: AVIF, HEIC, arrays, streams, data: URLs."""

import base64
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import AvifImagePlugin, Image, ImageFile

from engine.engine import Engine
from engine.errors import OptionError
from engine.pictures.encoded import listed
from engine.pictures.image import open_image
from tests.test_image import encoded, refusal


def noise(mode: str, size: tuple[int, int]) -> Image.Image:
    count = size[0] * size[1] * len(mode)
    return Image.frombytes(mode, size, np.random.default_rng(count).bytes(count))


def pixels(image: Image.Image) -> tuple[Any, bytes]:
    return (image.mode, image.size), image.tobytes()


# --- AVIF, and HEIC where its package is --------------------------------------------------------

with_avif = pytest.mark.skipif(not AvifImagePlugin.SUPPORTED, reason="this Pillow has no AVIF")


@with_avif
def test_avif_opens_as_pillow_decodes_it(tmp_path: Path) -> None:
    data = encoded(Image.linear_gradient("L").resize((60, 40)).convert("RGB"), "AVIF", quality=90)
    (tmp_path / "photo.jpg").write_bytes(data)
    with Image.open(io.BytesIO(data)) as wanted:
        assert pixels(open_image(tmp_path / "photo.jpg").pixels) == pixels(wanted.convert("RGB"))
    see_through = encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "AVIF")
    assert open_image(see_through).pixels.getpixel((4, 4)) == (255, 255, 255)


@with_avif
def test_avif_is_held_to_the_same_limits() -> None:
    data = encoded(Image.new("RGB", (60, 40)), "AVIF")
    assert "60 x 40 = 2,400 pixels" in str(refusal(data, max_pixels=2_399))
    assert open_image(data, 2_400).pixels.size == (60, 40)
    for kept in (0.3, 0.7, 0.95):
        error = refusal(data[: int(kept * len(data))])
        assert "AVIF" in str(error)
        assert "avifdec" in error.hint


class Heif:
    """Stands in for pillow-heif, which is not among the packages of the tests."""

    opened: ClassVar[list[int]] = []

    @staticmethod
    def register_heif_opener(thumbnails: bool) -> None:
        Image.register_open("HEIF", HeifFile, lambda head: b"ftyp" in head[:12])


class HeifFile(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self) -> None:
        self._mode, self._size = "RGB", (6, 4)
        self.info["exif"] = b""
        Heif.opened.append(1)

    def load(self) -> Any:
        if Heif.opened[-1] == 1:
            self._size = (600, 400)  # a decoder that finds another size than the header states
            self.im = Image.core.fill("RGB", self._size, (9, 8, 7))
        return super().load() if self.tile else self.im


def test_heic_opens_through_its_package_and_is_measured_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", Heif)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    picture = open_image(heic)
    assert (picture.pixels.size, picture.pixels.getpixel((0, 0))) == ((600, 400), (9, 8, 7))
    assert "6 x 4 = 24 pixels" in str(refusal(heic, max_pixels=23))
    assert "600 x 400" in str(refusal(heic, max_pixels=1_000))


# --- pictures in memory -------------------------------------------------------------------------


class FakeArray:
    """What numpy's arrays answer to, without numpy."""

    def __init__(self, data: bytes, *shape: int, dtype: str = "uint8") -> None:
        self.shape, self.dtype, self.ndim, self._data = shape, dtype, len(shape), data

    def tobytes(self) -> bytes:
        return self._data


@pytest.mark.parametrize(
    ("channels", "mode"), [((), "L"), ((1,), "L"), ((3,), "RGB"), ((4,), "RGBA")]
)
def test_arrays_are_the_pictures_of_their_values(channels: tuple[int, ...], mode: str) -> None:
    wanted = noise(mode, (7, 5))
    expected = pixels(open_image(wanted).pixels)
    array = np.frombuffer(wanted.tobytes(), np.uint8).reshape(5, 7, *channels)
    assert pixels(open_image(array).pixels) == expected
    assert pixels(open_image(np.asfortranarray(array)).pixels) == expected
    assert pixels(open_image(array[::-1][::-1]).pixels) == expected
    assert pixels(open_image(FakeArray(wanted.tobytes(), 5, 7, *channels)).pixels) == expected
    tensor = torch.tensor(array)
    assert pixels(open_image(tensor).pixels) == expected
    if channels:
        assert pixels(open_image(tensor.permute(2, 0, 1)).pixels) == expected


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 7, 3), np.float32),
        np.zeros((5, 7, 3), np.int64),
        np.zeros((5, 7), bool),
        np.zeros((3, 5, 7), np.uint8),
        np.zeros((5, 7, 2), np.uint8),
        np.zeros((2, 5, 7, 3), np.uint8),
        np.zeros((0, 7, 3), np.uint8),
        np.zeros(9, np.uint8),
        np.zeros((), np.uint8),
        torch.zeros(3, 5, 7),
        torch.zeros(2, 5, 7, dtype=torch.uint8),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_other_arrays_are_refused(array: Any) -> None:
    error = refusal(array)
    assert str(list(array.shape)) in str(error)
    assert "uint8 values from 0 to 255" in error.hint


def test_an_array_stays_its_owners() -> None:
    array = np.zeros((4, 6, 3), np.uint8)
    picture = open_image(array).pixels
    array[:] = 255
    assert picture.getpixel((0, 0)) == (0, 0, 0)


def test_open_files_are_read_from_their_start(tmp_path: Path) -> None:
    data = encoded(noise("RGB", (9, 7)), "PNG")
    (tmp_path / "a").write_bytes(data)
    expected = pixels(open_image(data).pixels)
    stream = io.BytesIO(data)
    stream.seek(0, os.SEEK_END)
    with (tmp_path / "a").open("rb") as file, (tmp_path / "a").open("rb", 0) as raw:
        for source in (stream, stream, file, raw, bytearray(data), memoryview(data)):
            assert pixels(open_image(source).pixels) == expected
    assert not stream.closed
    read, write = os.pipe()
    with os.fdopen(read, "rb") as pipe, os.fdopen(write, "wb") as feed:
        feed.write(data)
        feed.close()
        assert pixels(open_image(pipe).pixels) == expected


def test_streams_that_are_no_pictures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.BytesIO(b"x")
    closed.close()
    assert "cannot be read" in str(refusal(closed))
    assert 'open(path, "rb")' in refusal(io.StringIO("text")).hint
    assert "empty (0 bytes)" in str(refusal(io.BytesIO()))
    monkeypatch.setattr("engine.pictures.image._MOST_BYTES", 3 << 20)

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            return len(buffer)

    assert "more than 3,145,728 bytes" in str(refusal(Endless()))


def test_data_urls_are_pictures_and_messages_stay_short() -> None:
    data = encoded(noise("RGB", (9, 7)), "PNG")
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    assert pixels(open_image(url).pixels) == pixels(open_image(data).pixels)
    for wrong in (
        url[:-100] + "!",
        "data:," + "x" * 5000,
        "data:image/png;base64" * 900,
        "n" * 250,
    ):
        error = refusal(wrong)
        assert len(str(error)) < 330
        assert error.hint


def test_the_engine_takes_them_all_and_none(engine_of: Callable[..., Engine]) -> None:
    engine, picture = engine_of(), noise("RGB", (56, 56))
    data = encoded(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    array = np.asarray(picture)
    wanted = engine.logits("Hi", [picture])
    sources = (url, data, bytearray(data), io.BytesIO(data), array, torch.tensor(array))
    for source in sources:
        assert torch.equal(engine.logits("Hi", [source]), wanted)
        assert torch.equal(engine.logits("Hi", source), wanted)  # one needs no list around it
    assert torch.equal(engine.logits("Hi", None), engine.logits("Hi"))
    assert engine.chat().send("Hi", None, max_new_tokens=1).image_tokens == 0
    requests = [{"prompt": "Hi", "images": images, "max_new_tokens": 1} for images in (None, [url])]
    assert [result.image_tokens for result in engine.generate_batch(requests)] == [0, 16]
    with pytest.raises(OptionError, match="images are int"):
        engine.logits("Hi", 7)
    assert listed(iter([data, data])) == [data, data]
