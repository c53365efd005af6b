"""Pictures and videos to and from bytes. Imports no torch."""

from __future__ import annotations

import io
import os
import tempfile
import wave
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from shared.api.codecs import has_alpha
from shared.api.colours import in_srgb
from shared.api.embedded import Metadata
from shared.api.faults import BROKEN_PICTURE

try:
    import imagecodecs
except ImportError:
    imagecodecs = None  # type: ignore[assignment]  # Pillow makes the same pixels in three to five times the time

# zlib's run lengths take less time than its level 1, for fewer bytes. Pillow tries all filters for each
# row; with Paeth's only, which it mostly takes, files have the same size.
Z_RLE = 3
PAETH = 0x80  # PNG_FILTER_PAETH of libpng
QUALITY = 95  # JPEG and lossy WebP
VIDEO_FILES = ("mp4", "webp", "gif")  # that hold all frames
SHORTEST_GIF = 20  # milliseconds a frame


@dataclass(frozen=True)
class Sound:
    """What is heard with a video."""

    samples: np.ndarray  # int16 [samples, channels]
    rate: int  # samples per second


def open_image(data: bytes) -> Image.Image:
    """Encoded picture -> upright by its EXIF tag, with 8 bits a channel, its colours in sRGB by its profile.

    It keeps its mode, unless its colours are others.
    """
    return in_srgb(_eight_bits(_upright(Image.open(io.BytesIO(data)))))


def decode_image(data: bytes, percent: float | None = None) -> Image.Image:
    """Encoded picture -> RGB, upright by its EXIF tag, resized to `percent` of its size where given."""
    image = open_image(data).convert("RGB")
    if percent is None or percent == 100:
        return image
    size = tuple(max(1, round(side * percent / 100)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)  # type: ignore[arg-type]


def decode_picture(data: bytes, percent: float | None, size: tuple[int, int]) -> Image.Image:
    """`decode_image`, resized to exactly `size` (width, height) where it has another."""
    return _sized(decode_image(data, percent), size)


def decode_mask(data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """Encoded mask -> grey, of `size` where given; white is painted anew.

    Its alpha, unless that is opaque everywhere.
    """
    image = open_image(data)
    if has_alpha(image):
        image = image.convert("RGBA").getchannel("A")
    image = image.convert("L")
    return image if size is None else _sized(image, size)


def paints_nothing(mask: Image.Image) -> bool:
    """Whether a grey mask is nowhere white: pipelines take it as black and white."""
    return not (np.asarray(mask) >= 128).any()


def _sized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except BROKEN_PICTURE:
        return image  # its EXIF data cannot be read


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (a depth map), which Pillow would cut off at 255."""
    if not image.mode.startswith("I"):
        return image
    made = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    made.info = image.info
    return made


def encode(
    pictures: Sequence[Image.Image],
    format: str,
    fps: int | None = None,
    metadata: Metadata | None = None,
    sound: Sound | None = None,
) -> list[bytes]:
    """Pictures as one file each; with `fps` they are a video's frames, and one file where the format can."""
    if fps is not None and format in VIDEO_FILES:
        return [encode_video(pictures, format, fps, metadata, sound)]
    return side_by_side(lambda picture: encode_image(picture, format, metadata), pictures)


def side_by_side(call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`call` of each, in threads where there are several: encoders leave Python's lock."""
    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1)) as pool:
        return list(pool.map(call, items))


def encode_image(image: Image.Image, format: str, metadata: Metadata | None = None) -> bytes:
    """One picture as png, jpeg or webp."""
    if format == "png":
        file = _encode_png(image)
        return file if metadata is None else metadata.in_png(file)
    options: dict[str, Any] = {"quality": QUALITY}
    if metadata is not None:
        options["exif"] = metadata.exif()
    out = io.BytesIO()
    image.save(out, format=format.upper(), **options)
    return out.getvalue()


def _encode_png(image: Image.Image) -> bytes:
    if imagecodecs is not None and image.mode == "RGB":
        return bytes(imagecodecs.png_encode(np.asarray(image), level=1, strategy=Z_RLE, filter=PAETH))
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=1, compress_type=Z_RLE)
    return out.getvalue()


def encode_video(
    frames: Sequence[Image.Image],
    format: str,
    fps: int,
    metadata: Metadata | None = None,
    sound: Sound | None = None,
) -> bytes:
    """Frames as one mp4 (H.264, AAC), gif or animated webp, looping without end where the format can.

    Only a webp of them holds metadata, and only an mp4 sound.
    """
    if format == "mp4":
        return _encode_mp4(frames, fps, sound)
    out = io.BytesIO()
    options: dict[str, Any] = {"quality": QUALITY} if format == "webp" else {"optimize": False}
    if format == "webp" and metadata is not None:
        options["exif"] = metadata.exif().removeprefix(b"Exif\0\0")  # Pillow does so only for single pictures
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


def _encode_mp4(frames: Sequence[Image.Image], fps: int, sound: Sound | None) -> bytes:
    import imageio.v3 as iio

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        heard: dict[str, str] = {}
        if sound is not None:
            heard = {"audio_path": str(Path(folder) / "sound.wav"), "audio_codec": "aac"}
            heard["ffmpeg_log_level"] = "error"  # it warns that two channels are stereo
            with wave.open(heard["audio_path"], "wb") as file:
                file.setparams((sound.samples.shape[1], 2, sound.rate, 0, "NONE", ""))
                file.writeframes(sound.samples.astype("<i2").tobytes())
        # yuv420p needs even sides; every size here is a multiple of 8, so nothing is padded.
        iio.imwrite(
            path,
            np.stack([np.asarray(f.convert("RGB")) for f in frames]),
            fps=fps,
            macro_block_size=2,
            **heard,
        )
        return path.read_bytes()
