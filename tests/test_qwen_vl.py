"""Qwen-VL from prompt to answer: against the original code's numbers, and the slow reference."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from bench.qwen_checkpoint import QwenShape, config_of, draw, write_qwen
from engine.cache.decode import Decoding
from engine.checkpoint.header import TensorInfo
from engine.checkpoint.names import target_names
from engine.engine import Engine
from engine.errors import CheckpointError, OptionError
from engine.loading.families import recognise
from engine.pictures.boxes import Box
from engine.policies.specs import POLICIES, parse
from engine.prompts.prompt import Prompt
from engine.result import Timings
from engine.running.generation import Answer, OuterSpace
from engine.running.turn import make_pools, prefill
from tests.noise import noise
from tests.qwen_reference import QwenReference
from tests.session import Session

CASES = (
    *("base_text", "base_image", "chat_text", "chat_image"),
    *("chat_two_images", "chat_history"),
)
PICTURE = {"type": "image"}


def data_folder(name: str) -> Path:
    named = os.environ.get("AVL_REFERENCE_DATA")
    root = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not (root / name).is_dir():
        pytest.skip(f"no published Qwen-VL data: {root / name} is absent (set AVL_REFERENCE_DATA)")
    return root / name


def turn(role: str, *content: str | dict[str, str]) -> dict[str, Any]:
    parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
    return {"role": role, "content": parts}


@pytest.fixture(scope="module")
def shape() -> QwenShape:
    return QwenShape()


@pytest.fixture(scope="module")
def folder(shape: QwenShape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("qwen") / "model", shape)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, device="cpu", dtype="float32", cache="full")


@pytest.fixture(scope="module")
def reference(shape: QwenShape) -> QwenReference:
    return QwenReference(config_of(shape), draw(shape))


# -- the original code ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("golden") / "model"  # a tokenizer.json will be written there
    shutil.copytree(data_folder("qwen-vl-golden"), copy)
    copy.chmod(0o755)
    return copy


@pytest.fixture(scope="module")
def golden_engines(golden: Path) -> dict[str, Engine]:
    styles = {"base": "qwen-vl", "chat": "qwen-vl-chat"}
    return {
        name: Engine.load(golden, device="cpu", dtype="float32", cache="full", style=style)
        for name, style in styles.items()
    }


def conversation(text: str | list[str], folder: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """The original prompt text as messages and pictures."""
    messages, images = [], []
    for number, words in enumerate([text] if isinstance(text, str) else text):
        parts: list[str | dict[str, str]] = []
        for index, part in enumerate(re.split(r"(?:Picture \d: )?<img>(.*?)</img>\n?", words)):
            if index % 2:
                images.append(folder / part)
                parts.append(PICTURE)
            elif part:
                parts.append(part)
        messages.append(turn(("user", "assistant")[number % 2], *parts))
    return messages, images


@pytest.mark.parametrize("case", CASES)
def test_replays_the_original_code(
    case: str, golden: Path, golden_engines: dict[str, Engine]
) -> None:
    expected = load_file(golden / "golden.safetensors")
    facts = json.loads((golden / "golden.json").read_text())["cases"][case]
    engine = golden_engines[case.partition("_")[0]]
    messages, images = conversation(facts["text"], golden)
    prompt = engine.render(messages, images)
    # Their picture's places hold the bytes of its path, ours <imgpad>; neither is ever embedded.
    ids = expected[f"{case}.input_ids"].tolist()
    spans = [(s.start, s.end) for s in prompt.segments if s.kind == "image"]
    assert len(spans) == len(images)
    for start, end in spans:
        assert (ids[start - 1], ids[end], end - start) == (534, 535, 256)
        ids[start:end] = [536] * 256
    assert prompt.token_ids == ids
    logits = engine.logits(messages, images)
    tail, sums = expected[f"{case}.prefill_logits_tail"], expected[f"{case}.prefill_logits_sum"]
    torch.testing.assert_close(logits[-len(tail) :], tail, rtol=0, atol=2e-4)
    torch.testing.assert_close(logits.sum(-1), sums, rtol=0, atol=2e-3)  # of 576 numbers each
    greedy = expected[f"{case}.greedy_ids"].tolist()
    result = engine.generate(messages, images, max_new_tokens=len(greedy), ignore_eos=True)
    assert result.token_ids == greedy
    steps = engine.logits(messages, images, greedy)
    last = expected[f"{case}.step_logits_last4"]
    torch.testing.assert_close(steps[-4:], last, rtol=0, atol=2e-4)


def test_features_equal_the_original_code(golden: Path, golden_engines: dict[str, Engine]) -> None:
    expected = load_file(golden / "golden.safetensors")
    engine = golden_engines["chat"]
    first, second = (engine.encode(golden / name).features for name in ("img0.png", "img1.png"))
    torch.testing.assert_close(first, expected["visual_features_img0"], rtol=0, atol=2e-4)
    rows = expected["visual_features_img1_rows0_8"]
    torch.testing.assert_close(second[:8], rows, rtol=0, atol=2e-4)


def test_slow_reference_replays_the_original_code(
    golden: Path, golden_engines: dict[str, Engine]
) -> None:
    expected, tensors = load_file(golden / "golden.safetensors"), {}
    for shard in golden.glob("model-*.safetensors"):
        tensors |= load_file(shard)
    reference = QwenReference(json.loads((golden / "config.json").read_text()), tensors)
    ids = expected["chat_history.input_ids"].tolist()
    picture = (ids.index(534) + 1, expected["visual_features_img0"].double())
    logits = reference.logits(ids, [picture], len(ids))[-16:].float()
    torch.testing.assert_close(
        logits, expected["chat_history.prefill_logits_tail"], rtol=0, atol=2e-4
    )


def test_published_files_fit_the_model_exactly() -> None:
    folder = data_folder("qwen-vl-chat")
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    family = recognise(folder)
    parameters = family.model.state_dict()
    names = [ours for name in index["weight_map"] for ours in target_names(family.rename(name))]
    assert len(index["weight_map"]) == 853
    assert sorted(names) == sorted(parameters)
    sizes = sum(2 * parameter.numel() for parameter in parameters.values())
    assert sizes == 19_313_870_336 == index["metadata"]["total_size"]
    assert family.style == "qwen-vl-chat"
    assert family.end_tokens == {151643, 151644, 151645}
    assert family.window == 6144
    assert family.model.decoder.config.context == 8192


# -- the slow reference ---------------------------------------------------------------------------


def expected_logits(
    reference: QwenReference, engine: Engine, prompt: Prompt, images: list[Image.Image], more: Any
) -> Tensor:
    places = [segment.start for segment in prompt.segments if segment.kind == "image"]
    processor = engine._family.processor
    pictures = [
        (start, reference.features(processor(image)))
        for start, image in zip(places, images, strict=True)
    ]
    ids = [*prompt.token_ids, *more]
    return reference.logits(ids, pictures, len(prompt.token_ids)).float()


# Tokens of the prompt against the training length of 300: short, just beyond, more than twice it.
REQUESTS = {
    "text": ([turn("user", "How many people are on the left?")], 0, 1),
    "crosses while decoding": ([turn("user", PICTURE, "describe")], 1, 1),
    "long": ([turn("user", PICTURE, "describe the picture " * 9)], 1, 3),
    "two pictures": ([turn("user", PICTURE, PICTURE, "this is 这是什么? " * 6)], 2, 7),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_logits_equal_the_slow_reference(
    name: str, engine: Engine, reference: QwenReference
) -> None:
    messages, count, alpha = REQUESTS[name]
    images = [noise(60 + n, 41) for n in range(count)]
    prompt = engine.render(messages, images)
    tokens, more = len(prompt.token_ids), [n * 7 % 300 for n in range(20)]
    assert math.isclose(reference.base(tokens), 10000 * alpha ** (64 / 62))
    if name == "crosses while decoding":
        assert tokens <= 300 < tokens + len(more)
    expected = expected_logits(reference, engine, prompt, images, more)
    assert expected.std() > 1
    found = engine.logits(messages, images)
    torch.testing.assert_close(found, expected[:tokens], rtol=0, atol=2e-4)
    found = engine.logits(messages, images, more)
    torch.testing.assert_close(found, expected[tokens - 1 : -1], rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("tokens", "alpha"),
    [(1, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8191, 7), (8192, 7)],
)
def test_rotary_base_follows_the_prompt(tokens: int, alpha: int, tmp_path: Path) -> None:
    shape = QwenShape(trained=2048, layers=1, vision_layers=1)
    rotation = Engine.load(write_qwen(tmp_path / "m", shape), device="cpu").model.decoder.rotation
    positions = torch.tensor([1, 2047, 2048, 5000])
    tables = rotation.tables(positions, rotation.begin(tokens)[None], torch.float32)
    base = 10000 * alpha ** (64 / 62)
    angles = positions[:, None] * base ** -(torch.arange(32) / 32)
    torch.testing.assert_close(tables.cos[:, 0, :32], angles.cos(), rtol=0, atol=2e-3)
    factors = [1, 1, math.log(2049, 2048), math.log(5001, 2048)]
    assert tables.scale.flatten().tolist() == pytest.approx(factors, abs=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("spec", ["full", "avl"])
def test_rows_of_a_batch_keep_their_own_base(spec: str, engine: Engine) -> None:
    """Prompts with NTK factors 1, 3 and 7 decode together as they do alone."""
    model, policy, more = engine.model, parse(spec), [5, 80, 200, 11, 90, 17]
    pools, rows, alone = make_pools(model), [], []
    for name in ("text", "long", "two pictures"):
        messages, count, _ = REQUESTS[name]
        images = [noise(60 + n, 41) for n in range(count)]
        made = engine.turn(messages, images, Timings())
        rows.append(prefill(model, pools, policy, made, 10)[0])
        session = Session(model, policy)
        session.prefill(made, 10)
        alone.append(torch.stack([session.decode(token) for token in more]))
    decoding = Decoding(pools, rows)
    together = []
    for token in more:
        hidden = model.decoder.embed(torch.tensor([token] * 3))
        together.append(model.decoder.logits(model.decoder(hidden, decoding)))
        decoding.advance()
    torch.testing.assert_close(torch.stack(together, 1), torch.stack(alone), rtol=0, atol=2e-4)


@pytest.mark.parametrize("spec", ["full", "avl"])
def test_a_batch_answers_as_single_requests_do(spec: str, engine: Engine) -> None:
    single, requests = engine.with_cache(spec), []
    for messages, count, _ in REQUESTS.values():
        images = [noise(60 + n, 41) for n in range(count)]
        requests.append(
            {"prompt": messages, "images": images, "max_new_tokens": 8, "ignore_eos": True}
        )
    together = {result.index: result.token_ids for result in single.generate_batch(requests, 3)}
    for number, request in enumerate(requests):
        assert together[number] == single.generate(**request).token_ids


@pytest.mark.parametrize("spec", [name for name in POLICIES if name != "trimmed"])
def test_every_policy_runs_on_its_pictures(spec: str, folder: Path, engine: Engine) -> None:
    other = Engine.load(folder, device="cpu", dtype="float32", cache=spec)
    messages, images = REQUESTS["two pictures"][0], [noise(60, 41), noise(61, 41)]
    result = other.generate(messages, images, max_new_tokens=12, ignore_eos=True)
    assert (result.image_tokens, len(result.token_ids)) == (512, 12)
    exact = engine.generate(messages, images, max_new_tokens=12, ignore_eos=True)
    if spec == "full":
        assert result.token_ids == exact.token_ids
        assert result.cache.stored.mean == 512
    if spec == "avl":
        assert 0 < result.cache.stored.mean < 300
        assert result.cache.bytes_used < 0.8 * exact.cache.bytes_used
    chosen = other.logits(messages, images, [4, 5, 6, 7, 8])
    assert torch.isfinite(chosen).all()


# Logits have deviation 2; attention is sharp here, so that single ones are off further than most.
@pytest.mark.parametrize(
    ("dtype", "most", "mean"), [("float16", 0.2, 0.006), ("bfloat16", 1.5, 0.05)]
)
@pytest.mark.parametrize("name", ["text", "crosses while decoding", "long"])
def test_half_precision_stays_near_the_slow_reference(
    name: str, dtype: str, most: float, mean: float, folder: Path, reference: QwenReference
) -> None:
    engine = Engine.load(folder, device="cpu", dtype=dtype, cache="full")
    messages, count, _ = REQUESTS[name]
    images, more = [noise(60 + n, 41) for n in range(count)], [n * 7 % 300 for n in range(20)]
    prompt = engine.render(messages, images)
    exact = expected_logits(reference, engine, prompt, images, more)
    tokens = len(prompt.token_ids)
    for found, expected in (
        (engine.logits(messages, images), exact[:tokens]),
        (engine.logits(messages, images, more), exact[tokens - 1 : -1]),
    ):
        error = (found - expected).abs()
        assert 0 < error.max() < most
        assert error.mean() < mean


# -- prompts and answers --------------------------------------------------------------------------


def test_chat_prompt_is_written_as_published(engine: Engine) -> None:
    messages = [
        turn("user", PICTURE, "What?"),
        turn("assistant", "A car."),
        turn("user", PICTURE, PICTURE, "And here?"),
    ]
    prompt = engine.render(messages, [noise(8, 8)] * 3)
    assert prompt.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nPicture 1: <img><image></img>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA car.<|im_end|>\n"
        "<|im_start|>user\nPicture 2: <img><image></img>\nPicture 3: <img><image></img>\n"
        "And here?<|im_end|>\n<|im_start|>assistant\n"
    )
    token = engine.tokenizer.token_id
    for segment in prompt.segments:
        if segment.kind == "image":
            assert segment.end - segment.start == 256
            around = prompt.token_ids[segment.start - 1], prompt.token_ids[segment.end]
            assert around == (token("<img>"), token("</img>"))


def test_pieces_are_encoded_apart(engine: Engine) -> None:
    """The new line behind the role never joins what the user typed, though "\\n\\n" is a token."""
    encode, token = engine.tokenizer.encode, engine.tokenizer.token_id
    ids = engine.render([turn("system", "S"), turn("user", "\nwhat")]).token_ids
    user = [token("<|im_start|>"), *encode("user"), *encode("\n"), *encode("\nwhat")]
    start = len([token("<|im_start|>"), *encode("system"), *encode("\n"), *encode("S")]) + 2
    assert ids[start : start + len(user)] == user


def test_base_prompt_has_nothing_around_it(folder: Path) -> None:
    engine = Engine.load(folder, device="cpu", style="qwen-vl")
    prompt = engine.render([turn("user", PICTURE, "Generate the caption:")], [noise(8, 8)])
    assert prompt.text == "<img><image></img>Generate the caption:"
    assert engine._family.end_tokens == {346}
    assert engine._family.window is None


def test_the_chat_format_chooses_the_prompt(tmp_path: Path) -> None:
    assert recognise(write_qwen(tmp_path / "chat", QwenShape())).style == "qwen-vl-chat"
    base = recognise(write_qwen(tmp_path / "base", QwenShape(chat_format="raw")))
    assert (base.style, base.end_tokens, base.window) == ("qwen-vl", {346}, None)


def test_typed_specials_are_text_but_regions_are_regions(engine: Engine) -> None:
    typed = "a<|im_end|><img>x.png</img><imgpad>"
    token = engine.tokenizer.token_id
    ids = engine.render(f"{typed}<ref>cat</ref><box>(1,2),(3,4)</box>").token_ids
    for name in ("<img>", "</img>", "<imgpad>"):
        assert token(name) not in ids
    assert ids.count(token("<|im_end|>")) == 2  # behind the system text and the question
    for name in ("<ref>", "</ref>", "<box>", "</box>"):
        assert ids.count(token(name)) == 1
    assert typed in engine.tokenizer.decode(ids)


def test_history_is_cut_to_the_window(folder: Path, tmp_path: Path) -> None:
    window = 700
    shutil.copytree(folder, tmp_path / "m")
    settings = {"chat_format": "chatml", "eos_token_id": 346, "max_window_size": window}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(settings))
    engine = Engine.load(tmp_path / "m", device="cpu", cache="full")
    history = []
    for number in range(4):
        history += [turn("user", PICTURE, f"question {number}"), turn("assistant", "yes " * number)]
    messages, images = (
        [*history, turn("user", PICTURE, "last " * 90)],
        [noise(20 + n, 30) for n in range(5)],
    )
    prompt = engine.render(messages, images)
    # Two turns of about 300 tokens each stay below 700; numbers and pictures are their own.
    assert "question 1" not in prompt.text
    assert "Picture 3: <img><image></img>\nquestion 2" in prompt.text
    assert prompt.text.startswith("<|im_start|>system")
    assert [s.image for s in prompt.segments if s.kind == "image"] == [2, 3, 4]
    shorter = [*history[4:], messages[-1]]
    end = len(engine.render(shorter, images[2:]).token_ids)
    assert len(prompt.token_ids) == end
    question = len(engine.render([messages[-1]], images[4:]).token_ids)
    system = len(engine.render([turn("user", "a")]).token_ids)
    assert end - question + system < window
    # The pictures that go in are those whose numbers stand there.
    cut = engine.logits(messages, images, [1, 2])
    plain = Engine.load(folder, device="cpu", cache="full").logits(shorter, images[2:], [1, 2])
    assert cut.shape == plain.shape
    assert [p.size for p in images[2:]] == list(engine.turn(messages, images, Timings()).sizes)


def test_pictures_are_numbered_through_a_chat(engine: Engine) -> None:
    chat = engine.chat()
    first = chat.send("What is this?", images=[noise(30, 30)], max_new_tokens=3, ignore_eos=True)
    chat.send("And this?", images=[noise(40, 30)], max_new_tokens=3, ignore_eos=True)
    messages = [
        turn("user", PICTURE, "What is this?"),
        turn("assistant", "@"),
        turn("user", PICTURE, "And this?"),
    ]
    whole = engine.render(messages, [noise(30, 30), noise(40, 30)]).token_ids
    at = whole.index(engine.tokenizer.encode("@")[0])
    assert chat.token_ids[: first.prompt_tokens] == whole[:at]
    assert chat.token_ids[first.prompt_tokens + 3 : -3] == whole[at + 1 :]


@pytest.mark.parametrize(
    "pieces",
    [[" ", "\n a", " b", "  ", "c \n", " "], ["abc"], ["  "], [], ["a ", "b"], ["\n", "x"]],
)
def test_white_space_around_an_answer_is_dropped(pieces: list[str]) -> None:
    space = OuterSpace()
    assert "".join(map(space.drop, pieces)) == "".join(pieces).strip()


def say(text: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model's choices those of ``text`` and the token that ends an answer."""
    ids = [*engine.tokenizer.encode_with_specials(text), engine.tokenizer.token_id("<|im_end|>")]

    def choose(answer: Answer, logits: Tensor) -> int:
        return ids[len(answer.token_ids)]

    monkeypatch.setattr(Answer, "choose", choose)


def test_answer_is_stripped_and_its_regions_are_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "<ref>cat</ref><box>(0,5),(998,7 )</box>"
    say(f" \n{words} \n", engine, monkeypatch)
    images = [noise(30, 30), noise(500, 200)]
    result = engine.generate("what", images, max_new_tokens=60)
    assert (result.text, result.finish_reason) == (words, "stop")
    assert engine.tokenizer.decode(result.token_ids) == f" \n{words} \n"
    assert result.boxes == [Box("cat", ((0, 1), (499, 1)))]
    assert json.loads(json.dumps(result.as_dict()))["boxes"][0]["label"] == "cat"
    pieces = list(engine.stream("what", images, max_new_tokens=60))
    assert "".join(pieces[:-1]) == result.text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("visual", None, "visual is missing"),
        ("quantization_config", {"bits": 4}, "quantised"),
        ("no_bias", False, "no_bias"),
        ("rotary_pct", 0.5, "rotary_pct"),
        ("kv_channels", None, "kv_channels is missing"),
        ("hidden_size", 256, "output_dim"),
    ],
)
def test_unsupported_relatives_are_refused_by_name(
    key: str, value: Any, words: str, folder: Path, tmp_path: Path
) -> None:
    config = config_of(QwenShape()) | {key: value}
    if value is None:
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        recognise(tmp_path)


def test_draw_boxes_is_refused_before_loading() -> None:
    from engine.app.flags import parse_flags
    from engine.app.inputs import check_targets

    for arguments in (
        ["--draw-boxes", "out.png"],
        ["--image", "a.png", "--draw-boxes", "out.txt"],
        ["--image", "a.png", "--draw-boxes", "nowhere/out.png"],
    ):
        with pytest.raises(OptionError, match="--draw-boxes"):
            check_targets(parse_flags(arguments)[0])


def test_draw_boxes_paints_the_last_picture(
    folder: Path,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from engine.app.cli import main

    words = "<ref>cat</ref><box>(0,5),(998,700)</box>"
    say(words, engine, monkeypatch)
    picture, out = tmp_path / "a.png", tmp_path / "out.png"
    noise(300, 200).save(picture)
    arguments = ["--model", folder, "--image", picture, "--prompt", "what", "--draw-boxes", out]
    assert main(list(map(str, arguments))) == 0
    assert main(list(map(str, arguments))) == 0  # over its own picture
    assert capsys.readouterr().out == f"{words}\n" * 2
    with Image.open(out) as painted:
        assert painted.size == (300, 200)
        assert painted.convert("RGB").tobytes() != noise(300, 200).tobytes()


def test_draw_boxes_says_when_there_is_nothing_to_draw(
    folder: Path,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from engine.app.cli import main

    say("no region", engine, monkeypatch)
    picture, out = tmp_path / "a.png", tmp_path / "out.png"
    noise(30, 20).save(picture)
    arguments = ["--model", folder, "--image", picture, "--prompt", "what", "--draw-boxes", out]
    assert main([*map(str, arguments), "--quiet"]) == 1
    said = capsys.readouterr()
    assert said.out == "no region\n"
    assert said.err.startswith(f"error: --draw-boxes: the answer names no regions, {out} is not")
    assert not out.exists()


def test_rows_of_a_fused_tensor_are_shared_out_in_order() -> None:
    info = TensorInfo("c_attn", torch.bfloat16, (6, 4), Path("x"), 100, 148)
    parts = info.split(3)
    assert [(p.shape, p.start, p.stop) for p in parts] == [
        ((2, 4), 100, 116),
        ((2, 4), 116, 132),
        ((2, 4), 132, 148),
    ]
    assert info.split(1) == [info]
    with pytest.raises(
        CheckpointError, match=r"'c_attn' is \[6, 4\]: its rows do not split into 4"
    ):
        info.split(4)


def test_pickled_weights_are_converted_once(tmp_path: Path) -> None:
    from engine.app.cli import main

    shape = QwenShape(image=140)
    source, target = write_qwen(tmp_path / "source", shape), tmp_path / "target"
    before = Engine.load(source, device="cpu", cache="full").logits("what", continuation=[1, 2])
    (source / "model.safetensors").unlink()
    torch.save(draw(shape), source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        Engine.load(source, device="cpu")
    assert main(["--model", str(source), "--convert", str(target), "--quiet"]) == 0
    after = Engine.load(target, device="cpu", cache="full").logits("what", continuation=[1, 2])
    assert torch.equal(before, after)
