"""LoRAs of a running pipeline: added and removed between requests, or loaded as a request names them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from shared.api.faults import FieldProblem, RequestError
from shared.api.lora_dir import LoraNameError, find_lora
from shared.api.requests import GenerateRequest
from shared.api.warned import warn
from shared.launch.flags import HostConfig
from shared.parallel.pipeline import Pipeline
from shared.pipeline.lora import LoraSet, loras_of
from shared.pipeline.lora_file import LoraError
from shared.ranks.groups import World

NAMED_LORAS = 4  # of --lora_dir stay loaded between requests

Change = Callable[[LoraSet], None]


class RunningLoras:
    """The LoRAs of one pipeline while it serves. All ranks make the same calls.

    Args:
        pipe: the loaded pipeline.
        config: the launch.
        world: this rank's place.
        operate: applies a change to the pipeline's LoRAs, between two generations.
    """

    def __init__(
        self, pipe: Pipeline, config: HostConfig, world: World, operate: Callable[[Change], None]
    ) -> None:
        self.pipe, self.config, self.world, self._operate = pipe, config, world, operate
        self._named: dict[str, int] = {}
        """LoRAs that requests have named, the least recently used first: path -> when the file changed."""

    @property
    def _loras(self) -> LoraSet:
        return loras_of(self.pipe, self.config.spec)

    def in_use(self) -> list[dict[str, Any]]:
        """The LoRAs in use, with their scales and how many of their layers fit."""
        return [
            {"path": e.path, "scale": e.scale, "layers": e.matched, "layers_left_out": e.unmatched}
            for e in self._loras.loaded.values()
            if e.path not in self._named
        ]

    def add(self, path: str, scale: float) -> None:
        """Add a LoRA to the running pipeline. Raises RequestError 409."""

        def change(loras: LoraSet) -> None:
            same = {os.path.realpath(known): known for known in loras.loaded}.get(
                os.path.realpath(path), path
            )
            if self._named.pop(same, None) is not None:  # a request has loaded it before
                loras.remove(same)
            elif same in loras.loaded:
                raise LoraError(f"LoRA {path!r} is loaded already")
            loras.add(path, scale)

        self._change(change)

    def remove(self, path: str) -> None:
        """Remove a LoRA from the running pipeline. Raises RequestError 409."""

        def change(loras: LoraSet) -> None:
            known = loras.name_of(path)
            loras.remove(known)
            self._named.pop(known, None)

        self._change(change)

    def _change(self, change: Change) -> None:
        try:
            self._operate(change)
        except ValueError as error:
            raise RequestError(409, [FieldProblem("lora", str(error))]) from error

    def of(self, request: GenerateRequest) -> GenerateRequest:
        """The request with paths for the names of its LoRAs, those of --lora_dir loaded at scale 0.

        All ranks load all of them or none does. Raises RequestError.
        """
        if not request.lora_scales or not self.config.lora_dir:
            return request
        loras = self._loras
        mine, problem = _tried(lambda: self._looked_up(request.lora_scales or {}, loras))
        self._agree(mine, problem)
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

            _, problem = _tried(lambda: self._operate(change))
            try:
                self._agree(None, problem)
            except Exception:
                self._operate(lambda loras: self._forget(loras, new))
                raise
        for name, path in zip(request.lora_scales, files, strict=True):
            if path in self._named:
                self._named[path] = self._named.pop(path)
            one = loras.loaded[path]
            if one.unmatched:
                layers = one.matched + one.unmatched
                warn(
                    f"lora_scales: {one.matched} of {layers} layers of {name!r} fit; the others are left out"
                )
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

    def _forget(self, loras: LoraSet, paths: Iterable[str]) -> None:
        for path in paths:
            if self._named.pop(path, None) is not None:
                loras.remove(path)

    def _agree(self, mine: dict[str, int] | None, problem: Exception | None) -> None:
        """Raise on all ranks where one has a problem, or where they have found different files."""
        text = None if problem is None else str(problem)
        votes: list[Any] = [(mine and [*mine], text)] * self.world.size
        if self.world.size > 1:
            torch.distributed.all_gather_object(votes, votes[0], group=self.world.voting)
        problems = [text for _, text in votes if text is not None]
        if problem is not None and not isinstance(problem, ValueError):
            raise problem
        if not problems and any(found != votes[0][0] for found, _ in votes):
            problems = ["the ranks found different files in their --lora_dir"]
        if problems:
            raise RequestError(422, [FieldProblem("lora_scales", problems[0])]) from problem


def _tried(act: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return act(), None
    except Exception as error:
        return None, error
