"""Pictures that all ranks draw, one after the other, and then decode at the same time, each rank its own."""

from __future__ import annotations

from typing import Any

import torch

from shared.api.requests import GenerateRequest
from shared.launch.flags import HostConfig
from shared.parallel.method import Method
from shared.parallel.pipeline import Pipeline, model_of, part_of, pixels_of, statistics_of_squares
from shared.pipeline.latents import picture_latents, upcast
from shared.pipeline.pictures import noting_broken_pixels
from shared.pipeline.steps import StepWatch


def decodes_together(config: HostConfig, method: Method, request: GenerateRequest) -> bool:
    """Whether all ranks decode parts of the request's picture."""
    return method.decodes_together(config.decode_pixels(request.width, request.height, request.frames))


def decoders(pipe: Pipeline, config: HostConfig, method: Method, request: GenerateRequest, ranks: int) -> int:
    """How many of a replica's ranks decode pictures of a request at the same time; 1: they do not.

    What is watermarked, refined or painted into a given picture is left to the pipeline, and so are weights
    that move and a compiled VAE, which each rank would have to compile.
    """
    spec = config.spec
    whole = spec.output == "image" and spec.size_scale == 1 and request.output_format != "latent"
    plain = request.image is None and request.latent is None and part_of(pipe, "watermark") is None
    here = method.ends_with_latents and not decodes_together(config, method, request)
    once = (request.refiner_start or 1) >= 1
    still = not config.offloads and not config.compile_vae
    return ranks if whole and plain and here and once and still else 1


@torch.no_grad()
def decoded(
    pipe: Pipeline, config: HostConfig, request: GenerateRequest, watch: StepWatch, place: int
) -> torch.Tensor:
    """Pixels [1, 3, height, width] in 0..1 of one picture, as the type's text-to-image pipeline decodes it.

    Args:
        watch: of the call that drew it; it notes whether the pixels are finite.
        place: which of the call's pictures.
    """
    assert watch.latents is not None
    vae: Any = model_of(pipe, "vae")
    latents = watch.latents[place : place + 1]
    settings = vae.config
    if config.spec.squares:
        factor = pixels_of(pipe, config.spec)
        grid = ((request.height or 0) // factor, (request.width or 0) // factor)
        center, spread = (x.to(latents) for x in statistics_of_squares(vae))
        latents = picture_latents(latents * spread + center, config.spec.latent_layout, grid)[None]
    elif config.spec.packed:
        latents = pipe._unpack_latents(latents, request.height, request.width, pipe.vae_scale_factor)
    mean, std = settings.get("latents_mean"), settings.get("latents_std")
    with upcast(vae):
        latents = latents.to(vae.dtype)
        if mean is not None and std is not None:
            shape = (1, -1, *[1] * (latents.ndim - 2))
            mean, std = (torch.tensor(x).view(shape).to(latents) for x in (mean, std))
            latents = latents * std / settings.get("scaling_factor", 1.0) + mean
        elif not config.spec.squares:
            latents = latents / settings.scaling_factor + (settings.get("shift_factor") or 0.0)
        pixels = vae.decode(latents, return_dict=False)[0]
        if config.spec.vae_kind == "video":
            pixels = pixels[:, :, 0]
    with noting_broken_pixels(pipe, watch.finite):
        made: torch.Tensor = pipe.image_processor.postprocess(pixels, output_type="pt")
        return made
