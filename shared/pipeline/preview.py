"""Previews of a picture: latents -> a small RGB picture, by a linear projection.

Latents are nearly linear in the colours of the pixels they stand for, so one matrix [channels + 1, 3] shows
them without the VAE. It is fitted to the launch's own VAE when the host starts, so that any fine-tune's
latent space has its true colours.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from shared.api.queue import JobQueue
from shared.api.requests import GenerateRequest
from shared.models import ModelSpec
from shared.parallel.pipeline import Pipeline, pixels_of, statistics_of_squares
from shared.pipeline.arguments import latent_shape
from shared.pipeline.latents import packed, picture_latents, upcast

if TYPE_CHECKING:
    from collections.abc import Sequence

FIT_SIDE = 256  # pixels of the picture that the projection is fitted on
FIT_COLOURS = 8  # random colours a side in it
MAX_SIDE = 128  # pixels of a preview; larger latents are averaged down


class Previewer:
    """Shows the latents of rank 0 to those who watch; does nothing while nobody watches.

    On CUDA the projection is queued behind the step and its copy is fetched at a later step, so the CPU
    never waits for it.

    Args:
        pipe: the loaded pipeline; its VAE encodes one small picture here.
        spec: of its type.
        queue: asks for previews and takes them.
        device: where the pipeline computes.
    """

    def __init__(self, pipe: Pipeline, spec: ModelSpec, queue: JobQueue, device: torch.device) -> None:
        self.pipe = pipe
        self.spec = spec
        self.queue = queue
        self.projection = fit_projection(pipe.vae, device, spec)
        self._request: GenerateRequest | None = None
        self._shape: torch.Size | None = None
        self._copy: tuple[int, torch.Tensor, torch.cuda.Event] | None = None

    def begin(self, request: GenerateRequest) -> None:
        """A generation of this request starts."""
        self._request, self._shape, self._copy = request, None, None

    def after_step(self, step: int, result: Sequence[torch.Tensor], noise: torch.Tensor) -> None:
        """The scheduler's step `step` gave `result` for the denoiser's output `noise`."""
        self._fetch()
        if self._copy is not None or self._request is None or not self.queue.wants_preview():
            return
        if self._shape is None:
            self._shape = latent_shape(self.pipe, self.spec, self._request)
        latents = self._clean(result, noise)[:1]  # the first of several
        layout = self.spec.latent_layout
        if layout == "tokens" and latents.ndim == 5:
            layout = "ncfhw"  # a video without its first frame, which is a picture
            if not latents.shape[2]:
                return  # it was the only one
        elif latents.shape != self._shape:
            return  # not one whole picture
        factor = pixels_of(self.pipe, self.spec)
        grid = ((self._request.height or 0) // factor, (self._request.width or 0) // factor)
        pixels = project(picture_latents(latents, layout, grid), self.projection)
        if pixels.device.type != "cuda":
            self._show(step, pixels)
            return
        held = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
        held.copy_(pixels, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._copy = (step, held, event)

    def _clean(self, result: Sequence[torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
        """The predicted clean latents, where the scheduler gives them at no cost."""
        latents = result[0]
        if len(result) > 1 and result[1].shape == latents.shape:
            return result[1]  # the scheduler's own prediction of them
        scheduler = self.pipe.scheduler
        if self.spec.predicts_flow and noise.shape == latents.shape:
            return latents - scheduler.sigmas[scheduler.step_index] * noise
        return latents

    def _fetch(self) -> None:
        if self._copy is not None and self._copy[2].query():
            step, pixels, _ = self._copy
            self._copy = None
            self._show(step, pixels)

    def _show(self, step: int, pixels: torch.Tensor) -> None:
        height, width, _ = pixels.shape
        self.queue.show_preview(step, width, height, pixels.numpy().tobytes())


@torch.no_grad()
def fit_projection(vae: Any, device: torch.device, spec: ModelSpec | None = None) -> torch.Tensor:
    """The matrix float32 [channels + 1, 3] on `device` from latents, and 1, to RGB in -1 to 1.

    Least squares over one picture of random colours, in squares, that the VAE encodes.

    Args:
        spec: of its type; None: it takes pictures, and its configuration has the latents' statistics.

    Raises:
        RuntimeError: the VAE encodes the picture to NaN or Inf.
    """
    colours = torch.rand(1, 3, FIT_COLOURS, FIT_COLOURS, generator=torch.Generator("cpu").manual_seed(0))
    pixels = F.interpolate(colours * 2 - 1, size=FIT_SIDE, mode="nearest")
    config, of_videos = vae.config, spec is not None and spec.vae_kind == "video"
    with upcast(vae):
        given = pixels.to(device, vae.dtype)
        encoded = vae.encode(given[:, :, None] if of_videos else given).latent_dist.mode()
    z = (encoded[:, :, 0] if of_videos else encoded).float().cpu()
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        z = (z - mean) / std
    if spec is not None and spec.statistics == "buffers":
        mean, std = (x.view(1, -1, 1, 1).float().cpu() for x in (vae.latents_mean, vae.latents_std))
        z = (z - mean) / std
    if spec is not None and spec.squares:
        height, width = z.shape[-2:]
        mean, std = (x.float().cpu() for x in statistics_of_squares(vae))
        z = picture_latents((packed(z) - mean) / std, "packed", (height, width))[None]
    z = (z - (config.get("shift_factor") or 0.0)) * (config.get("scaling_factor") or 1.0)
    if not bool(z.isfinite().all()):
        raise RuntimeError("the VAE encodes a picture to NaN or Inf")
    wanted = F.adaptive_avg_pool2d(pixels, z.shape[-2:])
    return torch.linalg.lstsq(_with_one(_rows(z[0])), _rows(wanted[0])).solution.to(device)


def project(latents: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Latents [channels, height, width] -> RGB uint8 [height', width', 3], on the same device.

    Clean latents have a standard deviation of about 1; noisier ones are scaled down to it.
    """
    latents = latents.detach().float()
    shrink = math.ceil(max(latents.shape[1:]) / MAX_SIDE)
    if shrink > 1:
        latents = F.avg_pool2d(latents, shrink, ceil_mode=True)
    latents = latents / latents.std().clamp(min=1.0)
    height, width = latents.shape[1:]
    rgb = _with_one(_rows(latents)) @ projection
    return ((rgb + 1) * 127.5).clamp(0, 255).to(torch.uint8).view(height, width, 3)


def _rows(image: torch.Tensor) -> torch.Tensor:
    """[channels, height, width] -> [height * width, channels]."""
    return image.flatten(1).T


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    return F.pad(rows, (0, 1), value=1.0)
