"""What one rank holds of a partitioned denoiser, and a forward in which it runs only its own stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from shared.parallel.asyncdiff.partition import Partition
from shared.parallel.asyncdiff.timing import UnitTimer
from shared.parallel.asyncdiff.trace import Call, Value, candidates, parameter_names
from shared.parallel.graphs import Graphs
from shared.parallel.surgery import Forward, Surgery

Key = tuple[str, int]
"""Qualified name of a module and which of its calls in this forward."""
Wanted = dict[Key, list[tuple[int, int]]]
"""Per call the outputs that are wanted, as (index among its output leaves, id of the value)."""


@dataclass
class Answer:
    """What a call that is not run here returns."""

    call: Call
    leaves: list[Any]
    skipped: Counter[str]
    """How often the modules inside it would have been called."""

    def __call__(self, args: tuple, kwargs: dict) -> Any:
        leaves, given = list(self.leaves), None
        for i, leaf in enumerate(self.call.outputs):
            if leaf.kind == "argument":
                given = tree_leaves((args, kwargs)) if given is None else given
                leaves[i] = given[leaf.item]
        assert self.call.spec is not None
        return tree_unflatten(leaves, self.call.spec)


class Stage:
    """One stage at one signature of the denoiser's arguments: its view, static buffers and graphs.

    ``current`` holds the outputs of other stages that this step uses, ``inbox`` those that it receives for
    the next step; ``now`` and ``next`` hold the predictions for this step and, with stride 2, the next one.
    ``predictions`` is how many of the two there are. ``kept`` is what an exact step records: what the stage
    takes and, where it ``leads``, what it gives.
    """

    def __init__(
        self,
        plan: Partition,
        stage: int,
        device: torch.device,
        graphs: Graphs,
        predictions: int = 2,
        leads: bool = False,
    ) -> None:
        self.partition, self.graphs, self.device = plan, graphs, device
        self.calls = 0
        """Calls of the denoiser since the generation began."""
        self.late = 0
        """Asynchronous steps since the last exact one."""
        self.start = 0
        """Position in the schedule of the first of them."""
        self.view, self._trace = plan.views[stage], plan.trace
        self.current = {v: self._buffer(self._trace.values[v]) for v in self.view.needs}
        self.inbox = {v: self._buffer(self._trace.values[v]) for v in self.view.needs}
        given = self.view.gives if leads else ()
        self.kept = self.inbox | {v: self._buffer(self._trace.values[v]) for v in given}
        self.takes = self._wanted(self.kept)
        self.gives = self._wanted(self.view.gives)
        self.units = {_key(self._trace.calls[i]): self._trace.calls[i].label for i in self._trace.units}
        self.answers = {
            _key(self._trace.calls[i]): self._answer(self._trace.calls[i]) for i in self.view.replaced
        }
        root = self._trace.calls[0]
        self.predicted = [i for i, leaf in enumerate(root.outputs) if leaf.kind == "value"]
        values = [self._trace.values[root.outputs[i].item] for i in self.predicted]
        self.now = [self._buffer(value) for value in values] if predictions > 0 else []
        self.next = [self._buffer(value) for value in values] if predictions > 1 else []

    def result(self, predictions: list[torch.Tensor]) -> Any:
        """What the denoiser returns: copies of the predictions in the structure of its output."""
        root = self._trace.calls[0]
        leaves = [leaf.item for leaf in root.outputs]
        for i, tensor in zip(self.predicted, predictions, strict=True):
            leaves[i] = tensor.clone()
        assert root.spec is not None
        return tree_unflatten(leaves, root.spec)

    def _buffer(self, value: Value) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=self.device)

    def _wanted(self, values: Iterable[int]) -> Wanted:
        wanted: Wanted = {}
        for value in values:
            call = self._trace.calls[self._trace.values[value].call]
            leaf = next(i for i, x in enumerate(call.outputs) if x.kind == "value" and x.item == value)
            wanted.setdefault(_key(call), []).append((leaf, value))
        return wanted

    def _answer(self, call: Call) -> Answer:
        leaves: list[Any] = []
        for leaf in call.outputs:
            if leaf.kind == "value" and leaf.item not in self.current:
                # Right in shape and dtype for what lies between units, but one element of memory.
                value = self._trace.values[leaf.item]
                with torch.inference_mode(False):
                    leaves.append(torch.zeros(1, dtype=value.dtype, device=self.device).expand(value.shape))
            else:
                leaves.append(self.current[leaf.item] if leaf.kind == "value" else leaf.item)
        return Answer(call, leaves, Counter(self._trace.calls[i].name for i in call.inside))


def _key(call: Call) -> Key:
    return call.name, call.occurrence


class Run:
    """The current forward: answers the calls of other stages and passes wanted outputs on.

    Args:
        wanted: outputs that are handed to ``take(value, tensor)`` as soon as they are made.
        answers: calls that are not run; empty runs everything.
        units: calls to count, with their labels.
        executions: where they are counted.
        arrive: called with each answer before it is given.
    """

    def __init__(
        self,
        wanted: Wanted,
        take: Callable[[int, torch.Tensor], None],
        answers: dict[Key, Answer],
        units: dict[Key, str],
        executions: Counter[str],
        arrive: Callable[[Answer], None] | None = None,
    ) -> None:
        self.wanted, self.take, self.answers = wanted, take, answers
        self.units, self.executions, self.arrive = units, executions, arrive
        self.occurrences: Counter[str] = Counter()

    def call(self, name: str, original: Forward, args: tuple, kwargs: dict) -> Any:
        """Called in place of the forward of every module that may be cut around."""
        key = (name, self.occurrences[name])
        self.occurrences[name] += 1
        answer = self.answers.get(key)
        if answer is not None:
            self.occurrences.update(answer.skipped)
            if self.arrive is not None:
                self.arrive(answer)
            return answer(args, kwargs)
        if key in self.units:
            self.executions[self.units[key]] += 1
        out = original(*args, **kwargs)
        if key in self.wanted:
            leaves = tree_leaves(out)
            for leaf, value in self.wanted[key]:
                self.take(value, leaves[leaf])
        return out


class Units:
    """A denoiser's modules, overridden: during a call each answers as that call's run says.

    Args:
        denoiser: has the modules.
        forward: answers for the denoiser itself.
        surgery: collects what is overridden.
    """

    def __init__(
        self, denoiser: nn.Module, forward: Callable[[Forward, tuple, dict], Any], surgery: Surgery
    ) -> None:
        self._names = parameter_names(denoiser)
        self._run: Run | UnitTimer | None = None
        surgery.override(denoiser, forward)
        for name, module, _ in candidates(denoiser):
            surgery.override(module, self._answer(name))

    def named(self, args: tuple, kwargs: dict) -> tuple[dict[str, Any], torch.device]:
        """A call's arguments by name, the timestep as a tensor, which a graph can be replayed with; and the
        device of the sample."""
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        device, t = kwargs[self._names[0]].device, kwargs["timestep"]
        if not isinstance(t, torch.Tensor):
            dtype = torch.float64 if isinstance(t, float) else torch.int64
            kwargs["timestep"] = torch.tensor(t, dtype=dtype, device=device)
        return kwargs, device

    def under(self, run: Run | UnitTimer, original: Forward, kwargs: dict[str, Any]) -> Any:
        """Call the denoiser; its modules answer as `run` says."""
        self._run = run
        try:
            return original(**kwargs)
        finally:
            self._run = None

    def _answer(self, name: str) -> Callable[[Forward, tuple, dict], Any]:
        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            if self._run is None:
                return original(*args, **kwargs)
            return self._run.call(name, original, args, kwargs)

        return answer
