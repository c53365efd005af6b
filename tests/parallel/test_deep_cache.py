"""shared.parallel.asyncdiff.deep_cache: which layers run in which step, and what the picture is then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shared.backends import BACKENDS
from shared.backends.asyncdiff import attach
from shared.launch.checks import check_config
from shared.launch.errors import UsageError
from shared.launch.values import as_step_cache
from shared.models import CacheSettings, Rule
from shared.parallel.asyncdiff.deep_cache import DeepCache
from tests import tiny
from tests.launch.test_flags import rank_made
from tests.parallel.test_asyncdiff import pipeline, psnr
from tests.pool import RankPool
from tests.seldom import seldom

STEPS = 6
EXACT = 120.0  # dB, of sums in another order
TYPES = ("sd1", "sd2", "sdxl", "sdup", "svd", "ad")
MASK = "1100101"  # PNDM calls the UNet once more


def drawn(name: str, parallel: DeepCache | None = None, **changes: Any) -> np.ndarray:
    if parallel is not None:
        parallel.begin(STEPS)
    return tiny.run(pipeline(name), name, **({"steps": STEPS, "frames": 2} | changes))


def kept_by_hooks(name: str, mask: str) -> np.ndarray:
    """The whole UNet in every step, in which the last layer gets what came before it in an earlier one."""
    unet = pipeline(name).unet
    last = list(unet.up_blocks.children())[-1]
    lists = [getattr(last, kind, None) for kind in ("motion_modules", "attentions", "resnets")]
    before = next(modules for modules in lists if modules)[-2]
    step, kept = [-1], [None]

    def count(*_: Any) -> None:
        step[0] += 1

    def give(module: Any, args: Any, output: Any) -> Any:
        if mask[step[0]] == "0":
            return kept[0]
        kept[0] = output
        return None

    hooks = [unet.register_forward_pre_hook(count), before.register_forward_hook(give)]
    try:
        return drawn(name)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", seldom(TYPES, ("sd1", "svd")))
def test_steps_that_are_left_out_run_the_outermost_layers_on_what_was_kept(name: str) -> None:
    pipe, plain = pipeline(name), drawn(name)
    wanted = kept_by_hooks(name, MASK)
    with DeepCache(pipe, pipe.unet, CacheSettings("mask", mask=MASK)) as cache:
        for _ in range(2):  # nothing is taken from the generation before
            assert psnr(drawn(name, cache), wanted) >= EXACT
            assert cache.left_out == 3 and cache.calls - STEPS in (0, 1)
            assert cache.notes == [f"step cache mask: 3 of {cache.calls} steps were left out"]
        ran = set(cache.executions)
        outer = cache.plan["outer"]
    assert psnr(wanted, plain) < 80
    deep = [f"down_blocks.{len(pipe.unet.down_blocks) - 1}", "mid_block", "up_blocks.0"]
    assert {"conv_in", "conv_out"} <= ran and not [n for n in ran if n.startswith(tuple(deep))]
    assert set(cache.executions.values()) <= {0, 3} and outer["share"] < 0.5
    assert np.array_equal(drawn(name), plain)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_nothing_left_out_is_the_plain_picture() -> None:
    pipe = pipeline("sd1")
    with DeepCache(pipe, pipe.unet, CacheSettings("deepcache", cache_interval=1)) as cache:
        assert psnr(drawn("sd1", cache), drawn("sd1")) >= EXACT
        assert (cache.left_out, cache.notes) == (0, [])


def test_one_of_so_many_steps_is_computed_after_the_first() -> None:
    settings = as_step_cache("deepcache:3")
    rule = Rule(settings, 12)
    computed = "".join(str(int(rule.ahead(step) is not False)) for step in range(12))
    assert computed == "111010010010" and Rule(settings, 28).both_kinds(28) == 6
    with pytest.raises(ValueError, match="deepcache has no threshold; it has cache_interval, disable_"):
        CacheSettings("deepcache", threshold=0.1)


def test_another_size_meanwhile_is_computed() -> None:
    """Buffers of a size hold nothing before the first step of that size."""
    pipe = pipeline("sd1")
    with DeepCache(pipe, pipe.unet, CacheSettings("mask", mask="100000")) as cache, torch.inference_mode():
        cache.begin(3)
        text = torch.zeros(1, 4, pipe.unet.config.cross_attention_dim)
        for side, left in ((8, 0), (16, 0), (16, 1)):
            before = cache.left_out
            pipe.unet(torch.zeros(1, 4, side, side), torch.tensor(5), encoder_hidden_states=text)
            assert cache.left_out - before == left, side


@pytest.mark.parametrize("flags", seldom([{}, {"shard_weights": True}, {"control_net": True}], [{}]))
def test_two_ranks_with_a_branch_each_leave_out_what_one_rank_does(
    pool: RankPool, flags: dict[str, Any]
) -> None:
    if "control_net" in flags:
        from tests import tiny_extras

        flags = {"control_net": {str(tiny_extras.control_net("sd1")): 0.7}}
    shared = {"step_cache": CacheSettings("mask", mask="1101"), "ask": {"steps": 4}}
    one = pool.run(
        rank_made, 1, "asyncdiff", "sd1", shared | {k: v for k, v in flags.items() if k != "shard_weights"}
    )
    two = pool.run(rank_made, 2, "asyncdiff", "sd1", shared | flags | {"use_cfg_parallel": True})
    told = ["step cache mask: 1 of 5 steps were left out"]
    assert [rank["warnings"] for rank in (*one, *two)] == [told] * 3
    assert psnr(two[0]["latents"], one[0]["latents"]) >= EXACT - 20  # latents reach 10
    assert two[0]["plan"]["cfg_split"] and two[0]["plan"]["cache"] == {"cache": "mask", "mask": "1101"}


@pytest.mark.parametrize(
    ("name", "flags", "world", "problem"),
    [
        ("sd1", {"step_cache": CacheSettings("fbcache")}, 1, "fbcache leaves out blocks of a transformer"),
        ("sd1", {"step_cache": CacheSettings("deepcache")}, 2, "not supported with stages"),
        ("sd1", {"step_cache": CacheSettings("deepcache"), "use_cfg_parallel": True, "async_steps": 2}, 2,
         "not supported with stages"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with_is_refused(
    name: str, flags: dict[str, Any], world: int, problem: str
) -> None:
    with pytest.raises(UsageError, match=f"--step_cache: {problem}"):
        check_config(tiny.config(name, **flags), BACKENDS["asyncdiff"], world)


def test_a_transformer_is_sent_to_the_other_host() -> None:
    assert BACKENDS["asyncdiff"].refusal(tiny.config("sd3").spec, "step_cache") == (
        "its transformer has step caches on xdit_host.py"
    )


def test_one_rank_on_a_cpu_has_it_too() -> None:
    config = tiny.config("sd1", step_cache=CacheSettings("deepcache"))
    with attach(tiny.load("sd1"), config, tiny.world()) as method:
        assert method.plan["method"] == "deepcache"
