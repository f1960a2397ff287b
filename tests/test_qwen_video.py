"""Videos of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: slices of two frames, their times, their stamps."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.engine import Engine
from engine.errors import CheckpointError
from engine.pictures.patches import Cells, VideoRules
from engine.pictures.video import Video
from engine.running.videos import END, START
from tests.checkpoints import write_json
from tests.noise import noise
from tests.qwen_patches_checkpoint import (
    KINDS,
    id_of,
    make_model,
    preprocessor,
    write_qwen_patches,
)
from tests.videos import write_video

TOLERANCE = 2e-4
QUESTION = "What happens?"
# Pixels of a frame, and of all together. Frames of parity tests are of whole cells: transformers
# resizes videos by torchvision alone, which is not here.
LIMITS = {"qwen2_vl": (3136, 50176), "qwen2_5_vl": (3136, 50176), "qwen3_vl": (4096, 200000)}
SIDE = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32}
MEANS = {kind: preprocessor(kind)["image_mean"] for kind in KINDS}
STDS = {kind: preprocessor(kind)["image_std"] for kind in KINDS}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Engine, Any]]:
    """An engine, and transformers' model."""

    @functools.cache
    def make(kind: str) -> tuple[Engine, Any]:
        folder = write_qwen_patches(tmp_path_factory.mktemp(kind) / "m", kind)
        least, most = LIMITS[kind]
        write_json(
            folder / "video_preprocessor_config.json",
            {"size": {"shortest_edge": least, "longest_edge": most}},
        )
        engine = Engine.load(folder, device="cpu", dtype="float32", cache="full")
        return engine, make_model(kind)

    return make


def clip(kind: str, frames: int, columns: int = 3, rows: int = 2) -> list[Image.Image]:
    """Frames of whole cells, each unlike the others."""
    side = SIDE[kind]
    return [noise(columns * side, rows * side, seed=n) for n in range(frames)]


def processed(kind: str, frames: Sequence[Image.Image]) -> tuple[Tensor, list[int]]:
    """What transformers' model takes for frames of whole cells, written from its description:
    patches, two frames each, cell by cell; and how many there are in time, down and across.
    """
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEANS[kind], STDS[kind]))
    pixels = [torch.from_numpy(np.array(f)).permute(2, 0, 1).float() / 255 for f in frames]
    normed = [(each - mean) / std for each in pixels]
    normed += normed[-1:] * (len(normed) % 2)
    patch, (_, height, width) = SIDE[kind] // 2, normed[0].shape
    rows, columns = height // patch, width // patch
    found = []
    for time in range(0, len(normed), 2):
        both = torch.stack(normed[time : time + 2], 1)  # [3, 2, height, width]
        cells = itertools.product(range(0, rows, 2), range(0, columns, 2), (0, 1), (0, 1))
        for top, left, down, right in cells:
            y, x = (top + down) * patch, (left + right) * patch
            found.append(both[:, :, y : y + patch, x : x + patch].flatten())
    return torch.stack(found), [len(normed) // 2, rows, columns]


def resized(
    size: tuple[int, int], side: int, least: int, most: int, frames: int = 0
) -> tuple[int, int]:
    """As published: Qwen2-VL's rule for a frame, or Qwen3-VL's for so many ``frames``."""
    width, height = size
    if frames and min(size) < side:
        scale = max(side / height, side / width)
        height, width = int(height * scale), int(width * scale)
    tall, wide = round(height / side) * side, round(width / side) * side
    count, even = frames or 1, round(frames / 2) * 2 if frames else 1
    if even * tall * wide > most:
        beta = math.sqrt(count * height * width / most)
        tall = max(side, math.floor(height / beta / side) * side)
        wide = max(side, math.floor(width / beta / side) * side)
    elif even * tall * wide < least:
        beta = math.sqrt(least / (count * height * width))
        tall, wide = (math.ceil(length * beta / side) * side for length in (height, width))
    return wide, tall


def conversation(engine: Engine, given: Sequence[list[Image.Image]]) -> tuple[Any, Any]:
    content = [{"type": "video"} for _ in given] + [{"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    return engine.with_videos(messages, None, list(given))


@pytest.mark.parametrize("counts", [[2], [5], [8], [4, 3]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_answers_are_transformers(made: Any, kind: str, counts: list[int]) -> None:
    """Also with two videos, and where the last frame is shown twice."""
    engine, theirs = made(kind)
    # Where times are larger than sides, text goes on otherwise in transformers since 5: see below.
    videos = [clip(kind, count, columns=7) for count in counts]
    messages, pictures = conversation(engine, videos)
    ids = torch.tensor([engine.render(messages, pictures).token_ids])
    image, video = id_of("<|image_pad|>"), id_of("<|video_pad|>")
    ids[ids == image] = video
    each = [processed(kind, frames) for frames in videos]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["mm_token_type_ids"] = 2 * (ids == video).int()
    given["pixel_values_videos"] = torch.cat([patches for patches, _ in each])
    given["video_grid_thw"] = torch.tensor([grid for _, grid in each])
    if kind == "qwen2_5_vl":  # two pictures a second: a slice takes a second, two units of time
        given["second_per_grid_ts"] = torch.ones(len(videos))
    with torch.inference_mode():
        expected = theirs(**given).logits[0].float()
        answer = theirs.generate(
            **given, max_new_tokens=12, do_sample=False, eos_token_id=None, repetition_penalty=1.0
        )
    got = engine.logits(messages, pictures)
    assert (got - expected).abs().max() < TOLERANCE
    result = engine.generate(messages, pictures, max_new_tokens=12, ignore_eos=True)
    assert result.token_ids == answer[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_transformers(made: Any, kind: str, frames: int) -> None:
    engine, _ = made(kind)
    shown = clip(kind, frames)
    theirs, _ = processed(kind, shown)
    ours = torch.cat([each.tiles for each in engine.processor.prepare_frames(shown)])
    torch.testing.assert_close(ours.flatten(1), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(200, 90), (33, 31), (64, 400), (1000, 700), (20, 70)])
@pytest.mark.parametrize("frames", [2, 5, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_resized_as_published(
    made: Any, kind: str, frames: int, size: tuple[int, int]
) -> None:
    engine, _ = made(kind)
    (least, most), side = LIMITS[kind], SIDE[kind]
    if kind == "qwen3_vl":
        each = max(min(768 * side**2, most // frames), int(least * 1.05))
        expected = resized(size, side, least, each * frames, frames)
    else:
        expected = resized(size, side, least, most)
    assert engine.processor.frame_size(size, frames) == expected


def test_a_frame_of_many_has_fewer_cells() -> None:
    """As published for Qwen3-VL: 768 cells of a frame, and 24,576 of all frames."""
    rules, cells = VideoRules(4096, 25165824, together=True), Cells(16)
    for frames, most in ((2, 768), (32, 768), (64, 384), (2048, 12)):
        limits = rules.cells(cells, frames)
        assert limits.most == most * 1024 * frames
        width, height = limits.resized((1920, 1080), frames)
        assert width * height <= most * 1024


# -- times ----------------------------------------------------------------------------------------


def described(grids: list[tuple[int, int, list[int]]], texts: list[int]) -> list[list[int]]:
    """Coordinates as Qwen2.5-VL describes them: text goes on after the largest."""
    found, following = list[list[int]](), 0
    for text, grid in zip(texts, [*grids, None], strict=True):
        found += [[following + n] * 3 for n in range(text)]
        following += text
        if grid is not None:
            rows, columns, times = grid
            cells = [(t, r, c) for t in times for r in range(rows) for c in range(columns)]
            found += [[following + each for each in cell] for cell in cells]
            following = max(map(max, found)) + 1
    return found


@pytest.mark.parametrize(
    ("kind", "seconds", "times"),
    [
        ("qwen2_vl", [0.0, 4.0, 9.0, 11.0, 12.0], [0, 1, 2]),
        ("qwen2_5_vl", [0.0, 0.5, 1.0, 1.5, 2.0], [0, 2, 4]),
        ("qwen2_5_vl", [3.0, 3.5, 7.2, 9.0, 23.0, 24.0], [0, 8, 40]),
        ("qwen2_5_vl", [0.0, 0.1, 0.2, 0.3], [0, 0]),
    ],
)
def test_coordinates_are_the_descriptions(
    made: Any, kind: str, seconds: list[float], times: list[int]
) -> None:
    engine, _ = made(kind)
    frames = clip(kind, len(seconds))
    (video,) = engine.processor.prepare_frames(frames, seconds)
    assert video.times == tuple(times)
    content = [
        {"type": "text", "text": "A"},
        {"type": "image"},
        {"type": "text", "text": "or"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    still = noise(4 * SIDE[kind], SIDE[kind])
    turn = engine.turn([{"role": "user", "content": content}], [video, still], timings())
    (first, end), (second, last) = turn.spans
    state = turn.rotary(engine.model)
    rotation = engine.model.decoder.rotation
    found = rotation.coordinates(torch.arange(len(turn.token_ids) + 5), state[None])
    texts = [first, second - end, len(turn.token_ids) + 5 - last]
    expected = described([(2, 3, times), (1, 4, [0])], texts)
    assert found.tolist() == expected


def timings() -> Any:
    from engine.result import Timings

    return Timings()


def test_stamps_stand_before_slices(made: Any) -> None:
    engine, _ = made("qwen3_vl")
    frames = clip("qwen3_vl", 5)
    shown = engine.processor.prepare_frames(frames, [0.0, 0.5, 1.04, 2.0, 3.25])
    assert [each.stamp for each in shown] == ["<0.2 seconds>", "<1.5 seconds>", "<3.2 seconds>"]
    messages, pictures = conversation(engine, [frames])
    text = engine.render(messages, pictures).text
    mark = "<|vision_start|><image><|vision_end|>"
    stamps = "".join(f"<{n:.1f} seconds>{mark}" for n in (0.25, 1.25, 2.0))
    assert f"user\n{stamps}{QUESTION}<|im_end|>" in text


def test_a_question_with_a_video_is_the_same_however_it_is_written(made: Any) -> None:
    engine, _ = made("qwen3_vl")
    frames, still = clip("qwen3_vl", 4), noise(64, 64)
    options: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": QUESTION}]
    spelled = engine.generate(
        [{"role": "user", "content": content}], [still], videos=[frames], **options
    )
    short = engine.generate(QUESTION, [still], videos=[frames], **options)
    assert short.token_ids == spelled.token_ids
    assert short.prompt_tokens == spelled.prompt_tokens
    raw = "<image><video>" + QUESTION
    shown = engine.with_videos(raw, [still], [frames], raw=True)[0]
    slices = "".join(f"<{n:.1f} seconds>{START}<image>{END}" for n in (0.25, 1.25))
    assert shown == f"<image>{slices}{QUESTION}"
    marked = engine.with_videos(f"a{START}<video>{END}b", None, [frames], raw=True)[0]
    assert marked == f"a{slices}b"
    older, _ = made("qwen2_vl")
    marked = older.with_videos(f"a{START}<video>{END}b", None, [clip("qwen2_vl", 4)], raw=True)[0]
    assert marked == f"a{START}<image>{END}b"


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoded_video_is_the_same_video(made: Any, kind: str) -> None:
    engine, _ = made(kind)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    video = engine.processor.prepare_frames(clip(kind, 5))[0]
    encoded = engine.encode(video)
    assert torch.equal(engine.logits(messages, [encoded]), engine.logits(messages, [video]))


@pytest.mark.parametrize("cache", ["avl:secondary=0.5,core=0.3,prefill=1", "sift", "h2o"])
@pytest.mark.parametrize("kind", KINDS)
def test_policies_and_chats_take_videos(made: Any, kind: str, cache: str) -> None:
    """A row's answer is the same beside others, and a chat goes on behind a video."""
    engine = made(kind)[0].with_cache(cache)
    options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
    requests = [
        {"prompt": QUESTION, "videos": [clip(kind, 4)], **options},
        {"prompt": "Who?", **options},
        {"prompt": QUESTION, "images": [noise(70, 50)], "videos": [clip(kind, 3)], **options},
    ]
    done = {r.index: r for r in engine.generate_batch(requests, 3)}
    for number, asked in enumerate(requests):
        assert done[number].token_ids == engine.generate(**asked).token_ids
    chat = engine.chat()
    first = chat.send(QUESTION, videos=[clip(kind, 4)], **options)
    assert first.token_ids == done[0].token_ids
    second = chat.send("And now?", [noise(60, 60)], **options)
    assert second.token_ids != first.token_ids


def test_pictures_limits_hold_for_frames(made: Any, tmp_path: Path) -> None:
    for kind in KINDS:
        folder = write_qwen_patches(tmp_path / kind, kind)
        engine = Engine.load(folder, device="cpu", max_image_tokens=6)
        frames = [noise(300, 200, seed=n) for n in range(6)]
        shown = engine.processor.prepare_frames(frames)
        slices = 3 // len(shown)
        for each in shown:
            assert engine.model.image_tokens(each) <= 6 * slices


def test_wrong_limits_are_named(tmp_path: Path) -> None:
    folder = write_qwen_patches(tmp_path / "m", "qwen3_vl")
    for size in ({"shortest_edge": 9000, "longest_edge": 5000}, {"shortest_edge": "many"}):
        write_json(folder / "video_preprocessor_config.json", {"size": size})
        with pytest.raises(CheckpointError, match=r"video_preprocessor_config.*shortest_edge"):
            Engine.load(folder, device="cpu")
    write_json(folder / "video_preprocessor_config.json", {"patch_size": 14})
    with pytest.raises(CheckpointError, match=r"video_preprocessor_config.*patch_size"):
        Engine.load(folder, device="cpu")
    limits = {"min_pixels": 5000, "max_pixels": 70000, "patch_size": 16}
    write_json(folder / "video_preprocessor_config.json", limits)
    rules = Engine.load(folder, device="cpu").processor.video  # type: ignore[attr-defined]
    assert (rules.least, rules.most) == (5000, 70000)


def test_times_come_from_the_file(tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_video(tmp_path / "a.mp4", 20)
    path = tmp_path / "a.mp4"
    shown = Video(path, frames=5).shown()
    assert shown.seconds == pytest.approx([0.0, 0.4, 0.9, 1.4, 1.9])
    assert len(list(shown.images)) == 5
    assert Video([noise(9, 9)] * 9, frames=3).shown().seconds == [0.0, 2.0, 4.0]
