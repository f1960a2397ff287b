"""The CPU kernels for ARM: cross-compiled, and run in an emulated processor.

Needs Debian's ``g++-aarch64-linux-gnu`` and ``qemu-user``. The module itself is only compiled:
Python for ARM is not there to load it.
"""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = {"neon": [], "neon_bf16": ["-march=armv8.6-a+bf16"]}
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]

pytestmark = [
    pytest.mark.slow,  # everything runs in an emulator
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR} (apt install g++-aarch64-linux-gnu qemu-user)",
    ),
]


def compiled(*command: object) -> None:
    base = [COMPILER, "-std=gnu++17", "-fopenmp", "-DAVL_ARM=1", "-Wno-psabi"]
    done = subprocess.run([*base, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def program(folder: Path, name: str, *flags: str) -> Path:
    """A check program of tests/native with the kernels of every ARM instruction set."""
    objects = [folder / f"{isa}.o" for isa in FLAGS]
    for isa, target in zip(FLAGS, objects, strict=True):
        source = ROOT / "cuda/cpu/kernels.cpp"
        compiled(*flags, *FLAGS[isa], f"-DAVL_ISA={isa}", "-c", source, "-o", target)
    sources = ROOT / "tests/native" / name, ROOT / "cuda/cpu/dispatch.cpp"
    compiled(*flags, "-DAVL_CPU_ONLY", *sources, *objects, "-o", folder / "check")
    return folder / "check"


def emulated(check: Path, *arguments: str, cpu: str = "max") -> str:
    command = [EMULATOR, "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu", str(check), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("flags", [["-O3"], ["-O1", *UNDEFINED]], ids=["fast", "sanitized"])
def test_attention_and_policies(tmp_path: Path, flags: list[str]) -> None:
    check = program(tmp_path, "check_kernels.cpp", *flags)
    assert "cpu: 0 mistakes" in emulated(check, "cpu")


@pytest.mark.parametrize("flags", [["-O3"], ["-O1", *UNDEFINED]], ids=["fast", "sanitized"])
def test_products(tmp_path: Path, flags: list[str]) -> None:
    said = emulated(program(tmp_path, "check_products.cpp", *flags))
    assert "neon: products checked" in said
    assert "neon_bf16: products checked" in said


def test_a_processor_without_bf16_takes_the_other_kernels(tmp_path: Path) -> None:
    """The Cortex-A76 of many boards has none; the Orin's A78AE neither."""
    said = emulated(program(tmp_path, "check_products.cpp", "-O3"), cpu="cortex-a76")
    assert "neon: products checked" in said
    assert "neon_bf16" not in said


def test_the_module_compiles(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    for source in ("bind.cpp", "bind_fused.cpp", "bind_gemv.cpp"):
        target = tmp_path / f"{source}.o"
        flags = ["-DAVL_WITH_CUDA=0", "-fPIC", "-O1"]
        compiled(*flags, *headers, "-c", ROOT / "cuda" / source, "-o", target)
