"""Regions in an answer: reading them, and painting them on the picture."""

import pytest
from PIL import Image

from engine.pictures.boxes import Box, draw_boxes, parse_boxes, parse_json_boxes

SIZE = (640, 480)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no region here", []),
        ("<box>(0,0),(999,999)</box>", [Box("", ((0, 0), (639, 479)))]),
        ("<box>(500,250),(750,500)</box>", [Box("", ((320, 120), (480, 240)))]),
        (
            "<ref> the dog</ref><box>(0,500),(250,999)</box>",
            [Box("the dog", ((0, 240), (160, 479)))],
        ),
        (
            "<ref>cats</ref><box>(0,0),(100,100)</box><box>(100,100),(200,200)</box> and "
            "<ref>一只狗</ref><box>(1,2),(3,4)</box>",
            [
                Box("cats", ((0, 0), (64, 48))),
                Box("cats", ((64, 48), (128, 96))),
                Box("一只狗", ((0, 0), (1, 1))),
            ],
        ),
        ("<box>(750,500),(500,250)</box>", [Box("", ((320, 120), (480, 240)))]),
        ("<box>(0,0),(1000,4000)</box>", [Box("", ((0, 0), (639, 479)))]),
        ("<box> ( 0 , 0 ) , ( 500 , 500 ) </box>", [Box("", ((0, 0), (320, 240)))]),
        (
            "<quad>(0,0),(500,0),(500,500),(0,500)</quad>",
            [Box("", ((0, 0), (320, 0), (320, 240), (0, 240)))],
        ),
        ("<box>(1,2),(3,4)", []),
        ("<box>(1,2)</box>", []),
        ("<box>(1,2),(3,4),(5,6)</box>", []),
        ("<box>(a,2),(3,4)</box>", []),
        ("<box>(-1,2),(3,4)</box>", []),
        ("<box>(99999,2),(3,4)</box>", []),
        ("<ref>unfinished <box>(0,0),(500,500)</box>", [Box("", ((0, 0), (320, 240)))]),
    ],
)
def test_regions_are_read(text: str, expected: list[Box]) -> None:
    assert parse_boxes(text, SIZE) == expected


def test_every_coordinate_lies_inside_the_picture() -> None:
    for value in range(1000):
        ((x, y), (_, _)) = parse_boxes(f"<box>({value},{value}),(999,999)</box>", (7, 1))[0].corners
        assert x == int(value / 1000 * 7)
        assert y == 0


def test_outline_lies_where_the_region_is() -> None:
    image = Image.new("RGB", (200, 100), "white")
    before = image.tobytes()
    painted = draw_boxes(image, parse_boxes("<box>(250,200),(750,800)</box>", image.size))
    assert image.tobytes() == before  # the picture given is left as it was
    changed = {
        (x, y) for x in range(200) for y in range(100) if painted.getpixel((x, y)) != (255,) * 3
    }
    assert {(50, 50), (150, 50), (100, 20), (100, 80)} <= changed
    assert not {(100, 50), (30, 50), (170, 50), (100, 5), (100, 95)} & changed


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (640, 480)])
def test_names_and_quads_are_painted_on_any_picture(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "white")
    text = "<ref>a red car 车</ref><box>(0,0),(999,999)</box><quad>(0,0),(9,0),(9,9),(0,999)</quad>"
    painted = draw_boxes(image, parse_boxes(text, size))
    assert painted.size == size
    assert painted.tobytes() != image.tobytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no region here", []),
        ('[{"bbox_2d": [0, 0, 1000, 1000]}]', [Box("", ((0, 0), (639, 479)))]),
        (
            '```json\n[\n\t{"bbox_2d": [100, 250, 300, 500], "label": "a \\"red\\" car"},\n'
            '\t{"label": "star", "bbox_2d": [500.5,0,250,100]}\n]\n```',
            [Box('a "red" car', ((64, 120), (192, 240))), Box("star", ((160, 0), (320, 48)))],
        ),
        ('{"bbox_2d": [1, 2, 3]}', []),
        ('{"bbox_2d": [1, 2, 3, "x"]}', []),
        ('{"bbox_2d": [1, 2, 3, 4]', []),
        ('{"bbox_2d": [0, 0, 99999, 5], "label": 7}', [Box("", ((0, 0), (639, 2)))]),
    ],
)
def test_regions_in_json(text: str, expected: list[Box]) -> None:
    assert parse_json_boxes(text, SIZE, (1000, 1000)) == expected


def test_regions_in_pixels_of_the_resized_picture() -> None:
    text = '{"bbox_2d": [322, 238, 644, 476], "label": "half"}'
    assert parse_json_boxes(text, SIZE, (644, 476)) == [Box("half", ((320, 240), (639, 479)))]
