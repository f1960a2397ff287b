"""The small CUDA kernels on the host: their sources, compiled for the block emulator and loaded."""

import importlib.util
import itertools
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
_number = itertools.count()


def build(folder: Path, root: Path = ROOT) -> ModuleType:
    """Compile the sources below ``root`` into ``folder``: a module with the kernels' functions.

    What lies there compiled is taken.
    """
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    pybind11 = pytest.importorskip("pybind11")
    library = folder / "emulated_fused.so"
    if not library.exists():
        _compile(library, root, pybind11.get_include())
    # pybind11 gives the same module for the same full name, whatever the file.
    name = f"{folder.name}-{next(_number)}.emulated_fused"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(library: Path, root: Path, pybind11_include: str) -> None:
    command = ["g++", "-std=gnu++17", "-O0", "-w", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += [f"-I{pybind11_include}", f"-I{sysconfig.get_path('include')}"]
    command += [str(root / "tests/native/emulated_fused.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-4000:]
