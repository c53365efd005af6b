"""Runs a diffusers pipeline for a request: the part of an engine that all parallel methods share."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any, Protocol

import safetensors.torch
import torch
from PIL import Image

from shared.comm import OnStep, StoppedError, Verdict, World
from shared.config import HostConfig
from shared.media import decode_image, encode_image, encode_video
from shared.models import ModelSpec
from shared.requests import FieldProblem, GenerateRequest, Reply, RequestError

log = logging.getLogger("host")


class Parallel(Protocol):
    """A parallel method that has taken hold of a pipeline (shared.parallel)."""

    @property
    def plan(self) -> dict[str, Any]: ...

    def begin(self, steps: int) -> None:
        """A new generation of `steps` denoiser calls starts."""
        ...

    def close(self) -> None:
        """Undo the surgery."""
        ...


class PipelineEngine:
    """An engine (shared.engine.Engine) around one diffusers pipeline.

    Args:
        pipe: the loaded pipeline, on this rank's device.
        config: the launch.
        world: this rank's place.
        parallel: what makes the pipeline parallel; None runs it plain.
        output_rank: the rank that decodes and holds the picture; the others stop at the latents.
    """

    def __init__(
        self, pipe: Any, config: HostConfig, world: World, parallel: Parallel | None, output_rank: int = 0
    ) -> None:
        self.pipe = pipe
        self.config = config
        self.spec: ModelSpec = config.spec
        self.world = world
        self.parallel = parallel
        self.output_rank = output_rank

    @property
    def plan(self) -> dict[str, Any]:
        return {"method": "plain pipeline"} if self.parallel is None else self.parallel.plan

    def generate(self, request: GenerateRequest, on_step: OnStep) -> Reply | None:
        began = time.perf_counter()
        holds_picture = self.world.rank == self.output_rank
        decode = holds_picture and request.output_format != "latent"
        # Some pipelines draw control latents from the global state: alike on all ranks then.
        torch.manual_seed(_torch_seed(request.seed))
        arguments = self.arguments(request)
        arguments["output_type"] = "pil" if decode else "latent"
        if self.parallel is not None:
            self.parallel.begin(request.steps or 0)
        with StepWatch(self.pipe, self.world.device, on_step) as watch:
            try:
                output = self.pipe(**arguments)
            except (ValueError, TypeError) as error:
                raise self._blame(error, watch) from error
        if not holds_picture:
            return None
        return self._reply(request, output, watch, began)

    def arguments(self, request: GenerateRequest) -> dict[str, Any]:
        """The pipeline's keyword arguments for a request, without output_type."""
        spec = self.spec
        arguments: dict[str, Any] = {
            **spec.pipeline_defaults,
            "num_inference_steps": request.steps,
            spec.cfg_field: request.cfg,
            "generator": torch.Generator("cpu").manual_seed(_torch_seed(request.seed)),
        }
        if "positive" in spec.fields:
            arguments["prompt"] = request.positive or ""
            arguments["negative_prompt"] = request.negative
        if "width" in spec.fields:
            arguments |= {"width": request.width, "height": request.height}
        if "image" in spec.fields and request.image is not None:
            arguments["image"] = decode_image(request.image, request.image_scale)
        if request.latent is not None:
            arguments["latents"] = self._tensor(request.latent, "latent")
        return arguments

    def _tensor(self, data: bytes, name: str) -> torch.Tensor:
        tensor = safetensors.torch.load(data)[name]
        return tensor.to(self.world.device, self.pipe.dtype if tensor.is_floating_point() else tensor.dtype)

    def _blame(self, error: Exception, watch: StepWatch) -> Exception:
        """An argument that the pipeline refuses before the first step is the request's fault."""
        if watch.step == 0 and isinstance(error, ValueError):
            return RequestError(422, [FieldProblem("", str(error))])
        return error

    def _reply(self, request: GenerateRequest, output: Any, watch: StepWatch, began: float) -> Reply:
        made = output.images if hasattr(output, "images") else output.frames
        latent = None
        if request.output_format == "latent" or self.config.legacy_pickle:
            assert watch.latents is not None
            latent = safetensors.torch.save({"latent": watch.latents.contiguous().cpu()})
        width, height = request.width or 0, request.height or 0
        if request.output_format == "latent":
            files = [latent or b""]
        else:
            pictures = made[0] if self.spec.output == "video" else made
            width, height = pictures[0].size
            if request.output_format in ("mp4", "gif") or (
                self.spec.output == "video" and request.output_format == "webp"
            ):
                files = [encode_video(pictures, request.output_format or "", request.fps or self.spec.fps)]
            else:
                files = [encode_image(picture, request.output_format or "png") for picture in pictures]
        ended = time.perf_counter()
        denoised = watch.ended or ended
        return Reply(
            output=files,
            format=request.output_format or "png",
            seed=request.seed or 0,
            width=width,
            height=height,
            steps=watch.step,
            seconds={
                "total": round(ended - began, 4),
                "denoise": round(denoised - watch.began, 4),
                "decode": round(ended - denoised, 4),
            },
            latent=latent,
        )

    def warm_up(self) -> None:
        """The first steps of a generation at the launch's size, before the first request.

        Plans, compiles, captures and opens connections. Runs whole, with decoding, where the VAE is compiled.
        """
        whole = self.config.compile_vae
        steps = getattr(self.parallel, "warm_up_calls", 1)
        image = encode_image(Image.new("RGB", (64, 64)), "png")
        inputs: dict[str, Any] = {"seed": 0, "output_format": "png" if whole else "latent"}
        if self.spec.image == "needed":
            inputs["image"] = image
        if self.config.control_net:
            inputs["control_image"] = image
        request = GenerateRequest.model_construct(**inputs).filled(self.config)

        def on_step(step: int, _: int) -> None:
            if step >= steps and not whole:
                raise StoppedError(Verdict.FINISHED)

        log.info("warming up at %sx%s", request.width, request.height)
        with contextlib.suppress(StoppedError):
            self.generate(request, on_step)

    def close(self) -> None:
        if self.parallel is not None:
            self.parallel.close()


def _torch_seed(seed: int | None) -> int:
    """The seed as torch.Generator takes it; 0 where none is given."""
    return seed or 0


class StepWatch:
    """Counts a generation's denoising steps at the scheduler, the one place that every pipeline passes.

    On CUDA the CPU is held at most one step ahead of the GPU, so that progress is true and a cancel acts
    within a step; the wait is for the step before, so the GPU always has the next step's work queued.

    Args:
        pipe: its `scheduler.step` is overridden while the watch is entered.
        device: where it computes.
        on_step: called after each step with (step, steps).
    """

    def __init__(self, pipe: Any, device: torch.device, on_step: OnStep) -> None:
        self.pipe = pipe
        self.device = device
        self.on_step = on_step
        self.step = 0
        self.began = time.perf_counter()
        self.ended: float | None = None
        self.latents: torch.Tensor | None = None
        self._before: torch.cuda.Event | None = None

    def __enter__(self) -> StepWatch:
        scheduler = self.pipe.scheduler
        inner = scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            self._after_step(result[0], len(scheduler.timesteps))
            return result

        scheduler.step = step
        self._scheduler = scheduler
        return self

    def __exit__(self, *exception: Any) -> None:
        del self._scheduler.step

    def _after_step(self, latents: torch.Tensor, steps: int) -> None:
        self.step += 1
        self.latents = latents
        last = self.step >= steps
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            (event if last else self._before or event).synchronize()
            self._before = event
        if last:
            self.ended = time.perf_counter()
        self.on_step(self.step, steps)
