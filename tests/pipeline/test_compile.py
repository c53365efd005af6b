"""Compiling really compiles: graphs are counted, and the picture is the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Transformer2DModel
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from shared.launch.errors import UsageError
from shared.models import MODELS
from shared.pipeline import eight_bits
from shared.pipeline.compile import blocks, compile_pipeline, graph_count
from shared.pipeline.graph_pass import GraphPass
from tests import tiny, tiny_extras
from tests.seldom import seldom


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    config = torch._dynamo.config
    kept = config.recompile_limit, config.accumulated_recompile_limit, config.fail_on_recompile_limit_hit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    config.recompile_limit, config.accumulated_recompile_limit, config.fail_on_recompile_limit_hit = kept


@cache
def plain(name: str) -> np.ndarray:
    return tiny.run(tiny.load(name), name)


def compiled(name: str, **flags: Any) -> Any:
    return tiny.host(name, **({"compile_backend": "eager"} | flags))


@pytest.mark.parametrize("name", seldom(sorted(set(MODELS) - {"sd2", "sdup", "pixs"}), ("flux",)))
def test_denoiser(name: str) -> None:
    pipe = compiled(name, compile_unet=True)
    denoiser = getattr(pipe, MODELS[name].denoiser)
    regions = list(blocks(denoiser))
    assert all(hasattr(m.forward, "_torchdynamo_orig_callable") for m in regions)
    inside = sum(p.numel() for m in regions for p in m.parameters())
    share = 0.05 if name == "hv15" else 0.5  # its second text embedder has one width, also in a tiny model
    assert inside > share * sum(p.numel() for p in denoiser.parameters())
    assert graph_count() == 0, "nothing is traced before the first call"
    assert np.abs(tiny.run(pipe, name) - plain(name)).max() < 1e-5
    count = graph_count()
    assert 0 < count < len(regions), "one graph serves several blocks"
    tiny.run(pipe, name, seed=1)
    assert graph_count() == count, "a second picture compiles nothing"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_group_norms_between_blocks_are_compiled() -> None:
    unet = compiled("sdxl", compile_unet=True).unet
    transformers = [m for m in unet.modules() if isinstance(m, Transformer2DModel)]
    norms = [unet.conv_norm_out, *(transformer.norm for transformer in transformers)]
    assert transformers and all(hasattr(norm.forward, "_torchdynamo_orig_callable") for norm in norms)
    inside = [m for block in blocks(unet) for m in block.modules() if isinstance(m, nn.GroupNorm)]
    assert inside and not any(hasattr(norm.forward, "_torchdynamo_orig_callable") for norm in inside)


@pytest.mark.parametrize("name", seldom(("sd1", "svd"), ("sd1",)))
def test_vae(name: str) -> None:
    pipe = compiled(name, compile_vae=True)
    made = tiny.run(pipe, name)
    assert graph_count() > 0 and np.abs(made - plain(name)).max() < 1e-5


@pytest.mark.parametrize("name", seldom(("sd1", "sd3", "hy"), ("hy",)))  # CLIP; with T5; BERT and mT5
def test_text_encoders(name: str) -> None:
    pipe = compiled(name, compile_text_encoder=True)
    made = tiny.run(pipe, name)
    assert graph_count() >= len(MODELS[name].text_encoders) and np.abs(made - plain(name)).max() < 1e-5
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "whole_blocks"), [("qwen", True), ("pixa", True), ("pixa", False)])
def test_inductor_and_mode(name: str, whole_blocks: bool) -> None:
    pipe = tiny.load(name)
    flags = tiny.config(name, compile_unet=True, compile_backend="inductor", compile_mode="default")
    compile_pipeline(pipe, MODELS[name], flags, whole_blocks)
    assert np.abs(tiny.run(pipe, name) - plain(name)).max() < 1e-3 and graph_count() > 0


def test_backend_options_and_fullgraph_reach_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def noting(forward: Any, **arguments: Any) -> Any:
        seen.append(arguments)
        return forward

    monkeypatch.setattr(torch, "compile", noting)
    options = {"compile_options": {"max_autotune": True}, "compile_fullgraph_off": True}
    compile_pipeline(
        tiny.load("pixa"),
        MODELS["pixa"],
        tiny.config("pixa", compile_unet=True, compile_backend="x", **options),
    )
    assert seen and seen[0] == {
        "fullgraph": False,
        "dynamic": False,
        "backend": "x",
        "options": {"max_autotune": True},
    }
    seen.clear()
    flags = tiny.config("pixa", compile_vae=True, compile_mode="max-autotune")
    assert compile_pipeline(tiny.load("pixa"), MODELS["pixa"], flags) == {"vae": 2}
    assert seen[0] == {"fullgraph": True, "dynamic": False, "mode": "max-autotune"}
    # Steps are captured whole: inductor's own CUDA graphs of their regions are left out.
    seen.clear()
    flags = tiny.config("pixa", compile_unet=True, compile_mode="reduce-overhead")
    compile_pipeline(tiny.load("pixa"), MODELS["pixa"], flags)
    assert seen and {arguments["mode"] for arguments in seen} == {"default"}


def test_parts_of_blocks_for_methods_that_work_inside_them() -> None:
    pipe = tiny.load("sdxl")
    flags = tiny.config("sdxl", compile_unet=True, compile_backend="eager")
    count = compile_pipeline(pipe, MODELS["sdxl"], flags, whole_blocks=False)["unet"]
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    assert count > 0 and "forward" in vars(block.ff) and "forward" not in vars(block)
    assert np.abs(tiny.run(pipe, "sdxl") - plain("sdxl")).max() < 1e-5 and graph_count() > 0


@pytest.mark.slow
def test_with_lora_quantization_control_net_and_ip_adapter() -> None:
    from shared.pipeline.adapters import ip_arguments
    from shared.pipeline.control_nets import control_arguments

    features: dict[str, Any] = {
        "lora": {str(tiny_extras.lora("sdxl")): 0.8},
        "control_net": {str(tiny_extras.control_net("sdxl")): 1.0},
        "ip_adapter": {str(tiny_extras.ip_adapter("sdxl")): 0.7},
        "quantize_to": "int8",
    }

    def made(pipe: Any) -> np.ndarray:
        image = tiny.picture(64, 1)
        arguments = control_arguments(MODELS["sdxl"], features["control_net"], [image])
        return tiny.run(
            pipe, "sdxl", **arguments, **ip_arguments(pipe, MODELS["sdxl"], features["ip_adapter"], [image])
        )

    eager = made(tiny.host("sdxl", **features))
    pipe = compiled("sdxl", compile_unet=True, **features)
    assert np.abs(made(pipe) - eager).max() < 1e-4
    assert "controlnet" in pipe.components and graph_count() > 0
    assert "--compile_unet" in pipe.lora_set.frozen or "--quantize_to" in pipe.lora_set.frozen


def test_another_size_is_another_graph_not_eager() -> None:
    pipe = compiled("pixa", compile_unet=True)
    counts = []
    for size in (64, 96):
        expected = tiny.run(tiny.load("pixa"), "pixa", size=size)
        assert np.abs(tiny.run(pipe, "pixa", size=size) - expected).max() < 1e-5
        counts.append(graph_count())
    assert counts[0] < counts[1]
    assert torch._dynamo.config.fail_on_recompile_limit_hit and torch._dynamo.config.recompile_limit >= 64


def test_broken_backend_is_an_error_not_eager() -> None:
    with pytest.raises(UsageError, match="nosuch"):
        tiny.run(compiled("pixa", compile_unet=True, compile_backend="nosuch"), "pixa")


def test_8_bits_are_made_once_of_one_input() -> None:
    layers = [nn.Linear(32, 16, dtype=torch.bfloat16) for _ in range(3)]
    for layer in layers:
        eight_bits.quantize_layer(layer, "float8")
    x = torch.randn(20, 32, dtype=torch.bfloat16)

    def largest(graph: torch.fx.Graph) -> int:
        return sum(node.target is torch.ops.aten.amax.default for node in graph.nodes)

    with torch.no_grad():
        traced = make_fx(lambda x: [layer(x) for layer in layers])(x)
        assert largest(traced.graph) == 3
        GraphPass()(traced.graph)
        assert largest(traced.graph) == 1
        assert all(map(torch.equal, traced(x), [layer(x) for layer in layers]))


@pytest.mark.parametrize("shape", [(1, 6, 3, 4, 2), (2, 6, 3, 4, 2)])
def test_complex_products_are_written_in_real_numbers(shape: tuple[int, ...]) -> None:
    pairs, angles = torch.randn(shape), torch.rand(6, 1, 4)
    by = torch.polar(torch.ones_like(angles), angles)

    def rotate(pairs: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(pairs) * by).flatten(3)

    traced = make_fx(rotate, tracing_mode="fake")(pairs, by)
    GraphPass()(traced.graph)
    assert torch.ops.aten.view_as_complex.default not in {node.target for node in traced.graph.nodes}
    torch.testing.assert_close(traced(pairs, by), rotate(pairs, by))


def test_other_complex_products_stay_as_they_are() -> None:
    pairs, by = torch.randn(3, 4, 2), torch.randn(3, 4)

    def scale(pairs: torch.Tensor, by: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = torch.view_as_complex(pairs)
        return torch.view_as_real(made * 2.0), torch.view_as_real(made * by), torch.view_as_real(made + made)

    traced = make_fx(scale, tracing_mode="fake")(pairs, by)
    GraphPass()(traced.graph)
    assert all(map(torch.equal, traced(pairs, by), scale(pairs, by)))


def test_gelu_has_no_tanh() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")

    decompositions = select_decomp_table()
    traced = make_fx(gelu, decompositions, tracing_mode="fake")(x)
    assert torch.ops.aten.tanh.default in {node.target for node in traced.graph.nodes}
    GraphPass()(traced.graph)
    assert torch.ops.aten.tanh.default not in {node.target for node in traced.graph.nodes}
    torch.testing.assert_close(traced(x), gelu(x), rtol=1e-12, atol=1e-15)


def test_inductor_makes_code_of_what_the_pass_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config, "joint_custom_post_pass", GraphPass())
    rows, angles = torch.randn(1, 6, 3, 8), torch.rand(6, 4)
    by = torch.polar(torch.ones_like(angles), angles)

    def work(rows: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(F.rms_norm(rows, (8,)).unflatten(-1, (-1, 2)))
        return F.gelu(torch.view_as_real(pairs * by.unsqueeze(1)).flatten(3), approximate="tanh")

    with torch.no_grad():
        made, (code,) = run_and_get_code(torch.compile(work), rows, by)
    torch.testing.assert_close(made, work(rows, by))
    assert "view_as_real.default" in code and "view_as_complex.default" not in code and "tanh(" not in code


def test_graphs_of_a_launch_compute_nothing_twice() -> None:
    compiled("flux", compile_unet=True)
    passed = torch._inductor.config.joint_custom_post_pass
    assert isinstance(passed, CustomGraphPass) and passed.uuid() == GraphPass().uuid()
