"""Step caches on CPU ranks: equal to diffusers' where it has them, alike on all ranks, undone."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

from shared.api.parsing import check_request
from shared.api.warned import collecting_warnings
from shared.models import MODELS, CacheSettings, Rule, token_plan
from shared.parallel.graphs import Graphs
from shared.parallel.xdit import caches
from shared.parallel.xdit.caches import StepCache
from shared.parallel.xdit.cpu import load_xfuser
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.exact import XDiT, transformers_of
from tests import test_matrix, tiny
from tests.parallel.test_xdit import EXACT, TYPES, compiled, picture, pipeline, psnr
from tests.pool import RankPool, is_last, once
from tests.seldom import seldom

Case = dict[str, Any]


class Alone(StepCache):
    """A step cache on a pipeline that nothing shares, called as a method."""

    def __init__(self, pipe: Any, settings: CacheSettings) -> None:
        self.pipe = pipe
        plan = token_plan(type(pipe.transformer).__name__)
        super().__init__(transformers_of(pipe, plan), plan, settings)
        self.held.enter_context(self.watch([Graphs(False)] * len(self.models)))

    def run(self, arguments: Case, _: Any) -> Any:
        return self.pipe(**arguments)


MASK = CacheSettings("mask", mask="11010")
STEPS = 5


def cached(name: str, cases: list[Case], settings: list[CacheSettings], calls: list[Case]) -> list[Any]:
    """On each rank, by case, settings and call: how close to one rank's, to the plain one, and the steps."""
    pipe, found = pipeline(name), []
    calls = [{"steps": STEPS} | call for call in calls]
    text = repr(pipe.transformer)
    plain = once(lambda: [picture(pipe, name, **call) for call in calls])

    def alone(one: CacheSettings) -> list[Any]:
        with Alone(pipe, one) as cache:
            return [(picture(pipe, name, cache, **call), cache.left_out) for call in calls]

    single = once(lambda: [alone(one) for one in settings])
    for case, (one, wanted) in itertools.product(cases, zip(settings, single, strict=True)):
        with XDiT(pipe, Degrees(**case), cache=one) as parallel:
            for call, exact, (same, left_out) in zip(calls, plain, wanted, strict=True):
                made = picture(pipe, name, parallel, **call)
                assert parallel.cache is not None
                found.append(
                    (case, one.cache, psnr(made, same), psnr(made, exact), parallel.cache.left_out, left_out)
                )
    assert repr(pipe.transformer) == text
    assert not any({"forward", "cache_context"} & set(vars(m)) for m in pipe.transformer.modules())
    assert not is_last() or np.array_equal(picture(pipe, name, **calls[0]), plain[0])
    return found


@pytest.mark.parametrize("name", seldom(TYPES, ("sd3",)))
def test_ranks_leave_out_what_one_rank_leaves_out(pool: RankPool, name: str) -> None:
    tiny.checkpoint(name)
    plan = MODELS[name].tokens
    assert plan is not None
    cases: list[Case] = [{"ring": 2}, {"tensor": 2} if plan.branches == 1 and plan.tensor else {"cfg": 2}]
    if plan.branches == 1 and not plan.tensor:
        cases = [{"ulysses": 2}, {"ring": 2}]
    # 80 x 48 pixels make 5 x 3 tokens: one is left over.
    calls: list[Case] = [{}, {"height": 96, "width": 96} if name == "ltx2" else {"height": 80, "width": 48}]
    ranks = pool.run(cached, 2, name, cases, [CacheSettings("fbcache", threshold=0), MASK], calls)
    assert [row[4] for row in ranks[0]] == [row[4] for row in ranks[1]]
    for case, kind, same, close, left_out, wanted in itertools.chain(*ranks):
        what = (name, case, kind, same, close, left_out, wanted)
        if kind == "fbcache":
            assert close >= EXACT and left_out[0] == 0, what
        else:
            assert same >= EXACT and close < same, what
            split = plan.guidance == "calls" and "cfg" in case
            assert left_out[0] == 2 * left_out[1] // STEPS, what
            assert left_out[1] >= wanted[1] // (2 if split else 1), what


def diffusers_cached(pipe: Any, name: str, config: Any, **call: Any) -> tuple[np.ndarray, int]:
    """A picture with diffusers' own step cache, and how often the last block was computed."""
    transformer, count = pipe.transformer, [0]
    plan = token_plan(type(transformer).__name__)
    last = list(transformer.get_submodule(plan.blocks[-1]).children())[-1]
    attention = last.get_submodule(plan.attention[0])
    note = attention.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    transformer.enable_cache(config)
    try:
        return picture(pipe, name, **call), count[0]
    finally:
        transformer.disable_cache()
        note.remove()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("flux", {"true_cfg_scale": 3.0, "negative_prompt": "blur"}),
        pytest.param("qwen", {}, marks=pytest.mark.slow),
        pytest.param("wan", {}, marks=pytest.mark.slow),
    ],
)
def test_one_rank_leaves_out_what_diffusers_leaves_out(name: str, call: Case) -> None:
    from diffusers import FirstBlockCacheConfig, MagCacheConfig
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    plan = token_plan(type(pipeline(name).transformer).__name__)
    assert plan.mag_ratios in ((), tuple(round(ratio, 5) for ratio in FLUX_MAG_RATIOS.tolist()))
    ratios, pipe, call = tuple(FLUX_MAG_RATIOS.tolist()), pipeline(name), {"steps": 6} | call
    mag: Case = {"threshold": 0.3, "retention_ratio": 0.2, "max_skip_steps": 2, "mag_ratios": ratios}
    pairs = [(CacheSettings("magcache", **mag), MagCacheConfig(num_inference_steps=6, **mag))]
    for threshold in (0.02, 0.1, 0.3, 100.0):
        theirs = FirstBlockCacheConfig(threshold=threshold)
        pairs.append((CacheSettings("fbcache", threshold=threshold), theirs))
    counts = []
    for ours, config in pairs:
        wanted, computed = diffusers_cached(pipe, name, config, **call)
        with Alone(pipe, ours) as cache:
            made = picture(pipe, name, cache, **call)
            left_out, calls = cache.left_out
        assert calls - left_out == computed and psnr(made, wanted) >= EXACT, (ours, computed, left_out)
        counts.append(left_out / calls)
    assert 0 < counts[0] < 0.8 and counts[-1] > 0.8
    assert any(counts[-1] > one for one in counts[1:-1]), counts


def test_steps_of_taylorseer_are_diffusers() -> None:
    from diffusers.hooks.hooks import CacheContext, StateManager
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook, TaylorSeerState

    for interval, first in ((5, 3), (3, 2), (1, 1)):
        states = StateManager(TaylorSeerState)
        states.set_context(CacheContext("cond"))
        hook = TaylorSeerCacheHook(interval, first, torch.float32, states)
        settings = CacheSettings("taylorseer", cache_interval=interval, disable_cache_before_step=first)
        rule = Rule(settings, 30)
        assert [rule.ahead(step) for step in range(30)] == [
            hook._measure_should_compute()[0] for _ in range(30)
        ]


def test_forecasts_follow_a_polynomial() -> None:
    """Residuals that are a polynomial of the step's number are forecast without an error."""
    pipe = pipeline("pixa")
    plan = token_plan(type(pipe.transformer).__name__)
    value = lambda step: torch.tensor([2.0 + 3.0 * step])  # noqa: E731
    settings = CacheSettings("taylorseer", cache_interval=3, disable_cache_before_step=1)
    with StepCache([pipe.transformer], plan, settings) as cache:
        cache.begin(9)
        branch = cache._branch({})
        for step in (0, 3):
            cache._learn(branch, 0, caches._Known([], [[value(step)]], step, None))
        for ahead in (1, 2):
            assert torch.allclose(cache._forecast(branch.known[0], ahead)[0], value(3 + ahead))
        assert len(branch.known[0].residuals) == 2


def test_steps_of_teacache_are_xfusers() -> None:
    load_xfuser("cpu")
    from xfuser.model_executor.cache.utils import TeaCachedTransformerBlocks

    plan = token_plan("FluxTransformer2DModel")
    assert plan.modulated is not None
    drawn = torch.Generator().manual_seed(3)
    inputs = [torch.rand(64, generator=drawn) + 1]
    for _ in range(29):
        inputs.append(inputs[-1] * (1 + 0.2 * torch.rand((), generator=drawn)))
    theirs = TeaCachedTransformerBlocks(torch.nn.ModuleList(), rel_l1_thresh=0.6, num_steps=30, name="flux")
    monkey = lambda one, other: (one - other).abs().mean() / one.abs().mean()  # noqa: E731
    theirs.l1_distance = monkey
    rule = Rule(CacheSettings("teacache", threshold=0.6), 30, polynomial=plan.modulated.polynomial)
    ours, wanted = [], []
    for step, (before, now) in enumerate(zip([inputs[0], *inputs], inputs, strict=False)):
        computes = rule.ahead(step)
        if computes is None:
            computes = rule.changed(float((now - before).abs().sum() / before.abs().sum()))
        if computes:
            rule.computed()
        ours.append(not computes)
        wanted.append(bool(theirs.are_two_tensor_similar(before, now, torch.tensor(0.6))))
    assert ours == wanted and 5 < sum(ours) < 25


@pytest.mark.parametrize(
    ("name", "call"),
    [("kontext", {"true_cfg_scale": 3.0, "negative_prompt": "blur"}), ("chroma", {}), ("hv15", {})],
)
def test_each_guidance_branch_has_its_own_state(name: str, call: Case) -> None:
    """Whether the pipeline names its branches or not, and also where it has one in some generations."""
    pipe = pipeline(name)
    with Alone(pipe, MASK) as cache:
        both = picture(pipe, name, cache, steps=STEPS, **call)
        assert cache.left_out == (4, 2 * STEPS) and len(cache._branches) == 2
        one = "true_cfg_scale" if name == "kontext" else "guidance_scale"
        picture(pipe, name, cache, steps=STEPS, **call | {one: 1.0})
        assert cache.left_out == (2, STEPS)
        assert np.array_equal(picture(pipe, name, cache, steps=STEPS, **call), both)
        assert cache.notes == ["step cache mask: 4 of 10 calls (2 a step) were left out"]


def agreed(threshold: float) -> bool:
    """On each rank: whether a step is computed after a change on rank 0 only."""
    transformer = pipeline("flux").transformer
    settings = CacheSettings("fbcache", threshold=threshold)
    plan = token_plan(type(transformer).__name__)
    with StepCache([transformer], plan, settings, dist.group.WORLD) as cache:
        before = torch.ones(1, 4, 8)
        blocks = cache._blocks[0]
        blocks.run = lambda *_: (None, [], before * (2 - dist.get_rank()))
        _, change, _ = cache._left_out(blocks, lambda: None, (), {}, [], before)
    assert change is not None
    return Rule(settings, 4).changed(float(change[0] / change[1]))


def test_ranks_decide_together(pool: RankPool) -> None:
    # Rank 0 has changed by 1, rank 1 by nothing: by half in all.
    tiny.checkpoint("flux")
    assert pool.run(agreed, 2, 0.4) == [True] * 2
    assert pool.run(agreed, 2, 0.6) == [False] * 2


def of_replicas(name: str, case: Case) -> list[Any]:
    """On each rank of two replicas with a picture each, by threshold: how close it is to what one rank makes
    of that seed, how many calls both left out, and one rank.
    """
    pipe, found = pipeline(name), []
    call = {"steps": 8, "seed": 1 + dist.get_rank() // (dist.get_world_size() // 2)}
    for threshold in (0.05, 0.1, 0.2, 0.4):
        settings = CacheSettings("fbcache", threshold=threshold)
        with Alone(pipe, settings) as cache:
            wanted, left_out = picture(pipe, name, cache, **call), cache.left_out
        with XDiT(pipe, Degrees(**case), cache=settings) as parallel:
            made = picture(pipe, name, parallel, **call)
            assert parallel.cache is not None
            found.append((psnr(made, wanted), parallel.cache.left_out, left_out))
    return found


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(2, {"data": 2}), pytest.param(4, {"data": 2, "ring": 2}, marks=pytest.mark.slow)],
)
def test_each_replica_decides_for_its_own_picture(pool: RankPool, ranks: int, case: Case) -> None:
    tiny.checkpoint("flux")
    found = pool.run(of_replicas, ranks, "flux", case)
    assert all(same >= EXACT and left == alone for rank in found for same, left, alone in rank), found
    counts = [[left for _, left, _ in rank] for rank in found]
    assert counts[0] == counts[ranks // 2 - 1] and counts[ranks // 2] == counts[-1]
    assert counts[0] != counts[-1], "both pictures change alike: nothing is shown"


def test_calibration_tells_ratios_that_can_be_given(pool: RankPool) -> None:
    tiny.checkpoint("sd3")
    for notes in pool.run(calibrated, 2, "sd3"):
        assert notes[0] == notes[1], "two ranks measure what one measures"
        assert len(notes[0]) == STEPS and notes[0][0] == 1.0 and min(notes[0]) > 0
        assert all(0.1 < ratio < 10 for ratio in notes[0]) and len(set(notes[0])) > 2


def calibrated(name: str) -> list[list[float]]:
    """On each rank: the ratios that one rank measures, and those that two do."""
    pipe, found = pipeline(name), []
    settings = CacheSettings("magcache", calibrate=True)
    with Alone(pipe, settings) as cache:
        picture(pipe, name, cache, steps=STEPS)
        found.append(cache.notes)
    with XDiT(pipe, Degrees(cfg=2), cache=settings) as parallel:
        picture(pipe, name, parallel, steps=STEPS)
        found.append(parallel.notes)
    return [[round(x, 3) for x in json.loads(notes[0].removeprefix(caches.CALIBRATED))] for notes in found]


@pytest.mark.slow  # beside rounded exchanges in every run: test_xdit.py
def test_what_is_measured_inside_of_compiled_blocks(pool: RankPool) -> None:
    tiny.checkpoint("flux")
    settings = CacheSettings("teacache", threshold=0)
    for rank in pool.run(compiled, 2, "flux", {"ring": 2}, cache=settings):
        assert rank["psnr"] >= EXACT and rank["more"] == 0, rank


def told(name: str, flags: Case) -> tuple[list[str], list[np.ndarray]]:
    """On each rank: what an answer tells, and the latents of two alike requests with another between."""
    config, world, host, _ = test_matrix.launch("xdit", name, {}, flags)
    engine = host.build_engine(config, world)
    made, asked = [], test_matrix.body(name, {}) | {"steps": 4}
    for changes in ({}, {"seed": 5, "width": 96}, {}):
        with collecting_warnings() as warnings:
            reply = engine.generate(check_request(asked | changes, config), lambda step, steps: None)
        if reply is not None:
            made.append(load(reply.latent)["latent"].float().numpy())
    engine.close()
    return warnings, made


def test_an_answer_tells_how_many_steps_were_left_out(pool: RankPool) -> None:
    tiny.checkpoint("flux")
    flags: Case = {"step_cache": CacheSettings("mask", mask="1011"), "ulysses_degree": 2}
    plain, sharded = ((flags | more) for more in ({}, {"shard_weights": True}))
    (warnings, made), (others, _) = pool.run(told, 2, "flux", plain)
    assert warnings == others == ["step cache mask: 1 of 4 steps were left out"]
    assert np.array_equal(made[0], made[2])
    (warnings, again), _ = pool.run(told, 2, "flux", sharded)
    assert len(warnings) == 1 and np.array_equal(again[0], again[2])
    assert np.abs(again[0] - made[0]).max() < 1e-4  # weights elsewhere in memory may be rounded otherwise


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cache": "mask"}, "the first one 1"),
        ({"cache": "mask", "mask": "012"}, "the first one 1"),
        ({"cache": "fbcache", "mask": "11"}, "fbcache has no mask; it has max_order, threshold"),
        ({"cache": "fbcache", "threshold": -1.0}, "0 or more"),
        ({"cache": "taylorseer", "max_order": 4}, "0 to 3"),
        ({"cache": "taylorseer", "cache_interval": 0}, "cache_interval must be 1"),
        ({"cache": "magcache", "mag_ratios": (1.0, 0.0)}, "numbers above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: Case, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CacheSettings(**settings)
