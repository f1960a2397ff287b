"""Preprocessing, bit for bit against transformers' Pillow path and the original padding."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from engine.errors import CheckpointError, ImageError
from engine.pictures.image import open_image
from engine.pictures.preprocess import ImageProcessor, pad_to_square, shortest_edge_size

LLAVA = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
TINY = LLAVA | {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
SIZES = [(1, 1), (1, 7), (9, 1), (55, 56), (56, 56), (57, 56), (336, 336), (337, 335), (640, 427)]
SIZES += [(427, 640), (1000, 333), (31, 400), (113, 101)]


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def reference(processor: Any, image: Image.Image) -> torch.Tensor:
    values: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return values


@pytest.mark.parametrize("config", [LLAVA, TINY], ids=["336", "56"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_equals_transformers(config: dict[str, Any], size: tuple[int, int]) -> None:
    image = noise(size)
    ours = ImageProcessor.from_config(config)(image)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, reference(CLIPImageProcessorPil(**config), image))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pad_equals_transformers_and_the_original_code(size: tuple[int, int]) -> None:
    image = noise(size)
    ours = ImageProcessor.from_config(LLAVA, mode="pad")(image)
    assert torch.equal(ours, reference(LlavaImageProcessorPil(**LLAVA, do_pad=True), image))
    square = original_expand(image, (122, 116, 104))
    assert torch.equal(ours, reference(CLIPImageProcessorPil(**LLAVA), square))


def original_expand(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Pad to a square as the original repository does: half of what is missing on each side."""
    side = max(image.size)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = colour
    left, top = (side - image.width) // 2, (side - image.height) // 2
    canvas[top : top + image.height, left : left + image.width] = np.asarray(image)
    return Image.fromarray(canvas)


def test_many_odd_sizes_equal_transformers() -> None:
    rng = random.Random(11)
    pairs = [(ImageProcessor.from_config(TINY), CLIPImageProcessorPil(**TINY))]
    pairs.append(
        (ImageProcessor.from_config(TINY, "pad"), LlavaImageProcessorPil(**TINY, do_pad=True))
    )
    for seed in range(150):
        image = noise((rng.randint(1, 300), rng.randint(1, 300)), seed)
        if max(image.size) > 40 * min(image.size):
            continue
        for ours, theirs in pairs:
            assert torch.equal(ours(image), reference(theirs, image)), image.size


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 60, "crop_size": 50},
        {"size": {"height": 40, "width": 70}, "crop_size": {"height": 30, "width": 50}},
        {"size": {"height": 40, "width": 70}, "do_center_crop": False},
        {"size": {"shortest_edge": 30}},  # smaller than the crop: black around
        {"size": {"shortest_edge": 31}, "crop_size": {"height": 40, "width": 57}},
        {"do_resize": False},
        {"do_normalize": False},
        {"do_rescale": False},
        {"resample": 2},
        {
            "resample": 0,
            "rescale_factor": 1 / 127.5,
            "image_mean": [1, 1, 1],
            "image_std": [1, 2, 3],
        },
    ],
    ids=str,
)
def test_other_settings_equal_transformers(changes: dict[str, Any]) -> None:
    config = TINY | changes
    for size in [(75, 61), (61, 75), (33, 41)]:
        ours = ImageProcessor.from_config(config)
        values = ours(noise(size))
        assert torch.equal(values, reference(CLIPImageProcessorPil(**config), noise(size)))
        assert values.shape == (3, *ours.output_size)


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "LA", "P", "CMYK"])
def test_colour_modes_equal_transformers(mode: str) -> None:
    image = noise((70, 50)).convert("RGBA" if mode in ("RGBA", "LA") else "RGB")
    if mode in ("RGBA", "LA"):
        image.putalpha(noise((70, 50), seed=1).convert("L"))
    image = image.convert(mode)
    ours = ImageProcessor.from_config(TINY)(open_image(image).pixels)
    assert torch.equal(ours, reference(CLIPImageProcessorPil(**TINY), image))


def test_defaults_are_clips() -> None:
    image = noise((300, 260))
    assert ImageProcessor.from_config({}) == ImageProcessor()
    assert torch.equal(ImageProcessor()(image), reference(CLIPImageProcessorPil(), image))


def test_the_file_may_ask_for_padding() -> None:
    assert ImageProcessor.from_config(LLAVA | {"do_pad": True}).mode == "pad"
    assert ImageProcessor.from_config(LLAVA | {"do_pad": True}, mode="crop").mode == "crop"


def test_worked_values() -> None:
    # One channel by hand: 255 -> (1 - mean) / std in float32.
    white = ImageProcessor.from_config(TINY)(Image.new("RGB", (9, 9), "white"))
    expected = (np.float32(1) - np.float32(0.48145466)) / np.float32(0.26862954)
    assert white[0].unique().tolist() == [float(expected)]
    padded = pad_to_square(Image.new("RGB", (4, 2)), (122, 116, 104))
    assert [padded.getpixel((0, row)) for row in range(4)] == [
        (122, 116, 104),
        (0, 0, 0),
        (0, 0, 0),
        (122, 116, 104),
    ]
    assert shortest_edge_size((640, 427), 336) == (503, 336)
    assert shortest_edge_size((427, 640), 336) == (336, 503)


# --- very long pictures --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (9000, 2), (3, 8001)], ids=str)
def test_extreme_shapes_are_small_work(size: tuple[int, int]) -> None:
    values = ImageProcessor.from_config(LLAVA)(noise(size))
    assert values.shape == (3, 336, 336)
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("size", [(4000, 3), (3, 4001), (2500, 2), (901, 1)], ids=str)
def test_cutting_long_sides_changes_next_to_nothing(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    grey = Image.fromarray(ramp.reshape((size[1], -1) if size[1] == 1 else (1, -1)))
    image = (grey if size[0] > size[1] else grey.transpose(Image.Transpose.TRANSPOSE)).resize(size)
    image = image.convert("RGB")
    processor = ImageProcessor.from_config(TINY)
    whole = processor(image)
    monkeypatch.setattr("engine.pictures.preprocess.MAX_PIXELS", 1)
    level = 1 / 255 / 0.26
    assert (processor(image) - whole).abs().max() <= 1.01 * level


def test_padding_a_very_long_picture_is_refused() -> None:
    with pytest.raises(ImageError, match="20000 x 1 padded to a square has 400,000,000 pixels"):
        ImageProcessor.from_config(LLAVA, mode="pad")(noise((20_000, 1)))


# --- wrong configurations ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", "big"),
        ("size", 0),
        ("size", -3),
        ("size", True),
        ("size", {"shortest_edge": 3.5}),
        ("size", {"height": 3}),
        ("size", {"longest_edge": 300, "shortest_edge": 3}),
        ("size", {"height": 10**9, "width": 3}),
        ("crop_size", "336"),
        ("crop_size", {"height": 336}),
        ("crop_size", [336, 336]),
        ("resample", "bicubic"),
        ("resample", 9),
        ("resample", True),
        ("rescale_factor", 0),
        ("rescale_factor", float("nan")),
        ("rescale_factor", "1/255"),
        ("image_mean", 0.5),
        ("image_mean", [0.5]),
        ("image_mean", [0.5, 0.5, "x"]),
        ("image_std", [1, 1, 0]),
        ("image_std", [1, 1, float("nan")]),
        ("do_resize", "yes"),
        ("do_pad", 1),
        ("do_center_crop", False),  # leaves pictures of many sizes
    ],
)
def test_wrong_values_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: {key} (is|must be) "):
        ImageProcessor.from_config(LLAVA | {key: value})


def test_unknown_mode_and_unknown_keys() -> None:
    with pytest.raises(CheckpointError, match="unknown picture mode 'zoom'"):
        ImageProcessor.from_config(LLAVA, mode="zoom")  # type: ignore[arg-type]
    assert ImageProcessor.from_config(LLAVA | {"colour_of_box": 3}).mode == "crop"


def test_published_configuration() -> None:
    data = os.environ.get("AVL_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data")
    path = Path(data) / "llava-1.5-7b-hf" / "preprocessor_config.json"
    if not path.is_file():
        pytest.skip("the published LLaVA-1.5 metadata is not here (AVL_REFERENCE_DATA)")
    processor = ImageProcessor.from_config(json.loads(path.read_text()))
    assert processor == ImageProcessor.from_config(LLAVA)
    assert processor.output_size == (336, 336)
