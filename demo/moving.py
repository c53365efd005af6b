"""The demo's videos: a shape that moves as the caption says, which are held out, and the judging rule.

Their frames look like the pictures of draw.py, so that a denoiser trained on those can draw them.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

from draw import COLOURS, EXTENTS, PIXELS, SHAPES, Judgement, Scene, fill, judge, scenes
from PIL import Image

FRAMES = 8
_WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*(f"moving {way}" for way in _WAYS), "growing", "shrinking")

_TRAVEL = 40.0  # pixels of a 128-pixel picture, from the first frame to the last
_JITTER = 0.08  # of the travel and of the extents, either way
_SHIFT = 8.0  # pixels, either way, in both directions; half of it along the motion

# The rule: what counts as a motion, from the first frame to the last.
_LEAST_TRAVEL, _LEAST_GROWTH = 16.0, 1.3
_STILL = 12.0  # pixels that the centre of a growing shape may move
_BACK = 3.0  # pixels that a frame may lie behind the one before


def moves_unseen(scene: Scene) -> bool:
    """True where shape, colour and motion together are never shown in training: one in five combinations."""
    place = SHAPES.index(scene.shape) + list(COLOURS).index(scene.colour)
    return (place + 2 * MOTIONS.index(scene.motion or "")) % 5 == 0


def clips(*, held_out: bool) -> list[Scene]:
    """All captions of one side of the split, in a fixed order.

    What is held out in draw.py (shape, colour and background) is not shown in training either.
    """
    found = [
        Scene(s.shape, s.colour, s.background, motion=motion)
        for side in (False, True)
        for s in scenes(held_out=side)
        if s.size is None
        for motion in MOTIONS
    ]
    return [s for s in found if (moves_unseen(s) if held_out else not moves_unseen(s) and not s.held_out)]


def held_out_clips(count: int, seed: int = 0) -> list[Scene]:
    """`count` different captions of held-out motions. Raises ValueError when there are fewer."""
    found = clips(held_out=True)
    if not 1 <= count <= len(found):
        raise ValueError(f"count must be 1 to {len(found)} (all held-out captions), got {count}")
    return random.Random(seed).sample(found, count)


def draw_masks(shape: str, motion: str, rng: random.Random, pixels: int = PIXELS) -> list[Image.Image]:
    """The moving shape as FRAMES antialiased masks (mode L, `pixels` square).

    A shape that travels is small; one that grows or shrinks is so between small and large.
    Raises ValueError for another motion. All that is random comes from `rng`.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion must be one of {', '.join(MOTIONS)}, got {motion!r}")
    shift = [rng.uniform(-_SHIFT, _SHIFT) for _ in range(2)]
    small, large = (extent * (1 + rng.uniform(-_JITTER, _JITTER)) for extent in EXTENTS.values())
    way = _WAYS.get(motion.removeprefix("moving "))
    if way:
        large = small
        shift = [s / 2 if along else s for s, along in zip(shift, way, strict=True)]
    first, last = (large, small) if motion == "shrinking" else (small, large)
    travel = _TRAVEL * (1 + rng.uniform(-_JITTER, _JITTER))
    unit = pixels / PIXELS
    masks = []
    for k in range(FRAMES):
        done = k / (FRAMES - 1)
        x, y = (PIXELS / 2 + s + w * travel * (done - 0.5) for s, w in zip(shift, way or (0, 0), strict=True))
        masks.append(fill(shape, pixels, (x * unit, y * unit), (first + (last - first) * done) * unit))
    return masks


def draw_clip(scene: Scene, seed: int, pixels: int = PIXELS) -> list[Image.Image]:
    """The scene's frames as RGB pictures, `pixels` square; the same seed gives the same frames."""
    size = (pixels, pixels)
    front, back = (Image.new("RGB", size, COLOURS[name]) for name in (scene.colour, scene.background))
    masks = draw_masks(scene.shape, scene.motion or "", random.Random(seed), pixels)
    return [Image.composite(front, back, mask) for mask in masks]


def _motion(boxes: list[tuple[int, int, int, int]]) -> str | None:
    """What the boxes of a shape, frame by frame, do; None if it cannot be told."""
    xs = [(left + right) / 2 for left, _, right, _ in boxes]
    ys = [(top + bottom) / 2 for _, top, _, bottom in boxes]
    extents = [float(max(right - left, bottom - top)) for left, top, right, bottom in boxes]
    x, y, growth = xs[-1] - xs[0], ys[-1] - ys[0], extents[-1] / extents[0]
    path, motion = extents, None
    if max(abs(x), abs(y)) <= _STILL:
        if not 1 / _LEAST_GROWTH < growth < _LEAST_GROWTH:
            motion = "growing" if growth > 1 else "shrinking"
    elif 1 / _LEAST_GROWTH < growth < _LEAST_GROWTH:
        for name, (to_x, to_y) in _WAYS.items():
            along, across = x * to_x + y * to_y, abs(x * to_y) + abs(y * to_x)
            if along >= _LEAST_TRAVEL and across <= along / 2:
                path, motion = (xs if to_x else ys), f"moving {name}"
    sign = 1 if path[-1] > path[0] else -1
    steady = all(sign * (b - a) >= -_BACK for a, b in pairwise(path))
    return motion if steady else None


def judge_clip(frames: list[Image.Image]) -> Judgement:
    """The fixed rule: what a video of one shape on a plain background shows. Never sees the caption.

    Shape, colour and background: what draw.py's rule finds in all frames, or in all but one. Motion: from the
    first frame to the last the centre of the shape's bounding box moves by 16 pixels or more and by at most
    half as much across, or it stays within 12 pixels and the box's longer side grows or shrinks by 1.3 times
    or more; no frame lies more than 3 pixels behind the one before. None where a frame shows no shape.
    """
    seen = [judge(frame) for frame in frames]
    told: dict[str, str | None] = {}
    for name in ("shape", "colour", "background"):
        value, count = Counter(getattr(s, name) for s in seen).most_common(1)[0]
        told[name] = value if count >= len(frames) - 1 else None
    boxes = [s.box for s in seen if s.box]
    return Judgement(**told, motion=_motion(boxes) if len(boxes) == len(frames) > 1 else None)
