"""Pictures that are arrays: numpy's, torch's, or what calls its parts as they do.

Neither library is imported here: an array is known by its shape, dtype and memory.
"""

import ctypes
from collections.abc import Callable
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
    """Whether ``source`` is an array or a tensor, whose values can be read."""
    has_values = hasattr(source, "tobytes") or hasattr(source, "data_ptr")
    return has_values and all(hasattr(source, name) for name in ("shape", "dtype", "ndim"))


def from_array(array: Any, check_size: Callable[[tuple[int, int]], object]) -> Image.Image:
    """The picture of uint8 values ``[height, width]`` or ``[height, width, 1, 3 or 4]``.

    A tensor may also be ``[1, 3 or 4, height, width]``, as torchvision has it. The values are
    copied, once ``check_size`` was told width and height: a view may claim any. Raises ImageError
    for any other shape or dtype, and for a tensor without values or strides.
    """
    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    tensor = hasattr(array, "data_ptr")
    first = tensor and len(shape) == 3 and shape[-1] not in _MODES and shape[0] in _MODES
    order = (1, 2, 0) if first else (0, 1, 2)
    height, width, channels = [(*shape, 1)[i] for i in order] if len(shape) in (2, 3) else (0, 0, 0)
    if dtype != "uint8" or channels not in _MODES or 0 in shape:
        raise ImageError(
            f"an array of {dtype:.20} {list(shape)!s:.80} is no picture",
            hint="give uint8 values from 0 to 255 as [height, width] or [height, width, 3 or 4]",
        )
    check_size((width, height))
    if not tensor:
        data = array.tobytes()
    elif str(array.layout) != "torch.strided" or array.device.type == "meta":
        raise ImageError(
            f"a tensor of {array.layout} on {array.device} is no picture", hint="use a dense one"
        )
    else:
        data = _bytes_of_tensor(array.permute(1, 2, 0) if first else array)
    return Image.frombytes(_MODES[channels], (width, height), data)


def _bytes_of_tensor(tensor: Any) -> bytes:
    tensor = tensor.detach().cpu().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
