"""Runs a diffusers pipeline for a request: the part of an engine that all parallel methods share."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import safetensors.torch
import torch
from PIL import Image

from shared.api.jobs import JobQueue, SecondPass
from shared.api.lora_dir import LoraNameError, find_lora
from shared.api.media import encode_image
from shared.api.requests import FieldProblem, GenerateRequest, Reply, RequestError
from shared.launch.flags import HostConfig
from shared.models import ModelSpec
from shared.parallel.graphs import Captured
from shared.parallel.method import Method, Plain
from shared.pipeline.arguments import call_arguments, part_of_schedule
from shared.pipeline.latents import enlarged
from shared.pipeline.lora import LoraError, LoraSet, loras_of
from shared.pipeline.memory import freeze_heap
from shared.pipeline.preview import Previewer
from shared.pipeline.prompts import EncodedPrompts
from shared.pipeline.schedulers import SchedulerError, scheduler_for_request, unhurried_step
from shared.ranks.groups import World
from shared.ranks.messages import OnStep, StoppedError, Verdict

log = logging.getLogger("host")

NAMED_LORAS = 4  # of --lora_dir stay loaded between requests


class PipelineEngine:
    """An engine (shared.ranks.loop.Engine) around one diffusers pipeline.

    Args:
        pipe: the loaded pipeline, on this rank's device.
        config: the launch.
        world: this rank's place.
        make_parallel: takes hold of the pipeline.
        output_rank: the rank that decodes and holds the picture; the others stop at the latents.
        picture: which of the pictures of one request this rank works on.
    """

    def __init__(
        self,
        pipe: Any,
        config: HostConfig,
        world: World,
        make_parallel: Callable[[Any], Method] = Plain,
        output_rank: int = 0,
        picture: int = 0,
    ) -> None:
        self.picture = picture
        self.pipe = pipe
        self.config = config
        self.spec: ModelSpec = config.spec
        self.world = world
        self.output_rank = output_rank
        self._make_parallel = make_parallel
        self.parallel = make_parallel(pipe)
        self._prompts = EncodedPrompts()
        captures = config.captures(world.device.type) and not config.compile_text_encoder
        self._encoders = Captured(pipe, self.spec.text_encoders, captures)
        self._adapter_state: Any = None
        self._previewer: Previewer | None = None
        self._named: dict[str, int] = {}
        """LoRAs that requests have named, by path, the longest unused first; when each file was changed."""

    @property
    def plan(self) -> dict[str, Any]:
        return self.parallel.plan

    def generate(self, request: GenerateRequest, on_step: OnStep) -> Reply | None:
        began = time.perf_counter()
        request = self._with_named_loras(request)
        holds_picture = self.world.rank == self.output_rank
        # Some pipelines draw control latents from the global state: alike on all ranks then.
        torch.manual_seed(request.seed or 0)
        watch = StepWatch(self.pipe, self.world.device, on_step, self._previewer)
        if self._previewer is not None:
            self._previewer.begin(request)
        try:
            with scheduler_for_request(self.pipe, self.spec, request.scheduler, request.steps):
                output = self._call(request, watch, holds_picture)
        except RequestError:
            raise
        except Exception as error:
            if watch.step or not _is_refusal(error, request):
                raise
            log.info("refused before the first step: %s", error, exc_info=not isinstance(error, ValueError))
            raise RequestError(422, [_problem(error)]) from error
        if not watch.step:
            field = "sigmas" if request.sigmas is not None else "timesteps"
            raise RequestError(422, [FieldProblem(field, "no step is left to run")])
        denoise = watch.seconds()
        if not holds_picture:
            return None
        reply = self._reply(request, output, watch)
        total = time.perf_counter() - began
        seconds = {"total": total, "denoise": denoise, "decode": total - denoise}
        reply.seconds = {name: round(value, 4) for name, value in seconds.items()}
        return reply

    def _call(self, request: GenerateRequest, watch: StepWatch, holds_picture: bool) -> Any:
        if "lora_scales" in self.spec.fields:
            loras_of(self.pipe, self.spec).set_scales(request.lora_scales or {})
        arguments = call_arguments(self.pipe, self.config, request, self.world.device)
        watch.asked = arguments["num_inference_steps"]
        decode = (holds_picture or self.parallel.decodes_together) and request.output_format != "latent"
        arguments["output_type"] = "pt" if decode else "latent"
        self._note_adapters(request)
        self.parallel.begin(arguments["num_inference_steps"])
        try:
            with (
                _noting_broken_pixels(self.pipe, watch.finite),
                part_of_schedule(self.pipe, self.spec, request, arguments),
                self._prompts.of(
                    self.pipe,
                    tuple(sorted((request.lora_scales or {}).items())),
                    self.spec,
                    request.prompt_syntax,
                    request.negative,
                ),
            ):
                return self.parallel.run(arguments, watch)
        finally:
            self.pipe.maybe_free_model_hooks()  # which a pipeline that is cut short does not reach

    def _note_adapters(self, request: GenerateRequest) -> None:
        """Scales are numbers inside the modules, which a captured step would not see change."""
        state = (request.lora_scales, request.ip_adapter_scale, request.ip_image is None)
        if state != self._adapter_state and self._adapter_state is not None:
            self._encoders.reset()
            self.parallel.reset()
        self._adapter_state = state

    def _reply(self, request: GenerateRequest, output: Any, watch: StepWatch) -> Reply:
        made = output.images if hasattr(output, "images") else output.frames
        format = request.output_format or "png"
        video = self.spec.output == "video"
        width, height = request.width or 0, request.height or 0
        if watch.latents is not None:
            watch.finite.append(torch.isfinite(watch.latents).all())
        if not all(watch.finite):  # waits for the GPU, as encoding does anyway
            what = "a latent" if format == "latent" else "a video" if video else "a picture"
            half = getattr(self.pipe, "dtype", None) is torch.float16
            hint = " in fp16; --variant=bf16 or fp32 may help" if half else ""
            raise RequestError(422, [FieldProblem("", f"{what} of NaN or Inf came out{hint}")])
        latent = None
        files: list[bytes] = []
        pictures: list[Image.Image] = []
        if format == "latent" or request.return_latent or self.config.legacy_pickle:
            assert watch.latents is not None
            latent = safetensors.torch.save({"latent": watch.latents.contiguous().cpu()})
        if format == "latent":
            files = [latent or b""]
            if self.spec.size_scale != 1 and watch.latents is not None:
                height, width = (side * self.pipe.vae_scale_factor for side in watch.latents.shape[-2:])
        else:
            pictures = [_picture(pixels) for pixels in (made[0] if video else made)]
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
            fps=(request.fps or self.spec.fps) if video else None,
        )

    def warm_up(self) -> None:
        """The first steps of a generation at the launch's size, before the first request.

        Plans, compiles, captures and opens connections. Runs whole, with decoding, where the VAE is compiled.
        """
        whole = self.config.compile_vae
        steps = self.parallel.warm_up_calls
        image = encode_image(Image.new("RGB", (64, 64)), "png")
        inputs: dict[str, Any] = {"seed": 0, "output_format": "png" if whole else "latent"}
        if self.spec.image == "needed":
            inputs["image"] = image
        if self.config.control_net:
            inputs["control_image"] = image
        request = GenerateRequest.model_construct(**inputs).filled(self.config)

        def run(words: str | None, last: int | None) -> None:
            """A generation up to step `last`; None: to its end."""

            def on_step(step: int, _: int) -> None:
                if last is not None and step >= last:
                    raise StoppedError(Verdict.FINISHED)

            with contextlib.suppress(StoppedError):
                self.generate(request.model_copy(update={"positive": words}), on_step)

        log.info("warming up at %sx%s", request.width, request.height)
        shown = getattr(self.pipe, "_progress_bar_config", {})
        self.pipe.set_progress_bar_config(disable=True)
        run(None, None if whole else steps)
        if self._encoders.captures:
            # They are captured at their second call, and only other words let them be called again.
            run("again", 1)
        self.pipe.set_progress_bar_config(**shown)

    def preview_to(self, queue: JobQueue) -> None:
        """Show pictures to those who watch the queue, as they form; on rank 0 alone."""
        try:
            self._previewer = Previewer(self.pipe, self.spec, queue, self.world.device)
        except (RuntimeError, ValueError, AttributeError) as error:
            log.warning("the page shows no previews: %s", error)

    def enlarge(self, draft: Reply, second: SecondPass) -> bytes:
        """The safetensors of a first pass' latents as its second pass takes them."""
        return enlarged(draft, second)

    def list_loras(self) -> list[dict[str, Any]]:
        """The LoRAs in use, with their scales and how many of their layers fit."""
        return [
            {"path": e.path, "scale": e.scale, "layers": e.matched, "layers_left_out": e.unmatched}
            for e in loras_of(self.pipe, self.spec).loaded.values()
            if e.path not in self._named
        ]

    def add_lora(self, path: str, scale: float) -> list[dict[str, Any]]:
        """Add a LoRA to the running pipeline, on every rank. Raises RequestError 409."""

        def change(loras: LoraSet) -> None:
            same = {os.path.realpath(known): known for known in loras.loaded}.get(
                os.path.realpath(path), path
            )
            if self._named.pop(same, None) is not None:  # a request has named it, and it is still here
                loras.remove(same)
            elif same in loras.loaded:
                raise LoraError(f"LoRA {path!r} is loaded already")
            loras.add(path, scale)

        return self._change_loras(change)

    def remove_lora(self, path: str) -> list[dict[str, Any]]:
        """Take a LoRA off the running pipeline, on every rank. Raises RequestError 409."""

        def change(loras: LoraSet) -> None:
            known = loras.name_of(path)
            loras.remove(known)
            self._named.pop(known, None)

        return self._change_loras(change)

    def undo(self, method: str, arguments: dict[str, Any]) -> None:
        """A call that went well on this rank has failed on another: take it back."""
        if method == "add_lora":
            self.remove_lora(arguments["path"])

    def _change_loras(self, change: Callable[[LoraSet], None]) -> list[dict[str, Any]]:
        try:
            self._operate(change)
        except ValueError as error:
            raise RequestError(409, [FieldProblem("lora", str(error))]) from error
        return self.list_loras()

    def _with_named_loras(self, request: GenerateRequest) -> GenerateRequest:
        """The request with paths for the names of its LoRAs, those of --lora_dir loaded at scale 0.

        All ranks load all of them or none does. Raises RequestError.
        """
        if not request.lora_scales or not self.config.lora_dir:
            return request
        loras = loras_of(self.pipe, self.spec)
        mine, problem = self._tried(lambda: self._looked_up(request.lora_scales or {}, loras))
        self._agree_on_loras(mine, problem)
        files: dict[str, int] = mine or {}
        changed = [path for path in files if self._named.get(path, files[path]) != files[path]]
        new = [path for path in files if path not in loras.loaded] + changed
        if new:
            unused = [path for path in self._named if path not in files]
            surplus = len(self._named) + len(new) - len(changed) - NAMED_LORAS

            def change(loras: LoraSet) -> None:
                for path in changed + unused[: max(surplus, 0)]:
                    loras.remove(path)
                    del self._named[path]
                for path in new:
                    loras.add(path, 0.0)
                    self._named[path] = files[path]

            _, problem = self._tried(lambda: self._operate(change))
            try:
                self._agree_on_loras(None, problem)
            except Exception:
                self._operate(lambda loras: self._forget_loras(loras, new))
                raise
        for path in files:
            if path in self._named:
                self._named[path] = self._named.pop(path)
        scales = dict(zip(files, request.lora_scales.values(), strict=True))
        return request.model_copy(update={"lora_scales": scales})

    def _looked_up(self, names: Iterable[str], loras: LoraSet) -> dict[str, int]:
        """Path of each name, and when its file was changed. Raises LoraNameError."""
        files: dict[str, int] = {}
        for name in names:
            file = find_lora(self.config, name, loras.loaded)
            if file.path in files:
                raise LoraNameError(f"LoRA {name!r} is named twice")
            files[file.path] = file.changed
        return files

    def _forget_loras(self, loras: LoraSet, paths: Iterable[str]) -> None:
        for path in paths:
            if self._named.pop(path, None) is not None:
                loras.remove(path)

    @staticmethod
    def _tried(act: Callable[[], Any]) -> tuple[Any, Exception | None]:
        try:
            return act(), None
        except Exception as error:
            return None, error

    def _agree_on_loras(self, mine: Any, problem: Exception | None) -> None:
        """Raise on all ranks where one has a problem, or where they have not found the same."""
        text = None if problem is None else str(problem)
        said: list[Any] = [(mine and list(mine), text)] * self.world.size
        if self.world.size > 1:
            torch.distributed.all_gather_object(said, said[0], group=self.world.voting)
        problems = [told for _, told in said if told is not None]
        if problem is not None and not isinstance(problem, ValueError):
            raise problem
        if not problems and any(found != said[0][0] for found, _ in said):
            problems = ["the ranks do not find the same files in their --lora_dir"]
        if problems:
            raise RequestError(422, [FieldProblem("lora_scales", problems[0])]) from problem

    def _operate(self, change: Callable[[LoraSet], None]) -> None:
        """Layers are replaced, so the surgery is undone before and done again after."""
        self.parallel.close()
        self._prompts.forget()
        self._encoders.reset()
        try:
            change(loras_of(self.pipe, self.spec))
        finally:
            self.parallel = self._make_parallel(self.pipe)
            freeze_heap()

    def close(self) -> None:
        self.parallel.close()
        self._encoders.close()


OWN = frozenset({"scheduler", "sigmas", "timesteps", "latent", "positive_embeds", "negative_embeds", "image"})
"""Fields whose content the models and schedulers may fail on, before the first step."""


def _is_refusal(error: Exception, request: GenerateRequest) -> bool:
    """Whether an error before the first step is the request's fault.

    That is what a feature or the pipeline refuses in words, and what fails on tensors or settings of its own.
    """
    if isinstance(error, ValueError):
        return True
    brings = any(getattr(request, name) is not None for name in OWN)
    hosts = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | torch.distributed.DistError)
    kinds = RuntimeError | IndexError | TypeError | KeyError | AttributeError | AssertionError
    return brings and isinstance(error, kinds) and not hosts


@contextlib.contextmanager
def _noting_broken_pixels(pipe: Any, finite: list[torch.Tensor]) -> Iterator[None]:
    """Look at pixels before they are clamped, which would make white of Inf; the GPU is not waited for."""
    known: list[Any] = [getattr(pipe, name, None) for name in ("image_processor", "video_processor")]
    processors = [processor for processor in known if processor is not None]
    for processor in processors:
        processor.postprocess = _noting(processor.postprocess, finite)
    try:
        yield
    finally:
        for processor in processors:
            del processor.postprocess


def _noting(inner: Callable[..., Any], finite: list[torch.Tensor]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def postprocess(image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(image, torch.Tensor):
            finite.append(torch.isfinite(image).all())
        return inner(image, *args, **kwargs)

    return postprocess


def _picture(pixels: torch.Tensor) -> Image.Image:
    """A picture of [3, height, width] in 0..1, rounded as diffusers does, but where the pixels are.

    A CPU rounds 1024² in 8 to 17 ms, and floats are four times the bytes to bring there.
    """
    rounded = (pixels.float() * 255).round_().to(torch.uint8)
    return Image.fromarray(rounded.permute(1, 2, 0).contiguous().cpu().numpy())


def _problem(error: Exception) -> FieldProblem:
    """An error in one line, with the field that it names at its start."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:300] if lines else type(error).__name__
    if isinstance(error, SchedulerError | LoraError):
        return FieldProblem("scheduler" if isinstance(error, SchedulerError) else "lora_scales", text)
    name, colon, rest = text.partition(": ")
    if colon and name in GenerateRequest.model_fields:
        return FieldProblem(name, rest)
    return FieldProblem("", text)


class StepWatch:
    """Counts a generation's denoising steps at the scheduler, the one place that every pipeline passes.

    On CUDA the CPU is held at most one step ahead of the GPU, so that progress is true and a cancel acts
    within a step; the wait is for the step before, so the GPU always has the next step's work queued.

    Args:
        pipe: its `scheduler.step` is overridden while the watch is entered.
        device: where it computes.
        on_step: called after each step with (step, steps).
        previewer: sees each step's latents after that.
    """

    def __init__(
        self, pipe: Any, device: torch.device, on_step: OnStep, previewer: Previewer | None = None
    ) -> None:
        self.pipe = pipe
        self.device = device
        self.on_step = on_step
        self.previewer = previewer
        self.step = self.asked = 0
        """Calls of the scheduler so far; steps of the whole schedule."""
        self.timesteps: int | None = None
        """Different ones that were run: a scheduler may take some twice, a request ask for a part."""
        self.latents: torch.Tensor | None = None
        self.finite: list[torch.Tensor] = []
        """Whether what was decoded is all numbers, on the device that has it."""
        self._began = self._ended = time.perf_counter()
        self._first = self._last = self._mark()

    def __enter__(self) -> StepWatch:
        self._scheduler = self.pipe.scheduler
        inner = unhurried_step(self._scheduler)

        # Pipelines look at its signature to know whether it takes their generator.
        @functools.wraps(inner)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            self.after_step(result[0], len(self._scheduler.timesteps))
            if self.previewer is not None:
                self.previewer.after_step(self.step, result, args[0])
            return result

        self._scheduler.step = step
        return self

    def __exit__(self, *exception: Any) -> None:
        del self._scheduler.step
        if self._scheduler.timesteps is not None:
            self.timesteps = len(set(self._scheduler.timesteps.tolist()))

    @property
    def steps(self) -> int:
        """Denoising steps that were run, as a client counts them."""
        return min(self.step, self.asked, self.timesteps or self.step)

    def after_step(self, latents: torch.Tensor | None, steps: int) -> None:
        """A step of `steps` is done; None for latents that are not at hand."""
        self.step += 1
        self.latents = latents
        before, self._last = self._last, self._mark()
        if before is not None:
            before.synchronize()
        self._ended = time.perf_counter()
        self.on_step(self.step, steps)

    def seconds(self) -> float:
        """From the start to the end of the last step, which it waits for."""
        if self._first is None or self._last is None:
            return self._ended - self._began
        self._last.synchronize()
        return self._first.elapsed_time(self._last) / 1000

    def _mark(self) -> torch.cuda.Event | None:
        """A point in the GPU's queue."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
