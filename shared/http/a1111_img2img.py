"""A1111's img2img: its picture, mask and their settings -> fields of POST /generate."""

from __future__ import annotations

import contextlib
from typing import Any

from PIL import Image
from pydantic_core import PydanticCustomError

from shared.api.codecs import MAX_SIDE, check_image, has_alpha, picture_size
from shared.api.faults import FieldProblem
from shared.api.media import encode_image, open_image
from shared.api.parsing import faults_of_form
from shared.api.retouch import (
    JUST_RESIZE,
    Masking,
    Retouched,
    filled,
    flattened,
    mask_of,
    masked,
    resized,
)
from shared.api.sizes import own_size, warn_of_mask, warn_of_own_size, with_aspect
from shared.api.warned import warn
from shared.http.a1111_options import is_nothing
from shared.launch.checks import runs_whole
from shared.launch.flags import HostConfig
from shared.launch.wording import shown
from shared.models import ModelSpec

_IGNORED = "denoising_strength: type {} ({}) ignores it with a picture; left out"
STRENGTH = 0.75  # A1111's default
RESIZE_MODES = ("Just resize", "Crop and resize", "Resize and fill")
FILLS = ("fill", "original")
MAX_BLUR = 256  # pixels
_SIZE = ("width", "height")


def is_img2img(spec: ModelSpec) -> bool:
    """Whether a picture is where the type starts from, as far as `strength` says."""
    return {"image", "strength"} <= spec.fields and spec.image != "needed"


class _Settings:
    """The settings of the picture and its mask, by A1111's names; `problems` has what is wrong with them."""

    def __init__(self, asked: dict[str, Any], spec: ModelSpec) -> None:
        self.problems: list[FieldProblem] = []
        self._asked = asked
        if not is_nothing(asked.get("mask")) and "mask" not in spec.fields:
            self._add("mask", f"type {spec.name} ({spec.title}) does not support mask")
        self.mode = self._whole("resize_mode", JUST_RESIZE, range(4))
        if self.mode >= len(RESIZE_MODES):
            self._add("resize_mode", "must be 0, 1 or 2; 3 resizes latents, not pixels; got 3")
        elif self.mode != JUST_RESIZE and "width" not in spec.fields:
            text = f"must be 0: the picture of type {spec.name} sets the size; got {self.mode}"
            self._add("resize_mode", text)
        elif self.mode != JUST_RESIZE and spec.output == "video" and is_img2img(spec):
            self._add("resize_mode", f"must be 0 for the frames of a video; got {self.mode}")
        if asked.get("mask_round") is False:
            self._add("mask_round", "must be true: a mask is black and white in the latents; got False")
        both = self._whole("mask_blur", 4, range(MAX_BLUR + 1))
        blur = tuple(self._whole(f"mask_blur_{side}", both, range(MAX_BLUR + 1)) for side in "xy")
        fill = self._whole("inpainting_fill", 0, range(4))
        if fill > 1:
            text = f"must be 0 (fill) or 1 (original); 2 and 3 change latents, not pixels; got {fill}"
            self._add("inpainting_fill", text)
        self.fill = fill == 0
        self.masking = Masking(
            blur=(blur[0], blur[1]),
            inverted=self._flag("inpainting_mask_invert", False),
            only_masked=self._flag("inpaint_full_res", True),
            padding=self._whole("inpaint_full_res_padding", 0, range(MAX_SIDE + 1)),
        )

    def _add(self, name: str, text: str) -> None:
        self.problems.append(FieldProblem(name, text))

    def _whole(self, name: str, default: int, allowed: range) -> int:
        value = default if (value := self._asked.get(name)) is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in allowed:
            self._add(name, f"must be a whole number from 0 to {allowed[-1]}, got {shown(value)}")
            return default
        return int(value)

    def _flag(self, name: str, default: bool) -> bool:
        value = default if (value := self._asked.get(name)) is None else value
        if not isinstance(value, int) or value not in (0, 1):
            self._add(name, f"must be true or false, got {shown(value)}")
            return default
        return bool(value)

    def told(self, with_mask: bool) -> dict[str, Any]:
        """In the words of A1111's infotexts; what is its default there is left out."""
        told: dict[str, Any] = {}
        if self.mode != JUST_RESIZE:
            told["Resize mode"] = RESIZE_MODES[self.mode]
        if not with_mask:
            return told
        how, (x, y) = self.masking, self.masking.blur
        if x == y and x:
            told["Mask blur"] = x
        elif x or y:
            told |= {"Mask blur X": x, "Mask blur Y": y}
        if how.inverted:
            told["Mask mode"] = "Inpaint not masked"
        if self.fill:
            told["Masked content"] = FILLS[0]
        if how.only_masked:
            told |= {"Inpaint area": "Only masked", "Masked area padding": how.padding}
        return told


def start(
    asked: dict[str, Any], data: dict[str, Any], config: HostConfig, controlled: bool
) -> tuple[dict[str, Any], Retouched | None, list[FieldProblem]]:
    """The fields of the picture, what was done to it before, and the faults.

    A picture that is only resized goes as it came. Pictures that cannot be read go on too, for the check of
    the request to say so.

    Args:
        asked: in A1111's words.
        data: the other fields, translated; their size is used.
        controlled: whether the picture is the ControlNet's too.
    """
    fields, retouched, problems = _started(asked, data, config, controlled)
    if "strength" in fields and runs_whole(config, "mask" in fields):
        del fields["strength"]
        problems = [*problems, *_idle_strength(asked, config.spec)]
    return fields, retouched, problems


def _started(
    asked: dict[str, Any], data: dict[str, Any], config: HostConfig, controlled: bool
) -> tuple[dict[str, Any], Retouched | None, list[FieldProblem]]:
    """As `start`, with `strength` also where a type only looks at the picture."""
    spec, settings = config.spec, _Settings(asked, config.spec)
    images, mask = asked.get("init_images"), asked.get("mask")
    images = None if images == [None] else images
    if isinstance(images, list) and images and spec.output == "video" and is_img2img(spec):
        # A video's frames, or the one picture of all of them.
        fields = {"image": images[0] if len(images) == 1 else images, "strength": _strength(asked)}
        return fields | ({"control_image": images[0]} if controlled else {}), None, settings.problems
    most = spec.most_pictures if is_nothing(mask) else 1
    if not isinstance(images, list) or not 1 <= len(images) <= most:
        found = len(images) if isinstance(images, list) else "none"
        wanted = "one picture" if most == 1 else f"1 to {most} pictures"
        problem = FieldProblem("init_images", f"must hold {wanted}, got {found}")
        return {}, None, [problem, *settings.problems]
    if len(images) > 1:  # to look at, each in its own size
        return {"image": images, "strength": _strength(asked)}, None, settings.problems
    fields = {"image": images[0]} | ({"control_image": images[0]} if controlled else {})
    if is_img2img(spec):
        fields["strength"] = _strength(asked)
    else:
        settings.problems += _idle_strength(asked, spec)
    if not is_nothing(mask):
        fields["mask"] = mask
    if settings.problems:
        return fields, None, settings.problems
    try:
        image = open_image(check_image(images[0]))
        white = None if is_nothing(mask) else mask_of(open_image(check_image(mask, "mask")))
    except PydanticCustomError:
        return fields, None, []
    if white is not None:
        warn_of_mask(white.size, image.size)
    size = _size(data, image, settings, white is not None, config)
    if not all(_is_side(side) for side in size):
        return fields, None, []
    made = None if white is None else masked(flattened(image), white, size, settings.mode, settings.masking)
    told = settings.told(made is not None)
    if made is not None:
        image, white, paste = made
        if controlled:
            fields["control_image"] = encode_image(image, "png")
        image = filled(image, white) if settings.fill else image
        fields |= {"image": encode_image(image, "png"), "mask": encode_image(white, "png")}
        return fields | dict(zip(_SIZE, size, strict=True)), Retouched(told, paste), []
    if white is not None:
        warn("mask: is blank, so the whole picture is painted, as image to image")
        del fields["mask"]
    if settings.mode == JUST_RESIZE and not has_alpha(image):
        return fields, None, []
    image = flattened(image)
    if settings.mode != JUST_RESIZE:
        image = resized(image, size, settings.mode)
        fields |= dict(zip(_SIZE, size, strict=True))
    fields["image"] = encode_image(image, "png")
    return fields | ({"control_image": fields["image"]} if controlled else {}), Retouched(told), []


def _size(
    data: dict[str, Any], image: Image.Image, settings: _Settings, with_mask: bool, config: HostConfig
) -> tuple[Any, Any]:
    """Width and height of what is painted: as asked, else the picture's own; of a part the launch's."""
    own = image.size
    seen = config.spec.aspect_multiple > 0
    only_masked = with_mask and settings.masking.only_masked
    of_launch = only_masked or (config.spec.image == "needed" and not seen)
    width, height = with_aspect(own, config) if seen else config.size if of_launch else own_size(own, config)
    made = data.get("width", width), data.get("height", height)
    if not (of_launch or seen):
        warn_of_own_size((data.get("width"), data.get("height")), own, made, config)
    return made


def fit_control_image(given: Any, mode: int, data: dict[str, Any], config: HostConfig) -> Any:
    """The control image with the aspect of what is made, or as it was given, where it has that.

    Pipelines stretch it to the size of the picture, so nothing is done where that is wanted.
    """
    own = config.size
    if "image" in data and config.spec.image == "start":  # whose size counts where none is asked for
        with contextlib.suppress(PydanticCustomError):
            start = data["image"][0] if isinstance(data["image"], list) else data["image"]
            own = picture_size(check_image(start))
    width, height = (data.get(name, default) for name, default in zip(_SIZE, own, strict=True))
    if mode == JUST_RESIZE or not all(_is_side(side) for side in (width, height)):
        return given
    try:
        image = open_image(check_image(given, "control_image"))
    except PydanticCustomError:
        return given  # the check of the request says so
    if image.width * height == image.height * width:
        return given
    return encode_image(resized(flattened(image), (width, height), mode), "png")


def _strength(asked: dict[str, Any]) -> Any:
    return STRENGTH if asked.get("denoising_strength") is None else asked["denoising_strength"]


def _idle_strength(asked: dict[str, Any], spec: ModelSpec) -> list[FieldProblem]:
    """Warn of a strength that the type does not take; its fault, where it is none."""
    if (given := asked.get("denoising_strength")) is None:
        return []
    warn(_IGNORED.format(spec.name, spec.title))
    faults = faults_of_form({"strength": given})
    return [FieldProblem("denoising_strength", fault.problem) for fault in faults]


def _is_side(side: Any) -> bool:
    return type(side) is int and 16 <= side <= MAX_SIDE
