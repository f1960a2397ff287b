"""Checkpoints, engines and the oracle, made once and shared by all test files."""

import fcntl
import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench.browser import Browser, find_chromium
from bench.toy_tokenizer import write_toy_tokenizer
from engine.engine import Engine
from engine.prompts.tokenizer import Tokenizer
from tests.asking import Ask, asking
from tests.checkpoints import DEFAULT, Shape, write_llava
from tests.emulated import build, build_native

# Started in the background by a shell, a process ignores interrupts: the tests send some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(shape, layout, dtype)``: the folder of a seeded model; leave its files alone."""

    @functools.cache
    def made(
        shape: Shape = DEFAULT, layout: str = "hub", dtype: torch.dtype = torch.float32
    ) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint") / f"{shape.family}-{layout}"
        return write_llava(folder, shape, layout, dtype)

    return made


@pytest.fixture(scope="session")
def engine_of(checkpoint: Callable[..., Path]) -> Callable[..., Engine]:
    """``engine_of(shape, layout, dtype, cache)``: a loaded engine on the CPU."""

    @functools.cache
    def made(
        shape: Shape = DEFAULT, layout: str = "hub", dtype: str = "float32", cache: str = "full"
    ) -> Engine:
        return Engine.load(checkpoint(shape, layout), device="cpu", dtype=dtype, cache=cache)

    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A Chromium of a test file."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """``ask(*arguments)``: the command line in this process."""
    return asking(capsys)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The small CUDA kernels in the block emulator."""
    return _built_once(build, tmp_path_factory)


@pytest.fixture(scope="session")
def emulated_native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The native module with all CUDA kernels in the block emulator, see ``standing_in``."""
    return _built_once(build_native, tmp_path_factory)


def _built_once(build: Callable[[Path], ModuleType], factory: pytest.TempPathFactory) -> ModuleType:
    """Compiled once for all processes of a run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return build(factory.mktemp("emulated"))
    folder = factory.getbasetemp().parent / f"emulated-{run}"
    folder.mkdir(exist_ok=True)
    with (folder / f"{build.__name__}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(folder)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def llava_folder() -> Path:
    data = os.environ.get("AVL_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data")
    folder = Path(data) / "llava-1.5-7b-hf"
    if not folder.is_dir():
        pytest.skip("the published LLaVA-1.5 metadata is not here (AVL_REFERENCE_DATA)")
    return folder


@pytest.fixture(scope="session")
def llava(llava_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(llava_folder)
