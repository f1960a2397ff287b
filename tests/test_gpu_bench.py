"""The GPU benchmark and check, walked through dry: what breaks here would cost minutes there."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import common, gpu_bench, gpu_check, gpu_formats, gpu_timing, predict
from bench.device_weights import seeded_model, transformers_twin
from bench.gpu_bench import PARTS
from bench.gpu_cells import Device, Row
from bench.gpu_check import FOUND, Step, run_all
from bench.gpu_parts import DRY, REAL
from bench.gpu_steps import OurRows
from bench.predict import SEVEN, THIRTEEN, TOY, Prompt, Way
from engine.cache.prefill import Uncached
from engine.cache.row import no_rotary
from engine.ops import native

needs_native = pytest.mark.skipif(not native.loaded(), reason="the native module is not built")
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def bench(part: str, out: Path, *more: str) -> tuple[int, dict]:
    code = gpu_bench.main(["--part", part, "--dry", "--out", str(out), *more])
    path = out / f"gpu-bench-{part}-dry.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize(
    "part", [pytest.param(p, marks=needs_native if p in ("1", "7", "check") else ()) for p in PARTS]
)
def test_every_part_runs_dry(part: str, tmp_path: Path) -> None:
    code, record = bench(part, tmp_path)
    assert code == 0, record
    assert record["settings"]["dry"] is True
    assert "The figures mean nothing." in (tmp_path / f"gpu-bench-{part}-dry.md").read_text()
    cells = PARTS[part][1](DRY)
    assert len({cell.key for cell in cells}) == len(cells)
    assert {row["cell"] for row in record["rows"]} == {cell.key for cell in cells}
    for row in record["rows"]:
        assert row["failed"] is None
        assert row["predicted"] > 0
        assert row["measured"] >= 0


def test_a_dry_report_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a name of its own, and goes to a temporary folder unless told otherwise."""
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu_bench.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    options = gpu_bench.read_options(["--part", "2", "--dry"])
    assert options.name == "gpu-bench-2-dry"
    assert options.out.is_relative_to(tmp_path)
    assert gpu_bench.read_options(["--part", "2"]).out == common.ROOT / "gpu-results"


@dataclass
class Planted:
    """A cell that counts its measurements, and fails while it is told to."""

    key: str
    fails: bool = False
    measurements: int = 0

    def predicted(self) -> list[Row]:
        return [{"what": "x", "unit": "ms", "predicted": 1.0}]

    def measured(self, on: Device) -> list[Row]:
        self.measurements += 1
        if self.fails:
            raise ValueError("planted\nmore")
        return [{"measured": 2.0}]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[Planted]:
    """Three cells in place of part 2, of which the second fails."""
    cells = [Planted("a"), Planted("b", fails=True), Planted("c")]
    monkeypatch.setitem(gpu_bench.PARTS, "2", ("planted", lambda scale: cells))
    monkeypatch.setattr(common, "commit", lambda: "abc")
    return cells


def test_a_cell_that_raises_is_recorded_and_the_others_go_on(
    planted: list[Planted], tmp_path: Path
) -> None:
    code, record = bench("2", tmp_path)
    assert code == 1
    assert [row["failed"] for row in record["rows"]] == [None, "ValueError: planted", None]
    assert [row["measured"] for row in record["rows"]] == [2.0, None, 2.0]


def test_a_run_goes_on_where_it_was(planted: list[Planted], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    bench("2", first)
    planted[1].fails = False
    code, record = bench("2", second, "--resume", str(first))
    assert code == 0
    assert [cell.measurements for cell in planted] == [1, 2, 1]
    assert {row["cell"] for row in record["rows"]} == {"a", "b", "c"}
    code, _ = bench("2", second)
    assert code == 0
    assert [cell.measurements for cell in planted] == [1, 2, 1]
    bench("2", second, "--overwrite")
    assert [cell.measurements for cell in planted] == [2, 3, 2]


def test_out_of_time_is_neither_success_nor_failure(planted: list[Planted], tmp_path: Path) -> None:
    assert bench("2", tmp_path, "--minutes", "0")[0] == 3
    assert not any(cell.measurements for cell in planted)


def test_reports_of_different_code_are_not_mixed(
    planted: list[Planted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    bench("2", tmp_path)
    monkeypatch.setattr(common, "commit", lambda: "def")
    assert bench("2", tmp_path)[0] == 2
    assert "measured with another commit abc" in capsys.readouterr().err
    (tmp_path / "gpu-bench-2-dry.json").write_text("{")
    assert gpu_bench.main(["--part", "2", "--dry", "--out", str(tmp_path)]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_nothing_is_measured_without_a_gpu(tmp_path: Path) -> None:
    assert gpu_bench.main(["--part", "2", "--out", str(tmp_path)]) == 1
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


class StandInCuda:
    """torch.cuda as far as timing needs it: a clock of 5 ms per recorded event, graphs that loop.

    The real branches run only on a GPU; here at least every name and argument in them is tried.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.replays, self.capturing = 0.0, 0, False
        for name in ("Event", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *device: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11, 12))

    def Event(self, enable_timing: bool) -> SimpleNamespace:  # noqa: N802
        event = SimpleNamespace()

        def record() -> None:
            self.now += 5
            event.at = self.now

        event.record, event.elapsed_time = record, lambda later: later.at - event.at
        return event

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        def replay() -> None:
            self.replays += 1

        return SimpleNamespace(replay=replay)

    @contextmanager
    def graph(self, graph: SimpleNamespace) -> Iterator[None]:
        self.capturing = True
        yield
        self.capturing = False


def test_the_ways_that_only_a_gpu_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, device = StandInCuda(monkeypatch), torch.device("cuda")
    assert gpu_timing.laps(lambda _: None, 3, device) == pytest.approx([5e-3] * 3)
    turns: list[tuple[int, bool]] = []
    seconds = gpu_timing.interleaved(
        {"a": lambda turn: turns.append((turn, cuda.capturing))}, 2, 4, device
    )
    assert turns == [(0, False), (1, False), (0, True), (1, True)]  # once plainly, then captured
    assert cuda.replays == 5
    assert seconds == {"a": pytest.approx([5e-3 / 2] * 4)}
    assert gpu_timing.forget_peak(device) == 3
    assert gpu_timing.peak_bytes(device) == 7
    on = Device(device, torch.bfloat16, 1.0)
    assert on.free_bytes() == 11
    assert gpu_bench.broken(on) == ""


# -- seeded weights -------------------------------------------------------------------------------


def test_transformers_computes_the_same_on_the_same_tensors() -> None:
    model = seeded_model(TOY, CPU, torch.float32)
    twin = transformers_twin(model, TOY)
    theirs = {p.data_ptr() for p in twin.parameters()}
    assert theirs == {p.data_ptr() for p in model.parameters()}
    ids = torch.arange(30)
    with torch.inference_mode():
        mine = model.decoder.logits(
            model.decoder(model.decoder.embed(ids), Uncached(30, no_rotary()))
        )
        torch.testing.assert_close(twin(input_ids=ids[None]).logits[0], mine)
    again = seeded_model(TOY, CPU, torch.float32)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_weights_are_what_the_shapes_say() -> None:
    model = seeded_model(TOY, CPU, torch.bfloat16)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert TOY.all_bytes == 2 * (sum(p.numel() for p in model.parameters()) - norms)
    assert SEVEN.weight_bytes == pytest.approx(13.21e9, rel=1e-3)
    assert THIRTEEN.weight_bytes == pytest.approx(25.70e9, rel=1e-3)
    assert SEVEN.layers * SEVEN.layer_kv == 512 * 1024


# -- predictions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "batch", "full", "avl"),
    [
        *((SEVEN, 1, 3.43, 3.20), (SEVEN, 8, 5.94, 4.09), (SEVEN, 32, 14.56, 7.13)),
        *((THIRTEEN, 1, 6.54, 6.18), (THIRTEEN, 8, 10.5, 7.56), (THIRTEEN, 32, 23.9, 12.3)),
    ],
)
def test_floors_are_bytes_over_bandwidth(shape, batch, full, avl) -> None:
    """Worked by hand for 2,880 image and 64 text tokens, half of the text kept under A-VL."""
    prompt = Prompt(32, 2880, 32, 0)
    got = [predict.floor(shape, Way(policy=p, batch=batch), prompt, 0) for p in ("full", "avl")]
    assert got == pytest.approx([full / 1e3, avl / 1e3], rel=0.02)


def test_what_a_cache_holds_is_what_is_predicted() -> None:
    """The engine's own extents for a toy prompt, both policies, and what a step attends."""
    prompt = Prompt(8, 40, 40, 30)
    model = seeded_model(TOY, CPU, torch.float32)
    for policy in ("full", "avl"):
        batch = OurRows(model, TOY, Way(policy=policy, batch=2), prompt)
        for index in range(prompt.new):
            batch.step(index)
        for row in batch.rows:
            assert {s.extent.size for s in row.layers} == {predict.stored(policy, prompt)}
            for step, share in enumerate(row.attended_share):
                wanted = predict.attended(policy, prompt, step + 1)[step % 3]
                assert share * (prompt.read + step + 1) == pytest.approx(wanted, abs=1.01)


@pytest.mark.parametrize("policy", predict.PACKED)
def test_what_a_cache_in_few_bits_holds_is_what_is_predicted(policy: str) -> None:
    prompt = Prompt(8, 64, 40, 6)
    batch = OurRows(seeded_model(TOY, CPU, torch.bfloat16), TOY, Way(policy=policy), prompt)
    for layer in batch.rows[0].layers:
        assert layer.extent.size == predict.stored(policy, prompt)
        assert [part.tokens for part in layer.parts] == [prompt.image]
    pages = gpu_formats.pages_of(batch.rows[0].policy.format)
    share = pages.nbytes / (32 * SEVEN.layer_kv)
    assert predict.PACKED[policy] == pytest.approx(share, rel=1e-3)
    held = predict.held(policy, prompt) - predict.stored(policy, prompt)
    assert held == pytest.approx(share * prompt.image, rel=1e-3)
    assert predict.attended(policy, prompt, 2) == [8 + int(64 * predict.PACKED[policy]) + 42] * 3


def test_goals_are_predicted_to_be_met() -> None:
    """Otherwise either the goal or the formula is wrong, and that must be settled before a run."""
    for _, make in PARTS.values():
        for cell in make(REAL):
            for row in cell.predicted():
                if row.get("goal"):
                    assert row["predicted ratio"] <= row["goal"] + 0.02, row


def test_the_document_holds_the_predictions() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert gpu_bench.predictions() in text, "python -m bench.gpu_bench --predict"


# -- the check ------------------------------------------------------------------------------------


@needs_native
def test_the_check_runs_dry(tmp_path: Path) -> None:
    assert gpu_check.main(["--dry", "--skip-build", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["dry"] is True
    results = {step["name"]: step["result"] for step in record["steps"]}
    assert results == {"tests": "ok", "table": "ok", "sanitizer": "left out: dry"}
    summary = (tmp_path / "summary.md").read_text()
    assert "dry: no GPU was used" in summary
    assert "tests collected" in summary
    assert "gpu-bench-check-dry" in summary


def test_a_step_that_fails_stops_no_other(tmp_path: Path) -> None:
    listed = [
        Step("fails", ["sh", "-c", "echo why; exit 7"], 10),
        Step("hangs", ["sh", "-c", f"(sleep 2; touch {tmp_path}/late) & sleep 30"], 1),
        Step("missing", [str(tmp_path / "nowhere")], 10),
        Step("works", ["echo", "fine"], 10),
        Step("unusable", ["sh", "-c", "exit 3"], 10, soft=True),
    ]
    assert run_all(listed, tmp_path, {"dry": True}) == 1
    record = json.loads((tmp_path / "results.json").read_text())
    results = [step["result"] for step in record["steps"]]
    assert results[0] == "failed with exit code 7"
    assert results[1] == "stopped after 1 s"
    assert results[2].startswith("could not start")
    assert results[3:] == ["ok", "failed with exit code 3"]
    time.sleep(1.5)
    assert not (tmp_path / "late").exists(), "what a step started outlived its limit"
    assert "why" in (tmp_path / "summary.md").read_text()
    assert run_all(listed[3:], tmp_path, {"dry": True}) == 0


def test_what_the_sanitizer_finds_fails_the_check(tmp_path: Path) -> None:
    step = Step("memcheck", ["sh", "-c", f"exit {FOUND}"], 10, soft=True)
    assert run_all([step], tmp_path, {"dry": True}) == 1


def test_the_check_builds_for_hopper_and_sanitizes_kernel_tests() -> None:
    configure, build = gpu_check.build_steps()
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in configure.command
    assert "--build" in build.command
    step = gpu_check.sanitizer_step("compute-sanitizer", "racecheck")
    files = [Path(a).name for a in step.command if a.endswith(".py")]
    assert files == list(gpu_check.SANITIZED_FILES)
