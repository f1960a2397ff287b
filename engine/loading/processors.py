"""How many threads compute: one for each physical core that this process may use.

Two threads of one core share its arithmetic and its path to memory, and threads beyond what a
container is allowed only wait for each other.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

SYSTEM = Path("/sys")


def choose_threads(wanted: int | None) -> None:
    """Let torch and the kernels use ``wanted`` threads, for the whole process.

    None: what is set (OMP_NUM_THREADS, or torch's own choice), but no more than there are cores,
    unless the environment says so.
    """
    if wanted is None and "OMP_NUM_THREADS" not in os.environ:
        wanted = min(torch.get_num_threads(), cores())
    if wanted is not None:
        torch.set_num_threads(wanted)


def cores(system: Path = SYSTEM) -> int:
    """Physical cores among the processors of this process, and no more than its quota.

    Four processors on two cores, a quota of 150 ms in every 100: 2.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    found = {_siblings(system, processor) for processor in os.sched_getaffinity(0)}
    return max(1, int(min(len(found), _quota(system) + 0.999)))


def _siblings(system: Path, processor: int) -> str:
    """The processors of this one's core; itself where the system does not say."""
    path = system / f"devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
    try:
        return path.read_text()
    except OSError:
        return str(processor)


def _quota(system: Path) -> float:
    """Processors' worth of time that a container allows; without a limit infinite."""
    try:
        quota, period = (system / "fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # "max", or another system
        return float("inf")
