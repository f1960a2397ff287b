"""Pictures that are arrays: numpy's, torch's, or what calls its parts as they do.

Neither library is imported here: an array is known by its shape, dtype and memory.
"""

import ctypes
from typing import Any, Protocol, TypeGuard

from PIL import Image

from ..errors import ImageError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Array(Protocol):
    """What numpy's arrays and torch's tensors have in common."""

    @property
    def shape(self) -> Any:
        """Lengths of the dimensions."""

    @property
    def dtype(self) -> Any:
        """Kind of the values."""

    @property
    def ndim(self) -> int:
        """How many dimensions there are."""


def is_array(source: object) -> TypeGuard[Array]:
    """Whether ``source`` is an array or a tensor."""
    return hasattr(source, "shape") and hasattr(source, "dtype") and hasattr(source, "ndim")


def from_array(array: Any) -> Image.Image:
    """The picture of uint8 values ``[height, width]`` or ``[height, width, 1, 3 or 4]``.

    A tensor may also be ``[1, 3 or 4, height, width]``, as torchvision has it. The values are
    copied. Raises ImageError for any other shape or dtype.
    """
    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    tensor = hasattr(array, "data_ptr")
    if tensor and len(shape) == 3 and shape[-1] not in _MODES and shape[0] in _MODES:
        array = array.permute(1, 2, 0)
    height, width, channels = (*array.shape, 1)[:3] if len(shape) in (2, 3) else (0, 0, 0)
    if dtype != "uint8" or channels not in _MODES or 0 in shape:
        raise ImageError(
            f"an array of {dtype:.20} {list(shape)!s:.80} is no picture",
            hint="give uint8 values from 0 to 255 as [height, width] or [height, width, 3 or 4]",
        )
    data = _bytes_of_tensor(array) if tensor else array.tobytes()
    return Image.frombytes(_MODES[channels], (width, height), data)


def _bytes_of_tensor(tensor: Any) -> bytes:
    tensor = tensor.detach().cpu().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
