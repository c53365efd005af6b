"""Whether sharing a UNet gains: seconds of a request on several ranks against one, by the measured link.

Without torch. Numbers of a type are in shared.models.costs; those here hold for all of them. An estimate: it
speaks up only where ranks gain next to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.backends.xdit_cost import GAINS, Speeds
from shared.launch.flags import HostConfig
from shared.models.costs import StepCost

if TYPE_CHECKING:
    from shared.api.requests import GenerateRequest

log = logging.getLogger("host")

MEASURED = 790e12
"""Operations a second of a matrix product on the H200 that StepCost was measured on."""
GROWTH = 1.5
"""Power of the pixels with which a branch's seconds grow (SDXL from 1024 to 2048: 1.48, to 3840: 1.49)."""
COMPILED = 0.45
"""Share of the fixed seconds that is left with --compile_unet (SDXL: 9 of 20 ms)."""
UNEVEN = 0.08
"""Of a step, what a stage takes beside its equal share (SDXL: 0.58 of a step for two stages, SD 1: 0.62)."""


@dataclass(frozen=True)
class Work:
    """What is drawn: its size in pixels, its steps, and whether both guidance branches are computed."""

    size: tuple[int, int]
    steps: int
    guided: bool

    @classmethod
    def of_launch(cls, config: HostConfig) -> Work:
        """A request that leaves everything out."""
        return cls(config.size, config.spec.steps, config.spec.cfg > 1)


class StepSeconds:
    """Seconds of one step of a launch's UNet.

    Args:
        cost: the type's.
        config: the launch.
        link: between the ranks.
        work: its size.
    """

    def __init__(self, cost: StepCost, config: HostConfig, link: Speeds, work: Work) -> None:
        self._cost, self._link = cost, link
        spec = config.spec
        self._pixels = work.size[0] * work.size[1] / (spec.width * spec.height)
        self._fixed = cost.fixed * (COMPILED if config.compile_unet else 1.0)
        self._branch = cost.branch * self._pixels**GROWTH * MEASURED / link.flops

    def alone(self, branches: int) -> float:
        """On one rank."""
        return self._fixed + branches * self._branch

    def staged(self, branches: int, stages: int) -> float:
        """Asynchronous, in AsyncDiff's stages."""
        sent = self._cost.boundary * self._pixels * branches * (stages - 1) / self._link.bandwidth
        return self.alone(branches) * (1 / stages + UNEVEN) + sent

    def patched(self, branches: int, ranks: int, waits: bool, sent: float) -> float:
        """In patches on so many ranks.

        Args:
            waits: whether each exchange is waited for, else they are under way meanwhile.
            sent: bytes that are sent for each that keys and values have.
        """
        computed = self._fixed + branches * self._branch / ranks
        if ranks == 1:
            return computed
        received = self._cost.patches * self._pixels * branches * sent * (ranks - 1) / ranks
        arrives = received / self._link.bandwidth
        if waits:
            return computed + arrives + self._cost.exchanges * self._link.latency
        return max(computed, arrives)


@dataclass(frozen=True)
class Estimate:
    """Seconds of all steps of a request on all ranks, and on one of them."""

    together: float
    alone: float

    @property
    def gains(self) -> bool:
        """Whether the ranks are worth it."""
        return self.together <= GAINS * self.alone

    def __str__(self) -> str:
        return f"by an estimate {self.together / self.alone:.3g} times one rank's time"


def told(reason: str, estimate: Estimate | None = None) -> str:
    """In words, that ranks gain nothing, and why."""
    numbers = "" if estimate is None else f" ({estimate})"
    return f"this takes about as long as on one rank, or longer: {reason}{numbers}"


def advise_at_start(advise: Callable[[Work], str | None], config: HostConfig, rank: int) -> None:
    """Log once what is known of requests that leave everything out."""
    work = Work.of_launch(config)
    if rank == 0 and (text := advise(work)) is not None:
        width, height = work.size
        log.warning("at %dx%d pixels and %d steps, %s", width, height, work.steps, text)


def advise_requests(
    advise: Callable[[Work], str | None], config: HostConfig
) -> Callable[[GenerateRequest, int], str | None]:
    """What a request of so many steps is told that makes slow what is not so at start."""
    known = advise(Work.of_launch(config)) is not None

    def text(request: GenerateRequest, steps: int) -> str | None:
        size = request.width or config.size[0], request.height or config.size[1]
        return None if known else advise(Work(size, steps, (request.cfg or 0.0) > 1))

    return text
