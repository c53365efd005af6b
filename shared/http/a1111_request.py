"""A request of A1111's API -> a body of POST /generate."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from shared.api.a1111_prompts import NotationError, take_networks
from shared.api.a1111_samplers import scheduler_for
from shared.api.codecs import MAX_SIDE
from shared.api.faults import FieldProblem, RequestError
from shared.api.parsing import faults_of_form
from shared.api.requests import MAX_PICTURES, MAX_SKIP
from shared.api.retouch import Retouched
from shared.api.warned import warn
from shared.http import a1111_img2img as img2img
from shared.http.a1111_hires import rounded
from shared.http.a1111_options import check_options, warn_of_unread
from shared.http.dispatch import ApiError
from shared.launch.flags import HostConfig
from shared.launch.wording import shown

OURS = {
    "prompt": "positive",
    "negative_prompt": "negative",
    "steps": "steps",
    "cfg_scale": "cfg",
    "seed": "seed",
    "width": "width",
    "height": "height",
}
# Options that may do nothing, but must make sense, and our fields that are read as they are; 0 is nothing.
_IDLE = {"subseed": "seed", "refiner_switch_at": "refiner_start"}
_FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
_VIDEO_FORMATS = {"gif": "gif", "webp": "webp"}
_TITLE = re.compile(
    r"(\.safetensors|\.sft|\.ckpt)?( \[[0-9a-f]+\])?$"
)  # what A1111 writes behind a model's name


@dataclass(frozen=True)
class Translated:
    """A body of POST /generate, and what was done to its picture before."""

    data: dict[str, Any]
    retouched: Retouched | None = None


def check_model(wanted: Any, name: str) -> None:
    """Raise ApiError 422 for another checkpoint than the launch's, by its name or by A1111's title of it."""
    title = _TITLE.sub("", wanted, count=1) if isinstance(wanted, str) else wanted
    if name not in (wanted, title) and wanted not in (None, ""):
        raise ApiError(422, f"this host has only the checkpoint {name!r}; got {shown(wanted)}")


def _refined(asked: dict[str, Any], config: HostConfig) -> dict[str, Any]:
    """Where the refiner starts: "None" for it means none, none given the launch's own.

    Raises:
        ApiError: 422, another refiner than the launch's.
    """
    wanted, at = asked.get("refiner_checkpoint"), asked.get("refiner_switch_at")
    if wanted in (None, ""):
        return {}
    if str(wanted).lower() == "none":
        return {"refiner_start": 1.0} if config.refiner else {}
    if not config.refiner_id:
        raise ApiError(
            422, f"refiner_checkpoint: the host was started without --refiner; got {shown(wanted)}"
        )
    check_model(wanted, config.refiner_id)
    start = config.spec.refiner_start if at is None else at
    return {"refiner_start": start or 1.0}  # theirs is 0 where it is off


def translate(
    asked: dict[str, Any], config: HostConfig, samplers: dict[str, str], with_image: bool
) -> Translated:
    """A1111's keys -> a body of POST /generate.

    Raises:
        ApiError, RequestError: 422 where this host cannot serve what was asked.
    """
    spec, problems = config.spec, []
    overrides = asked.get("override_settings")
    overrides = overrides if isinstance(overrides, dict) else {}
    check_model(overrides.get("sd_model_checkpoint"), config.model_id)
    data = {ours: asked[theirs] for theirs, ours in OURS.items() if asked.get(theirs) is not None}
    problems += _notation(data, bool(asked.get("disable_extra_networks")))
    if overrides.get("enable_pnginfo") is False:
        data["metadata"] = False
    for side in ("width", "height"):
        if side not in spec.fields:
            data.pop(side, None)
        elif type(value := data.get(side)) is int and spec.size_multiple <= value <= MAX_SIDE:
            data[side] = rounded(value, spec.size_multiple)
            if data[side] != value:
                warn(f"{side}: {value} is made {data[side]}, a multiple of {spec.size_multiple}")
    warn_of_unread(asked, overrides, with_image)
    data |= _skipped(asked, overrides, config, problems)
    data |= _format(overrides, config, problems)
    scheduler, problem = scheduler_for(asked, samplers)
    if scheduler:
        data["scheduler"] = scheduler
    if problem:
        problems.append(problem)
    for theirs, ours in _IDLE.items():
        faults = faults_of_form({ours: asked.get(theirs) or None})
        problems += [FieldProblem(theirs, fault.problem) for fault in faults]
    data |= _refined(asked, config)
    options = check_options(asked, config, with_image)
    data |= options.data
    problems += options.problems
    counts = [1 if asked.get(key) is None else asked[key] for key in ("batch_size", "n_iter")]
    pictures = 1
    for key, count in zip(("batch_size", "n_iter"), counts, strict=True):
        if type(count) is not int or not 1 <= count <= MAX_PICTURES:
            problems.append(FieldProblem(key, f"must be 1 to {MAX_PICTURES}, got {shown(count)}"))
        else:
            pictures *= count
    if pictures > MAX_PICTURES:
        problems.append(
            FieldProblem("n_iter", f"times batch_size must be at most {MAX_PICTURES}, got {pictures}")
        )
    retouched = None
    controlled = any(image is None for image, _ in options.controls)
    if with_image:
        fields, retouched, faults = img2img.start(asked, data, config, controlled)
        data |= fields
        problems += faults
    if problems:
        raise RequestError(422, problems)
    own = data.pop("control_image", None)
    images = [
        own if image is None else img2img.fit_control_image(image, mode, data, config)
        for image, mode in options.controls
    ]
    if any(made is not given for made, (given, _) in zip(images, options.controls, strict=True) if given):
        retouched = retouched or Retouched()
    if images:
        data["control_image"] = images if len(images) > 1 else images[0]
    data["pictures"] = pictures
    return Translated(data, retouched)


def _skipped(
    asked: dict[str, Any], overrides: dict[str, Any], config: HostConfig, problems: list[FieldProblem]
) -> dict[str, Any]:
    """CLIP's skipped layers; theirs counts the last layer as 1."""
    name = "clip_skip" if overrides.get("CLIP_stop_at_last_layers") is None else "CLIP_stop_at_last_layers"
    skip = {**asked, **overrides}.get(name)
    if skip is None:
        return {}
    if type(skip) is not int or not 0 <= skip <= MAX_SKIP + 1:
        problems.append(
            FieldProblem(name, f"must be a whole number from 1 to {MAX_SKIP + 1}, got {shown(skip)}")
        )
    elif skip > 1 and "clip_skip" in config.spec.fields:
        return {"clip_skip": skip - 1}
    elif skip > 1:
        warn(f"{name}: has no effect on type {config.type} ({config.spec.title})")
    return {}


def _format(overrides: dict[str, Any], config: HostConfig, problems: list[FieldProblem]) -> dict[str, Any]:
    """The format of the answer's pictures; videos are GIFs where they ask for none."""
    wanted = overrides.get("samples_format")
    formats = _VIDEO_FORMATS if config.spec.output == "video" else _FORMATS
    if wanted is None or (wanted == "png" and config.spec.output == "video"):
        return {"output_format": "gif"} if config.spec.output == "video" else {}
    if not isinstance(wanted, str) or wanted not in formats:
        text = f"must be one of {', '.join(formats)}; got {shown(wanted)}"
        problems.append(FieldProblem("override_settings.samples_format", text))
        return {}
    return {"output_format": formats[wanted]}


def _notation(data: dict[str, Any], without_loras: bool) -> list[FieldProblem]:
    """Mark the prompts as A1111's and take the LoRAs out of them; what cannot be read."""
    problems = []
    for theirs, ours in (("prompt", "positive"), ("negative_prompt", "negative")):
        if not isinstance(text := data.get(ours), str) or not text:
            continue
        try:
            taken = take_networks(text)
        except NotationError as error:
            problems.append(FieldProblem(theirs, str(error)))
            continue
        data[ours], data["prompt_syntax"] = taken.text, "a1111"
        if without_loras:
            continue
        if taken.loras and ours == "positive":
            data["lora_scales"] = taken.loras
        elif taken.loras:
            warn(f"{theirs}: LoRAs are read only in the prompt; left out: {', '.join(taken.loras)}")
        for scale in taken.left_out:
            warn(f"{theirs}: a LoRA takes only one scale; left out: {scale}")
    return problems
