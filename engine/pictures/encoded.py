"""Pictures are encoded once and remembered: asking again skips the vision tower."""

from __future__ import annotations

import ctypes
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from threading import Lock
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ..errors import OptionError
from ..options import is_iterable
from .arrays import is_array
from .image import Source
from .preprocess import Pixels


@dataclass(frozen=True)
class EncodedImage:
    """A picture's features ``[image tokens, hidden]``, ready to be asked about many times.

    ``size`` is the picture's own (width, height), ``times`` are those of ``Pixels``.
    """

    features: Tensor
    size: tuple[int, int]
    times: tuple[int, ...] = ()


Picture = Source | EncodedImage | Pixels


def listed(images: Sequence[Picture] | Picture | None) -> Sequence[Picture]:
    """Pictures as a sequence: None is no picture, and one needs no list around it."""
    if images is None:
        return ()
    single = isinstance(images, str | bytes | bytearray | memoryview | PathLike | Image.Image)
    if (
        single
        or isinstance(images, EncodedImage | Pixels)
        or hasattr(images, "read")
        or is_array(images)
    ):
        return [images]  # type: ignore[list-item]
    if not is_iterable(images):
        raise OptionError(f"images are {type(images).__name__}", hint='write images=["a.jpg"]')
    return [*images]  # type: ignore[misc]  # what can be gone through


class Encodes(Protocol):
    """A model with a vision tower."""

    def encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Image tokens ``[image tokens, hidden]`` of every picture."""


class PictureEncoder:
    """Runs the vision tower, and remembers the features of the latest ``capacity`` pictures.

    The key is a hash of the preprocessed pixels with their shape and the picture's size, so that a
    30 x 150 picture is not a 150 x 30 one with the same bytes; the model never changes. Who asks
    under a ``salt`` of their own cannot tell, by the time it takes, what others have asked about.
    """

    def __init__(self, model: Encodes, capacity: int = 8) -> None:
        self._model, self._capacity = model, capacity
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = Lock()

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Pixels | EncodedImage], salt: str = "") -> list[Tensor]:
        """Features ``[image tokens, hidden]`` of each picture; new ones pass the tower together."""
        keys = [b"" if isinstance(p, EncodedImage) else _key(p, salt) for p in pictures]
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
        fresh = {
            key: picture
            for key, picture in zip(keys, pictures, strict=True)
            if isinstance(picture, Pixels) and key not in found
        }
        if fresh:
            encoded = self._model.encode(list(fresh.values()))
            found |= zip(fresh, encoded, strict=True)
        self._remember(found)
        return [
            picture.features if isinstance(picture, EncodedImage) else found[key]
            for key, picture in zip(keys, pictures, strict=True)
        ]

    def _remember(self, used: dict[bytes, Tensor]) -> None:
        """Put the features just used at the young end, and forget the oldest beyond capacity."""
        with self._lock:
            for key, features in used.items():
                self._known[key] = features
                self._known.move_to_end(key)
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)


def _key(picture: Pixels, salt: str) -> bytes:
    tiles = picture.tiles.contiguous()
    header = f"{salt!r} {picture.size} {picture.video} {tuple(tiles.shape)} "
    return hashlib.sha256(
        header.encode() + ctypes.string_at(tiles.data_ptr(), tiles.nbytes)
    ).digest()
