"""How the house stands: lines, functions and words of every room, beside the commit before it.

    python -m bench.house

A *room* is a folder of engine/, or one of the others that stand beside it. A function's lines are
those from ``def`` to its end; one inside another is counted as a part of that.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import grimp

from bench.common import ROOT, table

BEFORE = "cd922da"  # the commit before the house was built
BESIDE = ("weights", "cuda", "bench", "training", "tests")
SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh", ".js", ".css", ".html")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Room:
    """The sources of a folder, or of several."""

    name: str
    files: list[Path]

    @property
    def lines(self) -> int:
        """Lines of all files."""
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in self.files)

    @property
    def trees(self) -> list[ast.Module]:
        """What the Python files say."""
        python = (path for path in self.files if path.suffix == ".py")
        return [ast.parse(path.read_text(encoding="utf-8")) for path in python]

    def row(self) -> list[str]:
        """A line of the table."""
        lengths = [length(found) for tree in self.trees for found in functions(tree.body)]
        sizes = [f"{median(lengths):g}", str(max(lengths))] if lengths else ["-", "-"]
        return [self.name, str(len(self.files)), f"{self.lines:,}", *sizes]


def rooms() -> list[Room]:
    """Every folder of engine/, engine/ as a whole, and what stands beside it."""
    engine = ROOT / "engine"
    inside = sorted(path for path in engine.iterdir() if (path / "__init__.py").exists())
    found = [Room(f"engine/{path.name}", sources(path)) for path in inside]
    found.append(Room("engine/*.py", [p for p in sources(engine) if p.parent == engine]))
    found.append(Room("engine/ in all", sources(engine)))
    return [*found, *(Room(name, sources(ROOT / name)) for name in BESIDE)]


def sources(folder: Path) -> list[Path]:
    """Source files under a folder, nothing that is built."""
    found = (path for path in folder.rglob("*") if path.suffix in SOURCES)
    return sorted(path for path in found if "__pycache__" not in path.parts)


def functions(body: Iterable[ast.stmt]) -> Iterator[Function]:
    """Functions of a module or class, not those inside of others."""
    for node in body:
        if isinstance(node, Function):
            yield node
        elif isinstance(node, ast.ClassDef | ast.If | ast.Try):
            yield from functions(node.body)


def length(node: Function) -> int:
    """Lines of a function, its docstring among them."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def public(body: Iterable[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    """Public functions and classes, members of public classes among them; no special methods."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


def typed(node: Function) -> bool:
    """Whether every parameter but self, and what comes back, has a type."""
    given = node.args
    parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    named = [p for p in parameters if p is not None and p.arg not in ("self", "cls")]
    return node.returns is not None and all(p.annotation is not None for p in named)


def shares(room: Room) -> dict[str, float]:
    """Shares of public names with a docstring, and of all functions with types."""
    bodies = [tree.body for tree in room.trees]
    names = [node for body in bodies for node in public(body)]
    all_functions = [node for body in bodies for node in functions(body)]
    return {
        "documented": sum(ast.get_docstring(node) is not None for node in names) / len(names),
        "typed": sum(map(typed, all_functions)) / len(all_functions),
    }


def circles() -> list[str]:
    """Modules of engine/ that are reached from what they import, imports for types included."""
    graph = grimp.build_graph("engine", exclude_type_checking_imports=False)
    return [
        module
        for module in sorted(graph.modules)
        for imported in graph.find_modules_directly_imported_by(module)
        if module in graph.find_upstream_modules(imported)
    ]


def path_of(tour: str) -> list[str]:
    """The files of the tour's path: the first that each numbered step of its section names."""
    (section,) = re.findall(r"^## [^\n]*\bpath\b[^\n]*\n(.*?)(?=^## )", tour, re.M | re.S)
    steps = re.split(r"^\d+\. ", section, flags=re.M)[1:]
    return [re.findall(r"`([\w/.]+\.\w+)(?::[\w.]+)?`", step)[0] for step in steps]


def lines_before() -> int | None:
    """Lines of Python in engine/ and weights/ before the house; None where history ends earlier."""
    listed = _git("ls-tree", "-r", "--name-only", BEFORE, "engine", "weights")
    if listed is None:
        return None
    names = [name for name in listed.split() if name.endswith(".py")]
    return sum(len((_git("show", f"{BEFORE}:{name}") or "").splitlines()) for name in names)


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def main() -> None:
    """Print all of it."""
    engine = Room("engine", sources(ROOT / "engine"))
    now = Room("now", [p for p in [*engine.files, *sources(ROOT / "weights")] if p.suffix == ".py"])
    headings = ["room", "files", "lines", "median function", "longest"]
    print("\n".join(table([dict(zip(headings, room.row(), strict=True)) for room in rooms()])))
    found, before = shares(engine), lines_before()
    path = path_of((ROOT / "docs" / "tour.md").read_text(encoding="utf-8"))
    print(f"\npublic names of engine/ with a docstring: {found['documented']:.1%}")
    print(f"functions of engine/ with types: {found['typed']:.1%}")
    print(f"modules in a circle of imports: {len(circles())}")
    print(f"files from Engine.generate to a kernel: {len(path)}")
    told = "unknown here" if before is None else f"{before:,}"
    print(f"lines of Python in engine/ and weights/: {now.lines:,}; at {BEFORE}: {told}")


if __name__ == "__main__":
    main()
