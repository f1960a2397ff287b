"""A batch job on a local Ray cluster: every request answered once, whatever dies, and how fast.

    pip install "ray[data]"
    python -m bench.spread [--requests 2000]

The job asks the embedded model about drawn pictures; every hundredth names a picture that is not
there, and one request takes its worker with it, once. Its answers are compared with those of
``--batch`` alone on one core, line by line. A second run of that job is killed in the middle and
started again. *per core* is the throughput of each worker, of one core, beside that of ``--batch``
alone, and beside that of two of those at once, each with half of the job: busy cores share caches
and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import common

FIRST = 800_000  # seed of the pictures
BROKEN_EVERY = 100
WORKERS = 2
QUESTIONS = ("What colour is the car?", "Describe the picture.", "How many objects are there?")


def write_job(folder: Path, requests: int) -> Path:
    """The job file beside its pictures."""
    from training.scenes import make_scene

    for number in common.progress(range(50), "pictures drawn"):
        make_scene(FIRST + number).image.save(folder / f"{number}.png")
    lines = []
    for number in range(requests):
        broken = number % BROKEN_EVERY == BROKEN_EVERY - 1
        picture = "missing.png" if broken else f"{number % 50}.png"
        line = {"prompt": QUESTIONS[number % 3], "images": [picture], "max_new_tokens": 24}
        lines.append(json.dumps(line))
    path = folder / "job.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def flags_of(job: Path, target: Path, *more: str) -> argparse.Namespace:
    """The command line's flags for it."""
    from engine.app.flags import parse_flags

    words = ["--batch", str(job), "--output", str(target), "--threads", "1", "-q", *more]
    return parse_flags(words)[0]


def spread(job: Path, target: Path, deadly: int) -> float:
    """Seconds that the cluster took, from the first answer to the last; one worker dies."""
    from engine.app import spread as spreading
    from engine.app.cluster import connected
    from engine.app.job import Job

    flags = flags_of(job, target, "--ray", "local", "--workers", str(WORKERS))
    marker = target.with_suffix(".died")

    class Deadly(spreading.Worker):
        def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
            if deadly in batch["number"] and not marker.exists():
                marker.touch()
                os._exit(9)
            return super().__call__(batch)

    class DeadlyRun(spreading.SpreadRun):
        worker = Deadly

    first = None
    with connected("local", "data"):
        run = DeadlyRun(flags, Job.read(job, {}))
        for done in run.into(target):
            first = first or (time.perf_counter(), done)
    assert first is not None
    assert marker.exists() or deadly < 0
    return (time.perf_counter() - first[0]) / (len(run.job) - first[1])


def alone(job: Path, target: Path) -> float:
    """Seconds of a request with one engine on one core."""
    from engine.app.batch_file import BatchRun
    from engine.app.inputs import engine_of
    from engine.app.job import Job

    flags = flags_of(job, target)
    run, first = BatchRun(engine_of(flags), Job.read(job, {}), flags.rows), None
    for done in run.into(target):
        if done:
            first = first or (time.perf_counter(), done)
    assert first is not None
    return (time.perf_counter() - first[0]) / (len(run.job) - first[1])


def two_alone(job: Path, folder: Path) -> float:
    """Seconds of a request with two engines that know nothing of each other, a core each."""
    lines, processes = job.read_text().splitlines(keepends=True), []
    for number in range(WORKERS):
        part = folder / f"half-{number}.jsonl"
        part.write_text("".join(lines[number::WORKERS]))
        given = f"Path({str(part)!r}), Path({str(part)!r} + '.out')"
        code = f"from bench.spread import *; print(alone({given}))"
        processes.append(
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        )
    return sum(float(each.communicate()[0]) for each in processes) / WORKERS**2


def killed_and_resumed(job: Path, target: Path) -> int:
    """Run the command line, kill it in the middle, run it again; how many lines it had."""
    command = [sys.executable, "-m", "engine", "batch", str(job), "--output", str(target)]
    command += ["--ray", "local", "--workers", str(WORKERS), "--threads", "1", "-q"]
    process = subprocess.Popen(command, start_new_session=True)
    while not target.exists() or target.read_bytes().count(b"\n") < 200:
        time.sleep(0.5)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    had = target.read_bytes().count(b"\n")
    done = subprocess.run(command, check=False)
    assert done.returncode == 3  # that of the first broken picture
    return had


def main() -> None:
    """Measure, compare, and write the report."""
    parser = common.make_parser(__doc__, name="spread")
    parser.add_argument("--requests", type=int, default=2000)
    args = common.read_options(parser)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        job = write_job(folder, args.requests)
        cluster = spread(job, folder / "cluster.jsonl", args.requests // 3)
        single = alone(job, folder / "alone.jsonl")
        pair = two_alone(job, folder)
        had = killed_and_resumed(job, folder / "resumed.jsonl")
        expected = (folder / "alone.jsonl").read_bytes().splitlines()
        found = {
            name: (folder / f"{name}.jsonl").read_bytes().splitlines()
            for name in ("cluster", "resumed")
        }
    broken = sum(b'"error"' in line for line in expected)
    rows = [
        {
            "job": name,
            "requests": args.requests,
            "answered once": len(lines),
            "errors": sum(b'"error"' in line for line in lines),
            "lines as alone": sum(a == b for a, b in zip(lines, expected, strict=False)),
            "requests/s": round(1 / cluster, 2) if name == "cluster" else None,
            "per core": round(single / cluster / WORKERS, 3) if name == "cluster" else None,
            "beside two": round(pair / cluster, 3) if name == "cluster" else None,
            "lines when killed": had if name == "resumed" else None,
        }
        for name, lines in found.items()
    ]
    settings = {"workers": WORKERS, "alone, requests/s": round(1 / single, 2)}
    settings |= {"two alone, requests/s": round(1 / pair, 2), "broken": broken}
    settings |= {"seed": FIRST, "dtype": "fp32", "threads": 1}
    path = common.write_report(args.name, settings, rows, (), args.out)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
