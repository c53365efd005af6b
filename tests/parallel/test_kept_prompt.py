"""shared.parallel.kept_prompt: a prompt's keys and values are made once, and make the plain picture."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from shared.models import MODELS
from shared.parallel.asyncdiff import AsyncDiff
from shared.parallel.cfg_split import CfgSplit, HybridSplit
from shared.parallel.chosen_steps import Pace
from shared.parallel.kept_prompt import KeptPrompt
from shared.pipeline.lora import loras_of
from tests import tiny, tiny_extras
from tests.parallel.test_asyncdiff import pipeline, psnr
from tests.pool import RankPool
from tests.seldom import seldom

STEPS = 4
TYPES = [name for name, spec in MODELS.items() if spec.attends_to_prompt]


def counting(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each linear layer is called from now on, by its id."""
    calls: Counter[int] = Counter()
    inner = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        calls[id(self)] += 1
        return inner(self, input)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return calls


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each linear layer is called."""
    return counting(monkeypatch)


def drawn(name: str, *parts: Any, **changes: Any) -> np.ndarray:
    for part in parts:
        part.begin(STEPS)
    return tiny.run(pipeline(name), name, **({"steps": STEPS, "frames": 2} | changes))


@pytest.mark.parametrize("name", seldom(TYPES, ("sd1", "sdxl")))
def test_keys_and_values_are_made_once_a_prompt(name: str, counted: Counter[int]) -> None:
    pipe = pipeline(name)
    plain = [drawn(name, prompt=prompt) for prompt in ("a cat", "a dog", "a cat")]
    attentions = [m for m in pipe.unet.modules() if getattr(m, "is_cross_attention", False)]
    layers = [id(layer) for one in attentions for layer in (one.to_k, one.to_v)]
    with AsyncDiff(pipe, 1) as method, KeptPrompt(pipe.unet) as kept:
        assert kept.layers == len(layers) > 0
        for prompt, wanted in zip(("a cat", "a dog", "a cat"), plain, strict=True):
            counted.clear()
            assert np.array_equal(drawn(name, method, kept, prompt=prompt), wanted)
            assert {counted[layer] for layer in layers} == {1}
    assert not np.array_equal(plain[0], plain[1])
    assert np.array_equal(drawn(name, prompt="a cat"), plain[0])
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_a_prompt_that_changes_within_a_generation_is_made_again() -> None:
    pipe = pipeline("sd1")
    width = pipe.unet.config.cross_attention_dim
    x, t = torch.zeros(1, 4, 8, 8), torch.tensor(5)
    first, second = torch.randn(1, 4, width), torch.randn(1, 6, width)

    def made(prompt: torch.Tensor) -> torch.Tensor:
        return pipe.unet(x, t, prompt, return_dict=False)[0]

    with torch.no_grad():
        wanted = [made(prompt) for prompt in (first, second, first + 1)]
        with KeptPrompt(pipe.unet) as kept:
            kept.begin(STEPS)
            for _ in range(2):
                assert torch.equal(made(first), wanted[0])
                assert torch.equal(made(second), wanted[1])
            assert torch.equal(made(first.add_(1)), wanted[2])


def test_a_unet_that_uses_its_prompt_in_another_way_is_left_as_it_is() -> None:
    pipe = pipeline("sdup")  # some of its blocks attend to the prompt alone
    plain = drawn("sdup")
    pipe.unet.config["encoder_hid_dim_type"], before = (
        "text_proj",
        pipe.unet.config.get("encoder_hid_dim_type"),
    )
    try:
        with KeptPrompt(pipe.unet) as kept:
            assert kept.layers == 0
            assert np.array_equal(drawn("sdup", kept), plain)
    finally:
        pipe.unet.config["encoder_hid_dim_type"] = before


def _branches(system: str) -> tuple[np.ndarray, np.ndarray]:
    """The picture of two ranks with the prompt's keys and values made in each step, and made once."""
    pipe, pictures = pipeline("sdxl"), []
    for keeps in (False, True):
        pace = Pace(2, 3)
        stages = AsyncDiff(pipe, 2, pace=pace, notes=False, leader=1) if system == "hybrid" else None
        method = stages or AsyncDiff(pipe, 1, group=dist.new_subgroups(1)[0])
        kept = [KeptPrompt(pipe.unet)] if keeps else []
        rank = dist.get_rank()
        if stages is not None:
            split: Any = HybridSplit([pipe.unet], None, rank, stages.asynchronous, pace=pace)
        else:
            split = CfgSplit([pipe.unet], None, rank)
        held = [method, *kept, split]
        for _ in range(2):
            for part in held:
                part.begin(6)
            picture = tiny.run(pipe, "sdxl", steps=6)
        pictures.append(picture)
        for part in reversed(held):
            part.close()
    return pictures[0], pictures[1]


@pytest.mark.parametrize(("system", "least"), [("cfg", 120), ("hybrid", 60)])
def test_two_ranks_with_a_branch_each_make_what_they_made(pool: RankPool, system: str, least: float) -> None:
    """In the hybrid a rank goes from one branch to the other, and its stages are cut by what is left."""
    for remade, kept in pool.run(_branches, 2, system):
        assert psnr(kept, remade) >= least


def test_a_scale_that_changes_between_generations_is_in_them() -> None:
    pipe = tiny.host("sd1", lora={str(tiny_extras.lora("sd1")): 1.0})
    loras = loras_of(pipe, MODELS["sd1"])
    (path,) = loras.loaded
    with KeptPrompt(pipe.unet) as kept:
        prompt = torch.randn(1, 4, pipe.unet.config.cross_attention_dim)  # kept from one to the other
        x, t = torch.zeros(1, 4, 8, 8), torch.tensor(5)

        def made(scale: float) -> torch.Tensor:
            loras.set_scales({path: scale})
            kept.begin(1)
            with torch.no_grad():
                return pipe.unet(x, t, prompt, return_dict=False)[0]

        both = [made(scale) for scale in (1.0, 0.2)]
    wanted = []
    for scale in (1.0, 0.2):
        loras.set_scales({path: scale})
        with torch.no_grad():
            wanted.append(pipe.unet(x, t, prompt, return_dict=False)[0])
    assert not torch.equal(*wanted)
    assert all(torch.equal(one, other) for one, other in zip(both, wanted, strict=True))
