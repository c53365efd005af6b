"""shared.api.retouch: pixel values of each step, A1111's arithmetic written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from shared.api.retouch import (
    CROP,
    FILL,
    JUST_RESIZE,
    LANCZOS,
    Masking,
    Paste,
    filled,
    flattened,
    has_alpha,
    mask_of,
    masked,
    masked_box,
    resized,
    transparent_mask,
)

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)


def halves(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def spot(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A mask that is white in the box."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_transparency_becomes_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    assert has_alpha(image) and [*flattened(image).get_flattened_data()] == [RED, (255, 255, 255)]
    image.putpixel((1, 0), (0, 0, 0, 51))
    assert flattened(image).getpixel((1, 0)) == (204, 204, 204)
    opaque = Image.new("RGBA", (2, 1), (*GREEN, 255))
    assert not has_alpha(opaque) and flattened(opaque).getpixel((0, 0)) == GREEN
    palette = halves((4, 2)).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert has_alpha(palette) and flattened(palette).getpixel((0, 0)) == (255, 255, 255)
    assert flattened(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_a_mask_is_its_alpha_where_it_has_one_else_its_luminance() -> None:
    alpha = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    for x, value in enumerate((255, 129, 128)):
        alpha.putpixel((x, 0), (0, 0, 0, value))
    assert [*mask_of(alpha).get_flattened_data()] == [255, 255, 0]
    grey = Image.new("RGBA", (1, 1), (100, 100, 100, 255))
    assert mask_of(grey).getpixel((0, 0)) == 100
    assert mask_of(Image.new("RGB", (1, 1), (255, 255, 255))).getpixel((0, 0)) == 255
    assert [*transparent_mask(alpha).get_flattened_data()] == [0, 126, 127]


def test_just_resize_stretches() -> None:
    made = resized(halves(), (20, 40), JUST_RESIZE)
    assert made.size == (20, 40)
    assert made.tobytes() == halves().resize((20, 40), Image.Resampling.LANCZOS).tobytes()


def test_crop_and_resize_cuts_the_middle_out() -> None:
    """40x20 to 20x20: the middle half of it, at its own size."""
    made = resized(halves(), (20, 20), CROP)
    assert values(made).tolist() == values(halves().crop((10, 0, 30, 20))).tolist()
    tall = resized(halves(), (40, 10), CROP)
    assert values(tall).tolist() == values(halves().crop((0, 5, 40, 15))).tolist()


@pytest.mark.parametrize(
    ("size", "inner"), [((30, 64), (128, 64)), ((64, 24), (64, 32)), ((33, 7), (33, 16))]
)
def test_crop_and_resize_is_a_whole_resize_and_a_cut(size: tuple[int, int], inner: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    whole = values(image.resize((inner[0], 20), LANCZOS).resize(inner, LANCZOS)).astype(int)
    left, upper = inner[0] // 2 - size[0] // 2, inner[1] // 2 - size[1] // 2
    made = values(resized(image, size, CROP))
    assert abs(made - whole[upper : upper + size[1], left : left + size[0]]).max() <= 1  # rounding


def test_crop_and_resize_of_a_long_picture_makes_no_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, the second one would have 4096 times as many pixels as what is asked for."""
    largest: list[int] = []
    resize = Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *more: Any) -> Image.Image:
        largest.append(size[0] * size[1])
        return resize(image, size, *more)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert resized(Image.new("L", (64, 4096)), (64, 64), CROP).size == (64, 64)
    assert resized(Image.new("L", (4096, 1)), (64, 64), CROP).size == (64, 64)
    assert max(largest) == 64 * 4096


@pytest.mark.parametrize(("size", "inner"), [((40, 31), (0, 5)), ((61, 20), (10, 0)), ((40, 20), (0, 0))])
def test_resize_and_fill_draws_the_edges_out(size: tuple[int, int], inner: tuple[int, int]) -> None:
    """Every pixel: that of the picture nearest to it."""
    image = Image.fromarray(np.arange(40 * 20 * 3, dtype=np.uint8).reshape(20, 40, 3))
    rows = np.clip(np.arange(size[1]) - inner[1], 0, 19)
    columns = np.clip(np.arange(size[0]) - inner[0], 0, 39)
    assert values(resized(image, size, FILL)).tolist() == values(image)[rows][:, columns].tolist()


def test_masked_pixels_are_filled_from_around() -> None:
    image = Image.new("RGB", (64, 64), RED)
    mask = spot(image.size, (20, 20, 44, 44))
    image.paste(GREEN, (20, 20, 44, 44))
    made = values(filled(image, mask))
    assert made[..., 1].max() <= 3 and made[..., 0].min() >= 250, "nothing of what was masked is left"
    kept = values(filled(halves((64, 64)), spot((64, 64), (28, 28, 36, 36))))
    outside = np.asarray(spot((64, 64), (24, 24, 40, 40))) == 0
    assert np.abs(kept - values(halves((64, 64))))[outside].max() <= 1
    middle = kept[32, 32]
    assert middle[0] > 50 and middle[2] > 50 and middle[1] <= 3, "a mix of both sides"


@pytest.mark.parametrize(
    ("box", "padding", "size", "expected"),
    [
        ((40, 40, 60, 60), 0, (64, 64), (40, 40, 60, 60)),
        ((40, 40, 60, 60), 8, (64, 64), (32, 32, 68, 68)),
        ((40, 40, 60, 60), 8, (128, 64), (14, 32, 86, 68)),  # twice as wide as high
        ((40, 40, 60, 60), 8, (64, 128), (32, 14, 68, 86)),
        ((0, 40, 20, 60), 4, (128, 64), (0, 36, 56, 64)),  # pushed in from the left
        ((90, 40, 100, 60), 0, (64, 64), (80, 40, 100, 60)),  # and from the right
        ((0, 0, 100, 50), 0, (64, 64), (0, 0, 100, 100)),
        ((0, 0, 100, 10), 5, (64, 640), (0, 0, 100, 100)),  # no more than there is
    ],
)
def test_the_part_that_only_masked_paints(
    box: tuple[int, int, int, int],
    padding: int,
    size: tuple[int, int],
    expected: tuple[int, int, int, int],
) -> None:
    assert masked_box(spot((100, 100), box), padding, size) == expected
    assert masked_box(Image.new("L", (100, 100)), padding, size) is None


def test_pasting_keeps_what_is_not_masked_to_the_pixel() -> None:
    picture, mask = halves(), spot((40, 20), (10, 5, 30, 15))
    mask.putpixel((0, 0), 51)
    made = values(Paste(picture, mask)(Image.new("RGB", (40, 20), GREEN)))
    assert (made[5:15, 10:30] == GREEN).all() and made[0, 0].tolist() == [204, 51, 0]
    keep = np.asarray(mask) == 0
    assert (made[keep] == values(picture)[keep]).all()
    # Only a part was painted, at twice its size.
    made = values(Paste(picture, mask, (10, 5, 30, 15))(Image.new("RGB", (40, 20), GREEN)))
    assert (made[5:15, 10:30] == GREEN).all()
    assert made[0, 0].tolist() == list(RED), "outside the box nothing was painted"


def test_the_whole_picture_with_a_mask() -> None:
    picture, mask = halves((80, 40)), spot((80, 40), (20, 10, 60, 30))
    how = Masking(blur=(0, 0), only_masked=False)
    found = masked(picture, mask, (40, 20), CROP, how)
    assert found is not None
    image, sent, paste = found
    assert image.size == sent.size == (40, 20) and sent.getpixel((20, 10)) == 255
    assert values(image).tolist() == values(picture.resize((40, 20), Image.Resampling.LANCZOS)).tolist()
    made = values(paste(Image.new("RGB", (40, 20), GREEN)))
    assert made[10, 20].tolist() == list(GREEN) and made[0, 0].tolist() == list(RED)
    inverted = masked(picture, mask, (40, 20), 0, Masking((0, 0), True, False))
    assert inverted is not None
    assert (inverted[1].getpixel((20, 10)), inverted[1].getpixel((0, 0))) == (0, 255)


def test_blur_softens_the_seam_by_its_own_amount_each_way() -> None:
    mask = spot((80, 80), (20, 20, 60, 60))
    found = masked(halves((80, 80)), mask, (80, 80), 0, Masking((6, 0), only_masked=False))
    assert found is not None
    sent = values(found[1])
    assert sent[19, 40] == 0 and sent[20, 40] == 255, "not blurred vertically"
    # The edge of a Gaussian of 6 pixels: half at the edge, 16 % one deviation further out.
    assert sent[40, 19] + sent[40, 20] == pytest.approx(255, abs=4)
    assert sent[40, 13] == pytest.approx(0.16 * 255, abs=6)
    # What is at least half white is painted whole.
    seam = values(found[2].mask)
    assert (seam == np.clip(2 * sent, 0, 255)).all()


def test_only_the_masked_part_is_painted_at_full_size() -> None:
    picture = Image.new("RGB", (200, 100), RED)
    ImageDraw.Draw(picture).rectangle((100, 40, 119, 59), fill=BLUE)
    mask = spot((200, 100), (100, 40, 120, 60))
    found = masked(picture, mask, (64, 64), 0, Masking((0, 0), padding=10))
    assert found is not None
    image, sent, paste = found
    assert paste.box == (90, 30, 130, 70) and image.size == sent.size == (64, 64)
    assert image.getpixel((32, 32)) == BLUE and image.getpixel((2, 2)) == RED
    assert sent.getpixel((32, 32)) == 255 and sent.getpixel((2, 2)) == 0
    made = paste(Image.new("RGB", (64, 64), GREEN))
    expected = picture.copy()
    expected.paste(GREEN, (100, 40, 120, 60))
    assert made.size == (200, 100) and made.tobytes() == expected.tobytes()
    assert masked(picture, Image.new("L", (200, 100)), (64, 64), 0, Masking()) is None


def test_a_mask_of_another_size_is_stretched_over_the_picture() -> None:
    found = masked(
        halves((40, 40)), spot((20, 20), (0, 0, 10, 20)), (40, 40), 0, Masking((0, 0), only_masked=False)
    )
    assert found is not None and found[1].getpixel((5, 20)) == 255 and found[1].getpixel((35, 20)) == 0
