"""Runs a diffusers pipeline for a request: the part of an engine that all parallel methods share."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from shared.api.codecs import listed
from shared.api.faults import FieldProblem, RequestError, refused
from shared.api.jobs import SecondPass
from shared.api.operations import AddLora, Operation
from shared.api.queue import JobQueue
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.warned import warn
from shared.launch.errors import LoadError, UsageError
from shared.launch.flags import HostConfig
from shared.models import ModelSpec, Start
from shared.parallel.asyncdiff.weights import StageWeights
from shared.parallel.graphs import Captured, uncaptured
from shared.parallel.method import Method, Plain
from shared.parallel.pipeline import Pipeline, part_of
from shared.parallel.sharded import ShardedWeights
from shared.pipeline.arguments import call_arguments, most_frames, warn_of_unheard
from shared.pipeline.batches import Batches, most_together, several
from shared.pipeline.embeddings import embeddings_of
from shared.pipeline.from_picture import PicturePipelines, late_start, start_of
from shared.pipeline.hooks import KnownHooks
from shared.pipeline.latents import enlarged
from shared.pipeline.lora import LoraSet, loras_of
from shared.pipeline.lora_by_name import RunningLoras
from shared.pipeline.lora_file import LoraError
from shared.pipeline.pictures import make_reply, noting_broken_pixels
from shared.pipeline.preview import Previewer, fit_projection
from shared.pipeline.prompts import EncodedPrompts, negative_arguments
from shared.pipeline.refiner import Refiner
from shared.pipeline.schedule_part import part_of_schedule
from shared.pipeline.schedulers import SchedulerError
from shared.pipeline.sharding import parameter_bytes
from shared.pipeline.steps import StepWatch
from shared.pipeline.turns import decoded, decoders, decodes_together
from shared.pipeline.warm_up import warm_up
from shared.ranks.device import freeze_heap
from shared.ranks.groups import World
from shared.ranks.messages import OnStep

log = logging.getLogger("host")


@dataclass(frozen=True)
class _Drawn:
    """A picture that is drawn; decoded where `output` is there, the output of the call that drew it."""

    request: GenerateRequest
    output: Any
    watch: StepWatch
    place: int  # among the call's pictures
    total: float  # seconds so far, and of them for the steps
    denoise: float


def _no_advice(request: GenerateRequest, steps: int) -> str | None:
    return None


class PipelineEngine:
    """An engine (shared.ranks.loop.Engine) around one diffusers pipeline.

    Args:
        pipe: the loaded pipeline, on this rank's device.
        config: the launch.
        world: this rank's place.
        make_parallel: makes the parallel method on the pipeline.
        output_rank: the rank that decodes and holds the picture; the others stop at the latents.
        picture: which of the pictures of one request this rank works on.
        replicas: how many groups of ranks work on pictures of their own.
        weights: the sharded ones of the pipeline, given back in ``close``.
        stage_weights: the same, of models of which a rank keeps a stage.

    Raises:
        LoadError: the parallel method does not fit the loaded pipeline.
    """

    def __init__(
        self,
        pipe: Pipeline,
        config: HostConfig,
        world: World,
        make_parallel: Callable[[Pipeline], Method] = Plain,
        output_rank: int = 0,
        picture: int = 0,
        weights: ShardedWeights | None = None,
        stage_weights: Sequence[StageWeights] = (),
        replicas: int = 1,
        advise: Callable[[GenerateRequest, int], str | None] = _no_advice,
    ) -> None:
        self.picture, self._advise = picture, advise
        self.pipe = pipe
        self.config = config
        self.spec: ModelSpec = config.spec
        self.world = world
        self.output_rank = output_rank
        self._ranks = world.size // replicas
        self._weights, self._stage_weights = weights, stage_weights
        self._loaded = {name: whole for name, (_, whole) in parameter_bytes(pipe).items()}
        """Bytes of each model as it was loaded: PipeFusion takes blocks out of it."""
        self._parameters: dict[str, dict[str, int]] | None = None
        self._make_parallel = make_parallel
        try:
            self.parallel = make_parallel(pipe)
        except UsageError:
            raise
        except ValueError as error:
            raise LoadError(str(error)) from error
        self._hooks = KnownHooks()
        self._prompts = EncodedPrompts()
        self._embeddings = embeddings_of(pipe)
        captures = config.captures(world.device.type) and not config.compile_text_encoder
        captures = captures and self.spec.encoders_capturable and not config.enable_model_cpu_offload
        self._encoders = Captured(pipe, self.spec.text_encoders, captures)
        self._adapter_state: Any = None
        self._eager: set[tuple[int | None, ...]] = set()
        """Shapes of requests that have no room beside captured steps."""
        self._previewer: Previewer | None = None
        refiner = part_of(pipe, "refiner")
        self._refiner = None if refiner is None else Refiner(refiner, pipe, self.spec, make_parallel)
        self._batches = Batches(pipe, config, world)
        self._pipelines = PicturePipelines(pipe, self.spec)
        self._loras = RunningLoras(pipe, config, world, self._operate)

    @property
    def plan(self) -> dict[str, Any]:
        if self._refiner is None:
            return self.parallel.plan
        return self.parallel.plan | {"refiner": self._refiner.method.plan}

    @property
    def embeddings(self) -> list[dict[str, Any]]:
        return [one.told() for one in self._embeddings.found]

    @property
    def parameters(self) -> dict[str, dict[str, int]]:
        if self._parameters is None:
            found = parameter_bytes(self.pipe, self._weights, self._stage_weights)
            self._parameters = {
                name: {"kept": kept, "whole": max(whole, self._loaded[name])}
                for name, (kept, whole) in found.items()
            }
        return self._parameters

    def generate(self, request: GenerateRequest, on_step: OnStep) -> Reply | None:
        return next(iter(self.generate_all(request, on_step, 1)), None)

    def most_at_once(self, request: GenerateRequest) -> int:
        """How many pictures of a request a call of generate_all may be asked for."""
        together = most_together(self.config, request) if self.parallel.batches else 1
        return max(together, self._decoders(request))

    def _decoders(self, request: GenerateRequest) -> int:
        return decoders(self.pipe, self.config, self.parallel, request, self._ranks)

    def generate_all(
        self, request: GenerateRequest, on_step: OnStep, pictures: int, together: bool = True
    ) -> list[Reply]:
        if shape_of(request) in self._eager:
            with uncaptured():
                return self._generate_all(request, on_step, pictures, together)
        return self._generate_all(request, on_step, pictures, together)

    def _generate_all(
        self, request: GenerateRequest, on_step: OnStep, pictures: int, together: bool
    ) -> list[Reply]:
        request = self._embeddings.of(self._loras.of(request))
        turns = min(self._decoders(request), pictures)
        made: list[_Drawn] = []
        drawn = 0
        while drawn < pictures:
            left = pictures - drawn
            count = self._batches.next(request, left, self.parallel) if together else 1

            def step_of_all(step: int, steps: int, before: int = drawn, count: int = count) -> None:
                on_step(before * steps + count * step, pictures * steps)

            one = request.numbered(drawn)
            decodes = turns == 1 and self.world.rank == self.output_rank
            draw = partial(self._draw, one, count, step_of_all, decodes)
            made += self._batches.measured(one, count, draw)
            drawn += count
        mine = made[self.world.rank - self.output_rank :: turns] if self._is_decoder(turns) else []
        return [self._reply(one) for one in mine]

    def _is_decoder(self, turns: int) -> bool:
        return 0 <= self.world.rank - self.output_rank < turns

    def _draw(self, request: GenerateRequest, pictures: int, on_step: OnStep, decodes: bool) -> list[_Drawn]:
        """The pictures of one call of the pipeline."""
        began = time.perf_counter()
        # Some pipelines draw control latents from the global state: alike on all ranks then.
        torch.manual_seed(request.seed or 0)
        watch = StepWatch(self.pipe, self.world.device, on_step, self._previewer)
        if self._previewer is not None:
            self._previewer.begin(request)
        try:
            start = start_of(self.pipe, self.config, request)
            with self._pipelines.of(start, request) as running, self._hooks.known():
                output = self._call(running, start, request, watch, decodes, pictures)
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
        if (choice := self.parallel.choice) is not None:
            warn(f"steps: {choice}")
        if (advice := self._advise(request, watch.step)) is not None:
            warn(advice)
        denoise, total = watch.seconds() / pictures, (time.perf_counter() - began) / pictures
        return [
            _Drawn(request.numbered(place), output if decodes else None, watch, place, total, denoise)
            for place in range(pictures)
        ]

    def _reply(self, drawn: _Drawn) -> Reply:
        """The reply with a picture that this rank decodes, or has decoded."""
        began = time.perf_counter()
        output, place = drawn.output, drawn.place
        pixels: Sequence[torch.Tensor] | torch.Tensor = ()
        if drawn.request.output_format == "latent":
            pass
        elif output is None:
            pixels = decoded(self.pipe, self.config, drawn.request, drawn.watch, place)
        else:
            pixels = output.frames[0] if self.spec.output == "video" else output.images[place : place + 1]
        heard = None if self.spec.sound is None or output is None else output.audio[0]
        if drawn.request.output_format == "latent":
            heard = None
        reply = make_reply(self.pipe, self.config, drawn.request, pixels, drawn.watch, place, heard)
        total = drawn.total + time.perf_counter() - began
        seconds = {"total": total, "denoise": drawn.denoise, "decode": total - drawn.denoise}
        reply.seconds = {name: round(value, 4) for name, value in seconds.items()}
        return reply

    def _call(
        self,
        running: Pipeline,
        start: Start | None,
        request: GenerateRequest,
        watch: StepWatch,
        decodes: bool,
        pictures: int,
    ) -> Any:
        if "lora_scales" in self.spec.fields:
            loras_of(self.pipe, self.spec).set_scales(request.lora_scales or {})
        arguments = call_arguments(running, self.config, request, self.world.device, start)
        arguments = several(arguments, request.seed or 0, pictures)
        watch.asked = arguments["num_inference_steps"]
        together = decodes_together(self.config, self.parallel, request)
        decode = (decodes or together) and request.output_format != "latent"
        output_type = "pt" if decode else "latent"
        refiner = self._refiner if (request.refiner_start or 1) < 1 else None
        if refiner is not None:
            arguments["denoising_end"] = request.refiner_start
        arguments["output_type"] = output_type if refiner is None else "latent"
        if start is not None and (start.kind == "inpaint" or start.begins):
            arguments["callback_on_step_end"] = watch.after_blend
        self._note_adapters(request)
        self.parallel.take(running)
        self.parallel.begin(arguments["num_inference_steps"], pictures)
        if self.parallel.decoder is not None:
            self.parallel.decoder.active = together
        back = watch.with_given_frames(running) if self.spec.puts_frames_back else contextlib.nullcontext()
        try:
            with (
                back,
                noting_broken_pixels(running, watch.finite),
                self._part_of_schedule(running, start, request, watch, arguments),
                self._prompts.of(
                    running,
                    tuple(sorted((request.lora_scales or {}).items())),
                    self.spec,
                    request.prompt_syntax,
                    request.negative,
                ),
            ):
                scale = arguments.get(self.spec.cfg_field, 0.0)
                arguments |= negative_arguments(running, self.spec, request.negative, scale)
                made = self.parallel.run(arguments, watch)
            for note in self.parallel.notes:
                warn(note)
            if (request.cfg or 0) > 1 and not getattr(running, "do_classifier_free_guidance", True):
                warn_of_unheard(request)
            if refiner is None:
                return made
            if not watch.step and (request.image or request.latent) is not None:
                raise refused("refiner_start", "strength leaves no step before it")
            return refiner.run(request, arguments, made.images, self._prompts, watch, output_type)
        finally:
            self.pipe.maybe_free_model_hooks()  # which a pipeline that is interrupted does not reach

    def _part_of_schedule(
        self,
        running: Pipeline,
        start: Start | None,
        request: GenerateRequest,
        watch: StepWatch,
        arguments: dict[str, Any],
    ) -> AbstractContextManager[None]:
        """Run the part of the schedule that is asked for, of which the method and the watch are told."""
        if start is None or start.strength is None or request.image is None:
            return part_of_schedule(running, self.spec, request, arguments)

        def begin(timesteps: torch.Tensor, first: int) -> None:
            watch.part = timesteps
            self.parallel.begin_late(len(timesteps), first)

        return late_start(running, arguments, begin)

    def _note_adapters(self, request: GenerateRequest) -> None:
        """Scales are numbers inside the modules: a captured step would miss their change."""
        state = (request.lora_scales, request.ip_adapter_scale, len(listed(request.ip_image)))
        if state != self._adapter_state and self._adapter_state is not None:
            self._encoders.reset()
            self.parallel.reset()
        self._adapter_state = state

    def warm_up(self, size: tuple[int, int] | None = None) -> None:
        shown = getattr(self.pipe, "_progress_bar_config", {})
        self.pipe.set_progress_bar_config(disable=True)
        refined = 0 if self._refiner is None else self._refiner.method.warm_up_calls
        methods = [self.parallel, *([] if self._refiner is None else [self._refiner.method])]
        for method in methods:
            method.rehearse(True)
        calls, most = self.parallel.warm_up_calls, most_frames(self.pipe, self.spec)
        warm_up(self, self.config, calls, self._encoders.captures, refined, size, most)
        for method in methods:
            method.rehearse(False)
        self.pipe.set_progress_bar_config(**shown)
        self._parameters = None

    def preview_to(self, queue: JobQueue | None) -> None:
        """Show previews to those who watch the queue; None on the ranks that have none."""
        try:
            if queue is not None:
                self._previewer = Previewer(self.pipe, self.spec, queue, self.world.device)
            elif self._weights is not None:
                # The VAE that the other rank asks may be sharded.
                fit_projection(self.pipe.vae, self.world.device, self.spec)
        except (RuntimeError, ValueError, AttributeError) as error:
            log.warning("previews are off: %s", error)

    def enlarge(self, draft: Reply, second: SecondPass) -> bytes:
        """The safetensors of a first pass' latents as its second pass takes them."""
        return enlarged(draft, second)

    def list_loras(self) -> list[dict[str, Any]]:
        """The LoRAs in use, with their scales and how many of their layers fit."""
        return self._loras.in_use()

    def add_lora(self, path: str, scale: float) -> list[dict[str, Any]]:
        """Add a LoRA to the running pipeline, on every rank. Raises RequestError 409."""
        self._loras.add(path, scale)
        return self._loras.in_use()

    def remove_lora(self, path: str) -> list[dict[str, Any]]:
        """Take a LoRA off the running pipeline, on every rank. Raises RequestError 409."""
        self._loras.remove(path)
        return self._loras.in_use()

    def undo(self, operation: Operation) -> None:
        """An operation that succeeded on this rank has failed on another: undo it."""
        if isinstance(operation, AddLora):
            self.remove_lora(operation.path)

    def free_memory(self, request: GenerateRequest | None) -> None:
        """Drop captured steps, buffers of other sizes and cached embeddings, on all ranks alike.

        Args:
            request: had no room and comes again: requests of its size are no longer captured, because what a
                graph holds is not there for decoding.
        """
        if request is not None:
            self._eager.add(shape_of(request))
        self._prompts.forget()
        self._encoders.reset()
        self.parallel.reset()
        if self._refiner is not None:
            self._refiner.method.reset()

    def _operate(self, change: Callable[[LoraSet], None]) -> None:
        """Layers are replaced, so the surgery is undone before and done again after."""
        self.parallel.close()
        self._prompts.forget()
        self._encoders.reset()
        try:
            change(loras_of(self.pipe, self.spec))
        finally:
            self.parallel = self._make_parallel(self.pipe)
            self._parameters = None
            freeze_heap()

    def close(self) -> None:
        if self._refiner is not None:
            self._refiner.close()
        self.parallel.close()
        self._encoders.close()
        if self._weights is not None:
            self._weights.close()
        for weights in self._stage_weights:
            weights.close()


def shape_of(request: GenerateRequest) -> tuple[int | None, ...]:
    """What of a request its memory depends on."""
    return request.width, request.height, request.frames


CONTENT_FIELDS = frozenset(
    {"scheduler", "sigmas", "timesteps", "latent", "positive_embeds", "negative_embeds", "image", "mask"}
)
"""Fields whose content the models and schedulers may fail on, before the first step."""


def _is_refusal(error: Exception, request: GenerateRequest) -> bool:
    """Whether an error before the first step is the request's fault.

    That is what a feature or the pipeline refuses, and what fails on the request's own tensors or settings.
    """
    if isinstance(error, ValueError):
        return True
    brings = any(getattr(request, name) is not None for name in CONTENT_FIELDS)
    hosts = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | torch.distributed.DistError)
    kinds = RuntimeError | IndexError | TypeError | KeyError | AttributeError | AssertionError
    return brings and isinstance(error, kinds) and not hosts


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
