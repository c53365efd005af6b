"""What a launch is said to need of memory: weights to the byte, advice that is tried and fits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from shared.backends import BACKENDS
from shared.launch.errors import UsageError
from shared.launch.fit import LADDER, worded
from shared.launch.flags import HostConfig
from shared.models import MODELS
from shared.parallel.peak import PeakBytes
from shared.pipeline.memory_plan import MemoryPlan
from shared.pipeline.sharding import parameter_bytes
from tests import tiny, tiny_extras, tiny_original
from tests.pool import RankPool
from tests.test_matrix import launch

GIB = 2**30
NEEDS_FTFY = ("wani2v",)


def plan_of(config: HostConfig, ranks: int = 1, free: int = GIB, device: str = "cpu") -> MemoryPlan:
    dtype = torch.float16 if config.variant == "fp16" else torch.float32
    return MemoryPlan(config, BACKENDS[config.backend], ranks, device, dtype, [free] * ranks)


def flags_of(name: str) -> dict[str, Any]:
    return {"motion_adapter": str(tiny_extras.motion_adapter())} if name == "ad" else {}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NEEDS_FTFY])
def test_weights_are_those_that_are_loaded(name: str) -> None:
    launches: list[dict[str, Any]] = [{"variant": "fp16"}]
    if name in ("flux", "sd1", "sd3"):
        launches += [{"quantize_to": "int4"}, {"checkpoint": str(tiny_original.single_file(name))}]
    for more in launches:
        flags = flags_of(name) | more
        plan = plan_of(tiny.config(name, **flags))
        loaded = parameter_bytes(tiny.host(name, **flags))
        assert plan.weights_of(plan.config, 1)[0] == {model: kept for model, (kept, _) in loaded.items()}
        assert plan.need(plan.config).step > 0 and plan.need(plan.config).decode > 0


def test_gguf_and_adapters() -> None:
    files = {
        "gguf_model": str(tiny_original.gguf("flux")),
        "control_net": {str(tiny_extras.control_net("flux")): 1.0},
    }
    plan = plan_of(tiny.config("flux", **files))
    loaded = parameter_bytes(tiny.host("flux", **files))
    found = plan.weights_of(plan.config, 1)[0]
    for model, (kept, _) in loaded.items():
        assert found[model] == pytest.approx(kept, rel=0.02), model


def kept_and_planned(backend: str, name: str, flags: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    config, world, host, latents = launch(backend, name, flags, {"shard_weights": True})
    plan = plan_of(config, world.size)
    engine = host.build_engine(config, world)
    latents(engine)
    kept = {model: sizes["kept"] for model, sizes in engine.parameters.items()}
    engine.close()
    return kept, plan.weights_of(config, world.size)[0]


@pytest.mark.parametrize(
    ("backend", "name", "flags", "within"),
    [
        ("xdit", "flux", {}, 0.02),
        ("xdit", "sd3", {"quantize_to": "int8"}, 0.02),
        ("distrifuser", "sdxl", {"no_split_batch": True}, 0.02),
        ("asyncdiff", "sd1", {}, 0.1),
    ],
)
def test_sharded_on_two_ranks(
    pool: RankPool, backend: str, name: str, flags: dict[str, Any], within: float
) -> None:
    for kept, planned in pool.run(kept_and_planned, 2, backend, name, flags):
        assert kept.keys() == planned.keys()
        for model, size in kept.items():
            assert planned[model] == pytest.approx(size, rel=within), model


def measured(config: HostConfig) -> int:
    """Bytes of parameters, and the most of a step and of decoding, of a picture that is made."""
    pipe = tiny.host(config.type, **{f: getattr(config, f) for f in config.changed(*FLAGS)})
    with PeakBytes() as peak:
        tiny.run(pipe, config.type, size=config.size[0], steps=1)
    return sum(kept for kept, _ in parameter_bytes(pipe).values()) + peak.most


FLAGS = ("width", "height", "variant", "quantize_to", "enable_vae_tiling", "enable_vae_slicing")


@pytest.mark.parametrize(("name", "size", "share"), [("sd1", 64, 0.9), ("sdxl", 256, 0.8), ("sd2", 384, 0.7)])
def test_what_is_advised_is_tried_and_fits(name: str, size: int, share: float) -> None:
    config = tiny.config(name, width=size, height=size)
    whole = measured(config)
    plan = plan_of(config)
    need = plan.need(config)
    assert need.total - need.margin <= whole <= need.total + need.margin
    plan.free = [int(share * (need.total - need.margin))]
    with pytest.raises(UsageError, match=r"each rank needs .* GiB free; it would fit with") as refused:
        plan.fitted()
    fitting = replace(config, fit=True)
    plan.config = fitting
    try:
        chosen = plan.fitted()
    except UsageError:
        sizes = re.findall(r"(\d+)x\d+ \(", str(refused.value).partition("would fit")[2])
        side = int(sizes[0])
        chosen = replace(config, width=side, height=side)
    else:
        assert any(worded(step) in str(refused.value) for step in LADDER)
    assert chosen != fitting and measured(chosen) <= plan.free[0] < whole


def test_near_the_limit_it_warns(caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(tiny.config("sd1"))
    need = plan.need(plan.config)
    plan.free = [need.total]
    assert plan.fitted() is plan.config and "memory may not suffice" in caplog.text
    caplog.clear()
    plan.free = [need.total + need.margin]
    assert plan.fitted() is plan.config and not caplog.text
