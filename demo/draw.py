"""The demo's pictures: captioned scenes, how they are drawn, which are held out, and the judging rule.

A scene is one plain shape on a plain background. Everything here is numpy and Pillow; no torch.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

PIXELS = 128
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 40),
    "orange": (250, 130, 20),
    "yellow": (250, 225, 50),
    "green": (40, 160, 70),
    "blue": (40, 80, 220),
    "purple": (150, 60, 180),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
EXTENTS = {"small": 44.0, "large": 84.0}  # side of the bounding box, in pixels of a 128-pixel picture
SIZES = tuple(EXTENTS)

_EXTENT_JITTER = 0.08  # of the extent, either way
_POSITION_JITTER = 8.0  # pixels, either way, in both directions
_SUPERSAMPLING = 4
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_TEMPLATE_SIDE = 64


@dataclass(frozen=True)
class Scene:
    """What a caption says. `size` is None where the caption leaves it open."""

    shape: str
    colour: str
    background: str
    size: str | None = None

    @property
    def caption(self) -> str:
        """For example "a small red circle on a blue background"."""
        size = f"{self.size} " if self.size else ""
        return f"a {size}{self.colour} {self.shape} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """True where shape, colour and background together are never shown in training, in any size.

        One in five combinations, spread so that each pair of the three is still seen many times.
        """
        colours = list(COLOURS)
        place = SHAPES.index(self.shape) + colours.index(self.colour) + 3 * colours.index(self.background)
        return place % 5 == 0


@dataclass(frozen=True)
class Judgement:
    """What the rule recognises in a picture; None if it cannot decide."""

    shape: str | None = None
    colour: str | None = None
    background: str | None = None
    size: str | None = None

    def right(self, scene: Scene) -> dict[str, bool]:
        """Which of the scene's attributes the picture has; `size` is only there when the caption names it."""
        names = ["shape", "colour", "background"] + (["size"] if scene.size else [])
        return {name: getattr(self, name) == getattr(scene, name) for name in names}


def scenes(*, held_out: bool) -> list[Scene]:
    """All scenes of one side of the split, each with no size, small and large, in a fixed order."""
    found = [
        Scene(shape, colour, background, size)
        for shape in SHAPES
        for colour in COLOURS
        for background in COLOURS
        if colour != background
        for size in (None, *SIZES)
    ]
    return [scene for scene in found if scene.held_out == held_out]


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` different scenes that training never shows. Raises ValueError when there are fewer."""
    found = scenes(held_out=True)
    if not 1 <= count <= len(found):
        raise ValueError(f"count must be 1 to {len(found)} (all held-out scenes), got {count}")
    return random.Random(seed).sample(found, count)


def _outline(shape: str) -> list[tuple[float, float]]:
    """The shape's corners, scaled to fill the box from -1 to 1 in both directions (y points down)."""
    if shape == "circle":
        corners = [(math.cos(math.tau * k / 96), math.sin(math.tau * k / 96)) for k in range(96)]
    elif shape == "square":
        corners = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif shape == "triangle":
        corners = [(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif shape == "diamond":
        corners = [(0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)]
    elif shape == "cross":
        arm = 0.34
        quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
        corners = []
        for _ in range(4):
            corners += quarter
            quarter = [(-y, x) for x, y in quarter]
    elif shape == "star":
        radii = (1.0, 0.45)
        angles = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
        corners = [(radii[k % 2] * math.cos(a), radii[k % 2] * math.sin(a)) for k, a in enumerate(angles)]
    else:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    points = np.array(corners)
    low, high = points.min(axis=0), points.max(axis=0)
    return [(float(x), float(y)) for x, y in (points - low) / (high - low) * 2 - 1]


def _fill(shape: str, side: int, centre: tuple[float, float], extent: float) -> Image.Image:
    """An antialiased mask (mode L, `side` square); centre and extent are in its pixels."""
    scale = _SUPERSAMPLING
    canvas = Image.new("L", (side * scale, side * scale), 0)
    corners = [
        ((centre[0] + x * extent / 2) * scale, (centre[1] + y * extent / 2) * scale)
        for x, y in _outline(shape)
    ]
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return canvas.reduce(scale)


def draw_mask(shape: str, size: str | None, rng: random.Random, pixels: int = PIXELS) -> Image.Image:
    """The shape as an antialiased mask (mode L, `pixels` square), slightly off centre and off size.

    `size` None draws small or large. All that is random comes from `rng`.
    """
    size = size or rng.choice(SIZES)
    if size not in EXTENTS:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    unit = pixels / PIXELS
    extent = EXTENTS[size] * (1 + rng.uniform(-_EXTENT_JITTER, _EXTENT_JITTER)) * unit
    shift = (rng.uniform(-1, 1) * _POSITION_JITTER * unit, rng.uniform(-1, 1) * _POSITION_JITTER * unit)
    return _fill(shape, pixels, (pixels / 2 + shift[0], pixels / 2 + shift[1]), extent)


def draw(scene: Scene, seed: int, pixels: int = PIXELS) -> Image.Image:
    """The scene as an RGB picture, `pixels` square; the same seed gives the same picture."""
    mask = draw_mask(scene.shape, scene.size, random.Random(seed), pixels)
    colour = Image.new("RGB", mask.size, COLOURS[scene.colour])
    return Image.composite(colour, Image.new("RGB", mask.size, COLOURS[scene.background]), mask)


@cache
def _templates() -> np.ndarray:
    """The six shapes filling their bounding box, bool [6, side, side]."""
    side = _TEMPLATE_SIDE
    return np.stack([np.asarray(_fill(s, side, (side / 2, side / 2), side)) > 127 for s in SHAPES])


def _nearest(pixels: np.ndarray) -> np.ndarray:
    """Index of the nearest palette colour, by Euclidean distance in RGB, of float pixels [..., 3]."""
    return np.asarray(((pixels[..., None, :] - _PALETTE) ** 2).sum(-1).argmin(-1))


def judge(image: Image.Image) -> Judgement:
    """The fixed rule: what one shape on a plain background `image` shows. Never sees the caption.

    Background: the palette colour that most of the outermost 4 pixels are nearest to (three in four, else
    nothing is told). Colour: the palette colour nearest to the median of the pixels that are nearer to any
    other colour. Mask: the pixels nearer to that median than to the background's. Shape: the mask, scaled
    from its bounding box to a square, against the six shapes by intersection over union; at least 0.8, and
    0.04 ahead of the second best. Size: the bounding box's longer side.
    """
    resized = image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BOX)
    pixels = np.asarray(resized, dtype=np.float32)
    names = list(COLOURS)
    nearest = _nearest(pixels)
    border = np.ones((PIXELS, PIXELS), dtype=bool)
    border[4:-4, 4:-4] = False
    counts = np.bincount(nearest[border], minlength=len(names))
    ground = int(counts.argmax())
    if counts[ground] < 0.75 * border.sum():
        return Judgement()
    background = names[ground]
    other = nearest != ground
    if other.sum() < 200:  # the smallest shape drawn, a small star, covers about 550
        return Judgement(background=background)
    median = np.median(pixels[other], axis=0)
    colour = names[int(_nearest(median))]
    ground_median = np.median(pixels[border & (nearest == ground)], axis=0)
    mask = ((pixels - median) ** 2).sum(-1) < ((pixels - ground_median) ** 2).sum(-1)
    # A single stray pixel in a row or column does not stretch the box.
    rows, columns = np.flatnonzero(mask.sum(1) > 1), np.flatnonzero(mask.sum(0) > 1)
    if colour == background or not len(rows) or not len(columns):
        return Judgement(background=background)
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    height, width = bottom - top, right - left
    if not 0.75 <= width / height <= 1.34:
        return Judgement(colour=colour, background=background)
    extent = max(width, height)
    size = "small" if extent < 58 else "large" if extent > 68 else None
    box = Image.fromarray((mask[top:bottom, left:right] * 255).astype(np.uint8))
    filled = np.asarray(box.resize((_TEMPLATE_SIDE, _TEMPLATE_SIDE), Image.Resampling.BILINEAR)) > 127
    templates = _templates()
    overlap = (templates & filled).sum((1, 2)) / (templates | filled).sum((1, 2))
    second, best = np.sort(overlap)[-2:]
    shape = SHAPES[int(overlap.argmax())] if best >= 0.8 and best - second >= 0.04 else None
    return Judgement(shape, colour, background, size)
