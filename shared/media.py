"""Pictures and videos to and from bytes. Imports no torch."""

from __future__ import annotations

import io
import itertools
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Z_RLE = 3  # of zlib's strategies: run lengths and Huffman codes, of which a picture gains most, the fastest
PAETH = 4  # of PNG's filters
STRIP = 1 << 17  # bytes of a picture that are worth a thread
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ZLIB_HEADER = b"\x78\x01"  # a window of 32 KiB
QUALITY = 95  # JPEG and lossy WebP
VIDEO_FILES = ("mp4", "gif", "webp")
SHORTEST_GIF = 20  # milliseconds a frame


def decode_image(data: bytes, percent: float | None = None) -> Image.Image:
    """Encoded picture -> RGB, upright by its EXIF tag, resized to `percent` of its size where given."""
    image = _eight_bits(_upright(Image.open(io.BytesIO(data)))).convert("RGB")
    if percent is None or percent == 100:
        return image
    size = tuple(max(1, round(side * percent / 100)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)  # type: ignore[arg-type]


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, struct.error, ValueError, TypeError, KeyError, OSError):
        return image  # its EXIF data cannot be read


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (a depth map), which Pillow would cut off at 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))


def encode(pictures: Sequence[Image.Image], format: str, fps: int | None = None) -> list[bytes]:
    """Pictures as one file each; with `fps` they are a video's frames, and one file where the format can."""
    if fps is not None and format in VIDEO_FILES:
        return [encode_video(pictures, format, fps)]
    return side_by_side(lambda picture: encode_image(picture, format), pictures)


def side_by_side(call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`call` of each, in threads where there are several: zlib, numpy and Pillow leave Python's lock."""
    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1)) as pool:
        return list(pool.map(call, items))


def encode_image(image: Image.Image, format: str) -> bytes:
    """One picture as png, jpeg or webp."""
    if format == "png":
        return _encode_png(np.asarray(image.convert("RGB")))
    out = io.BytesIO()
    image.save(out, format=format.upper(), quality=QUALITY)
    return out.getvalue()


def _encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [height, width, 3] as PNG, in strips of rows that all cores filter and deflate side by side.

    Pillow tries five filters for each row, on one core: 75 to 155 ms for 1024², a sixth of a fast request.
    Paeth's, which it mostly takes, gives files of the same size alone. Formats: RFC 2083 section 6.6 (the
    filter), RFC 1950 (the stream), RFC 1951 (a strip ends at a whole byte, by a flush).
    """
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, 3 * width)
    count = min(os.cpu_count() or 1, height, 1 + pixels.size // STRIP)
    bounds = [height * number // count for number in range(count + 1)]
    above = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    strips = [(rows[top:end], above[top:end]) for top, end in itertools.pairwise(bounds)]
    checksum, body = 1, []
    for filtered, deflated in side_by_side(lambda strip: _deflate(_filter(*strip)), strips):
        checksum = zlib.adler32(filtered, checksum)
        body.append(deflated)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    end = zlib.compressobj(wbits=-15).flush() + struct.pack(">I", checksum)
    chunks = [(b"IHDR", header), (b"IDAT", ZLIB_HEADER), *((b"IDAT", data) for data in body), (b"IDAT", end)]
    return PNG_SIGNATURE + b"".join(_chunk(*chunk) for chunk in (*chunks, (b"IEND", b"")))


def _filter(rows: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Each byte less Paeth's guess from its neighbours left, above and between: uint8 [rows, 1 + bytes]."""
    up = above.astype(np.int16)
    left, corner = np.zeros_like(up), np.zeros_like(up)
    left[:, 3:], corner[:, 3:] = rows[:, :-3], up[:, :-3]
    to_left, to_up = up - corner, left - corner  # of left + up - corner
    to_corner = np.abs(to_left + to_up)
    np.abs(to_left, out=to_left)
    np.abs(to_up, out=to_up)
    near = np.where(to_up <= to_corner, up, corner)
    guess = np.where((to_left <= to_up) & (to_left <= to_corner), left, near)
    filtered = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = PAETH
    np.subtract(rows, guess.astype(np.uint8), out=filtered[:, 1:])
    return filtered


def _deflate(filtered: np.ndarray) -> tuple[np.ndarray, bytes]:
    """The rows, and their part of the deflated stream."""
    stream = zlib.compressobj(1, wbits=-15, memLevel=9, strategy=Z_RLE)
    return filtered, stream.compress(filtered.data) + stream.flush(zlib.Z_SYNC_FLUSH)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def encode_video(frames: Sequence[Image.Image], format: str, fps: int) -> bytes:
    """Frames as one mp4 (H.264), gif or animated webp, looping without end where the format can."""
    if format == "mp4":
        return _encode_mp4(frames, fps)
    out = io.BytesIO()
    options = {"quality": QUALITY} if format == "webp" else {"optimize": False}
    # Browsers show a gif's frame for a tenth of a second when it asks for less than a fiftieth.
    shortest = SHORTEST_GIF if format == "gif" else 1
    frames[0].save(
        out,
        format=format.upper(),
        save_all=True,
        append_images=list(frames[1:]),
        duration=max(round(1000 / fps), shortest),
        loop=0,
        **options,
    )
    return out.getvalue()


def _encode_mp4(frames: Sequence[Image.Image], fps: int) -> bytes:
    import imageio.v3 as iio

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        # yuv420p needs even sides; every size here is a multiple of 8, so nothing is padded.
        iio.imwrite(
            path, np.stack([np.asarray(f.convert("RGB")) for f in frames]), fps=fps, macro_block_size=2
        )
        return path.read_bytes()
