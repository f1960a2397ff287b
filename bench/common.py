"""What every benchmark here shares: its flags, where it ran, how it is summed up and written down.

Importing this module imports no torch: programs that time a cold start use it too.
"""

import argparse
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SEED = 20240914  # of seeded weights and of random inputs


def make_parser(about: str, name: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has; ``about`` is its module's docstring.

    ``name`` is what its report is called unless ``--name`` says otherwise; None if that depends.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    report = parser.add_argument_group("report")
    report.add_argument("--name", default=name, help="write NAME.json and NAME.md")
    report.add_argument("--out", type=Path, default=RESULTS, help="into this folder")
    report.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    return parser


def read_options(
    parser: argparse.ArgumentParser,
    names: Callable[[argparse.Namespace], Sequence[str]] = lambda options: [options.name],
) -> argparse.Namespace:
    """Read the command line; refuse at once, not after the measurement, to overwrite a report.

    ``names`` are the reports that these options will write.
    """
    options = parser.parse_args()
    paths = [options.out / f"{name}.json" for name in names(options)]
    there = [str(path) for path in paths if path.exists()]
    if there and not options.overwrite:
        parser.error(f"{there[0]} is there already: add --overwrite, or another --name or --out")
    return options


def progress(items: Iterable[Item], unit: str, total: int | None = None) -> Iterator[Item]:
    """The items, counted on a bar on standard error (a bare GPU machine may have no tqdm)."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
    else:
        yield from tqdm(items, unit=" " + unit, total=total, dynamic_ncols=True)


def command() -> str:
    """The command line that repeats this run."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    program = f"python -m {spec.name}" if spec else f"python {os.path.relpath(sys.argv[0], ROOT)}"
    arguments = [argument for argument in sys.argv[1:] if argument != "--overwrite"]
    return " ".join([program, *map(shlex.quote, arguments)])


def commit() -> str:
    """The commit that is measured; "+changes" says that files differ from it."""
    try:
        name = _output("git", "rev-parse", "--short=12", "HEAD")
        changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("AVL_COMMIT", "unknown")  # a copy without its history
    return name + ("+changes" if changed else "")


def machine() -> dict[str, Any]:
    """CPU, instruction set in use, cores, memory and GPU that the numbers belong to."""
    info = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info)
    flags = set(" ".join(re.findall(r"flags\s*:\s*(.+)", info)[:1]).split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    memory = re.search(r"MemTotal:\s+(\d+)", _read("/proc/meminfo"))
    return {
        "cpu": model[1].strip() if model else platform.processor(),
        "cpu_flags": [flag for flag in wanted if flag in flags],
        "isa": isa(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory[1]) / 1e6, 1) if memory else None,
        "gpu": gpu(),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),  # what else was running when this was written
    }


def isa() -> str | None:
    """The instruction set of the engine's CPU kernels; None where there are none."""
    from engine.ops.native import cpu_isa

    return cpu_isa()


def gpu() -> str | None:
    """Name of the first GPU, or None."""
    try:
        return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def versions() -> dict[str, str]:
    """Python and the packages whose version decides a speed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes (mapped files included)."""
    return _status("VmHWM")


def rss() -> int:
    """Resident memory of this process now, in bytes."""
    return _status("VmRSS")


def warm(paths: Sequence[Path]) -> int:
    """Reads files once, so that they lie in the page cache; returns their bytes."""
    total = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(16 << 20):
                total += len(chunk)
    return total


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median with the 10 % and 90 % points; for few values these are the extremes."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
    }


def paired_ratio(
    ours: Sequence[float], theirs: Sequence[float], resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Median of the ratios ours / theirs within each round, with a 95 % bootstrap interval.

    Rounds are measured one after the other (ours, theirs, ours, ...), so that whatever slows the
    machine down meets both.

    >>> paired_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    {'ratio': 0.5, 'low': 0.5, 'high': 0.5}
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(seed)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples)
    )
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
    return {"ratio": statistics.median(ratios), "low": low, "high": high}


def interval(ratio: Mapping[str, float]) -> str:
    """A 95 % interval as text."""
    return f"{ratio['low']:.3g}-{ratio['high']:.3g}"


def write_report(
    name: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    folder: Path | None = None,
) -> Path:
    """Writes `<name>.json` (everything) and `<name>.md` (the rows as a table); returns the first.

    Args:
        name: of the measurement, for example "load".
        settings: dtype, seed, threads, model shape and whatever else was chosen.
        rows: what was measured; the keys of the first row are the columns.
        notes: sentences that belong under the table.
        folder: where to; default `bench/results`.
    """
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "name": name,
        "command": command(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": versions(),
        "settings": dict(settings),
        "rows": [dict(row) for row in rows],
        "notes": list(notes),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    (folder / f"{name}.md").write_text(markdown(record))
    return path


def markdown(record: Mapping[str, Any]) -> str:
    """A record of `write_report` for people: one table, and where it comes from."""
    lines = [f"# {record['name']}", "", *origin(record), "", *table(record["rows"]), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in record["notes"])])


def origin(record: Mapping[str, Any]) -> list[str]:
    """Lines that say where a record comes from, and how to get it again."""
    where = record["machine"]
    kernels = f"{where['isa'] or 'no'} CPU kernels, " if "isa" in where else ""  # old ones lack it
    lines = [
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores, {kernels}"
        f"commit {record['commit']}, "
        + ", ".join(f"{package} {number}" for package, number in record["versions"].items()),
        "",
        ", ".join(f"{key} {cell(value)}" for key, value in record["settings"].items()),
    ]
    if "command" in record:
        lines += ["", f"Again: `{record['command']}`"]
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as lines of Markdown; the keys of the first one are the columns."""
    columns = list(rows[0])
    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]


def cell(value: object) -> str:
    """A value with four figures, nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "" if value is None else str(value)


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", _read("/proc/self/status"))
    if not found:
        raise RuntimeError("memory is measured through /proc/self/status, which needs Linux")
    return int(found[1]) * 1024
