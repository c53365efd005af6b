"""Overrides of a scheduler during a generation: steps without waits, their count, parts of the schedule."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from shared.parallel.pipeline import Pipeline
from shared.parallel.surgery import Surgery
from shared.pipeline.preview import Previewer
from shared.ranks.messages import OnStep


def step_without_sync(scheduler: Any) -> Callable[..., Any]:
    """`scheduler.step` without its waits for the GPU: the same numbers, looked up on the CPU.

    Some schedulers look their tables up by timesteps on the GPU (DDIM, DDPM, LCM, PNDM), and noise that a
    CPU's generator draws is copied with a wait (DDPM, Euler ancestral). Each waits, in every step, until the
    GPU has done all that is queued, and then the GPU waits for the next step.
    """
    inner = scheduler.step
    module = sys.modules[type(scheduler).__module__]
    draws = "randn_tensor" in vars(module)
    timesteps: torch.Tensor | None = None
    on_host: torch.Tensor | None = None

    @functools.wraps(inner)
    def step(model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal timesteps, on_host
        if timesteps is not scheduler.timesteps or on_host is None:
            timesteps = scheduler.timesteps
            on_host = timesteps.to("cpu", copy=True)
        if _is_one_of(timestep, timesteps):
            timestep = on_host[timestep.storage_offset() - timesteps.storage_offset()]
        with Surgery() as surgery:
            surgery.replace(scheduler, "timesteps", on_host)
            if draws:
                surgery.replace(module, "randn_tensor", _noise)
            return inner(model_output, timestep, *args, **kwargs)

    return step


def _noise(
    shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
) -> torch.Tensor:
    """diffusers' `randn_tensor`; what a CPU's generator draws reaches the GPU without a wait."""
    first = generator[0] if isinstance(generator, list) else generator
    drawn_here = first is not None and first.device.type == "cpu"
    if not drawn_here or device is None or torch.device(device).type != "cuda":
        return randn_tensor(shape, generator, device, dtype, layout)
    drawn = randn_tensor(shape, generator, torch.device("cpu"), dtype, layout)
    return drawn.pin_memory().to(device, non_blocking=True)


def _is_one_of(timestep: Any, timesteps: torch.Tensor) -> bool:
    """Whether it is an element of them: a view, as pipelines get when they go through them."""
    return (
        isinstance(timestep, torch.Tensor)
        and timestep.ndim == 0
        and timesteps.stride() == (1,)
        and timestep.dtype == timesteps.dtype
        and timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
        and 0 <= timestep.storage_offset() - timesteps.storage_offset() < len(timesteps)
    )


def without_overrides(scheduler: Any, memo: dict[int, Any]) -> Any:
    """A copy of a scheduler (LTX-2 steps its sound with one) that does not step the scheduler itself."""
    cls: Any = type(scheduler)
    made = memo[id(scheduler)] = cls.__new__(cls)
    own = {k: v for k, v in vars(scheduler).items() if k != "__deepcopy__" and not hasattr(cls, k)}
    vars(made).update(copy.deepcopy(own, memo))
    return made


@contextlib.contextmanager
def after_set_timesteps(scheduler: Any, act: Callable[[], None]) -> Iterator[None]:
    """Inside, `act` is called whenever the scheduler's schedule has been set."""
    inner = scheduler.set_timesteps

    # Pipelines look at its signature to know whether it takes their sigmas.
    @functools.wraps(inner)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        act()

    with Surgery() as surgery:
        surgery.replace(scheduler, "set_timesteps", set_timesteps)
        yield


@contextlib.contextmanager
def whole_while_stepping(scheduler: Any) -> Iterator[Callable[[torch.Tensor], None]]:
    """Inside, the scheduler can show a part of its schedule, but steps within the whole schedule.

    That is how diffusers' image-to-image pipelines run a part: solvers know where in the schedule they are.

    Yields:
        what takes the timesteps to show, once the schedule has been set; the scheduler begins at the first.
    """
    inner, whole = scheduler.step, scheduler.timesteps

    @functools.wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        with Surgery() as stepping:
            stepping.replace(scheduler, "timesteps", whole)
            return inner(*args, **kwargs)

    with Surgery() as surgery:
        surgery.replace(scheduler, "step", step)

        def show(part: torch.Tensor) -> None:
            nonlocal whole
            whole = scheduler.timesteps.to("cpu", copy=True)  # no wait for the GPU in each step
            scheduler.timesteps = part
            if hasattr(scheduler, "set_begin_index"):  # pipelines would set it back to the beginning
                surgery.replace(scheduler, "set_begin_index", lambda begin_index=0: None)

        yield show


class StepWatch:
    """Counts a generation's denoising steps at the scheduler, the one place that every pipeline calls.

    On CUDA the CPU is held at most one step ahead of the GPU, so that progress is true and a cancel acts
    within a step; the wait is for the step before, so the GPU always has the next step's work queued.

    Args:
        pipe: its `scheduler.step` is overridden while the watch is entered.
        device: where it computes.
        on_step: called after each step with (step, steps).
        previewer: sees each step's latents after that.
    """

    def __init__(
        self, pipe: Pipeline, device: torch.device, on_step: OnStep, previewer: Previewer | None = None
    ) -> None:
        self.pipe = pipe
        self.device = device
        self.on_step = on_step
        self.previewer = previewer
        self.step = self.asked = 0
        """Calls of the scheduler so far; steps of the whole schedule."""
        self.part: torch.Tensor | None = None
        """The timesteps that are run, where a pipeline takes only the last ones of the schedule."""
        self.timesteps: int | None = None
        """Number of different timesteps run: a scheduler may run some twice, a request may ask for a part."""
        self.latents: torch.Tensor | None = None
        self.finite: list[torch.Tensor] = []
        """Whether decoded tensors are free of NaN and Inf, on their device."""
        self._surgery = Surgery()
        self._began = self._ended = time.perf_counter()
        self._first = self._last = self._mark()

    def __enter__(self) -> StepWatch:
        scheduler = self._scheduler = self.pipe.scheduler
        inner = step_without_sync(scheduler)

        # Pipelines look at its signature to know whether it takes their generator.
        @functools.wraps(inner)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            self.after_step(result[0], len(self._run))
            if self.previewer is not None:
                self.previewer.after_step(self.step, result, args[0])
            return result

        self._surgery.replace(scheduler, "step", step)
        self._surgery.add(scheduler, "__deepcopy__", functools.partial(without_overrides, scheduler))
        return self

    def __exit__(self, *error: object) -> None:
        self._surgery.close()
        if self._run is not None:
            self.timesteps = len(set(self._run.tolist()))

    @property
    def _run(self) -> torch.Tensor:
        return self._scheduler.timesteps if self.part is None else self.part

    @property
    def steps(self) -> int:
        """Denoising steps that were run, as a client counts them."""
        return min(self.step, self.asked, self.timesteps or self.step)

    def after_step(self, latents: torch.Tensor | None, steps: int) -> None:
        """A step of `steps` is done; `latents` is None where they are not available."""
        self.step += 1
        self.latents = latents
        before, self._last = self._last, self._mark()
        if before is not None:
            before.synchronize()
        self._ended = time.perf_counter()
        self.on_step(self.step, steps)

    def after_blend(self, pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        """What pipelines call at the end of a step: with the latents of the picture, which no step made."""
        self.latents = given["latents"]
        return given

    @contextlib.contextmanager
    def with_given_frames(self, pipe: Pipeline) -> Iterator[None]:
        """After it, the latents have the given frames that the pipeline has put back at its end."""
        inner = pipe.prepare_latents
        given: list[torch.Tensor] = []

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            latents, frames, free = inner(*args, **kwargs)
            given[:] = [frames, free]
            return latents, frames, free

        with Surgery() as surgery:
            surgery.replace(pipe, "prepare_latents", prepare_latents)
            yield
        if self.latents is not None and given:
            frames, free = given
            self.latents = (1 - free) * frames + free * self.latents

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
