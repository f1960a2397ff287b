"""Every figure that needs a GPU, in parts of at most ten minutes, each beside its prediction.

    python -m bench.gpu_bench --part 2         measure; rows that are in the report already stay
    python -m bench.gpu_bench --part 2 --dry   walk through it at toy sizes on a CPU
    python -m bench.gpu_bench --predict        the predictions of all parts, without a device

    1 kernels   2 decode, 7B   3 decode, 13B   4 transformers beside ours
    5 memory, and throughput at equal memory   6 forms of selection, fused kernels
    7 the cache in few bits

Models have real shapes and seeded weights made on the device; nothing is read from disk. A report
is written after every cell, so that a run that is stopped goes on where it was: run it again, or
name an earlier report's folder with --resume. Only one of the same commit, GPU and torch goes on.

Exit codes: 0 all rows are there, 1 some failed, 2 wrong use, 3 out of time (run it again).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from bench import common
from bench.gpu_cells import Cell, Device, Row, complete, merged
from bench.gpu_parts import DRY, PARTS, REAL, Scale
from bench.gpu_timing import read_peak
from engine.ops import native

DRY_NOTE = "Dry: toy sizes on a CPU, to see that everything runs. The figures mean nothing."
NOTES = [
    '"floor": reading the bytes once at 4.3 TB/s. "of read peak": against this run\'s own measured '
    "read bandwidth.",
    "Ratios are to the first row of a cell, paired within blocks.",
]
# Facts that must agree for a report to be gone on with.
SAME = ("commit", "gpu", "torch", "dry")


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    if options.predict:
        print(predictions())
        return 0
    scale = DRY if options.dry else REAL
    if problem := unusable(options.dry):
        print(f"error: {problem}\nhint: --dry walks through it without a GPU", file=sys.stderr)
        return 1
    report = Report(options, scale)
    if problem := report.resume(options.resume or options.out, options.overwrite):
        print(f"error: {problem}\nhint: add --overwrite, or another --out", file=sys.stderr)
        return 2
    return run(options.part, scale, report, 60 * options.minutes)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__ or "", name=None)
    parser.set_defaults(out=None)
    parser.add_argument("--part", choices=list(PARTS), help="which; check is that of gpu-check")
    parser.add_argument("--dry", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--predict", action="store_true", help="print what is expected, and stop")
    parser.add_argument("--resume", type=Path, help="a folder with earlier reports to go on from")
    parser.add_argument("--minutes", type=float, default=8, help="start no cell after so many")
    options = parser.parse_args(arguments)
    if not options.predict and options.part is None:
        parser.error("which part? --part 1 to 7, or --predict")
    options.name = options.name or f"gpu-bench-{options.part}{'-dry' if options.dry else ''}"
    options.out = options.out or default_folder(options.dry)
    return options


def default_folder(dry: bool) -> Path:
    """$OUT, or gpu-results; a dry run's report goes where nobody takes it for a measurement."""
    if "OUT" in os.environ:
        return Path(os.environ["OUT"])
    return Path(tempfile.mkdtemp(prefix="gpu-bench-")) if dry else common.ROOT / "gpu-results"


def unusable(dry: bool) -> str:
    """Why this machine cannot measure; "" if it can."""
    if dry:
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    backend = native.backend()
    return "" if backend.name == "cuda" else f"the CUDA kernels are not active: {backend.reason}"


def predictions() -> str:
    """Tables of what every part is expected to measure, as Markdown."""
    columns = ("cell", "what", "unit", "predicted", "predicted ratio", "goal", "floor", "GB read")
    lines: list[str] = []
    for number, (title, cells) in PARTS.items():
        if number == "check":
            continue
        rows = [row for cell in cells(REAL) for row in complete(cell, cell.predicted())]
        shown = [{column: row[column] for column in columns} for row in rows]
        lines += [f"### Part {number}: {title}", "", *common.table(shown), ""]
    return "\n".join(lines).rstrip()


class Report:
    """The rows so far, on disk after every cell."""

    def __init__(self, options: argparse.Namespace, scale: Scale) -> None:
        self.folder, self.name, self.part = options.out, options.name, options.part
        self.rows: list[Row] = []
        self.facts = {
            "commit": common.commit(),
            "gpu": common.gpu(),
            "torch": torch.__version__,
            "dry": scale.dry,
        }
        self.settings: dict[str, Any] = {}

    def resume(self, folder: Path, afresh: bool) -> str:
        """Take over an earlier report's good rows; returns why that cannot be done, or ""."""
        path = folder / f"{self.name}.json"
        if afresh or not path.exists():
            return ""
        try:
            record = json.loads(path.read_text())
            there = {name: record["settings"][name] for name in SAME}
        except (ValueError, KeyError, TypeError):
            return f"{path} is not a report of this benchmark"
        other = [f"{name} {there[name]}" for name in SAME if there[name] != self.facts[name]]
        if other:
            return f"{path} was measured with another {', '.join(other)}"
        self.rows = [row for row in record["rows"] if not row["failed"]]
        return ""

    @property
    def done(self) -> set[str]:
        """Keys of the cells whose rows are there."""
        return {row["cell"] for row in self.rows if not row["failed"]}

    def add(self, rows: list[Row]) -> None:
        """Write a cell's rows down at once."""
        self.rows += rows
        notes = [DRY_NOTE, *NOTES] if self.facts["dry"] else NOTES
        settings = self.facts | self.settings
        common.write_report(self.name, settings, self.rows, notes, self.folder)


def run(part: str, scale: Scale, report: Report, seconds: float) -> int:
    """Measure the cells of a part that are not there yet."""
    end = monotonic() + seconds
    title, make = PARTS[part]
    left = [cell for cell in make(scale) if cell.key not in report.done]
    print(f"part {part}, {title}: {len(report.done)} cells are there, {len(left)} to measure")
    on = prepare(scale, report) if left else None
    for number, cell in enumerate(left):
        if monotonic() > end:
            print(f"out of time with {len(left) - number} cells left: run it again", flush=True)
            return 3
        assert on is not None
        rows = attempt(cell, on)
        report.add(rows)
        print("\n".join(map(line, rows)), flush=True)
        if rows[0]["failed"] and (problem := broken(on)):
            print(f"the device no longer answers: {problem}", flush=True)
            return 1
    print(f"{report.folder / report.name}.md\nagain: {common.command()}")
    return int(any(row["failed"] for row in report.rows))


def prepare(scale: Scale, report: Report) -> Device:
    """The device, and what it reads at best."""
    torch.manual_seed(common.SEED)
    device = torch.device("cpu" if scale.dry else "cuda")
    dtype = torch.float32 if scale.dry else torch.bfloat16
    on = Device(device, dtype, read_peak(device, 1 << (20 if scale.dry else 30)))
    report.settings = {
        "part": report.part,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": common.SEED,
        "native": native.backend().name,
        "read GB/s": on.read_peak / 1e9,
    }
    return on


def attempt(cell: Cell, on: Device) -> list[Row]:
    """Measure a cell; what goes wrong is its row, and the others go on."""
    try:
        return merged(cell, on)
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().splitlines()[:1]
        return complete(cell, [{"failed": f"{type(error).__name__}: {''.join(first)[:200]}"}])
    finally:
        on.tidy()


def broken(on: Device) -> str:
    """Why nothing more can run after an error on the device; "" if it can."""
    try:
        if on.device.type == "cuda":
            torch.cuda.synchronize(on.device)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return ""


def line(row: Row) -> str:
    """A row on one line: what was expected, and what came."""
    if row["failed"]:
        return f"  FAILED {row['cell']}: {row['failed']}"
    shown = [f"  {row['cell']}: {row['what']}"]
    for name in ("predicted", "measured", "predicted ratio", "ratio", "goal"):
        if row[name] is not None:
            shown.append(f"{name} {common.cell(row[name])}")
    return f"{', '.join(shown)} ({row['unit']})"


if __name__ == "__main__":
    sys.exit(main())
