"""shared.parallel.xdit on CPU ranks: exact methods equal plain diffusers, PipeFusion as far as it can."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest

from shared.parallel.xdit import XDiT
from shared.parallel.xdit_degrees import Degrees
from shared.parallel.xdit_pipefusion import XDiTPipeFusion
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


def pipefused(name: str, degrees: Case, warm_ups: list[int], calls: list[Case]) -> list[list[float]]:
    """On each rank: how close PipeFusion comes to the plain pipeline, by warm-up and call."""
    pipe = pipeline(name)
    whole = {"max_sequence_length": 256} if name == "sd3" else {}
    plain, text = [picture(pipe, name, **call, **whole) for call in calls], repr(pipe.transformer)
    state = {key: id(value) for key, value in pipe.transformer.state_dict(keep_vars=True).items()}
    found = []
    for warm_up in warm_ups:
        with XDiTPipeFusion(pipe, Degrees(**degrees), warm_up_steps=warm_up) as parallel:
            row = []
            for call, wanted in zip(calls, plain, strict=True):
                changes = {"steps": STEPS} | call
                known = {key: changes.pop(key) for key in ("steps", "seed", "size") if key in changes}
                arguments = tiny.call_args(name, **known) | changes
                if name == "sd3":
                    arguments["max_sequence_length"] = (
                        None  # 256 is what xfuser takes, and diffusers' default
                    )
                parallel.begin(arguments["num_inference_steps"])
                told: list[Any] = []
                made = parallel.run(arguments, lambda *step, told=told: told.append(step)).images
                assert [steps for _, steps in told] == [arguments["num_inference_steps"]] * len(told)
                assert len(told) == arguments["num_inference_steps"] and told[-1][0] is not None
                row.append(psnr(np.asarray(made), wanted))
            found.append(row)
        assert repr(pipe.transformer) == text
        assert {k: id(v) for k, v in pipe.transformer.state_dict(keep_vars=True).items()} == state
        assert np.array_equal(picture(pipe, name, **calls[0], **whole), plain[0])
    return found


PIPEFUSION_CALLS = [
    {"steps": 4},
    {"steps": 3, "height": 96, "width": 64, "prompt": "a"},
    {"steps": 5, "prompt": "two large blue dogs on a hill"},
    {"steps": 4, "height": 96},
]


@pytest.mark.parametrize("name", TYPES)
def test_pipefusion(pool: RankPool, name: str):
    tiny.checkpoint(name)
    for rank in pool.run(pipefused, 2, name, {"pipefusion": 2}, [99, 1], PIPEFUSION_CALLS):
        exact_ones, stale = rank
        print(name, rank)
        assert min(exact_ones) >= EXACT
        assert min(stale) >= 30
