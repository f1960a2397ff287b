"""The rooms of the house: imports go one way, without a circle, and the wheel is one package."""

import itertools
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import grimp
import pytest
from importlinter import cli

from engine.ops import native

ROOT = Path(__file__).resolve().parent.parent


def test_imports_go_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    """The layers are written in pyproject.toml; imports for types alone count as well."""
    assert cli.lint_imports(config_filename=str(ROOT / "pyproject.toml")) == 0, capsys.readouterr()


def test_every_room_has_its_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    layers = itertools.chain(*(layer.split(" | ") for layer in contract["layers"]))
    rooms = {f"engine.{path.stem}" for path in (ROOT / "engine").iterdir() if _is_module(path)}
    assert {f"engine.{layer}" for layer in layers} == rooms


def _is_module(path: Path) -> bool:
    inside = path.suffix == ".py" and path.stem != "__init__"
    return inside or (path / "__init__.py").exists()


def test_no_module_is_in_a_circle() -> None:
    """None is reached from what it imports, within a room either."""
    graph = grimp.build_graph("engine", exclude_type_checking_imports=False)
    circles = [
        module
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if module in graph.find_upstream_modules(imported)
    ]
    assert circles == []


def test_nothing_but_tests_imports_tests() -> None:
    for folder in ("engine", "bench", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "from tests" not in text, path
            assert "import tests" not in text, path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is unpacked, the compiled module put beside it."""
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    build += ["--config-settings", "wheel.cmake=false", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    module, _ = native.load()
    if module is not None and module.__file__:
        (folder / "site" / "avl_engine" / Path(module.__file__).name).symlink_to(module.__file__)
    return folder / "site"


def test_the_wheel_is_one_package_with_its_models(installed: Path) -> None:
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"avl_engine"}
    assert (installed / "avl_engine" / "weights" / "tiny" / "model.safetensors").exists()
    assert (installed / "avl_engine" / "py.typed").exists()
    assert (installed / "avl_engine" / "insight" / "page.html").exists()


def test_the_wheel_works_beside_a_users_own_modules(installed: Path, tmp_path: Path) -> None:
    for name in ("engine.py", "weights.py", "policies.py"):
        (tmp_path / name).write_text("raise SystemExit('this is the user's own')\n")
    program = (
        "from avl_engine import Engine\n"
        f"picture = {str(ROOT / 'examples' / 'car.jpg')!r}\n"
        "print(Engine.load(device='cpu').generate('What colour is the car?', [picture]).text)\n"
    )
    # -S: without what is installed for this checkout itself, which would come first.
    found = os.pathsep.join([str(installed), *(p for p in sys.path if p.endswith("site-packages"))])
    environment = os.environ | {"PYTHONPATH": found}
    for command in (
        ["-c", program],
        ["-m", "avl_engine", str(ROOT / "examples" / "car.jpg"), "What colour is the car?", "-q"],
    ):
        done = subprocess.run(
            [sys.executable, "-S", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.stdout == "The car is red.\n", done.stderr
