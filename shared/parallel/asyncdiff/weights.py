"""The weights of one stage: what other stages run is on other ranks, and here only in its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shared.parallel.asyncdiff.partition import Partition
from shared.parallel.asyncdiff.trace import contiguous_stride, is_dense
from shared.parallel.exchange import Ranks, broadcast
from shared.parallel.lanes import copy, side_by_side
from shared.parallel.sharded import LEAST, Block, is_quantized, layers_of, move_rest, plain
from shared.parallel.surgery import Closing, Forward, Surgery


@dataclass
class _Layer:
    """A module that may be a unit, with its tensors, and their values until it is known who keeps them."""

    name: str
    module: nn.Module
    tensors: list[torch.Tensor]
    host: list[torch.Tensor]
    owner: int | None = None
    """The stage that keeps it; None: every rank."""
    block: Block | None = None
    """Where every rank runs it: divided over the ranks, and gathered for each call."""


class StageWeights(Closing):
    """Of a model that AsyncDiff cuts, a rank keeps the weights of its stage, from the first cut to ``close``.

    Until then the weights wait in host memory. Parameters of other stages have one row of memory, seen in
    the place of every row: enough to trace the model at another size. LoRAs may come and go meanwhile.

    Args:
        model: whole on every rank, on any device.
        group: as in AsyncDiff.
        device: of this rank.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.model, self.ranks, self.device = model, Ranks.of(group), device
        self.stages: dict[str, int] = {}
        """The stage of each unit, by its label; empty before the first cut."""
        self._surgery = Surgery()
        self._layers: list[_Layer] = []
        moved = []
        for name, module in layers_of(model):
            host = [tensor.data for tensor in _tensors(module)]
            packed = any(is_quantized(parameter) for parameter in module.parameters())
            if packed:
                module.to(device)  # which replaces the tensors inside; a second move would copy them
            layer = _Layer(name, module, _tensors(module), host)
            for tensor in layer.tensors:
                tensor.data = _one_row(tensor, device)
            if not packed:
                module.to(device)
            self._layers.append(layer)
            self._surgery.override(module, lambda *call, layer=layer: self._call(layer, *call))
            moved.append(module)
        move_rest(model, moved, device)

    def unit_bytes(self, names: list[str]) -> list[int]:
        """The parameter bytes of the units of these qualified names."""
        sizes = {x.name: sum(t.numel() * t.element_size() for t in x.tensors) for x in self._layers}
        return [sizes.get(name, 0) for name in names]

    def assigned(self, labels: list[str]) -> list[int] | None:
        """The stages of these units; None before the first cut.

        Raises:
            ValueError: a unit that the first cut has not seen.
        """
        if not self.stages:
            return None
        if unknown := [label for label in labels if label not in self.stages]:
            raise ValueError(
                f"{unknown[0]} runs for the first time, and its weights belong to no stage; "
                "with sharded weights it must run in the first call"
            )
        return [self.stages[label] for label in labels]

    def keep(self, plan: Partition, stage: int) -> None:
        """Keep the weights of a stage of the first cut, and let go of the others'."""
        if self.stages:
            return
        calls = [plan.trace.calls[index] for index in plan.trace.units]
        owners: dict[str, set[int]] = {}
        for number, units in enumerate(plan.stages):
            for unit in units:
                self.stages[calls[unit].label] = number
                owners.setdefault(calls[unit].name, set()).add(number)
        for layer in self._layers:
            mine = owners.get(layer.name)
            # What several stages call, and what is no unit, is on every rank.
            layer.owner = next(iter(mine)) if mine and len(mine) == 1 else None
        self._bring([layer for layer in self._layers if layer.owner in (None, stage)])
        for layer in self._layers:
            layer.host = [_empty_like(value) for value in layer.host]
        self._divide_common({call.name for call in plan.trace.calls})

    def close(self) -> None:
        """Give every rank the whole weights back. All ranks must call it, any number of times."""
        self._surgery.close()
        if not self.stages:
            self._bring(self._layers)
        for layer in self._layers if self.stages else ():
            if layer.block is not None:
                layer.block.restore(self._buffer, self.ranks)
            elif layer.owner is not None:
                for tensor, like in zip(layer.tensors, layer.host, strict=True):
                    self._fill(tensor, like, layer.owner)
        self._layers, self.stages = [], {}

    def saved_bytes(self) -> int:
        """What this rank does not keep of the layers that every rank runs."""
        return sum(layer.block.saved_bytes for layer in self._layers if layer.block is not None)

    def _call(self, layer: _Layer, original: Forward, args: tuple, kwargs: dict) -> Any:
        if layer.block is not None:
            layer.block.gather(self._buffer, self.ranks).wait()
        return original(*args, **kwargs)

    def _divide_common(self, called: set[str]) -> None:
        """Divide the layers that every rank runs in every step: embeddings of time, size, prompt, picture.

        Those inside of something that is called with the sample are run by the ranks of its stages only.
        """
        total = sum(t.numel() * t.element_size() for t in _tensors(self.model))
        for layer in self._layers:
            parents = {layer.name[:end] for end, letter in enumerate(layer.name) if letter == "."}
            if called & {layer.name, *parents} or layer.owner is not None:
                continue
            if any(t.ndim > 1 for t in layer.tensors) and self.unit_bytes([layer.name])[0] > LEAST * total:
                names = [name for name, _ in layer.module.named_parameters()]
                layer.block = Block([layer.module], names, self.ranks.size)
        blocks = [layer.block for layer in self._layers if layer.block is not None]
        size = max((block.nbytes for block in blocks), default=0)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        for block in blocks:
            block.divide(self._buffer, self.ranks)

    def _bring(self, layers: list[_Layer]) -> None:
        pairs = [pair for layer in layers for pair in zip(layer.tensors, layer.host, strict=True)]
        made = [torch.empty_like(_empty_like(value), device=self.device) for _, value in pairs]

        def one(item: tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
            (tensor, value), into = item
            copy(into, value)
            tensor.data = into

        side_by_side(one, zip(pairs, made, strict=True), self.device)

    def _fill(self, tensor: torch.Tensor, like: torch.Tensor, owner: int) -> None:
        """Take a tensor from its owner's first rank."""
        if self.ranks.rank != owner:
            tensor.data = torch.empty_strided(
                like.shape, like.stride(), dtype=tensor.dtype, device=self.device
            )
        flat = tensor.data.as_strided((tensor.numel(),), (1,))
        broadcast(flat.view(torch.uint8), owner, self.ranks)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [tensor for parameter in module.parameters() for tensor in plain(parameter)]


def _one_row(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    row = torch.zeros(tensor.shape[-1:], dtype=tensor.dtype, device=device)
    return row.as_strided(tensor.shape, (*[0] * (tensor.ndim - 1), *row.stride()))


def _empty_like(value: torch.Tensor) -> torch.Tensor:
    """Its shape and memory layout, without memory."""
    stride = value.stride() if is_dense(value) else contiguous_stride(value.shape)
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device="meta")
