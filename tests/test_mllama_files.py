"""Llama-3.2-Vision's files: tensors, configuration, pictures, prompts; what is refused by name."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_optimal_tiled_canvas,
)

from engine.checkpoint.names import target_names
from engine.engine import Engine
from engine.errors import CheckpointError, OptionError
from engine.loading.families import recognise
from engine.models.decoder import Rotation
from engine.models.llama3_rope import Llama3Rope
from engine.models.mllama import Mllama
from engine.options import make_options
from engine.pictures.canvas import CanvasProcessor, canvas_of, canvases
from engine.pictures.preprocess import ImageProcessor
from tests import mllama_checkpoint
from tests.asking import Ask
from tests.checkpoints import edit_json, write_json
from tests.mllama_checkpoint import (
    CANVASES,
    DEFAULT,
    TEMPLATE,
    MllamaShape,
    mllama_config,
    preprocessor_config,
    write_mllama,
)
from tests.noise import noise

PICTURE = {"type": "image"}
SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("mllama") / "m")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, device="cpu", cache="full")


# -- tensors and configuration --------------------------------------------------------------------

PUBLISHED = {
    "11B": MllamaShape(
        hidden=4096, layers=40, cross=tuple(range(3, 40, 5)), heads=32, kv_heads=8, mlp=14336,
        vision_hidden=1280, vision_layers=32, global_layers=8, vision_heads=16, vision_mlp=5120,
        states=(3, 7, 15, 23, 30), image=560, context=131072,
    ),
    "90B": MllamaShape(
        hidden=8192, layers=100, cross=tuple(range(3, 100, 5)), heads=64, kv_heads=8, mlp=28672,
        vision_hidden=1280, vision_layers=32, global_layers=8, vision_heads=16, vision_mlp=5120,
        states=(3, 7, 15, 23, 30), image=560, context=131072,
    ),
}  # fmt: skip


def write_published(folder: Path, config: dict[str, Any]) -> Mllama:
    """What is built of a config.json alone, without memory for its weights."""
    write_json(folder / "config.json", config)
    model = recognise(folder).model
    assert isinstance(model, Mllama)
    return model


@pytest.mark.parametrize("layout", ["hub", "modules"])
@pytest.mark.parametrize(
    ("size", "tensors", "total"), [("11B", 906, 21_340_441_670), ("90B", 0, 0)]
)
def test_the_published_tensors_are_the_models(
    size: str, tensors: int, total: int, layout: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(mllama_checkpoint, "VOCAB", 128256)
    shape = PUBLISHED[size]
    model = write_published(tmp_path, mllama_config(shape))
    rename, wanted = recognise(tmp_path).rename, dict(model.named_parameters())
    sizes = {
        mllama_checkpoint.PREFIXES[layout][part] + name: dims
        for part, name, dims in mllama_checkpoint._sizes(shape)
    }
    if tensors:
        assert (len(sizes), 2 * sum(map(np.prod, sizes.values()))) == (tensors, total)
    for name, dims in sizes.items():
        (ours,) = target_names(rename(name))
        assert tuple(wanted.pop(ours).shape) == dims, name
    assert wanted == {}
    assert (model.cross_layers, model.most_features) == (len(shape.cross), 6404)
    assert model.decoder.config.layers == shape.layers - len(shape.cross)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.3.cross_attn.q_bias.weight",
        "language_model.model.layers.03.mlp.up_proj.weight",
        "vision_model.transformer.layers.0.self_attn.out_proj.weight",
        "vision_model.global_transformer.layers.0.gate_mlp",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        "vision_tower.class_embedding",
        "multi_modal_projector.linear_1.weight",
        "model.layers.0.mlp.up_proj.weight",
    ],
)
def test_unknown_names_stay_unknown(name: str, folder: Path) -> None:
    model, found = recognise(folder).model, target_names(recognise(folder).rename(name))
    assert not set(found) & {known for known, _ in model.named_parameters()}


def test_what_a_file_leaves_out_has_transformers_defaults(tmp_path: Path) -> None:
    text = {"model_type": "mllama_text_model", "rope_scaling": SCALING}
    vision = {"model_type": "mllama_vision_model", "image_size": 560}
    bare = {"model_type": "mllama", "text_config": text, "vision_config": vision}
    for folder in ("bare", "whole"):
        (tmp_path / folder).mkdir()
    built = write_published(tmp_path / "bare", bare).config
    full = mllama_config(PUBLISHED["11B"])
    full["text_config"] |= {"vocab_size": 128256, "rope_scaling": SCALING, "eos_token_id": None}
    full |= {"image_token_index": 128256}
    assert built == write_published(tmp_path / "whole", full).config
    assert built.decoder.rope_theta == 500000.0
    assert built.decoder.rope == Llama3Rope(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(("head_dim", "original"), [(128, 8192), (64, 32), (16, 512)])
def test_frequencies_are_slowed_as_transformers_does(head_dim: int, original: int) -> None:
    config = LlamaConfig(
        head_dim=head_dim,
        rope_parameters={
            **SCALING, "rope_theta": 500000.0, "original_max_position_embeddings": original
        },
    )  # fmt: skip
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    scaling = Llama3Rope(8.0, 1.0, 4.0, original)
    got = Rotation(head_dim, 500000.0, "cpu", scaling).frequencies
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    plain = Rotation(head_dim, 500000.0, "cpu").frequencies
    assert len({float(x) for x in (plain / got).round(decimals=4)}) > 2  # kept, between, divided


def test_transformers_5_writes_rotation_in_one_section(tmp_path: Path) -> None:
    config = mllama_config(DEFAULT)
    text = config["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": 12345.0}
    del text["rope_theta"]
    built = write_published(tmp_path, config).config.decoder
    assert (built.rope_theta, built.rope) == (12345.0, Llama3Rope(8.0, 1.0, 4.0, 32))


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ("text_config", {"cross_attention_layers": [1, 7]}, "cross_attention_layers"),
        ("text_config", {"cross_attention_layers": [1, 1]}, "cross_attention_layers"),
        ("text_config", {"cross_attention_layers": [1.5]}, "whole numbers"),
        ("text_config", {"cross_attention_layers": []}, "cross_attention_layers"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type"),
        ("text_config", {"rope_scaling": SCALING | {"factor": 0}}, "factor"),
        ("text_config", {"rope_scaling": SCALING | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ("text_config", {"model_type": "llama"}, "model_type"),
        ("vision_config", {"intermediate_layers_indices": [4]}, "intermediate_layers_indices"),
        ("vision_config", {"intermediate_layers_indices": []}, "intermediate_layers_indices"),
        ("vision_config", {"vision_output_dim": 7680}, "vision_output_dim"),
        ("vision_config", {"supported_aspect_ratios": [[1, 1]]}, "supported_aspect_ratios"),
        ("vision_config", {"attention_heads": 3}, "hidden_size"),
        ("vision_config", {"hidden_act": "quick_gelu"}, "hidden_act"),
        ("vision_config", {"features_after_layer": 1}, "features_after_layer"),
    ],
)
def test_a_wrong_configuration_is_named(
    section: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    config = mllama_config(DEFAULT)
    config[section] |= changes
    with pytest.raises(CheckpointError, match=f"config.json: {section}.*{says}"):
        write_published(tmp_path, config)


def test_metas_own_layout_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("params.json", "consolidated.00.pth")):
        original = tmp_path / f"{number}" / "original"
        original.mkdir(parents=True)
        (original / name).write_text("{}")
        with pytest.raises(CheckpointError, match="Meta's own layout") as caught:
            Engine.load(original)
        assert "the folder above" in caught.value.hint


# -- pictures -------------------------------------------------------------------------------------


def rules(side: int) -> dict[str, Any]:
    return preprocessor_config(MllamaShape(image=side))


def processor(side: int) -> CanvasProcessor:
    plain = ImageProcessor.from_config(rules(side) | {"do_center_crop": False}, "crop")
    return CanvasProcessor(**vars(plain))


def drawn_sizes() -> list[tuple[int, int]]:
    """50 sizes: extremes, those around a tile's side, and whatever comes."""
    chosen = [(1, 1), (1, 5000), (5000, 1), (560, 560), (561, 560), (559, 561), (2240, 560)]
    chosen += [(900, 1000), (500, 1600)]
    generator = random.Random(7)
    while len(chosen) < 50:
        area, ratio = 10 ** generator.uniform(2, 6), 10 ** generator.uniform(-1, 1)
        size = (max(1, int((area * ratio) ** 0.5)), max(1, int((area / ratio) ** 0.5)))
        chosen.append(size)
    return chosen


@pytest.mark.parametrize("side", [56, 560])
def test_pixels_equal_transformers_on_fifty_sizes(side: int) -> None:
    ours, theirs = processor(side), MllamaImageProcessorPil(**rules(side))
    taken = set()
    for number, (width, height) in enumerate(drawn_sizes()):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        made, got = theirs(image, return_tensors="pt"), ours.prepare(image)
        wanted, count = made["pixel_values"][0, 0], made["num_tiles"][0][0]
        assert torch.equal(got.tiles, wanted[:count]), image.size
        assert not wanted[count:].any()
        canvas = canvas_of(image.size, side, 4)
        assert made["aspect_ratio_ids"].item() == 1 + CANVASES.index(canvas)
        assert got.size == image.size
        taken.add(canvas)
    assert taken == set(CANVASES)


@pytest.mark.parametrize("most", [1, 4, 6])
def test_canvases_are_transformers_for_any_size(most: int) -> None:
    generator = random.Random(most)
    for _ in range(2000):
        width, height = (int(10 ** generator.uniform(0, 3.7)) for _ in range(2))
        rows, columns = get_optimal_tiled_canvas(height, width, most, 56)
        assert canvas_of((width, height), 56, most) == (rows // 56, columns // 56)
    assert len(canvases(4)) == 8


def test_rules_that_are_not_the_towers_are_refused(folder: Path, tmp_path: Path) -> None:
    write_mllama(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    for changes in ({"size": {"height": 28, "width": 28}}, {"max_image_tiles": 2}):
        write_json(path, preprocessor_config(DEFAULT) | changes)
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: tiles are"):
            recognise(tmp_path)
    path.unlink()
    assert recognise(tmp_path).processor == recognise(folder).processor


# -- prompts --------------------------------------------------------------------------------------


def user(*content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": "user", "content": parts}


ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A car."}]}
SYSTEM = {"role": "system", "content": " Be brief. "}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "picture": ([user(PICTURE, "What?")], 1),
    "picture last": ([user("What?", PICTURE)], 1),
    "two pictures, two turns": ([user(PICTURE, "a", PICTURE), ANSWER, user("Why?")], 2),
    "text": ([user("What?")], 0),
    "text after a system message": ([SYSTEM, user("What?"), ANSWER, user("Why?")], 0),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_the_templates_id_by_id(name: str, folder: Path, engine: Engine) -> None:
    (messages, count), theirs = CONVERSATIONS[name], AutoProcessor.from_pretrained(folder)
    day = {"date_string": "26 Jul 2024"}
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, **day)
    images = [noise(50, 40 + n) for n in range(count)]
    got = engine.render(messages, images)
    assert "<|begin_of_text|>" + got.text == wanted.replace("<|image|>", "<image>")
    ids = theirs.tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert got.token_ids == ids
    assert ids.count(theirs.tokenizer.bos_token_id) == 1
    assert got.image_count == count == ids.count(theirs.image_token_id)


def test_a_later_turn_goes_on_as_the_whole_conversation(engine: Engine) -> None:
    chat = engine.chat()
    first = chat.send("Look:", [noise(50, 40)], max_new_tokens=2, ignore_eos=True)
    chat.send("Why?", [noise(40, 50)], max_new_tokens=2, ignore_eos=True)
    messages = [user(PICTURE, "Look:"), ANSWER, user(PICTURE, "Why?")]
    whole = engine.render(messages, [noise(50, 40), noise(40, 50)]).token_ids
    answer = engine.tokenizer.encode("A car.")
    start = first.prompt_tokens
    assert chat.token_ids[:start] == whole[:start]
    assert chat.token_ids[start + 2 : -2] == whole[start + len(answer) :]


def test_what_a_user_types_is_text(engine: Engine) -> None:
    prompt = engine.render("<|image|><|eot_id|> <|begin_of_text|>", [noise(50, 40)])
    for name, count in (("<|image|>", 1), ("<|eot_id|>", 1), ("<|begin_of_text|>", 1)):
        assert prompt.token_ids.count(engine.tokenizer.token_id(name)) == count


@pytest.mark.parametrize("messages", [[SYSTEM, user(PICTURE, "a")], [user("a"), SYSTEM, user("b")]])
def test_system_messages_are_refused_where_the_template_has_none(
    messages: list[dict[str, Any]], engine: Engine
) -> None:
    images = [noise(9, 9)] * str(messages).count("image")
    with pytest.raises(OptionError, match="system message"):
        engine.render(messages, images)


def test_the_base_model_goes_on_from_a_text(tmp_path: Path) -> None:
    write_mllama(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    edit_json(tmp_path / "generation_config.json", eos_token_id=3)
    family = recognise(tmp_path)
    assert (family.style, family.end_tokens) == ("mllama-base", frozenset([3]))
    base = Engine.load(tmp_path, device="cpu", cache="full")
    prompt = base.render("If I had", [noise(50, 40)])
    assert prompt.text == "<image>If I had"
    image, bos = base.model.image_token, base.tokenizer.bos_id
    assert prompt.token_ids == [bos, image, *base.tokenizer.encode("If I had")]
    raw = base.render("<image>If I had", [noise(50, 40)], raw=True)
    assert raw.token_ids == prompt.token_ids
    edit_json(tmp_path / "tokenizer_config.json", chat_template=TEMPLATE)
    assert recognise(tmp_path).style == "mllama"


def test_all_three_published_ends_end_an_answer(engine: Engine) -> None:
    for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"):
        answer, token = engine.answer(make_options(), []), engine.tokenizer.token_id(name)
        assert token is not None
        answer.take(token)
        assert (answer.finish, answer.token_ids) == ("stop", [])


def test_a_penalty_counts_the_pictures_token_though_it_cannot_be_said(engine: Engine) -> None:
    asked = {"max_new_tokens": 4, "repetition_penalty": 1.3}
    assert engine.generate("What?", [noise(50, 40)], **asked).token_ids


# -- the command line -----------------------------------------------------------------------------


def test_check_knows_the_model(folder: Path, ask: Ask) -> None:
    done = ask("--check", "--model", str(folder))
    assert done.code == 0, done
    assert "config: ok - Mllama" in done.out
    assert "prompts as mllama, a context of 4,096 tokens, pictures of up to 68 features" in done.out
    assert "looked at in 2 cross layers, published with --temperature 0.6 --top-p 0.9 (" in done.out
    assert "chat_template.jinja renders what style mllama does" in done.out


def test_stats_speak_of_features(
    folder: Path, tmp_path: Path, ask: Ask, picture_file: Callable[..., Path]
) -> None:
    path = picture_file(tmp_path / "a.png")
    done = ask("--model", str(folder), str(path), "What?", "-n", "3", "--stats")
    assert done.code == 0, done
    assert "34 features of pictures in every cross layer | " in done.err
    assert "| features of pictures k4v4 0.0" in done.err
    assert "% of full, " in done.err
    done = ask("--model", str(folder), "What?", "-n", "3", "--stats")
    assert "0 image tokens: 0 core" in done.err


@pytest.fixture
def picture_file() -> Callable[..., Path]:
    def made(path: Path) -> Path:
        noise(100, 40).save(path)
        return path

    return made
