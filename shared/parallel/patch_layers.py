"""Layers that look beyond their patch: convolution, group norm, self-attention, and keys of a fixed prompt.

Every layer stays where it is and is called with its own weights, LoRA and quantization: what it needs from
other ranks is put around its input (rows for a convolution) or its output (keys and values). Source: Li et
al., "DistriFusion", arXiv 2402.19481, sections 4.1 to 4.3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from shared.parallel.patch_exchange import PatchExchange
from shared.parallel.surgery import Forward, Surgery

Norm = Literal["joined", "stale", "corrected", "local"]
Answer = Callable[[Forward, tuple, dict], Any]


@dataclass
class PatchRun:
    """What the layers of one model must know of the forward that is under way."""

    exchange: PatchExchange | None
    """None: every patch is a picture of its own."""
    dim: int
    """The dimension of [batch, channels, height, width] that is cut: 2 rows, 3 columns."""
    whole: torch.Tensor | None = None
    """The uncut input, and this rank's part of it: the first convolution needs no exchange."""
    start: int = 0
    patch: torch.Tensor | None = None
    norm: Norm = "joined"
    new_prompt: bool = True
    """Whether this is the first forward of a generation."""
    prompt: dict[str, torch.Tensor] = field(default_factory=dict)
    """Keys and values of the prompt, by layer."""
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    """This rank's own moments of the forward before, by layer: float32 [2, batch, groups]."""


class PatchLayers:
    """Overrides the layers of a model that mix what is far apart in a picture.

    Without a ``run`` they do what they did before.

    Args:
        model: a UNet, a ControlNet or a VAE decoder of diffusers.
        surgery: takes the overrides, and gives them back.
    """

    def __init__(self, model: nn.Module, surgery: Surgery) -> None:
        self.run: PatchRun | None = None
        for name, module in _layers(model):
            if isinstance(module, nn.GroupNorm):
                surgery.override(module, self._norm(name, module))
            elif not isinstance(module, Attention):
                surgery.override(module, self._convolution(name, module))
            elif module.is_cross_attention:
                surgery.override(module.to_k, self._prompt(f"{name}.to_k"))
                surgery.override(module.to_v, self._prompt(f"{name}.to_v"))
            else:
                self._self_attention(name, module, surgery)

    @contextlib.contextmanager
    def running(self, run: PatchRun) -> Iterator[None]:
        """Calls of the model inside are on patches."""
        self.run = run
        try:
            yield
        finally:
            self.run = None

    def _convolution(self, name: str, module: nn.Module) -> Answer:
        inner = [m for m in module.modules() if isinstance(m, nn.Conv2d) and any(_pad(m))]
        base = inner[0]
        for conv in inner:
            if conv.padding_mode != "zeros":
                raise ValueError(f"{name}: padding mode {conv.padding_mode!r}; patches need 'zeros'")

        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            run = self.run
            if run is None or run.exchange is None:
                return original(*args, **kwargs)
            x, dim = args[0], run.dim
            pad, size = _pad(base)[dim - 2], x.shape[dim]
            if not pad:
                return original(*args, **kwargs)
            after = _reach(base, dim - 2) - pad - base.stride[dim - 2] + 1
            if x is run.patch:
                strip = _strip(run, pad, after)
            else:
                if size < max(pad, after):
                    raise ValueError(f"{name}: a patch of {size} rows is too small; use fewer ranks")

                def join(above: torch.Tensor | None, below: torch.Tensor | None) -> torch.Tensor:
                    parts = [_border(x, dim, pad) if above is None else above, x]
                    if run.exchange is not None and run.exchange.rank == run.exchange.ranks - 1:
                        parts.append(_border(x, dim, pad))
                    elif below is not None:
                        parts.append(below)
                    return torch.cat(parts, dim)

                strip = run.exchange.rows(
                    name,
                    x.narrow(dim, 0, after) if after > 0 else None,
                    x.narrow(dim, size - pad, pad),
                    join,
                )
            with _unpadded(inner, dim - 2):
                return original(strip, *args[1:], **kwargs)

        return answer

    def _norm(self, name: str, module: nn.Module) -> Answer:
        assert isinstance(module, nn.GroupNorm)

        def normalise(run: PatchRun, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
            assert run.exchange is not None
            own = group_moments(x, module.num_groups)
            count = x.numel() // own[0].numel()
            shared = self._shared_moments(run, name, own, count)
            return apply_moments(x, shared, module.num_groups, weight, bias, module.eps)

        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            run = self.run
            if run is None or run.exchange is None or run.norm == "local":
                return original(*args, **kwargs)
            if module.weight is None or module.weight.device == args[0].device:
                return normalise(run, args[0], module.weight, module.bias)
            # Offloaded weights are here only while the original forward runs.
            with _GroupNormMode(lambda x, weight, bias: normalise(run, x, weight, bias)):
                return original(*args, **kwargs)

        return answer

    @staticmethod
    def _shared_moments(run: PatchRun, name: str, own: torch.Tensor, count: int) -> torch.Tensor:
        exchange = run.exchange
        assert exchange is not None
        weights = exchange.weights(name)

        def join(all_: list[torch.Tensor]) -> torch.Tensor:
            if run.norm != "corrected" or exchange.recording:
                return join_moments(torch.stack(all_), weights)
            before = run.moments[name]
            all_[exchange.rank] = before
            return corrected_moments(torch.stack(all_), weights, before, own)

        moments = exchange.share(name, "moments", own, join, count)
        if not exchange.recording and "moments" in exchange.deferred:
            if name in run.moments:
                run.moments[name].copy_(own)
            else:
                run.moments[name] = own.clone()
        return moments

    def _self_attention(self, name: str, module: Attention, surgery: Surgery) -> None:
        """Keys and values of all ranks, exchanged together when the keys are asked for."""
        values: list[torch.Tensor] = []

        def answer_value(original: Forward, args: tuple, kwargs: dict) -> Any:
            return values.pop() if values else original(*args, **kwargs)

        value = surgery.override(module.to_v, answer_value)

        def answer_key(original: Forward, args: tuple, kwargs: dict) -> Any:
            run, key = self.run, original(*args, **kwargs)
            values.clear()
            if run is None or run.exchange is None:
                return key
            own = torch.stack([key, value(*args, **kwargs)])
            # Which way round the tokens come makes no difference to attention.
            keys, others = run.exchange.share(name, "tokens", own, lambda every: torch.cat(every, 2))
            values.append(others)
            return keys

        surgery.override(module.to_k, answer_key)

    def _prompt(self, name: str) -> Answer:
        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            run = self.run
            if run is None:
                return original(*args, **kwargs)
            if run.new_prompt:
                value = original(*args, **kwargs)
                known = run.prompt.get(name)
                if known is None or known.shape != value.shape or known.dtype != value.dtype:
                    run.prompt[name] = value.clone()
                else:
                    known.copy_(value)
                return value
            return run.prompt[name]

        return answer


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, Attention):
            if getattr(module, "fused_projections", False):
                raise ValueError(f"{name}: fused projections; call unfuse_qkv_projections() first")
            yield name, module
        elif isinstance(module, nn.GroupNorm):
            yield name, module
        elif isinstance(getattr(module, "base_layer", module), nn.Conv2d):
            # A LoRA layer with its convolutions inside counts as one.
            inside |= {id(m) for m in module.modules()}
            if any(isinstance(m, nn.Conv2d) and any(_pad(m)) for m in module.modules()):
                yield name, module


def _pad(conv: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(conv.padding, str):
        raise ValueError(f"a convolution with padding {conv.padding!r}; patches need numbers")
    return conv.padding


def _reach(conv: nn.Conv2d, axis: int) -> int:
    return conv.dilation[axis] * (conv.kernel_size[axis] - 1)


def _border(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    return torch.zeros_like(x.narrow(dim, 0, size))


def _strip(run: PatchRun, before: int, after: int) -> torch.Tensor:
    assert run.whole is not None and run.patch is not None
    length, stop = run.whole.shape[run.dim], run.start + run.patch.shape[run.dim]
    low, high = run.start - before, stop + (before if stop == length else after)
    part = run.whole.narrow(run.dim, max(low, 0), min(high, length) - max(low, 0))
    padding = (0, 0, max(-low, 0), max(high - length, 0))
    return F.pad(part, padding if run.dim == 2 else padding[2:])


@contextlib.contextmanager
def _unpadded(convs: list[nn.Conv2d], axis: int) -> Iterator[None]:
    """The convolutions do not pad along the cut: their input brings what is there."""
    before = [conv.padding for conv in convs]
    for conv, padding in zip(convs, before, strict=True):
        conv.__dict__["padding"] = (0, padding[1]) if axis == 0 else (padding[0], 0)
    try:
        yield
    finally:
        for conv, padding in zip(convs, before, strict=True):
            conv.__dict__["padding"] = padding


class _GroupNormMode(TorchFunctionMode):
    """Answers the one call of F.group_norm inside: the weights are then where their hooks put them."""

    def __init__(self, answer: Callable[[torch.Tensor, Any, Any], torch.Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.group_norm:
            given = dict(zip(("input", "num_groups", "weight", "bias"), args, strict=False)) | (kwargs or {})
            return self.answer(given["input"], given.get("weight"), given.get("bias"))
        return func(*args, **(kwargs or {}))


def group_moments(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Mean and variance of each group of channels of [batch, channels, ...]: float32 [2, batch, groups]."""
    x = x.reshape(x.shape[0], groups, -1)
    if x.dtype in (torch.float32, torch.float64):
        variance, mean = torch.var_mean(x, dim=2, correction=0)
        return torch.stack([mean, variance]).float()
    # Reductions that read 16 bits and add in 32, without a copy of x in 32.
    mean = x.mean(dim=2, dtype=torch.float32)
    square = torch.linalg.vector_norm(x, dim=2, dtype=torch.float32).square() / x.shape[2]
    return torch.stack([mean, (square - mean.square()).clamp_min(0)])


def join_moments(moments: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean and variance of a whole from those of its parts.

    Args:
        moments: [parts, 2, batch, groups]. weights: [parts, 1, 1], the parts' shares.

    Returns:
        [2, batch, groups].
    """
    means, variances = moments[:, 0], moments[:, 1]
    mean = (weights * means).sum(0)
    return torch.stack([mean, (weights * (variances + (means - mean).square())).sum(0)])


def corrected_moments(
    moments: torch.Tensor, weights: torch.Tensor, before: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """The stale moments of the whole, moved as this rank's own have moved since (section 4.3 of the paper).

    Args:
        moments: [parts, 2, batch, groups] of the step before. weights: as in ``join_moments``.
        before: this rank's own in the step before, [2, batch, groups]. own: those of this step.
    """

    def square(m: torch.Tensor) -> torch.Tensor:
        return m[1] + m[0].square()

    mean = (weights * moments[:, 0]).sum(0) + own[0] - before[0]
    squares = (weights * (moments[:, 1] + moments[:, 0].square())).sum(0)
    variance = squares + square(own) - square(before) - mean.square()
    return torch.stack([mean, torch.where(variance < 0, own[1], variance)])


def apply_moments(
    x: torch.Tensor, moments: torch.Tensor, groups: int, weight: Any, bias: Any, eps: float
) -> torch.Tensor:
    """Group norm of [batch, channels, ...] with given moments, float32 [2, batch, groups]."""
    batch, channels = x.shape[:2]
    mean, variance = moments.unsqueeze(-1).expand(2, batch, groups, channels // groups).reshape(2, batch, -1)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (batch, channels) + (1,) * (x.ndim - 2)
    return torch.addcmul(shift.to(x.dtype).view(shape), x, scale.to(x.dtype).view(shape))
