"""Threads are as many as cores that may be used, unless somebody says otherwise."""

from pathlib import Path

import pytest
import torch

from engine.loading import processors
from engine.loading.processors import choose_threads, cores


def system(folder: Path, siblings: list[str], quota: str | None) -> Path:
    """A /sys of processors with these siblings."""
    for number, text in enumerate(siblings):
        path = folder / f"devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(text + "\n")
    if quota is not None:
        (folder / "fs/cgroup").mkdir(parents=True)
        (folder / "fs/cgroup/cpu.max").write_text(quota + "\n")
    return folder


@pytest.mark.parametrize(
    ("siblings", "quota", "expected"),
    [
        (["0-1", "0-1", "2-3", "2-3"], None, 2),
        (["0,2", "1,3", "0,2", "1,3"], "max 100000", 2),
        (["0", "1", "2", "3"], "150000 100000", 2),
        (["0", "1", "2", "3"], "20000 100000", 1),
        (["0", "1", "2", "3"], "800000 100000", 4),
        (["0", "1", "2", "3"], "nonsense", 4),
        ([], None, 4),
    ],
)
def test_cores_are_counted_once_and_within_the_quota(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    siblings: list[str],
    quota: str | None,
    expected: int,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert cores(system(tmp_path, siblings, quota)) == expected


@pytest.mark.parametrize(
    ("wanted", "torchs", "environment", "expected"),
    [(3, 8, None, 3), (None, 8, None, 2), (None, 1, None, 1), (None, 8, "8", 8), (5, 8, "8", 5)],
)
def test_who_decides(
    monkeypatch: pytest.MonkeyPatch,
    wanted: int | None,
    torchs: int,
    environment: str | None,
    expected: int,
) -> None:
    now = [torchs]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: now.__setitem__(0, count))
    monkeypatch.setattr(processors, "cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    choose_threads(wanted)
    assert now == [expected]
