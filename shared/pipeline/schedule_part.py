"""The part of the schedule that a request asks for: its last steps by strength, or between two fractions."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from shared.api.faults import refused
from shared.api.requests import GenerateRequest
from shared.models import ModelSpec
from shared.parallel.pipeline import Pipeline, pixels_of
from shared.pipeline.steps import after_set_timesteps, whole_while_stepping


@contextlib.contextmanager
def part_of_schedule(
    pipe: Pipeline, spec: ModelSpec, request: GenerateRequest, arguments: dict[str, Any]
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
            raise refused(name, "needs the latent that an earlier request ended with; got none")
    in_pairs = getattr(scheduler, "order", 1) != 1 or not scheduler.config.get("skip_prk_steps", True)
    # Consistency models (LCM, TCD) predict the picture in each step, and the last step returns it.
    leaps = "original_inference_steps" in inspect.signature(type(scheduler).__init__).parameters
    if (in_pairs or leaps) and (start or end not in (None, 1.0)):
        name = type(scheduler).__name__
        raise refused(
            "denoising_start" if start else "denoising_end", f"{name} does not support a part of a schedule"
        )
    with contextlib.ExitStack() as held:
        show: Callable[[torch.Tensor], None] | None = None
        if strength is not None:
            show = held.enter_context(whole_while_stepping(scheduler))

        def take_part() -> None:
            if show is not None:
                show(_last_steps(pipe, spec, request, arguments["num_inference_steps"]))
            else:
                _cut(scheduler, start, end)
            if request.add_noise:
                _add_noise(pipe, spec, request, arguments)
            if "latents" in arguments and hasattr(scheduler, "init_noise_sigma") and (start or strength):
                # Pipelines scale the latents they are given as if they were fresh noise.
                arguments["latents"].div_(scheduler.init_noise_sigma)

        held.enter_context(after_set_timesteps(scheduler, take_part))
        yield


def _last_steps(pipe: Pipeline, spec: ModelSpec, request: GenerateRequest, steps: int) -> torch.Tensor:
    """The timesteps that `strength` leaves, up to denoising_end; the scheduler begins at the first."""
    import diffusers

    image_pipeline = getattr(diffusers, spec.image_pipeline)
    part, left = image_pipeline.get_timesteps(pipe, steps, request.strength, None)
    if left < 1:
        raise refused("strength", f"leaves no step to run: {request.strength:g} of {steps} steps")
    if request.denoising_end is not None:
        last = _before(pipe.scheduler, part, request.denoising_end)
        if not last:
            raise refused(
                "denoising_end", f"must come after at least one of the {left} steps that strength leaves"
            )
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
        raise refused("denoising_end", f"no step of {len(whole)} lies between {start or 0} and {end or 1}")
    part = whole[first:last]
    scheduler.timesteps = torch.cat([part[:2], part[1:]]) if twice else part
    sigmas = getattr(scheduler, "sigmas", ())
    if len(sigmas) == len(whole) + 1:
        # Solvers of higher order reduce their order at the last step, counted by the number of sigmas.
        scheduler.sigmas = sigmas[first : last + 1]


def _add_noise(pipe: Pipeline, spec: ModelSpec, request: GenerateRequest, arguments: dict[str, Any]) -> None:
    """Noise from the request's generator on its latents, in place, of the schedule's first step (SDEdit)."""
    scheduler, latents = pipe.scheduler, arguments["latents"]
    shape = latents.shape
    if spec.packed and not spec.squares:  # drawn in the unpacked layout, as for a picture from noise
        factor = pixels_of(pipe, spec)
        height, width = (request.height or 0) // factor, (request.width or 0) // factor
        shape = torch.Size((1, pipe.vae.config[spec.latent_setting], height, width))
    noise = randn_tensor(shape, generator=arguments["generator"], device=latents.device, dtype=latents.dtype)
    if spec.packed and not spec.squares:
        noise = pipe._pack_latents(noise, *shape)
    first = scheduler.timesteps[:1]
    if hasattr(scheduler, "scale_noise"):  # flow matching
        latents.copy_(scheduler.scale_noise(latents, first, noise))
    else:
        latents.copy_(scheduler.add_noise(latents, noise, first))
