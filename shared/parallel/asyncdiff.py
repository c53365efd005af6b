"""AsyncDiff: the denoiser's stages run at the same time, each on what the others made one step before.

Source: Chen et al., "AsyncDiff: Parallelizing Diffusion Models by Asynchronous Denoising", arXiv 2406.06911:
section 3.2 (asynchronous denoising), 3.3 (stride denoising); the time shift is a variant of its code.

Warm-up steps run the whole denoiser on every rank and are exact. After them rank ``s`` runs stage ``s`` alone,
with the outputs of other stages from the step before in place of theirs. With stride 2 one parallel batch
serves two steps: ranks 0 to n - 1 work with the timestep of the next step and rank n repeats the last stage
with the current one; the following step computes nothing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from shared.parallel.graphs import Graphs, signature
from shared.parallel.partition import Partition, partition
from shared.parallel.surgery import Forward, Surgery
from shared.parallel.trace import Call, Value, candidates, parameter_names, trace

Key = tuple[str, int]
"""Qualified name of a module and which of its calls in this forward."""


class Exchange:
    """The transfers of one step, between pairs of ranks, joined at its end.

    On the CPU each transfer starts as soon as it is asked for. On CUDA all are launched together at the end of
    the step, as one NCCL group: a receive that waits for its sender would hold multiprocessors that the stage
    needs, and a group cannot deadlock whatever the order.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.early = device.type == "cpu"
        self._ops: list[tuple[int, Any, torch.Tensor, int]] = []
        self._pending: list[tuple[Any, torch.Tensor]] = []

    def send(self, tensor: torch.Tensor, peer: int, tag: int, stride: Sequence[int]) -> None:
        """Send ``tensor`` to a rank of the group, in a memory layout that the receiver knows."""
        if tuple(tensor.stride()) != tuple(stride):
            dense = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
            tensor = dense.copy_(tensor)
        self._add(dist.isend, tensor, peer, tag)

    def receive(self, buffer: torch.Tensor, peer: int, tag: int) -> None:
        """Receive into ``buffer``, which fills its memory without gaps."""
        self._add(dist.irecv, buffer, peer, tag)

    def _add(self, op: Any, tensor: torch.Tensor, peer: int, tag: int) -> None:
        flat = tensor.as_strided((tensor.numel(),), (1,))
        if self.early:
            work = op(flat, self._global(peer), group=self.group, tag=tag)
            self._pending.append((work, flat))
        else:
            self._ops.append((tag, op, flat, peer))

    def _global(self, peer: int) -> int:
        return peer if self.group is None else dist.get_global_rank(self.group, peer)

    def finish(self) -> None:
        """Wait until all transfers are done (on CUDA: make the current stream wait)."""
        if self._ops:
            # Sorted by tag, so that both sides of a pair name their transfers in the same order.
            ops = [
                dist.P2POp(op, flat, self._global(peer), group=self.group, tag=tag)
                for tag, op, flat, peer in sorted(self._ops, key=lambda entry: (entry[0], entry[3]))
            ]
            self._pending = [(work, ops[0].tensor) for work in dist.batch_isend_irecv(ops)]
        for work, _ in self._pending:
            work.wait()
        self._ops, self._pending = [], []


@dataclass
class _Answer:
    """What a call that is not run here returns."""

    call: Call
    leaves: list[Any]
    skipped: Counter[str]
    """How often modules inside it would have been called."""

    def __call__(self, args: tuple, kwargs: dict) -> Any:
        leaves, given = list(self.leaves), None
        for i, leaf in enumerate(self.call.outputs):
            if leaf.kind == "argument":
                given = tree_leaves((args, kwargs)) if given is None else given
                leaves[i] = given[leaf.item]
        assert self.call.spec is not None
        return tree_unflatten(leaves, self.call.spec)


class _Shape:
    """Everything that belongs to one signature of the denoiser's arguments: partition, buffers, graphs."""

    def __init__(self, plan: Partition, stage: int, device: torch.device, graphs: Graphs, last: bool) -> None:
        self.partition, self.graphs, self.device = plan, graphs, device
        self.calls = 0
        """Calls of the denoiser since the generation began."""
        self.start = 0
        """Position in the schedule of the first of them."""
        recorded, self.view = plan.trace, plan.views[stage]
        self.current = {v: self._buffer(recorded.values[v]) for v in self.view.needs}
        self.inbox = {v: self._buffer(recorded.values[v]) for v in self.view.needs}
        self.keys: dict[Key, bool] = {(c.name, c.occurrence): c.unit for c in recorded.calls}
        self.records = self._sources(self.view.needs)
        self.sends = self._sources(() if last else self.view.gives)
        self.answers = {
            (recorded.calls[i].name, recorded.calls[i].occurrence): self._answer(recorded.calls[i])
            for i in self.view.replaced
        }
        root = recorded.calls[0]
        self.predicted = [i for i, leaf in enumerate(root.outputs) if leaf.kind == "value"]
        self.now, self.next = (
            [self._buffer(recorded.values[root.outputs[i].item]) for i in self.predicted] for _ in range(2)
        )

    def _buffer(self, value: Value) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=self.device)

    def _sources(self, values: Any) -> dict[Key, list[tuple[int, int]]]:
        """Per call, which of its output leaves are these values."""
        found: dict[Key, list[tuple[int, int]]] = {}
        for value in values:
            call = self.partition.trace.calls[self.partition.trace.values[value].call]
            leaf = next(i for i, x in enumerate(call.outputs) if x.kind == "value" and x.item == value)
            found.setdefault((call.name, call.occurrence), []).append((leaf, value))
        return found

    def _answer(self, call: Call) -> _Answer:
        leaves: list[Any] = []
        for leaf in call.outputs:
            if leaf.kind == "value" and leaf.item not in self.current:
                # Right in shape and dtype for what lies between units, but one element of memory.
                value = self.partition.trace.values[leaf.item]
                with torch.inference_mode(False):
                    leaves.append(torch.zeros(1, dtype=value.dtype, device=self.device).expand(value.shape))
            else:
                leaves.append(self.current[leaf.item] if leaf.kind == "value" else leaf.item)
        skipped = Counter(self.partition.trace.calls[i].name for i in call.inside)
        return _Answer(call, leaves, skipped)


class AsyncDiff:
    """Makes the denoiser of a diffusers pipeline run in stages on the ranks of a process group.

    Every rank holds the whole pipeline and makes the same calls with the same arguments. ``begin`` must be
    called before each generation. Any signature of the denoiser's arguments (picture size, batch, …) is
    traced and partitioned when it first occurs.

    Args:
        pipeline: has a ``scheduler`` and a ``unet`` or ``transformer``; loaded with adapters, quantized and
            compiled as wanted. A compiled module must be compiled through its ``forward`` attribute.
        model_n: number of stages.
        stride: 1, or 2 for one parallel batch per two steps; takes one more rank.
        warm_up_steps: exact steps at the start of each generation, at least 1.
        time_shift: in steady state, embed the timestep of the step before.
        group: ranks that take part, model_n + stride - 1 of them; None for all.
        stage_weights: relative speed of the stages' devices, model_n numbers.
        cuda_graph: capture and replay steps on CUDA.
        denoiser: the module to divide, when it is neither ``unet`` nor ``transformer``.
        max_shapes: signatures whose buffers and graphs are kept.

    Raises:
        ValueError: impossible values, or a group of the wrong size.
    """

    def __init__(
        self,
        pipeline: Any,
        model_n: int,
        stride: int = 1,
        warm_up_steps: int = 1,
        time_shift: bool = False,
        *,
        group: dist.ProcessGroup | None = None,
        stage_weights: Sequence[float] | None = None,
        cuda_graph: bool = True,
        denoiser: nn.Module | None = None,
        max_shapes: int = 4,
    ) -> None:
        if model_n < 1 or stride not in (1, 2):
            raise ValueError(f"model_n {model_n} with stride {stride}: model_n is 1 or more, stride 1 or 2")
        if warm_up_steps < 1:
            raise ValueError(f"warm_up_steps {warm_up_steps}: at least one step must be synchronous")
        if stage_weights is not None and len(stage_weights) != model_n:
            raise ValueError(f"{len(stage_weights)} stage weights for {model_n} stages")
        ranks = dist.get_world_size(group) if dist.is_initialized() else 1
        if ranks != model_n + stride - 1:
            raise ValueError(
                f"model_n {model_n} with stride {stride} takes {model_n + stride - 1} ranks "
                f"(model_n + stride - 1), the group has {ranks}"
            )
        found = denoiser or getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        if not isinstance(found, nn.Module):
            raise ValueError(f"{type(pipeline).__name__} has no unet or transformer: name its denoiser")
        self.pipeline, self.denoiser, self.group = pipeline, found, group
        self.model_n, self.stride, self.time_shift = model_n, stride, time_shift
        self.warm_up_steps, self.stage_weights = warm_up_steps, stage_weights
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.ranks = ranks
        self.stage = min(self.rank, model_n - 1)
        self.extra = self.rank == model_n
        """Whether this rank repeats the last stage for the current step (stride 2)."""
        self.executions: Counter[str] = Counter()
        """How often each unit ran here in asynchronous steps of this generation (graph replays not counted)."""
        self._cuda_graph, self._max_shapes = cuda_graph, max_shapes
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._steps: int | None = None
        self._names = parameter_names(found)
        self._run: _Run | None = None
        self._surgery = Surgery()
        self._surgery.override(found, self._forward)
        for name, module, _ in candidates(found):
            self._surgery.override(module, self._part(name))

    def begin(self, steps: int) -> None:
        """A new generation of ``steps`` steps starts: its first ``warm_up_steps`` are exact again."""
        self._steps = steps
        self.executions.clear()
        for shape in self._shapes.values():
            shape.calls = 0

    def close(self) -> None:
        """Give the denoiser back as it was. May be called any number of times."""
        self._surgery.close()
        for shape in self._shapes.values():
            shape.graphs.close()
        self._shapes.clear()

    def __enter__(self) -> AsyncDiff:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def partition(self) -> Partition | None:
        """The division in use for the latest signature; None before the first step."""
        return next(reversed(self._shapes.values())).partition if self._shapes else None

    @property
    def plan(self) -> dict[str, Any]:
        """JSON-able: the settings, and what each stage computes once a first step has been traced."""
        plan: dict[str, Any] = {
            "method": "asyncdiff",
            "model_n": self.model_n,
            "stride": self.stride,
            "warm_up_steps": self.warm_up_steps,
            "time_shift": self.time_shift,
            "ranks": [f"stage {min(r, self.model_n - 1)}" for r in range(self.ranks)],
        }
        return plan | (self.partition.as_dict() if self.partition else {})

    def _part(self, name: str) -> Any:
        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            if self._run is None:
                return original(*args, **kwargs)
            return self._run.call(name, original, args, kwargs)

        return answer

    def _forward(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        if self._steps is None:
            raise RuntimeError("begin(steps) must be called before a generation")
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        sample, t = kwargs[self._names[0]], kwargs["timestep"]
        if not isinstance(t, torch.Tensor):
            kwargs["timestep"] = t = torch.tensor(
                t, dtype=torch.float64 if isinstance(t, float) else torch.int64, device=sample.device
            )
        shape = self._shape(original, kwargs, sample.device)
        step, shape.calls = shape.calls, shape.calls + 1
        if step == 0:
            shape.start = self._position(t)
        if step >= max(self._steps, len(self.pipeline.scheduler.timesteps)):
            raise RuntimeError(
                f"the denoiser was called {step + 1} times since begin(steps={self._steps}): "
                "call begin before each generation"
            )
        if step < self.warm_up_steps or self.ranks == 1:
            return shape.graphs.run(
                "synchronous", lambda **k: self._synchronous(shape, original, k), **kwargs
            )
        if (step - self.warm_up_steps) % self.stride:
            return self._result(shape, [tensor.clone() for tensor in shape.next])
        kwargs["timestep"] = self._timestep(t, shape.start + step)
        return shape.graphs.run("asynchronous", lambda **k: self._asynchronous(shape, original, k), **kwargs)

    def _shape(self, original: Forward, kwargs: dict[str, Any], device: torch.device) -> _Shape:
        key = signature(kwargs)
        if key not in self._shapes:
            traced, _ = trace(self.denoiser, kwargs, original)
            plan = partition(traced, self.model_n, self.stage_weights)
            while len(self._shapes) >= self._max_shapes:
                self._shapes.popitem(last=False)[1].graphs.close()
            self._shapes[key] = _Shape(plan, self.stage, device, Graphs(self._cuda_graph), self.extra)
        self._shapes.move_to_end(key)
        return self._shapes[key]

    def _position(self, t: torch.Tensor) -> int:
        if self.stride == 1 and not self.time_shift:
            return 0  # the schedule is not needed
        schedule = self.pipeline.scheduler.timesteps
        found = (schedule == t.flatten()[0].to(schedule)).nonzero()
        if not len(found):
            raise ValueError(
                f"timestep {t.flatten()[0].item()} is not among the scheduler's {schedule.tolist()}"
            )
        return int(found[0])

    def _timestep(self, t: torch.Tensor, position: int) -> torch.Tensor:
        """The timestep that this rank embeds in the parallel batch at this position of the schedule."""
        schedule = self.pipeline.scheduler.timesteps
        ahead = self.stride == 2 and not self.extra and position + 1 < len(schedule)
        chosen = position + ahead - self.time_shift
        if chosen == position:
            return t
        return schedule[chosen].to(device=t.device, dtype=t.dtype).expand(t.shape).clone()

    def _synchronous(self, shape: _Shape, original: Forward, kwargs: dict[str, Any]) -> Any:
        """The whole denoiser, recording what this stage will take from others."""

        def record(value: int, tensor: torch.Tensor) -> None:
            shape.inbox[value].copy_(tensor)

        with _Run(self, shape, shape.records, record):
            return original(**kwargs)

    def _asynchronous(self, shape: _Shape, original: Forward, kwargs: dict[str, Any]) -> Any:
        """This rank's stage on the others' outputs of the step before, and the exchange for the next step."""
        values, view = shape.partition.trace.values, shape.view
        for value, buffer in shape.current.items():
            buffer.copy_(shape.inbox[value])
        exchange = Exchange(self.group, shape.device)
        for value, owner in view.needs.items():
            exchange.receive(shape.inbox[value], owner, value)
        predictions = [(shape.now, self.ranks - 1)]
        if self.stride == 2:
            predictions.append((shape.next, self.model_n - 1))
        tags = iter(range(len(values), len(values) + len(predictions) * len(shape.predicted)))
        tagged = [(buffer, i, source, next(tags)) for b, source in predictions for i, buffer in enumerate(b)]
        for buffer, _, source, tag in tagged:
            if source != self.rank:
                exchange.receive(buffer, source, tag)

        def send(value: int, tensor: torch.Tensor) -> None:
            for stage in view.gives[value]:
                for rank in self._ranks_of(stage):
                    exchange.send(tensor, rank, value, values[value].stride)

        with _Run(self, shape, shape.sends, send, shape.answers):
            leaves = tree_leaves(original(**kwargs))
        for buffer, i, source, tag in tagged:
            if source == self.rank:
                buffer.copy_(leaves[shape.predicted[i]])
                for rank in range(self.ranks):
                    if rank != self.rank:
                        exchange.send(buffer, rank, tag, buffer.stride())
        exchange.finish()
        return self._result(shape, [tensor.clone() for tensor in shape.now])

    def _ranks_of(self, stage: int) -> range:
        return range(stage, self.ranks if stage == self.model_n - 1 else stage + 1)

    def _result(self, shape: _Shape, predictions: list[torch.Tensor]) -> Any:
        root = shape.partition.trace.calls[0]
        leaves = [leaf.item for leaf in root.outputs]
        for i, tensor in zip(shape.predicted, predictions, strict=True):
            leaves[i] = tensor
        assert root.spec is not None
        return tree_unflatten(leaves, root.spec)


class _Run:
    """One forward under way: answers foreign calls and hands the wanted outputs of the others on."""

    def __init__(
        self,
        owner: AsyncDiff,
        shape: _Shape,
        wanted: dict[Key, list[tuple[int, int]]],
        take: Any,
        answers: dict[Key, _Answer] | None = None,
    ) -> None:
        self.owner, self.shape, self.wanted, self.take = owner, shape, wanted, take
        self.answers = answers
        self.occurrences: Counter[str] = Counter()

    def __enter__(self) -> None:
        self.owner._run = self

    def __exit__(self, *_: object) -> None:
        self.owner._run = None

    def call(self, name: str, original: Forward, args: tuple, kwargs: dict) -> Any:
        key = (name, self.occurrences[name])
        self.occurrences[name] += 1
        if self.answers is not None:
            answer = self.answers.get(key)
            if answer is not None:
                self.occurrences.update(answer.skipped)
                return answer(args, kwargs)
            if self.shape.keys.get(key, False):
                self.owner.executions[name] += 1
        out = original(*args, **kwargs)
        if key in self.wanted:
            leaves = tree_leaves(out)
            for leaf, value in self.wanted[key]:
                self.take(value, leaves[leaf])
        return out
