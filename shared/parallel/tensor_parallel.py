"""Tensor parallelism of a UNet: heads, hidden features and channels are divided over the ranks; exact.

Of two layers in a row the first computes this rank's share of the features and the second this rank's
share of the sum, which an all-reduce completes (Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3).
Divided are attention, feed-forward layers, residual blocks, and the convolutions that resample or come last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from shared.parallel.exchange import Ranks
from shared.parallel.method import Part
from shared.parallel.surgery import Forward, Surgery

Span = tuple[int, int]


class TensorParallel(Part):
    """Divides the layers of models over the ranks of a group.

    What has fewer parts (heads, groups of channels) than there are ranks is computed whole by each.

    Args:
        models: UNets and ControlNets of diffusers, in memory and with plain weights.
        group: the ranks; None for all.

    Raises:
        ValueError: a layer to be divided is quantized, has a LoRA that is not fused, or is offloaded.
    """

    def __init__(self, models: Sequence[nn.Module], group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.ranks = Ranks.of(group)
        self._surgery = self.held.enter_context(Surgery())
        try:
            for model in models:
                for name, module in model.named_modules():
                    self._divide(name, module)
                if (last := getattr(model, "conv_out", None)) is not None:
                    self._row("conv_out", last, self._share(last.in_channels))
        except ValueError:
            self.close()
            raise

    def _share(self, parts: int, each: int = 1) -> Span:
        """This rank's share of so many parts, in elements."""
        _, rank, size = self.ranks
        return rank * parts // size * each, (rank + 1) * parts // size * each

    def _divide(self, name: str, module: nn.Module) -> None:
        if isinstance(module, Attention):
            self._attention(name, module)
        elif isinstance(module, FeedForward):
            self._feed_forward(name, module)
        elif isinstance(module, ResnetBlock2D):
            self._resnet(name, module)
        elif isinstance(module, Downsample2D | Upsample2D) and isinstance(module.conv, nn.Module):
            conv = module.conv
            base = getattr(conv, "base_layer", conv)
            if isinstance(base, nn.Conv2d):
                self._row(f"{name}.conv", conv, self._share(base.in_channels))

    def _attention(self, name: str, module: Attention) -> None:
        if module.heads < self.ranks.size:
            return
        if module.norm_q is not None or getattr(module, "fused_projections", False):
            raise ValueError(
                f"{name}: tensor parallelism does not support attention with normed or fused queries"
            )
        size = _plain(f"{name}.to_q", module.to_q).shape[0] // module.heads
        span = self._share(module.heads, size)
        layers = {"to_q": module.to_q, "to_k": module.to_k, "to_v": module.to_v}
        if isinstance(module.processor, nn.Module):  # IP-Adapter's own keys and values
            for key in ("to_k_ip", "to_v_ip"):
                layers |= {f"{key}.{i}": m for i, m in enumerate(getattr(module.processor, key, []))}
        for key, layer in layers.items():
            self._column(f"{name}.{key}", layer, [span])
        self._row(f"{name}.to_out.0", module.to_out[0], span)
        self._surgery.replace(module, "heads", (span[1] - span[0]) // size)

    def _feed_forward(self, name: str, module: FeedForward) -> None:
        first, last = module.net[0].proj, module.net[2]
        features = _plain(f"{name}.net.2", last).shape[1]
        low, high = self._share(features)
        outputs = _plain(f"{name}.net.0.proj", first).shape[0]
        # A gated layer has the gates behind the values.
        spans = [(low + i, high + i) for i in range(0, outputs, features)]
        self._column(f"{name}.net.0.proj", first, spans)
        self._row(f"{name}.net.2", last, (low, high))

    def _resnet(self, name: str, module: ResnetBlock2D) -> None:
        norm = module.norm2
        if not isinstance(norm, nn.GroupNorm) or norm.num_groups < self.ranks.size:
            return
        low, high = span = self._share(norm.num_groups, norm.num_channels // norm.num_groups)
        self._column(f"{name}.conv1", module.conv1, [span])
        if module.time_emb_proj is not None:
            outputs = _plain(f"{name}.time_emb_proj", module.time_emb_proj).shape[0]
            spans = [(low + i, high + i) for i in range(0, outputs, norm.num_channels)]
            self._column(f"{name}.time_emb_proj", module.time_emb_proj, spans)
        groups = (high - low) // (norm.num_channels // norm.num_groups)
        weight, bias = (None if p is None else p[low:high] for p in (norm.weight, norm.bias))
        self._answer(norm, lambda x: F.group_norm(x, groups, weight, bias, norm.eps))
        self._row(f"{name}.conv2", module.conv2, span)

    def _column(self, name: str, module: Any, spans: list[Span]) -> None:
        """Compute only these output features."""
        weight, bias = _plain(name, module), module.bias
        weight = _joined(weight, spans)
        bias = None if bias is None else _joined(bias, spans)
        self._answer(module, _function(module, weight, bias))

    def _row(self, name: str, module: Any, span: Span) -> None:
        """Take only these input features, and add up what all ranks make."""
        low, high = span
        weight, bias = _plain(name, module)[:, low:high].contiguous(), module.bias
        function, features = _function(module, weight, None), _plain(name, module).shape[1]
        axis = 1 if isinstance(module, nn.Conv2d) else -1

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.shape[axis] == features:
                x = x.narrow(axis, low, high - low)
            out = function(x).contiguous()
            dist.all_reduce(out, group=self.ranks.group)
            if bias is None:
                return out
            return out + (bias.view(-1, 1, 1) if axis == 1 else bias)

        self._answer(module, forward)

    def _answer(self, module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            return forward(args[0])

        self._surgery.override(module, answer)


def _plain(name: str, module: Any) -> torch.Tensor:
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"{name}: tensor parallelism supports only plain weights, and this layer has a LoRA; fuse it "
            "first"
        )
    if type(module) not in (nn.Linear, nn.Conv2d) or type(module.weight) is not nn.Parameter:
        raise ValueError(
            f"{name}: tensor parallelism supports only plain weights; this is a {type(module).__name__} of "
            f"{type(getattr(module, 'weight', None)).__name__} (quantized?)"
        )
    if "forward" in module.__dict__ or module.weight.is_meta:
        raise ValueError(
            f"{name}: tensor parallelism supports only weights in memory; these are offloaded or compiled"
        )
    return module.weight.detach()


def _joined(tensor: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    parts = [tensor.detach()[low:high] for low, high in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _function(module: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    if isinstance(module, nn.Linear):
        return lambda x: F.linear(x, weight, bias)
    return lambda x: F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation)
