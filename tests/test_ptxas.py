"""What ptxas said of every kernel when the module was built: no registers may spill to memory."""

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.ops import native


class Kernel(NamedTuple):
    """One kernel compiled for one architecture: bytes it stores and loads for want of registers."""

    name: str
    arch: str
    stores: int
    loads: int


def kernels(report: str) -> list[Kernel]:
    """The kernels of what ``nvcc -Xptxas -v`` prints; device functions that are called count too.

    >>> kernels("ptxas info : Compiling entry function 'f' for 'sm_90'")
    Traceback (most recent call last):
    ValueError: 1 kernels were compiled, but spills are reported for 0
    """
    found, arch = [], ""
    for line in report.splitlines():
        compiling = re.search(r"Compiling entry function '\S+' for '(\w+)'", line)
        properties = re.search(r"Function properties for (\S+)", line)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if compiling:
            arch = compiling[1]
        elif properties:
            name = properties[1]
        elif spills:
            found.append(Kernel(name, arch, int(spills[1]), int(spills[2])))
    compiled = report.count("Compiling entry function")
    if compiled > len(found) or not compiled:
        problem = f"{compiled} kernels were compiled, but spills are reported for {len(found)}"
        raise ValueError(problem)
    return found


def spilling(report: str) -> list[Kernel]:
    """The kernels that spill."""
    return [kernel for kernel in kernels(report) if kernel.stores or kernel.loads]


SAMPLE = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 21 registers, used 1 barriers, 8192 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4fullv' for 'sm_90'
ptxas info    : Function properties for _Z4fullv
    {frame} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


@pytest.mark.parametrize(("stores", "loads"), [(8, 16), (0, 4), (1024, 0)])
def test_a_kernel_that_spills_is_found(stores: int, loads: int) -> None:
    report = SAMPLE.format(frame=stores, stores=stores, loads=loads)
    assert spilling(report) == [Kernel("_Z4fullv", "sm_90", stores, loads)]


def test_a_kernel_that_does_not_spill_passes() -> None:
    assert not spilling(SAMPLE.format(frame=64, stores=0, loads=0))  # an array is not a spill
    assert [kernel.arch for kernel in kernels(SAMPLE.format(frame=0, stores=0, loads=0))] == [
        "sm_80",
        "sm_90",
    ]


@pytest.mark.parametrize("report", ["", "nvcc warning : nothing was compiled", SAMPLE[:180]])
def test_a_report_that_says_nothing_is_refused(report: str) -> None:
    with pytest.raises(ValueError, match="kernels were compiled"):
        kernels(report)


def reports() -> dict[str, str]:
    """What ptxas said of each source file of the module in use."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc: nothing compiled the CUDA kernels here")
    if native.fused_kernels("cuda") is None:
        pytest.skip("needs the native module with its CUDA kernels")
    from engine import _native

    files = sorted((Path(_native.__file__).parent / "ptxas").glob("*.txt"))
    return {file.name: file.read_text() for file in files}


def test_no_kernel_spills_registers() -> None:
    found = reports()
    assert set(found) == {"launch.cu.txt", "sift.cu.txt", "fused.cu.txt", "gemv.cu.txt"}, (
        "the module was built without a report"
    )
    for name, report in found.items():
        assert not spilling(report), name


def test_every_kernel_is_compiled_for_both_architectures() -> None:
    if os.environ.get("AVL_CUDA_ARCH"):
        pytest.skip("AVL_CUDA_ARCH chooses other architectures")
    for name, report in reports().items():
        by_arch: dict[str, set[str]] = {}
        for kernel in kernels(report):
            by_arch.setdefault(kernel.arch, set()).add(kernel.name)
        assert set(by_arch) >= {"sm_80", "sm_90"}, name
        assert by_arch["sm_80"] == by_arch["sm_90"], name
