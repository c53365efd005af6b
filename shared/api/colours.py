"""Colour profiles of clients' pictures (ICC): Adobe RGB, Display P3 or CMYK become sRGB. Imports no torch."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image, ImageCms

from shared.api.faults import BROKEN_PICTURE

ROUNDING = 2  # of 255: by as much do conversions between two profiles of sRGB change colours
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # by the profile's colour space
_INTEROPERABILITY, _ADOBE_RGB = 1, "R03"  # EXIF's tag, and what cameras write there


class ProfileError(ValueError):
    """A profile that cannot be used for its picture; the message says why."""


def in_srgb(image: Image.Image) -> Image.Image:
    """A picture of 8 bits a channel whose colours are sRGB, by its profile, which it has no longer.

    Without a profile, or with one that cannot be used, its colours stay; so they do where the profile is one
    of sRGB itself. What is transparent stays so.
    """
    if not image.info.get("icc_profile"):
        return image
    try:
        made = _converted(image)
    except ProfileError:
        made = image.copy()
    made.info.pop("icc_profile", None)  # it would be saved with the picture, and applied again
    return made


def colour_problem(image: Image.Image) -> str | None:
    """Why a picture's colours are not read as they are meant, or None."""
    seen = "its colours are taken as sRGB"
    if image.info.get("icc_profile"):
        try:
            _transform(image)
        except ProfileError as error:
            return f"its colour profile cannot be used ({error}); {seen}"
        return None
    try:
        said = image.getexif().get_ifd(ExifTags.IFD.Interop).get(_INTEROPERABILITY)
    except BROKEN_PICTURE:
        return None  # its EXIF data cannot be read
    if said == _ADOBE_RGB:
        return f"its EXIF data says Adobe RGB, but it has no profile; {seen}"
    return None


def _transform(image: Image.Image) -> tuple[str, ImageCms.ImageCmsTransform]:
    """The mode that a picture's profile is for, and the way from there to sRGB. Raises ProfileError."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        space = profile.profile.xcolor_space
        mode = _MODES.get(space)
        grey, inks = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I"), image.mode == "CMYK"
        if mode is None or (mode == "CMYK") != inks or (mode == "L" and not grey):
            raise ProfileError(f"it is one of {space.strip()}, and the picture is {image.mode}")
        how = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        srgb = ImageCms.createProfile("sRGB")
        return mode, ImageCms.buildTransform(profile, srgb, mode, "RGB", *how)
    except (ImageCms.PyCMSError, *BROKEN_PICTURE) as error:  # also the one above, in the same words
        raise ProfileError(str(error)) from None


def _converted(image: Image.Image) -> Image.Image:
    mode, transform = _transform(image)
    if mode != "CMYK" and _changes_little(mode, transform):
        return image.copy()
    made = transform.apply(image if image.mode == mode else image.convert("RGB").convert(mode))
    if image.has_transparency_data:
        made.putalpha(image.convert("RGBA").getchannel("A"))
    return made


def _changes_little(mode: str, transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a conversion leaves colours as they are, but for rounding."""
    values = np.arange(0, 256, 17 if mode == "RGB" else 1, dtype=np.uint8)
    grid = np.stack(np.meshgrid(*[values] * len(mode), indexing="ij"), -1).reshape(1, -1, len(mode))
    before = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
    change = np.asarray(transform.apply(before)).astype(int) - np.asarray(before.convert("RGB")).astype(int)
    return bool(np.abs(change).max() <= ROUNDING)
