"""Attention kernels over LLaVA's shapes: full, slice-then-multiply, ours in place, torch's SDPA.

    python -m bench.kernels [--device cpu|cuda] [--threads N] [--quick]

Every contestant computes one decode step's attention of one layer. Contestants are interleaved and
the pools rotated over enough memory that no cache helps; reported are medians, the ratio to SDPA
over all rows (median of paired ratios), bytes touched, GB/s, and the share of the read bandwidth
measured in the same run. On a CPU follow the products of few rows, with the ceiling of our own
loop, and those of many rows in GFLOPS, against torch's linear.
Read the ratios on a quiet machine: the load of other processes is printed first.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common
from engine.ops import native, products
from engine.ops.attention import AttentionPlan, Tier
from engine.ops.few_bits import quantise

HEADS, HEAD_DIM = 32, 128  # LLaVA-1.5/1.6 7B
CEILING = ", in the cache"
SECONDARY, CORE, EVERY = 0.45, 0.30, 3  # A-VL's S, C and K


@dataclass
class Row:
    """One contestant's result."""

    case: str
    name: str
    ms: float
    ratio_to_sdpa: float
    bytes_read: int
    gb_per_s: float
    share_of_read_bandwidth: float


@dataclass
class Speed:
    """A product of many rows: billions of operations in a second, and its time by torch's."""

    case: str
    name: str
    gflops: float
    ratio_to_torch: float

    def __str__(self) -> str:
        return (
            f"{self.case}, {self.name}: {self.gflops:.1f} GFLOPS, "
            f"{self.ratio_to_torch:.2f} of torch's time"
        )


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[int], object], turn: int, device: str) -> float:
    synchronize(device)
    began = time.perf_counter()
    call(turn)
    synchronize(device)
    return time.perf_counter() - began


def interleaved(
    calls: dict[str, Callable[[int], object]], turns: int, device: str
) -> dict[str, list[float]]:
    """Seconds of every call, one of each per turn after two turns of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            spent = timed(call, turn, device)
            if turn >= 2:
                seconds[name].append(spent)
    return seconds


def read_bandwidth(device: str, quick: bool) -> float:
    """GB/s of reading a large buffer once and doing nothing else."""
    count = 1 << (25 if quick else 28)
    data = torch.ones(count, device=device)
    read = native.read_all if device == "cpu" else torch.sum
    best = min(timed(lambda _: read(data), turn, device) for turn in range(7))
    return count * 4 / best / 1e9


def contestants(
    rows: int, tokens: int, dtype: torch.dtype, device: str, copies: int
) -> tuple[dict[str, Callable[[int], object]], dict[str, int]]:
    """The calls to time, and how many cached tokens each reads for each row."""
    size = (rows * tokens, HEADS, HEAD_DIM)
    pools = [torch.randn(2, *size, device=device).to(dtype) for _ in range(copies)]
    # SDPA is given the layout it likes best: head-major.
    heads_first = [
        p.view(2, rows, tokens, HEADS, HEAD_DIM).transpose(2, 3).contiguous() for p in pools
    ]
    q = torch.randn(rows, HEADS, HEAD_DIM, device=device).to(dtype)
    first = torch.arange(rows, device=device)[:, None] * tokens
    core = torch.randperm(tokens, device=device)[: int(CORE * tokens)].sort().values
    stored = torch.arange(int(SECONDARY * tokens), device=device)
    everything = torch.arange(tokens, device=device)

    def plans(listed: torch.Tensor) -> list[AttentionPlan]:
        slots = (first + listed).int()[:, None]
        return [AttentionPlan(q, [Tier(p[0], p[1], slots)]) for p in pools]

    ours = {"all": plans(everything), "secondary": plans(stored), "core": plans(core)}
    query = q[:, :, None]

    def cycle(turn: int) -> None:
        for step in range(EVERY):
            ours["secondary" if step == EVERY - 1 else "core"][(turn + step) % copies].run()

    def sliced(turn: int) -> None:
        k, v = heads_first[turn % copies]
        chosen = (t.index_select(2, core) for t in (k, v))
        F.scaled_dot_product_attention(query, *chosen)

    calls: dict[str, Callable[[int], object]] = {
        "sdpa, all": lambda t: F.scaled_dot_product_attention(query, *heads_first[t % copies]),
        "ours, all": lambda t: ours["all"][t % copies].run(),
        "ours, core in place": lambda t: ours["core"][t % copies].run(),
        f"ours, mean of {EVERY} steps": cycle,
        "slice core, then sdpa": sliced,
    }
    mean = ((EVERY - 1) * len(core) + len(stored)) / EVERY
    read = dict(zip(calls, (tokens, tokens, len(core), mean, len(core)), strict=True))
    return calls, {name: int(count) for name, count in read.items()}


def measure(
    rows: int, tokens: int, dtype: torch.dtype, device: str, peak: float, quick: bool
) -> list[Row]:
    bytes_each = 2 * HEADS * HEAD_DIM * dtype.itemsize
    target = (1 << 28) if quick else (1 << 30)
    copies = max(2, min(64, target // (rows * tokens * bytes_each)))
    calls, read = contestants(rows, tokens, dtype, device, copies)
    seconds = interleaved(calls, 5 if quick else 31, device)
    cycle = f"ours, mean of {EVERY} steps"
    seconds[cycle] = [s / EVERY for s in seconds[cycle]]
    case = f"{rows} x {tokens} {str(dtype).removeprefix('torch.')}"
    result = []
    for name, spent in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(spent, seconds["sdpa, all"], strict=True))
        median = statistics.median(spent)
        touched = read[name] * rows * bytes_each
        speed = touched / median / 1e9
        result.append(Row(case, name, median * 1e3, ratio, touched, speed, speed / peak))
    return result


def measure_gemv(peak: float, quick: bool) -> list[Row]:
    """The linear layers of a 7B decoder in every format: our GEMV, and torch's linear in bf16.

    The ceiling is what our loop does with weights that lie in the cache: no memory slows it down.
    """
    result = []
    for out, size in ((4096, 4096), (11008, 4096)):
        plain = [torch.randn(out, size).bfloat16() for _ in range(2 if quick else 12)]
        formats: dict[str, list[products.Weight]] = {"bf16": list(plain)}
        for name, most in (("q8", 24), ("q4", 40)):  # copies beyond the reach of a cache
            few = quantise(plain[0], name)
            codes = (few.codes.clone() for _ in range(2 if quick else most))
            formats[name] = [replace(few, codes=each) for each in codes]
        for rows in (1, 4, 8, 16):
            x = torch.randn(rows, size).bfloat16()
            calls: dict[str, Callable[[int], object]] = {
                "torch linear": lambda t, x=x, w=plain: F.linear(x, w[t % len(w)])
            }
            read = {"torch linear": plain[0].nbytes}
            for name, weights in formats.items():
                few_rows = 64 * torch.get_num_threads() * (1 if name == "bf16" else 2)
                part = some_rows(weights[0], few_rows)
                cached = [(part, None)] * (out // few_rows)
                for label, call in {
                    name: lambda t, x=x, w=weights: products.gemv(x, (w[t % len(w)], None)),
                    f"{name}{CEILING}": lambda t, x=x, w=cached: products.gemv(x, *w),
                }.items():
                    calls[label], read[label] = call, weights[0].nbytes
            seconds = interleaved(calls, 5 if quick else 31, "cpu")
            result += product_rows(f"linear {rows} x {size} -> {out}", seconds, read, peak)
    return result


def some_rows(weight: products.Weight, count: int) -> products.Weight:
    """The first rows of a weight."""
    if isinstance(weight, torch.Tensor):
        return weight[:count].contiguous()
    return weight.rows(0, count)


def measure_gemm(quick: bool) -> list[Speed]:
    """A prefill's and a tower's products: torch's, ours, and what the engine chooses."""
    result = []
    shapes = ((577, 1024, 4096), (591, 2048, 6144), (640, 4096, 11008))
    for rows, size, out in shapes[:1] if quick else shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, w = torch.randn(rows, size).to(dtype), torch.randn(out, size).to(dtype)
            calls: dict[str, Callable[[int], object]] = {
                "torch linear": lambda t, x=x, w=w: F.linear(x, w),
                "gemm": lambda t, x=x, w=w: products.gemm(x, (w, None)),
                "chosen": lambda t, x=x, w=w: products.many_rows(x, w, None),
            }
            case = f"linear {rows} x {size} -> {out} {str(dtype).removeprefix('torch.')}"
            seconds = interleaved(calls, 1 if quick else 3, "cpu")
            for name, spent in seconds.items():
                ratio = common.paired_ratio(spent, seconds["torch linear"])["ratio"]
                work = 2e-9 * rows * size * out
                result.append(Speed(case, name, work / statistics.median(spent), ratio))
    return result


def product_rows(
    case: str, seconds: dict[str, list[float]], read: dict[str, int], peak: float
) -> list[Row]:
    """Lines of the table for a product; ``read`` has the bytes of its weights."""
    result = []
    for name, spent in seconds.items():
        pairs = zip(spent, seconds["torch linear"], strict=True)
        ratio, median = statistics.median(a / b for a, b in pairs), statistics.median(spent)
        speed = read[name] / median / 1e9
        result.append(Row(case, name, median * 1e3, ratio, read[name], speed, speed / peak))
    return result


def show(rows: list[Row]) -> None:
    case = ""
    for row in rows:
        if row.case != case:
            case = row.case
            print(
                f"\n{case}\n  {'':24} {'ms':>9} {'ratio':>7} {'MB':>8} {'GB/s':>8} {'of peak':>8}"
            )
        print(
            f"  {row.name:24} {row.ms:9.3f} {row.ratio_to_sdpa:7.2f} {row.bytes_read / 1e6:8.1f}"
            f" {row.gb_per_s:8.1f} {row.share_of_read_bandwidth:8.0%}"
        )


def main() -> int:
    parser = common.make_parser(__doc__, name="kernels")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (ratios: 1 is safest)")
    parser.add_argument("--quick", action="store_true", help="small and short: a smoke test")
    options = common.read_options(parser)
    torch.set_num_threads(options.threads)
    torch.manual_seed(common.SEED)
    if native.backend().name == "torch":
        print(f"error: {native.backend().reason}\nhint: build the native module first (make test)")
        return 1
    peak = read_bandwidth(options.device, options.quick)
    name = common.machine()["gpu" if options.device == "cuda" else "cpu"]
    load = common.machine()["load_average"]
    print(
        f"{name}, {native.cpu_isa()} kernels, {options.threads} threads, "
        f"read bandwidth {peak:.1f} GB/s, load {load:.1f}"
    )
    shapes = [(1, 600)] if options.quick else [(1, 600), (1, 2400), (1, 2880), (4, 2400)]
    if options.device == "cuda":
        shapes += [(8, 2880), (32, 2880)]
    results = []
    cells = [(shape, dtype) for shape in shapes for dtype in (torch.bfloat16, torch.float32)]
    for (rows, tokens), dtype in common.progress(cells, "shapes"):
        results += measure(rows, tokens, dtype, options.device, peak, options.quick)
    if options.device == "cpu":
        results += measure_gemv(peak, options.quick)
    show(results)
    notes = [] if options.device == "cuda" else [str(s) for s in measure_gemm(options.quick)]
    print("\n" + "\n".join(notes))
    settings = {"dtype": "in the case", "seed": common.SEED, "device": options.device}
    settings |= {"threads": options.threads, "read GB/s": peak, "quick": options.quick}
    path = common.write_report(
        options.name, settings, [asdict(row) for row in results], notes, options.out
    )
    print(f"\n{path}\nagain: {common.command()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
