"""Lanes between host memory and a GPU: threads that copy and compute side by side, each on its own stream

One thread copies 4 to 8 GB/s out of mapped files, a fraction of what the bus of a GPU carries.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

Item = TypeVar("Item")

MOST = 6
"""Threads of a rank."""
CHUNK = 16 << 20
"""Bytes of pinned memory that a copy goes through, two for each thread: to pin more takes 0.3 s a GB."""


def side_by_side(act: Callable[[Item], None], items: Iterable[Item], device: torch.device) -> None:
    """Call `act` with each item; with a GPU, in several threads, which are done when this returns.

    Threads are in inference mode where the caller is, as what they write to may be made in it.

    Raises:
        the first error of a call; the others have ended then.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = min(MOST, cores)
    if device.type != "cuda" or threads < 2:
        for item in items:
            act(item)
        return
    current = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in range(threads)]
    inference = torch.is_inference_mode_enabled()

    def lane(stream: torch.cuda.Stream, mine: list[Item]) -> None:
        stream.wait_stream(current)
        with torch.inference_mode(inference), torch.no_grad(), torch.cuda.stream(stream):
            for item in mine:
                act(item)
        stream.synchronize()

    every = list(items)
    with ThreadPoolExecutor(threads) as pool:
        lanes = [pool.submit(lane, stream, every[i::threads]) for i, stream in enumerate(streams)]
    for done in lanes:
        done.result()


def move(model: nn.Module, device: torch.device) -> None:
    """As ``model.to(device)``, its plain weights in several threads."""
    found = {id(p): p for p in model.parameters() if type(p) is nn.Parameter}
    weights = [p for p in found.values() if p.device.type != device.type]
    # The largest first, so that no thread ends long after the others. Memory of this thread's stream.
    largest = sorted(weights, key=lambda weight: -weight.nbytes)
    into = {id(p): torch.empty_like(p.data, device=device) for p in largest}

    def one(weight: nn.Parameter) -> None:
        copy(into[id(weight)], weight.data)
        weight.data = into[id(weight)]

    side_by_side(one, largest, device)
    model.to(device)


def copy(into: torch.Tensor, source: torch.Tensor) -> None:
    """As ``into.copy_(source)`` of the same dtype; between host and GPU through pinned memory."""
    if into.device.type == source.device.type:
        into.copy_(source)
        return
    to, off = _bytes_in_order(into, source)
    if into.device.type == "cuda":
        _staging(into.device).send(to, off)
    else:
        _staging(source.device).fetch(to, off)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; the tensor itself where it is there."""
    if tensor.device.type == device.type:
        return tensor
    made = torch.empty_like(tensor, device=device)
    copy(made, tensor)
    return made


class Staging:
    """Memory between two others, in which one part of a tensor is written while the one before it is read.

    Args:
        device: the GPU; on a CPU the memory is not pinned and nothing is asynchronous.
        chunk: bytes of each of its two halves.
    """

    def __init__(self, device: torch.device, chunk: int = CHUNK) -> None:
        self._cuda, self._device = device.type == "cuda", device
        self._halves = [torch.empty(chunk, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        self._free = [torch.cuda.Event() for _ in range(2)] if self._cuda else []
        self._next = 0

    def send(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes of host memory to the device, on the current stream; the source may change after it."""
        for begin, half in self._parts(source):
            half.copy_(source[begin : begin + len(half)])
            into[begin : begin + len(half)].copy_(half, non_blocking=True)
            self._written()

    def fetch(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes of the device to host memory; they are there when this returns."""
        before: tuple[torch.Tensor, torch.Tensor] | None = None
        for begin, half in self._parts(source):
            half.copy_(source[begin : begin + len(half)], non_blocking=True)
            self._written()
            if before is not None:
                before[0].copy_(before[1])
            self._wait(1 - self._next)
            before = into[begin : begin + len(half)], half
        if before is not None:
            before[0].copy_(before[1])

    def _parts(self, source: torch.Tensor) -> Iterable[tuple[int, torch.Tensor]]:
        chunk = len(self._halves[0])
        for begin in range(0, len(source), chunk):
            self._wait(self._next)
            yield begin, self._halves[self._next][: min(chunk, len(source) - begin)]

    def _written(self) -> None:
        """What was asked for of the half at hand is the last of it; the other one's turn."""
        if self._cuda:
            self._free[self._next].record(torch.cuda.current_stream(self._device))
        self._next = 1 - self._next

    def _wait(self, half: int) -> None:
        if self._cuda:
            self._free[half].synchronize()


class _Kept(threading.local):
    """Of each thread."""

    def __init__(self) -> None:
        self.staging: dict[torch.device, Staging] = {}


_kept = _Kept()


def _staging(device: torch.device) -> Staging:
    if device not in _kept.staging:
        _kept.staging[device] = Staging(device)
    return _kept.staging[device]


def _bytes_in_order(into: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as flat bytes in one order: of tensors that lie in one piece as they are, of others a copy."""
    if not _in_one_piece(into):
        raise ValueError(f"a copy needs a target in one piece; got strides {into.stride()}")
    if into.stride() != source.stride():
        lies = torch.empty_strided(into.shape, into.stride(), dtype=source.dtype, device=source.device)
        source = lies.copy_(source)
    to, off = (t.as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (into, source))
    return to, off


def _in_one_piece(tensor: torch.Tensor) -> bool:
    """Whether its elements fill their memory, in any order of dimensions."""
    room = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != room:
            return False
        room *= size
    return True
