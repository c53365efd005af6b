"""From a picture: the pipeline of diffusers that a request needs, made of the loaded one's parts."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image

from shared.api.faults import refused
from shared.api.media import decode_image, decode_mask, decode_picture, paints_nothing
from shared.api.requests import GenerateRequest
from shared.api.warned import warn
from shared.launch.flags import HostConfig
from shared.models import ModelSpec, Start
from shared.parallel.method import control_nets
from shared.parallel.pipeline import Pipeline, model_of, part_of
from shared.parallel.surgery import Surgery
from shared.pipeline.embeddings import embeddings_of
from shared.pipeline.schedulers import scheduler_for_request


def trained_to_fill(pipe: Pipeline, spec: ModelSpec) -> bool:
    """Whether the checkpoint was trained for inpainting: its denoiser sees a mask in every call."""
    latent = pipe.vae.config[spec.latent_setting] * (4 if spec.packed else 1)
    channels = spec.fill_channels(latent)
    return channels is not None and model_of(pipe, spec.denoiser).config.in_channels == channels


def start_of(pipe: Pipeline, config: HostConfig, request: GenerateRequest) -> Start | None:
    """What the request starts from; None: from noise, by the loaded pipeline.

    A checkpoint or ControlNet trained for inpainting paints the whole of a picture that comes without a mask,
    and of an empty one where none comes.

    Raises:
        RequestError: 422, a ControlNet that takes no mask.
    """
    spec, control = config.spec, bool(config.control_net)
    if trained_to_fill(pipe, spec):
        return spec.start("fill", control)
    painting = spec.start("inpaint", control) if control else None
    if painting is not None and painting.control_extra is not None:
        if any(net.config[painting.control_extra] for net in control_nets(pipe)):
            if request.control_image is not None:
                warn("control_image: has no effect; this ControlNet was trained with masks and sees image")
            return painting
        if request.mask is not None:
            raise refused("mask", "needs a ControlNet that was trained with masks; this one was not")
    if not request.starts(config) and not (spec.image == "begins" and request.image is not None):
        return None
    start = spec.start("image" if request.mask is None else "inpaint", control)
    if start is not None and start.control_inputs is not None:
        inputs = model_of(pipe, spec.denoiser).config.in_channels
        if any(net.config[start.control_inputs] == inputs for net in control_nets(pipe)):
            raise refused("mask", "needs a ControlNet that was trained with masks; this one was not")
    return start


class PicturePipelines:
    """diffusers' pipelines from a picture, each made once of the loaded pipeline's own parts.

    Args:
        pipe: the loaded pipeline, with all that was put on its parts.
        spec: of its type.
    """

    def __init__(self, pipe: Pipeline, spec: ModelSpec) -> None:
        self.pipe, self.spec = pipe, spec
        self._made: dict[str, tuple[Pipeline, Any]] = {}

    @contextlib.contextmanager
    def of(self, start: Start | None, request: GenerateRequest) -> Iterator[Pipeline]:
        """The pipeline for a request, with the request's scheduler, which the loaded one has too inside.

        Raises:
            SchedulerError: of the request's scheduler.
        """
        running, launched = (self.pipe, None) if start is None else self._of(start)
        with scheduler_for_request(self.pipe, self.spec, request.scheduler, request.steps, launched):
            if running is not self.pipe:
                running.register_modules(scheduler=self.pipe.scheduler)
                running.set_progress_bar_config(**getattr(self.pipe, "_progress_bar_config", {}))
            yield running

    def _of(self, start: Start) -> tuple[Pipeline, Any]:
        """The pipeline and its form of the launch's scheduler, whose settings its constructor may change."""
        if start.refers:
            return self.pipe, None
        if start.pipeline not in self._made:
            import diffusers

            cls, pipe = getattr(diffusers, start.pipeline), self.pipe
            scheduler = copy.deepcopy(pipe.scheduler)
            given = {**pipe.config, **pipe.components, "scheduler": scheduler, "add_watermarker": False}
            takes = inspect.signature(cls.__init__).parameters
            made = cls(**{name: part for name, part in given.items() if name in takes})
            made._exclude_from_cpu_offload = pipe._exclude_from_cpu_offload
            made.maybe_free_model_hooks = pipe.maybe_free_model_hooks
            made.embeddings, made.watermark = embeddings_of(pipe), part_of(pipe, "watermark")
            self._made[start.pipeline] = made, scheduler
        return self._made[start.pipeline]


def start_arguments(start: Start, request: GenerateRequest) -> dict[str, Any]:
    """Keyword arguments for the picture, the mask and the strength; without an image an empty one.

    Of a single picture a video begins as one that stands still. A picture to look at, or to begin with, keeps
    its size, which the pipeline brings to one that the model knows.
    """
    if start.strength is None and start.kind == "image":
        seen = [decode_image(one, request.image_scale) for one in request.images]
        return {start.image: seen if start.most > 1 else seen[0], **start.arguments}
    size = (request.width or 0, request.height or 0)
    pictures = [decode_picture(one, request.image_scale, size) for one in request.images]
    given: Any = pictures[0] if pictures else Image.new("RGB", size)
    if start.frames:
        given = pictures if len(pictures) > 1 else pictures * (request.frames or 1)
    arguments: dict[str, Any] = {**start.arguments, start.image: given}
    if start.strength is not None:
        arguments["strength"] = strength_of(start, request)
    if start.kind != "image":
        mask = Image.new("L", size, 255) if request.mask is None else decode_mask(request.mask, size)
        if paints_nothing(mask):
            warn("mask: is nowhere white, so nothing is painted anew")
        arguments[start.mask] = mask
    return arguments


def strength_of(start: Start, request: GenerateRequest) -> float | None:
    """The part of the schedule that runs: the request's, or the default of what it asks for."""
    if request.image is None:
        return 1.0
    return start.strength if request.strength is None else request.strength


def without_outside(request: GenerateRequest, picture: Image.Image) -> Image.Image:
    """A made picture with the request's own one where the mask is black; soft edges are mixed."""
    if request.image is None or request.mask is None:
        return picture
    own = decode_picture(request.images[0], request.image_scale, picture.size)
    return Image.composite(picture, own, decode_mask(request.mask, picture.size))


@contextlib.contextmanager
def after_get_timesteps(pipe: Pipeline, act: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Inside, `act` gets the timesteps whenever the pipeline has taken its part of the schedule."""
    inner = pipe.get_timesteps

    @functools.wraps(inner)
    def get_timesteps(*args: Any, **kwargs: Any) -> Any:
        timesteps, steps = inner(*args, **kwargs)
        act(timesteps)
        return timesteps, steps

    with Surgery() as surgery:
        surgery.replace(pipe, "get_timesteps", get_timesteps)
        yield


def late_start(
    pipe: Pipeline, arguments: Mapping[str, Any], begin: Callable[[torch.Tensor, int], None]
) -> AbstractContextManager[None]:
    """Inside, `begin` gets the timesteps that the pipeline takes by its strength, and the place of the first.

    Raises:
        RequestError: 422, no step is left.
    """

    def act(timesteps: torch.Tensor) -> None:
        if not len(timesteps):
            strength, whole = arguments["strength"], arguments["num_inference_steps"]
            raise refused("strength", f"leaves no step to run: {strength:g} of {whole} steps")
        begin(timesteps, len(pipe.scheduler.timesteps) - len(timesteps))

    return after_get_timesteps(pipe, act)
