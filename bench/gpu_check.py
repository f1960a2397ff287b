"""Everything that needs a GPU, in one call of at most ten minutes: build, test, measure, sanitize.

    python -m bench.gpu_check [--dry] [--skip-build] [--out gpu-results]
    python -m bench.gpu_check --build-only

Runs on a bare CUDA machine: torch, nvcc, cmake, pybind11 and pytest must be there; no network, no
pip. Every step has a limit, and one that fails does not stop the others. Commands, times and
results go to results.json and summary.md in the output folder ($OUT where that is set) after
every step, with all output in log.txt beside them. --dry walks through the same steps without a
GPU: the build is real unless it is skipped, the GPU tests are collected but not run, the sanitizer
is left out, the table is measured at toy sizes.

The exit code is 1 if a step failed. compute-sanitizer does not work on every machine: that it
could not run is reported but does not count, what it finds does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bench.common import ROOT, commit, machine, versions

BUDGET_S = 570
KEPT_LINES = 15  # of a step's output, in the report
FOUND = 9  # what compute-sanitizer exits with when it found something
# Small cases of every kernel. Under the sanitizer each takes seconds.
SANITIZED_FILES = ("test_attention.py", "test_fused.py", "test_pages.py", "test_ranking.py")
SANITIZED = (
    "((sanitize and (bfloat16 or products)) or takes_the_highest or accumulates_and_evicts"
    " or (sanitize_pages and (k4v2 or k2v4) and (17 or 129)) or (sanitize_sifting and k4v2 and 33))"
    " and not (575 or 1296 or 2056 or 2880 or 4096 or 5121)"
)


@dataclass
class Step:
    """One command of the check and what became of it.

    ``env`` is added to the environment. A ``soft`` step fails only with exit code ``FOUND``.
    """

    name: str
    command: list[str]
    limit_s: int
    env: dict[str, str] = field(default_factory=dict)
    soft: bool = False
    result: str = "not run"
    seconds: float = 0.0
    last_lines: list[str] = field(default_factory=list)

    @property
    def last_line(self) -> str:
        """The last thing it said."""
        return self.last_lines[-1] if self.last_lines else ""

    @property
    def failed(self) -> bool:
        """Whether this fails the check."""
        if self.soft:
            return self.result == exit_text(FOUND)
        return not self.result.startswith(("ok", "left out"))


def exit_text(code: int) -> str:
    """What a report says of an exit code."""
    return "ok" if code == 0 else f"failed with exit code {code}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="walk through the steps without a GPU")
    parser.add_argument("--skip-build", action="store_true", help="take the module that is there")
    parser.add_argument("--build-only", action="store_true", help="build, and nothing else")
    default = Path(os.environ.get("OUT", ROOT / "gpu-results"))
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args(arguments)
    if options.build_only:
        return build()
    where = machine()
    if where["gpu"] is None and not options.dry:
        print("error: no CUDA device was found\nhint: --dry walks through the steps without one")
        return 1
    listed = steps(options.dry, options.skip_build, options.out)
    facts = {"dry": options.dry, "commit": commit(), "machine": where, "versions": versions()}
    return run_all(listed, options.out, facts)


def steps(dry: bool, skip_build: bool, out: Path) -> list[Step]:
    """The commands in order: what matters most comes first."""
    listed = [] if skip_build else build_steps()
    if not dry:
        listed.append(Step("backend", [sys.executable, "-c", BACKEND], 60))
    tests = Step("tests", [*pytest(), *(["--collect-only"] if dry else ["-rs"])], 240)
    bench = [sys.executable, "-m", "bench.gpu_bench", "--part", "check", "--overwrite"]
    bench += ["--out", str(out), *(["--dry"] if dry else [])]
    return [*listed, tests, Step("table", bench, 120), *sanitizer_steps(dry)]


# The tests skip what the kernels cannot run: that the kernels are there is a step of its own.
BACKEND = (
    "import sys; from engine.ops import native; found = native.backend(); "
    "print(found.reason); sys.exit(found.name != 'cuda')"
)


def build_steps() -> list[Step]:
    """Configure and compile for Hopper alone, into engine/ of this checkout."""
    build = str(ROOT / "build" / f"gpu-check-{sys.implementation.cache_tag}")
    configure = ["cmake", "-S", str(ROOT), "-B", build, "-DAVL_INPLACE=ON", "-DAVL_CUDA=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CUDA_ARCHITECTURES=90-real"]
    if importlib.util.find_spec("pybind11"):
        import pybind11

        configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    compiled = ["cmake", "--build", build, "-j", str(os.cpu_count() or 2)]
    return [Step("configure", configure, 60), Step("build", compiled, 180)]


def build() -> int:
    """Build alone, with the output where one sees it."""
    codes = (subprocess.run(step.command, cwd=ROOT).returncode for step in build_steps())
    return next((code for code in codes if code), 0)


def pytest() -> list[str]:
    """The command that runs the GPU tests.

    Only files that have some: others may import packages that a bare machine does not have. What
    another torch warns about does not fail here.
    """
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    files = [str(path) for path in tests if "mark.gpu" in path.read_text()]
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", *files]


def sanitizer_steps(dry: bool) -> list[Step]:
    """compute-sanitizer's three tools over the kernel tests; without it a step that says so."""
    program = shutil.which("compute-sanitizer")
    if dry or program is None:
        reason = "left out: dry" if dry else "left out: compute-sanitizer is not installed"
        return [Step("sanitizer", [], 0, soft=True, result=reason)]
    return [sanitizer_step(program, tool) for tool in ("memcheck", "racecheck", "initcheck")]


def sanitizer_step(program: str, tool: str) -> Step:
    """One tool over small cases of all kernels.

    Only our kernels are watched, which makes it bearable; initcheck must see everybody's writes.
    """
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
    if tool != "initcheck":
        command += ["--kernel-name", "kns=avl"]
    tests = [
        argument
        for argument in pytest()
        if "test_" not in argument or argument.endswith(SANITIZED_FILES)
    ]
    # Without torch's own cache of memory every tensor has an allocation, whose ends are watched.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, [*command, *tests, "-k", SANITIZED], 90, env, soft=True)


def run_all(listed: list[Step], out: Path, facts: Mapping[str, Any]) -> int:
    """Run the steps, write the report after each; returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    end = time.monotonic() + BUDGET_S
    for step in listed:
        if step.command:
            run(step, log, end - time.monotonic())
        print(f"{step.name}: {step.result} ({step.seconds} s) {step.last_line}", flush=True)
        write(out, facts, listed)
    print(out / "summary.md")
    return int(any(step.failed for step in listed))


def run(step: Step, log: Path, left_s: float) -> None:
    """Run one step, its output behind the log, within its limit and what is left of the budget."""
    limit = min(step.limit_s, left_s)
    if limit <= 0:
        step.result = "not run: out of time"
        return
    began, start = time.monotonic(), log.stat().st_size
    try:
        with log.open("a") as file:
            print(f"==== {step.name}: {shlex.join(step.command)}", file=file, flush=True)
            step.result = exit_text(exit_code(step, file, limit))
    except subprocess.TimeoutExpired:
        step.result = f"stopped after {limit:.0f} s"
    except OSError as error:
        step.result = f"could not start: {error}"
    step.seconds = round(time.monotonic() - began, 1)
    said = log.read_bytes()[start:].decode(errors="replace").splitlines()
    step.last_lines = [line[:200] for line in said if line.strip()][-KEPT_LINES:]


def exit_code(step: Step, log: TextIO, limit: float) -> int:
    """Run a step's command; what it started ends with it, and all of it at the limit."""
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=os.environ | step.env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write(out: Path, facts: Mapping[str, Any], listed: list[Step]) -> None:
    """Write results.json and summary.md."""
    report = {**facts, "steps": [asdict(step) for step in listed]}
    (out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = ["# GPU check" + (" (dry: no GPU was used)" if facts["dry"] else ""), ""]
    lines += [f"* {name}: {value}" for name, value in facts.items()]
    lines += ["", "| step | result | seconds | last line |", "|---|---|---|---|"]
    lines += [
        f"| {s.name}{' (soft)' if s.soft else ''} | {s.result} | {s.seconds} | {s.last_line} |"
        for s in listed
    ]
    for step in listed:
        if step.result != "ok" and step.last_lines:
            lines += ["", f"## The end of {step.name}", "", "```", *step.last_lines, "```"]
    table = next(iter(out.glob("gpu-bench-check*.md")), None)
    if table is not None:
        lines += ["", table.read_text()]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
