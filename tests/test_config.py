"""Published configurations build; wrong ones are refused with the key that is wrong."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.clip import CLIPVisionConfig

from engine.app.doctor import Examination
from engine.checkpoint.config import ConfigReader
from engine.engine import Engine
from engine.errors import CapacityError, CheckpointError
from engine.loading.families import Wishes, recognise
from engine.loading.loading import load
from engine.models.clip import ClipConfig
from engine.models.decoder import DecoderConfig
from engine.models.llava import Llava, parse_hub, parse_original
from tests.checkpoints import (
    Shape,
    edit_json,
    hub_config,
    original_config,
    vision_config,
    write_json,
    write_llava,
    write_original_with_tower,
)
from tests.noise import noise

DATA = Path(os.environ.get("AVL_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data"))
PUBLISHED = DATA / "llava-1.5-7b-hf"


# -- published configurations ---------------------------------------------------------------------


@pytest.fixture
def published() -> dict[str, Any]:
    if not PUBLISHED.is_dir():
        pytest.skip("the published LLaVA-1.5 metadata is not here (AVL_REFERENCE_DATA)")
    config: dict[str, Any] = json.loads((PUBLISHED / "config.json").read_text())
    return config


def test_published_llava_builds_without_memory(published: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Llava(parse_hub(published))
    assert all(parameter.is_meta for parameter in model.parameters())
    # The published bytes (fp16), less the parts that are never built: one vision layer of 24 (4
    # attention matrices, 2 MLP matrices, biases and norms) and post_layernorm.
    layer = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    built = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * (built + layer + 2 * 1024) == 14_126_854_144


def test_published_llava_has_the_shape_its_file_leaves_out(published: dict[str, Any]) -> None:
    config = parse_hub(published)
    decoder, vision = config.decoder, config.vision
    assert (decoder.hidden, decoder.layers, decoder.mlp) == (4096, 32, 11008)
    assert (decoder.heads, decoder.kv_heads, decoder.head_dim) == (32, 32, 128)
    assert (decoder.rope_theta, decoder.norm_eps, decoder.context) == (10000.0, 1e-5, 4096)
    assert (decoder.vocab, decoder.qkv_bias, decoder.tied_head) == (32064, False, False)
    assert (vision.layers, vision.used_layers, vision.activation) == (24, 23, "quick_gelu")
    # It names no end token: generation_config.json does, and else the tokenizer.
    assert (config.image_token, vision.patches, config.end_tokens) == (32000, 576, ())


def test_published_folder_is_recognised() -> None:
    if not PUBLISHED.is_dir():
        pytest.skip("the published LLaVA-1.5 metadata is not here (AVL_REFERENCE_DATA)")
    family = recognise(PUBLISHED)
    assert family.style == "llava-hf"
    assert family.end_tokens == {2}
    assert family.processor.output_size == (336, 336)
    assert family.processor.mode == "crop"


# -- defaults -------------------------------------------------------------------------------------

FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_take_the_reference_implementations_defaults(family: str) -> None:
    reference = FAMILIES[family]()
    values: dict[str, Any] = {"model_type": family}
    if family == "mistral":
        values["sliding_window"] = None  # its default is a window, which is refused
    config = DecoderConfig.parse(ConfigReader(values, "config.json"))
    assert config.hidden == reference.hidden_size
    assert config.layers == reference.num_hidden_layers
    assert config.heads == reference.num_attention_heads
    assert config.kv_heads == reference.num_key_value_heads
    assert config.mlp == reference.intermediate_size
    assert config.vocab == reference.vocab_size
    assert config.context == reference.max_position_embeddings
    assert config.norm_eps == reference.rms_norm_eps
    assert config.rope_theta == reference.rope_parameters["rope_theta"]
    assert config.tied_head == reference.tie_word_embeddings
    assert config.qkv_bias == (family == "qwen2")


def test_absent_vision_keys_take_the_reference_implementations_defaults() -> None:
    reference = CLIPVisionConfig()
    config = ClipConfig.parse(ConfigReader({}, "vision_config"), -2)
    assert config.hidden == reference.hidden_size
    assert (config.layers, config.used_layers) == (reference.num_hidden_layers, 11)
    assert (config.heads, config.mlp) == (
        reference.num_attention_heads,
        reference.intermediate_size,
    )
    assert (config.image, config.patch) == (reference.image_size, reference.patch_size)
    assert (config.norm_eps, config.activation) == (reference.layer_norm_eps, reference.hidden_act)


@pytest.mark.parametrize(
    ("layer", "used"), [(-1, 3), (-2, 2), (-3, 1), (-4, 0), (0, 0), (1, 1), (3, 3)]
)
def test_feature_layer_counts_states_as_the_reference_does(layer: int, used: int) -> None:
    config = ClipConfig.parse(ConfigReader(vision_config(Shape()), "vision_config"), layer)
    assert config.used_layers == used


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ],
)
def test_rotary_base_is_read_from_both_spellings(rope: dict[str, Any]) -> None:
    assert DecoderConfig.parse(ConfigReader(rope, "config.json")).rope_theta == 5e5


def test_image_token_is_read_from_both_spellings() -> None:
    config = hub_config(Shape())
    assert parse_hub(config).image_token == config["image_token_index"]
    config["image_token_id"] = config.pop("image_token_index")
    assert parse_hub(config).image_token == config["image_token_id"]


def test_several_end_tokens_are_read(tmp_path: Path) -> None:
    config = hub_config(Shape())
    config["text_config"]["eos_token_id"] = [2, 7]
    assert parse_hub(config).end_tokens == (2, 7)
    assert parse_original(
        original_config(Shape()) | {"eos_token_id": [2, 9]}, vision_config(Shape())
    ).end_tokens == (2, 9)
    write_llava(tmp_path, Shape())
    edit_json(tmp_path / "generation_config.json", eos_token_id=[2, 5])
    assert recognise(tmp_path).end_tokens == {2, 5}
    (tmp_path / "generation_config.json").unlink()
    assert recognise(tmp_path).end_tokens == frozenset()
    assert load(tmp_path, "cpu", "auto", None, "auto", Wishes(offline=True)).family.end_tokens == {
        2
    }  # </s>


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 4096}),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 16}),
    ],
)
def test_windows_that_are_off_are_accepted(family: str, keys: dict[str, Any]) -> None:
    DecoderConfig.parse(ConfigReader({"model_type": family, **keys}, "config.json"))


# -- wrong configurations -------------------------------------------------------------------------

# (key named in the error, changes in text_config)
WRONG_TEXT: list[tuple[str, dict[str, Any]]] = [
    ("hidden_size", {"hidden_size": "64"}),
    ("hidden_size", {"hidden_size": 64.0}),
    ("hidden_size", {"hidden_size": True}),
    ("hidden_size", {"hidden_size": [64]}),
    ("hidden_size", {"hidden_size": 66}),
    ("hidden_size", {"hidden_size": 66, "head_dim": None}),
    ("head_dim", {"head_dim": 0}),
    ("num_attention_heads", {"num_attention_heads": 0}),
    ("num_key_value_heads", {"num_key_value_heads": 3}),
    ("num_key_value_heads", {"num_key_value_heads": -1}),
    ("num_hidden_layers", {"num_hidden_layers": -2}),
    ("num_hidden_layers", {"num_hidden_layers": 10**9}),
    ("intermediate_size", {"intermediate_size": 2**40}),
    ("vocab_size", {"vocab_size": {}}),
    ("max_position_embeddings", {"max_position_embeddings": 0}),
    ("rms_norm_eps", {"rms_norm_eps": "1e-5"}),
    ("rms_norm_eps", {"rms_norm_eps": -1e-5}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("model_type", {"model_type": "gpt2"}),
    ("model_type", {"model_type": 3}),
    ("attention_bias", {"attention_bias": "no"}),
    ("tie_word_embeddings", {"tie_word_embeddings": 1}),
    ("rope_theta", {"rope_theta": 0}),
    ("rope_theta", {"rope_parameters": {"rope_theta": "x"}}),
    ("rope_type", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("rope_type", {"rope_parameters": {"rope_type": "yarn"}}),
    ("rope_type", {"rope_parameters": {"rope_type": ["default"]}}),
    ("rope_scaling", {"rope_scaling": "linear"}),
    ("sliding_window", {"sliding_window": "16"}),
    ("sliding_window", {"sliding_window": 0}),
    ("use_sliding_window", {"use_sliding_window": "yes"}),
    ("eos_token_id", {"eos_token_id": "2"}),
    ("eos_token_id", {"eos_token_id": [2, "3"]}),
]
WRONG_VISION: list[tuple[str, dict[str, Any]]] = [
    ("hidden_size", {"hidden_size": 33}),
    ("num_attention_heads", {"num_attention_heads": 0}),
    ("num_hidden_layers", {"num_hidden_layers": 0}),
    ("patch_size", {"patch_size": -14}),
    ("image_size", {"image_size": 7}),
    ("hidden_act", {"hidden_act": "relu"}),
    ("layer_norm_eps", {"layer_norm_eps": 0}),
    ("model_type", {"model_type": "dinov2"}),
]
WRONG_TOP: list[tuple[str, dict[str, Any]]] = [
    ("model_type", {"model_type": "idefics"}),
    ("model_type", {"model_type": None}),
    ("model_type", {"model_type": ["llava"]}),
    ("image_token_index", {"image_token_index": 10**6}),
    ("image_token_index", {"image_token_index": "<image>"}),
    ("vision_feature_layer", {"vision_feature_layer": [-2, -5]}),
    ("num_hidden_layers", {"vision_feature_layer": -9}),
    ("vision_feature_select_strategy", {"vision_feature_select_strategy": "cls"}),
    ("projector_hidden_act", {"projector_hidden_act": "relu"}),
    ("text_config", {"text_config": []}),
    ("vision_config", {"vision_config": "clip"}),
]


def refused(config: dict[str, Any], folder: Path) -> str:
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError) as caught:
        Engine.load(folder, device="cpu")
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("wrong") / "model", Shape())


@pytest.mark.parametrize(("key", "changes"), WRONG_TEXT, ids=str)
def test_wrong_text_config_names_its_key(key: str, changes: dict[str, Any], folder: Path) -> None:
    config = hub_config(Shape())
    config["text_config"] |= changes
    message = refused(config, folder)
    assert "text_config" in message
    assert f"{key} " in message


@pytest.mark.parametrize(("key", "changes"), WRONG_VISION, ids=str)
def test_wrong_vision_config_names_its_key(key: str, changes: dict[str, Any], folder: Path) -> None:
    config = hub_config(Shape())
    config["vision_config"] |= changes
    message = refused(config, folder)
    assert "vision_config" in message
    assert f"{key} " in message


@pytest.mark.parametrize(("key", "changes"), WRONG_TOP, ids=str)
def test_wrong_config_names_its_key(key: str, changes: dict[str, Any], folder: Path) -> None:
    message = refused(hub_config(Shape()) | changes, folder)
    assert "config.json" in message or "vision_config" in message
    assert f"{key} " in message


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("mm_projector_type", {"mm_projector_type": "qformer"}),
        ("mm_vision_select_feature", {"mm_vision_select_feature": "cls"}),
        ("mm_vision_select_layer", {"mm_vision_select_layer": "-2"}),
        ("num_attention_heads", {"num_attention_heads": 0}),
        ("_test_only_vision_config", {"_test_only_vision_config": [1]}),
        ("mm_vision_tower", {"mm_vision_tower": 5}),
    ],
    ids=str,
)
def test_wrong_original_config_names_its_key(
    key: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    write_original_with_tower(tmp_path, Shape())
    message = refused(original_config(Shape()) | {"mm_vision_tower": "tower"} | changes, tmp_path)
    assert f"{key} " in message


UNSUPPORTED: list[dict[str, Any]] = [
    {"vision_feature_select_strategy": "cls"},
    {"vision_feature_layer": [-2, -5]},
    {"projector_hidden_act": "relu"},
    {"vision_config": {"model_type": "dinov2"}},
    {"text_config": {"model_type": "gemma"}},
    {"text_config": {"rope_scaling": {"rope_type": "yarn"}}},
]


@pytest.mark.parametrize("changes", UNSUPPORTED, ids=str)
def test_a_healthy_model_of_another_kind_is_not_called_damaged(
    changes: dict[str, Any], folder: Path
) -> None:
    write_json(folder / "config.json", hub_config(Shape()) | changes)
    with pytest.raises(CheckpointError) as caught:
        recognise(folder)
    assert "not supported yet" in caught.value.hint
    assert "damaged" not in caught.value.hint
    names = re.findall(r"\w+", str(caught.value).partition("supported: ")[2])
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"sliding_window": 64}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}),
    ],
)
def test_a_sliding_window_limits_the_context_and_the_rest_is_exact(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    write_llava(tmp_path, Shape(family=family))
    plain = Engine.load(tmp_path, device="cpu", cache="full").logits("What?", [noise(56, 56)])
    text = hub_config(Shape(family=family))["text_config"] | changes
    edit_json(tmp_path / "config.json", text_config=text)
    engine = Engine.load(tmp_path, device="cpu", cache="full")
    assert torch.equal(engine.logits("What?", [noise(56, 56)]), plain)
    room = 64 - len(plain)
    assert len(engine.generate("What?", [noise(56, 56)], max_new_tokens=room).token_ids) <= room
    with pytest.raises(CapacityError, match="the model's sliding window of 64"):
        engine.generate("What? " * 20, [noise(56, 56)], max_new_tokens=30)
    assert "a sliding window of 64 tokens" in str(next(Examination(tmp_path).run()))


@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": None}, {"sliding_window": 4096, "max_position_embeddings": 4096}],
    ids=str,
)
def test_a_window_as_long_as_the_context_is_none(changes: dict[str, Any]) -> None:
    config = DecoderConfig.parse(ConfigReader({"model_type": "llama"} | changes, "config.json"))
    assert not config.windowed
    # What MistralConfig says where the file is silent.
    silent = DecoderConfig.parse(ConfigReader({"model_type": "mistral"}, "config.json"))
    assert (silent.context, silent.windowed) == (MistralConfig().sliding_window, True)


@pytest.mark.parametrize(
    ("family", "kind"), [("mistral", "llava_mistral"), ("qwen2", "llava_qwen")]
)
def test_padded_pictures_over_every_decoder_of_the_original_layout(
    family: str, kind: str, tmp_path: Path
) -> None:
    shape = Shape(family=family, kv_heads=2)
    write_llava(tmp_path / "o", shape, "original")
    edit_json(tmp_path / "o" / "config.json", model_type=kind)
    original = Engine.load(tmp_path / "o", device="cpu", style="llava-hf", cache="full")
    write_llava(tmp_path / "h", shape, "hub")
    edit_json(tmp_path / "h" / "preprocessor_config.json", do_pad=True)
    hub = Engine.load(tmp_path / "h", device="cpu", style="llava-hf", cache="full")
    got, expected = (each.logits("What?", [noise(90, 40)]) for each in (original, hub))
    torch.testing.assert_close(got, expected[:, : got.shape[1]], rtol=0, atol=2e-5)
    assert recognise(tmp_path / "o").style == {"mistral": "mistral", "qwen2": "chatml"}[family]


def test_tower_with_a_damaged_config_is_named(tmp_path: Path) -> None:
    write_original_with_tower(tmp_path, Shape())
    write_json(tmp_path / "tower" / "config.json", {"vision_config": 3})
    with pytest.raises(CheckpointError, match=r"tower.*vision_config"):
        Engine.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[1]", b"nul", b"\xff\xfe", b'{"rope_theta": NaN}'),
        b'{"model_type": "llava", "model_type": "llava"}',
    ],
)
def test_unreadable_config_is_named(content: bytes, tmp_path: Path) -> None:
    write_llava(tmp_path, Shape())
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        Engine.load(tmp_path, device="cpu")
    assert caught.value.exit_code == 4


def test_config_that_disagrees_with_the_weights_names_tensors(tmp_path: Path) -> None:
    write_llava(tmp_path, Shape())
    config = hub_config(Shape())
    config["text_config"]["intermediate_size"] = 80
    write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match=r"gate_proj"):
        Engine.load(tmp_path, device="cpu")


def test_preprocessor_of_another_size_is_refused(tmp_path: Path) -> None:
    write_llava(tmp_path, Shape())
    edit_json(tmp_path / "preprocessor_config.json", crop_size={"height": 70, "width": 70})
    with pytest.raises(CheckpointError, match=r"crop_size.*\(70, 70\).*56"):
        Engine.load(tmp_path, device="cpu")


@pytest.mark.parametrize("value", ["2", [2, None], 2.0, True])
def test_wrong_generation_config_names_its_key(value: Any, tmp_path: Path) -> None:
    write_llava(tmp_path, Shape())
    edit_json(tmp_path / "generation_config.json", eos_token_id=value)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        Engine.load(tmp_path, device="cpu")


def test_missing_preprocessor_takes_the_towers_size(
    tmp_path: Path, engine_of: Callable[..., Engine]
) -> None:
    write_llava(tmp_path, Shape())
    (tmp_path / "preprocessor_config.json").unlink()
    processor = recognise(tmp_path).processor
    assert processor == recognise(write_llava(tmp_path / "with", Shape())).processor
