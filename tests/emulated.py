"""CUDA kernels on the host: their sources, compiled for the block emulator and loaded."""

import ctypes
import importlib.util
import itertools
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from engine.ops import native

ROOT = Path(__file__).resolve().parent.parent
MULTIPROCESSORS = 8  # of the GPU that is stood in for: few, so that lists are split in some ways
_number = itertools.count()


def build(
    folder: Path, root: Path = ROOT, source: str = "emulated_fused", name: str = ""
) -> ModuleType:
    """Compile a source of ``tests/native`` below ``root`` into ``folder``: the module in it.

    What lies there compiled is taken. ``name`` is the module's, where it is not the source's.
    """
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    pybind11 = pytest.importorskip("pybind11")
    library = folder / f"{source}.so"
    if not library.exists():
        _compile(library, root, pybind11.get_include())
    # pybind11 gives the same module for the same full name, whatever the file.
    name = f"{folder.name}-{next(_number)}.{name or source}"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_native(folder: Path, root: Path = ROOT) -> ModuleType:
    """The native module whose GPU is the emulator; it has no kernels for CPUs."""
    return build(folder, root, "emulated_native", "_native")


@contextmanager
def standing_in(module: ModuleType, order: int = 0) -> Iterator[None]:
    """Attention planned here is a GPU's, of tensors on the CPU; all else is as it was.

    Threads of a block run forward, backward or shuffled (``order`` 0, 1, 2).
    """
    ctypes.CDLL(module.__file__).set_order(order)
    real, problem = native.load()
    mixed = SimpleNamespace(**vars(real or module) | {"AttentionPlan": module.AttentionPlan})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load", lambda: (mixed, problem))
        patch.setattr(native, "_on_gpu", lambda tensor: True)
        patch.setattr(native, "_multiprocessors", lambda device: MULTIPROCESSORS)
        stream = SimpleNamespace(cuda_stream=0)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
        yield


def _compile(library: Path, root: Path, pybind11_include: str) -> None:
    command = ["g++", "-std=gnu++17", "-O0", "-w", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += [f"-I{pybind11_include}", f"-I{sysconfig.get_path('include')}"]
    command += [str(root / f"tests/native/{library.stem}.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-4000:]
