from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from dots_ocr_client.pages import images

SIDES = st.integers(1, 30_000)


@given(SIDES, SIDES)
def test_smart_resize_gives_multiples_within_the_limits(width: int, height: int) -> None:
    assume(max(width, height) < images.MAX_ASPECT * min(width, height))
    size = images.smart_resize(width, height)
    assert all(side > 0 and side % images.FACTOR == 0 for side in size)
    assert images.MIN_PIXELS <= math.prod(size) <= images.MAX_PIXELS


@given(SIDES, SIDES)
def test_smart_resize_has_nothing_left_to_do_the_second_time(width: int, height: int) -> None:
    assume(max(width, height) < images.MAX_ASPECT * min(width, height))
    once = images.smart_resize(width, height)
    assume(max(once) < images.MAX_ASPECT * min(once))
    assert images.smart_resize(*once) == once


@given(SIDES, SIDES)
def test_smart_resize_turns_with_the_image(width: int, height: int) -> None:
    assume(max(width, height) < images.MAX_ASPECT * min(width, height))
    assert images.smart_resize(height, width) == images.smart_resize(width, height)[::-1]


@given(st.integers(2, 120), st.integers(2, 120))
def test_smart_resize_keeps_sizes_that_fit(columns: int, rows: int) -> None:
    assert images.smart_resize(28 * columns, 28 * rows) == (28 * columns, 28 * rows)


@pytest.mark.parametrize(
    ("size", "expected", "tokens"),
    [
        ((1654, 2339), (1652, 2352), 4_956),  # A4 at 200 dpi, a figure of the model's documentation
        ((3360, 3360), (3360, 3360), 14_400),  # the largest page
        ((6720, 6720), (3360, 3360), 14_400),
        ((10, 10), (56, 56), 4),
        ((42, 5600), (56, 5600), 400),  # halves round to the even neighbour, as Python's round does
    ],
)
def test_smart_resize_agrees_with_known_sizes(size: tuple[int, int], expected: tuple[int, int], tokens: int) -> None:
    assert images.smart_resize(*size) == expected
    assert images.image_tokens(*size) == tokens


def test_no_limit_explains_more_tokens_than_the_image_has() -> None:
    assert images.server_limit(280, 280, 101) is None


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (0, 10), (10, -1)])
def test_smart_resize_refuses_what_has_no_answer(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"too narrow|no area"):
        images.smart_resize(*size)


def test_an_image_within_the_limits_is_not_touched() -> None:
    image = Image.new("RGB", (1654, 2339))
    assert images.fit(image) is image


@pytest.mark.parametrize("size", [(5000, 4000), (30, 40), (1000, 20)])
def test_an_image_outside_the_limits_is_resized_into_them(size: tuple[int, int]) -> None:
    assert images.fit(Image.new("RGB", size)).size == images.smart_resize(*size)


def test_transparent_parts_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    rgb = images.to_rgb(image)
    assert (rgb.mode, rgb.getpixel((0, 0)), rgb.getpixel((1, 0))) == ("RGB", (255, 255, 255), (255, 127, 127))


def test_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (1, 1), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info["transparency"] = 0
    assert images.to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_white_on_nothing_becomes_white_on_black(mode: str) -> None:
    text = Image.new("L", (60, 60))
    text.paste(255, (20, 20, 40, 40))
    image = Image.new("LA", text.size, "white")
    image.putalpha(text)
    if mode == "P":
        image = text.point([0] * 255 + [1]).convert("P")
        image.putpalette([255] * 6)
        image.info["transparency"] = 0
    rgb = images.to_rgb(image if mode == "P" else image.convert(mode))
    assert [rgb.getpixel(at) for at in ((9, 9), (30, 30))] == [(0, 0, 0), (255, 255, 255)]
    part = images.to_rgb(image if mode == "P" else image.convert(mode), 0)  # which has the ground of the others
    assert part.getextrema() == ((255, 255),) * 3
    for alpha in (0, 255):  # with nothing to be seen on any ground, it is a white page
        image = Image.new("RGBA", (60, 60), (255, 255, 255, alpha))
        assert images.to_rgb(image).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize(
    ("ground", "ink", "alpha"),
    [((0, 0, 0, 0), (30, 30, 30), 50), ((0, 0, 0, 0), (60, 60, 60), 60), ((255, 255, 255, 255), (255, 255, 255), 0)],
)
def test_the_ground_stays_white_for_dark_ink_and_for_a_sheet(
    ground: tuple[int, ...], ink: tuple[int, ...], alpha: int
) -> None:
    image = Image.new("RGBA", (60, 60), ground)
    image.paste((*ink, alpha), (0, 0, 20, 20))
    assert min(images.to_rgb(image).tobytes()) > 200
    assert images.to_rgb(image).getpixel((59, 59)) == (255, 255, 255)


def test_an_image_without_its_palette_is_read() -> None:
    """A PNG of a palette's type without its PLTE chunk, which Pillow opens."""
    image = Image.new("P", (1, 1), 255)
    image.palette = None
    assert images.to_rgb(image).mode == "RGB"


def test_palette_and_bilevel_keep_their_colours() -> None:
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert images.to_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    assert images.to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_becomes_rgb() -> None:
    assert images.to_rgb(Image.new("CMYK", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (0, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I", "I;16B"])
def test_sixteen_bits_become_eight_without_clipping(mode: str) -> None:
    image = Image.new(mode, (4, 1))
    for column, value in enumerate((0, 128 * 257, 254 * 257, 65535)):
        image.putpixel((column, 0), value)
    assert [images.to_rgb(image).getpixel((column, 0)) for column in range(4)] == [
        (v, v, v) for v in (0, 128, 254, 255)
    ]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_twelve_of_sixteen_bits_become_eight(mode: str) -> None:
    image = Image.new(mode, (3, 1))
    for column, value in enumerate((0, 2_048, 4_095)):
        image.putpixel((column, 0), value)
    assert [images.to_rgb(image).getpixel((column, 0))[0] for column in range(3)] == [0, 128, 255]  # type: ignore[index]


@pytest.mark.parametrize(
    ("info", "size"),
    [
        ({}, (1_728, 1_100)),
        ({"dpi": (204, 98)}, (1_728, 2_290)),
        ({"dpi": (204, 196)}, (1_728, 1_145)),
        ({"dpi": (98, 204)}, (3_597, 1_100)),
        ({"resolution": (8.04, 3.85)}, (1_728, 2_297)),  # a TIFF without a unit
        ({"aspect": (2, 1)}, (1_728, 2_200)),  # a PNG without one
        ({"jfif_density": (1, 2)}, (3_456, 1_100)),
        ({"dpi": (300.5, 300)}, (1_728, 1_100)),
        ({"dpi": (300, 1)}, (1_728, 1_100)),
        ({"dpi": (0, 0)}, (1_728, 1_100)),
        ({"dpi": (float("nan"), 96)}, (1_728, 1_100)),
    ],
)
def test_a_page_has_square_pixels(info: dict[str, Any], size: tuple[int, int]) -> None:
    image = Image.new("1", (1_728, 1_100))
    image.info.update(info)
    assert images.upright_size(image) == size
    image.getexif()[0x0112] = 6
    assert images.upright_size(image) == size[::-1]


def test_exif_orientation_is_applied_and_the_original_left_alone() -> None:
    image = Image.new("RGB", (2, 1), "white")
    image.putpixel((0, 0), (255, 0, 0))
    image.getexif()[0x0112] = 6  # shown upright by a quarter turn clockwise
    rgb = images.to_rgb(image)
    assert (rgb.size, rgb.getpixel((0, 0))) == ((1, 2), (255, 0, 0))
    assert (image.size, image.getexif()[0x0112]) == ((2, 1), 6)


def test_metadata_is_not_sent() -> None:
    image = Image.new("RGB", (1, 1))
    image.info["icc_profile"] = b"profile"
    image.info["comment"] = "secret"
    assert images.to_rgb(image).info == {}


def photograph(width: int, height: int) -> Image.Image:
    """Something smooth in colours, with grain."""
    shades = (Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90))
    grain = Image.effect_noise((width, height), 6)
    return Image.merge("RGB", [ImageChops.add(shade.resize((width, height)), grain, 1, -128) for shade in shades])


def pillows(image: Image.Image) -> int:
    """The bytes of Pillow's own PNG at level 1, as RGB."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return len(buffer.getvalue())


@pytest.fixture(params=["isal", "zlib"])
def deflate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each of the two that may compress."""
    images._deflate.cache_clear()
    if request.param == "zlib":
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    yield request.param
    images._deflate.cache_clear()


def test_isal_compresses_where_it_is_installed(deflate: str) -> None:
    assert images._deflate().__name__ == {"isal": "isal.isal_zlib", "zlib": "zlib"}[deflate]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (29, 127), (31, 128), (200, 129), (97, 385)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.usefixtures("deflate")
def test_a_png_holds_the_very_pixels(size: tuple[int, int], mode: str) -> None:
    image = photograph(*size)
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1] // 2 + 1))  # where each filter meets an edge
    image = image.convert(mode)
    with Image.open(io.BytesIO(images.to_png(image))) as decoded:
        assert (decoded.format, decoded.mode) == ("PNG", mode)
        assert (decoded.size, decoded.tobytes()) == (size, image.tobytes())


@pytest.mark.parametrize("kind", images.FILTERS[3])
@pytest.mark.usefixtures("deflate")
def test_each_filter_is_the_one_that_decoders_know(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(images.FILTERS, 3, (kind,))
    image = photograph(67, 200)
    with Image.open(io.BytesIO(images.to_png(image))) as decoded:
        assert decoded.tobytes() == image.tobytes()


@pytest.mark.usefixtures("deflate")
def test_a_page_without_colour_is_sent_as_grey_and_smaller(sheet: Image.Image) -> None:
    png = images.to_png(sheet)
    with Image.open(io.BytesIO(png)) as decoded:
        assert (decoded.mode, decoded.convert("RGB").tobytes()) == ("L", sheet.tobytes())
    assert len(png) < 0.75 * pillows(sheet)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_one_pixel_with_the_least_colour_is_enough_to_be_sent_in_colour(sheet: Image.Image, channel: int) -> None:
    sheet.putpixel((5, 7), tuple(254 if band == channel else 255 for band in range(3)))
    with Image.open(io.BytesIO(images.to_png(sheet))) as decoded:
        assert (decoded.mode, decoded.tobytes()) == ("RGB", sheet.tobytes())


@pytest.mark.usefixtures("deflate")
def test_photographs_and_pages_with_one_do_not_grow(sheet: Image.Image) -> None:
    picture = photograph(784, 512)
    page = Image.new("RGB", (784, 1120), "white")
    for top, part in ((0, sheet), (224, picture), (736, sheet)):
        page.paste(part, (0, top))
    grey = picture.convert("L").convert("RGB")
    for image, limit in ((picture, 1.05), (page, 1.05), (grey, 0.8)):
        assert len(images.to_png(image)) < limit * pillows(image)


def test_only_an_empty_page_is_blank(sheet: Image.Image) -> None:
    dusty = Image.new("RGB", (300, 300), (250, 248, 240))
    dusty.putpixel((100, 100), (0, 0, 0))
    assert images.is_blank(dusty)
    assert images.is_empty(dusty)
    assert not images.is_blank(sheet)


def test_noise_and_shading_are_no_faint_print(sheet: Image.Image) -> None:
    shaded = Image.linear_gradient("L").resize((1654, 2339)).point(lambda level: 240 - level * 20 / 255)
    noise = Image.effect_noise(shaded.size, 4)
    assert images.is_empty(ImageChops.add(shaded, noise, offset=-128))
    faint = sheet.convert("L").point(lambda level: 208 + level * 47 / 255)
    assert images.is_blank(faint)
    assert not images.is_empty(faint)


@pytest.mark.parametrize("name", ["dpi", "resolution", "aspect", "jfif_density"])
@pytest.mark.parametrize("value", [300, "72 dpi", "72", (1,), (1, 2, 3), None])
def test_what_only_has_the_name_of_a_resolution_is_none(name: str, value: object) -> None:
    image = Image.new("L", (300, 200))
    image.info[name] = value
    assert images.upright_size(image) == (300, 200)
