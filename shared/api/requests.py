"""What a client asks: the fields of a request, with their bounds and what forms need to know of them.

Imports no torch: images stay encoded bytes and tensors stay safetensors bytes until they reach the ranks.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)
from pydantic_core import from_json

from shared.api.codecs import (
    MAX_FRAMES,
    MAX_INPUTS,
    MAX_SIDE,
    MAX_STEPS,
    Embeds,
    Inputs,
    Latent,
    Picture,
    Pictures,
    Sigmas,
    Timesteps,
    listed,
    numbers_in,
    picture_size,
    problem,
)
from shared.api.sizes import (
    Size,
    own_size,
    same_shape,
    scaled_size,
    warn_of_aspect,
    warn_of_mask,
    warn_of_own_size,
    warn_of_shapes,
    with_aspect,
)
from shared.api.warned import warn
from shared.launch.flags import HostConfig
from shared.models import ModelSpec

IMAGE_FORMATS = ("png", "jpeg", "webp", "latent")
VIDEO_FORMATS = ("png", "mp4", "gif", "webp", "latent")
MAX_SKIP = 12  # layers of CLIP
MIME_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "mp4": "video/mp4",
}


def json_value(text: bytes | str) -> Any:
    """What a JSON text says. JSON has one type of number, so 4.0 is 4. Raises ValueError."""
    return _as_whole(from_json(text, allow_inf_nan=False))


def _as_whole(value: Any) -> Any:
    match value:
        case float():
            return int(value) if value.is_integer() and abs(value) < 2**64 else value
        case list():
            return [_as_whole(item) for item in value]
        case dict():
            return {name: _as_whole(item) for name, item in value.items()}
    return value


def _check_scheduler(value: Any) -> Any:
    """A name or an object; like the flag, the object may come as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json_value(value)
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


def _each(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(value, list):
        return check(value)
    if not 1 <= len(value) <= MAX_INPUTS:
        raise problem(f"must be one number or a list of 1 to {MAX_INPUTS}, got {len(value)}")
    return [check(one) for one in value]


Scales = Annotated[
    Scale,
    WrapValidator(_each),
    WithJsonSchema(
        {
            "type": ["number", "array"],
            "minimum": -100,
            "maximum": 100,
            "items": {"type": "number", "minimum": -100, "maximum": 100},
            "description": "one for all, or a list of one for each",
        }
    ),
]
# The multiple is the type's; 8 is what all types have in common.
Side = Annotated[int, Field(ge=16, le=MAX_SIDE, description="pixels", json_schema_extra={"multipleOf": 8})]


@dataclass(frozen=True)
class Notes:
    """What is to be known of a field beside its type, bounds and description, which pydantic has."""

    label: str = ""  # in forms, which show only fields with one
    unit: str = ""
    common: bool = False  # every type takes it; ModelSpec.fields names the types of the others
    flag: str = ""  # of the launch, which the field needs


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
    image: Annotated[Pictures | None, Notes("Input image")] = None
    mask: Annotated[
        Annotated[Picture, Field(description="white is painted anew, black stays as it is in `image`")]
        | None,
        Notes("Mask"),
    ] = None
    ip_image: Annotated[Inputs | None, Notes("IP-Adapter image", flag="ip_adapter")] = None
    control_image: Annotated[Inputs | None, Notes("ControlNet image", flag="control_net")] = None
    image_scale: Annotated[Percent | None, Notes("Input size", unit="%")] = None
    ip_image_scale: Annotated[Percent | None, Notes("IP-Adapter size", unit="%")] = None
    control_image_scale: Annotated[Percent | None, Notes("ControlNet size", unit="%")] = None
    latent: Latent | None = None
    sigmas: Sigmas | None = None
    timesteps: Timesteps | None = None
    steps: Annotated[Annotated[int, Field(ge=1, le=MAX_STEPS)] | None, Notes("Steps", common=True)] = None
    cfg: Annotated[Annotated[float, Field(ge=0, le=100)] | None, Notes("Guidance", common=True)] = None
    true_cfg_scale: Annotated[
        Annotated[float, Field(ge=0, le=100, description="above 1: the negative prompt counts")] | None,
        Notes("True guidance"),
    ] = None
    guidance_scale_2: Annotated[
        Annotated[float, Field(ge=0, le=100, description="of the second transformer; left out: cfg")] | None,
        Notes("Guidance of the late steps"),
    ] = None
    guidance_rescale: Annotated[
        Annotated[Fraction, Field(description="above 0: less of the contrast that guidance adds")] | None,
        Notes("Rescaled guidance"),
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
    clip_skip: Annotated[Annotated[int, Field(ge=0, le=MAX_SKIP)] | None, Notes("CLIP layers to skip")] = None
    width: Annotated[Side | None, Notes("Width", unit="pixels")] = None
    height: Annotated[Side | None, Notes("Height", unit="pixels")] = None
    strength: Annotated[
        Annotated[
            Fraction,
            Field(description="how much of the schedule is run from `image` or `latent`; 1: all of it"),
        ]
        | None,
        Notes("Strength"),
    ] = None
    denoise: Annotated[Fraction, Field(description="the same as strength")] | None = None
    refiner_start: Annotated[
        Annotated[float, Field(gt=0, le=1, description="fraction of the schedule; 1: without the refiner")]
        | None,
        Notes("Refiner from", flag="refiner"),
    ] = None
    denoising_start: Fraction | None = None
    denoising_end: Fraction | None = None
    add_noise: (
        Annotated[bool, Field(description="the seed's noise on `latent`, at the level of `strength`")] | None
    ) = None
    controlnet_scale: Annotated[Scales | None, Notes("ControlNet scale", flag="control_net")] = None
    ip_adapter_scale: Annotated[Scales | None, Notes("IP-Adapter scale", flag="ip_adapter")] = None
    lora_scales: Annotated[dict[str, Scale], Field(max_length=64)] | None = None
    frames: Annotated[Annotated[int, Field(ge=1, le=MAX_FRAMES)] | None, Notes("Frames")] = None
    decode_chunk_size: Annotated[
        Annotated[int, Field(ge=1, le=1024)] | None, Notes("Frames decoded at once")
    ] = None
    motion_bucket_id: Annotated[Annotated[int, Field(ge=0, le=1023)] | None, Notes("Motion")] = None
    noise_aug_strength: Annotated[Annotated[float, Field(ge=0, le=10)] | None, Notes("Added noise")] = None
    noise_level: Annotated[
        Annotated[int, Field(ge=0, le=999, description="timestep of the noise on the input image")] | None,
        Notes("Noise on the input"),
    ] = None
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

    def _refined_from(self, config: HostConfig) -> float | None:
        """Where the launch's refiner starts: only where asked, or from noise to the end of the schedule."""
        if not config.refiner or self.refiner_start is not None:
            return self.refiner_start
        others = (self.denoising_start, self.denoising_end, self.latent, self.image)
        return config.spec.refiner_start if all(other is None for other in others) else 1.0

    def filled(self, config: HostConfig, output_format: str | None = None) -> GenerateRequest:
        """The request with every default of the launch in its place: seed drawn, size, steps and cfg set."""
        own = {
            "seed": secrets.randbelow(2**32) if self.seed is None or self.seed < 0 else self.seed,
            "pictures": self.pictures or 1,
            "strength": self.denoise if self.strength is None else self.strength,
            "denoise": None,
            "denoising_start": self.denoising_start or None,
            "refiner_start": self._refined_from(config),
            "output_format": self.output_format or output_format or "png",
        }
        if config.spec.unguided:
            own["cfg"] = config.spec.cfg
            warn_of_distilled(self.cfg, config.spec.cfg)
        filled = {n: v for n, v in launch_defaults(config).items() if getattr(self, n) is None}
        if isinstance(self.image, list) and config.spec.output == "video":
            filled["frames"] = len(self.image)
        filled["width"], filled["height"] = size = size_of(self, config)
        if self.starts(config) and not config.spec.aspect_multiple:
            warn_of_own_size((self.width, self.height), self._sizes("image")[0], size, config)
        self._warn_of_shapes(size, config)
        self._warn_of_no_guidance(config.spec)
        self._warn_of_no_effect()
        return self.model_copy(update=own | filled)

    def starts(self, config: HostConfig) -> bool:
        """Whether what is made starts from the request's picture, or is an edit of it."""
        return self.image is not None and (config.spec.image == "start" or config.spec.refers)

    def _warn_of_no_guidance(self, spec: ModelSpec) -> None:
        """Warn of fields that count in guidance only, where there is none."""
        if 0 < (true := self.true_cfg_scale or 0.0) < 1:
            warn(f"true_cfg_scale: {true:g} is the same as 1, no true guidance: only above 1 there is one")
        cfg = spec.cfg if self.cfg is None else self.cfg
        repelled = cfg < 1 and spec.tokens is not None and spec.tokens.guider is not None
        if spec.guidance_branches == 1 or cfg > 1 or repelled:
            return
        for name in ("negative", "negative_embeds", "guidance_scale_2", "guidance_rescale"):
            if getattr(self, name) is not None:
                warn(f"{name}: has no effect, as there is no guidance with cfg {cfg:g}; give one above 1")

    def _warn_of_no_effect(self) -> None:
        """Warn of fields that count only beside others, or that others replace."""
        for name in ("positive", "negative"):
            for network in dict.fromkeys(_NETWORK.findall(getattr(self, name) or "")):
                warn(f"{name}: {network} is read as words; lora_scales names LoRAs")
        if self.prompt_syntax is not None and _COMPOSED.search(self.positive or ""):
            warn("positive: AND is read as a word; the prompts at its two sides are not joined as by A1111")
        if self.ip_adapter_scale is not None and self.ip_image is None:
            warn("ip_adapter_scale: has no effect without ip_image")
        for name in ("sigmas", "timesteps"):
            data = getattr(self, name)
            if data is not None and self.steps not in (None, count := numbers_in(data, name)):
                text = f"{name} has {count} numbers, one for each step"
                warn(f"steps: has no effect, as {text}; got {self.steps}")
        if self.latent is not None and (self.pictures or 1) > 1 and not self.add_noise:
            text = "so only a scheduler that draws noise makes them differ"
            warn(f"pictures: all begin with the same latent, {text}")

    def _warn_of_shapes(self, made: Size, config: HostConfig) -> None:
        """Warn of pictures that are stretched, or cropped, to the shape of what is made."""
        spec, sizes = config.spec, self._sizes("image")
        asked = self.width is not None or self.height is not None
        if spec.begins and self.image is not None:
            done = "cropped" if spec.sized_by_picture else "stretched"
            hint = f"{OWN_SHAPE}{', or neither' if spec.aspect_multiple else ''}"
            if asked or not spec.aspect_multiple:
                warn_of_shapes("image", sizes, made, done, hint)
        elif self.starts(config) and (self.mask is not None or not spec.refers):
            hint = f"{OWN_SHAPE}, or neither" if asked else ""
            warn_of_shapes("image", sizes, made if asked else sizes[0], hint=hint)
        elif self.starts(config) and (aspects := spec.starts[0].aspects) is not None:
            warn_of_aspect(sizes[0], aspects, config)
        if self.mask is not None:
            warn_of_mask(picture_size(self.mask), picture_size(self.images[0]))
        if config.control_net:
            hint = f"{OWN_SHAPE}, or neither" if self.image is None else ""
            warn_of_shapes("control_image", self._sizes("control_image"), made, hint=hint)

    @property
    def images(self) -> list[bytes]:
        """The pictures of `image`: none, one, several to look at, or a video's frames."""
        if self.image is None:
            return []
        return self.image if isinstance(self.image, list) else [self.image]

    def _sizes(self, name: str) -> list[Size]:
        """(width, height) in pixels of a field's pictures after its `..._scale`."""
        percent = getattr(self, f"{name}_scale")
        return [scaled_size(one, percent) for one in listed(getattr(self, name))]


_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,100}>")
_COMPOSED = re.compile(r"\bAND\b")
OWN_SHAPE = "; give width and height of the picture's shape"


def warn_of_distilled(cfg: float | None, usual: float) -> None:
    """Warn of a scale of guidance for a checkpoint that has none."""
    if cfg is not None and cfg != usual:
        warn(f"cfg: {cfg:g} has no effect: this checkpoint is distilled and takes no guidance")


def size_of(request: GenerateRequest, config: HostConfig) -> Size:
    """(width, height) of what is made, in pixels: as asked, else a picture's own, else the launch's.

    A picture's own sides are rounded down to the type's multiple. Some types keep only its aspect, which is
    also what a control picture gives where there is no other.
    """
    width, height = config.size
    if request.width and request.height:
        return request.width, request.height
    if request.image is not None and config.spec.aspect_multiple:
        width, height = with_aspect(request._sizes("image")[-1], config)
    elif request.starts(config):
        width, height = own_size(request._sizes("image")[0], config)
    elif config.control_net and request.control_image is not None and request.latent is None:
        shape = request._sizes("control_image")[0]
        if not same_shape(shape, config.size):  # others are warm, captured and compiled
            width, height = with_aspect(shape, config)
    return request.width or width, request.height or height


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
    """The notes of each field of a model."""
    return {
        name: next((note for note in info.metadata if isinstance(note, Notes)), Notes())
        for name, info in model.model_fields.items()
    }


FIELD_NOTES = field_notes(GenerateRequest)
COMMON_FIELDS = frozenset(name for name, notes in FIELD_NOTES.items() if notes.common)
NEEDS_FLAG = {name: notes.flag for name, notes in FIELD_NOTES.items() if notes.flag}
