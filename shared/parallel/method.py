"""The interface of a parallel method to the engine that runs a pipeline with it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from shared.parallel.pipeline import Pipeline, part_of
from shared.parallel.surgery import Closing


class Watch(AbstractContextManager[Any], Protocol):
    """Counts a generation's steps: at the pipeline's scheduler while it is entered, or as reported to it."""

    def after_step(self, latents: torch.Tensor | None, steps: int) -> None:
        """A step of `steps` is done; `latents` is None where they are not available."""
        ...


class Unwatched(contextlib.nullcontext[None]):
    """A Watch that counts nothing."""

    def after_step(self, latents: torch.Tensor | None, steps: int) -> None:
        """Does nothing."""


class Part(Closing):
    """Something that changes modules until ``close``. What it must undo is put on `held`."""

    batches = True  # whether each of several pictures of one call is the one that a call of its own makes

    def __init__(self) -> None:
        self.held = contextlib.ExitStack()
        self.pictures = 1
        """How many the denoiser works on at once."""
        self._steps: int | None = None

    def begin(self, steps: int, pictures: int = 1) -> None:
        """A new generation of `steps` denoiser calls starts, of so many pictures at once."""
        self._steps, self.pictures = steps, pictures

    def begin_late(self, steps: int, first: int) -> None:
        """As `begin`, known only once the pipeline has set its schedule: it starts late.

        Args:
            steps: denoiser calls that are left.
            first: place in the scheduler's timesteps of the first of them.
        """
        self.begin(steps, self.pictures)

    def check_begun(self) -> int:
        """The denoiser calls of this generation. Raises RuntimeError where ``begin`` was not called."""
        if self._steps is None:
            raise RuntimeError("begin(steps) must be called before a generation")
        return self._steps

    def rehearse(self, on: bool) -> None:
        """Whether generations are rehearsals: they run every kind of step within ``warm_up_calls`` calls."""

    def reset(self) -> None:
        """Forget what was traced, captured or recorded: weights or scales of adapters have changed."""

    def close(self) -> None:
        """Undo every change, the last one first. May be called any number of times."""
        self.held.close()


class SharedDecoder(Protocol):
    """By which all ranks decode parts of a picture together."""

    least: int
    """Pixels of a call of the VAE from which they should."""
    active: bool
    """Whether they do; else a rank decodes by itself."""


class Method(Part):
    """A parallel method on a pipeline.

    ``begin`` is called before each generation, and ``run`` for it, on all ranks alike.

    Args:
        pipeline: the diffusers pipeline.
    """

    decoder: SharedDecoder | None = None
    ends_with_latents = True  # whether every rank ends with the latents of the whole picture

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.pipeline = self.running = pipeline

    def take(self, pipeline: Pipeline) -> None:
        """`run` runs this pipeline from now on, which consists of the parts of the first one.

        Raises:
            ValueError: the method runs only the first one.
        """
        self.running = pipeline

    def decodes_together(self, pixels: int) -> bool:
        """Whether all ranks must decode a call of so many pixels, as each decodes a part."""
        return self.decoder is not None and pixels >= self.decoder.least

    @property
    def plan(self) -> dict[str, Any]:
        """What runs where, as JSON."""
        raise NotImplementedError

    @property
    def choice(self) -> str | None:
        """What the method has chosen by itself in the last generation, in words; None where it has not."""
        return None

    @property
    def warm_up_calls(self) -> int:
        """Denoiser calls after which every kind of step has run and been captured."""
        return 1

    @property
    def notes(self) -> list[str]:
        """What whoever asked for the latest generation should be told."""
        return []

    def run(self, arguments: dict[str, Any], watch: Watch) -> Any:
        """What the pipeline gives for these arguments, with its steps reported to `watch`."""
        with watch:
            return self.running(**arguments)


class Plain(Method):
    """The pipeline without any change."""

    @property
    def plan(self) -> dict[str, Any]:
        return {"method": "plain pipeline"}


class CombinedMethod(Method):
    """A method and further parts on one pipeline, handled as one method.

    Args:
        method: its plan is the plan, its `run` runs the pipeline.
        parts: put on after it, and closed before it.
        note: further entries of the plan.
    """

    def __init__(
        self, method: Method, parts: Sequence[Part] = (), note: dict[str, Any] | None = None
    ) -> None:
        super().__init__(method.pipeline)
        self.method, self.parts, self.note = method, [method, *parts], note or {}
        self.decoder, self.ends_with_latents = method.decoder, method.ends_with_latents
        self.batches = all(part.batches for part in self.parts)
        for part in self.parts:
            self.held.enter_context(part)

    @property
    def plan(self) -> dict[str, Any]:
        return self.note | self.method.plan

    @property
    def warm_up_calls(self) -> int:
        return max(part.warm_up_calls for part in self.parts if isinstance(part, Method))

    @property
    def notes(self) -> list[str]:
        return [note for part in self.parts if isinstance(part, Method) for note in part.notes]

    def begin(self, steps: int, pictures: int = 1) -> None:
        super().begin(steps, pictures)
        for part in self.parts:
            part.begin(steps, pictures)

    def begin_late(self, steps: int, first: int) -> None:
        for part in self.parts:
            part.begin_late(steps, first)

    def take(self, pipeline: Pipeline) -> None:
        self.method.take(pipeline)

    @property
    def choice(self) -> str | None:
        return self.method.choice

    def rehearse(self, on: bool) -> None:
        for part in self.parts:
            part.rehearse(on)

    def reset(self) -> None:
        for part in self.parts:
            part.reset()

    def run(self, arguments: dict[str, Any], watch: Watch) -> Any:
        return self.method.run(arguments, watch)


def control_nets(pipeline: Pipeline) -> list[Any]:
    """The ControlNets of a pipeline, one by one.

    Raises:
        ValueError: one of them is given twice: it would be called twice a step.
    """
    net = part_of(pipeline, "controlnet")
    nets = [] if net is None else list(getattr(net, "nets", [net]))
    if len({id(n) for n in nets}) < len(nets):
        raise ValueError("the same ControlNet object is given twice; load it twice")
    return nets
