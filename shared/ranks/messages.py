"""What the ranks send each other: rank 0's messages, votes at step boundaries, outcomes. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from shared.api.faults import FieldProblem
from shared.api.operations import Operation
from shared.api.requests import GenerateRequest

# Called by an engine after denoising step `step` of `steps`; raises StoppedError on all ranks alike.
OnStep = Callable[[int, int], None]


class Verdict(IntEnum):
    """What a rank votes at a step boundary; the highest vote counts for all."""

    GO_ON = 0
    FINISHED = 1
    CANCELLED = 2
    TIMED_OUT = 3
    FAILED = 4


@dataclass(frozen=True)
class Generate:
    """Rank 0 to all: make these pictures. Images and tensors inside the request are encoded bytes."""

    job_id: str
    request: GenerateRequest
    pictures: int = 1  # of all replicas; their seeds follow the request's
    each: int = 1  # pictures of one replica; the last of them may have none that counts
    together: bool = True  # whether a replica may draw its pictures in one call of the pipeline
    starts: tuple[bytes, ...] = ()  # what each picture starts from, in place of its latent or image


@dataclass(frozen=True)
class Call:
    """Rank 0 to all: do this between two generations."""

    job_id: str
    operation: Operation


@dataclass(frozen=True)
class Ping:
    """Rank 0 to all, while idle, to detect a rank that died."""


@dataclass(frozen=True)
class Stop:
    """Rank 0 to all: leave the loop."""


Message = Generate | Call | Ping | Stop


@dataclass
class Outcome:
    """The result of a message on one rank."""

    rank: int
    verdict: Verdict
    error: str = ""
    status: int = 500  # HTTP status of the error; 500 is the host's fault, the others the request's
    problems: list[FieldProblem] = field(default_factory=list)  # the request's faults, by field
    in_sync: bool = True  # the compute group still works
    result: Any = None
    warnings: list[str] = field(default_factory=list)  # of this rank, for the client
    device: dict[str, Any] | None = None
    out_of_memory: bool = False  # what failed here


class BrokenJobError(RuntimeError):
    """The ranks cannot continue: one died or hangs, or a collective failed."""


class StoppedError(RuntimeError):
    """Ends the generation; raised at a step boundary on all ranks."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        super().__init__(verdict.name.lower())
