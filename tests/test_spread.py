"""Batches over a cluster: the same lines whatever dies. A real cluster is the slow test's."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pytest

from engine.app import spread
from engine.app.batch_file import BatchRun
from engine.app.cli import main
from engine.app.flags import parse_flags
from engine.app.inputs import engine_of
from engine.app.job import Job, is_cloud, open_beside
from engine.app.spread import SpreadRun, Worker, cloud_opener, error_of
from engine.errors import CapacityError, EngineError, ImageError
from tests.videos import frame_of

REQUESTS = 12


def write_job(folder: Path) -> Path:
    frame_of(30, (60, 40)).save(folder / "a.png")
    lines = [
        {"prompt": f"What is it{'?' * number}", "images": ["b.png" if number == 5 else "a.png"]}
        for number in range(REQUESTS)
    ]
    path = folder / "job.jsonl"
    path.write_text("".join(json.dumps(line | {"max_new_tokens": 6}) + "\n" for line in lines))
    return path


def flags_of(job: Path, target: Path, *more: str) -> argparse.Namespace:
    return parse_flags(["--batch", str(job), "--output", str(target), *more])[0]


def alone(job: Path, target: Path) -> bytes:
    run = BatchRun(engine_of(flags_of(job, target)), Job.read(job), 4)
    assert list(run.into(target))[-1] == REQUESTS
    return target.read_bytes()


class Pretended(SpreadRun):
    """Workers in this process; what is asked together with ``deadly`` is never answered."""

    deadly: tuple[int, ...] = ()

    def __init__(self, flags: argparse.Namespace, job: Job) -> None:
        self.job, self.failures, self._flags = job, [], flags
        self._workers, self._each = 2, {}
        self.asked: list[list[int]] = []
        self._worker = Worker(flags, job)

    @property
    def made_by(self) -> spread.Origin:  # type: ignore[override]
        return self._worker._run.made_by

    def _spread(self, numbers: Sequence[int], size: int) -> Iterator[spread.Line]:
        for start in range(0, len(numbers), size):
            batch = list(numbers[start : start + size])
            self.asked.append(batch)
            if not set(batch) & set(self.deadly):
                found = self._worker({"number": batch})
                yield from zip(found["number"], found["line"], found["code"], strict=True)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tmp_path)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_own_each", lambda lines: lines)  # which knows Ray's errors


def test_lines_are_those_of_one_process(job: Path, tmp_path: Path) -> None:
    expected, target = alone(job, tmp_path / "one.jsonl"), tmp_path / "many.jsonl"
    run = Pretended(flags_of(job, target), Job.read(job))
    assert list(run.into(target))[-1] == REQUESTS
    assert target.read_bytes() == expected
    assert [failure.index for failure in run.failures] == [5]
    assert isinstance(run.failures[0].error, ImageError)


def test_what_kills_every_worker_is_an_error_and_the_others_are_answered(
    job: Path, tmp_path: Path
) -> None:
    expected, target = alone(job, tmp_path / "one.jsonl"), tmp_path / "many.jsonl"
    run = Pretended(flags_of(job, target), Job.read(job))
    run.deadly = (8,)
    list(run.into(target))
    lines = target.read_bytes().splitlines()
    assert [a for n, a in enumerate(lines) if n != 8] == [
        a for n, a in enumerate(expected.splitlines()) if n != 8
    ]
    assert "died" in json.loads(lines[8])["error"]
    assert run.asked[-1] == [8]  # by itself at last


def test_a_job_goes_on_where_it_was(job: Path, tmp_path: Path) -> None:
    expected, target = alone(job, tmp_path / "one.jsonl"), tmp_path / "many.jsonl"
    target.write_bytes(b"".join(expected.splitlines(keepends=True)[:7]))
    run = Pretended(flags_of(job, target), Job.read(job))
    list(run.into(target))
    assert target.read_bytes() == expected
    assert sorted({n for batch in run.asked for n in batch}) == [5, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("code", "kind"), [(1, EngineError), (3, ImageError), (5, CapacityError), (77, EngineError)]
)
def test_an_error_comes_back_as_what_it_was(code: int, kind: type[EngineError]) -> None:
    error = error_of(b'{"error": "it broke", "hint": "mend it"}', code)
    assert (type(error), str(error), error.hint) == (kind, "it broke", "mend it")


def test_batch_is_a_word_as_well(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "word.jsonl"
    assert main(["batch", str(job), "--output", str(target), "-q"]) == 3
    assert target.read_bytes() == alone(job, tmp_path / "one.jsonl")
    assert capsys.readouterr().out == f"{target}\n"
    assert main(["--raw", "batch", str(job)]) == 2
    assert "'batch' comes before its flags" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--output", "-"], "--ray writes its answers to a file"),
        (["--workers", "0"], "--workers is 0"),
        ([], 'install it: pip install "ray[data]"'),
    ],
)
def test_what_a_cluster_needs(
    more: list[str],
    said: str,
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["batch", str(job), "--ray", "local", *more]) == 2
    assert said in capsys.readouterr().err


def test_workers_need_a_cluster(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", str(job), "--workers", "2"]) == 2
    assert "--workers needs --ray" in capsys.readouterr().err


def test_pictures_in_a_cloud(tmp_path: Path) -> None:
    frame_of(12, (30, 20)).save(tmp_path / "a.png")
    opened = cloud_opener(open_beside, 10**6)
    with fsspec.open("memory://bucket/a.png", "wb") as file:
        file.write((tmp_path / "a.png").read_bytes())
    assert opened("memory://bucket/a.png").pixels.size == (30, 20)
    assert opened(str(tmp_path / "a.png")).pixels.size == (30, 20)
    for name in ("memory://bucket/none.png", "nothing://at/all.png"):
        with pytest.raises(ImageError, match="cannot be read"):
            opened(name)
    assert [is_cloud(n) for n in ("s3://b/a", "https://b/a", "a/b.png", "data:image/png")] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.slow(reason="needs the package ray, 80 MB, and starts a cluster")
def test_a_local_cluster(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    expected, target = alone(job, tmp_path / "one.jsonl"), tmp_path / "many.jsonl"
    more = ["--ray", "local", "--workers", "2", "--threads", "1", "-q"]
    assert main(["batch", str(job), "--output", str(target), *more]) == 3
    assert target.read_bytes() == expected
