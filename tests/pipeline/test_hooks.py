"""shared.pipeline.hooks: models are searched for hooks once, and what is found is what diffusers finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading, group_offloading
from diffusers.models import modeling_utils
from torch import nn

from shared.api.requests import GenerateRequest
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.hooks import KnownHooks
from tests import tiny

FEW = 30


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """Counts the modules that a call goes through."""
    count = 0
    inner = nn.Module.named_modules

    def named_modules(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        for one in inner(self, *args, **kwargs):
            count += 1
            yield one

    def counted(call: Callable[[], Any]) -> int:
        nonlocal count
        count = 0
        call()
        return count

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    return counted


@pytest.mark.parametrize("what", ["_execution_device", "device"])
def test_a_pipeline_is_searched_once_for_its_device(what: str, visited: Any) -> None:
    pipe, hooks = tiny.load("sd1"), KnownHooks()
    wanted = getattr(pipe, what)
    many = visited(lambda: getattr(pipe, what))
    with hooks.known():
        assert getattr(pipe, what) == wanted
        assert visited(lambda: getattr(pipe, what)) < FEW < many
    with hooks.known():  # the next generation
        assert visited(lambda: getattr(pipe, what)) < FEW
    assert visited(lambda: getattr(pipe, what)) == many


def test_a_models_dtype_is_found_without_a_search_and_follows_its_weights(visited: Any) -> None:
    unet = tiny.load("sd1").unet
    many = visited(lambda: unet.dtype)
    with KnownHooks().known():
        assert unet.dtype == torch.float32
        assert visited(lambda: unet.dtype) < FEW < many
        assert unet.to(torch.float16).dtype == torch.float16
        unet._keep_in_fp32_modules = ["conv_in"]
        unet.conv_in.float()
        assert unet.dtype == torch.float16


def test_hooks_are_found_as_diffusers_finds_them() -> None:
    unet, hooks = tiny.load("sd1").unet, KnownHooks()
    unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.bfloat16)
    apply_group_offloading(unet, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert unet.dtype == torch.bfloat16
    found = group_offloading._get_top_level_group_offload_hook(unet)
    with hooks.known():
        for _ in range(2):
            assert unet.dtype == torch.bfloat16
            assert group_offloading._get_top_level_group_offload_hook(unet) is found is not None
            with pytest.raises(ValueError, match="not enabled"):
                group_offloading._get_group_onload_device(nn.Linear(1, 1))


def test_an_engine_does_not_search_its_models_in_later_generations(visited: Any) -> None:
    pipe = tiny.load("sd1")
    engine = PipelineEngine(pipe, tiny.config("sd1"), tiny.world())
    request = GenerateRequest.model_construct(positive="a cat", steps=1, output_format="latent")
    before = group_offloading._get_top_level_group_offload_hook, modeling_utils.get_parameter_dtype
    seen = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append((visited(lambda: pipe._execution_device), visited(lambda: pipe.unet.dtype)))
        return (torch.zeros_like(args[0]),)

    pipe.unet.forward = forward
    for _ in range(2):
        engine.generate(request.filled(engine.config), lambda step, steps: None)
    assert len(seen) == 2
    assert max(seen[1]) < FEW
    assert (
        group_offloading._get_top_level_group_offload_hook,
        modeling_utils.get_parameter_dtype,
    ) == before
