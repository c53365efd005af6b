"""Sharded weights: each rank keeps a part of every block, and a block is whole only while it runs.

The blocks of a model share one buffer, in which each has its place, round and round in the order of calls;
its parameters are views of it for good, or of this rank's part where all of one is there. While a block runs,
those that follow are gathered into what is free of it. A parameter therefore never changes its identity, its
shape or its address, so that LoRA, quantized layers, compiled code and captured graphs work as they are; what
FSDP2 puts in its place (another class of module, DTensors that come and go) breaks each of these.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shared.parallel.asyncdiff.trace import candidates, contiguous_stride, is_dense, is_list
from shared.parallel.exchange import Ranks, start_all_gather
from shared.parallel.lanes import copy, side_by_side
from shared.parallel.peers import Fetched, seen_by_all
from shared.parallel.surgery import Closing, Forward, Surgery

ALIGNMENT = 64
"""Bytes at whose multiples tensors and parts begin; kernels load 16 at once."""
LEAST = 0.002
"""Share of a model's bytes below which a module stays whole: its message would cost more than it frees."""
LARGEST = 300 << 20
"""Bytes of a block above which what is inside it is gathered each as one; the buffer holds two blocks."""
WHOLE = ("MultiheadAttention", "HunyuanDiTAttentionPool")
"""Classes that read the weights of layers inside them without calling those."""


@dataclass(frozen=True)
class Piece:
    """A tensor's place in the buffer of its block."""

    tensor: torch.Tensor
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor, offset: int) -> Piece:
        stride = tensor.stride() if is_dense(tensor) else contiguous_stride(tensor.shape)
        return cls(tensor, offset, tuple(tensor.shape), tuple(stride))

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def copy_to(self, part: torch.Tensor, begin: int) -> None:
        """Copy what lies between `begin` and the end of `part`, in bytes of the block, to its place there.

        Of a mapped file nothing else is read.
        """
        dense = self.tensor if tuple(self.tensor.stride()) == self.stride else self.tensor.contiguous()
        flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
        first, last = self.common(begin, begin + part.numel())
        if first < last:
            copy(part[first - begin : last - begin], flat[first - self.offset : last - self.offset])

    def common(self, begin: int, end: int) -> tuple[int, int]:
        """Where the bytes of it that are also between two places of the block begin and end."""
        return max(self.offset, begin), min(self.offset + self.nbytes, end)

    def inside(self, buffer: torch.Tensor, begin: int = 0) -> torch.Tensor:
        """The tensor that lies at this place of a buffer of bytes, which begins at `begin` of the block."""
        flat = buffer[self.offset - begin :][: self.nbytes].view(self.tensor.dtype)
        return flat.as_strided(self.shape, self.stride)


class Block:
    """A module whose weights are gathered together. Sizes in bytes.

    Args:
        modules: more than one where they share all parameters.
        parameters: their names in the module; its others stay whole.
        ranks: over how many it is divided.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Sequence[str], ranks: int) -> None:
        self.modules, self.parameters, self._ranks = tuple(modules), tuple(parameters), ranks
        self.pieces = self._find()
        last = self.pieces[-1]
        self.nbytes = _aligned(last.offset + last.nbytes, ranks * ALIGNMENT)
        """Of all parts together, each as long as the others."""
        self.part: torch.Tensor | None = None
        """This rank's."""
        self.begin = 0
        """Where that is within the block."""
        self.cut: list[tuple[int, int]] = []
        """What of it belongs to parameters that are not wholly in it: where it begins and ends within it."""
        self.parts: list[torch.Tensor] = []
        """Of all ranks, where this one can read them."""
        self.waits = False
        """Whether this rank's part waits in host memory."""
        self.place = 0
        """Where it begins in the buffer."""

    @property
    def saved_bytes(self) -> int:
        """What this rank does not keep of the parameters."""
        return sum(piece.nbytes for piece in self.pieces) - (0 if self.part is None else self.part.nbytes)

    @property
    def end(self) -> int:
        """Where its place in the buffer ends."""
        return self.place + self.nbytes

    def overlaps(self, other: Block) -> bool:
        """Whether they cannot be in the buffer at the same time."""
        return self.place < other.end and other.place < self.end

    def load(self, buffer: torch.Tensor, ranks: Ranks) -> None:
        """As `divide`, of a module on any device: of plain weights only this rank's part is moved."""
        module, device = self.modules[0], buffer.device
        if any(is_quantized(parameter) for parameter in module.parameters()):
            module.to(device)  # which replaces the tensors inside; a second move would copy them
            self.pieces = self._find()
            self.divide(buffer, ranks)
        else:
            self.divide(buffer, ranks)
            module.to(device)

    def put(self, buffer: torch.Tensor) -> None:
        """Make the parameters views of this rank's part, or else of the block's place in a buffer."""
        assert self.part is not None  # which `divide` makes
        begin, end, self.cut = self.begin, self.begin + self.part.numel(), []
        for piece in self.pieces:
            first, last = piece.common(begin, end)
            if last - first == piece.nbytes and not self.waits:
                piece.tensor.data = piece.inside(self.part, begin)
            else:
                piece.tensor.data = piece.inside(buffer[self.place : self.end])
                if first < last:
                    self.cut.append((first - begin, last - begin))

    def divide(self, buffer: torch.Tensor, ranks: Ranks) -> None:
        """Keep this rank's part of the parameters, and make them views of it and of a buffer."""
        length = self.nbytes // ranks.size
        self.begin = ranks.rank * length
        if self.part is None:
            self.part = torch.empty(length, dtype=torch.uint8, device=buffer.device)
        for piece in self.pieces:
            piece.copy_to(self.part, self.begin)
        self.put(buffer)

    def wait_in_host_memory(self, buffer: torch.Tensor) -> None:
        """Move this rank's part there, from where every gather takes it into the buffer."""
        self.waits = True
        assert self.part is not None
        if self.part.device.type == "cuda":
            self.part = self.part.cpu().pin_memory()
        self.put(buffer)

    def gather(self, buffer: torch.Tensor, ranks: Ranks, beside: Sequence[torch.cuda.Stream] = ()) -> Any:
        """Start to fill the buffer with the parts of all ranks; what this returns must be waited for.

        Args:
            beside: on which parts that this rank can read are copied, as `Fetched` takes them.
        """
        whole, own = buffer[self.place : self.end], self.part
        assert own is not None
        if self.parts and beside:
            return Fetched(whole, self.parts, ranks.rank, self.cut, beside)
        if self.waits:
            place = whole[ranks.rank * own.numel() :][: own.numel()]
            own = place.copy_(own, non_blocking=True)
        return start_all_gather(whole, own, ranks.group)

    def restore(self, buffer: torch.Tensor, ranks: Ranks) -> None:
        """Give the parameters memory of their own, with what all ranks keep."""
        self.gather(buffer, ranks).wait()
        own = buffer[self.place : self.end].clone()
        for piece in self.pieces:
            piece.tensor.data = piece.inside(own)

    def _find(self) -> list[Piece]:
        """Each rank's part whole tensors as far as that goes: the largest first, to whom has least."""
        shares: list[list[torch.Tensor]] = [[] for _ in range(self._ranks)]
        lengths = [0] * self._ranks
        parameters = map(self.modules[0].get_parameter, self.parameters)
        for tensor in sorted((t for p in parameters for t in plain(p)), key=_bytes, reverse=True):
            least = lengths.index(min(lengths))
            shares[least].append(tensor)
            lengths[least] += _aligned(_bytes(tensor), ALIGNMENT)
        pieces, end = [], 0
        for tensor in itertools.chain(*shares):
            pieces.append(Piece.of(tensor, end))
            end += _aligned(pieces[-1].nbytes, ALIGNMENT)
        return pieces


class ShardedWeights(Closing):
    """Keeps a part of the weights of some models on each rank of a group, until ``close``.

    All ranks must call the models' blocks in the same order. Adapters may come and go meanwhile: their own
    weights stay whole. Whatever works on the models (a parallel method, compiled code around blocks) may be
    put on afterwards and taken off before ``close``; it must not read weights but by calling a block.

    Args:
        models: whole on every rank, on any device; by name.
        group: the ranks; None for all. Its collectives run beside those of other groups.
        device: of this rank, where the parts and the buffers are.
        called: what is called of a model in place of the model itself: a VAE's encoder and decoder.
        waiting: the models whose parts wait in host memory.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        group: dist.ProcessGroup | None,
        device: torch.device,
        called: Mapping[str, Sequence[nn.Module]] | None = None,
        waiting: Collection[str] = (),
    ) -> None:
        self.ranks, self.device = Ranks.of(group), device
        self.held = contextlib.ExitStack()
        """What else ends with it, once the weights are whole."""
        self.blocks = {name: blocks_of(model, self.ranks.size) for name, model in models.items()}
        """By model."""
        self._surgery = Surgery()
        self._next: dict[Block, Block] = {}
        self._order: dict[str, list[Block]] = {}
        self._called: list[Block] = []
        self._holds: set[Block] = set()
        self._coming: dict[Block, Any] = {}
        every = [block for blocks in self.blocks.values() for block in blocks]
        largest = max((block.nbytes for block in every), default=0)
        self._buffer = torch.empty(2 * largest, dtype=torch.uint8, device=device)
        # One memory for all parts that stay on the device, so that the other ranks are told of one.
        stay = [block for name in self.blocks if name not in waiting for block in self.blocks[name]]
        lengths = [block.nbytes // self.ranks.size for block in stay]
        own = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
        for block, part in zip(stay, own.split(lengths), strict=True):
            block.part = part
        side_by_side(lambda block: block.load(self._buffer, self.ranks), every, device)
        for block in every:
            for module in block.modules:
                self._surgery.override(module, lambda *call, block=block: self._block(block, *call))
        for name, model in models.items():
            move_rest(model, [module for block in every for module in block.modules], device)
            for number, part in enumerate((called or {}).get(name, [model])):
                self._surgery.override(part, self._model(f"{name} {number}"))
            for block in self.blocks[name] if name in waiting else ():
                block.wait_in_host_memory(self._buffer)
            if device.type == "cpu":
                leave_files(model, self.blocks[name])
        seen = seen_by_all(own, self.ranks) if stay else None
        self._beside = () if seen is None else (torch.cuda.Stream(device), torch.cuda.Stream(device))
        for block, *parts in zip(stay, *(memory.split(lengths) for memory in seen or ()), strict=True):
            block.parts = parts

    def close(self) -> None:
        """Give every rank the whole weights back. All ranks must call it, any number of times."""
        self._surgery.close()
        self._beside = ()  # a collective waits for all ranks, which then read nothing of each other
        for blocks in self.blocks.values():
            for block in blocks:
                block.restore(self._buffer, self.ranks)
        self.blocks, self._buffer = {}, torch.empty(0)
        self.held.close()

    @property
    def copied(self) -> bool:
        """Whether blocks are copied from the other ranks' memory; else collectives bring them."""
        return bool(self._beside)

    @property
    def buffer_bytes(self) -> int:
        """Of the buffer in which blocks are gathered."""
        return self._buffer.nbytes

    def saved_bytes(self, model: str) -> int:
        """What this rank does not keep of a model's weights."""
        return sum(block.saved_bytes for block in self.blocks.get(model, ()))

    def _model(self, name: str) -> Callable[[Forward, tuple, dict], Any]:
        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            # What the buffer holds is not known: a captured graph may have been replayed in between.
            self._all_arrived()
            self._holds, self._called = set(), []
            out = original(*args, **kwargs)
            self._all_arrived()
            self._learn(name)
            return out

        return answer

    def _learn(self, name: str) -> None:
        """The order of the latest forward is what the next one is expected to have."""
        if self._called == self._order.get(name):
            return
        if name not in self._order:
            self._lay_out(list(dict.fromkeys(self._called)))
        self._order[name] = self._called
        self._next |= {a: b for a, b in zip(self._called, self._called[1:], strict=False)}
        if self._called:
            self._next.pop(self._called[-1], None)

    def _lay_out(self, order: Sequence[Block]) -> None:
        """Each after the one before it, or at an end of the buffer, where the next one has room beside it."""
        size, begin, end = self._buffer.nbytes, 0, 0
        for block, following in itertools.zip_longest(order, order[1:]):
            need, room = block.nbytes, following.nbytes if following is not None else 0
            block.place = next(
                place
                for place in (end, 0, size - need)
                if place + need <= size
                and (place >= end or place + need <= begin)
                and (place >= room or size - place - need >= room)
            )
            begin, end = block.place, block.end
            block.put(self._buffer)

    def _block(self, block: Block, original: Forward, args: tuple, kwargs: dict) -> Any:
        self._called.append(block)
        if block not in self._coming and block not in self._holds:
            self._gather(block)
        self._arrived(block)
        # What ran before is done: on CUDA, a collective waits for this stream first.
        needed, following = [block], self._next.get(block)
        while following is not None and not any(map(following.overlaps, needed)):
            if following not in self._coming and following not in self._holds:
                self._gather(following)
            needed.append(following)
            following = self._next.get(following)
        return original(*args, **kwargs)

    def _arrived(self, block: Block) -> None:
        """Wait for a block if it is on its way."""
        if block in self._coming:
            self._coming.pop(block).wait()
            self._holds.add(block)

    def _all_arrived(self) -> None:
        for block in list(self._coming):
            self._arrived(block)

    def _gather(self, block: Block) -> None:
        """Start to fill the block's place, in which there are others until now."""
        for other in list(self._coming):
            if other.overlaps(block):
                self._arrived(other)
        self._holds = {other for other in self._holds if not other.overlaps(block)}
        self._coming[block] = block.gather(self._buffer, self.ranks, self._beside)


def blocks_of(
    model: nn.Module, ranks: int, size: Callable[[torch.Tensor], int] | None = None, splits: bool = True
) -> list[Block]:
    """The modules of a model that are gathered each as one: the smallest that are not containers of others.

    Norms of their own, what is small and what two modules share stay whole.

    Args:
        size: the bytes of a parameter, where it is not stored as it is here.
        splits: whether those above LARGEST are divided further.
    """
    size = size or _bytes
    total = sum(map(size, model.parameters()))
    found: dict[frozenset[int], dict[int, nn.Module]] = {}
    for _, layer in layers_of(model):
        for module in _inside(layer, size, LEAST * total) if splits else [layer]:
            found.setdefault(frozenset(map(id, module.parameters())), {})[id(module)] = module
    users = Counter(key for keys in found for key in keys)
    blocks = []
    for modules in (list(same.values()) for same in found.values()):
        own = {name: p for name, p in modules[0].named_parameters() if users[id(p)] == 1}
        if any(p.ndim > 1 for p in own.values()) and sum(map(size, own.values())) >= LEAST * total:
            blocks.append(Block(modules, list(own), ranks))
    return blocks


def _inside(module: nn.Module, size: Callable[[torch.Tensor], int], least: float) -> list[nn.Module]:
    """The modules that a large one calls, where nearly all of its weights are in those of `least` bytes."""

    def of(part: nn.Module) -> int:
        return sum(map(size, part.parameters()))

    if of(module) <= LARGEST or "forward" in vars(module):  # a compiled one does not call them
        return [module]
    if any(type(part).__name__ in WHOLE for part in module.modules()):
        return [module]
    children = [part for child in module.children() for part in _called(child)]
    large = [part for part in children if of(part) >= least]
    if sum(map(of, large)) < 0.98 * of(module):
        return [module]
    return [inner for part in large for inner in _inside(part, size, least)]


def _called(child: nn.Module) -> list[nn.Module]:
    """A child as it is called: the parts of a list, and a layer without its adapters'."""
    parts = list(child.children()) if is_list(child) else [child]
    return [getattr(part, "base_layer", part) for part in parts]


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model that it calls as one, by qualified name; a layer without its adapters'."""
    for name, module, container in candidates(model):
        if not container:
            # An adapter's layer comes and goes; the layer inside it stays.
            yield name, getattr(module, "base_layer", module)


def move_rest(model: nn.Module, moved: Sequence[nn.Module], device: torch.device) -> None:
    """Move a model to a device, but for modules that are there: a second move copies quantized tensors."""
    done = {id(part) for module in moved for part in module.modules()}
    for module in model.modules():
        if id(module) not in done:
            module._apply(lambda tensor: tensor.to(device), recurse=False)


def leave_files(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Give what stays whole memory of its own: one norm of a mapped file would keep all its pages there."""
    divided = {id(piece.tensor) for block in blocks for piece in block.pieces}
    for parameter in model.parameters():
        for tensor in plain(parameter):
            if id(tensor) not in divided:
                tensor.data = tensor.data.clone()


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a parameter is made of other tensors."""
    return hasattr(tensor, "__tensor_flatten__") and type(tensor) is not nn.Parameter


def plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with memory of their own that a parameter is made of: one, or those of a quantized one."""
    if is_quantized(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from plain(getattr(tensor, name))
    else:
        yield tensor


def _bytes(parameter: torch.Tensor) -> int:
    return sum(piece.numel() * piece.element_size() for piece in plain(parameter))


def _aligned(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
