"""shared.parallel.asyncdiff on CPU ranks: exact where it must be, and in steady state the paper's schedule."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from shared.parallel.asyncdiff import AsyncDiff
from shared.parallel.partition import Partition
from tests import tiny
from tests.ranks import RankPool

TYPES = ("sd1", "sdxl", "sd2", "sd3", "sdup", "svd", "ad")
PLANS = {2: ((2, 1),), 3: ((3, 1), (2, 2)), 4: ((4, 1), (3, 2)), 5: ((4, 2),)}
"""World size -> the (model_n, stride) that take so many ranks."""
STEPS = 7
FLOOR = 20.0
"""dB that a steady-state picture of a tiny random checkpoint (warm-up 3 of 7 steps) keeps at least."""


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures in 0..1, in dB; 200 when equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 200.0 if error == 0 else float(-10 * np.log10(error))


@functools.cache
def pipeline(name: str) -> Any:
    return tiny.load(name)


def denoiser(pipe: Any) -> torch.nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def picture(name: str, parallel: AsyncDiff | None = None, **changes: Any) -> np.ndarray:
    changes = {"steps": STEPS} | changes
    if parallel is not None:
        parallel.begin(changes["steps"])
    return tiny.run(pipeline(name), name, **changes)


def simulated(pipe: Any, plan: Partition, stride: int, warm_up: int, shift: bool) -> Callable[..., Any]:
    """A denoiser forward that plays the ranks one after the other, with forward hooks and nothing else.

    What belongs to another stage is computed and thrown away: a unit, or a module that returns one tensor,
    none of whose units is the stage's, gives what the stage of its last unit made of it one batch before.
    """
    module, n = denoiser(pipe), len(plan.stages)
    names = [plan.trace.calls[i].name for i in plan.trace.units]
    stage_of = {names[u]: s for s, units in enumerate(plan.stages) for u in units}
    inside = {
        name: [unit for unit in names if unit == name or unit.startswith(name + ".")]
        for name, _ in module.named_modules()
        if name
    }
    inside = {name: units for name, units in inside.items() if units}
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    state = SimpleNamespace(stage=None, calls=0, next=None)

    def hook(name: str) -> Callable[..., Any]:
        stages = {stage_of[unit] for unit in inside[name]}
        owner = stage_of[inside[name][-1]]

        def replace(_: Any, args: Any, output: Any) -> Any:
            if name not in stage_of and sum(isinstance(x, torch.Tensor) for x in tree_leaves(output)) > 1:
                return None
            if state.stage is not None and state.stage not in stages:
                return old[name]
            if state.stage is None or state.stage == owner:
                new[name] = output
            return None

        return replace

    for name, part in module.named_modules():
        if name in inside:
            part.register_forward_hook(hook(name))
    original = module.forward

    signature = inspect.signature(original)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        timestep = given["timestep"]
        step, times = state.calls, pipe.scheduler.timesteps
        state.calls += 1

        def run(stage: int | None, position: int) -> Any:
            state.stage = stage
            time = timestep if stage is None else times[position - shift].to(timestep).expand(timestep.shape)
            return original(**(given | {"timestep": time}))

        if step < warm_up:
            out = run(None, step)
            old.update(new)
            return out
        if (step - warm_up) % stride:
            return state.next
        ahead = step + 1 if stride == 2 and step + 1 < len(times) else step
        outputs = [run(stage, ahead) for stage in range(n)]
        made = dict(new)
        out = outputs[-1] if stride == 1 else run(n - 1, step)
        state.next = outputs[-1]
        old.update(made)
        return out

    return forward


def simulation(name: str, plan: Partition, stride: int, warm_up: int, shift: bool = False) -> np.ndarray:
    pipe = tiny.load(name)
    denoiser(pipe).forward = simulated(pipe, plan, stride, warm_up, shift)
    return tiny.run(pipe, name, steps=STEPS)


def exact_and_steady(name: str, plans: tuple[tuple[int, int], ...], simulate: bool) -> dict[Any, Any]:
    """On each rank: what the tests below look at, for every plan."""
    pipe = pipeline(name)
    text, plain = repr(denoiser(pipe)), picture(name)
    found: dict[Any, Any] = {}
    for model_n, stride in plans:
        for warm_up in (STEPS + 2, 3):
            with AsyncDiff(pipe, model_n, stride, warm_up) as parallel:
                first = picture(name, parallel)
                ran = dict(parallel.executions)
                again = picture(name, parallel)
                division = parallel.partition
            assert division is not None
            found[model_n, stride, warm_up] = {
                "psnr": psnr(first, plain),
                "bytes": first.tobytes(),
                "again": first.tobytes() == again.tobytes(),
                "ran": ran,
                "mine": division.names(parallel.stage),
                "units": [division.trace.calls[i].label for i in division.trace.units],
            }
        if simulate and dist.get_rank() == 0:
            expected = simulation(name, division, stride, 3)
            found[model_n, stride, 3]["simulation"] = psnr(first, expected)
    found["given back"] = repr(denoiser(pipe)) == text and np.array_equal(picture(name), plain)
    return found


@pytest.mark.parametrize("world_size", sorted(PLANS))
@pytest.mark.parametrize("name", TYPES)
def test_exact_at_full_warm_up_and_on_schedule_in_steady_state(pool: RankPool, name: str, world_size: int):
    plans = PLANS[world_size]
    found = pool.run(exact_and_steady, world_size, name, plans, world_size < 5)
    assert all(rank["given back"] for rank in found)
    for model_n, stride in plans:
        exact = [rank[model_n, stride, STEPS + 2] for rank in found]
        assert all(e["psnr"] >= 80 and e["again"] and not e["ran"] for e in exact), [e["psnr"] for e in exact]
        steady = [rank[model_n, stride, 3] for rank in found]
        assert len({s["bytes"] for s in steady}) == 1 and all(s["again"] for s in steady)
        assert FLOOR <= steady[0]["psnr"] < 80
        if "simulation" in steady[0]:
            assert steady[0]["simulation"] >= 60
        # Every unit runs on exactly one stage, every rank runs its own stage only, once a parallel batch.
        calls = max(sum(s["ran"].values()) // len(s["mine"]) for s in steady)
        owners = Counter(unit for s in steady[:model_n] for unit in s["mine"])
        assert owners == Counter(steady[0]["units"])
        for s in steady:
            assert s["ran"] == dict.fromkeys(s["mine"], calls)
        batches = (STEPS + (name == "sd1") - 3 + stride - 1) // stride
        assert calls == batches
