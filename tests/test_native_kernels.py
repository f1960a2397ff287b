"""The kernels' own sources on the host: CUDA in the block emulator, the CPU's under sanitizers.

``tests/native/check_kernels.cpp`` compares them with a reference in double. That it would notice a
mistake is shown by planting one in a copy of the sources: each must be caught.
"""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = ["-fsanitize=address"]
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16", "vnni")]
    + ["-mfma", "-mf16c"],
}

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")


def compiled(command: list[str], cwd: Path) -> None:
    done = run(["g++", "-std=gnu++17", "-g1", "-w", *command], cwd)
    assert done.returncode == 0, done.stderr[-4000:]


def copy_sources(to: Path) -> Path:
    shutil.copytree(ROOT / "cuda", to / "cuda")
    shutil.copytree(ROOT / "tests" / "native", to / "tests" / "native")
    return to


def check_emulated(folder: Path, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """Build the check around the CUDA sources of a folder and run it; no CPU kernel is linked."""
    stub = folder / "stub.cpp"
    stub.write_text(
        '#include "cuda/cpu/kernels.h"\n'
        "const avl::CpuKernels* avl::cpu_kernels(const char*) { return nullptr; }\n"
    )
    sources = ["tests/native/check_kernels.cpp", "stub.cpp"]
    compiled([*flags, *sources, "-o", "check"], folder)
    return run(["./check", "emulated"], folder)


def test_cuda_kernels_in_the_emulator_under_address_sanitizer(tmp_path):
    done = check_emulated(copy_sources(tmp_path), ["-O0", *ADDRESS])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "emulated: 0 mistakes" in done.stdout


# what is planted, file, the line as it is, as it becomes, extra flags, what must be said
PLANTED = [
    (
        "a barrier removed before shared memory is read",
        "attention.cuh",
        "mine.acc[i];\n  __syncthreads();",
        "mine.acc[i];",
        [],
        "attention: out",
    ),
    (
        "one row too many at the end of a split",
        "attention.cuh",
        "i < end ? list[i] : -1",
        "i <= end ? list[i] : -1",
        [],
        "attention: out",
    ),
    (
        "keys of the wrong head",
        "attention.cuh",
        "p.kv_head * tier.k_head",
        "0 * tier.k_head",
        [],
        "attention: ",
    ),
    (
        "a row lost where a tier ends",
        "attention.cuh",
        "before += list.count;",
        "before += list.count + 1;",
        [],
        "attention: out",
    ),
    (
        "the logits of a tier over those of another",
        "attention.cuh",
        "* a.width + tier.at;",
        "* a.width;",
        [],
        "attention: logit",
    ),
    (
        "a slot one past the pool accepted",
        "device.cuh",
        "slot < pool_slots",
        "slot <= pool_slots",
        ADDRESS,
        "heap-buffer-overflow",
    ),
    (
        "a logit written past the end",
        "attention.cuh",
        "lane == 0 && i < end && g < p.heads",
        "lane == 0 && g < p.heads",
        ADDRESS,
        "heap-buffer-overflow",
    ),
    (
        "a logit of pages written past the end",
        "sift.cuh",
        "if (lane < p.heads && i < mine.last)",
        "if (lane < p.heads)",
        ADDRESS,
        "heap-buffer-overflow",
    ),
    (
        "values read before all keys are scanned",
        "sift.cuh",
        "    __syncthreads();  // what the block's other groups have written is read next\n",
        "",
        [],
        "pages: ",
    ),
    (
        "a value too many at the end of a share",
        "sift.cuh",
        "i < mine.last ? entries[i] : -1",
        "i <= mine.last ? entries[i] : -1",
        [],
        "pages: ",
    ),
    (
        "the scales of the page before",
        "sift.cuh",
        "__any_sync(ALL_LANES, now != page)",
        "__any_sync(ALL_LANES, page < 0)",
        [],
        "pages: lse",
    ),
    (
        "zeros that are not rescaled",
        "sift.cuh",
        "      zeros[g] *= keep;\n",
        "",
        [],
        "pages: out",
    ),
    (
        "a quarter of a byte that another lane has",
        "pages.cuh",
        "part / 2 * 4 : part * 2",
        "part / 2 * 4 : part * 2 + 1",
        [],
        "pages: ",
    ),
    (
        "entries gathered before they are counted",
        "sift.cuh",
        "numbers[threadIdx.x] = mine;\n  __syncthreads();",
        "numbers[threadIdx.x] = mine;",
        [],
        "pages: ",
    ),
    (
        "what is left out counted by one head twice",
        "sift.cuh",
        "if (blockIdx.x > 0 || threadIdx.x >= LANES",
        "if (threadIdx.x >= LANES",
        [],
        "pages: lse",
    ),
    (
        "a histogram that is not cleared in time",
        "policy.cuh",
        "    counts[threadIdx.x] = 0;\n    __syncthreads();",
        "    counts[threadIdx.x] = 0;",
        [],
        "rank: slot",
    ),
    (
        "the run of another row",
        "policy.cuh",
        "first = a.first[p], last = a.last[p]",
        "first = a.first[p / 2], last = a.last[p / 2]",
        [],
        "rank: slot",
    ),
    (
        "a token written over one that stays",
        "policy.cuh",
        "mine < 0 ? used : mine",
        "mine < 0 ? used - 1 : mine",
        [],
        "age: write",
    ),
    (
        "the sum not rescaled when the maximum grows",
        "attention.cuh",
        "  r.l *= keep;\n",
        "",
        [],
        "attention: lse",
    ),
    (
        "a ticket that does not return to zero",
        "device.cuh",
        "blocks - 1) == unsigned(blocks - 1)",
        "blocks) == unsigned(blocks - 1)",
        [],
        "ticket left",
    ),
    (
        "a shuffle that some lanes skip",
        "attention.cuh",
        "logit[u] = lane_sum<LANES>(sum) * a.scale;",
        "logit[u] = real[u] ? lane_sum<LANES>(sum) * a.scale : 0;",
        [],
        "not reached by all threads",
    ),
]


def missed(case: tuple[str, str, str, str, list[str], str], folder: Path) -> str:
    """Plant one mistake and run the check: empty if it was caught for the right reason."""
    what, file, before, after, flags, said = case
    source = copy_sources(folder) / "cuda" / file
    text = source.read_text()
    assert text.count(before) == 1, f"{file} has not exactly one {before!r}"
    source.write_text(text.replace(before, after))
    done = check_emulated(folder, ["-O0", *flags])
    if done.returncode != 0 and said in done.stdout + done.stderr:
        return ""
    return f"{what}: {done.returncode} {done.stdout[-500:]} {done.stderr[-500:]}"


@pytest.mark.parametrize(
    "cases", [PLANTED[:2], pytest.param(PLANTED[2:], marks=pytest.mark.slow)], ids=["two", "more"]
)
def test_planted_mistakes_are_caught(tmp_path, cases):
    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path / str(number) for number in range(len(cases))]
        problems = [problem for problem in pool.map(missed, cases, folders) if problem]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "isa", [pytest.param("baseline", marks=pytest.mark.slow), "avx2", "avx512"]
)
def test_cpu_kernels_under_sanitizers(tmp_path, isa):
    from engine.ops import native

    if isa != "baseline":
        if native.backend().name == "torch":
            pytest.skip("needs the native module to ask what the processor has")
        from engine import _native

        if isa != _native.cpu_isa():
            pytest.skip(f"{_native.cpu_isa()} is what this processor runs")
    flags = ["-O0", "-fopenmp", *ADDRESS, *UNDEFINED]
    table = tmp_path / "table.cpp"
    table.write_text(
        f'#include <cstring>\n#include "{ROOT}/cuda/cpu/kernels.h"\n'
        f"namespace avl {{ namespace {isa} {{ extern const CpuKernels table; }}\n"
        "const CpuKernels* cpu_kernels(const char* name) {\n"
        f'  return std::strcmp(name, "{isa}") ? nullptr : &{isa}::table; }} }}\n'
    )
    kernels = [f"-DAVL_ISA={isa}", *ISA_FLAGS[isa], "-c", str(ROOT / "cuda/cpu/kernels.cpp")]
    compiled([*flags, *kernels, "-o", "kernels.o"], tmp_path)
    check = str(ROOT / "tests/native/check_kernels.cpp")
    compiled([*flags, "-DAVL_CPU_ONLY", check, "table.cpp", "kernels.o", "-o", "check"], tmp_path)
    done = run(["./check", "cpu"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu: 0 mistakes" in done.stdout
