"""What this machine offers: versions, kernels, memory and devices."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..loading.device import why_no_cuda
from ..ops.native import backend

PACKAGES = ("torch", "safetensors", "tokenizers", "pillow", "huggingface-hub", "tqdm")


def environment() -> dict[str, Any]:
    """Versions, backend, memory in bytes (None: unknown) and devices, for JSON."""
    return {
        "version": _version("avl-engine"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_free": _memory("SC_AVPHYS_PAGES"),
        "memory_total": _memory("SC_PHYS_PAGES"),
        "packages": {package: _version(package) for package in PACKAGES},
        "backend": backend()._asdict(),
        "devices": list(_devices()),
    }


def describe(machine: dict[str, Any]) -> Iterator[str]:
    """The environment, for people."""
    free, total = machine["memory_free"], machine["memory_total"]
    memory = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB memory free" if total else "memory unknown"
    yield f"avl-engine {machine['version']}, Python {machine['python']}"
    yield f"system: {machine['system']}, {machine['cpus']} CPUs, {memory}"
    yield "packages: " + ", ".join(" ".join(pair) for pair in machine["packages"].items())
    yield "backend: {name} - {reason}".format(**machine["backend"])
    yield from (f"device: {device}" for device in machine["devices"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _memory(pages: str) -> int | None:
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _devices() -> Iterator[str]:
    if reason := why_no_cuda():
        yield f"cpu ({reason})"
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found = torch.cuda.get_device_properties(number)
        yield (
            f"cuda:{number} {found.name}, compute {found.major}.{found.minor}, "
            f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        )
