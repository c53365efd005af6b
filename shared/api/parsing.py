"""From the JSON of a body to a checked request: the checks against the launch, all faults at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as PydanticError

from shared.api.a1111_prompts import NotationError, parse
from shared.api.codecs import ANIMATIONS, MAX_SIDE, listed, picture_size
from shared.api.faults import FieldProblem, RequestError
from shared.api.requests import (
    COMMON_FIELDS,
    IMAGE_FORMATS,
    MIME_TYPES,
    NEEDS_FLAG,
    VIDEO_FORMATS,
    GenerateRequest,
    Scale,
    json_value,
    size_of,
)
from shared.launch.checks import runs_whole, scheduler_problem, start_problem, too_long
from shared.launch.flags import HostConfig
from shared.launch.wording import MAX_VALUE, cut, shown
from shared.models.spec import Kind

MAX_VALUES = 200_000  # in the JSON of a body: a picture is one, an empty object takes 64 bytes of memory


def parse_request(body: bytes, config: HostConfig, accept: str | None = None) -> GenerateRequest:
    """Parse, check against the launch, and fill in defaults.

    Args:
        body: JSON text, UTF-8.
        accept: output format asked for by the Accept header, if any.

    Raises:
        RequestError: 400 with all faults of form at once, else 422 with all that this launch cannot serve.
    """
    return check_request(parse_object(body), config, accept)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises RequestError with status 400."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise RequestError(400, [FieldProblem("", f"the body holds more than {MAX_VALUES} values")])
    try:
        data = json_value(body)
    except ValueError as error:
        raise RequestError(400, [FieldProblem("", f"the body is not valid JSON: {error}")]) from None
    if not isinstance(data, dict):
        found = type(data).__name__
        raise RequestError(400, [FieldProblem("", f"the body must be a JSON object, got {found}")])
    return data


def check_request(data: dict[str, Any], config: HostConfig, accept: str | None = None) -> GenerateRequest:
    """`parse_request` for a JSON object that is parsed already. Raises RequestError.

    A fault in one field hides none in another: with status 400 come the 422 faults of the other fields too.
    """
    bad: list[FieldProblem] = []
    taken = config.spec.fields | COMMON_FIELDS
    bad += _unknown(data, GenerateRequest, taken)
    data = {k: v for k, v in data.items() if k in GenerateRequest.model_fields}
    context = ANIMATIONS if config.spec.output == "video" and config.spec.image == "start" else None
    try:
        request = GenerateRequest.model_validate(data, context=context)
    except PydanticError as error:
        bad += _problems_of(error)
        faulty = {str(fault["loc"][0]) for fault in error.errors(include_url=False, include_input=False)}
        sound = {k: v for k, v in data.items() if k not in faulty}
        request = GenerateRequest.model_validate(sound, context=context)
    else:
        faulty = set()
    bad += [p for p in _bad_values(request, config) if p.field in taken and not p.needs & faulty]
    unserved = [p for p in _not_served(request, config, accept) if p.field not in faulty]
    if bad:
        raise RequestError(400, bad + unserved)
    if unserved:
        raise RequestError(422, unserved)
    return request.filled(config, accept)


def faults_of_form(values: dict[str, Any]) -> list[FieldProblem]:
    """What is wrong with values of GenerateRequest's fields, each on its own."""
    try:
        GenerateRequest.model_validate(values)
    except PydanticError as error:
        return _problems_of(error)
    return []


def _unknown(data: dict[str, Any], model: type[BaseModel], allowed: Iterable[str]) -> list[FieldProblem]:
    """A fault for each name that the model has not; pydantic would take seconds to say so of 100,000."""
    unknown = [FieldProblem(name, "unknown field") for name in data if name not in model.model_fields]
    if unknown:  # reported once
        name = unknown[0].field
        near = difflib.get_close_matches(cut(name, MAX_VALUE), allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        unknown[0] = FieldProblem(name, f"unknown field; {hint}allowed: {', '.join(sorted(allowed))}")
    return unknown


def _problems_of(error: PydanticError) -> list[FieldProblem]:
    problems: dict[str, str] = {}
    for fault in error.errors(include_url=False, include_context=False):
        name = ".".join(cut(str(part), MAX_VALUE) for part in fault["loc"])
        if fault["type"] == "problem":
            text = fault["msg"]
        else:
            text = f"{_wording(fault['msg'])}, got {shown(fault['input'])}"
        problems[name] = f"{problems[name]}; or {text}" if name in problems else text
    return [FieldProblem(name, text) for name, text in problems.items()]


def _wording(message: str) -> str:
    """Pydantic's message in this API's words: "must be at least 1"."""
    for theirs, ours in (
        ("Input should", "must"),
        ("String should", "must"),
        ("Field required", "is needed"),
        ("greater than or equal to", "at least"),
        ("less than or equal to", "at most"),
        ("greater than", "above"),
        ("less than", "below"),
    ):
        message = message.replace(theirs, ours)
    return message


def _bad_values(request: GenerateRequest, config: HostConfig) -> list[FieldProblem]:
    problems: list[FieldProblem] = []

    def add(name: str, problem: str, *needs: str) -> None:
        problems.append(FieldProblem(name, problem, frozenset((name, *needs))))

    multiple = config.spec.size_multiple
    for name in ("width", "height"):
        value = getattr(request, name)
        if value is not None and value % multiple:
            add(name, f"must be a multiple of {multiple} for {config.type}, got {value}")
    words = {n: v for n in STRENGTH if (v := getattr(request, n)) is not None}
    name, strength = next(iter(words.items()), ("strength", None))
    start, end = request.denoising_start or 0.0, request.denoising_end
    if len(set(words.values())) > 1:
        add(
            "denoise",
            "means the same as strength, but they differ: {strength} and {denoise}".format(**words),
            *STRENGTH,
        )
    if strength is not None and start:
        add(name, "give strength or denoising_start, not both", *STRENGTH, "denoising_start")
    elif strength == 0:
        add(name, "must be above 0, or no step is left to run; got 0")
    elif strength is not None and strength < 1 and request.mask is not None and runs_whole(config, True):
        add(
            name, f"type {config.type} with a mask and --control_net runs all steps; got {strength:g}", "mask"
        )
    elif strength is not None and strength < 1 and request.latent is None and not _begins(request, config):
        wanted, lacks = ("a latent", "no latent")
        if config.spec.refers and "mask" in config.spec.fields:
            wanted, lacks = ("an image with a mask or a latent", "neither")
        elif config.spec.image == "start" and not config.spec.refers:
            wanted, lacks = ("an image or a latent", "neither")
        text = f"below 1 needs {wanted} to start from; got {strength:g} and {lacks}"
        add(name, text, "latent", "image", "mask")
    if isinstance(request.image, list):
        if not (request.starts(config) and config.spec.output == "video"):
            most = config.spec.most_pictures if request.mask is None else 1
            wanted = "one picture" if most == 1 else f"at most {most} pictures"
            beside = "" if request.mask is None else " with a mask"
            if (count := len(request.image)) > most:
                add("image", f"must be {wanted}{beside} for type {config.type}, got a list of {count}")
        elif request.frames not in (None, len(request.image)):
            add(
                "frames",
                f"must be {len(request.image)}, the pictures of image; got {request.frames}",
                "image",
            )
    if config.spec.image == "begins" and None not in (request.image, request.latent):
        add("latent", "give image or latent, not both", "image")
    if request.mask is not None and request.image is None:
        add("mask", "needs the image that it is a mask of; got no image", "image")
    if _begins(request, config):
        for name, given in (
            ("latent", request.latent is not None),
            ("denoising_start", start > 0),
            ("denoising_end", end not in (None, 1.0)),
        ):
            if given:
                add(name, f"give image or {name}, not both", "image")
    if max(size := size_of(request, config)) > MAX_SIDE:
        text = "makes {}x{} pixels, more than {} a side; give width and height".format(*size, MAX_SIDE)
        add("control_image" if request.image is None else "image", text, "width", "height")
    if end is not None and start >= end:
        add("denoising_end", f"must be above denoising_start {start:g}, got {end:g}", "denoising_start")
    elif start >= 1:
        add("denoising_start", "must be below 1, or no step is left to run; got 1")
    for name in ("denoising_start", "denoising_end", "mask"):  # diffusers' refiner knows no mask
        if getattr(request, name) is not None and (request.refiner_start or 1) < 1:
            add("refiner_start", f"give refiner_start or {name}, not both", name)
    if request.add_noise and (request.latent is None or not (start or strength)):
        missing = ("latent",) if request.latent is None else (*STRENGTH, "denoising_start")
        add("add_noise", "needs latent and strength", *missing)
    if request.sigmas is not None and request.timesteps is not None:
        add("timesteps", "give sigmas or timesteps, not both")
    for name in ("positive", "negative") if request.prompt_syntax else ():
        try:
            parse(getattr(request, name) or "")
        except NotationError as error:
            add(name, str(error))
    for name in ("positive", "negative"):
        if getattr(request, name) is not None and getattr(request, f"{name}_embeds") is not None:
            add(f"{name}_embeds", f"give {name} or {name}_embeds, not both")
    for name in ("image", "ip_image", "control_image"):
        pictures, percent = listed(getattr(request, name)), getattr(request, f"{name}_scale")
        if percent is None:
            continue
        if not pictures:
            add(f"{name}_scale", f"there is no {name} to scale", name)
            continue
        sides = max(map(picture_size, pictures), key=max)
        if max(sides) * percent / 100 > MAX_SIDE:
            add(
                f"{name}_scale",
                f"makes {sides[0]}x{sides[1]} pixels larger than {MAX_SIDE} a side; got {percent:g} percent",
            )
    for name, what, count in (
        ("control_image", "a picture", len(config.control_net or ())),
        ("controlnet_scale", "a scale", len(config.control_net or ())),
        ("ip_image", "a picture", len(config.ip_adapter or ())),
        ("ip_adapter_scale", "a scale", len(config.ip_adapter or ())),
    ):
        number = len(listed(getattr(request, name)))
        shared = name == "ip_image" and count == 1 and config.spec.ip_adapter_takes == "several"
        if not count or number <= 1 or number == count or shared:
            continue
        kind = "ControlNet" if name.startswith("control") else "IP-Adapter"
        each = f"{what} for each of the {count} {kind}s, or one for all"
        add(name, f"must be {each if count > 1 else f'one for the {kind}'}; got {number}")
    return problems


STRENGTH = ("strength", "denoise")  # two names of one field


def _begins(request: GenerateRequest, config: HostConfig) -> bool:
    """Whether what is made starts from the request's picture, of which `strength` is left out."""
    return request.starts(config) and not runs_whole(config, request.mask is not None)


def _truly_guided(request: GenerateRequest) -> bool:
    """Whether guidance is computed with a negative prompt although the model has it distilled in."""
    return (request.true_cfg_scale or 1.0) > 1


def _not_served(request: GenerateRequest, config: HostConfig, accept: str | None) -> list[FieldProblem]:
    spec = config.spec
    problems = []
    for name in sorted(request.model_fields_set):
        if getattr(request, name) is None:
            continue
        if name not in spec.fields | COMMON_FIELDS:
            problems.append(FieldProblem(name, f"type {spec.name} ({spec.title}) does not support {name}"))
        elif (flag := NEEDS_FLAG.get(name)) and not getattr(config, flag):
            problems.append(FieldProblem(name, f"the host was started without --{flag}"))
        elif name.startswith("negative") and spec.guidance_branches == 1 and not _truly_guided(request):
            given = request.true_cfg_scale or "none"
            text = f"type {spec.name} ignores a negative prompt unless true_cfg_scale is above 1; got {given}"
            problems.append(FieldProblem(name, text))
    if spec.image == "needed" and request.image is None:
        problems.append(FieldProblem("image", f"type {spec.name} ({spec.title}) needs an input image"))
    if fault := _no_start(request, config):
        problems.append(fault)
    painting = spec.start("inpaint", control=True) if request.mask is not None else None
    sees_control = painting is None or painting.control_image is not None
    if config.control_net and sees_control and request.control_image is None:
        problems.append(FieldProblem("control_image", "is needed: the host was started with --control_net"))
    allowed = IMAGE_FORMATS if spec.output == "image" else VIDEO_FORMATS
    wanted = request.output_format or accept
    if wanted is not None and wanted not in allowed:
        problems.append(
            FieldProblem("output_format", f"type {spec.name} makes {', '.join(allowed)}; got {shown(wanted)}")
        )
    if request.return_latent and accept is not None:
        text = f"needs a JSON answer, but Accept allows only {MIME_TYPES.get(accept, accept)}"
        problems.append(FieldProblem("return_latent", text))
    if (count := request.pictures or 1) > 1:
        if accept is not None:
            text = f"must be 1 because Accept allows only {MIME_TYPES.get(accept, accept)}; got {count}"
            problems.append(FieldProblem("pictures", text))
        if spec.output == "video" and (wanted or "png") == "png":
            text = (
                f"must be 1 for a video as a list of png, got {count}; mp4, gif and webp hold a whole video"
            )
            problems.append(FieldProblem("pictures", text))
    if rest := ((request.frames or 1) - 1) % spec.frames_factor:
        near = [(request.frames or 1) - rest, (request.frames or 1) - rest + spec.frames_factor]
        text = f"must be a multiple of {spec.frames_factor}, and 1 more; got {request.frames}, near it are "
        problems.append(FieldProblem("frames", text + " and ".join(map(str, near))))
    if (request.steps or spec.steps) < spec.least_steps:
        text = f"must be at least {spec.least_steps} for type {spec.name}, got {request.steps}"
        problems.append(FieldProblem("steps", text))
    if fault := _too_much(request, config):
        problems.append(fault)
    problems += _too_long(request, config)
    if request.scheduler is not None and (problem := scheduler_problem(spec, request.scheduler)):
        problems.append(FieldProblem("scheduler", problem))
    return problems


def _no_start(request: GenerateRequest, config: HostConfig) -> FieldProblem | None:
    """The fault of a picture to start from, or of a mask, where diffusers has no pipeline for the launch."""
    if not request.starts(config):
        return None
    kind: Kind = "image" if request.mask is None else "inpaint"
    problem, name = start_problem(config, kind), "image" if kind == "image" else "mask"
    if problem is not None:
        return FieldProblem(name, problem)
    start, (width, height) = config.spec.start(kind, bool(config.control_net)), size_of(request, config)
    if start is None or start.most_pixels is None or width * height <= start.most_pixels:
        return None
    most = math.isqrt(start.most_pixels)
    text = f"must be of at most {most} x {most} pixels for type {config.type}; got {width} x {height}"
    return FieldProblem(name, text)


def _too_much(request: GenerateRequest, config: HostConfig) -> FieldProblem | None:
    """The fault of a picture that would keep the ranks for longer than the launch allows."""
    spec, (width, height) = config.spec, size_of(request, config)
    listed_frames = len(request.image) if isinstance(request.image, list) else None
    steps, frames = request.steps or spec.steps, request.frames or listed_frames or spec.frames or 1
    work = width * height * frames * steps
    if work <= config.max_pixel_steps:
        return None
    names = ("steps", "frames", "width", "height", "image")
    name = next((n for n in names if getattr(request, n)), "steps")
    given = f"{width} x {height} pixels x {frames} frames x {steps} steps = {work}"
    return FieldProblem(name, f"{given} exceeds this launch's --max_pixel_steps={config.max_pixel_steps}")


def _too_long(request: GenerateRequest, config: HostConfig) -> list[FieldProblem]:
    """The faults of sides that the checkpoint has no positions for: given ones, or a picture's."""
    picture = "control_image" if request.image is None else "image"
    faults: dict[str, str] = {}
    for name, side in zip(("width", "height"), size_of(request, config), strict=True):
        if problem := too_long(config, side):
            given = getattr(request, name) is not None
            faults[name if given else picture] = problem if given else f"makes a {name} that {problem}"
    return [FieldProblem(name, text) for name, text in faults.items()]


class LoraChange(BaseModel):
    """Body of POST and DELETE /lora. `path` is a file on the host's machines."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    path: Annotated[str, Field(min_length=1, max_length=4096)]
    scale: Scale = 1.0


class LoraEntry(BaseModel):
    """One LoRA in use. The numbers of layers are known once a LoRA was added or removed."""

    path: str
    scale: float
    layers: int | None = None
    layers_left_out: int | None = None


class LoraAnswer(BaseModel):
    """Answer of GET, POST and DELETE /lora: the LoRAs in use after the change."""

    message: str = "OK"
    loras: list[LoraEntry]


def parse_lora_change(body: bytes) -> LoraChange:
    """Parse the body of POST and DELETE /lora. Raises RequestError 400."""
    data = parse_object(body)
    faults = _unknown(data, LoraChange, LoraChange.model_fields)
    try:
        change = LoraChange.model_validate({k: v for k, v in data.items() if k in LoraChange.model_fields})
    except PydanticError as error:
        faults += _problems_of(error)
    if faults:
        raise RequestError(400, faults)
    return change
