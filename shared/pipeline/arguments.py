"""From a request to the pipeline's keyword arguments."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import diffusers
import safetensors.torch
import torch

from shared.api.codecs import listed
from shared.api.faults import refused
from shared.api.media import decode_image
from shared.api.requests import GenerateRequest, warn_of_distilled
from shared.api.warned import warn
from shared.launch.flags import HostConfig
from shared.models import SCHEDULERS, ModelSpec, Start
from shared.parallel.pipeline import Pipeline, model_of, part_of, pixels_of
from shared.pipeline.adapters import ip_arguments
from shared.pipeline.control_nets import control_arguments
from shared.pipeline.from_picture import start_arguments
from shared.pipeline.latents import squares
from shared.pipeline.prompts import prompt_arguments

FIELDS = {"ip_adapter_image": "ip_image", "negative_prompt": "negative", "latents": "latent"}
"""Arguments of pipelines -> the request fields that they come from, where these are called otherwise."""


def call_arguments(
    pipe: Pipeline,
    config: HostConfig,
    request: GenerateRequest,
    device: torch.device,
    start: Start | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one pipeline call, without output_type. Sets scales of IP-Adapter and guider,
    and the size where the pipeline takes none.

    Args:
        request: with its defaults filled in.
        device: where given tensors go; the generator stays on the CPU, so that every rank and every machine
            draws the same noise.
        start: what kind of pipeline `pipe` is, if it starts from a picture.

    Raises:
        RequestError: 422, tensors or embeddings that do not fit the model, or what `pipe` does not take.
        ValueError: a feature does not support the request.
    """
    spec = config.spec
    seed = request.seed or 0
    arguments: dict[str, Any] = {
        **spec.pipeline_defaults,
        "num_inference_steps": request.steps,
        "generator": torch.Generator("cpu").manual_seed(seed),
    }
    arguments |= _guidance_arguments(pipe, spec, request)
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
    if spec.sized_by_picture:
        size = request.height, request.width
        part_of(pipe, "video_processor").calculate_default_height_width = lambda **_: size
    elif "width" in spec.fields and (start is None or start.sized):
        arguments |= {"width": request.width, "height": request.height}
        if spec.area_field is not None:
            arguments[spec.area_field] = (request.width or 0) * (request.height or 0)
    if start is not None:
        arguments |= start_arguments(start, request)
    elif request.image is not None:
        arguments["image"] = decode_image(request.images[0], request.image_scale)
    if config.control_net:
        arguments |= control_arguments(
            spec,
            config.control_net,
            _pictures(request.control_image, request.control_image_scale),
            listed(request.controlnet_scale),
            (request.width or 0, request.height or 0),
            request.frames or 1,
            start,
        )
    if config.ip_adapter:
        pictures = _pictures(request.ip_image, request.ip_image_scale)
        arguments |= ip_arguments(pipe, spec, config.ip_adapter, pictures, listed(request.ip_adapter_scale))
    if spec.output == "video":
        arguments |= _video_arguments(pipe, spec, request)
        if start is not None and start.frames:
            del arguments["num_frames"]  # there are as many as pictures
    arguments |= _schedule_arguments(request, pipe.scheduler, spec)
    if (eta := getattr(pipe.scheduler, "eta", None)) is not None:
        arguments["eta"] = eta
    if request.latent is not None:
        arguments["latents"] = _latents(pipe, spec, request, device)
    if request.guidance_rescale is not None:
        _check_takes(pipe, "guidance_rescale")
        arguments["guidance_rescale"] = request.guidance_rescale
    if request.noise_level is not None:
        most = pipe.config.max_noise_level
        if request.noise_level > most:
            raise refused("noise_level", f"must be at most {most} here, got {request.noise_level}")
        arguments["noise_level"] = request.noise_level
    if request.guidance_scale_2 is not None:
        arguments["guidance_scale_2"] = request.guidance_scale_2
    if request.true_cfg_scale is not None:
        arguments["true_cfg_scale"] = request.true_cfg_scale
        if request.true_cfg_scale > 1 and not any(name.startswith("negative_") for name in arguments):
            arguments["negative_prompt"] = ""  # there is no true guidance without one
    if start is not None:
        takes = inspect.signature(type(pipe).__call__).parameters
        for name in arguments:
            if name not in takes:
                field = FIELDS.get(name, name)
                cls = type(pipe).__name__
                raise refused(field, f"is not supported from a picture: {cls} does not take it")
    return arguments


def _guidance_arguments(pipe: Pipeline, spec: ModelSpec, request: GenerateRequest) -> dict[str, Any]:
    """The scale of guidance; warns of one that does not count as it is given."""
    cfg, settings = request.cfg or 0.0, model_of(pipe, spec.denoiser).config
    if spec.tokens is not None and spec.tokens.guider is not None:
        guider = part_of(pipe, spec.tokens.guider).new(guidance_scale=request.cfg)
        pipe.register_modules(**{spec.tokens.guider: guider})
        return {}
    if spec.guidance_branches == 1:
        if not settings.get("guidance_embeds", True):
            warn_of_distilled(request.cfg, spec.cfg)
    elif 0 < cfg < 1 and settings.get("time_cond_proj_dim") is None:  # else the UNet takes it as an input
        warn(f"cfg: {cfg:g} is the same as 1, no guidance: type {spec.name} is guided only above 1")
    off = spec.without_guidance if cfg <= 1 else {}
    return {spec.cfg_field: max(cfg + spec.cfg_offset, 0.0), **off}


def warn_of_unheard(request: GenerateRequest) -> None:
    """Warn of a negative prompt for a UNet that takes the scale of guidance as an input (LCM)."""
    for name in ("negative", "negative_embeds"):
        if getattr(request, name) is not None:
            warn(f"{name}: has no effect: this checkpoint takes the scale of guidance as an input")


def _check_takes(pipe: Pipeline, name: str) -> None:
    """Refuse an argument that some pipelines of the type have, and this one has not."""
    if name not in inspect.signature(type(pipe).__call__).parameters:
        raise refused(name, f"diffusers' {type(pipe).__name__} does not support it")


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
        raise refused(field, f"must hold finite numbers, got {float(wrong[0])}")


def _pictures(data: Any, percent: float | None) -> list[Any]:
    return [decode_image(one, percent) for one in listed(data)]


def most_frames(pipe: Pipeline, spec: ModelSpec) -> int | None:
    """The frames that a loaded motion module makes at most; None without one."""
    component, setting = spec.frames_limit or (None, "")
    owner = None if component is None else part_of(pipe, component)
    return None if owner is None else int(owner.config[setting])


def _video_arguments(pipe: Pipeline, spec: ModelSpec, request: GenerateRequest) -> dict[str, Any]:
    most = most_frames(pipe, spec)
    if most is not None and (request.frames or 0) > most:
        raise refused("frames", f"this motion module makes at most {most}; got {request.frames}")
    arguments: dict[str, Any] = {"num_frames": request.frames}
    if request.decode_chunk_size is not None:
        arguments["decode_chunk_size"] = request.decode_chunk_size
    for name in ("motion_bucket_id", "noise_aug_strength"):
        if getattr(request, name) is not None:
            arguments[name] = getattr(request, name)
    if request.frames == 1 and spec.first_cfg_field is not None:
        # Guidance grows from the first frame to the last; here both are the same frame.
        arguments[spec.first_cfg_field] = request.cfg
    if spec.fps_field is not None:
        arguments[spec.fps_field] = request.fps  # a condition of the model, not only of the file
    return arguments


def _schedule_arguments(request: GenerateRequest, scheduler: Any, spec: ModelSpec) -> dict[str, Any]:
    """The request's sigmas or timesteps, if the scheduler takes them."""
    for name, most in (("sigmas", math.inf), ("timesteps", scheduler.config.num_train_timesteps - 1)):
        data = getattr(request, name)
        if data is None:
            continue
        tensor = safetensors.torch.load(data)[name]
        if tensor.ndim != 1:
            raise refused(name, f"must have one dimension, got shape {list(tensor.shape)}")
        _check_finite(name, tensor)
        values = tensor.tolist()
        if any(a <= b for a, b in pairwise(values)) or values[-1] < 0 or values[0] > most:
            within = "0 and up" if most == math.inf else f"0 to {most}"
            shown = ", ".join(f"{value:g}" for value in values[:8])
            raise refused(name, f"must decrease and lie within {within}; got {shown}")
        if len(values) < spec.least_steps:
            least = f"must be at least {spec.least_steps} numbers for type {spec.name}"
            raise refused(name, f"{least}, one per step; got {len(values)}")
        if not _takes(type(scheduler), name):
            able = [
                short
                for short, entry in SCHEDULERS.items()
                if spec.scheduler_family in entry.families and _takes(getattr(diffusers, entry.cls), name)
            ]
            own = f"{type(scheduler).__name__} takes none; scheduler may be {', '.join(able)}"
            raise refused(name, own)
        return {name: values, "num_inference_steps": len(values)}
    return {}


def _takes(scheduler: type, name: str) -> bool:
    return name in inspect.signature(scheduler.set_timesteps).parameters  # type: ignore[attr-defined]


def _latents(pipe: Pipeline, spec: ModelSpec, request: GenerateRequest, device: torch.device) -> torch.Tensor:
    """The request's latents, checked: their layout is the one that output_format latent gives."""
    assert request.latent is not None
    tensor = safetensors.torch.load(request.latent)["latent"]
    if not tensor.is_floating_point():
        raise refused("latent", f"must hold floating-point numbers, got {tensor.dtype}")
    _check_finite("latent", tensor)
    wanted = latent_shape(pipe, spec, request)
    if tensor.shape != wanted:
        raise refused("latent", f"must have shape {list(wanted)} here, got {list(tensor.shape)}")
    tensor = tensor.to(device, model_of(pipe, spec.denoiser).dtype)
    if spec.squares:
        factor = pixels_of(pipe, spec)
        return squares(tensor, (request.height or 0) // factor, (request.width or 0) // factor)
    return tensor


def latent_shape(pipe: Pipeline, spec: ModelSpec, request: GenerateRequest) -> torch.Size:
    """Shape of the latents of one picture or video of the request's size."""
    channels = pipe.vae.config[spec.latent_setting]
    factor = pixels_of(pipe, spec)
    if spec.size_scale != 1 and request.image is not None:
        # The pipeline makes its picture's sides multiples of this.
        size = decode_image(request.images[0], request.image_scale).size
        width, height = (side // factor * factor for side in size)
    else:
        width, height = (request.width or 0) // factor, (request.height or 0) // factor
    return torch.Size(spec.latent_shape(channels, height, width, request.frames or 1))
