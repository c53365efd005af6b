"""Pictures and tensors in requests: base64 to checked bytes. Imports no torch; nothing here unpickles."""

from __future__ import annotations

import base64
import binascii
import io
import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from shared.api.faults import BROKEN_PICTURE
from shared.api.warned import warn

if TYPE_CHECKING:
    from PIL import Image

MAX_SIDE = 8192  # pixels
MAX_FRAMES = 1024  # of one video
MAX_INPUTS = 16  # pictures or scales of one field for adapters
MAX_STEPS = 1000  # of one schedule
MAX_IMAGE_PIXELS = MAX_SIDE * MAX_SIDE
MAX_VIDEO_PIXELS = 2 * MAX_IMAGE_PIXELS  # of all frames of an animation, or all pictures of a list
MAX_ASPECT = 64  # longer ones take much memory where they are resized by their shorter side
ANIMATIONS = "animations"  # context of a validation: a GIF or an animated picture is a list of pictures
IMAGE_INPUTS = ("PNG", "JPEG", "WEBP", "BMP")
TRANSPARENT = "is transparent in part, which is left out: the colours beneath it are seen"
LEFT_OUT = "(left out)"  # in place of pictures and tensors in the body that a picture's metadata holds
TENSOR_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32")


def problem(text: str) -> PydanticCustomError:
    # The text goes through as an argument, because braces in a template would be read as placeholders.
    return PydanticCustomError("problem", "{text}", {"text": text})


def decode_base64(value: Any) -> bytes:
    if not isinstance(value, str):
        raise problem(f"must be base64 text, got {type(value).__name__}")
    if value == LEFT_OUT:
        raise problem("was left out of the picture's metadata: give it again")
    if value[:5].lower() == "data:":
        head, comma, value = value.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise problem("must be base64, or a data: URI with ;base64")
    try:
        data = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise problem(f"is not valid base64 ({error})") from None
    if not data:
        raise problem("is empty")
    return data


def check_image(value: Any, name: str = "image", opaque: bool = False) -> bytes:
    """Base64 or bytes of a picture -> its bytes, fully decoded once.

    Warns of an animation, by `name`, and of transparency, where its colours are used as if it were `opaque`.
    """
    from PIL import Image, UnidentifiedImageError

    from shared.api.colours import colour_problem

    if isinstance(value, list):
        raise problem(f"must be one picture, got a list of {len(value)}")
    data = value if isinstance(value, bytes) else decode_base64(value)
    too_large = ""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_INPUTS) as image:
            found = f"has {image.width}x{image.height} pixels"
            if image.width * image.height > MAX_IMAGE_PIXELS:
                too_large = f"{found}, more than {MAX_SIDE}x{MAX_SIDE}"
            elif max(image.size) > MAX_ASPECT * min(image.size):
                too_large = f"{found}; one side may be at most {MAX_ASPECT} times the other"
            else:
                image.load()
                if image.format != "MPO" and (count := getattr(image, "n_frames", 1)) > 1:
                    warn(f"{name}: is an animation of {count} frames, of which only the first is used")
                if opaque and has_alpha(image):
                    warn(f"{name}: {TRANSPARENT}")
                if colours := colour_problem(image):
                    warn(f"{name}: {colours}")
    except UnidentifiedImageError:
        raise problem("is not a picture; allowed: PNG, JPEG, WebP, BMP") from None
    except (Image.DecompressionBombError, *BROKEN_PICTURE) as error:
        raise problem(f"is a broken picture ({error})") from None
    if too_large:
        raise problem(too_large)
    return data


def _check_list(values: list[Any], name: str) -> list[bytes]:
    pixels, found = 0, []
    for value in values:
        found.append(check_image(value, name, opaque=True))
        pixels += math.prod(picture_size(found[-1]))
        if pixels > MAX_VIDEO_PIXELS:
            text = (
                f"has {pixels} pixels in its first {len(found)} pictures; at most {MAX_VIDEO_PIXELS} in all"
            )
            raise problem(text)
    return found


def check_picture(value: Any, info: ValidationInfo) -> bytes:
    """`check_image` of a field."""
    name = str(info.field_name)
    return check_image(value, name, opaque=name != "mask")


def check_pictures(value: Any, info: ValidationInfo) -> bytes | list[bytes]:
    """`check_image` of one picture, or of each of a list; with the context ANIMATIONS of each of a video."""
    if not isinstance(value, list):
        return (info.context == ANIMATIONS and _frames_of(value, str(info.field_name))) or check_picture(
            value, info
        )
    if not 1 <= len(value) <= MAX_FRAMES:
        raise problem(f"must hold 1 to {MAX_FRAMES} pictures, got {len(value)}")
    return _check_list(value, str(info.field_name))


def _frames_of(value: Any, name: str) -> bytes | list[bytes] | None:
    """The frames of a GIF, of an animated WebP or PNG, each as PNG; None where `value` is none of them."""
    from PIL import Image, ImageSequence

    from shared.api.colours import colour_problem, in_srgb

    data = value if isinstance(value, bytes) else decode_base64(value)
    frames: list[bytes] = []
    too_large = ""
    try:
        with Image.open(io.BytesIO(data), formats=("GIF", "WEBP", "PNG")) as image:
            count = getattr(image, "n_frames", 1)
            if image.format != "GIF" and count < 2:
                return None
            if count > MAX_FRAMES or count * image.width * image.height > MAX_VIDEO_PIXELS:
                size = f"{image.width}x{image.height}"
                too_large = (
                    f"has {count} frames of {size}; at most {MAX_FRAMES}, of {MAX_VIDEO_PIXELS} pixels"
                )
            for frame in () if too_large else ImageSequence.Iterator(image):
                if has_alpha(frame):
                    warn(f"{name}: {TRANSPARENT}")
                if colours := colour_problem(frame):
                    warn(f"{name}: {colours}")
                out = io.BytesIO()
                in_srgb(frame).convert("RGB").save(out, "PNG", compress_level=1)
                frames.append(out.getvalue())
    except (Image.DecompressionBombError, *BROKEN_PICTURE):
        return None  # `check_image` says so
    if too_large:
        raise problem(too_large)
    return frames if len(frames) > 1 else frames[0]


def has_alpha(image: Image.Image) -> bool:
    """Whether some of a picture is transparent."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of a picture that was checked before, upright by its EXIF tag.

    Reads only its header.
    """
    from PIL import ExifTags, Image

    with Image.open(io.BytesIO(data), formats=IMAGE_INPUTS) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        except BROKEN_PICTURE:
            turned = False  # its EXIF data cannot be read
        return (height, width) if turned else (width, height)


def listed(value: Any) -> list[Any]:
    """What a field holds, one, several or nothing, as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def tensor_of(*names: str, optional: tuple[str, ...] = (), most: float = math.inf) -> Any:
    """Validator of base64 safetensors that hold tensors of these names, at most `most` numbers each."""
    import safetensors

    wanted = f"must be base64 of a safetensors file with {' and '.join(repr(n) for n in names)}"

    def check(value: Any) -> bytes:
        data = value if isinstance(value, bytes) else decode_base64(value)
        try:
            tensors = dict(safetensors.deserialize(data))
        except safetensors.SafetensorError as error:
            raise problem(f"{wanted}: {error}") from None
        missing = [n for n in names if n not in tensors]
        extra = [n for n in tensors if n not in (*names, *optional)]
        if missing or extra:
            raise problem(f"{wanted}; got {', '.join(map(repr, tensors)) or 'nothing'}")
        for name, tensor in tensors.items():
            if tensor["dtype"] not in TENSOR_DTYPES:
                raise problem(f"{name!r} must be one of {', '.join(TENSOR_DTYPES)}, got {tensor['dtype']}")
            if not math.prod(tensor["shape"]):
                raise problem(f"{name!r} is empty, shape {list(tensor['shape'])}")
            if (count := math.prod(tensor["shape"])) > most:
                raise problem(f"{name!r} must hold at most {most} numbers, one per step; got {count}")
        return data

    return check


def numbers_in(data: bytes, name: str) -> int:
    """How many numbers a tensor of a safetensors file holds, which was checked before."""
    import safetensors

    return math.prod(dict(safetensors.deserialize(data))[name]["shape"])


def _base64_schema(description: str, **more: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "contentEncoding": "base64", "description": description} | more)


def _several_schema(description: str) -> WithJsonSchema:
    one = {"contentEncoding": "base64", "contentMediaType": "image/*"}
    items = {"type": "string"} | one
    schema = {"type": ["string", "array"], "items": items, "description": description}
    return WithJsonSchema(schema | one)


Picture = Annotated[
    bytes,
    BeforeValidator(check_picture),
    _base64_schema("base64 (or a data: URI) of a PNG, JPEG, WebP or BMP", contentMediaType="image/*"),
]
Pictures = Annotated[
    bytes | list[bytes],
    BeforeValidator(check_pictures),
    _several_schema(
        "base64 (or a data: URI) of a PNG, JPEG, WebP or BMP; for video to video a GIF, an animated WebP, "
        "or a list of pictures, its frames"
    ),
]


def check_images(value: Any, info: ValidationInfo) -> bytes | list[bytes]:
    """As check_picture; of a list each, and of a list of one that one."""
    if not isinstance(value, list):
        return check_picture(value, info)
    if not 1 <= len(value) <= MAX_INPUTS:
        raise problem(f"must be one picture or a list of 1 to {MAX_INPUTS}, got {len(value)}")
    found = _check_list(value, str(info.field_name))
    return found if len(found) > 1 else found[0]


Inputs = Annotated[
    bytes | list[bytes],
    BeforeValidator(check_images),
    _several_schema("base64 (or a data: URI) of a PNG, JPEG, WebP or BMP, or a list of them"),
]
Embeds = Annotated[
    bytes,
    BeforeValidator(tensor_of("embeds", optional=("pooled",))),
    _base64_schema("base64 safetensors with `embeds` (and `pooled`)"),
]
Latent = Annotated[
    bytes, BeforeValidator(tensor_of("latent")), _base64_schema("base64 safetensors with `latent`")
]
Sigmas = Annotated[
    bytes,
    BeforeValidator(tensor_of("sigmas", most=MAX_STEPS)),
    _base64_schema("base64 safetensors with `sigmas`"),
]
Timesteps = Annotated[
    bytes,
    BeforeValidator(tensor_of("timesteps", most=MAX_STEPS)),
    _base64_schema("base64 safetensors with `timesteps`"),
]
