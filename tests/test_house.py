"""The figures of the house: what counts as a function, as public, as typed, as the tour's path."""

import ast
import re
import subprocess
import sys

from bench import house
from bench.common import ROOT

CODE = '''
class Shown:
    """It."""

    def told(self, x: int) -> int:
        def inside(y):
            return y

        return inside(x)

    def _hidden(self, x): ...


def untold(*rest): ...
'''


def test_functions_are_counted_with_what_is_inside_them() -> None:
    lengths = {node.name: house.length(node) for node in house.functions(ast.parse(CODE).body)}
    assert lengths == {"told": 5, "_hidden": 1, "untold": 1}


def test_what_is_public_and_what_is_typed() -> None:
    body = ast.parse(CODE).body
    assert [node.name for node in house.public(body)] == ["Shown", "told", "untold"]
    typed = {node.name: house.typed(node) for node in house.functions(body)}
    assert typed == {"told": True, "_hidden": False, "untold": False}


def test_the_path_is_the_first_file_of_every_step() -> None:
    tour = (
        "## 1. The path\n\n1. `a/b.py:C` and\n   `c.py`\n2. then `d/e.h`\n\nno `f.py`\n\n## 2. X\n"
    )
    assert house.path_of(tour) == ["a/b.py", "d/e.h"]


def test_the_house_is_in_order() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.house"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for room in ("engine/cache", "engine/ops", "engine/ in all", "tests", "cuda"):
        assert re.search(rf"^\| {room} \| \d+ \| [\d,]+ \|", done.stdout, re.M), done.stdout
    assert "with a docstring: 100.0%" in done.stdout
    assert "with types: 100.0%" in done.stdout
    assert "circle of imports: 0" in done.stdout
    assert "to a kernel: 9" in done.stdout
