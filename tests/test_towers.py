"""Vision towers that lie elsewhere: named by config.json, by the caller, or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.errors import CheckpointError, OptionError
from engine.loading.families import CLIP_L_336, Wishes, recognise
from engine.models.llava import Llava
from tests.asking import Ask, refused
from tests.checkpoints import Shape, edit_json, write_json, write_original_with_tower
from tests.noise import noise

TRAINERS = "/data/ckpt/clip-vit-large-patch14-336"


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose config.json has the path of its trainer's machine, and its tower."""
    tower = tmp_path / "clip"
    folder = write_original_with_tower(tmp_path / "model", Shape(), tower)
    edit_json(folder / "config.json", mm_vision_tower=TRAINERS)
    return folder, tower


def test_a_tower_that_is_not_there_is_named(moved: tuple[Path, Path], ask: Ask) -> None:
    refused(ask("--model", moved[0], "-p", "x"), 4, "mm_vision_tower", TRAINERS, "--vision-tower")
    asked = ask("--check", "--model", moved[0], "-q")
    assert asked.code == 4
    assert "mm_vision_tower" in asked.out


def test_a_tower_may_be_named_when_loading(
    moved: tuple[Path, Path], ask: Ask, engine_of: Callable[..., Engine]
) -> None:
    folder, tower = moved
    engine = Engine.load(folder, device="cpu", cache="full", vision_tower=tower)
    got = engine.logits("Hello", [noise(56, 56)])
    assert torch.equal(got, engine_of(Shape(), "original").logits("Hello", [noise(56, 56)]))
    asked = ask("--model", folder, "--vision-tower", tower, "-p", "Hello", "-n", "1", "-q")
    assert (asked.code, asked.err) == (0, "")
    assert ask("--check", "--model", folder, "--vision-tower", tower, "-q").code == 0


def test_another_tower_than_a_models_own_is_refused(
    moved: tuple[Path, Path], ask: Ask, checkpoint: Callable[..., Path]
) -> None:
    refused(
        ask("--model", checkpoint(Shape()), "--vision-tower", moved[1], "-p", "x"),
        *(2, "tower of its own", "leave out --vision-tower"),
    )
    folder = moved[0].with_name("inside")
    folder.mkdir()
    for path in checkpoint(Shape(), "original").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit_json(folder / "config.json", "_test_only_vision_config")
    with pytest.raises(OptionError, match="tower of its own"):
        recognise(folder, Wishes(vision_tower=str(moved[1])))


def test_the_published_towers_shape_is_known_wherever_a_trainer_had_it(
    tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    """Only where the weights lie inside: then nothing else of that tower is needed."""
    for path in checkpoint(Shape(), "original").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_json(tmp_path / "config.json", "_test_only_vision_config", mm_vision_tower=TRAINERS)
    (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)
    family = recognise(tmp_path)
    assert isinstance(family.model, Llava)
    assert family.model.config.vision.hidden == CLIP_L_336["hidden_size"]
    assert family.tower is None


def test_nothing_is_downloaded_offline(tmp_path: Path) -> None:
    folder = write_original_with_tower(tmp_path, Shape())
    edit_json(folder / "config.json", mm_vision_tower="nobody/has-this-tower")
    with pytest.raises(CheckpointError, match=r"nobody/has-this-tower.* not in the hub cache"):
        recognise(folder, Wishes(offline=True))


def test_a_tower_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_original_with_tower(tmp_path, Shape())
    edit_json(folder / "tower" / "config.json", vision_config={"model_type": "dinov2"})
    with pytest.raises(CheckpointError, match="dinov2") as caught:
        recognise(folder, Wishes(offline=True))
    assert "not supported yet" in caught.value.hint


@pytest.mark.parametrize(
    ("aspect", "padded"), [("pad", True), ("square", False), (None, False), ("absent", False)]
)
def test_the_original_layout_says_how_a_picture_becomes_square(
    aspect: str | None, padded: bool, tmp_path: Path
) -> None:
    folder = write_original_with_tower(tmp_path, Shape())
    edit_json(folder / "config.json", "image_aspect_ratio")
    if aspect != "absent":
        edit_json(folder / "config.json", image_aspect_ratio=aspect)
    for style in (None, "llava-v1", "llava-hf"):
        assert recognise(folder, Wishes(style)).processor.mode == ("pad" if padded else "crop")


def test_an_unknown_way_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_original_with_tower(tmp_path, Shape())
    edit_json(folder / "config.json", image_aspect_ratio="highres")
    with pytest.raises(CheckpointError, match="image_aspect_ratio is 'highres'") as caught:
        recognise(folder)
    assert "not supported yet" in caught.value.hint


def test_picture_rules_of_transformers_5_come_before_those_of_4(tmp_path: Path) -> None:
    """As transformers reads them; case by case against its pixels in test_preprocess."""
    folder = write_original_with_tower(tmp_path, Shape())
    own = {"size": {"shortest_edge": 56}, "crop_size": 56, "image_mean": [0.5] * 3}
    write_json(folder / "preprocessor_config.json", own)
    assert recognise(folder).processor.mean == (0.5, 0.5, 0.5)
    nested = own | {"image_mean": [0.25] * 3}
    write_json(folder / "processor_config.json", {"image_processor": nested})
    assert recognise(folder).processor.mean == (0.25, 0.25, 0.25)
    write_json(folder / "processor_config.json", {"image_processor": nested | {"resample": 9}})
    with pytest.raises(CheckpointError, match=r"processor_config\.json: image_processor: resample"):
        recognise(folder)
