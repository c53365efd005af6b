"""What --preset means for each backend: flags by type, number of ranks and what is given. Imports no torch.

The figures behind it are in docs/MEASURED.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from shared.models import ModelSpec

Presets = Mapping[str, Mapping[str, Any]]
"""fast, balanced and exact, each as flags by name."""

ALL = 1000
"""Exact steps: more than any schedule has."""
ALONE: Presets = {"fast": {}, "balanced": {}, "exact": {}}
STAGES: dict[str, Mapping[str, Any]] = {
    "fast": {"warm_up_steps": 3},
    "balanced": {"warm_up_steps": 10},
    "exact": {"warm_up_steps": ALL},
}
"""Of ranks that use stale activations after some exact steps."""
PIPES = STAGES | {"fast": {"warm_up_steps": 1}, "balanced": {"warm_up_steps": 3}}
"""Of PipeFusion, which more exact steps make slower and no closer."""


def asyncdiff(spec: ModelSpec, ranks: int, given: Collection[str]) -> Presets:
    """Two ranks take a guidance branch each, and share one of them in some of the steps.

    More ranks, and two where flags of stages or sharding are given, are stages after some exact steps.
    """
    if ranks == 1:
        return ALONE
    own = {"model_n", "stride", "stage_weights", "auto_balance", "shard_weights"} & set(given)
    if ranks == 2 and not own:
        split: dict[str, Any] = {"use_cfg_parallel": True}
        return {
            "fast": split | {"async_steps": "auto"},
            "balanced": split | {"warm_up_steps": 15, "async_steps": 4},
            "exact": split,
        }
    halves: dict[str, Any] = {} if ranks % 2 or own else {"use_cfg_parallel": True}
    return {name: {**halves, **flags} for name, flags in STAGES.items()}


def distrifuser(spec: ModelSpec, ranks: int, given: Collection[str]) -> Presets:
    """Patches that wait for each other, or use stale ones after some steps."""
    if ranks == 1 or "parallelism" in given:
        return ALONE
    return {**STAGES, "exact": {"sync_mode": "full_sync"}}


def xdit(spec: ModelSpec, ranks: int, given: Collection[str], cached: bool) -> Presets:
    """Sharing tokens is exact; over a slow link they may travel in 8 bits, and a step cache leaves steps out.

    Args:
        cached: whether the type has a step cache.
    """
    if "pipefusion_parallel_degree" in given:
        return PIPES
    cached = cached and not {"step_cache", "use_teacache"} & set(given)
    both = {"ulysses_degree", "ring_degree"} <= set(given)
    slow: dict[str, Any] = {} if ranks == 1 or both else {"exchange_dtype": "auto"}
    return {"fast": slow | ({"use_fbcache": True} if cached else {}), "balanced": slow, "exact": {}}
