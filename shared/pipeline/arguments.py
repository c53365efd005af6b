"""From a request to the pipeline's keyword arguments, and to the part of the schedule that it asks for."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import safetensors.torch
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from shared.api.media import decode_image
from shared.api.requests import FieldProblem, GenerateRequest, RequestError
from shared.launch.flags import HostConfig
from shared.models import ModelSpec
from shared.pipeline.adapters import control_arguments, ip_arguments
from shared.pipeline.prompts import prompt_arguments

INPAINT_CHANNELS = 9  # 4 of the latents, 4 of the masked picture, 1 of the mask


def call_arguments(
    pipe: Any, config: HostConfig, request: GenerateRequest, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of one pipeline call, without output_type. Sets the IP-Adapter's scale.

    Args:
        request: with its defaults filled in.
        device: where given tensors go; the generator stays on the CPU, so that every rank and every machine
            draws the same noise.

    Raises:
        RequestError: 422, tensors or embeddings that do not fit the model.
        ValueError: of the features, in words.
    """
    spec = config.spec
    seed = request.seed or 0
    arguments: dict[str, Any] = {
        **spec.pipeline_defaults,
        "num_inference_steps": request.steps,
        spec.cfg_field: request.cfg,
        "generator": torch.Generator("cpu").manual_seed(seed),
    }
    arguments |= prompt_arguments(
        pipe,
        spec,
        request.positive,
        request.negative,
        _tensors("positive_embeds", request.positive_embeds, device),
        _tensors("negative_embeds", request.negative_embeds, device),
        request.clip_skip,
        config.compel and request.prompt_syntax is None,  # A1111's notation is read elsewhere
    )
    if "width" in spec.fields:
        arguments |= {"width": request.width, "height": request.height}
    if request.image is not None:
        arguments["image"] = decode_image(request.image, request.image_scale)
    if spec.inpaint_pipeline and getattr(pipe, spec.denoiser).config.in_channels == INPAINT_CHANNELS:
        # An inpainting checkpoint paints the whole of an empty picture.
        size = (request.width or 0, request.height or 0)
        arguments |= {
            "image": Image.new("RGB", size),
            "mask_image": Image.new("L", size, 255),
            "strength": 1.0,
        }
    if config.control_net:
        picture = _picture(request.control_image, request.control_image_scale)
        arguments |= control_arguments(
            spec,
            config.control_net,
            picture,
            request.controlnet_scale,
            (request.width or 0, request.height or 0),
            request.frames or 1,
        )
    if config.ip_adapter:
        picture = _picture(request.ip_image, request.ip_image_scale)
        arguments |= ip_arguments(pipe, config.ip_adapter, picture, request.ip_adapter_scale)
    if spec.output == "video":
        arguments |= _video_arguments(pipe, spec, request)
    arguments |= _schedule_arguments(request, pipe.scheduler.config.num_train_timesteps)
    if (eta := getattr(pipe.scheduler, "eta", None)) is not None:
        arguments["eta"] = eta
    if request.latent is not None:
        arguments["latents"] = _latents(pipe, spec, request, device)
    if request.true_cfg_scale is not None:
        arguments["true_cfg_scale"] = request.true_cfg_scale
        if request.true_cfg_scale > 1 and not any(name.startswith("negative_") for name in arguments):
            arguments["negative_prompt"] = ""  # there is no true guidance without one
    return arguments


def _tensors(field: str, data: bytes | None, device: torch.device) -> dict[str, torch.Tensor] | None:
    if data is None:
        return None
    tensors = safetensors.torch.load(data)
    for tensor in tensors.values():
        _check_finite(field, tensor)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _check_finite(field: str, tensor: torch.Tensor) -> None:
    wrong = tensor[~torch.isfinite(tensor)]
    if len(wrong):
        raise _refuse(field, f"must hold finite numbers, got {float(wrong[0])}")


def _picture(data: bytes | None, percent: float | None) -> Any:
    return None if data is None else decode_image(data, percent)


def _refuse(field: str, problem: str) -> RequestError:
    return RequestError(422, [FieldProblem(field, problem)])


def _video_arguments(pipe: Any, spec: ModelSpec, request: GenerateRequest) -> dict[str, Any]:
    most = getattr(getattr(pipe, "motion_adapter", None), "config", {}).get("motion_max_seq_length")
    if most is not None and (request.frames or 0) > most:
        raise _refuse("frames", f"this motion module makes at most {most}; got {request.frames}")
    arguments: dict[str, Any] = {"num_frames": request.frames}
    if request.decode_chunk_size is not None:
        arguments["decode_chunk_size"] = request.decode_chunk_size
    for name in ("motion_bucket_id", "noise_aug_strength"):
        if getattr(request, name) is not None:
            arguments[name] = getattr(request, name)
    if request.frames == 1 and spec.cfg_field == "max_guidance_scale":
        # Guidance grows from the first frame to the last, which are one.
        arguments["min_guidance_scale"] = request.cfg
    if "motion_bucket_id" in spec.fields:
        arguments["fps"] = request.fps  # a condition of the model, not only of the file
    return arguments


def _schedule_arguments(request: GenerateRequest, trained: int) -> dict[str, Any]:
    """Own sigmas or timesteps; `trained` timesteps are there."""
    for name, most in (("sigmas", math.inf), ("timesteps", trained - 1)):
        data = getattr(request, name)
        if data is None:
            continue
        tensor = safetensors.torch.load(data)[name]
        if tensor.ndim != 1:
            raise _refuse(name, f"must have one dimension, got shape {list(tensor.shape)}")
        _check_finite(name, tensor)
        values = tensor.tolist()
        if any(a <= b for a, b in pairwise(values)) or values[-1] < 0 or values[0] > most:
            within = "0 and up" if most == math.inf else f"0 to {most}"
            shown = ", ".join(f"{value:g}" for value in values[:8])
            raise _refuse(name, f"must fall from value to value, within {within}; got {shown}")
        return {name: values, "num_inference_steps": len(values)}
    return {}


def _latents(pipe: Any, spec: ModelSpec, request: GenerateRequest, device: torch.device) -> torch.Tensor:
    """The request's latents, checked: their layout is the one that output_format latent gives."""
    assert request.latent is not None
    tensor = safetensors.torch.load(request.latent)["latent"]
    if not tensor.is_floating_point():
        raise _refuse("latent", f"must hold floating-point numbers, got {tensor.dtype}")
    _check_finite("latent", tensor)
    wanted = latent_shape(pipe, spec, request)
    if tensor.shape != wanted:
        raise _refuse("latent", f"must have shape {list(wanted)} here, got {list(tensor.shape)}")
    return tensor.to(device, getattr(pipe, spec.denoiser).dtype)


def latent_shape(pipe: Any, spec: ModelSpec, request: GenerateRequest) -> torch.Size:
    """Shape of the latents of one picture or video of the request's size."""
    channels = pipe.vae.config.latent_channels
    factor = pipe.vae_scale_factor
    if spec.size_scale != 1 and request.image is not None:
        # The pipeline makes its picture's sides multiples of this.
        size = decode_image(request.image, request.image_scale).size
        width, height = (side // factor * factor for side in size)
    else:
        width, height = (request.width or 0) // factor, (request.height or 0) // factor
    frames = request.frames or 1
    layouts = {
        "nchw": (1, channels, height, width),
        "ncfhw": (1, channels, frames, height, width),
        "nfchw": (1, frames, channels, height, width),
        "packed": (1, (height // 2) * (width // 2), channels * 4),
    }
    return torch.Size(layouts[spec.latent_layout])


def _add_noise(pipe: Any, spec: ModelSpec, request: GenerateRequest, arguments: dict[str, Any]) -> None:
    """Noise from the request's generator on its latents, in place, of the schedule's first step (SDEdit)."""
    scheduler, latents = pipe.scheduler, arguments["latents"]
    shape = latents.shape
    if packed := spec.latent_layout == "packed":  # drawn as the picture lies, as for a picture from noise
        factor = pipe.vae_scale_factor
        height, width = (request.height or 0) // factor, (request.width or 0) // factor
        shape = torch.Size((1, pipe.vae.config.latent_channels, height, width))
    noise = randn_tensor(shape, generator=arguments["generator"], device=latents.device, dtype=latents.dtype)
    if packed:
        noise = pipe._pack_latents(noise, *shape)
    first = scheduler.timesteps[:1]
    if hasattr(scheduler, "scale_noise"):  # flow matching
        latents.copy_(scheduler.scale_noise(latents, first, noise))
    else:
        latents.copy_(scheduler.add_noise(latents, noise, first))


class _WholeWhileStepping:
    """A scheduler that shows a part of its schedule, and steps as if it were in the whole of it.

    That is how diffusers' image-to-image pipelines run a part: solvers know where in the schedule they are.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.whole: torch.Tensor | None = None
        inner = scheduler.step

        @functools.wraps(inner)
        def step(*args: Any, **kwargs: Any) -> Any:
            shown = scheduler.timesteps
            scheduler.timesteps = self.whole
            try:
                return inner(*args, **kwargs)
            finally:
                scheduler.timesteps = shown

        scheduler.step = step

    def show(self, part: torch.Tensor) -> None:
        """Pipelines see `part`, and cannot set the schedule back to its beginning."""
        self.whole = self.scheduler.timesteps.to("cpu", copy=True)  # no wait for the GPU in each step
        self.scheduler.timesteps = part
        self.scheduler.set_begin_index = lambda begin_index=0: None

    def undo(self) -> None:
        for name in ("step", "set_begin_index"):
            vars(self.scheduler).pop(name, None)


@contextlib.contextmanager
def part_of_schedule(
    pipe: Any, spec: ModelSpec, request: GenerateRequest, arguments: dict[str, Any]
) -> Iterator[None]:
    """Run only a part of the schedule: its last steps by `strength`, or what denoising_start and _end say.

    `strength` counts steps, as diffusers' image-to-image pipeline of the type does. The other two are
    fractions of the schedule, cut where diffusers' SDXL pipelines do, at the training timestep: what ends at
    0.8 in one call and starts at 0.8 in the next is what one call would have made. Starting late needs the
    latents that the earlier call ended with.

    Raises:
        RequestError: 422, no latents to start from, or a scheduler whose steps come in pairs.
    """
    start, end = request.denoising_start, request.denoising_end
    strength = request.strength if request.add_noise or (request.strength or 1.0) < 1 else None
    if not start and end in (None, 1.0) and strength is None:
        yield
        return
    scheduler = pipe.scheduler
    for name, given in (("denoising_start", start), ("strength", strength)):
        if given and "latents" not in arguments:
            raise _refuse(name, "starts from the latents that an earlier request ended with; no latent")
    in_pairs = getattr(scheduler, "order", 1) != 1 or not scheduler.config.get("skip_prk_steps", True)
    # Consistency models (LCM, TCD) leap to the picture in each step, and the last one stays there.
    leaps = "original_inference_steps" in inspect.signature(type(scheduler).__init__).parameters
    if (in_pairs or leaps) and (start or end not in (None, 1.0)):
        name = type(scheduler).__name__
        raise _refuse("denoising_start" if start else "denoising_end", f"{name} cannot run in parts")
    inner = scheduler.set_timesteps
    stepping = _WholeWhileStepping(scheduler) if strength is not None else None

    # Pipelines look at its signature to know whether it takes their sigmas.
    @functools.wraps(inner)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        if stepping is not None:
            stepping.show(_last_steps(pipe, spec, request, arguments["num_inference_steps"]))
        else:
            _cut(scheduler, start, end)
        if request.add_noise:
            _add_noise(pipe, spec, request, arguments)
        if "latents" in arguments and hasattr(scheduler, "init_noise_sigma") and (start or strength):
            # Pipelines scale the latents they are given as if they were fresh noise.
            arguments["latents"].div_(scheduler.init_noise_sigma)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps
        if stepping is not None:
            stepping.undo()


def _last_steps(pipe: Any, spec: ModelSpec, request: GenerateRequest, steps: int) -> torch.Tensor:
    """The timesteps that `strength` leaves, up to denoising_end; the scheduler begins at the first."""
    import diffusers

    image_pipeline = getattr(diffusers, spec.image_pipeline)
    part, left = image_pipeline.get_timesteps(pipe, steps, request.strength, None)
    if left < 1:
        raise _refuse("strength", f"leaves no step to run: {request.strength:g} of {steps} steps")
    if request.denoising_end is not None:
        last = _before(pipe.scheduler, part, request.denoising_end)
        if not last:
            raise _refuse("denoising_end", f"no step of the {left} that strength leaves lies before it")
        part = part[:last]
    return part


def _before(scheduler: Any, timesteps: torch.Tensor, fraction: float) -> int:
    """How many of the timesteps lie before this fraction of the whole schedule."""
    return int((timesteps >= round(scheduler.config.num_train_timesteps * (1 - fraction))).sum())


def _cut(scheduler: Any, start: float | None, end: float | None) -> None:
    """Leave the scheduler what lies between two fractions of its schedule."""
    # Linear multistep without Runge-Kutta (PNDM) takes its second timestep twice.
    whole = scheduler.timesteps
    twice = len(whole) > 2 and bool(whole[1] == whole[2])
    whole = torch.cat([whole[:1], whole[2:]]) if twice else whole
    first = _before(scheduler, whole, start) if start else 0
    last = len(whole) if end is None else _before(scheduler, whole, end)
    if first >= last:
        raise _refuse("denoising_end", f"no step of {len(whole)} lies between {start or 0} and {end or 1}")
    part = whole[first:last]
    scheduler.timesteps = torch.cat([part[:2], part[1:]]) if twice else part
    sigmas = getattr(scheduler, "sigmas", ())
    if len(sigmas) == len(whole) + 1:
        # Solvers of higher order end gently, at the last of as many steps as there are sigmas.
        scheduler.sigmas = sigmas[first : last + 1]
