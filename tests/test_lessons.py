"""The lessons on attention kernels: each runs alone, checks itself, and notices a wrong result."""

import shutil
import subprocess
from pathlib import Path

import pytest

LESSONS = sorted((Path(__file__).resolve().parent.parent / "cuda" / "lessons").glob("*.cu"))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_in_the_emulator_and_notices_a_wrong_result(
    lesson: Path, tmp_path: Path
) -> None:
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    program = tmp_path / "lesson"
    flags = ["-x", "c++", "-std=gnu++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["g++", *flags, str(lesson), "-o", str(program)], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert said.startswith("0 of 1024 numbers wrong")
    broken = subprocess.run([program, "--break"], capture_output=True, text=True)
    assert broken.returncode == 1
    assert broken.stdout.startswith("1 of 1024 numbers wrong")


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_compiles_for_a_gpu(lesson: Path, tmp_path: Path) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    command = ["nvcc", "-arch=sm_80", "-c", str(lesson), "-o", str(tmp_path / "lesson.o")]
    subprocess.run(command, check=True)


def test_what_comes_after_the_kernel_is_the_same_in_all_lessons() -> None:
    rest = {path.read_text().partition("// -- around the kernel")[2] for path in LESSONS}
    assert len(LESSONS) == 3
    assert len(rest) == 1
    assert "int main" in rest.pop()
