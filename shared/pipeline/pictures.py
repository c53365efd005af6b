"""From what a pipeline made to a reply: pixels to pictures, latents to bytes, the check for NaN and Inf."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import safetensors.torch
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from shared.api.faults import FieldProblem, RequestError
from shared.api.media import Sound
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.warned import warn
from shared.launch.flags import HostConfig
from shared.models import ModelSpec
from shared.parallel.pipeline import Pipeline, model_of, part_of
from shared.parallel.surgery import Surgery
from shared.pipeline.from_picture import without_outside
from shared.pipeline.steps import StepWatch


@contextlib.contextmanager
def noting_broken_pixels(pipe: Pipeline, finite: list[torch.Tensor]) -> Iterator[None]:
    """Check pixels before they are clamped, which would turn Inf into white; does not wait for the GPU.

    Args:
        finite: gets one boolean tensor for each batch of pixels, on their device.
    """
    known: list[Any] = [part_of(pipe, name) for name in ("image_processor", "video_processor")]
    with Surgery() as surgery:
        for processor in known:
            if isinstance(processor, VaeImageProcessor):  # others prepare pictures for an encoder
                surgery.replace(processor, "postprocess", _noting(processor.postprocess, finite))
        yield


def _noting(inner: Callable[..., Any], finite: list[torch.Tensor]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def postprocess(image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(image, torch.Tensor):
            finite.append(torch.isfinite(image).all())
        return inner(image, *args, **kwargs)

    return postprocess


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """A picture of [3, height, width] in 0..1, rounded as diffusers does, but where the pixels are.

    A CPU rounds 1024² in 8 to 17 ms, and floats are four times the bytes to bring there.
    """
    rounded = (pixels.float() * 255).round_().to(torch.uint8)
    return Image.fromarray(rounded.permute(1, 2, 0).contiguous().cpu().numpy())


def make_reply(
    pipe: Pipeline,
    config: HostConfig,
    request: GenerateRequest,
    pixels: Sequence[torch.Tensor] | torch.Tensor,
    watch: StepWatch,
    place: int = 0,
    heard: torch.Tensor | None = None,
) -> Reply:
    """The reply with one picture, or the frames of a video; it is not encoded yet.

    Args:
        pixels: of the picture or of each frame, [3, height, width] in 0..1.
        place: which of several pictures of the call it is.
        heard: a video's sound in -1..1, [channels, samples].

    Raises:
        RequestError: 422, the result contains NaN or Inf.
    """
    spec = config.spec
    format = request.output_format or "png"
    video = spec.output == "video"
    width, height = request.width or 0, request.height or 0
    if watch.latents is not None:
        watch.finite.append(torch.isfinite(watch.latents).all())
    if heard is not None:
        if format != "mp4":
            warn(f"output_format: {format} has no sound; only mp4 has it")
        watch.finite.append(torch.isfinite(heard).all())
    if not all(watch.finite):  # waits for the GPU, as encoding does anyway
        what = "a latent" if format == "latent" else "a video" if video else "a picture"
        half = pipe.dtype is torch.float16
        hint = " in fp16; --variant=bf16 or fp32 may help" if half else ""
        raise RequestError(422, [FieldProblem("", f"{what} contains NaN or Inf{hint}")])
    latent = None
    files: list[bytes] = []
    pictures: list[Image.Image] = []
    if format == "latent" or request.return_latent or config.legacy_pickle:
        assert watch.latents is not None
        latent = safetensors.torch.save({"latent": watch.latents[place : place + 1].contiguous().cpu()})
    if format == "latent":
        files = [latent or b""]
        if spec.size_scale != 1 and watch.latents is not None:
            height, width = (side * pipe.vae_scale_factor for side in watch.latents.shape[-2:])
    else:
        pictures = [without_outside(request, to_picture(frame)) for frame in pixels]
        width, height = pictures[0].size
    return Reply(
        output=files,
        format=format,
        seed=request.seed or 0,
        width=width,
        height=height,
        steps=watch.steps,
        latent=latent,
        pictures=pictures,
        fps=(request.fps or spec.fps) if video else None,
        sound=None if heard is None or format != "mp4" else _sound(pipe, spec, heard),
    )


def _sound(pipe: Pipeline, spec: ModelSpec, heard: torch.Tensor) -> Sound:
    """Sound in -1..1 [channels, samples] in 16 bits, as diffusers writes it."""
    assert spec.sound is not None
    component, setting = spec.sound
    samples = (heard.float().clamp(-1, 1) * 32767).to(torch.int16)
    return Sound(samples.T.contiguous().cpu().numpy(), model_of(pipe, component).config[setting])
