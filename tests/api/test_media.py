"""shared.api.media: pictures and videos to and from bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.api import media
from shared.api.codecs import check_image
from shared.api.media import Z_RLE, decode_image, decode_mask, encode, encode_image, encode_video


def png(image: Image.Image, **settings: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **settings)
    return out.getvalue()


def test_grey_of_16_bits_keeps_its_shades() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    deep = np.asarray(decode_image(png(Image.fromarray(ramp))))
    assert np.array_equal(deep[:, :, 0], (ramp // 257).astype(np.uint8))
    assert len(np.unique(deep)) == 256 and deep.shape == (16, 16, 3)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0rubbish", b"Exif\0\0MM\0*\0\0\0\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_exif_that_cannot_be_read_is_passed_over(exif: bytes) -> None:
    assert decode_image(check_image(png(Image.new("RGB", (4, 6), "red"), exif=exif))).size == (4, 6)


def test_exif_turns_a_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(png(Image.new("RGB", (4, 6), "red"), exif=exif)).size == (6, 4)


@pytest.mark.parametrize(("fps", "shown"), [(8, 120), (50, 20), (120, 20)])
def test_a_gif_is_never_faster_than_browsers_show(fps: int, shown: int) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    made = Image.open(io.BytesIO(encode_video(frames, "gif", fps)))
    assert made.info["duration"] == shown


@pytest.fixture(params=["imagecodecs", "pillow"])
def encoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert media.imagecodecs is not None, "it is among the requirements"
    if request.param == "pillow":
        monkeypatch.setattr(media, "imagecodecs", None)


@pytest.mark.parametrize("shape", [(1, 1, 3), (37, 5, 3), (64, 128, 3), (40, 24)])
def test_a_png_has_every_pixel(encoder: None, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    made = encode_image(Image.fromarray(pixels), "png")
    assert made.startswith(b"\x89PNG") and np.array_equal(np.asarray(Image.open(io.BytesIO(made))), pixels)


@pytest.mark.parametrize("grain", [0, 2, 20])
def test_a_png_is_as_small_as_pillows(grain: int) -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((256, 256))
    pixels = np.asarray(smooth) + rng.integers(0, grain + 1, (256, 256, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    assert len(encode_image(image, "png")) <= 1.02 * len(png(image, compress_level=1, compress_type=Z_RLE))


def test_several_pictures_are_encoded_in_their_order() -> None:
    pictures = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(20)]
    shown = [np.asarray(decode_image(file))[0, 0, 0] for file in encode(pictures, "png")]
    assert shown == list(range(20))


@pytest.mark.parametrize(("format", "fps", "files"), [("webp", None, 3), ("webp", 8, 1), ("png", 8, 3)])
def test_frames_are_one_file_where_the_format_can(format: str, fps: int | None, files: int) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    assert len(encode(frames, format, fps)) == files


def test_a_mask_is_its_alpha_where_that_is_not_opaque() -> None:
    grey, alpha = Image.new("L", (2, 1)), Image.new("L", (2, 1))
    grey.putdata([255, 0])
    alpha.putdata([64, 255])
    with_alpha = encode_image(Image.merge("LA", (grey, alpha)), "png")
    opaque = encode_image(Image.merge("LA", (grey, Image.new("L", (2, 1), 255))), "png")
    assert list(decode_mask(with_alpha, (2, 1)).getdata()) == [64, 255]
    assert list(decode_mask(opaque, (2, 1)).getdata()) == [255, 0]
    assert decode_mask(opaque, (64, 32)).size == (64, 32)
