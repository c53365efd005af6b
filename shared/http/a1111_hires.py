"""A1111's hires fix: a first pass, its latents or pixels enlarged, and a second pass from them, as one job.

Imports no torch: `shared.pipeline.latents` enlarges, where the latents are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from shared.api.codecs import MAX_SIDE
from shared.api.faults import FieldProblem, RequestError
from shared.api.jobs import SecondPass
from shared.api.media import encode_image
from shared.api.parsing import faults_of_form
from shared.api.requests import GenerateRequest
from shared.http.a1111_img2img import is_img2img
from shared.http.a1111_options import is_nothing
from shared.launch.flags import HostConfig
from shared.launch.wording import shown
from shared.models import ModelSpec

# A1111's upscalers of latents -> mode and antialias of torch.nn.functional.interpolate.
UPSCALERS: dict[str, tuple[str, bool]] = {
    "Latent": ("bilinear", False),
    "Latent (antialiased)": ("bilinear", True),
    "Latent (bicubic)": ("bicubic", False),
    "Latent (bicubic antialiased)": ("bicubic", True),
    "Latent (nearest)": ("nearest", False),
    "Latent (nearest-exact)": ("nearest-exact", False),
}
# Its upscalers of pixels -> Pillow's, with which the second pass is image to image.
PIXEL_UPSCALERS = {"None": "LANCZOS", "Lanczos": "LANCZOS", "Nearest": "NEAREST"}
STRENGTH = 0.7
SCALE = 2.0
_NEEDED = ("width", "height", "latent", "strength", "add_noise")
# An option of the second pass -> the first pass' option that counts where it is left out.
_OF_FIRST = {
    "hr_prompt": "prompt",
    "hr_negative_prompt": "negative_prompt",
    "hr_sampler_name": "sampler_name",
    "hr_scheduler": "scheduler",
    "hr_second_pass_steps": "steps",
    "hr_cfg": "cfg_scale",
}
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "hr_checkpoint_name": ("Use same checkpoint",),
    "hr_additional_modules": (["Use same choices"],),
}
# Options of the second pass that are read as our fields are, and those that are names.
_STRENGTH = "denoising_strength"
_FORMS = {
    _STRENGTH: "strength",
    "hr_second_pass_steps": "steps",
    "hr_cfg": "cfg",
    "hr_prompt": "positive",
    "hr_negative_prompt": "negative",
}
_NAMES = ("hr_upscaler", "hr_sampler_name", "hr_scheduler", "hr_checkpoint_name")
_SAME = ("Use same sampler", "Use same scheduler")
# Checked in the place of what the first pass will make.
_LATENT = safetensors.numpy.save({"latent": np.zeros(1, np.float32)})
_PICTURE = encode_image(Image.new("RGB", (16, 16)), "png")

Check = Callable[[dict[str, Any], dict[str, Any]], GenerateRequest]
"""A1111's options, and more fields of ours -> the request; raises RequestError."""


def served(spec: ModelSpec) -> list[str]:
    """The upscalers of latents that this type can run."""
    able = set(_NEEDED) <= spec.fields and spec.image != "needed"  # txt2img has no picture to give
    return list(UPSCALERS) if able else []


def served_pixels(spec: ModelSpec) -> list[str]:
    """The upscalers of pixels that this type can run."""
    able = is_img2img(spec) and "width" in spec.fields and spec.output == "image"
    return list(PIXEL_UPSCALERS) if able else []


def is_asked(asked: dict[str, Any]) -> bool:
    """Whether a request of txt2img is for the hires fix."""
    return not is_nothing(asked.get("enable_hr"))


def one_pass(asked: dict[str, Any], check: Check) -> GenerateRequest:
    """A request without `enable_hr`, checked: what it says of a second pass does nothing, but can be read.

    Raises:
        RequestError: with the faults of both passes, in A1111's words.
    """
    idle = {name: value for name, value in asked.items() if name.startswith("hr_") and not is_nothing(value)}
    faults = list(_wrong_numbers(idle))
    named = {name: idle[name] for name in _NAMES if not isinstance(idle.get(name, ""), str)}
    faults += [FieldProblem(name, f"must be text, got {shown(value)}") for name, value in named.items()]
    statuses: set[int] = {422} if faults else set()
    for name, ours in _FORMS.items():
        value = (asked if name == _STRENGTH else idle).get(name)
        if value is not None and (wrong := faults_of_form({ours: value})):
            faults.append(FieldProblem(name, wrong[0].problem))
            statuses.add(400)
    try:
        made = check(asked, {})
    except RequestError as error:
        raise RequestError(min({*statuses, error.status}), faults + error.problems) from None
    if faults:
        raise RequestError(min(statuses), faults)
    return made


def two_passes(asked: dict[str, Any], config: HostConfig, check: Check) -> tuple[GenerateRequest, SecondPass]:
    """Both passes of a request with `enable_hr`, checked.

    Raises:
        RequestError: with the faults of both passes, in A1111's words.
    """
    spec, faults, statuses = config.spec, list(_faults(asked, config)), {422}
    upscaler = asked.get("hr_upscaler") or "Latent"
    of_pixels = upscaler in served_pixels(spec)
    if not served(spec) and not served_pixels(spec):
        raise RequestError(422, faults)
    first: GenerateRequest | None = None
    try:
        first = check(asked, {})
    except RequestError as error:
        faults += error.problems
        statuses.add(error.status)
    if not any(problem.field.startswith(("hr_scale", "hr_resize")) for problem in faults):
        size = (first.width or 0, first.height or 0) if first else config.size
        target, covers = _sizes(asked, size)
        if target != covers and max(covers) > MAX_SIDE:
            text = f"and hr_resize_y cut the picture out of {covers[0]}x{covers[1]}, above {MAX_SIDE} a side"
            faults.append(FieldProblem("hr_resize_x", text))
        strength = asked.get("denoising_strength")
        more: dict[str, Any] = {"strength": STRENGTH if strength is None else strength}
        more |= {"image": _PICTURE} if of_pixels else {"latent": _LATENT, "add_noise": True}
        try:
            second = check(_second(asked, target), more)
        except RequestError as error:
            told = [(problem.field, problem.problem) for problem in faults]
            faults += [_named(p, asked) for p in error.problems if (p.field, p.problem) not in told]
            statuses.add(error.status)
        else:
            faults += _no_step(second, spec)
    if faults or first is None:
        raise RequestError(min(statuses), faults)
    width = max(second.width or 0, rounded(covers[0], spec.size_multiple))
    height = max(second.height or 0, rounded(covers[1], spec.size_multiple))
    second = second.model_copy(update={"seed": first.seed})
    refined = first.refiner_start  # of A1111's passes only the second one is refined
    if refined is not None and 1 - (second.strength or 1) < refined:
        second = second.model_copy(update={"refiner_start": refined})
    first = first.model_copy(update={"refiner_start": None if refined is None else 1.0})
    covers = (width, height)
    if of_pixels:
        return first, SecondPass(second, upscaler, PIXEL_UPSCALERS[upscaler], False, "pixels", covers)
    first = first.model_copy(update={"output_format": "latent"})
    return first, SecondPass(second, upscaler, *UPSCALERS[upscaler], spec.latent_layout, covers)


def _faults(asked: dict[str, Any], config: HostConfig) -> Iterator[FieldProblem]:
    spec, checkpoint = config.spec, config.model_id
    names = served(spec) + served_pixels(spec)
    upscaler = asked.get("hr_upscaler") or "Latent"
    if not names:
        missing = next((f"does not support {name}" for name in _NEEDED if name not in spec.fields), "")
        why = missing or "needs an input image, which txt2img does not have"
        yield FieldProblem("enable_hr", f"type {spec.name} ({spec.title}) {why}")
    elif not isinstance(upscaler, str) or upscaler not in names:
        yield FieldProblem("hr_upscaler", f"must be one of {', '.join(names)}; got {shown(upscaler)}")
    for name, nothing in _NOT_SERVED.items():
        if not is_nothing(value := asked.get(name), (*nothing, checkpoint)):
            text = f"is not supported: this host has only the checkpoint {checkpoint!r}; got {shown(value)}"
            yield FieldProblem(name, text)
    yield from _wrong_numbers(asked)


def _wrong_numbers(asked: dict[str, Any]) -> Iterator[FieldProblem]:
    scale = asked.get("hr_scale")
    if scale is not None and not (_is_number(scale) and 0 < scale <= MAX_SIDE):
        yield FieldProblem("hr_scale", f"must be a number above 0 and at most {MAX_SIDE}, got {shown(scale)}")
    for name in ("hr_resize_x", "hr_resize_y"):
        side = asked.get(name) or 0
        if not (_is_number(side) and 0 <= side <= MAX_SIDE and side == int(side)):
            text = f"must be a whole number from 0 to {MAX_SIDE}, got {shown(side)}"
            yield FieldProblem(name, text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rounded(side: int, multiple: int) -> int:
    """The side that the type takes: a multiple, not 0."""
    return max(round(side / multiple), 1) * multiple


def _sizes(asked: dict[str, Any], size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of the picture, and those of the enlarged one that it is cut out of."""
    width, height = size
    x, y = (int(asked.get(name) or 0) for name in ("hr_resize_x", "hr_resize_y"))
    if not x and not y:
        scale = asked.get("hr_scale")
        scale = SCALE if scale is None else scale
        covers = (int(width * scale), int(height * scale))
        return covers, covers
    wide = (x, x * height // width)
    high = (y * width // height, y)
    covers = wide if not y or (x and width / height < x / y) else high
    return (x or covers[0], y or covers[1]), covers


def _second(asked: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The second pass as if it were a request of its own."""
    values = {name: asked[name] for name in _OF_FIRST if _is_given(asked, name)}
    more = {_OF_FIRST[name]: value for name, value in values.items()}
    return asked | more | {"width": size[0], "height": size[1]}


def _is_given(asked: dict[str, Any], name: str) -> bool:
    return bool(asked.get(name)) and asked[name] not in _SAME


def _named(problem: FieldProblem, asked: dict[str, Any]) -> FieldProblem:
    """A fault of the second pass, by the option that brought it."""
    ours = {"positive": "prompt", "negative": "negative_prompt", "cfg": "cfg_scale", "image": "hr_upscaler"}
    field = ours.get(problem.field, problem.field)
    given = next((hr for hr, first in _OF_FIRST.items() if first == field and _is_given(asked, hr)), None)
    if given:
        return FieldProblem(given, problem.problem)
    if field in ("width", "height", "steps"):  # steps as the first pass has them are too many for this size
        own, other = ("hr_resize_y", "hr_resize_x") if field == "height" else ("hr_resize_x", "hr_resize_y")
        name = own if asked.get(own) else other if asked.get(other) else "hr_scale"
        derived = field != "steps" and name != own
        text = f"makes a {field} that {problem.problem}" if derived else problem.problem
        return FieldProblem(name, text)
    return FieldProblem(field, problem.problem)


def _no_step(second: GenerateRequest, spec: ModelSpec) -> list[FieldProblem]:
    """The fault of a second pass whose strength leaves no step, before the first one is run for it."""
    steps, strength = second.steps or 1, second.strength or 1.0
    if spec.scheduler_family.startswith("flow") or int(steps * strength) >= 1:  # flows round up
        return []
    return [FieldProblem("denoising_strength", f"leaves no step to run: {strength:g} of {steps} steps")]
