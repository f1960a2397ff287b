"""LLaVA-1.6 against transformers, and its published shapes on the meta device."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from engine.app.cli import main
from engine.engine import Engine
from engine.errors import CheckpointError, OptionError
from engine.loading.families import recognise
from engine.models import llava
from engine.models.llava_next import LlavaNext
from tests import checkpoints as plain
from tests.checkpoints import IMAGE_TOKEN, PIECES, Shape, edit_json
from tests.next_checkpoints import (
    BIG,
    NEXT_SHAPES,
    draw_next,
    pinpoints,
    spelled_next,
    write_next,
)
from tests.noise import noise
from tests.oracle import Oracle

PICTURE = {"type": "image"}
QUESTION = "What is this?"
RAW = f"USER: <image>\n{QUESTION} ASSISTANT:"
RATIOS = [(56, 56), (100, 75), (75, 100), (300, 40), (33, 401), (1, 1), (55, 88), (160, 90)]
FEW = [(100, 75), (33, 401), (55, 88)]
CASES = [(name, size) for name in ("vicuna", "mistral") for size in RATIOS]
CASES += [(name, size) for name in ("yi", "qwen2") for size in FEW]


class NextOracle(Oracle):
    """A LLaVA-1.6 of transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = LlavaNextForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.model.generation_config.eos_token_id = None
        self.processor = AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def made(name: str, layout: str = "hub", shape: Shape | None = None) -> Path:
        return write_next(tmp_path_factory.mktemp("next") / f"{name}-{layout}", name, layout, shape)

    return made


@pytest.fixture(scope="module")
def engine_of(folder_of: Callable[..., Path]) -> Callable[..., Engine]:
    @functools.cache
    def made(name: str, layout: str = "hub", shape: Shape | None = None) -> Engine:
        folder = folder_of(name, layout, shape)
        return Engine.load(folder, device="cpu", dtype="float32", cache="full")

    return made


@pytest.fixture(scope="module")
def oracle_of(folder_of: Callable[..., Path]) -> Callable[..., NextOracle]:
    return functools.cache(
        lambda name, shape=None: NextOracle(folder_of(name, "hub", shape))  # type: ignore[no-any-return]
    )


def user(*content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": "user", "content": parts}


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), CASES)
def test_ids_logits_and_greedy_tokens_equal_transformers(
    name: str, size: tuple[int, int], engine_of: Callable[..., Engine], oracle_of: Any
) -> None:
    engine, oracle, image = engine_of(name), oracle_of(name), noise(*size)
    inputs = oracle.inputs(RAW, [image])
    assert engine.render(RAW, [image], raw=True).token_ids == inputs["input_ids"][0].tolist()
    expected = oracle.logits(inputs)
    assert 1.5 < expected.std() < 2.5  # the tolerance is meant for this scale
    torch.testing.assert_close(engine.logits(RAW, [image], raw=True), expected, rtol=0, atol=2e-4)
    result = engine.generate(RAW, [image], max_new_tokens=12, ignore_eos=True, raw=True)
    assert result.token_ids == oracle.greedy(inputs, 12)
    assert result.image_tokens == (inputs["input_ids"] == IMAGE_TOKEN).sum()


@pytest.mark.parametrize(("size", "count"), [((640, 480), 2340), ((1000, 300), 2182)])
def test_full_size_tiles_equal_transformers(
    size: tuple[int, int], count: int, engine_of: Callable[..., Engine], oracle_of: Any
) -> None:
    engine, oracle, image = (
        engine_of("mistral", "hub", BIG),
        oracle_of("mistral", BIG),
        noise(*size),
    )
    inputs = oracle.inputs(RAW, [image])
    got, expected = engine.logits(RAW, [image], raw=True), oracle.logits(inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
    result = engine.generate(RAW, [image], max_new_tokens=4, ignore_eos=True, raw=True)
    assert result.token_ids == oracle.greedy(inputs, 4)
    assert result.image_tokens == count


@pytest.mark.parametrize("layout", plain.LAYOUTS)
@pytest.mark.parametrize("name", NEXT_SHAPES)
def test_every_layout_is_the_same_model(
    name: str, layout: str, engine_of: Callable[..., Engine], oracle_of: Any
) -> None:
    image = noise(150, 60)
    got = engine_of(name, layout).logits(RAW, [image], raw=True)
    expected = oracle_of(name).logits(oracle_of(name).inputs(RAW, [image]))
    assert got.shape[1] == (PIECES if layout == "original" else expected.shape[1])
    torch.testing.assert_close(got, expected[:, : got.shape[1]], rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("dtype", "most", "mean"), [("float16", 0.06, 0.006), ("bfloat16", 0.5, 0.05)]
)
@pytest.mark.parametrize("name", ["vicuna", "mistral"])
def test_half_precision_stays_near_transformers(
    name: str,
    dtype: str,
    most: float,
    mean: float,
    folder_of: Callable[..., Path],
    oracle_of: Any,
) -> None:
    images, folder = [noise(100, 75)], folder_of(name)
    half = NextOracle(folder, getattr(torch, dtype))
    engine = Engine.load(folder, device="cpu", dtype=dtype, cache="full")
    ours = engine.logits(RAW, images, raw=True)
    same = half.logits(half.inputs(RAW, images))
    exact = oracle_of(name).logits(oracle_of(name).inputs(RAW, images))
    for expected in (same, exact):
        error = (ours - expected).abs()
        assert error.max() < most
        assert error.mean() < mean
    assert (ours - exact).abs().mean() < 1.2 * (same - exact).abs().mean()


# -- several pictures -----------------------------------------------------------------------------


def test_two_pictures_of_different_tile_counts_in_their_order(
    engine_of: Callable[..., Engine], oracle_of: Any
) -> None:
    engine, oracle = engine_of("mistral"), oracle_of("mistral")
    images = [noise(56, 56), noise(110, 110, seed=3)]
    messages = [user(PICTURE, PICTURE, QUESTION)]
    prompt = engine.render(messages, images)
    spans = [s for s in prompt.segments if s.kind == "image"]
    pictures = [engine._family.processor.prepare(image) for image in images]
    assert [len(picture.tiles) for picture in pictures] == [3, 5]
    assert [s.end - s.start for s in spans] == [engine.model.image_tokens(p) for p in pictures]
    assert [s.image for s in spans] == [0, 1]
    inputs = oracle.inputs(messages, images)
    assert prompt.token_ids == inputs["input_ids"][0].tolist()
    expected = oracle.logits(inputs)
    torch.testing.assert_close(engine.logits(messages, images), expected, rtol=0, atol=2e-4)
    result = engine.generate(messages, images, max_new_tokens=12, ignore_eos=True)
    assert result.token_ids == oracle.greedy(inputs, 12)


def test_exchanging_two_pictures_exchanges_their_segments(
    engine_of: Callable[..., Engine],
) -> None:
    engine, one, other = engine_of("vicuna"), noise(80, 80), noise(80, 80, seed=9)
    forth = engine.model.encode([engine._family.processor.prepare(i) for i in (one, other)])
    back = engine.model.encode([engine._family.processor.prepare(i) for i in (other, one)])
    torch.testing.assert_close(forth[0], back[1])
    assert (forth[0] - forth[1]).abs().max() > 0.1
    messages = [user("First", PICTURE, "second", PICTURE, QUESTION)]
    exchanged = (
        engine.logits(messages, [other, one])[-1] - engine.logits(messages, [one, other])[-1]
    )
    assert exchanged.abs().max() > 0.01


@pytest.mark.parametrize("spec", ["avl", "h2o", "fastv", "streaming", "snapkv", "random"])
def test_every_policy_runs_on_tiled_pictures(spec: str, engine_of: Callable[..., Engine]) -> None:
    exact, images = engine_of("mistral"), [noise(56, 56), noise(110, 110, seed=3)]
    messages = [user(PICTURE, PICTURE, QUESTION)]
    result = exact.with_cache(spec).generate(messages, images, max_new_tokens=12, ignore_eos=True)
    whole = exact.generate(messages, images, max_new_tokens=12, ignore_eos=True)
    assert (result.image_tokens, len(result.token_ids)) == (whole.image_tokens, 12)
    assert result.cache.bytes_used < 0.9 * whole.cache.bytes_used
    if spec == "avl":  # int(0.45 * I) of each picture by itself, of what the filter let through
        spans = [s for s in exact.render(messages, images).segments if s.kind == "image"]
        assert result.cache.stored.mean == sum(int(0.45 * (s.end - s.start)) for s in spans)
        assert result.cache.core.mean == sum(int(0.30 * (s.end - s.start)) for s in spans)


# -- the tower's batches --------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tiles every pass through the tower took."""
    seen: list[int] = []
    forward = llava.ClipVision.forward

    def counted(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(llava.ClipVision, "forward", counted)
    return seen


def test_all_tiles_pass_the_tower_at_once_within_the_budget(
    batches: list[int], engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("vicuna")
    pictures = [engine._family.processor.prepare(noise(*size)) for size in ((110, 110), (300, 40))]
    whole = engine.model.encode(pictures)
    assert batches == [9]  # 5 tiles and 4
    vision = engine.model.config.vision
    each = 17 * (2 * vision.mlp + 6 * vision.hidden) * 4
    assert vision.tiles_within(4 * each, 4) == 4
    assert vision.tiles_within(4 * each - 1, 4) == 3
    assert vision.tiles_within(1, 4) == 1
    batches.clear()
    monkeypatch.setattr(llava, "VISION_BYTES", 4 * each)
    parts = engine.model.encode(pictures)
    assert batches == [4, 4, 1]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


# -- prompts --------------------------------------------------------------------------------------

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. "
)
TURNS = [
    user(PICTURE, "Who?"),
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    user("Sure?"),
]
LITERAL = {
    "vicuna": f"{SYSTEM}USER: <image>\nWho? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
    "mistral": "[INST] <image>\nWho? [/INST] A cat. </s>[INST] Sure? [/INST]",
    "yi": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWho?"
    "<|im_end|><|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|>"
    "<|im_start|>assistant\n",
    "qwen2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<image>\nWho?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\n"
    "Sure?<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", NEXT_SHAPES)
def test_prompts_are_what_the_checkpoint_was_trained_with(
    name: str, engine_of: Callable[..., Engine], oracle_of: Any
) -> None:
    engine, image = engine_of(name), noise(60, 60)
    prompt = engine.render(TURNS, [image])
    assert prompt.text == LITERAL[name]
    expected = oracle_of(name).inputs(LITERAL[name], [image])["input_ids"][0].tolist()
    if name == "vicuna":
        # Transformers' tokenizer takes the text around </s> as one stretch; here a new one begins.
        assert engine.tokenizer.decode(prompt.token_ids) == engine.tokenizer.decode(expected)
    else:
        assert prompt.token_ids == expected


@pytest.mark.parametrize(
    ("name", "style"), [("vicuna", "llava-hf"), ("mistral", "mistral"), ("yi", "chatml")]
)
def test_prompts_of_the_hubs_templates(
    name: str, style: str, folder_of: Callable[..., Path], oracle_of: Any
) -> None:
    engine = Engine.load(folder_of(name), device="cpu", style=style)
    image = noise(60, 60)
    system = {"role": "system", "content": [{"type": "text", "text": "Be short."}]}
    messages = TURNS if name == "mistral" else [system, *TURNS]
    inputs = oracle_of(name).inputs(messages, [image])
    assert engine.render(messages, [image]).token_ids == inputs["input_ids"][0].tolist()


def test_mistral_has_no_system_message(engine_of: Callable[..., Engine]) -> None:
    with pytest.raises(OptionError, match="no system message"):
        engine_of("mistral").render([{"role": "system", "content": "Be short."}, user("Hi")])


def test_verbose_prints_the_rendered_prompt_and_its_ids(
    folder_of: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    noise(56, 56).save(tmp_path / "a.png")
    flags = ["--model", str(folder_of("mistral")), "--image", str(tmp_path / "a.png")]
    assert main([*flags, "-p", "Who?", "-n", "1", "--verbose", "--device", "cpu"]) == 0
    errors = capsys.readouterr().err
    assert r"prompt: '[INST] <image>\nWho? [/INST]'" in errors
    ids = next(line for line in errors.splitlines() if line.startswith("ids: 1 "))
    assert f" {IMAGE_TOKEN}*36 " in ids  # 16 of the whole, 4 rows of 4 + 1
    assert main([*flags, "-p", "Who?", "-n", "1", "--device", "cpu"]) == 0
    assert "ids:" not in capsys.readouterr().err


# -- published shapes -----------------------------------------------------------------------------

VISION = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
BIG_TOWER = Shape(vision_hidden=1024, vision_layers=24, vision_mlp=4096, image=336)
# Name -> (text_config as published, vocabulary, style, its sizes once more, bytes in fp16).
PUBLISHED: dict[str, tuple[dict[str, Any], int, str, Shape, int]] = {
    "vicuna-7b": (
        LLAMA | {"vocab_size": 32064},
        32064,
        "llava-v1",
        replace(BIG_TOWER, hidden=4096, layers=32, heads=32, kv_heads=32, mlp=11008),
        14_126_854_144 + 2 * 4096,  # LLaVA-1.5-7B and the newline
    ),
    "mistral-7b": (
        {
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "vocab_size": 32064,
        },
        32064,
        "mistral",
        replace(BIG_TOWER, hidden=4096, layers=32, heads=32, kv_heads=8, mlp=14336),
        15_133_495_296,
    ),
    "vicuna-13b": (
        LLAMA
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
            "vocab_size": 32064,
        },
        32064,
        "llava-v1",
        replace(BIG_TOWER, hidden=5120, layers=40, heads=40, kv_heads=40, mlp=13824),
        26_702_999_552,
    ),
    "34b": (
        LLAMA
        | {
            "hidden_size": 7168,
            "intermediate_size": 20480,
            "num_attention_heads": 56,
            "num_hidden_layers": 60,
            "num_key_value_heads": 8,
            "rope_theta": 5e6,
            "vocab_size": 64064,
        },
        64064,
        "yi",
        replace(BIG_TOWER, hidden=7168, layers=60, heads=56, kv_heads=8, mlp=20480),
        69_504_167_936,
    ),
}


def published_tensors(shape: Shape, vocab: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the hub's files."""
    found = {"image_newline": (shape.hidden,)}
    for part, name, size in plain._sizes(shape):
        size = (vocab, *size[1:]) if size[0] == plain.HUB_VOCAB else size
        found[plain.PREFIXES["hub"][part] + name] = size
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_ask_for_exactly_the_published_tensors(name: str, tmp_path: Path) -> None:
    text, vocab, style, shape, total = PUBLISHED[name]
    config = {
        "image_grid_pinpoints": pinpoints(BIG_TOWER),
        "image_token_index": vocab - 64,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "use_image_newline_parameter": True,
        "vision_config": VISION,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    plain.write_json(tmp_path / "config.json", config)
    knows = {"added_tokens_decoder": {"6": {"content": "<|im_start|>"}}} if name == "34b" else {}
    plain.write_json(tmp_path / "tokenizer_config.json", knows)
    family = recognise(tmp_path)
    assert isinstance(family.model, LlavaNext)
    assert family.style == style
    assert family.model.decoder.config.rope_theta == text.get("rope_theta", 1e4)
    on_disk = published_tensors(shape, vocab)
    elements = sum(torch.empty(size, device="meta").numel() for size in on_disk.values())
    assert 2 * elements == total
    wanted = {key: tuple(value.shape) for key, value in family.model.state_dict().items()}
    renamed = {family.rename(key): size for key, size in on_disk.items()}
    unused = {key for key in on_disk if family.rename(key) is None}
    assert {key: size for key, size in renamed.items() if key} == wanted
    assert all("layers.23." in key or "post_layernorm" in key for key in unused)
    assert len(unused) == 16 + 2


def test_the_original_layout_needs_no_other_model_for_the_published_tower(tmp_path: Path) -> None:
    config = {
        **PUBLISHED["mistral-7b"][0],
        "hidden_size": 4096,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[w, h] for h, w in pinpoints(BIG_TOWER)],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava_mistral",
        "vocab_size": 32000,
    }
    plain.write_json(tmp_path / "config.json", config)
    family = recognise(tmp_path)
    assert isinstance(family.model, LlavaNext)
    assert (family.style, family.tower) == ("mistral", None)
    assert family.model.pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert family.model.config.vision.used_layers == 23
    assert family.model.decoder.config.kv_heads == 8


# -- damage ---------------------------------------------------------------------------------------


def test_a_missing_newline_and_a_missing_tower_are_named(tmp_path: Path) -> None:
    folder = write_next(tmp_path / "m", "vicuna", "original")
    tensors = draw_next(NEXT_SHAPES["vicuna"])
    named = spelled_next(tensors, "original")
    plain.save({k: t for k, t in named.items() if "newline" not in k}, folder)
    with pytest.raises(CheckpointError, match=r"1 missing \(image_newline\)"):
        Engine.load(folder, device="cpu")
    plain.save({k: t for k, t in named.items() if "vision_tower" not in k}, folder)
    with pytest.raises(CheckpointError, match=r"missing \(vision\."):
        Engine.load(folder, device="cpu")


def test_nested_picture_rules_are_those_of_the_file_of_their_own(tmp_path: Path) -> None:
    """Transformers 5 writes them into processor_config.json, canvases and all."""
    folder = write_next(tmp_path, "vicuna")
    edit_json(folder / "preprocessor_config.json", image_mean=[0.5, 0.25, 0.75])
    wanted = recognise(folder).processor
    rules = json.loads((folder / "preprocessor_config.json").read_text())
    edit_json(folder / "processor_config.json", image_processor=rules)
    (folder / "preprocessor_config.json").unlink()
    assert recognise(folder).processor == wanted
    edit_json(
        folder / "processor_config.json",
        image_processor=rules | {"image_grid_pinpoints": [[56, 112]]},
    )
    with pytest.raises(CheckpointError, match=r"image_processor: image_grid_pinpoints differ"):
        recognise(folder)


def test_files_that_disagree_about_canvases_are_refused(tmp_path: Path) -> None:
    folder = write_next(tmp_path, "vicuna")
    edit_json(folder / "preprocessor_config.json", image_grid_pinpoints=[[56, 112]])
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: image_grid_pinpoints"):
        Engine.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("mm_patch_merge_type", "flat", "mm_patch_merge_type is 'flat'"),
        ("mm_patch_merge_type", None, "mm_patch_merge_type is 'flat'"),  # the original's default
        ("image_aspect_ratio", "anyres_9", "image_aspect_ratio is 'anyres_9'"),
        ("model_type", "llava_mpt", "model_type is 'llava_mpt'"),
        ("model_type", ["llava"], "model_type must be a text"),
        ("image_grid_pinpoints", "(1x1),...,(6x6)", "image_grid_pinpoints must be a list"),
    ],
)
def test_other_kinds_of_tiling_and_decoders_are_refused(
    key: str, value: Any, complaint: str, tmp_path: Path
) -> None:
    folder = write_next(tmp_path, "vicuna", "original")
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=re.escape(complaint)):
        Engine.load(folder, device="cpu")


def test_extreme_pictures_run(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("vicuna")
    for size in [(1, 3000), (3000, 1), (2, 2)]:
        result = engine.generate(QUESTION, [Image.new("RGB", size)], max_new_tokens=2)
        assert result.image_tokens >= 16
    config = json.dumps(engine.generate("Hello", max_new_tokens=1).as_dict())
    assert '"image_tokens": 0' in config
