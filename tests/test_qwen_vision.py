"""Qwen-VL's vision tower against the slow reference and against what the original code gave."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.qwen_checkpoint import QwenShape, config_of, draw, write_qwen
from engine.checkpoint.config import ConfigReader
from engine.engine import Engine
from engine.errors import CheckpointError
from engine.loading.families import recognise
from engine.models.qwen_vision import QwenVisionConfig, interpolate
from tests.noise import noise
from tests.qwen_reference import QwenReference, stretched

SHAPES = {
    "448": QwenShape(),
    "224, stored grid": QwenShape(image=224, vision_heads=4, seed=6),
    "140, two heads out": QwenShape(image=140, hidden=256, heads=4, seed=7),
}


def golden_folder() -> Path:
    named = os.environ.get("AVL_REFERENCE_DATA")
    root = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    folder = root / "qwen-vl-golden"
    if not folder.is_dir():
        pytest.skip(f"no Qwen-VL golden data: {folder} is absent (AVL_REFERENCE_DATA names it)")
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_features_equal_the_slow_reference(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    engine = Engine.load(write_qwen(tmp_path / "qwen", shape), device="cpu", cache="full")
    reference = QwenReference(config_of(shape), draw(shape))
    pictures = [noise(90, 61), noise(33, 500)]
    prepared = [recognise(tmp_path / "qwen").processor.prepare(p) for p in pictures]
    with torch.inference_mode():
        features = engine.model.encode(prepared)
    assert [engine.model.image_tokens(p) for p in prepared] == [256, 256]
    for pixels, found in zip(prepared, features, strict=True):
        expected = reference.features(pixels.tiles[0]).float()
        assert expected.std() > 0.3
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (features[0] - features[1]).abs().max() > 0.1


def test_positions_are_interpolated_bicubically() -> None:
    table = torch.randn(256, 5, generator=torch.Generator().manual_seed(0))
    for side in (4, 15, 16, 17, 32):
        expected = stretched(table.double(), side).float()
        torch.testing.assert_close(interpolate(table, side), expected, rtol=0, atol=1e-5)


def test_pictures_are_stretched_to_a_square(tmp_path: Path) -> None:
    processor = recognise(write_qwen(tmp_path / "qwen", QwenShape())).processor
    image = noise(301, 77)
    plain = torch.tensor(list(image.resize((448, 448), Image.Resampling.BICUBIC).tobytes()))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = ((plain.view(448, 448, 3) / 255 - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(processor(image), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [("heads", 3), ("output_dim", 100), ("n_queries", 200), ("image_size", 13), ("width", None)],
)
def test_wrong_values_are_named(key: str, value: int | None) -> None:
    values = {**config_of(QwenShape())["visual"], key: value}
    named = "width" if key == "heads" else key
    with pytest.raises(CheckpointError, match=named):
        QwenVisionConfig.parse(ConfigReader(values, "config.json: visual"))


def test_pixels_and_features_equal_the_original_code() -> None:
    folder = golden_folder()
    expected = load_file(folder / "golden.safetensors")
    digests = json.loads((folder / "golden.json").read_text())["pixels_sha256_f32"]
    family = recognise(folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = {}
    for shard in folder.glob("model-*.safetensors"):
        tensors |= load_file(shard)
    reference = QwenReference(config, tensors)
    tiles = {}
    for name, digest in digests.items():
        with Image.open(folder / name) as image:
            tiles[name] = family.processor(image.convert("RGB"))
        pixels = tiles[name].contiguous().numpy().tobytes()
        assert hashlib.sha256(pixels).hexdigest() == digest
    found = reference.features(tiles["img0.png"]).float()
    torch.testing.assert_close(found, expected["visual_features_img0"], rtol=0, atol=2e-4)
    found = reference.features(tiles["img1.png"]).float()
    rows = expected["visual_features_img1_rows0_8"]
    torch.testing.assert_close(found[:8], rows, rtol=0, atol=2e-4)
