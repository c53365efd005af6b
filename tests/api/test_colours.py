"""Colour profiles of clients' pictures, compared with the colours that the profiles' formulas give."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from shared.api.codecs import check_image, check_pictures
from shared.api.colours import in_srgb
from shared.api.media import decode_image, decode_mask, encode_image, open_image
from shared.api.warned import collecting_warnings

# Columns: red, green, blue in XYZ as it is seen under D50 (ICC.1:2022, Bradford).
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
D50 = (0.9642, 1.0, 0.8249)
GAMMA = 2.2
COLOURS = ((200, 60, 60), (100, 150, 200), (120, 150, 90), (128, 128, 128), (255, 255, 255), (10, 20, 30))


def fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def icc(space: bytes, kind: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of version 2.4 with these tags (ICC.1:2001-04)."""
    text = b"text\0\0\0\0nobody's\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(8 + 3 + 67)
    white = b"XYZ \0\0\0\0" + fixed(*D50)
    table, data = b"", b""
    tags = {b"desc": name, b"cprt": text, b"wtpt": white} | tags
    begin = 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + struct.pack(">II", begin + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", begin + len(data), b"none", 0x02400000, kind, space, pcs)
    head += bytes(12) + b"acsp" + bytes(28) + fixed(*D50) + bytes(48)
    assert len(head) == 128
    return head + struct.pack(">I", len(tags)) + table + data


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def matrix_profile(matrix: np.ndarray, gamma: float = GAMMA) -> bytes:
    tags = {
        letter + b"XYZ": b"XYZ \0\0\0\0" + fixed(*matrix[:, n]) for n, letter in enumerate((b"r", b"g", b"b"))
    }
    return icc(
        b"RGB ", b"mntr", b"XYZ ", tags | {letter + b"TRC": curve(gamma) for letter in (b"r", b"g", b"b")}
    )


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": curve(gamma)})


def inks(node: tuple[int, ...]) -> tuple[float, float, float]:
    """L, a and b of a print with these inks, each 0 or 1: nothing that any formula of inks would give."""
    cyan, magenta, yellow, black = node
    light = 100 - 20 * cyan - 25 * magenta - 10 * yellow - 30 * black
    return light, 20 * magenta - 10 * cyan, 25 * yellow - 15 * cyan


NODES = [tuple(int(bit) for bit in f"{n:04b}") for n in range(16)]


def ink_profile() -> bytes:
    """CMYK with its colours at full and no ink in a table of 8 bits."""
    lab = [inks(node) for node in NODES]
    cells = [round(v) for light, a, b in lab for v in (light * 2.55, a + 128, b + 128)]
    line = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return icc(b"CMYK", b"prtr", b"Lab ", {b"A2B0": table + line * 4 + bytes(cells) + line * 3})


def encoded_srgb(xyz: np.ndarray) -> np.ndarray:
    """XYZ under D50 -> sRGB (IEC 61966-2-1)."""
    linear = np.clip(np.linalg.inv(SRGB) @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def from_matrix(colour: tuple[int, ...], matrix: np.ndarray, gamma: float = GAMMA) -> np.ndarray:
    return encoded_srgb(matrix @ (np.array(colour) / 255) ** gamma)


def from_lab(light: float, a: float, b: float) -> np.ndarray:
    y = (light + 16) / 116
    cubes = [f**3 if f > 6 / 29 else 3 * (6 / 29) ** 2 * (f - 4 / 29) for f in (y + a / 500, y, y - b / 200)]
    return encoded_srgb(np.array(cubes) * D50)


def file(image: Image.Image, format: str, profile: bytes | None, **more: Any) -> bytes:
    out = io.BytesIO()
    exact: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
    }
    image.save(out, format, icc_profile=profile, **exact.get(format, {}), **more)
    return out.getvalue()


def flat(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("matrix", [ADOBE, P3], ids=["adobe", "p3"])
def test_colours_are_those_that_the_profile_means(format: str, matrix: np.ndarray) -> None:
    changed = 0.0
    for colour in COLOURS:
        data = file(flat("RGB", colour), format, matrix_profile(matrix))
        with collecting_warnings() as told:
            made = np.asarray(decode_image(check_image(data)))[8, 8].astype(float)
        assert not told
        assert np.abs(made - from_matrix(colour, matrix)).max() <= (3 if format == "JPEG" else 1.5), colour
        changed = max(changed, np.abs(made - colour).max())
    assert changed > 10


def test_what_is_transparent_stays_so() -> None:
    colour = (100, 150, 200)
    wanted = from_matrix(colour, ADOBE)
    half = flat("RGBA", (*colour, 77))
    palette = flat("RGB", colour).quantize(4)
    for image, alpha in ((half, 77), (palette, 0)):
        more = {"transparency": 0} if image is palette else {}
        made = open_image(file(image, "PNG", matrix_profile(ADOBE), **more))
        assert made.mode == "RGBA"
        pixel = np.asarray(made)[8, 8].astype(float)
        assert np.abs(pixel[:3] - wanted).max() <= 1.5 and pixel[3] == alpha
    assert np.asarray(decode_mask(file(half, "PNG", matrix_profile(ADOBE))))[8, 8] == 77


def test_grey_and_inks() -> None:
    wanted = encoded_srgb(np.array(D50) * (128 / 255))[0]  # a profile that is linear: 188
    for mode, value in (("L", 128), ("LA", (128, 255)), ("I;16", 128 * 257)):
        data = file(flat(mode, value), "PNG", grey_profile(1.0))
        assert np.abs(np.asarray(decode_image(data))[8, 8] - wanted).max() <= 1.5, mode
    light = from_matrix((128, 128, 128), ADOBE, 1.0)
    grey = file(flat("L", 128), "PNG", matrix_profile(ADOBE, 1.0))  # made grey, with its old profile
    assert np.abs(np.asarray(decode_image(grey))[8, 8] - light).max() <= 1.5
    for node in NODES[:9]:
        data = file(flat("CMYK", tuple(255 * ink for ink in node)), "JPEG", ink_profile())
        assert np.abs(np.asarray(decode_image(data))[8, 8] - from_lab(*inks(node))).max() <= 4, node


def test_srgb_itself_changes_nothing_and_no_profile_is_saved_again() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    drawn = Image.fromarray(np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8))
    for profile in (srgb, None, b""):
        assert decode_image(file(drawn, "PNG", profile)).tobytes() == drawn.tobytes()
    for profile in (srgb, matrix_profile(P3), b"broken"):
        made = open_image(file(drawn, "PNG", profile))
        again = decode_image(encode_image(made.convert("RGBA"), "png"))
        assert again.tobytes() == made.tobytes() and "icc_profile" not in made.info
    assert in_srgb(drawn) is drawn


@pytest.mark.parametrize(
    ("mode", "format", "profile", "words"),
    [
        ("RGB", "PNG", b"broken", "its colour profile cannot be used ("),
        ("RGB", "JPEG", matrix_profile(ADOBE)[:300], "its colour profile cannot be used ("),
        ("RGB", "PNG", grey_profile(1.0), "(it is one of GRAY, and the picture is RGB)"),
        ("CMYK", "JPEG", matrix_profile(ADOBE), "(it is one of RGB, and the picture is CMYK)"),
    ],
)
def test_a_profile_that_cannot_be_used_is_told(mode: str, format: str, profile: bytes, words: str) -> None:
    image = flat(mode, (100, 150, 200, 20)[: len(mode)])
    data = file(image, format, profile)
    with collecting_warnings() as told:
        check_image(data, "control_image")
    [line] = told
    assert line.startswith("control_image: ") and words in line
    assert line.endswith("; its colours are taken as sRGB")
    plain = decode_image(file(image, format, None))
    assert decode_image(data).tobytes() == plain.tobytes()


def test_a_camera_that_names_adobe_rgb_without_a_profile_is_told() -> None:
    for name, expected in (("R03", 1), ("R98", 0)):
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: name}
        data = file(flat("RGB", (9, 9, 9)), "JPEG", None, exif=exif)
        with collecting_warnings() as told:
            check_image(data)
        assert len(told) == expected and all("EXIF data says Adobe RGB" in line for line in told)


def test_frames_of_an_animation() -> None:
    class Info:
        field_name, context = "image", "animations"

    colours = [(200, 60, 60), (90, 160, 80)]
    first, second = (flat("RGB", colour) for colour in colours)
    data = file(first, "WEBP", matrix_profile(ADOBE), save_all=True, append_images=[second])
    frames: Any = check_pictures(data, Info())  # type: ignore[arg-type]
    for frame, colour in zip(frames, colours, strict=True):
        made = np.asarray(decode_image(frame))[8, 8].astype(float)
        assert np.abs(made - from_matrix(colour, ADOBE)).max() <= 2.5
