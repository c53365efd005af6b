"""What a client asks and what it gets: the request and reply models, and the checks against a launch.

Imports no torch: images stay encoded bytes and tensors stay safetensors bytes until they reach the ranks.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic import ValidationError as PydanticError
from pydantic_core import from_json

from shared.api.a1111_prompts import NotationError, parse
from shared.api.codecs import (
    MAX_SIDE,
    MAX_STEPS,
    Embeds,
    Latent,
    Picture,
    Sigmas,
    Timesteps,
    picture_size,
    problem,
)
from shared.api.embedded import Metadata
from shared.api.media import encode
from shared.api.warned import merged, with_warnings
from shared.launch.checks import scheduler_problem
from shared.launch.flags import HostConfig
from shared.launch.wording import MAX_VALUE, cut, shown

IMAGE_FORMATS = ("png", "jpeg", "webp", "latent")
MAX_VALUES = 200_000  # in the JSON of a body: a picture is one, an empty object takes 64 bytes of memory
VIDEO_FORMATS = ("png", "mp4", "gif", "webp", "latent")
MIME_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "mp4": "video/mp4",
}


@dataclass(frozen=True)
class FieldProblem:
    """One fault of a request: `field` is its name, `problem` says what is allowed and what was given."""

    field: str
    problem: str
    needs: frozenset[str] = frozenset()  # fields that must be sound for this fault to be told

    def __post_init__(self) -> None:
        object.__setattr__(self, "field", cut(self.field, MAX_VALUE))
        object.__setattr__(self, "problem", cut(self.problem))


MAX_TOLD = 20  # faults of one request


def all_faults(texts: Sequence[str], total: int | None = None) -> str:
    """The first faults in one line, and how many more there are of `total`."""
    told, total = list(texts[:MAX_TOLD]), len(texts) if total is None else total
    if total > len(told):
        told.append(f"and {total - len(told)} more faults")
    return "; ".join(told)


class RequestError(ValueError):
    """A refused request. `status` is 400 (bad request) or 422 (this model or launch cannot serve it)."""

    def __init__(self, status: int, problems: list[FieldProblem]) -> None:
        self.status = status
        self.problems = problems
        told = [f"{p.field}: {p.problem}" if p.field else p.problem for p in problems[:MAX_TOLD]]
        super().__init__(all_faults(told, len(problems)))


def _check_scheduler(value: Any) -> Any:
    """A name or an object; like the flag, the object may come as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = from_json(value)
        except ValueError as error:
            raise problem(f"is not valid JSON: {error}") from None
    name = value.get("scheduler") if isinstance(value, dict) else value
    if value is not None and not isinstance(name, str):
        raise problem('must be a name, or an object with the name under "scheduler"')
    return value or None


def _none_if_empty(value: str) -> str | None:
    return value or None


MAX_PICTURES = 16  # of one request
Text = Annotated[str, Field(max_length=20_000), AfterValidator(_none_if_empty)]
Percent = Annotated[float, Field(gt=0, le=800, description="percent")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=-100, le=100)]
Side = Annotated[int, Field(ge=16, le=MAX_SIDE, multiple_of=8, description="pixels")]


@dataclass(frozen=True)
class Notes:
    """What is to be known of a field beside its type, bounds and description, which pydantic has."""

    label: str = ""  # in a form; without one no form shows the field
    unit: str = ""
    common: bool = False  # every type takes it; of the others ModelSpec.fields says who does
    flag: str = ""  # of the launch, without which the field has nothing to act on


class GenerateRequest(BaseModel):
    """Body of POST /generate. Absent and null mean the same; unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    positive: Annotated[Text | None, Notes("Prompt")] = None
    negative: Annotated[Text | None, Notes("Negative prompt")] = None
    prompt_syntax: (
        Annotated[
            Literal["a1111"], Field(description="(word:1.3), [word] and BREAK mean what they mean in A1111")
        ]
        | None
    ) = None
    positive_embeds: Embeds | None = None
    negative_embeds: Embeds | None = None
    image: Annotated[Picture | None, Notes("Input image")] = None
    ip_image: Annotated[Picture | None, Notes("IP-Adapter image", flag="ip_adapter")] = None
    control_image: Annotated[Picture | None, Notes("ControlNet image", flag="control_net")] = None
    image_scale: Annotated[Percent | None, Notes("Input size", unit="%")] = None
    ip_image_scale: Annotated[Percent | None, Notes("IP-Adapter size", unit="%")] = None
    control_image_scale: Annotated[Percent | None, Notes("ControlNet size", unit="%")] = None
    latent: Latent | None = None
    sigmas: Sigmas | None = None
    timesteps: Timesteps | None = None
    steps: Annotated[Annotated[int, Field(ge=1, le=MAX_STEPS)] | None, Notes("Steps", common=True)] = None
    cfg: Annotated[Annotated[float, Field(ge=0, le=100)] | None, Notes("Guidance", common=True)] = None
    true_cfg_scale: Annotated[
        Annotated[float, Field(ge=0, le=100, description="above 1: flux uses the negative prompt")] | None,
        Notes("True guidance"),
    ] = None
    seed: Annotated[
        Annotated[int, Field(ge=-(2**63), lt=2**64, description="negative: drawn")] | None,
        Notes("Seed", common=True),
    ] = None
    pictures: Annotated[
        Annotated[int, Field(ge=1, le=MAX_PICTURES, description="their seeds are seed, seed + 1, ...")]
        | None,
        Notes("Pictures", common=True),
    ] = None
    clip_skip: Annotated[Annotated[int, Field(ge=0, le=12)] | None, Notes("CLIP layers to skip")] = None
    width: Annotated[Side | None, Notes("Width", unit="pixels")] = None
    height: Annotated[Side | None, Notes("Height", unit="pixels")] = None
    strength: (
        Annotated[Fraction, Field(description="how much of the schedule is run from `latent`; 1: all of it")]
        | None
    ) = None
    denoise: Annotated[Fraction, Field(description="the same as strength")] | None = None
    denoising_start: Fraction | None = None
    denoising_end: Fraction | None = None
    add_noise: (
        Annotated[bool, Field(description="the seed's noise on `latent`, at the level of `strength`")] | None
    ) = None
    controlnet_scale: Annotated[Scale | None, Notes("ControlNet scale", flag="control_net")] = None
    ip_adapter_scale: Annotated[Scale | None, Notes("IP-Adapter scale", flag="ip_adapter")] = None
    lora_scales: Annotated[dict[str, Scale], Field(max_length=64)] | None = None
    frames: Annotated[Annotated[int, Field(ge=1, le=1024)] | None, Notes("Frames")] = None
    decode_chunk_size: Annotated[
        Annotated[int, Field(ge=1, le=1024)] | None, Notes("Frames decoded at once")
    ] = None
    motion_bucket_id: Annotated[Annotated[int, Field(ge=0, le=1023)] | None, Notes("Motion")] = None
    noise_aug_strength: Annotated[Annotated[float, Field(ge=0, le=10)] | None, Notes("Added noise")] = None
    fps: Annotated[Annotated[int, Field(ge=1, le=120)] | None, Notes("Frames per second")] = None
    scheduler: Annotated[
        str | dict[str, Any] | None, BeforeValidator(_check_scheduler), Notes("Scheduler", common=True)
    ] = None
    output_format: Annotated[
        Literal["png", "jpeg", "webp", "mp4", "gif", "latent"] | None, Notes("Format", common=True)
    ] = None
    return_latent: Annotated[
        Annotated[bool, Field(description="the answer has `latent` too")] | None, Notes(common=True)
    ] = None
    metadata: Annotated[
        Annotated[bool, Field(description="png, jpeg and webp say what made them; default: true")] | None,
        Notes(common=True),
    ] = None

    def numbered(self, number: int) -> GenerateRequest:
        """The request for picture `number` of several: its seed is so many further."""
        if not number:
            return self
        return self.model_copy(update={"seed": ((self.seed or 0) + number) % 2**64})

    def filled(self, config: HostConfig, output_format: str | None = None) -> GenerateRequest:
        """The request with every default of the launch in its place: seed drawn, size, steps and cfg set."""
        own = {
            "seed": secrets.randbelow(2**32) if self.seed is None or self.seed < 0 else self.seed,
            "pictures": self.pictures or 1,
            "strength": self.denoise if self.strength is None else self.strength,
            "denoise": None,
            "denoising_start": self.denoising_start or None,
            "output_format": self.output_format or output_format or "png",
        }
        filled = {n: v for n, v in launch_defaults(config).items() if getattr(self, n) is None}
        return self.model_copy(update=own | filled)


def launch_defaults(config: HostConfig) -> dict[str, Any]:
    """What the launch puts in the place of fields that are left out."""
    spec, (width, height) = config.spec, config.size
    return {
        "steps": spec.steps,
        "cfg": spec.cfg,
        "width": width,
        "height": height,
        "frames": spec.frames,
        "fps": spec.fps,
    }


def field_notes(model: type[BaseModel]) -> dict[str, Notes]:
    """What is told of each field of a model."""
    return {
        name: next((told for told in info.metadata if isinstance(told, Notes)), Notes())
        for name, info in model.model_fields.items()
    }


FIELD_NOTES = field_notes(GenerateRequest)
COMMON_FIELDS = frozenset(name for name, told in FIELD_NOTES.items() if told.common)
NEEDS_FLAG = {name: told.flag for name, told in FIELD_NOTES.items() if told.flag}


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
        data = from_json(body, allow_inf_nan=False)
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
    bad += _unknown(data, GenerateRequest)
    data = {k: v for k, v in data.items() if k in GenerateRequest.model_fields}
    try:
        request = GenerateRequest.model_validate(data)
    except PydanticError as error:
        bad += _problems_of(error)
        faulty = {str(fault["loc"][0]) for fault in error.errors(include_url=False, include_input=False)}
        request = GenerateRequest.model_validate({k: v for k, v in data.items() if k not in faulty})
    else:
        faulty = set()
    taken = config.spec.fields | COMMON_FIELDS
    bad += [p for p in _bad_values(request, config) if p.field in taken and not p.needs & faulty]
    unserved = [p for p in _not_served(request, config, accept) if p.field not in faulty]
    if bad:
        raise RequestError(400, bad + unserved)
    if unserved:
        raise RequestError(422, unserved)
    return request.filled(config, accept)


def _unknown(data: dict[str, Any], model: type[BaseModel]) -> list[FieldProblem]:
    """A fault for each name that the model has not; pydantic would take seconds to say so of 100,000."""
    unknown = [FieldProblem(name, "unknown field") for name in data if name not in model.model_fields]
    if unknown:  # told once
        text = f"unknown field; allowed: {', '.join(sorted(model.model_fields))}"
        unknown[0] = FieldProblem(unknown[0].field, text)
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
    elif strength is not None and strength < 1 and request.latent is None:
        add(name, f"below 1 needs a latent to start from; got {strength:g} and no latent", "latent")
    if end is not None and start >= end:
        add("denoising_end", f"must be above denoising_start {start:g}, got {end:g}", "denoising_start")
    elif start >= 1:
        add("denoising_start", "must be below 1, or no step is left to run; got 1")
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
        picture, percent = getattr(request, name), getattr(request, f"{name}_scale")
        if percent is None:
            continue
        if picture is None:
            add(f"{name}_scale", f"there is no {name} to scale", name)
        elif max(sides := picture_size(picture)) * percent / 100 > MAX_SIDE:
            add(
                f"{name}_scale",
                f"makes {sides[0]}x{sides[1]} pixels larger than {MAX_SIDE} a side; got {percent:g} percent",
            )
    return problems


STRENGTH = ("strength", "denoise")  # two words for one thing


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
    if config.control_net and request.control_image is None:
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
    if fault := _too_much(request, config):
        problems.append(fault)
    if request.scheduler is not None and (problem := scheduler_problem(spec, request.scheduler)):
        problems.append(FieldProblem("scheduler", problem))
    return problems


def _too_much(request: GenerateRequest, config: HostConfig) -> FieldProblem | None:
    """The fault of a picture that would keep the ranks for longer than the launch allows."""
    spec, (width, height) = config.spec, config.size
    width, height = request.width or width, request.height or height
    steps, frames = request.steps or spec.steps, request.frames or spec.frames or 1
    work = width * height * frames * steps
    if work <= config.max_pixel_steps:
        return None
    name = next((n for n in ("steps", "frames", "width", "height") if getattr(request, n)), "steps")
    given = f"{width} x {height} pixels x {frames} frames x {steps} steps = {work}"
    return FieldProblem(name, f"{given} exceeds this launch's --max_pixel_steps={config.max_pixel_steps}")


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
    faults = _unknown(data, LoraChange)
    try:
        change = LoraChange.model_validate({k: v for k, v in data.items() if k in LoraChange.model_fields})
    except PydanticError as error:
        faults += _problems_of(error)
    if faults:
        raise RequestError(400, faults)
    return change


class Seconds(BaseModel):
    """Where the time of one request went, in seconds."""

    total: float
    denoise: float
    decode: float


class GenerateAnswer(BaseModel):
    """Answer of POST /generate, status 200."""

    message: str = "OK"
    output: str | list[str]
    format: str
    is_image: bool
    seed: int
    width: int
    height: int
    steps: int
    seconds: Seconds
    latent: str | list[str] | None = None
    seeds: list[int] | None = None  # of several pictures
    warnings: Annotated[
        list[str], Field(description="what was cut, left out or changed; absent where nothing was")
    ] = []


class ErrorAnswer(BaseModel):
    """Answer of every route when something is wrong."""

    message: str
    output: None = None
    is_image: bool = False
    errors: list[dict[str, str]] = []


class File:
    """Bytes that an answer holds as base64; no dataclass, which pydantic's encoder would take apart."""

    def __init__(self, data: bytes) -> None:
        self.data = data


@dataclass
class Reply:
    """What the ranks made. `output` holds one encoded file, or one a frame; all of it is bytes, no tensor.

    The ranks may leave `pictures` to be encoded by whoever answers, so that they can go on meanwhile.
    """

    output: list[bytes]
    format: str
    seed: int
    width: int
    height: int
    steps: int
    seconds: dict[str, float] = field(default_factory=dict)
    latent: bytes | None = None  # safetensors with `latent`, where the launch asks for it
    pictures: list[Image.Image] = field(default_factory=list)
    fps: int | None = None  # of a video, whose frames the pictures are
    warnings: list[str] = field(default_factory=list)  # by `shared.api.warned.warn`

    def encode(self, metadata: Metadata | None = None) -> None:
        """Fill `output` from `pictures`; the seconds that it takes count as decoding."""
        if not self.pictures:
            return
        began = time.perf_counter()
        self.output, self.pictures = encode(self.pictures, self.format, self.fps, metadata), []
        took = time.perf_counter() - began
        for name in ("total", "decode"):
            self.seconds[name] = round(self.seconds[name] + took, 4)

    def answer(self, others: Sequence[Reply] = ()) -> dict[str, Any]:
        """A GenerateAnswer for `shared.http.answers.Json`, its files not yet base64.

        Args:
            others: the other pictures of the same request; `output`, `latent` and `seeds` are lists then.
        """
        files = [File(data) for data in self.output]
        answer = GenerateAnswer(
            output="",
            format=self.format,
            is_image=self.format != "latent" and self.format != "mp4",
            seed=self.seed,
            width=self.width,
            height=self.height,
            steps=self.steps,
            seconds=Seconds(**self.seconds),
        )
        body = answer.model_dump(exclude={"seeds", "warnings"}) | {
            "output": files if len(files) > 1 else files[0],
            "latent": None if self.latent is None else File(self.latent),
        }
        if others:
            all_of_them = (self, *others)
            body["output"] = [File(reply.output[0]) for reply in all_of_them]
            body["seeds"] = [reply.seed for reply in all_of_them]
            for name in body["seconds"]:
                body["seconds"][name] = round(sum(reply.seconds[name] for reply in all_of_them), 4)
            if self.latent is not None:
                body["latent"] = [File(reply.latent or b"") for reply in all_of_them]
        return with_warnings(body, merged(*(r.warnings for r in (self, *others))))
