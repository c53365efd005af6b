"""Pictures and masks of img2img: resized, filled, blurred and cropped, and the painted part pasted back.

As A1111 does it (its modules images, masking and processing), with Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageFilter, ImageOps

from shared.api.codecs import has_alpha
from shared.api.sizes import Size

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels

LANCZOS = Image.Resampling.LANCZOS
JUST_RESIZE, CROP, FILL = 0, 1, 2  # A1111's resize modes
WHITE = "#ffffff"  # behind transparent pictures: its default img2img_background_color
# Blurs that follow each other to fill what is masked: radius in pixels, and how often it is laid on.
_FILLING = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
_OPAQUE = 128  # of a mask's alpha: what is above is painted


@dataclass(frozen=True)
class Paste:
    """A picture of which only a part was painted anew.

    Attributes:
        picture: the whole of it, as it was.
        mask: of the same size; white takes the painted pixels, black keeps the old ones.
        box: where the painted picture belongs; None: it is the whole.
    """

    picture: Image.Image
    mask: Image.Image
    box: Box | None = None

    def __call__(self, painted: Image.Image) -> Image.Image:
        if self.box is not None:
            left, upper, right, lower = self.box
            whole = self.picture.copy()
            whole.paste(resized(painted, (right - left, lower - upper), CROP), (left, upper))
            painted = whole
        return Image.composite(painted, self.picture, self.mask)


@dataclass(frozen=True)
class Masking:
    """A1111's settings of a mask.

    Attributes:
        blur: standard deviation in pixels, horizontally and vertically.
        inverted: paint what is black.
        only_masked: paint only the masked part, at the full size of the request.
        padding: pixels around the masked part that are painted with it.
    """

    blur: Size = (4, 4)
    inverted: bool = False
    only_masked: bool = True
    padding: int = 0


def flattened(image: Image.Image) -> Image.Image:
    """RGB, with white behind what is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    front = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), front).convert("RGB")


def mask_of(image: Image.Image) -> Image.Image:
    """A client's mask as grey, white to be painted: its alpha where some of it is transparent."""
    if has_alpha(image):
        alpha = image.convert("RGBA").getchannel("A")
        return alpha.point([255 if value > _OPAQUE else 0 for value in range(256)])
    return image.convert("L")


def transparent_mask(image: Image.Image) -> Image.Image:
    """OpenAI's mask, whose transparent pixels are painted, as grey with white for them."""
    return ImageOps.invert(image.convert("RGBA").getchannel("A"))


def resized(image: Image.Image, size: Size, mode: int = JUST_RESIZE) -> Image.Image:
    """A picture of exactly this size: stretched, cropped in the middle, or with its edges drawn out."""
    if mode == JUST_RESIZE:
        return image.resize(size, LANCZOS)
    width, height = size
    wider = width * image.height > image.width * height  # than the picture is
    if wider == (mode == CROP):
        inner = (width, image.height * width // image.width)
    else:
        inner = (image.width * height // image.height, height)
    inner = (max(inner[0], 1), max(inner[1], 1))
    left, upper = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    if mode == CROP:  # only what is kept: all of a long picture would be many times the size
        across, down = image.width / inner[0], image.height / inner[1]
        columns = -left * across, min((width - left) * across, image.width)
        rows = -upper * down, min((height - upper) * down, image.height)
        stretched = image.resize((width, image.height), LANCZOS, (columns[0], 0, columns[1], image.height))
        return stretched.resize(size, LANCZOS, (0, rows[0], width, rows[1]))
    small = image.resize(inner, LANCZOS)
    made = Image.new(image.mode, size)
    if upper > 0:
        made.paste(_edge(small, (0, 0, inner[0], 1), (width, upper)), (0, 0))
        rest = height - upper - inner[1]
        made.paste(_edge(small, (0, inner[1] - 1, inner[0], inner[1]), (width, rest)), (0, upper + inner[1]))
    if left > 0:
        made.paste(_edge(small, (0, 0, 1, inner[1]), (left, height)), (0, 0))
        rest = width - left - inner[0]
        made.paste(_edge(small, (inner[0] - 1, 0, inner[0], inner[1]), (rest, height)), (left + inner[0], 0))
    made.paste(small, (left, upper))
    return made


def cut_from(image: Image.Image, size: Size) -> Image.Image:
    """The middle of a picture, which is at least as large."""
    left, upper = ((whole - part) // 2 for whole, part in zip(image.size, size, strict=True))
    return image.crop((left, upper, left + size[0], upper + size[1]))


def _edge(image: Image.Image, box: Box, size: Size) -> Image.Image:
    return image.crop(box).resize(size, Image.Resampling.NEAREST)


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with what is white in the mask filled with the colors around it, blurred."""
    made = Image.new("RGBA", image.size)
    kept = Image.new("RGBa", image.size)
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    for radius, times in _FILLING:
        blurred = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            made.alpha_composite(blurred)
    return made.convert("RGB")


def masked_box(mask: Image.Image, padding: int, size: Size) -> Box | None:
    """The part of a mask that is not black, padded and grown to the aspect of `size`; None: all is black."""
    found = mask.getbbox()
    if found is None:
        return None
    left, right = max(found[0] - padding, 0), min(found[2] + padding, mask.width)
    upper, lower = max(found[1] - padding, 0), min(found[3] + padding, mask.height)
    width, height = size
    if (right - left) * height > width * (lower - upper):
        upper, lower = _grown(upper, lower, int((right - left) * height / width), mask.height)
    else:
        left, right = _grown(left, right, int((lower - upper) * width / height), mask.width)
    return left, upper, right, lower


def _grown(first: int, last: int, length: int, most: int) -> tuple[int, int]:
    """A range that grows on both sides, and only inwards at the ends of 0 to `most`."""
    more = max(length - (last - first), 0)
    first, last = first - more // 2, last + more - more // 2
    if last > most:
        first, last = first - (last - most), most
    if first < 0:
        first, last = 0, min(last - first, most)
    return first, last


def masked(
    image: Image.Image, mask: Image.Image, size: Size, resize_mode: int, how: Masking
) -> tuple[Image.Image, Image.Image, Paste] | None:
    """The picture and the mask that are painted, and how the result is pasted back.

    Args:
        image: RGB.
        mask: grey, white is painted.
        size: of what is painted.

    Returns:
        None where only the masked part is to be painted and there is none.
    """
    if mask.size != image.size:
        mask = mask.resize(image.size, LANCZOS)
    mask = ImageOps.invert(mask) if how.inverted else mask
    mask = mask.filter(ImageFilter.GaussianBlur(how.blur))
    if how.only_masked:
        box = masked_box(mask, how.padding, size)
        if box is None:
            return None
        paste = Paste(image, mask, box)
        image, mask = (resized(part.crop(box), size, FILL) for part in (image, mask))
    else:
        image, mask = (resized(part, size, resize_mode) for part in (image, mask))
        # Painted whole from half white on, so that the seam lies in what is painted.
        paste = Paste(image, mask.point([min(2 * value, 255) for value in range(256)]))
    return image, mask, paste


@dataclass(frozen=True)
class Retouched:
    """What was done to a client's picture before it is painted, and is to be done after.

    Attributes:
        told: the settings, in the words of A1111's infotexts.
        paste: for each picture that is made.
    """

    told: Mapping[str, Any] = field(default_factory=dict)
    paste: Paste | None = None
