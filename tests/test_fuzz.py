"""Half a minute of fuzzing: only our errors come out of anything, in time and in little memory."""

import random
from pathlib import Path

import pytest

from engine.errors import ImageError
from tests.fuzz import Read, Report, Target, attempt, fuzz, make_targets, mutate_bytes, replay

# Inputs of one run; a longer one is `make fuzz`. Readers that take longer get fewer.
INPUTS = {"batch": 80, "tokenizer-json": 60, "tokenizer-config": 60, "tokenizer-model": 100}
OTHERS = 150
NAMES = (
    *(
        "png",
        "jpeg",
        "webp",
        "gif",
        "tiff",
        "bmp",
        "avif",
        "safetensors",
        "index",
        "cache-spec",
        "batch",
        "request",
    ),
    *("tokenizer-json", "tokenizer-config", "tokenizer-model", "tiktoken"),
    *("llava-config", "llava-preprocessor-config", "llava-generation-config"),
    *("original-config", "original-generation-config", "qwen-config", "qwen-generation-config"),
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("fuzz"))


def test_every_target_is_tried(targets: dict[str, Target]) -> None:
    assert sorted(targets) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_only_our_errors_come_out(name: str, targets: dict[str, Target]) -> None:
    report = Report()
    replay(name, targets[name], report)
    fuzz(name, targets[name], INPUTS.get(name, OTHERS), 0, report)
    assert not report.findings, "\n".join(f"{f[1]}: {f[2][:300]!r}" for f in report.findings)
    # Both sides of the line are reached: a fuzzer that is always refused sees only the front door.
    assert report.refused
    assert report.accepted


def test_mutations_depend_on_the_seed_alone(targets: dict[str, Target]) -> None:
    for target in targets.values():
        made = [target.mutate(random.Random(seed), target.seeds[0]) for seed in (5, 5, 6, 7, 8)]
        assert made[0] == made[1]
        assert len(set(made)) > 2


def report_on(read: Read) -> Report:
    report = Report()
    attempt("made up", Target([b"x"], read, mutate_bytes), b"x", report)
    return report


def test_the_fuzzer_finds_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign(_: bytes) -> None:
        raise KeyError("x")

    def two_lines(_: bytes) -> None:
        raise ImageError("a\nb")

    def hang(_: bytes) -> None:
        while True:
            pass

    def swallow(content: bytes) -> None:
        try:
            hang(content)
        except Exception:
            return

    def greedy(_: bytes) -> None:
        assert bytearray(200 << 20)

    def ours(_: bytes) -> None:
        raise ImageError("x is no picture")

    monkeypatch.setattr("tests.fuzz.SECONDS", 0.1)
    monkeypatch.setattr("tests.fuzz.MEMORY", 100 << 20)
    for read, words in [(foreign, "KeyError"), (two_lines, "says"), (hang, "Hang")]:
        assert words in report_on(read).findings[0][1]
    assert "Hang" in report_on(swallow).findings[0][1]
    assert report_on(ours).refused == 1
    assert report_on(lambda _: None).accepted == 1
    # The peak of the process only rises: what other tests took before hides this one's.
    monkeypatch.setattr("tests.fuzz.SECONDS", 5.0)
    monkeypatch.setattr("tests.fuzz._peak", iter([0, 200 << 20, 200 << 20]).__next__)
    assert "MB" in report_on(greedy).findings[0][1]


def test_corpus_is_small() -> None:
    files = [path for path in (Path(__file__).parent / "corpus").rglob("*") if path.is_file()]
    assert files
    assert {path.parent.name for path in files} <= set(NAMES)
    assert sum(path.stat().st_size for path in files) < 1_000_000
