"""Pictures of any resolution: canvas, tiles and token counts against transformers."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from engine.errors import CheckpointError
from engine.models.clip import ClipConfig
from engine.models.decoder import DecoderConfig
from engine.models.llava import LlavaConfig
from engine.models.llava_next import LlavaNext
from engine.pictures.anyres import PINPOINTS, TileProcessor, best_canvas, grid_of, read_pinpoints
from engine.pictures.preprocess import Pixels
from tests.noise import noise

# Counted by the original code (width, height).
KNOWN = {
    (336, 336): 1176,
    (640, 480): 2340,
    (480, 640): 2352,
    (1024, 899): 2634,
    (672, 672): 2928,
    (1920, 1080): 1948,
    (1000, 300): 2182,
    (300, 1000): 2232,
}
# Where the original code and transformers differ, by floating-point error before rounding down.
ROUNDED = [(55, 88), (220, 1056), (352, 748), (861, 328)]
EXTREME = [(1, 1), (1, 5000), (5000, 1), (20000, 3), (2, 1), (335, 337), (672, 336), (1008, 336)]


def sizes(count: int, seed: int = 5) -> list[tuple[int, int]]:
    """Sizes of all kinds: thumbnails, photographs, strips."""
    draw = random.Random(seed)
    kinds = [(1, 60), (30, 1200), (200, 5000)]
    return [
        tuple(draw.randint(*draw.choice(kinds)) for _ in range(2))  # type: ignore[misc]
        for _ in range(count)
    ]


def tokens(size: tuple[int, int]) -> int:
    return grid_of(size, PINPOINTS, 336, 24).tokens


def reference_tokens(size: tuple[int, int]) -> int:
    processor = object.__new__(LlavaNextProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(p) for p in PINPOINTS])
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    return int(processor._get_number_of_features(size[1], size[0], 336, 336))


@pytest.fixture(scope="module")
def model() -> LlavaNext:
    """A LLaVA-1.6 of one number per patch; only its packing is used."""
    decoder = DecoderConfig(9, 1, 1, 1, 1, 1, 1, 1e4, 1e-5, False, False, 4096)
    vision = ClipConfig(1, 1, 1, 1, 1, 14, 336, 1e-5, "gelu")
    with torch.device("meta"):
        made = LlavaNext(LlavaConfig(decoder, vision, 8, None, (2,)), PINPOINTS)
    made.image_newline = torch.nn.Parameter(torch.full((1,), -1.0))
    return made


@pytest.mark.parametrize("size", KNOWN)
def test_counts_of_the_original_code(size: tuple[int, int]) -> None:
    assert tokens(size) == KNOWN[size]


def test_counts_and_canvases_equal_transformers_on_10_000_sizes() -> None:
    for size in [*sizes(10_000), *EXTREME, *ROUNDED]:
        assert tokens(size) == reference_tokens(size), size
        expected = select_best_resolution((size[1], size[0]), [list(p) for p in PINPOINTS])
        assert best_canvas(size, PINPOINTS) == tuple(expected), size


@pytest.mark.parametrize("size", ROUNDED)
def test_rounding_follows_transformers_where_the_original_differs(size: tuple[int, int]) -> None:
    rows, columns = (n // 14 for n in best_canvas(size, PINPOINTS))
    width, height = size
    if width / height > columns / rows:
        cut = (rows - int(height * (columns / width))) // 2
        original = 576 + (rows - 2 * cut) * (columns + 1)
    else:
        cut = (columns - int(width * (rows / height))) // 2
        original = 576 + rows * (columns - 2 * cut + 1)
    assert tokens(size) == reference_tokens(size) != original


def test_counted_tokens_are_the_rows_of_the_features_on_10_000_sizes(model: LlavaNext) -> None:
    features = torch.zeros(5, 576, 1)
    for size in [*sizes(10_000, seed=6), *EXTREME, *ROUNDED]:
        rows, columns = grid_of(size, PINPOINTS, 336, 24).tiles
        pixels = Pixels(torch.empty(1 + rows * columns, 0), size)
        joined = model._join(features[: len(pixels.tiles)], model.grid(pixels))
        assert len(joined) == model.image_tokens(pixels), size


def test_packed_features_equal_transformers(model: LlavaNext) -> None:
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=336, patch_size=14),
        image_grid_pinpoints=[list(p) for p in PINPOINTS],
    )
    for size in [*sizes(300, seed=7), *EXTREME, *ROUNDED, *KNOWN]:
        grid = grid_of(size, PINPOINTS, 336, 24)
        count = 1 + grid.tiles[0] * grid.tiles[1]
        features = torch.arange(count * 576.0).view(count, 576, 1)
        packed, _ = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=config),
            [features],
            [(size[1], size[0])],
            "default",
            image_newline=torch.tensor([-1.0]),
        )
        assert torch.equal(model._join(features, grid), packed[0]), size


@pytest.mark.parametrize("size", [*KNOWN, *EXTREME, (57, 333), (901, 100)])
def test_tiles_equal_transformers(size: tuple[int, int]) -> None:
    side = 28
    canvases = [[rows * side, columns * side] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1))]
    reference = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size=side, image_grid_pinpoints=canvases
    )
    pinpoints = tuple((height, width) for height, width in canvases)
    ours = TileProcessor(shortest_edge=side, crop_size=(side, side), pinpoints=pinpoints)
    image = noise(*size) if size[0] * size[1] < 10**5 else noise(*(n // 4 + 1 for n in size))
    got = ours.prepare(image)
    expected = reference(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(got.tiles, expected)
    assert got.size == image.size


def test_the_whole_comes_first_and_tiles_row_by_row() -> None:
    side, colours = 14, [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    image = Image.new("RGB", (28, 28))
    for number, colour in enumerate(colours):
        image.paste(colour, (14 * (number % 2), 14 * (number // 2), 28, 28))
    plain = TileProcessor(
        shortest_edge=side,
        crop_size=(side, side),
        pinpoints=((28, 28),),
        rescale_factor=1.0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    tiles = plain.prepare(image).tiles
    assert [tuple(tile[:, 7, 7].int().tolist()) for tile in tiles[1:]] == colours
    assert [tuple(tiles[0, :, y, x].int().tolist()) for y in (1, 12) for x in (1, 12)] == colours


def test_borders_are_black_before_normalisation() -> None:
    processor = TileProcessor(shortest_edge=14, crop_size=(14, 14), pinpoints=((28, 28),))
    tiles = processor.prepare(Image.new("RGB", (28, 4), (255, 255, 255))).tiles
    black = -torch.tensor(processor.mean) / torch.tensor(processor.std)
    torch.testing.assert_close(tiles[1, :, 0, 0], black)
    assert (tiles[1, :, 13, 0] > 1).all()


def test_pinpoints_of_both_layouts() -> None:
    published = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert read_pinpoints({}, "f", 336, False) == PINPOINTS
    assert read_pinpoints({"image_grid_pinpoints": published}, "f", 336, False) == PINPOINTS
    turned = read_pinpoints({"image_grid_pinpoints": published}, "f", 336, True)
    assert turned == ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))


@pytest.mark.parametrize(
    "value", [[], "(1x1)", 5, [[336]], [[336, 0]], [[336, 100]], [[336, 33600]], [[True, 336]], [7]]
)
def test_wrong_pinpoints_are_named(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: image_grid_pinpoints"):
        read_pinpoints({"image_grid_pinpoints": value}, "config.json", 336, False)
