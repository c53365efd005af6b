"""Which steps of a generation are asynchronous: by number, or by how fast its predictions change.

Found at run time after the idea of Hybridiff (arXiv 2602.21760): it pipelines the guidance branches once the
slope of their relative difference is small, for a given number of steps. Here no step is asynchronous that is
expected to err by more than a limit, and an exact step in between starts the count anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from shared.parallel.exchange import Ranks

WARM_UP = 3
"""Exact steps at the start where nothing is said, of a generation of 18 steps or more."""
CHANGE = 0.022
"""Default limit: how much a prediction differs from the one of the step before, relative to its norm, when
the first asynchronous step may come."""
LATER = 3
"""Later errors matter less: from then on it may differ so many times as much."""
DRIFT = 0.02
"""Default limit: how far the guidance branches' difference may have moved since the last exact step, relative
to the norm of the prediction with the prompt."""
FLOW_DRIFT = 0.08
"""The same where flow is predicted: its branches differ four times as much, and most steps are smaller."""


def warm_up_of(steps: int) -> int:
    """Exact steps at the start of a generation of so many, where nothing is said: a sixth, 1 to `WARM_UP`."""
    return max(1, min(WARM_UP, steps // 6))


@dataclass
class _Measured:
    """What was measured after a step, on its way to the host."""

    step: int
    values: torch.Tensor
    event: torch.cuda.Event | None

    def read(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


class Pace:
    """Says of each step of a generation, counted from 0, whether it is asynchronous; the same on all ranks.

    A decision uses what was measured up to the step before the last: the host, which runs a step ahead of a
    GPU, then waits for nothing.

    Args:
        warm_up_steps: exact steps at the start; None for `warm_up_of`; "auto": asynchronous as soon as
            predictions change little, and exact whenever they do not.
        async_steps: how many asynchronous steps there are at most; None for all after the warm-up; "auto":
            after the warm-up, as with `warm_up_steps`.
        group: the ranks that decide together; None for all.
        least: exact steps that there must be.
        change, drift: the limits of automatic decisions; see `CHANGE`, `DRIFT` and `FLOW_DRIFT`.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self,
        warm_up_steps: int | str | None = None,
        async_steps: int | str | None = None,
        group: dist.ProcessGroup | None = None,
        change: float = CHANGE,
        drift: float = DRIFT,
        least: int = 1,
    ) -> None:
        for name, given, bound in (("warm_up_steps", warm_up_steps, least), ("async_steps", async_steps, 1)):
            if given not in (None, "auto") and not (isinstance(given, int) and given >= bound):
                raise ValueError(f"{name} must be {bound} or more; got {given}")
        self.warm_up_steps, self.async_steps = warm_up_steps, async_steps
        self.measures = "auto" in (warm_up_steps, async_steps)
        """Whether anything must be noted."""
        self.limits = change, drift
        self.rehearsing = False
        """Whether generations go through every kind of step soon, where the numbers do not say when."""
        self._open = self.measures or warm_up_steps is None
        self._group, self._steps = group, 0
        self.chosen: list[bool] = []
        """Of each step so far, whether it is asynchronous."""
        self._measured: list[_Measured] = []
        self._last: torch.Tensor | None = None
        self._difference: tuple[int, torch.Tensor] | None = None

    def begin(self, steps: int) -> None:
        """A generation of so many steps starts."""
        self._steps, self.chosen, self._measured = steps, [], []
        self._last = self._difference = None

    @property
    def exact_steps(self) -> int:
        """The first steps that are exact in any case."""
        if self.rehearsing and self._open:
            return 2  # the second call is captured
        if self.warm_up_steps == "auto":
            return 1
        return warm_up_of(self._steps) if self.warm_up_steps is None else int(self.warm_up_steps)

    @property
    def rehearsed(self) -> int:
        """Steps of a rehearsal that are exact."""
        return 2 if self._open else int(self.warm_up_steps or 0)

    def asynchronous(self, step: int) -> bool:
        """Whether a step is asynchronous. Asked in order, any number of times."""
        while len(self.chosen) <= step:
            self.chosen.append(self._decide(len(self.chosen)))
        return self.chosen[step]

    def note(self, step: int, prediction: torch.Tensor, difference: torch.Tensor | None = None) -> None:
        """What a step made, on all ranks in the same steps.

        Args:
            prediction: of the denoiser, with the prompt where there is guidance.
            difference: of the two guidance branches, in steps that compute both.
        """
        if not self.measures:
            return
        size = torch.linalg.vector_norm(prediction, dtype=torch.float32)
        values = [size.new_full((), -1.0)] * 2
        if self._last is not None and self._last.shape == prediction.shape:
            values[0] = torch.linalg.vector_norm(prediction - self._last, dtype=torch.float32) / size
        if difference is not None:
            if self._difference is not None and self._difference[1].shape == difference.shape:
                before, old = self._difference
                moved = torch.linalg.vector_norm(difference - old, dtype=torch.float32) / size
                values[1] = moved / (step - before)
            self._difference = step, difference
        self._last = prediction
        both = torch.stack(values)
        if Ranks.of(self._group).size > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        self._measured.append(self._sent(step, both))

    @property
    def told(self) -> str | None:
        """Which steps of the last generation were asynchronous, counted from 1, if they were chosen."""
        if not self.measures or not self.chosen:
            return None
        late = [step + 1 for step, chosen in enumerate(self.chosen) if chosen]
        count = f"{len(late)} of {len(self.chosen)} steps were asynchronous"
        return f"{count}: {ranges(late)}" if late else count

    def _decide(self, step: int) -> bool:
        if step < self.exact_steps:
            return False
        if self.rehearsing and self._open:
            return True
        if isinstance(self.async_steps, int) and sum(self.chosen) >= self.async_steps:
            return False
        return not self.measures or self._is_slow(step)

    def _is_slow(self, step: int) -> bool:
        """Whether what is known by now promises a small error in this step."""
        known = [(m.step, *m.read()) for m in self._measured if m.step < step - 1]
        changes = [change for _, change, _ in known if change >= 0]
        drifts = [drift for *_, drift in known if drift >= 0]
        limit = self.limits[0] * (LATER if True in self.chosen else 1)
        if not changes or not changes[-1] <= limit:
            return False
        if self._difference is None:
            return True
        if step == self._steps - 1:
            return False  # no step after it makes its error smaller, which is the largest on the demo
        exact = max(i for i, late in enumerate(self.chosen) if not late)
        return bool(drifts) and drifts[-1] * (step - exact) <= self.limits[1]

    @staticmethod
    def _sent(step: int, values: torch.Tensor) -> _Measured:
        if not values.is_cuda:
            return _Measured(step, values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _Measured(step, host, event)


def ranges(numbers: list[int]) -> str:
    """Ascending whole numbers as ranges: [8, 9, 11] is "8-9, 11"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
