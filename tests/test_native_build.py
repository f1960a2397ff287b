"""The native module: is it built, does it say so, and does the install fall back as promised?"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import OptionError
from engine.ops import native

ROOT = Path(__file__).resolve().parent.parent


def test_a_required_module_is_active():
    if os.environ.get("AVL_REQUIRE_NATIVE") != "1":
        pytest.skip("AVL_REQUIRE_NATIVE is not 1: the module is optional here")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert native.backend().name == expected, native.backend().reason


def test_cuda_is_compiled_where_there_is_a_compiler():
    if os.environ.get("AVL_REQUIRE_NATIVE") != "1" or not shutil.which("nvcc"):
        pytest.skip("needs AVL_REQUIRE_NATIVE=1 and nvcc")
    from engine import _native

    assert _native.with_cuda


def test_the_backend_gives_its_reason():
    name, reason = native.backend()
    assert name in ("cuda", "cpu", "torch")
    assert len(reason) > 20
    assert "\n" not in reason


def test_the_module_can_be_switched_off():
    code = "from engine.ops import native; print(native.backend().name, native.backend().reason)"
    env = {**os.environ, "AVL_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("torch AVL_NATIVE=0")


def test_an_unknown_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVL_NATIVE", "nonsense")
    with pytest.raises(OptionError, match="AVL_NATIVE=nonsense"):
        native.load.__wrapped__()


def test_the_module_links_no_cuda_and_no_torch_library():
    if native.backend().name == "torch" or not shutil.which("ldd"):
        pytest.skip("needs the native module and ldd")
    from engine import _native

    linked = subprocess.run(["ldd", _native.__file__], capture_output=True, text=True, check=True)
    assert not re.search("cudart|libtorch|libc10", linked.stdout)


def test_a_failed_build_falls_back_only_where_it_may():
    """Read from pyproject.toml itself, with the backend's own reader of conditions."""
    settings = pytest.importorskip("scikit_build_core.settings.skbuild_read_settings")

    def cmake_used(require: str | None) -> bool:
        env = {} if require is None else {"AVL_REQUIRE_NATIVE": require}
        reader = settings.SettingsReader.from_file(
            str(ROOT / "pyproject.toml"), {}, state="wheel", env=env, retry=True
        )
        return bool(reader.settings.wheel.cmake)

    assert not cmake_used(None)
    assert not cmake_used("0")
    assert cmake_used("1")
