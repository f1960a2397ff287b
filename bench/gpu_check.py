"""Everything that needs a GPU, in one call of at most ten minutes: build, test, sanitize, measure.

    python bench/gpu_check.py [--dry] [--out gpu-results]

Runs on a bare CUDA machine: torch, nvcc, cmake, pybind11 and pytest must be there; no network, no
pip. Each step's command, time and result go to results.json and summary.md in the output folder
(``$OUT`` where that is set), with the full logs beside them. ``--dry`` walks the same steps on a
machine without a GPU: the build is real, the GPU tests are collected but not run.
The exit code is 1 if a step failed; compute-sanitizer is reported but does not count, since it does
not work on every machine.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 570


@dataclass
class Step:
    """One command of the check and what became of it."""

    name: str
    command: list[str]
    limit_s: int
    soft: bool = False
    result: str = "not run"
    seconds: float = 0.0


def output(command: list[str]) -> str:
    """Give what a command prints, or why it could not run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def machine() -> dict[str, str]:
    """Name what the results depend on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    nvcc = output(["nvcc", "--version"]).splitlines()[-1]
    commit = output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    return {"gpu": gpu, "torch": torch.__version__, "nvcc": nvcc, "commit": commit}


def steps(dry: bool, out: Path) -> list[Step]:
    """List the commands in order."""
    import pybind11

    build = str(ROOT / "build" / "gpu-check")
    configure = ["cmake", "-S", str(ROOT), "-B", build, "-DAVL_INPLACE=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DAVL_CUDA=ON"]
    # Only files with GPU tests: others may import packages that a bare machine does not have.
    files = [
        str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()
    ]
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", *files]
    listed = [
        Step("configure", configure, 60),
        Step("build", ["cmake", "--build", build, "-j", str(os.cpu_count() or 2)], 180),
        Step("tests", [*pytest, "--collect-only"] if dry else pytest, 240),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and not dry:
        few = [*pytest, "-k", "sanitize"]
        listed.append(Step("sanitizer", [sanitizer, "--error-exitcode", "9", *few], 120, soft=True))
    bench = [
        sys.executable,
        str(ROOT / "bench" / "kernels.py"),
        "--overwrite",
        "--out",
        str(out),
    ]
    if Path(bench[1]).exists():
        device = ["--device", "cpu", "--quick"] if dry else ["--device", "cuda", "--levels"]
        listed.append(Step("kernels", [*bench, *device], 180))
    return listed


def run(step: Step, log: Path, left_s: float) -> None:
    """Run one step, its output to a log file, within its limit and what is left of the budget."""
    limit = min(step.limit_s, left_s)
    if limit <= 0:
        step.result = "skipped: out of time"
        return
    began = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
            step.result = "ok" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            step.result = f"stopped after {limit:.0f} s"
    step.seconds = round(time.monotonic() - began, 1)


def write(out: Path, facts: dict[str, str], done: list[Step], dry: bool) -> None:
    """Write results.json and summary.md."""
    report = {"dry": dry, "machine": facts, "steps": [asdict(step) for step in done]}
    (out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = ["# GPU check" + (" (dry: no GPU was used)" if dry else ""), ""]
    lines += [f"* {name}: {value}" for name, value in facts.items()]
    lines += ["", "| step | result | seconds |", "|---|---|---|"]
    lines += [f"| {s.name}{' (soft)' if s.soft else ''} | {s.result} | {s.seconds} |" for s in done]
    for step in done:
        log = out / f"{step.name}.log"
        if step.result != "ok" and log.exists():
            tail = log.read_text(errors="replace").splitlines()[-15:]
            lines += ["", f"## The end of {log.name}", "", "```", *tail, "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="walk the steps without a GPU")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "gpu-results"))
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    facts = machine()
    if facts["gpu"] == "none" and not options.dry:
        print("error: no CUDA device was found\nhint: --dry walks the steps without one")
        return 1
    end = time.monotonic() + BUDGET_S
    listed = steps(options.dry, options.out)
    for step in listed:
        run(step, options.out / f"{step.name}.log", end - time.monotonic())
        print(f"{step.name}: {step.result} ({step.seconds} s)", flush=True)
        write(options.out, facts, listed, options.dry)
        if step.name in ("configure", "build") and step.result != "ok":
            break
    return int(any(s.result != "ok" and not s.soft for s in listed))


if __name__ == "__main__":
    sys.exit(main())
