"""What a denoiser computes, in which order, from what: counted in one real forward.

A **unit** is the smallest module that a denoiser is cut between: a resnet, a transformer block, a sampler, a
convolution at the ends. Units are found by structure, not by name: whatever holds a list of composite
modules is a container and is opened, everything else is a unit, provided that its input depends on the
sample (the time, size and text embeddings do not; every rank computes them itself). Cost is counted in FLOPs
by a dispatch mode. Data flow is followed by tagging: the outputs of units and containers are **values**, and
what is made of them in between (concatenations, sums, permutations) carries the union of their tags.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from torch.utils.weak import WeakTensorKeyDictionary

from shared.parallel.surgery import Forward, Surgery

SAMPLE = -1
"""The id of the value that is the denoiser's own input, which every rank has."""


@dataclass(frozen=True)
class Value:
    """One output tensor of a unit or a container."""

    call: int  # index of the call that returned it first
    origin: int  # index of the unit call inside that call which contributed last to it: who makes it
    sources: frozenset[int]  # values that a container made it of; empty for a unit's
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Leaf:
    """One leaf of what a call returned: a value, one of its own arguments, or something that is no tensor."""

    kind: str  # "value", "argument" or "constant"
    item: Any  # the value's id, the index among the leaves of (args, kwargs), or the constant itself


@dataclass
class Call:
    """One execution of a unit or of a container that holds units."""

    name: str  # qualified name of the module; the root's is empty
    occurrence: int  # 0 for the module's first call in a forward, 1 for its second, …
    unit: bool
    inside: list[int] = field(default_factory=list)  # calls made inside this one, in order
    inputs: frozenset[int] = frozenset()  # values that a unit's arguments are made of
    flops: int = 0
    outputs: list[Leaf] = field(default_factory=list)
    spec: TreeSpec | None = None

    @property
    def label(self) -> str:
        return f"{self.name}#{self.occurrence}" if self.occurrence else self.name


@dataclass
class Trace:
    """One forward of a denoiser at one shape; plain data apart from the structure of outputs."""

    calls: list[Call]  # in the order in which they began; the root comes first
    values: list[Value]
    units: list[int]  # the calls that are units, in order of execution

    @property
    def flops(self) -> list[int]:
        """FLOPs of each unit, in order of execution."""
        return [self.calls[index].flops for index in self.units]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: per unit its name, FLOPs, the names it takes values from, and the bytes it puts out."""
        produced: dict[int, int] = {}
        for value in self.values:
            produced[value.call] = produced.get(value.call, 0) + value.nbytes
        return {
            self.calls[index].label: {
                "flops": self.calls[index].flops,
                "from": sorted({"sample" if v == SAMPLE else self.calls[self.values[v].call].label
                                for v in self.calls[index].inputs}),
                "bytes": produced.get(index, 0),
            }
            for index in self.units
        }  # fmt: skip


def is_container(module: nn.Module) -> bool:
    """Whether a module or one inside it holds a list of composite modules: it is opened, not cut around."""
    if hasattr(module.forward, "_torchdynamo_orig_callable"):
        return False  # a compiled forward must not see overridden children
    return any(
        (len(child) > 0 and all(any(m.children()) for m in child))
        if isinstance(child, nn.ModuleList)
        else is_container(child)
        for child in module.children()
    )


def candidates(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """Containers and possible units below ``module``, as (qualified name, module, whether a container)."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if is_list(child):
            yield from candidates(child, path + ".")
            continue
        if child._compiled_call_impl is not None:
            raise ValueError(
                f"{path} was compiled with module.compile(), which would trace through overridden forwards; "
                "use module.forward = torch.compile(module.forward) before making it parallel"
            )
        container = is_container(child)
        yield path, child, container
        if container:
            yield from candidates(child, path + ".")


def is_list(module: nn.Module) -> bool:
    """Whether a module only holds others, which are called without it: a ModuleList, a ModuleDict."""
    return type(module).forward is nn.Module.forward


def sample_name(denoiser: nn.Module) -> str:
    """Name of the argument that carries the noisy sample: the first of the class's forward."""
    return parameter_names(denoiser)[0]


def parameter_names(denoiser: nn.Module) -> list[str]:
    """Parameter names of the class's own forward, without self, independent of hooks on the instance."""
    return list(inspect.signature(type(denoiser).forward).parameters)[1:]


class _FlopCount(TorchDispatchMode):
    """Sums the FLOPs of every operation; where torch knows none for a custom product, 2 x outputs x depth."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            out = func(*args, **kwargs)
            self.total += int(flop_registry[packet](*args, **kwargs, out_val=out))
            return out
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
            return func(*args, **kwargs)
        if func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func.namespace not in ("aten", "prim", "prims"):
            first = next((a for a in args if isinstance(a, torch.Tensor) and a.dim() > 1), None)
            if first is not None and isinstance(out, torch.Tensor) and out.shape[:-1] == first.shape[:-1]:
                self.total += 2 * out.numel() * first.shape[-1]
        return out


class _Tags(TorchFunctionMode):
    """Gives the result of every function called between units the tags of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.of = WeakTensorKeyDictionary()
        self.paused = False

    def union(self, tree: Any) -> frozenset[int]:
        tags: frozenset[int] = frozenset()
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                tags |= self.of.get(leaf, frozenset())
        return tags

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.paused:
            return out
        made = args[0] if func is torch.Tensor.__setitem__ else out
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        tags = self.union((args, kwargs)) if tensors else frozenset()
        for tensor in tensors if tags else ():
            self.of[tensor] = tags
        return out


class _Tracer:
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.values: list[Value] = []
        self.units: list[int] = []
        self.tags, self.counter = _Tags(), _FlopCount()
        self.birth = WeakTensorKeyDictionary()
        self.made_of: list[frozenset[int]] = []  # per value, the unit calls that contributed to it
        self.occurrences: dict[str, int] = {}
        self.stack: list[Call] = []

    def call(self, name: str, container: bool, original: Forward, args: tuple, kwargs: dict) -> Any:
        if self.tags.paused:
            return original(*args, **kwargs)
        occurrence = self.occurrences.get(name, 0)
        self.occurrences[name] = occurrence + 1
        inputs = self.tags.union((args, kwargs))
        if not inputs:
            return original(*args, **kwargs)
        call, index = Call(name, occurrence, not container, inputs=inputs), len(self.calls)
        self.calls.append(call)
        for outer in self.stack:
            outer.inside.append(index)
        before = self.counter.total
        self.stack.append(call)
        self.tags.paused = not container
        out = original(*args, **kwargs)
        self.tags.paused = False
        self.stack.pop()
        if not any(self.calls[i].unit for i in call.inside):
            # Also a container that never called its children: it cannot be cut, so it is a unit.
            call.unit, call.flops = True, self.counter.total - before
            self.units.append(index)
        leaves, call.spec = tree_flatten(out)
        given = {id(leaf): i for i, leaf in enumerate(tree_leaves((args, kwargs)))}
        call.outputs = [self._leaf(leaf, call, index, given) for leaf in leaves]
        return out

    def _leaf(self, leaf: Any, call: Call, index: int, given: dict[int, int]) -> Leaf:
        if not isinstance(leaf, torch.Tensor):
            return Leaf("constant", leaf)
        if id(leaf) in given:
            return Leaf("argument", given[id(leaf)])
        known = self.birth.get(leaf)
        sources: frozenset[int] = self.tags.of.get(leaf, frozenset())
        if known is not None and sources == {known}:
            return Leaf("value", known)
        if call.unit:
            sources, makers, origin = frozenset(), frozenset({index}), index
        else:
            makers = frozenset().union(*(self.made_of[v] for v in sources if v != SAMPLE))
            within = [i for i in call.inside if self.calls[i].unit]
            origin = ([i for i in within if i in makers] or within)[-1]
        stride = leaf.stride() if is_dense(leaf) else contiguous_stride(leaf.shape)
        self.values.append(Value(index, origin, sources, tuple(leaf.shape), tuple(stride), leaf.dtype))
        self.made_of.append(makers)
        value = len(self.values) - 1
        self.birth[leaf], self.tags.of[leaf] = value, frozenset({value})
        return Leaf("value", value)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a row-major tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor fills its memory without gaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def trace(
    denoiser: nn.Module, kwargs: dict[str, Any], forward: Callable[..., Any] | None = None
) -> tuple[Trace, Any]:
    """Run one forward and record its units, their FLOPs and what each is made of.

    Works on real and on meta tensors, with LoRA, quantized and hooked modules alike; compiled functions run
    eagerly meanwhile. The output is what the forward gives without tracing.

    Args:
        denoiser: a UNet or transformer of diffusers.
        kwargs: all arguments of its forward by name.
        forward: called instead of ``denoiser.forward``, when that is overridden by the caller.

    Returns:
        the trace, and the output of the forward.
    """
    tracer = _Tracer()
    tracer.tags.of[kwargs[sample_name(denoiser)]] = frozenset({SAMPLE})
    with Surgery() as surgery:
        for name, module, container in list(candidates(denoiser)):
            surgery.override(module, _traced(tracer, name, container))
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), tracer.tags, tracer.counter:
            out = tracer.call("", True, forward or denoiser.forward, (), kwargs)
    return Trace(tracer.calls, tracer.values, tracer.units), out


def _traced(tracer: _Tracer, name: str, container: bool) -> Callable[[Forward, tuple, dict], Any]:
    return lambda original, args, kwargs: tracer.call(name, container, original, args, kwargs)
