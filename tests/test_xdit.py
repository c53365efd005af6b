"""shared.parallel.xdit on CPU ranks: exact methods equal plain diffusers, PipeFusion as far as it can."""

from __future__ import annotations

import functools
import json
from typing import Any

import diffusers
import numpy as np
import pytest

from shared.parallel.xdit import XDiT
from shared.parallel.xdit_degrees import Degrees
from tests import tiny
from tests.ranks import RankPool

STEPS = 2
EXACT = 80.0
"""dB in fp32 that count as equal to the plain pipeline; most reach 120 and more."""
TYPES = ("flux", "hy", "pixa", "pixs", "sd3")

Case = dict[str, Any]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures in 0..1, in dB; 200 when equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 200.0 if error == 0 else float(-10 * np.log10(error))


@functools.cache
def pipeline(name: str) -> Any:
    return tiny.load(name)


def picture(pipe: Any, name: str, parallel: Any = None, **changes: Any) -> np.ndarray:
    changes = {"steps": STEPS} | changes
    if parallel is not None:
        parallel.begin(changes["steps"])
    return tiny.run(pipe, name, **changes)


def exact(name: str, cases: list[Case], sizes: list[Case]) -> list[list[float]]:
    """On each rank: how close each case comes to the plain pipeline, for each of the calls in `sizes`."""
    pipe = pipeline(name)
    plain, text = [picture(pipe, name, **size) for size in sizes], repr(pipe.transformer)
    found = []
    for case in cases:
        with XDiT(pipe, Degrees(**case)) as parallel:
            assert json.dumps(parallel.plan)
            assert repr(pipe.transformer) == text
            made = [picture(pipe, name, parallel, **size) for size in sizes]
            found.append([psnr(a, b) for a, b in zip(made, plain, strict=True)])
        assert not any("forward" in m.__dict__ for m in pipe.transformer.modules())
        assert np.array_equal(picture(pipe, name, **sizes[0]), plain[0])
    return found


CASES_2 = [{"ulysses": 2}, {"ring": 2}]
# 104 x 72 pixels make 13 x 9 latents, which no model takes; 80 x 48 make 5 x 3 tokens: one is left over.
SIZES = [{}, {"height": 80, "width": 48, "steps": 3}]


@pytest.mark.parametrize("name", TYPES)
def test_two_ranks_equal_the_plain_pipeline(pool: RankPool, name: str):
    tiny.checkpoint(name)
    more = [{"tensor": 2}] if name == "flux" else [{"cfg": 2}]
    for rank in pool.run(exact, 2, name, CASES_2 + more, SIZES):
        assert min(min(row) for row in rank) >= EXACT, rank
