"""shared.parallel.asyncdiff on CPU ranks: exact in warm-up, then the paper's schedule."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from optimum.quanto import freeze, qint8, quantize
from peft import LoraConfig
from torch.utils._pytree import tree_leaves, tree_map

from shared.models import MODELS
from shared.parallel.asyncdiff import AsyncDiff
from shared.parallel.asyncdiff.partition import Partition
from shared.parallel.cfg_split import HybridSplit
from shared.parallel.exchange import Exchange
from shared.parallel.method import CombinedMethod, Part
from shared.pipeline.adapters import load_ip_adapters
from shared.pipeline.compile import regions
from tests import tiny, tiny_extras
from tests.pool import RankPool, is_last, once
from tests.seldom import seldom

PLANS = {2: ((2, 1),), 3: ((3, 1), (2, 2)), 4: ((4, 1), (3, 2)), 5: ((4, 2),)}
"""World size -> the (model_n, stride) that take so many ranks."""
STEPS, WARM_UP = 6, 2
FLOORS = {"sd1": 38, "sd2": 26, "sdxl": 54, "sd3": 30, "sdup": 35, "svd": 25, "ad": 45}
"""dB that a steady-state picture of each tiny random checkpoint keeps at least against the plain one."""
SAME = 200.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures in 0..1, in dB; SAME when equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return SAME if error == 0 else float(-10 * np.log10(error))


@functools.cache
def pipeline(name: str) -> Any:
    return tiny.load(name)


def denoiser(pipe: Any) -> torch.nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def picture(name: str, parallel: AsyncDiff | None = None, **changes: Any) -> np.ndarray:
    changes = {"steps": STEPS, "frames": 2} | changes
    if parallel is not None:
        parallel.begin(changes["steps"])
    return tiny.run(pipeline(name), name, **changes)


def simulated(
    pipe: Any, plan: Partition, stride: int, warm_up: int, shift: bool, steps: int | None = None
) -> Callable[..., Any]:
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
            try:
                return original(**(given | {"timestep": time}))
            finally:
                state.stage = None

        if step < warm_up or (steps is not None and step >= warm_up + steps):
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


def simulation(
    name: str,
    plan: Partition,
    stride: int,
    warm_up: int,
    shift: bool = False,
    steps: int | None = None,
    hybrid: bool = False,
) -> np.ndarray:
    pipe = tiny.load(name)
    exact = denoiser(pipe).forward
    forward = simulated(pipe, plan, stride, warm_up, shift, steps)
    if hybrid:
        assert steps is not None
        forward = one_branch(exact, forward, range(warm_up, warm_up + steps))
    denoiser(pipe).forward = forward
    return tiny.run(pipe, name, steps=STEPS, frames=2)


def one_branch(exact: Callable[..., Any], prompted: Callable[..., Any], shared: range) -> Callable[..., Any]:
    """Guidance whose other branch is, in the `shared` steps, the prompt's less what they differed by last."""
    signature, step, difference = inspect.signature(exact), 0, torch.zeros(())

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal step, difference
        given = signature.bind(*args, **kwargs).arguments

        def half(function: Callable[..., Any], branch: int) -> torch.Tensor:
            cut = tree_map(
                lambda x: x.chunk(2)[branch] if isinstance(x, torch.Tensor) and x.ndim else x, dict(given)
            )
            return function(**(cut | {"return_dict": False}))[0]

        other = None if step in shared else half(exact, 0)
        mine = half(prompted, 1)
        difference = difference if other is None else mine - other
        step += 1
        return (torch.cat([mine - difference, mine]),)

    return forward


def exact_and_steady(name: str, plans: tuple[tuple[int, int], ...]) -> dict[Any, Any]:
    """On each rank: what the test below looks at, for every plan."""
    pipe = pipeline(name)
    text, plain = repr(denoiser(pipe)), once(lambda: picture(name))
    found: dict[Any, Any] = {}
    for model_n, stride in plans:
        with AsyncDiff(pipe, model_n, stride, warm_up_steps=STEPS + 2) as parallel:
            exact = psnr(picture(name, parallel), plain)
            assert not parallel.executions
            parallel.pace.warm_up_steps = WARM_UP
            first = picture(name, parallel)
            ran = dict(parallel.executions)
            again = picture(name, parallel)
            division = parallel.partition
        assert division is not None
        found[model_n, stride] = {
            "exact": exact,
            "steady": psnr(first, plain),
            "bytes": first.tobytes(),
            "again": first.tobytes() == again.tobytes(),
            "ran": ran,
            "mine": division.names(parallel.stage),
            "units": [division.trace.calls[i].label for i in division.trace.units],
        }
        if dist.get_rank() == 0:
            found[model_n, stride]["simulation"] = psnr(first, simulation(name, division, stride, WARM_UP))
    found["given back"] = repr(denoiser(pipe)) == text
    if is_last():
        found["given back"] &= np.array_equal(picture(name), plain)
    return found


@pytest.mark.parametrize(
    ("name", "world_size"),
    seldom(
        itertools.product(sorted(FLOORS), sorted(PLANS)),
        {("sd1", 2), ("sd3", 2), ("svd", 2)},
    ),
)
def test_exact_at_full_warm_up_and_on_schedule_in_steady_state(
    pool: RankPool, name: str, world_size: int
) -> None:
    plans = PLANS[world_size]
    tiny.checkpoint(name)  # built here: transformers saves nothing on other ranks than 0
    ranks = pool.run(exact_and_steady, world_size, name, plans)
    assert all(rank["given back"] for rank in ranks)
    for model_n, stride in plans:
        found = [rank[model_n, stride] for rank in ranks]
        assert min(f["exact"] for f in found) >= 80
        assert all(f["again"] for f in found) and len({f["bytes"] for f in found}) == 1
        assert FLOORS[name] <= found[0]["steady"] < SAME
        assert found[0]["simulation"] >= 60
        # Each unit belongs to one stage, and a rank runs its stage's units only, once a parallel batch.
        assert Counter(unit for f in found[:model_n] for unit in f["mine"]) == Counter(found[0]["units"])
        asynchronous = STEPS + (name == "sd1") - WARM_UP  # PNDM calls the UNet once more
        for f in found:
            assert f["ran"] == dict.fromkeys(f["mine"], -(-asynchronous // stride))


def limited(name: str, hybrid: bool) -> dict[str, Any]:
    """Asynchronous steps in the middle only, of both branches or of one, and the same at full warm-up."""
    pipe = pipeline(name)
    text, plain = repr(denoiser(pipe)), once(lambda: picture(name))
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        parallel = stack.enter_context(AsyncDiff(pipe, 2, warm_up_steps=STEPS + 2, async_steps=2))
        parts: list[Part] = []
        if hybrid:
            world, rank = dist.group.WORLD, dist.get_rank()
            parts.append(HybridSplit([denoiser(pipe)], world, rank, parallel.asynchronous))
        both = stack.enter_context(CombinedMethod(parallel, parts))

        def run() -> np.ndarray:
            both.begin(STEPS)
            return picture(name)

        found["exact"] = psnr(run(), plain)
        parallel.pace.warm_up_steps = WARM_UP
        first = run()
        found["ran"], found["mine"] = dict(parallel.executions), parallel.partition.names(parallel.stage)
        found["bytes"], found["again"] = first.tobytes(), np.array_equal(first, run())
        division = parallel.partition
    assert division is not None
    found["steady"] = psnr(first, plain)
    found["batch"] = division.trace.values[division.trace.calls[0].outputs[0].item].shape[0]
    if dist.get_rank() == 0:
        found["simulation"] = psnr(first, simulation(name, division, 1, WARM_UP, False, 2, hybrid))
    found["given back"] = repr(denoiser(pipe)) == text
    if is_last():
        found["given back"] &= np.array_equal(picture(name), plain)
    return found


MIDDLES = [("sd1", False), ("sd1", True), ("sdxl", True), ("sd3", True)]


@pytest.mark.parametrize(("name", "hybrid"), seldom(MIDDLES, [("sd1", False), ("sd3", True)]))
def test_asynchronous_steps_in_the_middle_alone(pool: RankPool, name: str, hybrid: bool) -> None:
    tiny.checkpoint(name)
    ranks = pool.run(limited, 2, name, hybrid)
    assert min(rank["exact"] for rank in ranks) >= 80
    assert FLOORS[name] - 5 <= ranks[0]["steady"] < SAME and ranks[0]["simulation"] >= 60
    assert len({rank["bytes"] for rank in ranks}) == 1
    for rank in ranks:
        assert rank["again"] and rank["given back"]
        assert rank["ran"] == dict.fromkeys(rank["mine"], 2)
        assert rank["batch"] == (1 if hybrid else 2)


def many_shapes(name: str) -> dict[Any, list]:
    pipe = pipeline(name)
    found: dict[Any, list] = {}
    requests: list[dict[str, Any]] = [
        {"steps": 5}, {"size": 32, "steps": 4}, {"seed": 3, "steps": 6}, {"size": 96, "steps": 4},
        {"guidance_scale": 1.0, "steps": 4}, {"steps": 5},
    ]  # fmt: skip
    plain = once(lambda: [picture(name, **request) for request in requests])
    with AsyncDiff(pipe, 2, warm_up_steps=1000) as parallel:
        made = [picture(name, parallel, **request) for request in requests]
        found["exact"] = [psnr(a, b) for a, b in zip(made, plain, strict=True)]
    for kept in (4, 1):
        with AsyncDiff(pipe, 2, warm_up_steps=2, max_shapes=kept) as parallel:
            made = [picture(name, parallel, **request) for request in requests]
            found["steady", kept] = [psnr(a, b) for a, b in zip(made, plain, strict=True)]
            found["bytes", kept] = [picture.tobytes() for picture in made]
    return found


@pytest.mark.parametrize("name", ["sdxl"])
def test_other_sizes_steps_and_batches_and_back(pool: RankPool, name: str) -> None:
    tiny.checkpoint(name)
    for rank in pool.run(many_shapes, 2, name):
        assert min(rank["exact"]) >= 80
        assert min(rank["steady", 4]) >= FLOORS[name] - 10 and max(rank["steady", 4]) < SAME
        assert rank["bytes", 4][0] == rank["bytes", 4][-1] == rank["bytes", 1][0]
        assert rank["bytes", 4] == rank["bytes", 1]


def variations() -> dict[Any, Any]:
    """Time shift, weights, warm-up of one step, late transfers, and the two refusals of a wrong use."""
    name = "sd1"
    found: dict[Any, Any] = {}
    pipe = pipeline(name)
    made: dict[str, bytes] = {}
    settings: dict[str, dict[str, Any]] = {
        "base": {}, "shift": {"time_shift": True}, "weights": {"stage_weights": [1.0, 3.0]},
        "one": {"warm_up_steps": 1},
    }  # fmt: skip
    stride = dist.get_world_size() - 1
    for key, setting in settings.items():
        with AsyncDiff(pipe, 2, stride, **({"warm_up_steps": 2} | setting)) as parallel:
            result = picture(name, parallel)
            division = parallel.partition
        made[key] = result.tobytes()
        assert division is not None
        found["loads", key] = [sum(division.trace.flops[u] for u in units) for units in division.stages]
        if dist.get_rank() == 0:
            expected = simulation(name, division, stride, parallel.pace.warm_up_steps, parallel.time_shift)
            found["simulation", key] = psnr(result, expected)
    found["different"] = len(set(made.values())) == len(made)
    with AsyncDiff(pipe, 2, stride, 2) as parallel, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "shared.parallel.asyncdiff.asyncdiff.Exchange", lambda group, early: Exchange(group, early=False)
        )
        found["late"] = picture(name, parallel).tobytes() == made["base"]
        with pytest.raises(RuntimeError, match="call begin before each generation"):
            tiny.run(pipe, name, steps=STEPS)
    with AsyncDiff(pipe, 2, stride, 2), pytest.raises(RuntimeError, match="must be called before"):
        tiny.run(pipe, name, steps=STEPS)
    return found


@pytest.mark.parametrize("stride", seldom([1, 2], [2]))
def test_time_shift_stage_weights_and_short_warm_up(pool: RankPool, stride: int) -> None:
    tiny.checkpoint("sd1")
    found = pool.run(variations, 1 + stride)
    for rank in found:
        assert rank["different"] and rank["late"]
        slow, fast = rank["loads", "weights"]
        assert fast / slow == pytest.approx(3, rel=0.25)
        slow, fast = rank["loads", "base"]
        assert fast / slow == pytest.approx(1, rel=0.15)
    assert min(v for k, v in found[0].items() if k[0] == "simulation") >= 60


def dressed() -> dict[str, tuple[float, float, bool]]:
    """LoRA, a hook that replaced the forward, compiled blocks, quantized weights: exact, and steady."""
    found = {}

    def check(key: str, pipe: Any) -> None:
        plain, text, made = tiny.run(pipe, "sd1", steps=4), repr(pipe.unet), []
        with AsyncDiff(pipe, 2, 1) as parallel:
            for parallel.pace.warm_up_steps in (1000, 2):
                parallel.begin(4)
                made.append(psnr(tiny.run(pipe, "sd1", steps=4), plain))
        exact, steady = made
        found[key] = exact, steady, repr(pipe.unet) == text

    pipe = tiny.load("sd1")
    torch.manual_seed(0)  # the LoRA is drawn, and must be the same on every rank
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    for module in (pipe.unet, pipe.unet.mid_block.resnets[0], pipe.unet.conv_out):
        add_hook_to_module(module, ModelHook())
    for module in list(regions(pipe.unet))[::3]:  # tracing takes long
        module.forward = torch.compile(module.forward, backend="eager")
    check("lora, hooks and compiled blocks", pipe)
    pipe = tiny.load("sd1")
    quantize(pipe.unet, weights=qint8)
    freeze(pipe.unet)
    check("quantized", pipe)
    return found


def test_adapters_hooks_compiled_and_quantized_modules(pool: RankPool) -> None:
    tiny.checkpoint("sd1")
    for rank in pool.run(dressed, 2):
        assert set(rank) == {"lora, hooks and compiled blocks", "quantized"}
        for key, (exact, steady, same) in rank.items():
            assert same and exact >= 80 and FLOORS["sd1"] <= steady < SAME, (key, exact, steady)


CONTROLLED = {
    "sd1": (diffusers.StableDiffusionControlNetPipeline, diffusers.ControlNetModel, "image"),
    "sdxl": (diffusers.StableDiffusionXLControlNetPipeline, diffusers.ControlNetModel, "image"),
    "sd3": (diffusers.StableDiffusion3ControlNetPipeline, diffusers.SD3ControlNetModel, "control_image"),
}


def all_adapters(name: str) -> tuple[float, float, float]:
    cls, control_class, field = CONTROLLED[name]
    control = control_class.from_pretrained(tiny_extras.control_net(name))
    pipe = cls.from_pipe(tiny.load(name), controlnet=control)
    pipe.load_lora_weights(str(tiny_extras.lora(name)))
    load_ip_adapters(pipe, MODELS[name], {str(tiny_extras.ip_adapter(name)): 1.0}, torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def made(parallel: AsyncDiff | None = None, seed: int = 5) -> np.ndarray:
        if parallel is not None:
            parallel.begin(4)
        torch.manual_seed(0)  # sd3 draws its control latents from the global state
        images = {field: tiny.picture(seed=seed), "ip_adapter_image": tiny.picture(32, seed)}
        return tiny.run(pipe, name, steps=4, **images)

    plain, other = made(), made(seed=6)
    with AsyncDiff(pipe, 2, warm_up_steps=5) as parallel:
        exact = psnr(made(parallel), plain)
        parallel.pace.warm_up_steps = 2
        return exact, psnr(made(parallel), plain), psnr(other, plain)


@pytest.mark.parametrize("name", seldom(sorted(CONTROLLED), ("sd1", "sd3")))
def test_lora_control_net_and_ip_adapter_together(pool: RankPool, name: str) -> None:
    for make in (tiny.checkpoint, tiny_extras.control_net, tiny_extras.lora, tiny_extras.ip_adapter):
        make(name)
    for exact, steady, other_image in pool.run(all_adapters, 2, name):
        assert exact >= 80 and FLOORS[name] - 15 <= steady < SAME
        assert other_image < 60  # else the adapters do nothing


def in_halves() -> tuple[bytes, list[str]]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[dist.get_rank() // 2]
    with AsyncDiff(pipeline("sd1"), 2, 1, 2, group=group) as parallel:
        made = picture("sd1", parallel, seed=dist.get_rank() // 2)
        assert parallel.partition is not None
        return made.tobytes(), parallel.partition.names(parallel.stage)


def test_two_groups_work_side_by_side(pool: RankPool) -> None:
    tiny.checkpoint("sd1")
    found = pool.run(in_halves, 4)
    assert found[0][0] == found[1][0] != found[2][0] == found[3][0]
    assert found[0][1] == found[2][1] != found[1][1] == found[3][1]


def test_one_rank_is_the_plain_pipeline() -> None:
    pipe = tiny.load("sdxl")
    plain, text = tiny.run(pipe, "sdxl", steps=3), repr(pipe.unet)
    with AsyncDiff(pipe, 1) as parallel:
        parallel.begin(3)
        assert np.array_equal(tiny.run(pipe, "sdxl", steps=3), plain)
        assert len(parallel.plan["stages"]) == 1 and parallel.plan["bytes"] == 0
        json.dumps(parallel.plan)
    parallel.close()
    assert repr(pipe.unet) == text and not any("forward" in m.__dict__ for m in pipe.unet.modules())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model_n": 2}, "model_n 2 with stride 1 needs 2 ranks"),
        ({"model_n": 0}, "model_n 0"),
        ({"model_n": 1, "stride": 3}, "stride 3"),
        ({"model_n": 1, "warm_up_steps": 0}, "warm_up_steps must be 1 or more; got 0"),
        ({"model_n": 1, "async_steps": 0}, "async_steps must be 1 or more; got 0"),
        (
            {"model_n": 1, "stage_weights": [1, 1]},
            "stage_weights must hold 1 numbers, one for each stage; got 2",
        ),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        AsyncDiff(SimpleNamespace(unet=torch.nn.Linear(1, 1), scheduler=None), **settings)
