"""``torchrun --nproc-per-node N main.py``: processes that share a model; one of them is heard."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import OptionError

_MODES = ("", "compare")  # others write files, or read what only one process is given
_LAST_WORDS = 2.0  # seconds: torchrun ends all processes as soon as one has ended


def processes() -> int:
    """How many torchrun has started of this program."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def alone(instead: str) -> OptionError:
    """The error of what several processes cannot do; the caller raises it."""
    return OptionError(
        f"{processes()} processes {instead}", hint="start one process for everything else"
    )


@contextmanager
def together(flags: argparse.Namespace, mode: str) -> Iterator[None]:
    """The group of these processes; all but the first are silent.

    Raises OptionError for what several cannot do.
    """
    if os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    files = flags.attention or flags.draw_boxes
    if mode not in _MODES or files or "-" in (flags.prompt, *flags.image):
        if os.environ["RANK"] != "0":
            time.sleep(_LAST_WORDS)
        raise alone("answer one question, without --attention, --draw-boxes and stdin")
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available() and flags.device in ("auto", "cuda"):
        flags.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(flags.device)
    dist.init_process_group("nccl" if flags.device.startswith("cuda") else "gloo")
    flags.parallel = True
    try:
        yield
    finally:
        dist.destroy_process_group()
