"""One benchmark on two commits, in turns: is the new one slower?

    python -m bench.beside OLD NEW -- -m bench.decode --model weights/tiny --alone --blocks 1

OLD and NEW are commits, or folders that hold a checkout. Each is checked out and compiled (for the
CPU) under build/beside/ once. Every block runs the command once in each, first one and then the
other in front, and compares the reports that it writes, row by row: NEW / OLD of every number,
median over the blocks and its interval. What a number means, and whether more of it is better, the
benchmark's own columns say.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.common import ROOT, interval, paired_ratio, progress

Numbers = dict[tuple[str, str], float]  # (row, column) -> value


def main() -> None:
    options = read_options()
    folders = [checkout(name) for name in (options.old, options.new)]
    runs: tuple[list[Numbers], list[Numbers]] = ([], [])
    for block in progress(range(options.blocks), "blocks"):
        for side in (0, 1) if block % 2 == 0 else (1, 0):
            runs[side].append(measured(folders[side], options.command))
    print(table(*runs))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("command", nargs="+", help="behind --: what Python is given")
    return parser.parse_args()


def checkout(name: str) -> Path:
    """A folder with this commit's files and its compiled module."""
    if Path(name).is_dir():
        return Path(name).resolve()
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", f"{name}^{{commit}}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    folder = ROOT / "build" / "beside" / commit
    if not folder.exists():
        tree = ["git", "worktree", "add", "--detach", "--force", str(folder), commit]
        subprocess.run(tree, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    if not list((folder / "engine").glob("_native*")):
        compile_module(folder)
    return folder


def compile_module(folder: Path) -> None:
    import pybind11

    build = folder / "build" / "beside"
    configure = ["cmake", "-S", folder, "-B", build, "-DAVL_INPLACE=ON", "-DAVL_CUDA=OFF"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", build, "--parallel"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measured(folder: Path, command: list[str]) -> Numbers:
    """The numbers of the one report that the command writes in a checkout."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [sys.executable, *command, "--out", out],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        (report,) = Path(out).glob("*.json")
        return numbers(json.loads(report.read_text(encoding="utf-8"))["rows"])


def numbers(rows: list[dict[str, Any]]) -> Numbers:
    """Every number of a report, by its row's words and its column.

    >>> numbers([{"what": "ours", "batch": 1, "tokens/s": 9.5, "95 %": "9-10"}])
    {('ours 1', 'tokens/s'): 9.5}
    """
    found = {}
    for row in rows:
        name = " ".join(str(row[key]) for key in row if _names(key, row[key]))
        for key, value in row.items():
            if isinstance(value, int | float) and not _names(key, value):
                found[name, key] = float(value)
    return found


def _names(key: str, value: object) -> bool:
    """Whether a column tells rows apart: words that are no interval, and counts of rows."""
    return key in ("batch", "rows") or (
        isinstance(value, str) and "%" not in key and "p10" not in key
    )


def table(old: list[Numbers], new: list[Numbers]) -> str:
    """A line for every number that both sides have."""
    lines = ["| row | column | new / old | 95 % |", "| --- | --- | --- | --- |"]
    for row, column in old[0]:
        pairs = [
            (b[row, column], a[row, column])
            for a, b in zip(old, new, strict=True)
            if a.get((row, column)) and (row, column) in b
        ]
        if pairs:
            found = paired_ratio(*(list(side) for side in zip(*pairs, strict=True)))
            lines.append(f"| {row} | {column} | {found['ratio']:.3f} | {interval(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
