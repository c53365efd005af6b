"""The sizes that pictures of a request give to what is made, and what is told of those that are changed.

All sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from shared.api.codecs import picture_size
from shared.api.warned import warn
from shared.launch.flags import HostConfig

SAME_SHAPE = 1.05  # as much as rounding to multiples of 16 changes the shape of 480p
Size = tuple[int, int]


def scaled_size(data: bytes, percent: float | None) -> Size:
    """The size of an encoded picture at `percent` of its own."""
    width, height = picture_size(data)
    scale = (percent or 100) / 100
    return max(1, round(width * scale)), max(1, round(height * scale))


def own_size(of: Size, config: HostConfig) -> Size:
    """A picture's own size, rounded down to the type's multiple; an edit has no more than its usual area."""
    multiple, most = config.spec.size_multiple, config.spec.edit_pixels
    scale = math.sqrt(most / math.prod(of)) if most and math.prod(of) > most else 1.0  # as diffusers does it
    width, height = (max(16, int(side * scale) // multiple * multiple) for side in of)
    return width, height


def with_aspect(of: Size, config: HostConfig) -> Size:
    """The launch's area with the aspect of a picture, in multiples that the type takes."""
    multiple, ratio = config.spec.aspect_multiple or config.spec.size_multiple, of[0] / of[1]
    width = math.sqrt(config.size[0] * config.size[1] * ratio)  # as diffusers computes it
    sides = [max(multiple, round(side / multiple) * multiple) for side in (width, width / ratio)]
    return sides[0], sides[1]


def same_shape(one: Size, other: Size) -> bool:
    """Whether they differ in shape by less than can be seen."""
    return 1 / SAME_SHAPE <= one[0] * other[1] / (one[1] * other[0]) <= SAME_SHAPE


def warn_of_own_size(asked: tuple[Any, Any], own: Size, made: Size, config: HostConfig) -> None:
    """Warn where a side that was not asked for is not the picture's own."""
    if all(given is not None or side == now for given, side, now in zip(asked, own, made, strict=True)):
        return
    spec = config.spec
    why = f"the sides of a picture of type {spec.name} are multiples of {spec.size_multiple}"
    if spec.edit_pixels and math.prod(own) > spec.edit_pixels:
        most = math.isqrt(spec.edit_pixels)
        why = f"an edit of type {spec.name} has at most {most} x {most} pixels where no size is asked for"
    warn("image: {}x{} pixels are made {}x{}, as {}".format(*own, *made, why))


def warn_of_shapes(
    name: str, sizes: Iterable[Size], made: Size, done: str = "stretched", hint: str = ""
) -> None:
    """Warn of the first picture of a field that is stretched, or cropped, to another shape."""
    for own in sizes:
        if not same_shape(own, made):
            warn("{}: {}x{} pixels are {} to the shape of {}x{}{}".format(name, *own, done, *made, hint))
            return


def warn_of_mask(mask: Size, picture: Size) -> None:
    """Warn of a mask that does not lie on its picture pixel by pixel, at any scale."""
    if abs(mask[0] * picture[1] / picture[0] - mask[1]) > 1:
        text = (
            "mask: {}x{} pixels are stretched to the shape of image, {}x{}; give a mask of the picture's size"
        )
        warn(text.format(*mask, *picture))


def warn_of_aspect(own: Size, aspects: tuple[float, float], config: HostConfig) -> None:
    """Warn of a picture that a model looks at in another shape, as its own ones are not so long."""
    least, most = aspects
    if not least / SAME_SHAPE <= own[0] / own[1] <= most * SAME_SHAPE:
        text = "type {} looks at pictures {:.2f} to {:.2f} times as wide as high"
        warn("image: {}x{} pixels are stretched: ".format(*own) + text.format(config.type, least, most))
