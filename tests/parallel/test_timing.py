"""shared.parallel.asyncdiff.timing: units that take long weigh much, on all ranks alike."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from shared.parallel.asyncdiff import AsyncDiff
from shared.parallel.surgery import Surgery
from tests import tiny
from tests.pool import RankPool

pytestmark = pytest.mark.alone

SLOW = "up_blocks.1.resnets.0"


def stages_of(measured: bool) -> tuple[list[list[str]], bool]:
    pipe = tiny.load("sd1")
    slow = Surgery()

    def sleepy(original: Any, args: tuple, kwargs: dict) -> Any:
        time.sleep(0.05)  # much to the others, but not so much that they no longer count
        return original(*args, **kwargs)

    slow.override(pipe.unet.get_submodule(SLOW), sleepy)
    with AsyncDiff(pipe, 2, warm_up_steps=1, measure_units=measured) as parallel:
        parallel.begin(3)
        picture = tiny.run(pipe, "sd1", steps=3)
        assert parallel.partition is not None
        return [parallel.partition.names(stage) for stage in (0, 1)], bool(
            torch.isfinite(torch.as_tensor(picture)).all()
        )


def test_a_slow_unit_gets_a_stage_to_itself(pool: RankPool) -> None:
    by_time = pool.run(stages_of, 2, True)
    assert by_time[0] == by_time[1], "the ranks cut differently"
    stages, finite = by_time[0]
    assert finite
    alone = next(stage for stage in stages if SLOW in stage)
    by_flops = next(stage for stage in pool.run(stages_of, 2, False)[0][0] if SLOW in stage)
    assert len(alone) < len(by_flops) / 2
