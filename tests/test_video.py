"""Videos as input: which frames are shown, and every kind of file that holds none."""

from __future__ import annotations

import io
import json
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.app.cli import main
from engine.engine import Engine
from engine.errors import EngineError, ImageError, OptionError
from engine.pictures import video_file
from engine.pictures.preprocess import Pixels
from engine.pictures.video import Video, evenly
from engine.progress import listening
from tests.videos import frame_of, number_of, turned, write_sound, write_video

ASK = "What happens?"
CODECS = {
    "clip.mp4": "libx264",
    "clip.mov": "mpeg4",
    "clip.mkv": "ffv1",
    "clip.webm": "libvpx",
    "nine.webm": "libvpx-vp9",
    "clip.avi": "mpeg4",
    "clip.ts": "libx264",
    "clip.flv": "flv",
}


def numbers(video: Video) -> list[int]:
    return [number_of(frame) for frame in video.images()]


def near(found: list[int], expected: list[int]) -> bool:
    """Whether frames are the expected ones, up to what lossy codecs do to their grey."""
    return len(found) == len(expected) and all(
        abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_video(path)
    return path


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(cache="full")


# -- which frames ---------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 7, 50, 1801])
@pytest.mark.parametrize("count", [1, 2, 3, 16, 128])
def test_frames_are_spread_as_the_published_code_spreads_them(total: int, count: int) -> None:
    expected = np.linspace(0, total - 1, count, dtype=int) if count < total else range(total)
    assert evenly(total, count) == [int(place) for place in expected]


@pytest.mark.parametrize("name", CODECS)
def test_every_kind_of_file(name: str, tmp_path: Path) -> None:
    write_video(tmp_path / name, codec=CODECS[name])
    assert near(numbers(Video(tmp_path / name, frames=6)), [0, 9, 19, 29, 39, 49])
    assert near(numbers(Video(tmp_path / name, frames=100)), list(range(50)))


def test_a_moving_gif_is_a_video(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    shown = [frame.getpixel((9, 9)) for frame in Video(tmp_path / "a.gif").images()]
    assert shown == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_bytes_are_a_file(clip: Path) -> None:
    assert near(numbers(Video(clip.read_bytes(), frames=3)), [0, 24, 49])


def test_seconds_choose_a_part(clip: Path) -> None:
    assert near(numbers(Video(clip, frames=3, start=1.0, end=2.0)), [10, 15, 20])
    assert near(numbers(Video(clip, frames=2, start=4.5)), [45, 49])


def test_frames_of_a_second(clip: Path) -> None:
    assert near(numbers(Video(clip, fps=2)), list(range(0, 50, 5)))
    assert near(numbers(Video(clip, fps=2, frames=3)), [0, 20, 45])  # of those, evenly
    assert near(numbers(Video(clip, fps=1000, frames=100)), list(range(50)))


def test_times_count_where_frames_are_uneven(tmp_path: Path) -> None:
    times = [0, 10, 20, 30, 1000, 1010, 2000, 3000, 3010, 3020]
    write_video(tmp_path / "vfr.mkv", 10, times=times)
    assert near(numbers(Video(tmp_path / "vfr.mkv", fps=1)), [0, 4, 6, 7])
    assert near(numbers(Video(tmp_path / "vfr.mkv", frames=4)), [0, 3, 6, 9])


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_rotation_tag_is_obeyed(quarters: int, tmp_path: Path) -> None:
    corner = Image.new("RGB", (64, 48))
    corner.paste((255, 255, 255), (0, 0, 32, 24))
    write_video(tmp_path / "a.mp4", 3, pictures=[corner] * 3)
    (*_, frame) = Video(turned(tmp_path / "a.mp4", quarters)).images()
    expected = corner.rotate(-90 * quarters, expand=True)
    assert frame.size == expected.size
    difference = np.abs(np.asarray(frame, float) - np.asarray(expected, float))
    assert difference.mean() < 3


def test_a_folder_is_sorted_by_the_numbers_in_names(tmp_path: Path) -> None:
    for number in (1, 2, 9, 10, 30):
        frame_of(number, (20, 20)).save(tmp_path / f"frame{number}.png")
    (tmp_path / ".hidden").write_text("no picture")
    assert numbers(Video(tmp_path)) == [1, 2, 9, 10, 30]
    assert numbers(Video(str(tmp_path), frames=3)) == [1, 9, 30]


def test_a_list_of_pictures_of_any_kind(tmp_path: Path) -> None:
    frame_of(3, (20, 20)).save(tmp_path / "three.png")
    given = [frame_of(1, (20, 20)), tmp_path / "three.png", np.asarray(frame_of(5, (9, 9)))]
    assert numbers(Video(given)) == [1, 3, 5]


def test_only_what_is_shown_is_decoded(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned_upright = []
    upright = video_file._upright
    monkeypatch.setattr(video_file, "_upright", lambda *a: turned_upright.append(1) or upright(*a))
    frames = Video(clip, frames=4).images()
    assert not turned_upright  # the file is read, no frame made
    next(frames)
    assert len(turned_upright) == 1


def test_progress_is_told(clip: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    with listening(lambda *what: heard.append(what)):
        list(Video(clip, frames=3).images())
    assert heard == [("frames decoded", n, 3) for n in (1, 2, 3)]


# -- what is refused ------------------------------------------------------------------------------


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files by what is wrong with them, and what is to be said."""
    made = {name: folder / name for name in ("empty", "text", "zeros", "cut.mp4", "cut.mkv")}
    made["empty"].touch()
    made["text"].write_text("no video at all\n" * 10)
    made["zeros"].write_bytes(bytes(5000))
    for name in ("cut.mp4", "cut.mkv", "cut.ts", "head.mp4"):
        write_video(folder / name, codec="libx264")
    cut(folder / "cut.mp4", 0.5)
    cut(folder / "cut.mkv", 0.5)
    cut(folder / "head.mp4", 0.1)
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    (folder / "concat.ffconcat").write_text("ffconcat version 1.0\nfile '/etc/passwd'\n")
    (folder / "none").mkdir()
    return {
        "missing": (folder / "missing.mp4", "does not exist"),
        "empty": (made["empty"], "is empty (0 bytes)"),
        "text": (made["text"], "is "),
        "zeros": (made["zeros"], "is "),
        "half an mp4": (folder / "cut.mp4", "is damaged or cut off"),
        "half an mkv": (folder / "cut.mkv", "is cut off: it holds"),
        "a head alone": (folder / "head.mp4", "is damaged or cut off"),
        "sound in mp4": (write_sound(folder / "sound.mp4"), "holds no video but sound"),
        "sound in aac": (write_sound(folder / "sound.aac", kind="adts"), "is "),
        "a playlist": (folder / "list.m3u8", "is "),
        "a list of files": (folder / "concat.ffconcat", "is "),
        "an empty folder": (folder / "none", "holds no pictures"),
    }


KINDS = [
    *("missing", "empty", "text", "zeros", "half an mp4", "half an mkv", "a head alone"),
    *("sound in mp4", "sound in aac", "a playlist", "a list of files", "an empty folder"),
]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    made = bad_files(tmp_path_factory.mktemp("bad"))
    assert list(made) == KINDS
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_refused_in_one_line(
    kind: str, bad: dict[str, tuple[Path, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, said = bad[kind]
    assert main(["--video", str(path), ASK]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert path.name in err
    assert err.count("\n") == 2  # the error, and what to do


def test_a_picture_is_no_video_and_a_video_no_picture(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame_of(1, (20, 20)).save(tmp_path / "a.png")
    assert main(["--video", str(tmp_path / "a.png"), ASK]) == 3
    assert "give it with --image" in capsys.readouterr().err
    assert main(["--image", str(clip), "-p", ASK]) == 3
    assert "--video" in capsys.readouterr().err


def test_a_folder_with_a_file_that_is_no_picture(tmp_path: Path) -> None:
    frame_of(1, (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("text")
    with pytest.raises(ImageError, match=r"b\.png"):
        list(Video(tmp_path).images())


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("MOST_BYTES", 1000, "bytes; at most 1,000 are read"),
        ("MOST_SECONDS", 3, "lasts 5 s; at most 3 are read"),
        ("MOST_PACKETS", 20, "has more than 20 packets"),
        ("MOST_PIXELS", 1000, "frames of 64 x 48 = 3,072 pixels; at most 1,000 are read"),
        ("TIME_LIMIT", -1.0, "takes longer than -1 s to read"),
    ],
)
def test_limits_hold_before_anything_is_decoded(
    limit: str, value: float, said: str, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_file, "_upright", None)
    monkeypatch.setattr(video_file, limit, value)
    with pytest.raises(ImageError, match=said):
        Video(clip).images()


def test_the_callers_limit_of_pixels_holds_as_well(
    clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--video", str(clip), "--max-pixels", "3000", ASK]) == 3
    assert "at most 3,000 are read" in capsys.readouterr().err


def test_the_models_own_time_does_not_count(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(video_file, "monotonic", lambda: now[0])
    shown = 0
    for _ in Video(clip, frames=5).images():
        now[0] += 1000.0
        shown += 1
    assert shown == 5


def test_a_frame_that_grows_inside_the_stream_is_refused(tmp_path: Path) -> None:
    """What the header announces is no promise: MPEG-TS may change its size at any key frame."""
    write_video(tmp_path / "small.ts", 5, codec="libx264")
    write_video(tmp_path / "large.ts", 5, codec="libx264", size=(640, 480))
    both = tmp_path / "both.ts"
    both.write_bytes((tmp_path / "small.ts").read_bytes() + (tmp_path / "large.ts").read_bytes())
    with pytest.raises(ImageError):
        list(Video(both, max_pixels=64 * 48).images())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--frames", "0"], "frames is 0"),
        (["--frames", "5000"], "frames is 5000"),
        (["--fps", "0"], "fps is 0"),
        (["--fps", "nan"], "fps is nan"),
        (["--start", "-1"], "start is -1"),
        (["--start", "3", "--end", "2"], "start is 3.0 and end 2.0"),
        (["--start", "99"], "no frame lies where frames are asked for"),
        (["--attention", "a.html"], "takes no --attention"),
    ],
)
def test_bad_flags(
    flags: list[str], said: str, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--video", str(clip), *flags, ASK]) == 2
    assert said in capsys.readouterr().err


def test_flags_of_a_video_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--frames", "3", ASK]) == 2
    assert "--frames needs --video" in capsys.readouterr().err


def test_a_list_has_no_times() -> None:
    with pytest.raises(OptionError, match="has no times"):
        Video([frame_of(1, (9, 9))], fps=1).images()


def test_without_the_package_it_says_what_to_install(
    clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["--video", str(clip), ASK]) == 3
    assert "install it: pip install av" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "clip.avi", "clip.flv"])
def test_fuzzed_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    """Bytes are changed, cut out and doubled: nothing but our own errors follows."""
    write_video(tmp_path / name, 12, codec=CODECS[name], sound=name == "clip.mp4")
    whole = (tmp_path / name).read_bytes()
    draw, shown, said = random.Random(name), 0, list[str]()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 3, 30])):
            at = draw.randrange(len(data))
            kind = draw.randrange(3)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                del data[at : at + draw.randrange(50)]
            else:
                data[at:at] = data[at : at + draw.randrange(50)]
        try:
            shown += len(list(Video(bytes(data), frames=3).images()))
        except (ImageError, OptionError) as error:
            said.append(str(error))
    assert shown  # some are still videos
    assert not any("\n" in line for line in said)


CHECKED = """
import sys, resource
from engine.pictures.video import Video
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for number in range(200):
    assert len(list(Video(sys.argv[1], frames=4).images())) == 4
    if number == 40:
        before = peak()
print(peak() - before)
"""


def test_memory_stays_flat_over_200_clips(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 20, size=(640, 480))
    command = [sys.executable, "-c", CHECKED, str(tmp_path / "a.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 16_000  # KB: some allocators' slack, not 160 x 4 frames of 0.9 MB


def test_a_long_video_is_never_in_memory(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 300, size=(1280, 720), codec="mpeg4")  # 830 MB of frames
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in Video(tmp_path / "a.mp4", frames=300).images()) == 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


# -- what is answered -----------------------------------------------------------------------------


def test_frames_are_so_many_pictures_to_a_model_without_videos(engine: Engine, clip: Path) -> None:
    frames = list(Video(clip, frames=3).images())
    expected = engine.generate(ASK, frames, max_new_tokens=8)
    for source in (Video(clip, frames=3), frames, tuple(frames)):
        result = engine.generate(ASK, videos=[source], max_new_tokens=8)
        assert result.token_ids == expected.token_ids
        assert result.image_tokens == expected.image_tokens


def test_the_command_line_answers_as_the_library(
    engine: Engine, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--frames", "3", "--start", "1", "--cache", "full", "-n", "8", "--json"]
    assert main(["--video", str(clip), *flags, "--", ASK]) == 0
    said = json.loads(capsys.readouterr().out)
    video = Video(clip, frames=3, start=1.0)
    assert said["text"] == engine.generate(ASK, videos=[video], max_new_tokens=8).text
    assert main([str(clip), *flags, "--", ASK]) == 0  # a word that ends like a video's name
    assert json.loads(capsys.readouterr().out)["text"] == said["text"]


def test_a_video_behind_a_picture_and_a_system_text(
    engine: Engine, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame_of(40, (50, 50)).save(tmp_path / "a.png")
    flags = ["--image", str(tmp_path / "a.png"), "--video", str(clip), "--frames", "2"]
    flags += ["--system", "Be brief.", "--cache", "full", "-n", "8", "--json", "-p", ASK]
    assert main(flags) == 0
    said = json.loads(capsys.readouterr().out)
    shown = [frame_of(40, (50, 50)), *Video(clip, frames=2).images()]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*[{"type": "image"}] * 3, {"type": "text", "text": ASK}]},
    ]
    assert said["text"] == engine.generate(messages, shown, max_new_tokens=8).text


def test_messages_and_raw_prompts_say_where_a_video_goes(engine: Engine, clip: Path) -> None:
    picture, video = frame_of(30, (40, 40)), Video(clip, frames=2)
    frames = list(video.images())
    order = [{"type": "video"}, {"type": "text", "text": "and"}, {"type": "image"}]
    messages = [{"role": "user", "content": [*order, {"type": "text", "text": ASK}]}]
    spelled = [{"type": "image"}, {"type": "image"}, *order[1:], {"type": "text", "text": ASK}]
    expected = engine.render([{"role": "user", "content": spelled}], [*frames, picture])
    found = engine.render(*engine.with_videos(messages, [picture], [video]))
    assert found.token_ids == expected.token_ids
    raw, pictures = engine.with_videos("<image> and <video>?", [picture], [video], raw=True)
    assert raw == "<image> and <image><image>?"
    assert isinstance(pictures[0], Image.Image)
    assert all(isinstance(each, Pixels) for each in pictures[1:])


@pytest.mark.parametrize("prompt", [[{"role": "user", "content": [{"type": "text", "text": "?"}]}]])
def test_places_and_videos_must_be_as_many(prompt: Any, engine: Engine, clip: Path) -> None:
    with pytest.raises(OptionError, match="places for 0 videos, but 1 are given"):
        engine.generate(prompt, videos=[clip])
    twice = [{"role": "user", "content": [{"type": "video"}, {"type": "video"}]}]
    with pytest.raises(OptionError, match="places for 2 videos, but 1 are given"):
        engine.generate(twice, videos=[Video(clip, frames=2)])


def test_a_chat_and_a_batch_take_videos(engine: Engine, clip: Path) -> None:
    video = Video(clip, frames=2)
    alone = engine.generate(ASK, videos=[video], max_new_tokens=8)
    assert engine.chat().send(ASK, videos=[video], max_new_tokens=8).text == alone.text
    request = {"prompt": ASK, "videos": [video], "max_new_tokens": 8}
    broken = {"prompt": ASK, "videos": ["missing.mp4"]}
    first, second = sorted(engine.generate_batch([request, broken]), key=lambda each: each.index)
    assert first.text == alone.text
    assert isinstance(second.error, ImageError)


def test_a_batch_file_finds_videos_beside_it(
    engine: Engine, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(clip, tmp_path / "v.mp4")
    lines = [
        {"prompt": ASK, "videos": ["v.mp4"]},
        {"prompt": ASK, "videos": ["v.mp4"], "frames": 4},
    ]
    lines += [{"prompt": ASK, "videos": ["v.mp4"], "frames": 0}]
    (tmp_path / "job.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--frames", "2", "--cache", "full", "-n", "8", "--output", "-", "-q"]
    assert main(["--batch", str(tmp_path / "job.jsonl"), *flags]) == 2
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    for answer, frames in zip(answers, (2, 4), strict=False):
        video = Video(clip, frames=frames)
        assert answer["text"] == engine.generate(ASK, videos=[video], max_new_tokens=8).text
    assert "frames is 0" in err


def test_one_video_needs_no_list(engine: Engine, clip: Path) -> None:
    result = engine.generate(ASK, videos=Video(clip, frames=2), max_new_tokens=2)  # type: ignore[arg-type]
    assert result.image_tokens == 2 * 576
    for wrong in (5, [5]):
        with pytest.raises(OptionError, match=r"a video is|videos are"):
            engine.generate(ASK, videos=wrong)  # type: ignore[arg-type]


def test_what_is_thrown_is_always_ours(tmp_path: Path) -> None:
    """A list may hold anything."""
    for given in ([b"x"], ["missing.png"], [None], [io.BytesIO(b"")], [5]):
        with pytest.raises(EngineError):
            list(Video(given).images())  # type: ignore[arg-type]
