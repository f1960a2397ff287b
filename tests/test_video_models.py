"""Models that have learned videos, beside transformers: LLaVA-NeXT-Video, LLaVA-OneVision, and
LongVA composed of its modules as the original code does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, LlavaNextVideoForConditionalGeneration

from engine.cache import prefill
from engine.engine import Engine
from engine.errors import CheckpointError
from engine.insight.panels import panels_of
from engine.loading.families import recognise
from engine.models import decoder, llava
from engine.models.llava_video import LlavaNextVideo, LongVa, Pooling
from engine.progress import listening
from tests.checkpoints import IMAGE_TOKEN, PIECES, Shape, edit_json
from tests.next_checkpoints import NEXT_SHAPES, write_next
from tests.noise import noise
from tests.onevision_checkpoint import make_model as make_onevision
from tests.onevision_checkpoint import write_onevision
from tests.test_llava_next import NextOracle

VIDEO_TOKEN = IMAGE_TOKEN - 1  # of the oracle; ours fills all places with one id
FRAMES = [noise(90, 60, seed=n) for n in range(5)]
PICTURE = noise(100, 75)
RAW = "USER: <video>\nWhat happens? ASSISTANT:"
BOTH = "USER: <image> and <video>\nWhat happens? ASSISTANT:"
# Grids of 5 x 5, of which the last row and column are pooled away.
ODD = Shape(family="qwen2", hidden=56, heads=7, kv_heads=1, image=70, seed=24, context=8192)


def greedy(engine: Engine, raw: str, images: list[Any], count: int = 12) -> list[int]:
    asked = engine.generate(
        raw, images, videos=[FRAMES], raw=True, max_new_tokens=count, ignore_eos=True
    )
    return asked.token_ids


def logits(engine: Engine, raw: str, images: list[Any]) -> Tensor:
    return engine.logits(*engine.with_videos(raw, images, [FRAMES], raw=True), raw=True)


def oracle_ids(engine: Engine, raw: str, images: list[Any], video: int) -> Tensor:
    """The prompt's ids, a video's places as the oracle calls them."""
    prompt = engine.render(*engine.with_videos(raw, images, [FRAMES], raw=True), raw=True)
    ids = torch.tensor([prompt.token_ids])
    last = [segment for segment in prompt.segments if segment.kind == "image"][-1]
    ids[0, last.start : last.end] = video
    return ids


def tiles_of(engine: Engine) -> Tensor:
    return engine.processor.prepare_frames(FRAMES)[0].tiles


def greedy_of(model: Any, inputs: dict[str, Tensor], count: int = 12) -> list[int]:
    model.generation_config.eos_token_id = None
    made = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


@torch.inference_mode()
def same_as(engine: Engine, model: Any, raw: str, images: list[Any], extra: dict[str, Any]) -> None:
    inputs = {**extra, "pixel_values_videos": tiles_of(engine)[None]}
    inputs["input_ids"] = oracle_ids(engine, raw, images, model.config.video_token_id)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = model(**inputs).logits[0].float()
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(engine, raw, images), expected, rtol=0, atol=2e-4)
    assert greedy(engine, raw, images) == greedy_of(model, inputs)


# -- LLaVA-NeXT-Video -----------------------------------------------------------------------------


def write_next_video(folder: Path, **changes: Any) -> Path:
    write_next(folder, "vicuna")
    edit_json(
        folder / "config.json",
        architectures=["LlavaNextVideoForConditionalGeneration"],
        model_type="llava_next_video",
        video_token_index=VIDEO_TOKEN,
        **changes,
    )
    return folder


@pytest.mark.parametrize("raw", [RAW, BOTH])
@pytest.mark.parametrize("mode", ["average", "max"])
def test_llava_next_video_equals_transformers(tmp_path: Path, mode: str, raw: str) -> None:
    folder = write_next_video(tmp_path, spatial_pool_mode=mode)
    engine = Engine.load(folder, device="cpu", dtype="float32", cache="full")
    model = LlavaNextVideoForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    images, extra = [], {}
    if raw is BOTH:
        images = [PICTURE]
        pixels = NextOracle(write_next(tmp_path / "next", "vicuna")).inputs("<image>", images)
        extra = {key: pixels[key] for key in ("pixel_values", "image_sizes")}
    same_as(engine, model, raw, images, extra)


def test_a_frame_of_llava_next_video_takes_a_quarter_of_its_patches(tmp_path: Path) -> None:
    family = recognise(write_next_video(tmp_path))
    pixels = family.processor.prepare_frames(FRAMES)
    assert isinstance(family.model, LlavaNextVideo)
    assert [family.model.image_tokens(video) for video in pixels] == [5 * 4]
    assert family.model.image_tokens(family.processor.prepare(PICTURE)) > 16


# -- LLaVA-OneVision ------------------------------------------------------------------------------


def test_a_video_of_llava_onevision_equals_transformers(tmp_path: Path) -> None:
    engine = Engine.load(write_onevision(tmp_path), device="cpu", dtype="float32", cache="full")
    assert tiles_of(engine).shape == (5, 3, 44, 44)
    same_as(engine, make_onevision(), "<video>\nWhat happens?", [], {})


def test_a_picture_beside_a_video_is_tiled_as_if_alone(tmp_path: Path) -> None:
    engine = Engine.load(write_onevision(tmp_path), device="cpu", dtype="float32", cache="full")
    alone = engine.render("<image>", [PICTURE], raw=True).token_ids
    both = engine.render(
        *engine.with_videos("<image><video>", [PICTURE], [FRAMES], raw=True), raw=True
    )
    spans = [segment.end - segment.start for segment in both.segments if segment.kind == "image"]
    assert spans[0] == len(alone)
    assert spans[1] == 5 * 4 + 1


# -- LongVA ---------------------------------------------------------------------------------------


def write_longva(folder: Path, shape: Shape, **changes: Any) -> Path:
    write_next(folder, "qwen2", "original", shape)
    edit_json(
        folder / "config.json",
        architectures=["LlavaQwenForCausalLM"],
        mm_patch_merge_type="unires",
        **changes,
    )
    return folder


class LongVaOracle:
    """Transformers' tower, projector and Qwen2 with the same weights, joined by hand."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.folder = write_next(folder, "qwen2", "hub", shape)
        self.parts = NextOracle(self.folder).model.model
        self.head = NextOracle(self.folder).model.lm_head
        self.side = shape.image // shape.patch

    def tiles(self, picture: Image.Image) -> Tensor:
        """Those of a picture, without the whole one that goes first."""
        processor = AutoImageProcessor.from_pretrained(self.folder, backend="pil")
        made: Tensor = processor(picture, return_tensors="pt")["pixel_values"]
        return made[0, 1:]

    def features(self, tiles: Tensor) -> Tensor:
        """The mean of each 2 x 2 projected patches, tile after tile, row after row."""
        states = self.parts.vision_tower(tiles, output_hidden_states=True).hidden_states[-2]
        grid = self.parts.multi_modal_projector(states[:, 1:]).unflatten(1, (self.side, self.side))
        whole = self.side // 2 * 2
        blocks = grid[:, :whole, :whole].unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return blocks.mean((2, 4)).flatten(0, 2)

    def logits(self, before: list[int], features: Tensor, behind: list[int]) -> Tensor:
        embed = self.parts.language_model.get_input_embeddings()
        parts = [embed(torch.tensor(before)), features, embed(torch.tensor(behind))]
        states = self.parts.language_model(inputs_embeds=torch.cat(parts)[None]).last_hidden_state
        made: Tensor = self.head(states)[0, :, :PIECES]
        return made


@torch.inference_mode()
@pytest.mark.parametrize("shape", [NEXT_SHAPES["qwen2"], ODD])
@pytest.mark.parametrize("what", ["picture", "video"])
def test_longva_equals_its_modules_of_transformers(tmp_path: Path, shape: Shape, what: str) -> None:
    engine = Engine.load(
        write_longva(tmp_path / "ours", shape), device="cpu", dtype="float32", cache="full"
    )
    oracle = LongVaOracle(tmp_path / "theirs", shape)
    assert isinstance(engine.model, LongVa)
    if what == "picture":
        raw, prompt = "<image>\nWhat is it?", ("<image>\nWhat is it?", [PICTURE])
        tiles = oracle.tiles(PICTURE)
        torch.testing.assert_close(engine.processor.prepare(PICTURE).tiles, tiles)
    else:
        raw, tiles = "<video>\nWhat is it?", tiles_of(engine)
        prompt = engine.with_videos(raw, [], [FRAMES], raw=True)
    built = engine.render(*prompt, raw=True)
    (place,) = (segment for segment in built.segments if segment.kind == "image")
    assert place.end - place.start == len(tiles) * (oracle.side // 2) ** 2
    ids = built.token_ids
    expected = oracle.logits(ids[: place.start], oracle.features(tiles), ids[place.end :])
    got = engine.logits(*prompt, raw=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
    assert engine.generate(*prompt, raw=True, max_new_tokens=1, ignore_eos=True).token_ids == [
        int(expected[-1].argmax())
    ]


def test_frames_are_cut_as_clip_cuts_pictures(tmp_path: Path) -> None:
    family = recognise(write_longva(tmp_path / "ours", NEXT_SHAPES["qwen2"]))
    (video,) = family.processor.prepare_frames(FRAMES)
    assert video.video
    assert video.size == (90, 60)
    for frame, tile in zip(FRAMES, video.tiles, strict=True):
        middle = frame.resize((84, 56), Image.Resampling.BICUBIC).crop((14, 0, 70, 56))
        mean, std = (
            torch.tensor(x)[:, None, None] for x in (family.processor.mean, family.processor.std)
        )
        values = torch.tensor(list(middle.tobytes())).view(56, 56, 3).permute(2, 0, 1) / 255
        torch.testing.assert_close(tile, (values - mean) / std)


def test_longvas_decoder_takes_no_notice_of_rope_scaling(tmp_path: Path) -> None:
    scaled = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 1e9}
    model = recognise(write_longva(tmp_path, NEXT_SHAPES["qwen2"], **scaled)).model
    assert model.decoder.config.rope is None
    assert model.decoder.config.rope_theta == 1e9


def test_canvases_may_be_spelled_as_a_range(tmp_path: Path) -> None:
    spelled = {"image_grid_pinpoints": "(1x1),...,(3x2)"}
    model = recognise(write_longva(tmp_path, NEXT_SHAPES["qwen2"], **spelled)).model
    assert isinstance(model, LongVa)
    # (height, width), of columns 1 to 3 and rows 1 to 2
    assert set(model.pinpoints) == {(56 * r, 56 * c) for r in (1, 2) for c in (1, 2, 3)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_spatial_pool_mode": "conv"}, "mm_spatial_pool_mode is 'conv'"),
        ({"mm_spatial_pool_stride": 0}, "mm_spatial_pool_stride is 0"),
        ({"image_grid_pinpoints": "(1x1)"}, "must be a list of sizes"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
    ],
)
def test_what_longva_has_not_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        recognise(write_longva(tmp_path, NEXT_SHAPES["qwen2"], **changes))


def test_the_grids_of_a_longva_picture_show_every_token_once(tmp_path: Path) -> None:
    family = recognise(write_longva(tmp_path, NEXT_SHAPES["qwen2"]))
    pixels = family.processor.prepare(PICTURE)
    panels = panels_of(family.model, family.processor, pixels)
    assert len(panels) == len(pixels.tiles)
    shown = [token for panel in panels for token in panel.tokens]
    assert shown == list(range(family.model.image_tokens(pixels)))


@pytest.mark.parametrize(("side", "stride"), [(24, 2), (27, 2), (7, 3)])
@pytest.mark.parametrize("mode", ["average", "max"])
def test_pooling_is_that_of_torch_on_the_grid(side: int, stride: int, mode: str) -> None:
    features = torch.randn(3, side * side, 5)
    grid = features.view(3, side, side, 5).permute(0, 3, 1, 2)
    pool = {"average": F.avg_pool2d, "max": F.max_pool2d}[mode]
    expected = pool(grid, stride).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(Pooling(stride, mode)(features, side), expected)


# -- long prompts ---------------------------------------------------------------------------------

MANY = [noise(60, 60, seed=n) for n in range(60)]
SPECS = ["full", "avl:prefill=1", "sift", "zipvl", "zipvl:format=plain,minor=freed", "h2o"]


@pytest.fixture(scope="module")
def longva(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = write_longva(tmp_path_factory.mktemp("longva") / "m", NEXT_SHAPES["qwen2"])
    return Engine.load(folder, device="cpu", dtype="float32", cache="full")


@pytest.mark.parametrize("spec", SPECS)
def test_a_prefill_in_slices_is_that_in_one_piece(
    spec: str, longva: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = longva.with_cache(spec)

    def scores() -> Tensor:
        prompt = engine.with_videos("<video>\nWhat happens?", [], [MANY], raw=True)
        return engine.logits(*prompt, raw=True, continuation=[5, 6, 7, 8])

    whole = scores()
    monkeypatch.setattr(prefill, "CHUNK", 37)
    monkeypatch.setattr(decoder, "MLP_ROWS", 50)
    torch.testing.assert_close(scores(), whole, rtol=0, atol=1e-5)


def test_frames_pass_the_tower_a_few_at_once(
    longva: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (video,) = longva.processor.prepare_frames(MANY)
    (whole,) = longva.model.encode([video])
    at_once: list[int] = []
    forward = longva.model.vision.forward
    monkeypatch.setattr(
        longva.model.vision, "forward", lambda tiles: at_once.append(len(tiles)) or forward(tiles)
    )
    monkeypatch.setattr(llava, "VISION_BYTES", 300_000)
    (parts,) = longva.model.encode([video])
    assert max(at_once) < 20
    assert sum(at_once) == 60
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_how_far_a_long_prompt_has_come_is_told(
    longva: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", 100)
    longva.forget_pictures()
    heard: dict[str, list[tuple[int, int]]] = {}
    with listening(lambda what, done, total: heard.setdefault(what, []).append((done, total))):
        longva.generate("<video>What?", videos=[MANY], raw=True, max_new_tokens=2)
    assert list(heard) == ["frames decoded", "tiles and frames encoded", "prompt read"]
    for steps in heard.values():
        assert steps[-1][0] == steps[-1][1]
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert len(heard["prompt read"]) == 3 * 2  # layers, slices
