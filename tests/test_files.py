"""Files that are written: whole or not at all, never over what is read, refused before the work."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.app.cli import main
from engine.engine import Engine
from engine.errors import OptionError
from engine.files import PAGE_SIGNATURE, check_target, lock, write_whole, written_whole
from engine.pictures.boxes import SIGNATURE
from tests.asking import Ask, refused
from tests.checkpoints import Shape
from tests.noise import noise

ROOT = Path(__file__).parents[1]
SHAPE = Shape(kv_heads=2)


def write_half(path: Path) -> None:
    with written_whole(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for before in (None, b"mine"):
        if before is not None:
            path.write_bytes(before)
        with pytest.raises(KeyboardInterrupt):
            write_half(path)
        assert {each.name for each in tmp_path.iterdir()} == ({"a.txt"} if before else set())
        assert not path.exists() or path.read_bytes() == before


def test_a_file_that_is_replaced_keeps_its_place_and_its_permissions(tmp_path: Path) -> None:
    path, link = tmp_path / "real.txt", tmp_path / "link.txt"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", Path("/dev/null"), Path("/dev/stdout")):
        before = os.stat(place).st_mode
        with pytest.raises(OSError):  # noqa: PT011 - whichever the system has for it
            write_whole(place, b"x")
        with pytest.raises(OptionError, match=r"--x .* cannot be written"):
            check_target("--x", place)
        assert os.stat(place).st_mode == before


def test_what_cannot_be_written_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, words in {"no/a.html": "no folder", "a.jpg": "end it in .html or .htm"}.items():
        with pytest.raises(OptionError, match="--x ") as caught:
            check_target("--x", tmp_path / name, (".html", ".htm"))
        assert words in f"{caught.value} {caught.value.hint}"
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "No")))
    with pytest.raises(OptionError, match="cannot be written: No"):
        check_target("--x", tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_of_the_file(tmp_path: Path) -> None:
    """The system names none where a write fails."""
    path = tmp_path / "a.html"
    with pytest.raises(OSError, match=r"No space left.*a\.html'"), written_whole(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_limit_of_the_system_is_said_of_the_file(tmp_path: Path) -> None:
    """Closing a file writes what is still buffered: it fails again, and then names none."""
    requests, answers = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    requests.write_text('{"prompt": "What?", "max_new_tokens": 2}\n' * 20)
    limited = 'ulimit -f 1; exec "$@"'
    command = [sys.executable, "main.py", "--batch", str(requests), "--output", str(answers), "-q"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        ["bash", "-c", limited, "bash", *command], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 1
    error, hint = done.stderr.decode().splitlines()
    assert error == f"error: File too large: {answers}"
    assert "ulimit" in hint
    assert len(answers.read_bytes()) == 1024


def test_one_process_at_a_time_has_the_lock(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w") as first, (tmp_path / "a").open() as second:
        assert lock(first)
        assert not lock(second)
        first.close()
        assert lock(second)


@pytest.mark.parametrize("flag", ["--attention", "--draw-boxes"])
@pytest.mark.parametrize("target", ["own", "link", "other kind", "folder", "no picture"])
def test_a_picture_that_is_read_is_never_written_over(
    flag: str, target: str, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is loaded before that is known."""
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    suffix = ".html" if flag == "--attention" else ".png"
    own = tmp_path / f"own{suffix}"
    noise(30, 20).save(own, "PNG")
    (tmp_path / f"link{suffix}").symlink_to(own)
    (tmp_path / f"folder{suffix}").mkdir()
    before = own.read_bytes()
    place = tmp_path / ("own.txt" if target == "other kind" else f"{target}{suffix}")
    pictures = [] if target == "no picture" else ["--image", own]
    refused(ask(*pictures, "-p", "What?", flag, place), 2, flag)
    assert own.read_bytes() == before


@pytest.mark.parametrize(("flag", "name"), [("--attention", "a.html"), ("--draw-boxes", "a.png")])
@pytest.mark.parametrize("content", [b"mine", b"", None])
def test_a_file_of_the_users_is_never_written_over(
    flag: str, name: str, content: bytes | None, ask: Ask, tmp_path: Path, monkeypatch: Any
) -> None:
    """What is empty holds nothing: such as mktemp makes it, it may be written."""

    def load(*_: Any, **__: Any) -> None:
        raise OptionError("loaded")

    monkeypatch.setattr(Engine, "load", load)
    noise(30, 20).save(tmp_path / "picture.png")
    target = tmp_path / name
    if content is not None:
        target.write_bytes(content)
    asked = ask("--image", tmp_path / "picture.png", "-p", "What?", flag, target)
    refused(asked, 2, f"{name} exists" if content else "loaded")
    assert not content or target.read_bytes() == content


@pytest.mark.parametrize("moment", ["answer", "page"])
def test_a_page_that_fails_leaves_the_old_one(
    moment: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "a.png"
    page.write_bytes(b"old " + PAGE_SIGNATURE)
    noise(30, 20).save(picture)
    place = {"answer": "engine.engine.Engine.stream", "page": "engine.insight.page.page_data"}

    def broken(*_: Any, **__: Any) -> None:
        raise OptionError("enough")

    monkeypatch.setattr(place[moment], broken)
    flags = ["--model", str(checkpoint(SHAPE)), "--device", "cpu", "-n", "2"]
    assert main([*flags, "-p", "What?", "--image", str(picture), "--attention", str(page)]) == 2
    assert page.read_bytes() == b"old " + PAGE_SIGNATURE
    assert {each.name for each in tmp_path.iterdir()} == {"page.html", "a.png"}


def test_a_folder_that_is_moved_meanwhile_is_a_hint(
    checkpoint: Callable[..., Path], ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    noise(30, 20).save(tmp_path / "a.png")
    answer = Engine.stream

    def moving(*given: Any, **options: Any) -> Any:
        if here.exists():
            here.rename(there)
        return answer(*given, **options)

    monkeypatch.setattr(Engine, "stream", moving)
    monkeypatch.setattr("engine.app.cli.forget_stdout", lambda: None)  # it is pytest's
    flags = ["--model", checkpoint(SHAPE), "--device", "cpu", "-n", "2", "--image"]
    asked = ask(*flags, tmp_path / "a.png", "-p", "What?", "--attention", here / "page.html")
    assert asked.code == 1
    assert asked.errors == [f"error: No such file or directory: {here / 'page.html'}"]
    assert asked.hints == ["hint: see whether it was moved or removed meanwhile"]


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".webp"])
def test_drawn_pictures_are_of_the_kind_of_their_name(suffix: str, tmp_path: Path) -> None:
    from engine.app.oneshot import _draw_boxes
    from engine.pictures.boxes import Box
    from engine.pictures.image import LoadedImage

    class Answered:
        boxes = (Box("", ((1, 1), (5, 5))),)

    picture = LoadedImage(noise(30, 20), "a.png")
    path = str(tmp_path / f"out{suffix}")
    for _ in range(2):  # a second time over the first one
        check_target("--draw-boxes", path, ours=SIGNATURE)
        _draw_boxes(path, picture, Answered())  # type: ignore[arg-type]
    kinds = {".png": "PNG", ".webp": "WEBP"}
    with Image.open(path) as image:
        assert image.format == kinds.get(suffix, "JPEG")


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    """What was to take its name has another one, which the error tells."""
    path = tmp_path / "page.html"

    def write() -> None:
        with written_whole(path, b"signature") as file:
            file.write(b"with the signature")
            path.write_text("mine")

    with pytest.raises(OptionError, match="written by somebody else meanwhile") as caught:
        write()
    assert path.read_text() == "mine"
    [other] = tmp_path.glob("page.*.html")
    assert other.read_bytes() == b"with the signature"
    assert str(other) in caught.value.hint
    for content in ("", "an old one with the signature"):
        path.write_text(content)
        write_whole(path, b"new, signature", b"signature")
        assert path.read_bytes() == b"new, signature"
