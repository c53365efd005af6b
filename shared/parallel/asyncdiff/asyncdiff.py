"""AsyncDiff: the denoiser's stages run in parallel, each on stale outputs of the others.

Source: Chen et al., "AsyncDiff: Parallelizing Diffusion Models by Asynchronous Denoising", arXiv 2406.06911:
section 3.2 (asynchronous denoising), 3.3 (stride denoising); the time shift is a variant of its code.

Warm-up steps run the whole denoiser on every rank and are exact. In the steady state rank ``s`` runs only
stage ``s``, with stale outputs (from the step before) of the other stages. With stride 2 one parallel batch
serves two steps: ranks 0 to n - 1 work with the timestep of the next step and rank n repeats the last stage
with the current one; the following step computes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from shared.parallel.asyncdiff.partition import Partition, partition
from shared.parallel.asyncdiff.stage import Answer, Run, Stage, Units
from shared.parallel.asyncdiff.timing import UnitTimer
from shared.parallel.asyncdiff.trace import Trace, trace
from shared.parallel.chosen_steps import Pace
from shared.parallel.exchange import Exchange, Ranks, broadcast
from shared.parallel.graphs import Graphs, signature
from shared.parallel.method import Method
from shared.parallel.pipeline import Pipeline, part_of
from shared.parallel.shapes import Latest
from shared.parallel.surgery import Forward, Surgery

if TYPE_CHECKING:
    from shared.parallel.asyncdiff.weights import StageWeights


class AsyncDiff(Method):
    """Makes the denoiser of a diffusers pipeline run in stages on the ranks of a process group.

    Every rank holds the whole pipeline and makes the same calls with the same arguments. ``begin`` must be
    called before each generation. Any signature of the denoiser's arguments (picture size, batch, …) is
    traced and partitioned when it first occurs.

    Args:
        pipeline: has a ``scheduler`` and a ``unet`` or ``transformer``; loaded with adapters, quantized and
            compiled as wanted. A compiled module must be compiled through its ``forward`` attribute.
        model_n: number of stages.
        stride: 1, or 2 for one parallel batch per two steps; takes one more rank.
        warm_up_steps, async_steps: as in ``Pace``: exact steps at the start of each generation, and how many
            are asynchronous; those that follow are exact again.
        time_shift: in steady state, embed the timestep of the step before.
        group: ranks that take part, model_n + stride - 1 of them; None for all.
        stage_weights: relative speed of the stages' devices, model_n numbers.
        cuda_graph: capture and replay steps on CUDA.
        measure_units: divide by each unit's measured time, not its FLOPs; another run may divide differently.
        denoiser: the module to divide, when it is neither ``unet`` nor ``transformer``.
        max_shapes: signatures whose buffers and graphs are kept.
        weights: of the denoiser, of which this rank keeps its stage's; made of the same group. Exact steps
            then run stage after stage over the ranks.
        pace: decides instead of those two numbers, for several modules alike.
        notes: whether it is told what this module's steps make.
        leader: the rank whose exact steps the asynchronous ones go on from, where the ranks compute different
            guidance branches in exact steps (``HybridSplit``); None: all compute the same.

    Raises:
        ValueError: impossible values, or a group of the wrong size.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        model_n: int,
        stride: int = 1,
        warm_up_steps: int | str | None = 1,
        time_shift: bool = False,
        *,
        group: dist.ProcessGroup | None = None,
        stage_weights: Sequence[float] | None = None,
        cuda_graph: bool = True,
        measure_units: bool = False,
        denoiser: nn.Module | None = None,
        max_shapes: int = 4,
        async_steps: int | str | None = None,
        weights: StageWeights | None = None,
        leader: int | None = None,
        pace: Pace | None = None,
        notes: bool = True,
    ) -> None:
        if model_n < 1 or stride not in (1, 2):
            raise ValueError(
                f"model_n must be 1 or more and stride 1 or 2; got model_n {model_n}, stride {stride}"
            )
        if stage_weights is not None and len(stage_weights) != model_n:
            raise ValueError(
                f"stage_weights must hold {model_n} numbers, one for each stage; got {len(stage_weights)}"
            )
        _, rank, ranks = Ranks.of(group)
        if ranks != model_n + stride - 1:
            raise ValueError(
                f"model_n {model_n} with stride {stride} needs {model_n + stride - 1} ranks (model_n + "
                f"stride - 1); the group has {ranks}"
            )
        found = denoiser or part_of(pipeline, "unet") or part_of(pipeline, "transformer")
        if not isinstance(found, nn.Module):
            raise ValueError(
                f"{type(pipeline).__name__} has no unet or transformer; pass the module as denoiser"
            )
        super().__init__(pipeline)
        self.denoiser, self.group = found, group
        self.model_n, self.stride, self.time_shift = model_n, stride, time_shift
        self.pace = pace or Pace(warm_up_steps, async_steps, group)
        self._notes = notes
        self.stage_weights = stage_weights
        self.rank, self.ranks, self.leader = rank, ranks, leader
        self.stage = min(self.rank, model_n - 1)
        self.extra = self.rank == model_n
        """Whether this rank repeats the last stage for the current step (stride 2)."""
        self.executions: Counter[str] = Counter()
        """How often each unit ran here in this generation's asynchronous steps, graph replays not counted."""
        self.measure_units, self.weights = measure_units, weights
        # Another batch may be divided differently, or change in other steps.
        self.batches = not (measure_units or self.pace.measures)
        self._cuda_graph = cuda_graph
        self._stages: Latest[Stage] = Latest(max_shapes, lambda stage: stage.graphs.close())
        self._first = 0
        """Place in the schedule of a generation's first step."""
        self.held.callback(self.reset)
        surgery = self.held.enter_context(Surgery())
        self._units = Units(found, self._forward, surgery)

    @property
    def warm_up_calls(self) -> int:
        captures = self._cuda_graph and next(self.denoiser.parameters()).is_cuda
        return self.pace.rehearsed + 2 * self.stride if captures else 1

    def asynchronous(self, step: int) -> bool:
        """Whether this step of a generation, counted from 0, is not exact."""
        return self.ranks > 1 and self.pace.asynchronous(step)

    def begin(self, steps: int, pictures: int = 1) -> None:
        """A new generation of ``steps`` steps starts: its first ones are exact again."""
        super().begin(steps, pictures)
        self.pace.begin(steps)
        self._first = 0
        self.executions.clear()
        for stage in self._stages:
            stage.calls = stage.late = 0

    def begin_late(self, steps: int, first: int) -> None:
        super().begin_late(steps, first)
        self._first = first

    def rehearse(self, on: bool) -> None:
        self.pace.rehearsing = on

    @property
    def choice(self) -> str | None:
        return self.pace.told

    def reset(self) -> None:
        """Forget all traces, partitions, buffers and graphs: after adapters or weights have changed."""
        self._stages.clear()

    @property
    def partition(self) -> Partition | None:
        """The division in use for the latest signature; None before the first step."""
        return self._stages.last.partition if self._stages.last else None

    @property
    def plan(self) -> dict[str, Any]:
        """JSON-able: the settings, and what each stage computes once a first step has been traced."""
        plan: dict[str, Any] = {
            "method": "asyncdiff",
            "model_n": self.model_n,
            "stride": self.stride,
            "warm_up_steps": self.pace.warm_up_steps,
            "async_steps": self.pace.async_steps,
            "time_shift": self.time_shift,
            "ranks": [f"stage {min(r, self.model_n - 1)}" for r in range(self.ranks)],
        }
        return plan | (self.partition.as_dict() if self.partition else {})

    def _forward(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        steps = self.check_begun()
        kwargs, device = self._units.named(args, kwargs)
        stage = self._stage_for(original, kwargs, device)
        step, stage.calls = stage.calls, stage.calls + 1
        if step == 0:
            stage.start = self._position(kwargs["timestep"])
        if step >= max(steps, len(self.pipeline.scheduler.timesteps)):
            raise RuntimeError(
                f"the denoiser was called {step + 1} times since begin(steps={steps}); call begin before "
                "each generation"
            )
        answer = self._answer(stage, step, original, kwargs)
        if self._notes and self.pace.measures:
            self.pace.note(step, tree_leaves(answer)[0])
        return answer

    def _answer(self, stage: Stage, step: int, original: Forward, kwargs: dict[str, Any]) -> Any:
        if not self.asynchronous(step):
            stage.late = 0
            exact = self._synchronous if self.weights is None else self._in_turn
            return stage.graphs.run("synchronous", lambda **k: exact(stage, original, k), **kwargs)
        if self.leader is not None and not stage.late:
            self._hand_over(stage)
        stage.late += 1
        if (stage.late - 1) % self.stride:
            return stage.result(stage.next)
        kwargs["timestep"] = self._timestep(kwargs["timestep"], stage.start + step)
        return stage.graphs.run("asynchronous", lambda **k: self._asynchronous(stage, original, k), **kwargs)

    def _stage_for(self, original: Forward, kwargs: dict[str, Any], device: torch.device) -> Stage:
        # Numbers (a ControlNet's scale) make other graphs, not other stages.
        key = signature({name: None if isinstance(x, float) else x for name, x in kwargs.items()})
        if (known := self._stages.get(key)) is not None:
            return known
        traced, _ = trace(self.denoiser, kwargs, original)
        costs = self._unit_seconds(traced, original, kwargs, device) if self.measure_units else None
        held = given = None
        if self.weights is not None:
            calls = [traced.calls[index] for index in traced.units]
            held = self.weights.unit_bytes([call.name for call in calls])
            given = self.weights.assigned([call.label for call in calls])
        plan = partition(traced, self.model_n, self.stage_weights, costs, held=held, assignment=given)
        if self.weights is not None:
            self.weights.keep(plan, self.stage)
        predictions = 0 if self.ranks == 1 else self.stride
        self._stages.make_room()  # before the buffers of another stage are made
        leads = self.leader == self.rank
        stage = Stage(plan, self.stage, device, Graphs(self._cuda_graph), predictions, leads)
        return self._stages.put(key, stage)

    def _unit_seconds(
        self, traced: Trace, original: Forward, kwargs: dict[str, Any], device: torch.device
    ) -> list[float]:
        """Mean over the group, so that all ranks cut alike. Weights may be elsewhere between calls."""
        timer = UnitTimer(traced, device)
        mine = timer.seconds(lambda: self._units.under(timer, original, kwargs))
        total = torch.tensor(mine, dtype=torch.float32, device=device)
        if self.ranks > 1:
            dist.all_reduce(total, group=self.group)
        return (total / self.ranks).tolist()

    def _position(self, t: torch.Tensor) -> int:
        if self.stride == 1 and not self.time_shift:
            return 0  # the schedule is not needed
        schedule = self.pipeline.scheduler.timesteps
        found = (schedule[self._first :] == t.flatten()[0].to(schedule)).nonzero()
        if not len(found):
            raise ValueError(
                f"timestep {t.flatten()[0].item()} is not one of the scheduler's: {schedule.tolist()}"
            )
        return self._first + int(found[0])

    def _timestep(self, t: torch.Tensor, position: int) -> torch.Tensor:
        """The timestep that this rank embeds in the parallel batch at this position of the schedule."""
        schedule = self.pipeline.scheduler.timesteps
        ahead = self.stride == 2 and not self.extra and position + 1 < len(schedule)
        chosen = position + ahead - self.time_shift
        if chosen == position:
            return t
        return schedule[chosen].to(device=t.device, dtype=t.dtype).expand(t.shape).clone()

    def _synchronous(self, stage: Stage, original: Forward, kwargs: dict[str, Any]) -> Any:
        """The whole denoiser, recording what this stage will take from others."""

        def keep(value: int, tensor: torch.Tensor) -> None:
            stage.kept[value].copy_(tensor)

        record = Run(stage.takes, keep, {}, {}, self.executions)
        return self._units.under(record, original, kwargs)

    def _hand_over(self, stage: Stage) -> None:
        """The leader's outputs of the exact step before, for the ranks that computed another branch in it."""
        values = stage.partition.trace.values
        exchange = Exchange(self.group, early=stage.device.type == "cpu")
        if self.rank == self.leader:
            for value in stage.view.gives:
                for rank in self._takers(stage, value):
                    exchange.send(stage.kept[value], rank, value, values[value].stride)
        else:
            for value, owner in stage.view.needs.items():
                if owner == min(self.leader or 0, self.model_n - 1):
                    exchange.receive(stage.inbox[value], self.leader or 0, value)
        exchange.finish()

    def _in_turn(self, stage: Stage, original: Forward, kwargs: dict[str, Any]) -> Any:
        """An exact step of all ranks: each runs its stage on what other stages have made in this step.

        All transfers are in the order in which the values are made, on both sides of every pair.
        """
        values, here = stage.partition.trace.values, set[int]()
        exchange = Exchange(self.group, early=True)

        def arrive(answer: Answer) -> None:
            made = {leaf.item for leaf in answer.call.outputs if leaf.kind == "value"}
            for value in sorted(made & stage.inbox.keys() - here):
                here.add(value)
                exchange.receive_now(stage.inbox[value], stage.view.needs[value], value)
                stage.current[value].copy_(stage.inbox[value])

        def send(value: int, tensor: torch.Tensor) -> None:
            for rank in self._takers(stage, value):
                exchange.send(tensor, rank, value, values[value].stride)

        gives = {} if self.extra else stage.gives
        run = Run(gives, send, stage.answers, stage.units, self.executions, arrive)
        leaves = tree_leaves(self._units.under(run, original, kwargs))
        exchange.finish()
        for i, buffer in zip(stage.predicted, stage.now, strict=True):
            if self.stage == self.model_n - 1:
                buffer.copy_(leaves[i])
            broadcast(buffer, self.model_n - 1, Ranks.of(self.group))
        return stage.result(stage.now)

    def _takers(self, stage: Stage, value: int) -> list[int]:
        """The ranks that take a value of this stage; the last stage is on all further ranks."""
        last = self.model_n - 1
        return [r for s in stage.view.gives[value] for r in range(s, self.ranks if s == last else s + 1)]

    def _asynchronous(self, stage: Stage, original: Forward, kwargs: dict[str, Any]) -> Any:
        """This rank's stage on the others' outputs of the step before, and the exchange for the next step."""
        values = stage.partition.trace.values
        for value, buffer in stage.current.items():
            buffer.copy_(stage.inbox[value])
        exchange = Exchange(self.group, early=stage.device.type == "cpu")
        for value, owner in stage.view.needs.items():
            exchange.receive(stage.inbox[value], owner, value)
        # The last rank predicts for this step; with stride 2 the last stage's own rank does so for the next.
        made = [(self.ranks - 1, stage.now)]
        if self.stride == 2:
            made.append((self.model_n - 1, stage.next))
        predictions = [(source, i, buffer) for source, b in made for i, buffer in enumerate(b)]
        for tag, (source, _, buffer) in enumerate(predictions, len(values)):
            if source != self.rank:
                exchange.receive(buffer, source, tag)

        def send(value: int, tensor: torch.Tensor) -> None:
            for rank in self._takers(stage, value):
                exchange.send(tensor, rank, value, values[value].stride)

        gives = {} if self.extra else stage.gives
        run = Run(gives, send, stage.answers, stage.units, self.executions)
        leaves = tree_leaves(self._units.under(run, original, kwargs))
        for tag, (source, i, buffer) in enumerate(predictions, len(values)):
            if source == self.rank:
                buffer.copy_(leaves[stage.predicted[i]])
                for rank in range(self.ranks):
                    if rank != self.rank:
                        exchange.send(buffer, rank, tag, buffer.stride())
        exchange.finish()
        return stage.result(stage.now)
