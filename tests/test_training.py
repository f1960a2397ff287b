"""The training pipeline end to end on a few pictures, and the export against transformers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the `train` extra is not installed")

from training.data import (
    TRAINING_SEEDS,
    PageMix,
    build_batch,
    encode_question,
    needed_patches,
    pack,
    page_pixels,
)
from training.documents import HELD_OUT_STYLE, LAYOUTS, make_document
from training.evaluate import FIRST_SEED, distance, objects_right, similarity
from training.export import export
from training.fonts import HELD_OUT_FACES, TRAINING_FACES
from training.generate import greedy
from training.losses import Trainee, Weights, total
from training.model import ModelConfig
from training.muon import Muon, orthogonalise, split_parameters
from training.page import Question
from training.scene_questions import ZONES
from training.scenes import make_scene
from training.tokenizer import load, vocabulary_rows

SMALL = {"vision_dim": 64, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 128}
SMALL |= {"dim": 64, "layers": 2, "heads": 2, "mlp": 96}


def small_trainee() -> Trainee:
    torch.manual_seed(0)
    return Trainee(ModelConfig(vocab=vocabulary_rows(load()), **SMALL))


def test_same_seed_gives_the_same_page() -> None:
    for make in (make_scene, make_document):
        first, second = make(5), make(5)
        assert first.image.tobytes() == second.image.tobytes()
        assert first.questions == second.questions
        assert first.image.tobytes() != make(6).image.tobytes()


def test_scene_answers_agree_with_the_pixels() -> None:
    """The colour named in an answer is the colour painted at the middle of a square."""
    from training.scenes import COLOURS

    checked = 0
    for seed in range(60):
        page = make_scene(seed)
        for thing in page.things:
            if thing.kind not in ("square", "circle", "diamond"):
                continue
            x, y = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
            seen = page.image.getpixel((int(x), int(y)))
            nearest = min(
                COLOURS,
                key=lambda c: sum((a - b) ** 2 for a, b in zip(COLOURS[c], seen, strict=True)),
            )
            assert nearest == thing.colour
            assert ZONES[thing.zone] in page.questions[0].answer
            checked += 1
    assert checked > 20


def test_held_out_style_is_never_trained_on() -> None:
    assert not set(HELD_OUT_FACES) & set(TRAINING_FACES)
    assert not set(HELD_OUT_STYLE.layouts) & set(LAYOUTS)


def test_glyph_places_are_dark_on_light_paper() -> None:
    """Around the centre of each printed character the page is not blank."""
    from training.documents import DocumentStyle

    page = make_document(3, DocumentStyle(noise=0.0))
    for glyph in page.glyphs:
        x, y = int(glyph.x), int(glyph.y)
        values = page.image.convert("L").crop((x - 5, y - 9, x + 5, y + 9)).getextrema()
        assert values[1] - values[0] > 60, glyph


def test_answers_are_tokenised_as_the_published_prompt_is() -> None:
    """Ids of prompt plus answer equal those of the prompt alone followed by the answer."""
    tokenizer = load()
    for seed in range(10):
        for q in make_scene(seed).questions + make_document(seed).questions:
            ids, start, _ = encode_question(q, tokenizer)
            prompt = tokenizer.encode(f"\n{q.text} ASSISTANT:", add_special_tokens=False).ids
            assert ids[:start] == prompt
            assert ids[-1] == 2
            assert tokenizer.decode(ids[start:-1]).strip() == q.answer


def test_printed_values_are_one_token_per_character() -> None:
    tokenizer = load()
    ids, start, _ = encode_question(Question("field", "What is the code?", "TO-4S7"), tokenizer)
    pieces = [tokenizer.id_to_token(i) for i in ids[start:]]
    assert pieces == ["▁", "T", "O", "-", "4", "S", "7", "</s>"]


def test_orthogonalise_gives_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 48, 20)).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_packed_questions_do_not_see_each_other() -> None:
    """Changing the second question of a row leaves the first one's scores unchanged."""
    trainee = small_trainee()
    mix = PageMix(patches=48, text=96, scenes=1.0)
    batch = build_batch([7, 8], mix, load())
    for block in trainee.model.decoder.blocks:
        torch.nn.init.normal_(block.out.weight, std=0.1)
    projected = trainee.model.project(trainee.model.vision(batch["pixels"], batch["index"]))
    before, _ = trainee.states(projected, batch)
    changed = dict(batch, ids=torch.where(batch["segment"] > 0, 5, batch["ids"]))
    after, _ = trainee.states(projected, changed)
    first = batch["segment"] == batch["segment"][:, :1]
    torch.testing.assert_close(after[first], before[first])
    assert not torch.allclose(after[~first], before[~first])


def test_loss_falls_on_a_few_pictures() -> None:
    trainee = small_trainee()
    batch = build_batch([1, 2, 3, 4], PageMix(patches=64, text=64), load())
    matrices, others = split_parameters(trainee)
    optimisers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3)]
    curve = []
    for _ in range(12):
        losses = trainee(batch)
        loss = total(losses, Weights(guide=0.2))
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        curve.append((losses["text"].item(), losses["patch"].item()))
    assert curve[-1][0] < 0.7 * curve[0][0]
    assert curve[-1][1] < 0.7 * curve[0][1]


def test_run_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import recipe, train

    stage = recipe.TWO_CORES[1]
    mix = replace(stage.mix, patches=48, text=64)
    tiny = replace(stage, batch=2, minutes=0.01, mix=mix)
    monkeypatch.setitem(train.PLANS, "two-cores", (tiny, replace(tiny, name="last")))
    monkeypatch.setattr(train, "ModelConfig", lambda vocab: ModelConfig(vocab=vocab, **SMALL))
    folder = ["--out", str(tmp_path / "run"), "--export", str(tmp_path / "model")]
    argv = [*folder, "--no-compile", "--workers", "0", "--score-pages", "16", "--threads", "1"]
    run = train.Run(tmp_path / "run", train.PLANS["two-cores"], train.parse(argv))
    run.train_stage(tiny)
    run.save()
    again = train.Run(tmp_path / "run", train.PLANS["two-cores"], train.parse(argv))
    assert again.progress == run.progress
    assert again.progress["pages"] > 0
    train.main(argv)
    done = train.Run(tmp_path / "run", train.PLANS["two-cores"], train.parse(argv))
    assert done.progress["stage"] == "done"
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_export_equals_transformers(tmp_path: Path) -> None:
    """fp32 logits and greedy text of the exported files equal those of the training form."""
    transformers = pytest.importorskip("transformers")
    trainee, tokenizer = small_trainee(), load()
    generator = torch.Generator().manual_seed(0)
    for p in trainee.model.parameters():  # zero-initialised matrices would hide mistakes
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    export(trainee.model, tmp_path, torch.float32)
    page = make_scene(11)
    index = list(range(576))
    row = pack(page.questions[1:2], {i: i for i in index}, 24, tokenizer)
    keep = row.segment == 0
    features = trainee.model.vision(
        torch.from_numpy(page_pixels(page, index))[None], torch.arange(576)[None]
    )
    text = {k: torch.from_numpy(v[keep])[None] for k, v in vars(row).items()}
    projected = trainee.model.project(features)
    states, _ = trainee.states(projected, {"index": torch.arange(576)[None], **text})
    ours = trainee.model.head(states)[0]

    reference = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    picture = torch.full((576,), reference.config.image_token_index)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    pixels = processor(page.image, return_tensors="pt")["pixel_values"]
    ids = torch.cat([trainee.prefix, picture, text["ids"][0]])[None]
    with torch.no_grad():
        theirs = reference(input_ids=ids, pixel_values=pixels).logits[0, -len(ours) :]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)

    questions = ["What colour is the car?", "How many are there?"]
    answers = greedy(trainee.model, [page, page], questions, tokenizer, 6)
    for question, answer in zip(questions, answers, strict=True):
        asked = tokenizer.encode(f"\n{question} ASSISTANT:", add_special_tokens=False).ids
        ids = torch.cat([trainee.prefix, picture, torch.tensor(asked)])[None]
        out = reference.generate(
            input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False
        )
        told = tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
        assert told.strip() == answer


def test_exported_files_name_the_published_layout(tmp_path: Path) -> None:
    from safetensors import safe_open

    export(small_trainee().model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert all(file.get_tensor(n).dtype == torch.bfloat16 for n in names)
    assert "language_model.model.layers.1.self_attn.q_proj.weight" in names
    assert "vision_tower.vision_model.pre_layrnorm.weight" in names
    assert len(names) == 3 + 4 + 4 + 2 * 16 + 3 + 2 * 9


def test_figures_of_the_evaluation() -> None:
    assert distance("kitten", "sitting") == 3
    assert similarity("12.50", "12.60") == pytest.approx(0.8)
    truth = "There are two objects. A red car is at the top. An orange ring is at the left."
    wrong = "There are two objects. A red car is at the top. An orange star is at the left."
    assert objects_right(truth, truth) == 1.0
    assert objects_right(wrong, truth) == 0.5


def test_evaluation_seeds_are_never_trained_on() -> None:
    assert all(first + 200_000 <= TRAINING_SEEDS for first in FIRST_SEED.values())


def test_patch_subset_keeps_what_is_needed() -> None:
    from training.data import choose_patches

    page = make_document(9)
    needed = needed_patches(page)
    chosen = choose_patches(page, len(needed) + 20, random.Random(0))
    assert needed <= set(chosen)
    assert chosen == sorted(set(chosen))
