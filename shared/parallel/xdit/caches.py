"""Step caches: skip the blocks in steps in which little changes. An approximation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shared.models import Cache, TokenPlan
from shared.parallel.method import Part
from shared.parallel.pipeline import Pipeline, model_of
from shared.parallel.surgery import Forward, Surgery
from shared.parallel.xdit.sequence import blocks_of

THRESHOLDS: dict[Cache, float] = {"teacache": 0.25, "fbcache": 0.12}
"""Relative change below which a step's blocks are skipped, as TeaCache's paper (arXiv 2411.19108, for 1.5
times the speed) and ParaAttention take it. xfuser's own for TeaCache is 0.12, which its polynomial for FLUX
never falls below: no step would be skipped."""


class StepCache(Part):
    """Skips blocks of a transformer, reset in each generation; each guidance branch has its own cache.

    A pipeline that does not name its branches by `cache_context` has one for each text that it gives.

    Args:
        transformer: of a pipeline.
        plan: its token plan.
        threshold: relative change below which a step's blocks are skipped; 0 computes all.
    """

    kind: Cache

    def __init__(self, transformer: Any, plan: TokenPlan, threshold: float) -> None:
        super().__init__()
        self.transformer, self.tokens, self.threshold = transformer, plan, threshold
        self.computed_blocks = 0
        """Blocks that this rank has computed since ``begin``."""
        self.surgery = self.held.enter_context(Surgery())
        self._named = False
        self._texts: list[Any] = []
        self._name = self.surgery.replace(transformer, "cache_context", self._branch)
        self.surgery.override(transformer, self._in_a_branch)
        for block in blocks_of(transformer, plan):
            self.surgery.override(block, self._counted)

    def begin(self, steps: int, pictures: int = 1) -> None:
        super().begin(steps, pictures)
        self.computed_blocks = 0
        self._texts = []

    @contextlib.contextmanager
    def _branch(self, name: str, **settings: Any) -> Iterator[None]:
        """What the pipeline enters around its calls of a guidance branch."""
        self._named = True
        try:
            with self._name(name, **settings):
                yield
        finally:
            self._named = False

    def _in_a_branch(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        if self._named:
            return original(*args, **kwargs)
        text = kwargs["encoder_hidden_states"]  # the same object in every step
        if not any(known is text for known in self._texts):
            self._texts.append(text)
        place = next(i for i, known in enumerate(self._texts) if known is text)
        with self._branch(f"text {place}"):
            return original(*args, **kwargs)

    def _counted(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        self.computed_blocks += 1
        return original(*args, **kwargs)


class FirstBlockCache(StepCache):
    """diffusers' First Block Cache: the first block's residual shows how much has changed.

    Args:
        group: ranks that share the sequence, which decide together; None: this rank has all of it.
        Others as in StepCache.
    """

    kind = "fbcache"

    def __init__(
        self, transformer: Any, plan: TokenPlan, threshold: float, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__(transformer, plan, threshold)
        from diffusers import FirstBlockCacheConfig
        from diffusers.hooks import HookRegistry
        from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK

        self.group = group
        transformer.enable_cache(FirstBlockCacheConfig(threshold))
        self.held.callback(transformer.disable_cache)
        first = HookRegistry.check_if_exists_or_initialize(blocks_of(transformer, plan)[0])
        self._hook: Any = first.get_hook(_FBC_LEADER_BLOCK_HOOK)
        self.surgery.replace(self._hook, "_should_compute_remaining_blocks", self._has_changed)

    def begin(self, steps: int, pictures: int = 1) -> None:
        super().begin(steps, pictures)
        self.transformer._reset_stateful_cache()

    def _has_changed(self, residual: torch.Tensor) -> bool:
        """What the hook asks, for the tokens of all ranks."""
        before = self._hook.state_manager.get_state().head_block_residual
        if before is None:
            return True
        change = torch.stack([(residual - before).abs().mean(), before.abs().mean()]).float()
        if self.group is not None:  # ranks have equally many tokens
            dist.all_reduce(change, group=self.group)
        return bool(change[0] / change[1] > self.threshold)


class TeaCache(StepCache):
    """xfuser's TeaCache: the modulated input of the first block shows how much has changed.

    Args:
        pipeline: of the transformer.
        device: of this rank.
        Others as in StepCache.
    """

    kind = "teacache"

    def __init__(self, pipeline: Pipeline, plan: TokenPlan, threshold: float, device: torch.device) -> None:
        super().__init__(model_of(pipeline, "transformer"), plan, threshold)
        self.pipeline, self.device = pipeline, device
        self._plain = self._taken()
        self.held.callback(self._put, self._plain)
        self._caches: dict[str, dict[str, nn.ModuleList]] = {}

    def begin(self, steps: int, pictures: int = 1) -> None:
        """Fresh caches: xfuser's keep residuals, and count steps, from one generation to the next."""
        super().begin(steps, pictures)
        self._caches = {}

    def _new(self) -> dict[str, nn.ModuleList]:
        from xfuser.model_executor.cache import apply_cache

        self._put(self._plain)
        preset = {"residual_diff_threshold": self.threshold}
        apply_cache("teacache", self.check_begun(), self.pipeline, self.transformer, preset)
        cached = blocks_of(self.transformer, self.tokens)[0]
        blocks = {module for group in self._plain.values() for module in group.modules()}
        for module in set(cached.modules()) - blocks:
            # xfuser puts its numbers on the first GPU.
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        return self._taken()

    @contextlib.contextmanager
    def _branch(self, name: str, **settings: Any) -> Iterator[None]:
        before = self._taken()
        if name not in self._caches:
            self._caches[name] = self._new()
        self._put(self._caches[name])
        try:
            with super()._branch(name, **settings):
                yield
        finally:
            self._put(before)

    def _taken(self) -> dict[str, nn.ModuleList]:
        return {name: getattr(self.transformer, name) for name in self.tokens.blocks}

    def _put(self, blocks: dict[str, nn.ModuleList]) -> None:
        for name, group in blocks.items():
            setattr(self.transformer, name, group)


def step_cache(
    kind: Cache,
    pipeline: Pipeline,
    plan: TokenPlan,
    threshold: float | None,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> StepCache:
    """A step cache of this kind on a pipeline's transformer.

    Args:
        plan: the transformer's.
        threshold: as in StepCache; None takes THRESHOLDS.
        device: of this rank.
        group: ranks that share the sequence, if it is shared.
    """
    limit = THRESHOLDS[kind] if threshold is None else threshold
    if kind == "teacache":
        return TeaCache(pipeline, plan, limit, device)
    return FirstBlockCache(model_of(pipeline, "transformer"), plan, limit, group)
