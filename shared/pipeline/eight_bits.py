"""Eight bits that compute in eight bits: which layers, on which devices, by torchao's tensors

Weights have a scale for each output. The inputs of a layer get theirs when it is called, one for each row, so
that a rank with some of the rows computes what one rank computes with all of them. Quantizing the inputs pays
where it is compiled into what made them, so that layers outside of compiled regions are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shared.launch.flags import COMPUTED, HostConfig
from shared.parallel.divided import Multiplying
from shared.pipeline.compile import blocks, feed_forwards

log = logging.getLogger("host")

CAPABILITY = {"float8": (8, 9), "int8": (8, 0)}
"""The least of NVIDIA's GPUs that multiply such matrices."""
LEAST = 2**21
"""Weights of a layer below which it stays: what its product gains goes into quantizing its inputs."""
MULTIPLE = 16
"""Of inputs and outputs, without which cuBLAS has no product of such matrices."""
ROWS = 32
"""Rows that an int8 product is filled up to: cuBLAS has none of 16 or fewer."""
FEW = 128
"""Rows of a float8 product below which its bias is added apart: where there are four times as many inputs as
outputs, cuBLAS has none with a bias of up to 77 rows."""

TINY = 1e-12
"""What the largest value of a row counts at least; a row of zeros, as of padding, would become NaN."""


def weight_only(kind: str | None) -> str | None:
    """The kind that keeps weights as small and computes in the launch's dtype."""
    return COMPUTED.get(kind or "", kind)


def obstacle(kind: str, device: torch.device) -> str | None:
    """Why a device cannot multiply matrices of this kind; None: it can. Every CPU can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return "only CPUs and NVIDIA's GPUs are supported"
    found, least = torch.cuda.get_device_capability(device), CAPABILITY[kind]
    if found < least:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {found[0]}.{found[1]}, it needs {least[0]}.{least[1]}"
    return None


def for_device(
    config: HostConfig, device: torch.device, problem: str | None = None, tells: bool = True
) -> HostConfig:
    """The launch as this device can run it: where it computes in 8 bits, compiled; else with small weights.

    Args:
        problem: why another rank cannot, where one cannot: all ranks must compute alike.
        tells: whether the log says it; one rank of a launch does.
    """
    kind = config.quantize_to
    if kind not in COMPUTED:
        return config
    problem = problem or obstacle(kind, device)
    if problem:
        log.log(
            logging.WARNING if tells else logging.DEBUG,
            "--quantize_to=%s keeps weights in 8 bits and computes in more: %s",
            kind,
            problem,
        )
        return replace(config, quantize_to=COMPUTED[kind])
    if device.type == "cuda" and not config.compile_unet:
        log.info("--quantize_to=%s compiles the denoiser: 8 bits are slower than 16 without it", kind)
        return replace(config, compile_unet=True)
    return config


class EightBitLinear(Multiplying):
    """A linear layer with a weight of `packed`. Its class is set on the layer that is there."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.multiply(input, self.weight, self.bias)

    def multiply(self, input: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        rows = input.numel() // input.shape[-1]
        if weight.qdata.dtype != torch.int8:
            # Float8 products by row have results in bf16 only.
            bias = None if bias is None else bias.to(torch.bfloat16)
            if bias is None or rows >= FEW:
                return F.linear(input.to(torch.bfloat16), weight, bias).to(input.dtype)
            return (F.linear(input.to(torch.bfloat16), weight) + bias).to(input.dtype)
        if rows >= ROWS:
            return F.linear(input, weight, bias)
        filled = F.pad(input.reshape(rows, -1), (0, 0, 0, ROWS - rows))
        return F.linear(filled, weight, bias)[:rows].reshape(*input.shape[:-1], -1)


def computing_layers(
    denoiser: nn.Module, exact: Sequence[str], whole_blocks: bool = True
) -> dict[str, nn.Linear]:
    """The linear layers that gain from 8 bits, by name: large ones, in what is compiled.

    Args:
        exact: patterns of names of layers that are not quantized.
        whole_blocks: whether blocks are compiled as a whole; else only the feed-forward layers inside them.
    """
    regions = blocks(denoiser) if whole_blocks else feed_forwards(denoiser)
    inside = {id(module) for region in regions for module in region.modules()}
    return {
        name: layer
        for name, layer in denoiser.named_modules()
        if type(layer) in (nn.Linear, EightBitLinear)
        and id(layer) in inside
        and layer.weight.numel() >= LEAST
        and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
        and not any(fnmatch(name, pattern) for pattern in exact)
    }


def faster(
    layers: Mapping[str, nn.Linear], component: str, in_16_bits: Collection[str]
) -> dict[str, nn.Linear]:
    """Those of a component's `computing_layers` that are not slower in 8 bits on this GPU."""
    return {name: layer for name, layer in layers.items() if f"{component}.{name}" not in in_16_bits}


def quantize_layer(layer: nn.Linear, kind: str) -> None:
    """Give a layer a weight of 8 bits, made of its own."""
    put(layer, kind, *quantized(layer.weight.detach(), kind))


def quantized(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of 8 bits of a weight, [outputs, inputs], and their scales, [outputs, 1]."""
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

    if kind == "float8":
        from torchao.quantization.quantize_.common import KernelPreference

        torchs = KernelPreference.TORCH
        made = Float8Tensor.from_hp(weight, granularity=PerRow(), hp_value_lb=TINY, kernel_preference=torchs)
    else:
        made = Int8Tensor.from_hp(weight, PerRow())
    return made.qdata, made.scale


def put(layer: nn.Linear, kind: str, data: torch.Tensor, scale: torch.Tensor) -> None:
    """Give a layer what `quantized` makes of a weight."""
    layer.weight = nn.Parameter(_packed(kind, data, scale, layer.weight.dtype), requires_grad=False)
    layer.__class__ = EightBitLinear


def _packed(kind: str, data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """torchao's tensor, whose products quantize their other factor by row, by torch's own kernels."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    block = [1, data.shape[1]]
    made: torch.Tensor
    if kind == "float8":
        torchs = KernelPreference.TORCH
        inputs = QuantizeTensorToFloat8Kwargs(
            torch.float8_e4m3fn, PerRow(), hp_value_lb=TINY, kernel_preference=torchs
        )
        fast = Float8MMConfig(use_fast_accum=True)
        made = Float8Tensor(data, scale, block, fast, inputs, torchs, dtype)
    else:
        made = Int8Tensor(data, scale, block, dtype, act_quant_kwargs=QuantizeTensorToInt8Kwargs(PerRow()))
    return made
