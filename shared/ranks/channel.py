"""The channel between ranks: typed control messages, votes and outcomes."""

from __future__ import annotations

import logging
import pickle
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from shared.launch.errors import first_line
from shared.ranks.groups import World
from shared.ranks.messages import BrokenJobError, Message, Outcome, Verdict

log = logging.getLogger("host")

FRAME = 4096  # bytes that a message travels in when they suffice, so that it takes one collective
LENGTH = 8  # bytes at its start that hold its length
WORKS_SECONDS = 60.0  # that a failed request's collectives may still take on the other ranks


@dataclass(frozen=True)
class _Separate:
    """Stands for a result that is sent separately."""

    size: int  # bytes


class Channel:
    """Typed control messages, votes and outcomes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._ballot = torch.zeros(1, dtype=torch.int64)

    def gather_infos(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """Wait, without limit, until every rank is loaded; returns the info of each."""
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
            BrokenJobError: a rank is gone, or was too late.
        """
        if self.world.size == 1:
            return verdict
        self._ballot[0] = int(verdict)
        try:
            dist.all_reduce(self._ballot, op=dist.ReduceOp.MAX, group=self.world.voting)
        except RuntimeError as error:
            raise BrokenJobError(f"a rank did not reach the step boundary: {first_line(error)}") from error
        return Verdict(int(self._ballot[0]))

    def gather_outcomes(self, outcome: Outcome) -> list[Outcome]:
        """Gather every rank's outcome on every rank; large results, and rank 0's, on rank 0 only.

        Raises:
            BrokenJobError: a rank is gone, or was too late.
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
        """After a failure: whether a collective over the compute group still works."""
        if self.world.size == 1:
            return True
        ones = torch.ones(1, device=self.world.device)
        try:
            work = dist.all_reduce(ones, group=self.world.compute, async_op=True)
            # Behind a collective that another rank never joined, NCCL would end the process before long.
            end = time.monotonic() + WORKS_SECONDS
            while not work.is_completed():
                if time.monotonic() > end:
                    log.error("the compute group no longer works: ranks wait for one that failed")
                    return False
                time.sleep(0.005)
            work.wait()
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
