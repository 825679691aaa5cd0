"""The model's image rules, and turning any image into what the model may be shown.

The numbers are those of dots.ocr's preprocessor: patches of 14 px, merged 2 x 2 into one token of 28 x 28 px.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import importlib
import math
import struct
import zlib
from typing import Any, Final

from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat

FACTOR: Final = 28  # both sides of what the model sees are multiples of this, in pixels
MIN_PIXELS: Final = 3_136  # smallest page that the model accepts (2 x 2 tokens)
MAX_PIXELS: Final = 11_289_600  # largest page that the model accepts (14,400 tokens)
MAX_ASPECT: Final = 200  # the longer side must be less than this many times the shorter one

# Pixels that claim to be longer than this many times their other side do not; those of a coarse fax are 2.1 or 4.2
# times as high as wide, but nobody sends the latter (our own choice).
MAX_STRETCH: Final = 4

# Grey levels (of 255) between the darkest and the lightest spot below which a page on which no text was found counts as
# blank. Our own choice: above the noise and shading of a scanned white sheet. Some print is fainter, and can be read.
BLANK_SPREAD: Final = 48
# The same without shading (our own choice). Measured: noise of 4 levels leaves 14, print of grey 230 on white 24.
EMPTY_SPREAD: Final = 20

# Of rows in a PNG, by the bytes of a pixel: none, the difference from the row above, or from the mean of that and the
# pixel to the left (PNG specification, 9.2); Pillow computes these quickly.
FILTERS: Final[dict[int, tuple[int, ...]]] = {1: (0, 2), 3: (0, 2, 3)}
# Rows that share a filter, by the bytes of a pixel, and those in their middle that it is tried on. Our own choice:
# shorter bands and more rows made pages smaller by 2 % at most.
BAND: Final = {1: 128, 3: 64}
TRIED: Final = 8
LEVEL: Final = 2  # of compression: ISA-L's default, which is 1 % smaller than its level 1 in the same time


def smart_resize(width: int, height: int, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Compute the size in pixels at which the model sees an image; the server's preprocessor does the same.

    Its sides are multiples of `FACTOR`, and it has between `MIN_PIXELS` and `max_pixels` in all: fewer than
    `MAX_PIXELS` on a server that was told to shrink pages further than the model needs.

    Raises:
        ValueError: A side is not positive, or one is `MAX_ASPECT` or more times the other.
    """
    if min(width, height) < 1:
        raise ValueError(f"an image of {width} x {height} px has no area")
    if max(width, height) >= MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} px is too narrow: the model takes aspect ratios below {MAX_ASPECT}")
    sides = [round(side / FACTOR) * FACTOR for side in (width, height)]
    if math.prod(sides) > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        sides = [max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (width, height)]
    elif math.prod(sides) < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (width * height))
        sides = [math.ceil(side * grow / FACTOR) * FACTOR for side in (width, height)]
    return sides[0], sides[1]


def image_tokens(width: int, height: int, *, max_pixels: int = MAX_PIXELS) -> int:
    """Count the tokens of context that an image of this size, in pixels, takes up; ``max_pixels`` as above."""
    return math.prod(smart_resize(width, height, max_pixels=max_pixels)) // FACTOR**2


def server_limit(width: int, height: int, tokens: int) -> int | None:
    """Find out how far a server shrinks pages, from the tokens that it counted for an image of a size in pixels.

    The number of tokens rises with the limit, and so stands for one size only. Returns the smallest ``max_pixels`` with
    which `smart_resize` gives that many tokens; ``None`` if there is none.
    """
    limits = range(1, math.prod(smart_resize(width, height)) + 1)

    def count(limit: int) -> int:
        return image_tokens(width, height, max_pixels=limit)

    index = bisect.bisect_left(limits, tokens, key=count)
    return limits[index] if index < len(limits) and count(limits[index]) == tokens else None


def fit(image: Image.Image, own: tuple[int, int] | None = None) -> Image.Image:
    """Resize an image that the model would not accept; return any other one untouched, for the server to round.

    Sides below `FACTOR` count as not accepted, because older preprocessors refuse them. With a size of its ``own`` that
    it lacks, it is given that first.
    """
    size = own or image.size
    if min(size) < FACTOR or not MIN_PIXELS <= math.prod(size) <= MAX_PIXELS:
        size = smart_resize(*size)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the size of an image that is upright (EXIF) and whose pixels are squares, which those of a fax are not."""
    width, height = image.size
    names = ("dpi", "resolution", "aspect", "jfif_density")
    told = (value for value in map(image.info.get, names) if isinstance(value, tuple) and len(value) == 2)
    across, down = map(float, next(told, (1, 1)))  # anything else is a text of that name
    if image.getexif().get(0x0112, 1) > 4:
        across, down = down, across
        if image.format != "TIFF":  # which Pillow turns by itself
            width, height = height, width
    if across > 0 and down > 0 and 1.02 < (stretch := max(across / down, down / across)) <= MAX_STRETCH:
        return (round(width * stretch), height) if down > across else (width, round(height * stretch))
    return width, height


def to_rgb(image: Image.Image, brightest: int | None = None) -> Image.Image:
    """Turn an image upright (EXIF) and into 8-bit RGB without metadata, with white behind whatever is transparent.

    Behind ink that cannot be seen on white, it is black.

    `brightest` is of the whole image, if this is a part of one: with more than 8 bits the highest value, else 0.

    Raises:
        ValueError: Mode ``F`` (floating point), which does not say what is black and what is white.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed black and white: save it with 8 or 16 bits")
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = image.convert("I")
        # Some scanners use 12 of 16 bits. Pillow's own conversion cuts everything above 255 off: the page turns white.
        bits = max(8, max(brightest or 0, int(image.getextrema()[1])).bit_length())  # type: ignore[arg-type]  # a pair of numbers
        image = image.point(lambda value: value * (255 / (2**bits - 1)) + 0.5).convert("L")
    if (image.mode != "P" or image.palette) and image.has_transparency_data:  # a broken file may lack a palette
        overlay = image.convert("RGBA")
        image = _on("white", overlay)
        is_ink = ImageStat.Stat(overlay.getchannel("A")).mean[0] < 128  # rather than a sheet with a transparent margin
        if brightest is None and is_ink and _spread(image.convert("L")) < BLANK_SPREAD:
            on_black = _on("black", overlay)
            image = on_black if _spread(on_black.convert("L")) >= BLANK_SPREAD else image
    rgb = image.copy() if image.mode == "RGB" else image.convert("RGB")
    rgb.info = {}
    return rgb


def _on(colour: str, overlay: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", overlay.size, colour), overlay)


def to_png(image: Image.Image) -> bytes:
    """Encode an image of mode ``RGB``, ``RGBX`` or ``L`` without loss: as 8-bit grey if it has no colour, else as RGB.

    Most of Pillow's time goes into a choice of filters for each row. Text compresses best without any, photographs with
    one: here the rows of a band share the filter that makes some of them smallest.
    """
    deflate = _deflate()
    first, *others = (image.getchannel(name) for name in image.mode.removesuffix("X"))
    samples, step = first, 1  # the bytes of the rows as an image of mode L, and how many make a pixel
    if any(ImageChops.difference(first, other).getbbox() for other in others):
        pixels = image.tobytes("raw", "RGB")
        samples, step = Image.frombuffer("L", (3 * image.width, image.height), pixels, "raw", "L", 0, 1), 3
    rows = []
    for top in range(0, image.height, BAND[step]):
        bottom = min(top + BAND[step], image.height)
        start = (top + max(top, bottom - TRIED)) // 2
        tried = {kind: _filtered(samples, step, kind, start, min(start + TRIED, bottom)) for kind in FILTERS[step]}
        best = min(tried, key=lambda kind: len(deflate.compress(tried[kind], deflate.Z_BEST_SPEED)))
        rows.append(_filtered(samples, step, best, top, bottom))
    header = struct.pack(">IIBBBBB", *image.size, 8, step - 1, 0, 0, 0)  # 8 bits; colour type 0 (grey) or 2 (RGB)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in ((b"IHDR", header), (b"IDAT", deflate.compress(b"".join(rows), LEVEL)), (b"IEND", b"")):
        parts += struct.pack(">I", len(data)), name, data, struct.pack(">I", deflate.crc32(data, deflate.crc32(name)))
    return b"".join(parts)


@functools.cache
def _deflate() -> Any:
    """Return ISA-L, which compresses some five times faster than zlib; zlib where it is not installed."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("isal.isal_zlib")
    return zlib


def _filtered(samples: Image.Image, step: int, kind: int, top: int, bottom: int) -> bytes:
    """Return rows as a PNG holds them: each behind the number of its filter, one of `FILTERS`."""
    width = samples.width
    rows = samples.crop((0, top, width, bottom))
    if kind:
        guess = samples.crop((0, top - 1, width, bottom - 1))  # the row above; black above the first
        if kind == 3:
            guess = Image.blend(samples.crop((-step, top, width - step, bottom)), guess, 0.5)
        rows = ImageChops.subtract_modulo(rows, guess)
    numbered = Image.new("L", (width + 1, bottom - top), kind)
    numbered.paste(rows, (1, 0))
    return numbered.tobytes()


def is_blank(image: Image.Image) -> bool:
    """Tell whether a page shows nothing at all; single specks of dust do not count."""
    return _spread(image.convert("L").filter(ImageFilter.MedianFilter(3))) < BLANK_SPREAD


def is_empty(image: Image.Image) -> bool:
    """Tell whether a page shows nothing but noise and shading, not even faint print, which may be `is_blank`."""
    small = image.convert("L").filter(ImageFilter.MedianFilter(3)).reduce(2)
    shading = small.filter(ImageFilter.BoxBlur(max(small.size) / 50))
    return _spread(ImageChops.subtract(small, shading, offset=128)) < EMPTY_SPREAD


def _spread(image: Image.Image) -> int:
    darkest, lightest = image.getextrema()
    return int(lightest) - int(darkest)  # type: ignore[arg-type]  # numbers for mode L
