"""shared.parallel.asyncdiff.trace and partition: units of any denoiser, counted and divided."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from optimum.quanto import freeze, qint8, quantize
from torch.utils.flop_counter import FlopCounterMode

from shared.parallel.asyncdiff.partition import SPREAD, Partition, partition
from shared.parallel.asyncdiff.trace import SAMPLE, Call, Leaf, Trace, Value, parameter_names, trace
from tests import tiny
from tests.seldom import seldom

TYPES = ("sd1", "sd2", "sdxl", "sd3", "sdup", "svd", "ad")


class Enough(Exception):
    """Raised to leave a pipeline once its first call of the denoiser is known."""


def first_call(pipe: Any, name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The denoiser and the arguments, by name, of the pipeline's first call of it."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    calls: list[dict[str, Any]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(dict(zip(parameter_names(denoiser), args, strict=False)) | kwargs)
        raise Enough

    denoiser.forward = forward
    with pytest.raises(Enough):
        tiny.run(pipe, name)
    del denoiser.forward
    return denoiser, calls[0]


@functools.cache
def traced(name: str) -> tuple[torch.nn.Module, dict[str, Any], Trace]:
    denoiser, kwargs = first_call(tiny.load(name), name)
    return denoiser, kwargs, trace(denoiser, kwargs)[0]


def chain(costs: list[int], sizes: list[int] | None = None) -> Trace:
    """Units in a row, each with one output of ``sizes[i]`` bytes."""
    sizes = sizes or [1] * len(costs)
    calls = [Call("", 0, False, inside=list(range(1, len(costs) + 1)))]
    values = []
    for i, cost in enumerate(costs, 1):
        calls.append(Call(f"unit{i}", 0, True, inputs=frozenset({i - 2 if i > 1 else SAMPLE}), flops=cost))
        values.append(Value(i, i, frozenset(), (sizes[i - 1],), (1,), torch.uint8))
    calls[0].outputs = [Leaf("value", len(costs) - 1)]
    return Trace(calls, values, list(range(1, len(costs) + 1)))


@pytest.mark.parametrize("name", TYPES)
def test_trace_of_every_type(name: str) -> None:
    denoiser, kwargs, found = traced(name)
    text = repr(denoiser)
    with torch.no_grad():
        plain = denoiser(**kwargs)[0]
    again, out = trace(denoiser, kwargs)
    assert torch.equal(out[0], plain) and repr(denoiser) == text
    assert not any("forward" in module.__dict__ for module in denoiser.modules())
    assert again.as_dict() == found.as_dict()
    json.dumps(found.as_dict())

    # Nearly all of the work is in units, none counted twice, and no embedding is a unit.
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        denoiser(**kwargs)
    assert 0.95 * counter.get_total_flops() <= sum(found.flops) <= counter.get_total_flops()
    labels = list(found.as_dict())
    assert len(set(labels)) == len(labels)
    assert not any("time_embed" in label or "add_embed" in label or "context" in label for label in labels)
    names = {n for n, _ in denoiser.named_modules()}
    assert set(labels) <= names


def test_data_flow_has_the_skip_connections() -> None:
    units = traced("sd1")[2].as_dict()
    assert units["conv_in"]["from"] == ["sample"]
    assert units["up_blocks.1.resnets.2"]["from"] == ["conv_in", "up_blocks.1.attentions.1"]
    assert units["up_blocks.0.resnets.0"]["from"] == ["down_blocks.1.resnets.1", "mid_block.resnets.1"]
    assert units["mid_block.attentions.0.norm"]["from"] == ["mid_block.resnets.0"]
    assert units["conv_in"]["bytes"] == 2 * 32 * 8 * 8 * 4
    blocks = traced("sd3")[2].as_dict()
    assert blocks["transformer_blocks.1"]["from"] == ["transformer_blocks.0"]


def test_quantized_products_are_counted() -> None:
    denoiser, kwargs = first_call(tiny.load("sd1"), "sd1")
    plain = trace(denoiser, kwargs)[0]
    quantize(denoiser, weights=qint8)
    freeze(denoiser)
    assert sum(trace(denoiser, kwargs)[0].flops) == pytest.approx(sum(plain.flops), rel=0.02)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_stages_cover_all_units_and_close_over_their_data(name: str, n: int) -> None:
    found = traced(name)[2]
    made = partition(found, n)
    assert sorted(itertools.chain(*made.stages)) == list(range(len(found.units)))
    assert len(found.units) - 1 in made.stages[-1]
    segments = [list(stage) for stage in made.stages]
    head = segments[-1][: segments[-1].index(max(made.stages[-2]) + 1)] if n > 1 else []
    assert list(itertools.chain(head, *segments[:-1], segments[-1][len(head) :])) == list(
        range(len(found.units))
    )
    for stage, view in enumerate(made.views):
        assert all(owner != stage for owner in view.needs.values())
        for value, owner in view.needs.items():
            assert stage in made.views[owner].gives[value]
    assert made.nbytes == sum(found.values[v].nbytes for view in made.views for v in view.needs)
    assert (made.nbytes == 0) == (n == 1)
    summary = made.as_dict()
    json.dumps(summary)
    assert sum(stage["share"] for stage in summary["stages"]) == pytest.approx(1, abs=1e-3)
    assert str(made).count("\n") == n - 1


def real_size(kind: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The UNet of SD 1.5, SD 2.1 or SDXL on the meta device, and a call of it at the native size."""
    settings: dict[str, Any] = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
    size, added = 64, None
    if kind == "sd2":
        settings |= {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
        settings |= {"use_linear_projection": True}
        size = 96
    if kind == "sdxl":
        settings = {
            "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }  # fmt: skip
        size = 128
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=size, **settings)
        if kind == "sdxl":
            added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        kwargs = {
            "sample": torch.empty(2, 4, size, size),
            "timestep": torch.empty(()),
            "encoder_hidden_states": torch.empty(2, 77, settings["cross_attention_dim"]),
            "added_cond_kwargs": added,
        }
    return unet, kwargs


@pytest.mark.parametrize("kind", seldom(("sd1", "sd2", "sdxl"), ("sd1", "sdxl")))
def test_real_unets_divide_evenly(kind: str) -> None:
    found = trace(*real_size(kind))[0]
    # TFLOP for one picture; 0.40 T multiply-adds are what others count for SD 1.5 at 512 pixels.
    assert sum(found.flops) / 2e12 == pytest.approx({"sd1": 0.8, "sd2": 2.15, "sdxl": 6.76}[kind], rel=0.02)
    for n in (2, 3, 4):
        made = partition(found, n)
        assert made.spread <= SPREAD
        assert max(made.loads) <= 1.03 * sum(found.flops) / n + max(found.flops)
    nested = partition(found, 2)
    assert nested.names(1)[0] == "conv_in" and nested.names(1)[-1] == "conv_out"
    everything = sum(value.nbytes for value in found.values)
    assert nested.nbytes < 0.02 * everything


LOADS = [("sd1", 2, 0.52), ("sdxl", 2, 0.52), ("sdxl", 4, 0.38)]


@pytest.mark.parametrize(("kind", "n", "load"), seldom(LOADS, LOADS[::2]))
def test_stages_that_hold_equal_weights(kind: str, n: int, load: float) -> None:
    """By FLOPs alone one stage of two holds 69 % of SDXL's weights, and 93 % of SD 1.5's."""
    unet, kwargs = real_size(kind)
    found = trace(unet, kwargs)[0]
    names = [found.calls[index].name for index in found.units]
    held = [sum(p.numel() for p in unet.get_submodule(name).parameters()) for name in names]

    def heaviest(made: Partition) -> float:
        return max(sum(held[unit] for unit in units) for units in made.stages) / sum(held)

    equal = partition(found, n, held=held)
    assert heaviest(equal) <= 1.06 / n < heaviest(partition(found, n))
    assert max(equal.loads) / sum(equal.loads) <= load
    flat = [stage for unit in range(len(names)) for stage in range(n) if unit in equal.stages[stage]]
    assert partition(found, n, assignment=flat) == equal


def test_weights_and_costs_move_the_cuts() -> None:
    found = trace(*real_size("sd1"))[0]
    total = sum(found.flops)

    def shares(made: Partition) -> list[float]:
        return [sum(found.flops[u] for u in units) / total for units in made.stages]

    assert shares(partition(found, 2, [1, 3])) == pytest.approx([0.25, 0.75], abs=0.02)
    assert shares(partition(found, 3, [2, 1, 1])) == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    dear = [10 * f if i < 20 else f for i, f in enumerate(found.flops)]
    moved = partition(found, 2, costs=dear)
    assert shares(moved) != shares(partition(found, 2)) and moved.spread <= SPREAD


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [2, 3])
def test_against_all_partitions(seed: int, n: int) -> None:
    draw = np.random.default_rng(seed)
    costs = [int(c) for c in draw.integers(0, 100, 12)]
    weights = [1.0, 2.0, 1.0][:n]
    share = [w * n / sum(weights) for w in weights]
    every = []
    for starts in itertools.combinations(range(12), n):
        parts = [costs[a:b] for a, b in itertools.pairwise((*starts, 12))]
        parts[-1] += costs[: starts[0]]
        every.append(max(sum(part) / w for part, w in zip(parts, share, strict=True)))
    made = partition(chain(costs), n, weights, slack=0.0)
    assert max(made.loads) == pytest.approx(min(every))


def test_equal_balance_takes_the_cheaper_cut() -> None:
    costs = [1, 1, 1, 1, 0, 0]
    made = partition(chain(costs, [5, 2, 5, 5, 5, 5]), 2)
    assert made.stages == ((0, 1), (2, 3, 4, 5)) and made.nbytes == 2
    made = partition(chain(costs, [1, 9, 3, 5, 5, 5]), 2)
    assert made.stages == ((1, 2), (0, 3, 4, 5)) and made.nbytes == 1 + 3


@pytest.mark.parametrize(
    ("n", "settings", "problem"),
    [
        (4, {}, "must be 1 to 3, the number of units; got 4"),
        (0, {}, "must be 1 to 3, the number of units; got 0"),
        (2, {"weights": [1, 2, 3]}, "must be 2 numbers above 0"),
        (2, {"weights": [1, 0]}, r"above 0; got \[1, 0\]"),
        (2, {"costs": [1, 2]}, "costs must hold 3 numbers of 0 or more"),
        (2, {"costs": [1, 2, -1]}, "costs must hold 3 numbers of 0 or more"),
    ],
)
def test_impossible_divisions_are_refused(n: int, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        partition(chain([1, 2, 3]), n, **settings)


def test_module_compile_is_refused_with_advice() -> None:
    denoiser, kwargs = first_call(tiny.load("sd1"), "sd1")
    denoiser.get_submodule("mid_block.resnets.0").compile()
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0 was compiled with module\.compile"):
        trace(denoiser, kwargs)
