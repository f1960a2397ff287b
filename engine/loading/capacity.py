"""Running out of memory, as one of our errors: what was needed, what is free, what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import CapacityError

HINT = "try dtype bf16, device cpu, fewer or smaller pictures, or a shorter answer"


@contextmanager
def memory_for(doing: str, needed: int, device: torch.device, hint: str = HINT) -> Iterator[None]:
    """Turn a failed allocation inside the block into a CapacityError.

    Args:
        doing: what the memory is for, as in "loading the weights".
        needed: bytes that this takes at least.
        device: where.
        hint: what to ask less of.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise CapacityError(
            f"out of memory while {doing} on {device}: at least {needed / 1e9:,.3f} GB are needed, "
            f"{free_bytes(device) / 1e9:,.3f} GB are free",
            hint=hint,
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a failed allocation from other failures; on the CPU torch has no class for it."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
