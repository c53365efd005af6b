"""A traced denoiser -> n stages of equal cost, as data.

Stages are contiguous segments of the units in *cyclic* order: the last stage ends with the output and may go
on with the head of the network (first convolution, first down blocks). In a UNet this nests the stages like
shells, so that the skip connections of the outer shell never leave their rank and the fresh sample reaches
the output through the shallow layers. Among the partitions that are as balanced as the largest unit allows,
the one with the fewest bytes between stages is taken.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from shared.parallel.asyncdiff.trace import SAMPLE, Trace

MAX_CANDIDATES = 50_000
FINALISTS = 32
HEAVIEST = 1.06
"""Largest share of the weights that a stage may hold, relative to an equal one, where that can be had."""
SPREAD = 0.15
"""Largest relative difference between the loads of two stages that counts as balanced."""


@dataclass(frozen=True)
class View:
    """What one stage computes, and what it takes from and gives to others, as ids of the trace."""

    replaced: frozenset[int]  # outermost calls of which every unit is another stage's: answered, not run
    needs: dict[int, int]  # values taken from other stages -> the stage that makes them
    gives: dict[int, tuple[int, ...]]  # values made here -> the stages that take them


@dataclass(frozen=True)
class Partition:
    """Units divided into stages.

    ``stages[s]`` are indices into ``trace.units`` in order of execution, ``loads[s]`` is the stage's FLOPs
    divided by its share of the weights (equal loads mean equal times), ``nbytes`` what crosses between stages
    in one step.
    """

    trace: Trace
    stages: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    loads: tuple[float, ...]
    views: tuple[View, ...]
    nbytes: int

    @property
    def spread(self) -> float:
        """(largest load - smallest load) / largest load."""
        return (max(self.loads) - min(self.loads)) / max(self.loads) if max(self.loads) else 0.0

    def names(self, stage: int) -> list[str]:
        """Qualified names of a stage's units."""
        return [self.trace.calls[self.trace.units[unit]].label for unit in self.stages[stage]]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: per stage its runs of units (first and last name), FLOPs, and bytes in and out."""
        flops, calls, values = self.trace.flops, self.trace.calls, self.trace.values
        total = sum(flops) or 1
        stages = []
        for units, view in zip(self.stages, self.views, strict=True):
            runs = [[units[0], units[0]]]
            for unit in units[1:]:
                if unit != runs[-1][1] + 1:
                    runs.append([unit, unit])
                runs[-1][1] = unit
            stages.append(
                {
                    "units": len(units),
                    "runs": [[calls[self.trace.units[u]].label for u in run] for run in runs],
                    "gflops": round(sum(flops[u] for u in units) / 1e9, 3),
                    "share": round(sum(flops[u] for u in units) / total, 4),
                    "bytes_in": sum(values[v].nbytes for v in view.needs),
                    "bytes_out": sum(values[v].nbytes * len(to) for v, to in view.gives.items()),
                }
            )
        return {"stages": stages, "spread": round(self.spread, 4), "bytes": self.nbytes}

    def __str__(self) -> str:
        lines = [
            f"stage {i}: {s['share']:.1%} of {sum(self.trace.flops) / 1e9:.4g} GFLOP, {s['units']} units, "
            + ", ".join(f"{a} .. {b}" if a != b else a for a, b in s["runs"])
            + f"; {s['bytes_in'] / 2**20:.3g} MiB in, {s['bytes_out'] / 2**20:.3g} MiB out"
            for i, s in enumerate(self.as_dict()["stages"])
        ]
        return "\n".join(lines)


def partition(
    trace: Trace,
    n: int,
    weights: Sequence[float] | None = None,
    costs: Sequence[float] | None = None,
    slack: float = 0.03,
    held: Sequence[int] | None = None,
    assignment: Sequence[int] | None = None,
) -> Partition:
    """Divide the units of a trace into ``n`` stages.

    Args:
        trace: what ``shared.parallel.asyncdiff.trace.trace`` gave.
        n: how many stages.
        weights: relative speed of each stage's device; weight 2 gets twice the cost. None: all equal.
        costs: cost of each unit in order of execution, for example measured seconds. None: FLOPs.
        slack: how far above the optimum the largest load may lie for the sake of fewer bytes.
        held: bytes of weights of each unit. Then no stage holds much more than its share of them, also where
            the loads are less equal for it. None: it makes no difference.
        assignment: the stage of each unit, where that is given.

    Raises:
        ValueError: n is not in 1 .. number of units, or the weights or costs do not fit.
    """
    m = len(trace.units)
    cost = [float(c) for c in (trace.flops if costs is None else costs)]
    if not 1 <= n <= m:
        raise ValueError(f"the number of stages must be 1 to {m}, the number of units; got {n}")
    if len(cost) != m or min(cost) < 0:
        raise ValueError(f"costs must hold {m} numbers of 0 or more, one for each unit; got {cost}")
    share = _shares(weights, n)
    if assignment is not None:
        return _partition(trace, np.array(assignment), cost, share)
    optimum = _optimum(cost, share)
    if held is None:
        starts = np.array(list(_starts(cost, share, optimum * (1 + slack))), dtype=np.int64)
    else:
        starts = _light(cost, share, optimum, slack, held)
    total = np.concatenate([[0.0], np.cumsum(cost)])
    ends = np.concatenate([starts[:, 1:], np.full((len(starts), 1), m)], axis=1)
    loads = total[ends] - total[starts]
    loads[:, -1] += total[starts[:, 0]]
    loads /= np.array(share)
    worst = loads.max(axis=1)
    spread = (worst - loads.min(axis=1)) / np.where(worst > 0, worst, 1)
    if (spread <= SPREAD).any():
        starts, worst = starts[spread <= SPREAD], worst[spread <= SPREAD]
    order = np.lexsort((worst, _estimated_bytes(trace, starts)))[:FINALISTS]
    finalists = []
    for rank, index in enumerate(order):
        stage_of = _assign(starts[index], m)
        views = resolve(trace, stage_of.tolist(), n)
        nbytes = sum(trace.values[v].nbytes for view in views for v in view.needs)
        finalists.append((nbytes, rank, stage_of, views))
    nbytes, _, stage_of, views = min(finalists, key=lambda f: f[:2])
    return _partition(trace, stage_of, cost, share, views)


def _partition(
    trace: Trace,
    assignment: np.ndarray,
    cost: list[float],
    share: list[float],
    views: list[View] | None = None,
) -> Partition:
    n = len(share)
    views = views or resolve(trace, assignment.tolist(), n)
    nbytes = sum(trace.values[v].nbytes for view in views for v in view.needs)
    stages = tuple(tuple(np.flatnonzero(assignment == s).tolist()) for s in range(n))
    stage_loads = tuple(sum(cost[u] for u in units) / share[s] for s, units in enumerate(stages))
    return Partition(trace, stages, tuple(share), stage_loads, tuple(views), nbytes)


def _light(
    cost: list[float], share: list[float], optimum: float, slack: float, held: Sequence[int]
) -> np.ndarray:
    """First units of the stages, of the most balanced segmentations in which no stage holds too much."""
    n, total = len(share), np.concatenate([[0], np.cumsum(held)])
    best: tuple[float, np.ndarray] | None = None
    for more in (slack, 0.06, 0.12, 0.25, 0.5, 1.0):
        starts = np.array(list(_starts(cost, share, optimum * (1 + more))), dtype=np.int64)
        ends = np.concatenate([starts[:, 1:], np.full((len(starts), 1), len(held))], axis=1)
        parts = total[ends] - total[starts]
        parts[:, -1] += total[starts[:, 0]]
        worst = (parts / np.array(share)).max(axis=1) * n / max(total[-1], 1)
        if best is None or worst.min() < best[0]:
            best = worst.min(), starts[worst <= max(worst.min(), HEAVIEST)]
        if best[0] <= HEAVIEST:
            break
    assert best is not None
    return best[1]


def _shares(weights: Sequence[float] | None, n: int) -> list[float]:
    if weights is None:
        return [1.0] * n
    if len(weights) != n or any(not w > 0 for w in weights):
        raise ValueError(f"stage weights must be {n} numbers above 0; got {list(weights)}")
    return [w * n / sum(weights) for w in weights]


def _optimum(cost: list[float], share: list[float]) -> float:
    """Smallest possible largest load over all cyclic segmentations, by bisection on it."""
    total = [0.0, *accumulate(cost)]
    m, n = len(cost), len(share)

    def fits(load: float) -> bool:
        for first in range(m - n + 1):
            cut = first
            for stage in range(n - 1):
                # As far as the load allows, but each later stage still gets a unit.
                reach = bisect_right(total, total[cut] + load * share[stage]) - 1
                cut = min(reach, m - n + stage + 1)
                if cut <= first + stage:
                    break
            else:
                if total[m] - total[cut] + total[first] <= load * share[-1]:
                    return True
        return False

    low, high = sum(cost) / sum(share), sum(cost) / min(share)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _starts(cost: list[float], share: list[float], limit: float) -> Iterator[tuple[int, ...]]:
    """First units of the stages, for the segmentations of which no load is above the limit."""
    total = [0.0, *accumulate(cost)]
    m, n = len(cost), len(share)
    left = [sum(share[stage:]) for stage in range(n)]
    limit *= 1 + 1e-9
    count = 0

    def extend(starts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        stage = len(starts) - 1
        begin, first = starts[-1], starts[0]
        if stage == n - 1:
            if total[m] - total[begin] + total[first] <= limit * share[-1]:
                yield starts
            return
        # The rest, and the head that the last stage takes, must fit into the later stages.
        low = bisect_left(total, total[m] + total[first] - limit * left[stage + 1])
        high = bisect_right(total, total[begin] + limit * share[stage]) - 1
        for cut in range(max(low, begin + 1), min(high, m - n + stage + 1) + 1):
            yield from extend((*starts, cut))

    for first in range(m - n + 1):
        if total[first] > limit * share[-1]:
            break
        for starts in extend((first,)):
            yield starts
            count += 1
            if count >= MAX_CANDIDATES:
                return


def _assign(starts: np.ndarray, m: int) -> np.ndarray:
    """Stage of every unit; units before the first start belong to the last stage."""
    return (np.searchsorted(starts, np.arange(m), side="right") - 1) % len(starts)


def _estimated_bytes(trace: Trace, starts: np.ndarray) -> np.ndarray:
    """Bytes between stages for each row of starts, as if every value came whole from its origin."""
    position = {call: unit for unit, call in enumerate(trace.units)}
    edges = sorted(
        (value, position[call])
        for call in trace.units
        for value in trace.calls[call].inputs
        if value != SAMPLE
    )
    if not edges:
        return np.zeros(len(starts), dtype=np.int64)
    used, first = np.unique([value for value, _ in edges], return_index=True)
    origins = np.array([position[trace.values[v].origin] for v in used])
    sizes = np.array([trace.values[v].nbytes for v in used], dtype=np.int64)
    consumers = np.array([unit for _, unit in edges])
    result = np.empty(len(starts), dtype=np.int64)
    for row, start in enumerate(starts):
        bits = 1 << _assign(start, len(trace.units))
        takers = np.bitwise_or.reduceat(bits[consumers], first) & ~bits[origins]
        result[row] = sum(int((sizes * ((takers >> s) & 1)).sum()) for s in range(starts.shape[1]))
    return result


def resolve(trace: Trace, assignment: Sequence[int], n: int) -> list[View]:
    """What each stage runs, takes and gives when unit ``u`` belongs to stage ``assignment[u]``.

    A value of a container that a stage runs itself, because some of its units are its own, is made there of
    what the container made it of; any other value of another stage is taken from the stage of its origin.
    """
    stage_of = dict(zip(trace.units, assignment, strict=True))
    members = [
        {stage_of[i] for i in (index, *call.inside) if i in stage_of}
        for index, call in enumerate(trace.calls)
    ]
    needs: list[dict[int, int]] = [{} for _ in range(n)]
    seen: set[tuple[int, int]] = set()

    def require(stage: int, value: int) -> None:
        if value == SAMPLE or (stage, value) in seen:
            return
        seen.add((stage, value))
        made = trace.values[value]
        if stage in members[made.call]:
            for source in made.sources:
                require(stage, source)
        else:
            owner = stage_of[made.origin]
            needs[stage][value] = owner
            require(owner, value)

    for index in trace.units:
        for value in trace.calls[index].inputs:
            require(stage_of[index], value)
    for leaf in trace.calls[0].outputs:
        if leaf.kind == "value":
            require(stage_of[trace.units[-1]], leaf.item)

    views = []
    for stage in range(n):
        inner: set[int] = set()
        replaced = set()
        for index, call in enumerate(trace.calls):
            if stage not in members[index] and index not in inner:
                replaced.add(index)
                inner.update(call.inside)
        gives = {
            value: tuple(s for s in range(n) if needs[s].get(value) == stage)
            for value in sorted({v for other in needs for v, owner in other.items() if owner == stage})
        }
        views.append(View(frozenset(replaced), dict(sorted(needs[stage].items())), gives))
    return views
