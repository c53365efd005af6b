"""Ranks talking to each other: process groups, and the channel of control messages.

Three groups, never mixed. **control** and **voting** are gloo on every machine: idle ranks wait for a message
on the control group, on the CPU, without a spinning kernel, for as long as it takes; while a message is
carried out they agree on the voting group, in bounded time. **compute** is NCCL on GPUs or gloo on CPUs, in
bounded time too, and belongs to the parallel methods alone.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from shared.config import UsageError, first_line
from shared.memory import memory_report
from shared.rendezvous import Rendezvous
from shared.requests import FieldProblem, GenerateRequest

log = logging.getLogger("host")

FOREVER = timedelta(days=365)
VOTE_GRACE = 5.0  # seconds
FRAME = 4096  # bytes that a message travels in when they suffice, so that it takes one collective
LENGTH = 8  # of them tell how long it is

# Called by an engine after denoising step `step` of `steps`; raises StoppedError on all ranks alike.
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class World:
    """This rank's place among the others.

    Raises nothing by itself; `init_world` builds it. `device` is the one device that this rank computes on.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup
    voting: dist.ProcessGroup
    compute: dist.ProcessGroup

    @property
    def backend(self) -> str:
        """nccl or gloo, what the compute group runs on."""
        return dist.get_backend(self.compute)


def init_world(
    device: str,
    collective_timeout: float,
    watch: Callable[[Callable[[], str | None]], None] = lambda _: None,
    when_stopped: Callable[[Callable[[], None]], None] = lambda _: None,
) -> World:
    """Join the process group that torchrun's environment describes; alone without torchrun.

    Args:
        device: auto, cuda or cpu. auto takes CUDA when every rank of every machine has a GPU of its own.
        collective_timeout: seconds that the compute group waits for a rank.
        watch: takes what says why the ranks have lost each other, to be asked now and then.
        when_stopped: takes what tells other machines, to be called when this rank is told to stop.

    Raises:
        UsageError: cuda was asked for and a rank has no GPU of its own.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not dist.is_initialized():
        if "MASTER_ADDR" in os.environ:
            meeting = Rendezvous(rank, size, collective_timeout)
            watch(meeting.fault)
            when_stopped(meeting.stop_others)
            within = timedelta(seconds=meeting.timeout)
            dist.init_process_group("gloo", store=meeting.join(), rank=rank, world_size=size, timeout=within)
        else:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    have: list[Any] = [None] * size
    dist.all_gather_object(have, gpus >= local_size)
    if device == "cuda" and not all(have):
        lacking = [r for r, ok in enumerate(have) if not ok]
        raise UsageError(
            f"--device: cuda needs a GPU for every rank; rank {lacking[0]} sees {gpus} GPUs for "
            f"{local_size} ranks on its machine"
        )
    use_cuda = device != "cpu" and all(have)
    if use_cuda:
        torch.cuda.set_device(local_rank)
        where = torch.device("cuda", local_rank)
    else:
        where = torch.device("cpu")
    groups = make_groups(collective_timeout, "nccl" if use_cuda else "gloo")
    if device == "auto" and not use_cuda and rank == 0:
        log.info("computing on the CPU (gloo): not every rank has a GPU of its own")
    return World(rank, size, local_rank, where, *groups)


def make_groups(
    collective_timeout: float, backend: str
) -> tuple[dist.ProcessGroup, dist.ProcessGroup, dist.ProcessGroup]:
    """The control, voting and compute groups over all ranks; `backend` is the compute group's."""
    control = dist.new_group(backend="gloo", timeout=FOREVER)
    # A vote outlasts a collective, so that a rank in a collective that fails still finds the others voting.
    voting = dist.new_group(backend="gloo", timeout=timedelta(seconds=collective_timeout + VOTE_GRACE))
    compute = dist.new_group(backend=backend, timeout=timedelta(seconds=collective_timeout))
    return control, voting, compute


@functools.cache
def branch_groups(
    world: World, collective_timeout: float
) -> tuple[dist.ProcessGroup, dist.ProcessGroup, int]:
    """The ranks in two halves, one for each guidance branch.

    Returns:
        the group of this rank's half, the group of the two ranks in the same place of both halves (branch 0
        first), and this rank's branch. Made once; all ranks must ask at the same time.
    """
    half = world.size // 2
    short = timedelta(seconds=collective_timeout)

    def group(ranks: list[int]) -> dist.ProcessGroup:
        return dist.new_group(ranks, backend=world.backend, timeout=short)

    halves = [group(list(range(b * half, (b + 1) * half))) for b in (0, 1)]
    pairs = [group([place, place + half]) for place in range(half)]
    branch, place = divmod(world.rank, half)
    return halves[branch], pairs[place], branch


def measured_speeds(world: World, group: dist.ProcessGroup, size: int = 2048) -> list[float]:
    """How fast each rank of the group multiplies matrices [size, size], relative to the fastest."""
    dtype = torch.float32 if world.device.type == "cpu" else torch.bfloat16
    a = torch.randn(size, size, device=world.device, dtype=dtype)

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(3):
            a @ a
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    mine = 1 / min(seconds() for _ in range(4))
    speeds = [torch.zeros(1, device=world.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(speeds, torch.tensor([mine], device=world.device), group=group)
    fastest = max(float(speed) for speed in speeds)
    return [round(float(speed) / fastest, 2) for speed in speeds]


class Verdict(IntEnum):
    """What a rank votes at a step boundary; the highest vote counts for all."""

    GO_ON = 0
    FINISHED = 1
    CANCELLED = 2
    TIMED_OUT = 3
    FAILED = 4


@dataclass(frozen=True)
class Generate:
    """Rank 0 to all: make this picture. Images and tensors inside the request are encoded bytes."""

    job_id: str
    request: GenerateRequest
    pictures: int = 1  # ranks that work on another picture than the first take the seeds after this one
    latents: tuple[bytes, ...] = ()  # what each picture starts from, in place of the request's


@dataclass(frozen=True)
class Call:
    """Rank 0 to all: call a method of the engine, between two generations (adding a LoRA, say)."""

    job_id: str
    method: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Ping:
    """Rank 0 to all, while idle: a rank that died is noticed."""


@dataclass(frozen=True)
class Stop:
    """Rank 0 to all: leave the loop."""


Message = Generate | Call | Ping | Stop


@dataclass
class Outcome:
    """What one rank has to say when a message was carried out."""

    rank: int
    verdict: Verdict
    error: str = ""
    status: int = 500  # HTTP status of the error; 500 is the host's fault, the others the request's
    problems: list[FieldProblem] = field(default_factory=list)  # the request's faults, by field
    in_sync: bool = True  # the compute group still works
    result: Any = None
    warnings: list[str] = field(default_factory=list)  # of this rank, for the client
    device: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Separate:
    """In place of a result that is sent by itself."""

    size: int  # bytes


class BrokenJobError(RuntimeError):
    """The ranks cannot go on together: one died or hangs, or a collective failed."""


class StoppedError(RuntimeError):
    """Raised at a step boundary on all ranks alike: the generation ends here."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        super().__init__(verdict.name.lower())


class Channel:
    """Typed control messages, votes and outcomes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._ballot = torch.zeros(1, dtype=torch.int64)

    def introduce(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """Wait, without limit, until every rank is loaded; what each says of itself."""
        infos: list[Any] = [info] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(infos, info, group=self.world.control)
        return infos

    def publish(self, message: Message | None) -> Message:
        """Rank 0 gives the message, the others None; all return it. Workers wait without limit.

        Raises:
            BrokenJobError: a rank is gone.
        """
        if self.world.size == 1:
            assert message is not None
            return message
        data = pickle.dumps(message) if self.world.rank == 0 else b""
        frame = _framed(data)
        try:
            dist.broadcast(frame, group_src=0, group=self.world.control)
            if (size := _length(frame)) > FRAME - LENGTH:
                frame = _padded(data, LENGTH + size)
                dist.broadcast(frame, group_src=0, group=self.world.control)
        except RuntimeError as error:
            raise BrokenJobError(f"a rank is gone: {first_line(error)}") from error
        received: Message = pickle.loads(_content(frame, size))
        return received

    def vote(self, verdict: Verdict) -> Verdict:
        """Agree with all ranks at a step boundary, once a step; returns the highest verdict.

        Raises:
            BrokenJobError: a rank is gone, or did not come in time.
        """
        if self.world.size == 1:
            return verdict
        self._ballot[0] = int(verdict)
        try:
            dist.all_reduce(self._ballot, op=dist.ReduceOp.MAX, group=self.world.voting)
        except RuntimeError as error:
            raise BrokenJobError(f"a rank did not come to the step boundary: {first_line(error)}") from error
        return Verdict(int(self._ballot[0]))

    def settle(self, outcome: Outcome) -> list[Outcome]:
        """Gather every rank's outcome on every rank; results not small, and rank 0's, on rank 0 alone.

        Raises:
            BrokenJobError: a rank is gone, or did not come in time.
        """
        if self.world.size == 1:
            return [outcome]
        stays = self.world.rank == 0 and outcome.result is not None
        payload = b"" if self.world.rank == 0 else pickle.dumps(outcome.result)
        travels = len(payload) > FRAME - LENGTH
        sent = replace(outcome, result=_Separate(len(payload))) if stays or travels else outcome
        data = pickle.dumps(sent)
        frames = [_framed(b"") for _ in range(self.world.size)]
        try:
            dist.all_gather(frames, _framed(data), group=self.world.voting)
            sizes = [_length(frame) for frame in frames]
            if max(sizes) > FRAME - LENGTH:
                frames = [_padded(b"", LENGTH + max(sizes)) for _ in sizes]
                dist.all_gather(frames, _padded(data, LENGTH + max(sizes)), group=self.world.voting)
            outcomes: list[Outcome] = [
                pickle.loads(_content(f, size)) for f, size in zip(frames, sizes, strict=True)
            ]
            for other in outcomes:
                if not isinstance(other.result, _Separate):
                    continue
                size, other.result = other.result.size, None
                if other.rank == self.world.rank:
                    other.result = outcome.result
                elif self.world.rank == 0:
                    buffer = torch.empty(size, dtype=torch.uint8)
                    dist.recv(buffer, group=self.world.voting, group_src=other.rank)
                    other.result = pickle.loads(buffer.numpy().tobytes())
            if travels:
                parcel = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
                dist.send(parcel, group=self.world.voting, group_dst=0)
        except RuntimeError as error:
            raise BrokenJobError(f"a rank is gone: {first_line(error)}") from error
        return outcomes

    def compute_works(self) -> bool:
        """After a failure: whether a collective over the compute group still comes out right."""
        if self.world.size == 1:
            return True
        ones = torch.ones(1, device=self.world.device)
        try:
            dist.all_reduce(ones, group=self.world.compute)
        except RuntimeError as error:
            log.error("the compute group no longer works: %s", first_line(error))
            return False
        return int(ones.item()) == self.world.size


def _framed(data: bytes) -> torch.Tensor:
    """The length of `data` and as much of it as FRAME bytes hold, uint8 [FRAME]."""
    return _padded(data[: FRAME - LENGTH], FRAME, len(data))


def _padded(data: bytes, size: int, length: int = 0) -> torch.Tensor:
    """`length`, then `data`, then zeros: uint8 [size]."""
    text = length.to_bytes(LENGTH, "little") + data
    return torch.frombuffer(bytearray(text.ljust(size, b"\0")), dtype=torch.uint8)


def _length(frame: torch.Tensor) -> int:
    return int.from_bytes(frame[:LENGTH].numpy().tobytes(), "little")


def _content(frame: torch.Tensor, size: int) -> bytes:
    return bytes(frame[LENGTH : LENGTH + size].numpy().tobytes())


def rank_device_info(world: World) -> dict[str, Any]:
    """Device and memory of this rank, for /health: memory in MiB."""
    info: dict[str, Any] = {"rank": world.rank, "device": str(world.device)}
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        info |= {
            "name": torch.cuda.get_device_name(world.device),
            "memory_used_mib": (total - free) >> 20,
            "memory_total_mib": total >> 20,
            "memory_peak_mib": torch.cuda.max_memory_allocated(world.device) >> 20,
        }
    else:
        info["memory_used_mib"] = memory_report(world.device)["allocated"] >> 20
    return info
