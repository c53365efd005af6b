"""shared.parallel.chosen_steps: asynchronous steps by number and by measurement, alike on all ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from shared.parallel.asyncdiff import AsyncDiff
from shared.parallel.cfg_split import HybridSplit
from shared.parallel.chosen_steps import Pace, ranges, warm_up_of
from shared.parallel.distrifusion import DistriFusion
from shared.parallel.method import CombinedMethod, Method
from tests import tiny
from tests.pool import RankPool, once
from tests.seldom import seldom

STEPS = 8


@pytest.mark.parametrize(
    ("steps", "exact"), [(1, 1), (2, 1), (4, 1), (8, 1), (12, 2), (17, 2), (18, 3), (30, 3), (50, 3)]
)
def test_the_default_warm_up_is_a_share_of_the_steps(steps: int, exact: int) -> None:
    assert warm_up_of(steps) == exact
    pace = Pace()
    pace.begin(steps)
    assert [pace.asynchronous(step) for step in range(steps)] == [step >= exact for step in range(steps)]
    assert pace.told is None


def test_numbers_are_taken_as_they_are() -> None:
    pace = Pace(4, 2)
    for steps in (8, 5, 8):  # of one generation after the other
        pace.begin(steps)
        assert [pace.asynchronous(step) for step in range(steps)] == [step in (4, 5) for step in range(steps)]


@pytest.mark.parametrize("number", [0, -1])
def test_numbers_below_one_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"warm_up_steps must be 1 or more; got {number}"):
        Pace(number)
    with pytest.raises(ValueError, match=f"async_steps must be 1 or more; got {number}"):
        Pace(1, number)


def turned(degrees: float) -> torch.Tensor:
    """A prediction of norm 1; by a small angle another one differs by that many radians."""
    return torch.tensor([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], dtype=torch.float32)


def chosen(pace: Pace, changes: list[float], drifts: list[float] | None = None) -> str:
    """The steps of a generation whose predictions and differences change so much, as "." and "S"."""
    pace.begin(len(changes))
    at, apart, told = 0.0, 0.0, ""
    for step, change in enumerate(changes):
        late = pace.asynchronous(step)
        at += np.degrees(change)
        apart += 0.0 if drifts is None else drifts[step]
        difference = None if drifts is None or late else torch.tensor([apart, 0.0])
        pace.note(step, turned(at), difference)
        told += "S" if late else "."
    return told


def test_it_is_asynchronous_while_predictions_change_little_and_exact_when_not() -> None:
    changes = [0, 0.2, 0.1, 0.04, 0.02, 0.02, 0.02, 0.08, 0.1, 0.1, 0.08, 0.08]
    # What a step has measured is known two steps later; once it has begun, three times as much is little.
    assert chosen(Pace("auto", change=0.03), changes) == "......SSSS..S"[:12]
    assert chosen(Pace("auto", 2, change=0.03), changes) == "......SS...."
    assert chosen(Pace(8, "auto", change=0.03), changes) == "........SS.."
    assert chosen(Pace("auto", change=1.0), changes) == "...SSSSSSSSS"
    assert chosen(Pace("auto", change=0.0), changes) == "." * len(changes)


def test_the_branches_are_compared_again_before_they_have_drifted_apart() -> None:
    still = [0.0] * 14
    assert chosen(Pace("auto", drift=0.0101), still, [0.01] * 14) == "...S.S.S.S.S.."
    assert chosen(Pace("auto", drift=0.0201), still, [0.01] * 14) == "...SS.SS.SS.S."
    growing = [0.001] * 6 + [0.004] * 4 + [0.1] * 4
    assert chosen(Pace("auto", drift=0.0101), still, growing) == "...SSSSSSSSSS."
    assert chosen(Pace("auto", drift=0.0001), still, [0.01] * 14) == "." * 14


def test_what_was_measured_before_counts_for_one_generation() -> None:
    pace = Pace("auto", change=0.03)
    assert chosen(pace, [0.0] * 6) == "...SSS"
    assert pace.told == "3 of 6 steps were asynchronous: 4-6"
    assert chosen(pace, [1.0] * 4) == "...."
    assert pace.told == "0 of 4 steps were asynchronous"


@pytest.mark.parametrize("pace", [Pace(), Pace("auto"), Pace(12, "auto")])
def test_a_rehearsal_runs_every_kind_of_step_twice(pace: Pace) -> None:
    pace.rehearsing = True
    assert chosen(pace, [1.0] * 6, [1.0] * 6) == "..SSSS" and pace.rehearsed == 2


def test_ranges() -> None:
    assert ranges([]) == "" and ranges([3]) == "3" and ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"


def decided() -> list[str]:
    """On each rank: of predictions that change by another amount on each of them."""
    rank, made = dist.get_rank(), []
    for least in (0.005, 0.02):
        changes = [0.1, *(least * (rank + 1) for _ in range(7))]
        made.append(chosen(Pace("auto", change=0.03), changes))
    return made


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_decide_alike_by_the_one_that_changes_most(pool: RankPool, ranks: int) -> None:
    assert pool.run(decided, ranks) == [["...SSSSS", "........"]] * ranks


KINDS = {
    "hybrid": ("sd1", "sd2", "sdxl", "sd3", "svd", "ad"),
    "asyncdiff": ("sd1", "sd3"),
    "distrifusion": ("sd1",),
}


def automatic(kind: str, name: str, limit: float) -> Method:
    pipe = tiny.load(name)
    if kind == "distrifusion":
        made = DistriFusion(pipe, warm_up_steps="auto", split_batch=False, split_decode=False)
        made.pace.limits = limit, limit
        return made
    pace = Pace("auto", "auto", change=limit, drift=limit)
    if kind == "asyncdiff":
        return AsyncDiff(pipe, dist.get_world_size(), pace=pace)
    stages = AsyncDiff(pipe, 2, pace=pace, notes=False, leader=1)
    world, shared = dist.group.WORLD, stages.asynchronous
    split = HybridSplit([stages.denoiser], world, dist.get_rank(), shared, pace=pace)
    return CombinedMethod(stages, [split])


def pictures(kind: str, name: str) -> dict[str, Any]:
    """At limits that nothing meets and that everything does, one request after the other."""
    found: dict[str, Any] = {}
    requests: list[dict[str, Any]] = [{"steps": STEPS}, {"steps": 5, "size": 96}, {"steps": STEPS}]
    if name == "svd":
        requests[1].pop("size")
    plain = once(lambda: [tiny.run(tiny.load(name), name, **{"frames": 2} | request) for request in requests])
    for limit in (0.0, 1e9):
        with contextlib.closing(automatic(kind, name, limit)) as method:
            made, told = [], []
            for request in requests:
                method.begin(request["steps"])
                made.append(tiny.run(method.pipeline, name, **{"frames": 2} | request))
                told.append(method.choice)
        errors = [float(np.abs(a - b).max()) for a, b in zip(made, plain, strict=True)]
        found[str(bool(limit))] = {
            "errors": errors, "told": told, "bytes": made[1].tobytes(),
            "again": made[0].tobytes() == made[2].tobytes(),
        }  # fmt: skip
    return found


CELLS = [(kind, name, 2) for kind, names in KINDS.items() for name in names]
CELLS += [("asyncdiff", "sd1", 4), ("distrifusion", "sd1", 4)]
USUAL = [("distrifusion", "sd1", 2)]  # the hybrid, on a trained model: test_demo_training.py


@pytest.mark.parametrize(("kind", "name", "ranks"), seldom(CELLS, USUAL))
def test_chosen_steps_are_exact_where_nothing_is_slow_and_few_where_all_is(
    pool: RankPool, kind: str, name: str, ranks: int
) -> None:
    tiny.checkpoint(name)
    found = pool.run(pictures, ranks, kind, name)
    for exact, late in ((rank["False"], rank["True"]) for rank in found):
        assert max(exact["errors"]) < 1e-3
        assert exact["told"][0].startswith("0 of ")
        assert min(late["errors"]) > max(exact["errors"]) and late["again"]
        assert late["told"] == found[0]["True"]["told"]
        count, steps = map(int, late["told"][1].split()[:3:2])
        # PNDM calls the denoiser once more. Guidance that is shared ends with an exact step.
        assert steps in (5, 6) and count == steps - 3 - (kind == "hybrid")
    assert len({rank["True"]["bytes"] for rank in found}) == 1
