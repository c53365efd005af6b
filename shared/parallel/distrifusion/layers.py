"""Layers that need more than their patch: convolution, group norm, self-attention, keys of a fixed prompt.

Every layer stays where it is and is called with its own weights, LoRA and quantization: what it needs from
other ranks is put around its input (rows for a convolution) or its output (keys and values). Source: Li et
al., "DistriFusion", arXiv 2402.19481, sections 4.1 to 4.3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from shared.parallel.distrifusion.moments import apply_moments, group_moments, whole_moments
from shared.parallel.distrifusion.patch_exchange import PatchExchange
from shared.parallel.surgery import Forward, Surgery

Answer = Callable[[Forward, tuple, dict], Any]


@dataclass
class PatchRun:
    """What the layers of one model need to know of the current forward."""

    exchange: PatchExchange | None  # None: every patch is a picture of its own
    dim: int  # the dimension of [batch, channels, height, width] that is cut: 2 rows, 3 columns
    whole: torch.Tensor | None = None  # the uncut input: the first convolution needs no exchange
    start: int = 0  # of this rank's part of it
    extended: nn.Module | None = None  # the next convolution, where its input has the neighbours' rows
    patch: torch.Tensor | None = None  # that part
    local_norms: bool = False  # whether group norms use only this patch's moments
    recording: bool = False  # whether this forward makes the prompt's keys and values; later ones get them
    prompt: list[torch.Tensor | None] = field(default_factory=list)  # keys and values of the prompt, by layer
    totals: dict[int, int] = field(default_factory=dict)  # PatchExchange.totals of the exchange


@dataclass
class _Prompt:
    """Keys or values that one layer makes of the prompt."""

    attention: Attention
    make: Forward
    value: torch.Tensor | None = None


class PatchLayers:
    """Overrides the layers of a model that mix what is far apart in a picture.

    Without a ``run`` they do what they did before.

    Args:
        model: a UNet, a ControlNet or a VAE decoder of diffusers.
        surgery: takes the overrides, and gives them back.
        keeps_prompts: whether the prompt's keys and values are made once a prompt, from layers called by
            themselves.
        projects: ranks exchange what attention makes keys and values of, and make those of all of it.
    """

    def __init__(
        self, model: nn.Module, surgery: Surgery, keeps_prompts: bool = True, projects: bool = False
    ) -> None:
        self.keeps_prompts, self.projects = keeps_prompts, projects
        self.run: PatchRun | None = None
        self._prompts: list[_Prompt] = []
        self._loaded: PatchRun | None = None
        pairs = dict(_pairs(model))
        for name, module in _layers(model):
            if isinstance(module, nn.GroupNorm):
                surgery.override(module, self._norm(module, pairs.get(module)))
            elif not isinstance(module, Attention):
                surgery.override(module, self._convolution(name, module))
            elif module.is_cross_attention:
                for layer in (module.to_k, module.to_v) if keeps_prompts else ():
                    known = _Prompt(module, layer.forward)
                    self._prompts.append(known)
                    surgery.override(layer, self._prompt(known))
            else:
                self._self_attention(module, surgery)

    @contextlib.contextmanager
    def running(self, run: PatchRun) -> Iterator[None]:
        """Calls of the model inside are on patches."""
        global _current
        if run is not self._loaded:
            if self._loaded is not None:
                self._loaded.prompt = [prompt.value for prompt in self._prompts]
            for i, prompt in enumerate(self._prompts):
                prompt.value = run.prompt[i] if run.prompt else None
            self._loaded = run
        self.run = _current = run
        try:
            yield
        finally:
            self.run = _current = None

    def take_prompt(self, run: PatchRun, text: torch.Tensor) -> None:
        """Make all keys and values of another prompt, [batch, tokens, channels] as before."""
        with self.running(run):
            for known in self._prompts:
                assert known.value is not None
                attention = known.attention
                states = attention.norm_encoder_hidden_states(text) if attention.norm_cross else text
                known.value.copy_(known.make(states))

    def _convolution(self, name: str, module: nn.Module) -> Answer:
        inner = padded_inside(module)
        base, very_first = inner[0], name == "conv_in"
        for conv in inner:
            if conv.padding_mode != "zeros":
                raise ValueError(
                    f"{name}: patches support only padding mode 'zeros'; got {conv.padding_mode!r}"
                )

        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            run = self.run
            if run is None or run.exchange is None:
                return original(*args, **kwargs)
            x, axis = args[0], run.dim - 2
            pad = _pad(base)[axis]
            if not pad:
                return original(*args, **kwargs)
            after = base.dilation[axis] * (base.kernel_size[axis] - 1) - pad - base.stride[axis] + 1
            if very_first and x is run.patch:
                strip = _strip(run, pad, after)
            elif run.extended is module:
                run.extended, strip = None, _zeros_outside(run, x, pad, after)
            else:
                strip = _with_rows(run, x, pad, after)
            with unpadded(inner, axis):
                return original(strip, *args[1:], **kwargs)

        return answer

    def _norm(self, module: nn.GroupNorm, then: nn.Module | None) -> Answer:
        """`then`: a convolution of 3 x 3 that takes the norm's output, with only its activation between."""

        def normalise(run: PatchRun, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
            assert run.exchange is not None
            own = group_moments(x, module.num_groups)
            count = x.numel() // own[0].numel()
            if then is not None and run.exchange.at_once:
                # The neighbours' rows come with the moments, and are normalised with the patch.
                run.extended = then
                known, x = _with_moments_and_rows(run, x, own, count)
                whole = whole_moments(own, known, moving=False)
            elif torch.compiler.is_compiling():
                whole = whole_moments(own, torch.ops.displaced_patches.moments(own, count))
            else:
                whole = whole_moments(own, run.exchange.moments(own, count), run.exchange.moving)
            return apply_moments(x, *whole, weight, bias, module.eps)

        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            run = self.run
            if run is None or run.exchange is None or run.local_norms:
                return original(*args, **kwargs)
            if module.weight is None or module.weight.device == args[0].device:
                return normalise(run, args[0], module.weight, module.bias)
            # Offloaded weights are here only while the original forward runs.
            with GroupNormMode(lambda x, weight, bias: normalise(run, x, weight, bias)):
                return original(*args, **kwargs)

        return answer

    def _self_attention(self, module: Attention, surgery: Surgery) -> None:
        """Keys and values of all ranks, exchanged together when the keys are asked for."""
        values: list[torch.Tensor] = []

        def answer_value(original: Forward, args: tuple, kwargs: dict) -> Any:
            return values.pop() if values else original(*args, **kwargs)

        value = surgery.override(module.to_v, answer_value)

        def answer_key(original: Forward, args: tuple, kwargs: dict) -> Any:
            run = self.run
            values.clear()
            if run is None or run.exchange is None:
                return original(*args, **kwargs)
            if self.projects:
                (every,) = self._tokens(run, run.exchange, args[0][None])
                values.append(value(every))
                return original(every)
            own = torch.stack([original(*args, **kwargs), value(*args, **kwargs)])
            keys, others = self._tokens(run, run.exchange, own)
            values.append(others)
            return keys

        surgery.override(module.to_k, answer_key)

    def _tokens(self, run: PatchRun, exchange: PatchExchange, own: torch.Tensor) -> torch.Tensor:
        """[..., batch, all tokens, channels]; which way round they come makes no difference to attention."""
        if not torch.compiler.is_compiling():
            return exchange.tokens(own)
        total = run.totals.get(own.shape[2], own.shape[2] * exchange.ranks)
        return torch.ops.displaced_patches.tokens(own, total)

    def _prompt(self, known: _Prompt) -> Answer:
        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            run = self.run
            if run is None:
                return original(*args, **kwargs)
            if run.recording:
                known.value = original(*args, **kwargs).clone()
            return known.value

        return answer


_current: PatchRun | None = None
"""The current run, for bands and the operators below: compiled layers that are alike are the same code."""


def exchange_now() -> PatchExchange | None:
    """Of the patches that are computed now; None outside of them, and where nothing is exchanged."""
    return None if _current is None else _current.exchange


@contextlib.contextmanager
def exchanging_nothing() -> Iterator[None]:
    """Calls of layers inside are on what already has all that they need."""
    run, exchange = _current, exchange_now()
    if run is not None:
        run.exchange = None
    try:
        yield
    finally:
        if run is not None:
            run.exchange = exchange


def _exchange_of_run() -> PatchExchange:
    assert _current is not None and _current.exchange is not None
    return _current.exchange


@torch.library.custom_op("displaced_patches::rows", mutates_args=())
def _rows_operator(first: torch.Tensor, last: torch.Tensor, dim: int, border: bool) -> list[torch.Tensor]:
    # Contiguous for any input layout: code is compiled for that, and received rows are contiguous.
    def use(above: torch.Tensor | None, below: torch.Tensor | None) -> list[torch.Tensor]:
        def arrived(rows: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros(like.shape) if rows is None else rows.clone()

        return [arrived(above, last), arrived(below, last if border else first)]

    return _exchange_of_run().rows(first if first.shape[dim] else None, last, use)


@_rows_operator.register_fake
def _(first: torch.Tensor, last: torch.Tensor, dim: int, border: bool) -> list[torch.Tensor]:
    below = last if border else first
    return [last.new_empty(last.shape), below.new_empty(below.shape)]


@torch.library.custom_op("displaced_patches::tokens", mutates_args=())
def _tokens_operator(own: torch.Tensor, total: int) -> torch.Tensor:
    return _exchange_of_run().tokens(own)


@_tokens_operator.register_fake
def _(own: torch.Tensor, total: int) -> torch.Tensor:
    return own.new_empty(own.shape[0], own.shape[1], total, own.shape[3])


@torch.library.custom_op("displaced_patches::moments", mutates_args=())
def _moments_operator(own: torch.Tensor, count: int) -> torch.Tensor:
    # A copy: compiled code may write into what it got.
    return _exchange_of_run().moments(own, count).clone()


@torch.library.custom_op("displaced_patches::moments_and_rows", mutates_args=())
def _moments_and_rows_operator(
    own: torch.Tensor, count: int, first: torch.Tensor, last: torch.Tensor
) -> list[torch.Tensor]:
    known, above, below = _exchange_of_run().moments_and_rows(own, count, first, last)
    rows = (torch.zeros_like(first) if row is None else row for row in (above, below))
    return [known.clone(), *(row.contiguous() for row in rows)]


@_moments_and_rows_operator.register_fake
def _(own: torch.Tensor, count: int, first: torch.Tensor, last: torch.Tensor) -> list[torch.Tensor]:
    return [own.new_empty(6, *own.shape), first.new_empty(first.shape), last.new_empty(last.shape)]


@_moments_operator.register_fake
def _(own: torch.Tensor, count: int) -> torch.Tensor:
    return own.new_empty(6, *own.shape)


def _with_rows(run: PatchRun, x: torch.Tensor, pad: int, after: int) -> torch.Tensor:
    """The patch with ``pad`` rows of the rank before and ``after`` of the rank after it; zeros at borders."""
    dim, exchange = run.dim, run.exchange
    assert exchange is not None
    size, border = x.shape[dim], exchange.rank == exchange.ranks - 1
    if size < max(pad, after):
        raise ValueError(f"a patch of {size} rows is too small for a convolution; use fewer ranks")
    first, last = x.narrow(dim, 0, after), x.narrow(dim, size - pad, pad)
    if torch.compiler.is_compiling():
        above, below = torch.ops.displaced_patches.rows(first, last, dim, border)
        return torch.cat([above, x, below], dim)

    def join(above: torch.Tensor | None, below: torch.Tensor | None) -> torch.Tensor:
        parts = [torch.zeros_like(last) if above is None else above, x]
        if border or below is not None:
            parts.append(torch.zeros_like(last) if below is None else below)
        return torch.cat(parts, dim)

    return exchange.rows(first if after else None, last, join)


def _with_moments_and_rows(
    run: PatchRun, x: torch.Tensor, own: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The others' moments, and the patch with one row of each neighbour; of any content at borders."""
    dim, exchange = run.dim, run.exchange
    assert exchange is not None
    first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
    if torch.compiler.is_compiling():
        known, above, below = torch.ops.displaced_patches.moments_and_rows(own, count, first, last)
    else:
        known, *rows = exchange.moments_and_rows(own, count, first, last)
        above, below = (first if row is None else row for row in rows)
    return known, torch.cat([above, x, below], dim)


def _zeros_outside(run: PatchRun, x: torch.Tensor, pad: int, after: int) -> torch.Tensor:
    """The same, with zeros outside of the picture."""
    assert run.exchange is not None
    if run.exchange.rank == 0:
        x.narrow(run.dim, 0, pad).zero_()
    if run.exchange.rank == run.exchange.ranks - 1:
        x.narrow(run.dim, x.shape[run.dim] - after, after).zero_()
    return x


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Norms and the convolutions that take what they give through an activation alone."""
    for block in model.modules():
        if isinstance(block, ResnetBlock2D):
            if block.upsample is None and block.downsample is None:
                yield block.norm1, block.conv1
            if block.time_embedding_norm == "default":
                yield block.norm2, block.conv2


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, Attention):
            if getattr(module, "fused_projections", False):
                raise ValueError(
                    f"{name}: fused projections are not supported; call unfuse_qkv_projections() first"
                )
            yield name, module
        elif isinstance(module, nn.GroupNorm):
            yield name, module
        elif isinstance(getattr(module, "base_layer", module), nn.Conv2d):
            # A LoRA layer with its convolutions inside counts as one.
            inside |= {id(m) for m in module.modules()}
            if padded_inside(module):
                yield name, module


def padded_inside(layer: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of a layer that pad: itself, or with a LoRA those inside it."""
    return [m for m in layer.modules() if isinstance(m, nn.Conv2d) and any(_pad(m))]


@contextlib.contextmanager
def unpadded(convs: Sequence[nn.Conv2d], axis: int) -> Iterator[None]:
    """Convolutions that do not pad along an axis of [height, width]: their input already holds those rows."""
    with Surgery() as surgery:
        for conv in convs:
            rows, columns = _pad(conv)
            surgery.replace(conv, "padding", (0, columns) if axis == 0 else (rows, 0))
        yield


def _pad(conv: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(conv.padding, str):
        raise ValueError(f"patches support only padding given as numbers; a convolution has {conv.padding!r}")
    return conv.padding


def _strip(run: PatchRun, before: int, after: int) -> torch.Tensor:
    assert run.whole is not None and run.patch is not None
    length, stop = run.whole.shape[run.dim], run.start + run.patch.shape[run.dim]
    low, high = run.start - before, stop + (before if stop == length else after)
    part = run.whole.narrow(run.dim, max(low, 0), min(high, length) - max(low, 0))
    padding = (0, 0, max(-low, 0), max(high - length, 0))
    return F.pad(part, padding if run.dim == 2 else padding[2:])


class GroupNormMode(TorchFunctionMode):
    """Answers the one call of F.group_norm inside: the weights are then where their hooks put them."""

    def __init__(self, answer: Callable[[torch.Tensor, Any, Any], torch.Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.group_norm:
            given = dict(zip(("input", "num_groups", "weight", "bias"), args, strict=False)) | (kwargs or {})
            return self.answer(given["input"], given.get("weight"), given.get("bias"))
        return func(*args, **(kwargs or {}))
