"""The lowest versions that pyproject.toml allows are enough: the fast tests, in an environment of
those. (Of torch there: the one at hand. Linters and compilers judge the text, not the program.)
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.ops import native

ROOT = Path(__file__).resolve().parent.parent
JUDGES = ("ruff", "mypy", "clang-format")


@pytest.mark.slow
def test_the_lowest_versions_pass_the_fast_tests(tmp_path: Path) -> None:
    """Takes about ten minutes, most of them the tests."""
    asked = runpy.run_path(str(ROOT / ".ci" / "asked.py"))["asked"]
    wanted = [
        name
        for name in asked("run", "test", "train", lowest=True)
        if not name.startswith(("torch", *JUDGES))
    ]
    python = _environment(tmp_path / "venv", wanted)
    copy = _copy(tmp_path / "copy")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    tests = [python, "-m", "pytest", "-n", "auto", "-m", "not gpu and not slow"]
    done = subprocess.run(tests, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def _environment(folder: Path, wanted: list[str]) -> str:
    """A fresh environment with exactly these versions, and torch as here."""
    import torch

    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    release = torch.__version__.partition("+")[0]
    for packages in ([f"torch=={release}"], wanted):
        subprocess.run([*pip, *packages], check=True, stderr=subprocess.DEVNULL)
    return python


def _copy(folder: Path) -> Path:
    """The project's files, and the compiled module where it would look for it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    module, _ = native.load()
    if module is not None and module.__file__:
        shutil.copy2(module.__file__, folder / "engine")
        report = Path(module.__file__).parent / "ptxas"
        if report.is_dir():
            shutil.copytree(report, folder / "engine" / "ptxas")
    return folder
