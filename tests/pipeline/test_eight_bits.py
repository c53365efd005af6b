"""Eight bits that compute in eight bits: products, layers, devices, and every split of the work."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shared.backends import BACKENDS
from shared.launch.file_header import CONFIGS
from shared.launch.flags import COMPUTED
from shared.models import MODELS
from shared.pipeline import eight_bits, memory_plan, quantize
from shared.pipeline.eight_bits import EightBitLinear, computing_layers
from shared.pipeline.sharding import parameter_bytes
from shared.pipeline.unloaded import Stored, stored
from shared.ranks.channel import Channel
from shared.ranks.groups import World, make_groups
from tests import tiny, tiny_extras
from tests.parallel.test_sharded import sharded
from tests.parallel.test_xdit import feature_cell
from tests.pipeline.test_memory_plan import plan_of
from tests.pool import RankPool
from tests.test_matrix import psnr

CUDA = torch.device("cuda", 0)


@pytest.fixture
def small_layers_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eight_bits, "LEAST", 1)
        yield


def layer_of(kind: str, dtype: torch.dtype) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(3)
    plain = nn.Linear(64, 48, dtype=dtype).requires_grad_(False)
    made = nn.Linear(64, 48, dtype=dtype).requires_grad_(False)
    made.load_state_dict(plain.state_dict())
    eight_bits.quantize_layer(made, kind)
    return plain, made


def rounded(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """Each row in 8 bits with a scale of its own, as published; in fp32."""
    rows = rows.float()
    most = rows.abs().amax(-1, keepdim=True)
    if kind == "int8":
        return (rows / (most / 127.5)).round().clamp(-128, 127) * (most / 127.5)
    return (rows / (most / 448)).to(torch.float8_e4m3fn).float() * (most / 448)


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_is_that_of_rounded_rows(kind: str, dtype: torch.dtype) -> None:
    plain, made = layer_of(kind, dtype)
    assert isinstance(made, nn.Linear) and made.weight.dtype == dtype and made.weight.shape == (48, 64)
    x = torch.randn(2, 50, 64, dtype=dtype)
    weight, inputs = rounded(plain.weight, kind), rounded(x, kind)
    wanted = inputs @ weight.T + plain.bias.float()
    found = made(x)
    assert found.dtype == dtype and found.shape == (2, 50, 48)
    close = float((found.float() - wanted).norm() / wanted.norm())
    assert close < (0.004 if kind == "int8" and dtype != torch.bfloat16 else 0.02)
    exact = float((found.float() - plain(x).float()).norm() / plain(x).float().norm())
    assert (0.003 if kind == "int8" else 0.015) < exact < (0.015 if kind == "int8" else 0.05)


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_rank_with_some_of_the_rows_computes_the_same(kind: str) -> None:
    _, made = layer_of(kind, torch.bfloat16)
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16)
    whole = made(x)
    for rows in (1, 15, 16, 17, 33):  # cuBLAS has int8 products of 17 rows and more
        assert torch.equal(made(x[:, :rows]), whole[:, :rows])
    assert torch.equal(made(x[0, 0]), whole[0, 0])


class Products(TorchDispatchMode):
    """Notes (rows, whether it adds a bias) of each float8 product."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_mm.default:
            given = dict(zip([x.name for x in func._schema.arguments], args, strict=False)) | (kwargs or {})
            self.made.append((len(given["self"]), given.get("bias") is not None))
        return func(*args, **(kwargs or {}))


def test_few_rows_of_float8_get_their_bias_apart() -> None:
    _, made = layer_of("float8", torch.bfloat16)
    x = torch.randn(200, 64, dtype=torch.bfloat16)
    with Products() as products:
        whole, few = made(x), made(x[:77])
    assert products.made == [(200, True), (77, False)]  # cuBLAS may have none of 77 rows with a bias
    torch.testing.assert_close(few, whole[:77], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("kind", COMPUTED)
def test_rows_of_zeros(kind: str) -> None:
    layer = nn.Linear(64, 48, dtype=torch.bfloat16)
    layer.weight.data[:3] = 0
    eight_bits.quantize_layer(layer, kind)
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    x[7] = 0
    found = layer(x)
    assert torch.equal(found[7], layer.bias) and torch.isfinite(found).all()
    assert torch.equal(found[:, :3], layer.bias[:3].expand(40, 3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large, self.odd = nn.Linear(2048, 1024), nn.Linear(2056, 1032)
        self.small, self.norm = nn.Linear(1024, 1024), nn.Sequential(nn.Linear(2048, 1024))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.outside, self.conv = nn.Linear(4096, 4096), nn.Conv2d(512, 512, 3)


def test_large_layers_inside_of_compiled_regions_compute() -> None:
    with torch.device("meta"):
        denoiser = Denoiser()
    assert set(computing_layers(denoiser, ())) == {"blocks.0.large", "blocks.0.norm.0"}
    assert set(computing_layers(denoiser, ("*.norm.*",))) == {"blocks.0.large"}
    assert computing_layers(denoiser, (), whole_blocks=False) == {}


def test_sdxls_layers_that_see_only_the_prompt_stay_as_they_are() -> None:
    spec = MODELS["sdxl"]
    settings = diffusers.UNet2DConditionModel.load_config(CONFIGS / "sdxl" / "unet")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(settings)
    names = set(computing_layers(unet, spec.kept))
    quantized = set(computing_layers(unet, [*spec.kept, *spec.few_rows]))
    assert {name.split(".", 2)[-1] for name in names - quantized}  # not empty
    assert all(name.endswith((".attn2.to_k", ".attn2.to_v")) for name in names - quantized)
    assert {name.rsplit(".ff.", 1)[-1] for name in quantized} == {"net.0.proj", "net.2"}
    how = Stored(torch.bfloat16, "int8", spec.kept, few_rows=spec.few_rows)
    sizes = stored(unet, how)
    for name, layer in unet.named_modules():
        if name in names:
            count = layer.weight.numel()
            wanted = count + 4 * layer.out_features if name in quantized else 2 * count
            assert sizes[id(layer.weight)] == wanted, name


def test_only_feed_forward_layers_where_others_are_not_compiled(small_layers_too: None) -> None:
    unet = tiny.load("sd1").unet
    all_of_them, inner = (set(computing_layers(unet, (), whole)) for whole in (True, False))
    assert inner and inner < all_of_them and all(".ff.net." in name for name in inner)


@pytest.mark.parametrize(
    ("kind", "capability", "computes"),
    [
        ("float8", (9, 0), True),
        ("float8", (8, 9), True),
        ("float8", (8, 6), False),
        ("int8", (8, 6), True),
        ("int8", (7, 5), False),
    ],
)
def test_a_gpu_that_cannot_keeps_the_weights_small_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    capability: Any,
    computes: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    config = tiny.config("sd1", quantize_to=kind)
    with caplog.at_level("INFO", "host"):
        made = eight_bits.for_device(config, CUDA)
        again = eight_bits.for_device(made, CUDA)
    assert again == made and len(caplog.records) == 1
    if computes:
        assert made == replace(config, compile_unet=True) and "compiles the denoiser" in caplog.text
    else:
        assert made == replace(config, quantize_to=f"{kind}_weight")
        assert "keeps weights in 8 bits and computes in more: GPU has compute capability" in caplog.text


def test_all_ranks_compute_alike(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny.config("sd1", quantize_to="int8")
    cpu = torch.device("cpu")
    assert eight_bits.for_device(config, cpu) == config
    assert eight_bits.for_device(config, cpu, "rank 1 cannot").quantize_to == "int8_weight"
    assert eight_bits.for_device(config, cpu, "rank 1 cannot", tells=False).quantize_to == "int8_weight"
    assert caplog.text.count("rank 1 cannot") == 1
    for other in (None, "int4", "float8_weight"):
        unchanged = replace(config, quantize_to=other)
        assert eight_bits.for_device(unchanged, cpu, "rank 1 cannot") == unchanged


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_pictures(name: str, small_layers_too: None, caplog: pytest.LogCaptureFixture) -> None:
    full, part = tiny.load(name), MODELS[name].denoiser
    plain = tiny.run(full, name)
    size, errors = quantize.tensor_bytes(getattr(full, part)), {}
    for kind in COMPUTED:
        with caplog.at_level("INFO", "host"):
            pipe = tiny.host(name, quantize_to=kind)
        layers = [m for m in getattr(pipe, part).modules() if isinstance(m, EightBitLinear)]
        assert f"{part}: {len(layers)} layers to {kind}, " in caplog.text and layers
        assert f"text_encoder: 12 layers to {kind}_weight" in caplog.text
        assert quantize.tensor_bytes(getattr(pipe, part)) < size
        errors[kind] = float(np.abs(tiny.run(pipe, name) - plain).mean())
    assert 0 < errors["int8"] < errors["float8"] < 0.03


def test_without_a_large_layer_weights_are_kept_small(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny.host("sd1", quantize_to="int8")
    assert "unet: no layer is large enough to gain from computing in int8" in caplog.text
    assert np.array_equal(tiny.run(pipe, "sd1"), tiny.run(tiny.host("sd1", quantize_to="int8_weight"), "sd1"))


@pytest.mark.parametrize("kind", COMPUTED)
def test_the_second_start_finds_the_same_bytes(
    tmp_path: Path, kind: str, small_layers_too: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, side_by_side = [], quantize.side_by_side

    def noting(act: Any, layers: Any, device: torch.device) -> None:
        made.append(layers)
        side_by_side(act, layers, device)

    monkeypatch.setattr(quantize, "side_by_side", noting)
    flags = {"quantize_to": kind, "cache_dir": str(tmp_path)}
    first = tiny.run(tiny.host("flux", **flags), "flux")
    count = len(made)
    second = tiny.host("flux", **flags)
    assert 0 < count == len(made), "nothing is quantized again"
    assert np.array_equal(tiny.run(second, "flux"), first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPUTED)
def test_compiled_blocks_are_whole_graphs_of_the_same_picture(kind: str, small_layers_too: None) -> None:
    torch._dynamo.reset()
    compiled = {"compile_unet": True, "compile_backend": "aot_eager"}
    pipe = tiny.host("flux", quantize_to=kind, **compiled)
    close = np.abs(tiny.run(pipe, "flux") - tiny.run(tiny.host("flux", quantize_to=kind), "flux"))
    torch._dynamo.reset()
    assert close.max() < 0.02


@pytest.mark.parametrize("kind", COMPUTED)
def test_the_memory_plan_is_what_is_loaded(kind: str, small_layers_too: None) -> None:
    flags = {"quantize_to": kind, "variant": "fp16"}
    plan = plan_of(tiny.config("flux", **flags))
    loaded = parameter_bytes(tiny.host("flux", **flags))
    assert plan.weights_of(plan.config, 1)[0] == {model: kept for model, (kept, _) in loaded.items()}


def ranks_of_two_kinds() -> tuple[str | None, str]:
    """On each rank of a launch whose second GPU, as it says, cannot: what it computes in, and its log."""
    rank = dist.get_rank()
    world = World(rank, 2, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    out, log = io.StringIO(), logging.getLogger("host")
    handler = logging.StreamHandler(out)
    log.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_plan, "obstacle", lambda kind, device: "an old GPU" if rank else None)
        config = tiny.config("sd1", quantize_to="float8")
        made, _ = memory_plan.planned(config, BACKENDS["asyncdiff"], Channel(world))
    log.removeHandler(handler)
    return made.quantize_to, out.getvalue()


def test_one_gpu_that_cannot_decides_for_all_ranks(pool: RankPool) -> None:
    (first, said), (second, silent) = pool.run(ranks_of_two_kinds, 2)
    assert first == second == "float8_weight"
    assert said.count("computes in more: an old GPU") == 1 and "an old GPU" not in silent


def in_8_bits(call: Any, *args: Any) -> Any:
    """On each rank, with small layers in 8 bits too; and how many layers compute in them."""
    counted, made = [], quantize._compute_in_8_bits

    def counting(*given: Any) -> int:
        counted.append(made(*given))
        return counted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eight_bits, "LEAST", 1)
        patch.setattr(quantize, "_compute_in_8_bits", counting)
        found = call(*args)
    assert counted and all(counted), "no layer computes in 8 bits"
    return found


@pytest.mark.parametrize(
    ("name", "kind", "features", "plan"),
    [
        ("flux", "float8", ("lora", "ip_adapter"), {"ring_degree": 2}),
        pytest.param("flux", "int8", ("control_net",), {"ulysses_degree": 2}, marks=pytest.mark.slow),
        pytest.param("sd3", "int8", (), {"use_cfg_parallel": True}, marks=pytest.mark.slow),
        ("sd3", "float8", (), {"pipefusion_parallel_degree": 2, "warm_up_steps": 99}),
    ],
)
def test_xdit_equals_one_rank(pool: RankPool, name: str, kind: str, features: Any, plan: Any) -> None:
    from tests.parallel.test_xdit import SETTINGS

    flags = {"quantize_to": kind}
    for feature in features:
        flags |= SETTINGS[feature](name)
    holder = pool.run(in_8_bits, 2, feature_cell, name, flags, plan)[0]
    assert psnr(holder["exact"], holder["plain"]) >= 50


@pytest.mark.parametrize(
    ("backend", "name", "kind", "plan"),
    [
        pytest.param("asyncdiff", "sdxl", "int8", {}, marks=pytest.mark.slow),
        pytest.param("distrifuser", "sd1", "float8", {"no_split_batch": True}, marks=pytest.mark.slow),
        ("xdit", "flux", "int8", {}),
    ],
)
def test_sharded_and_exact_steps_equal_one_rank(
    pool: RankPool, backend: str, name: str, kind: str, plan: Any
) -> None:
    flags = {"quantize_to": kind, "lora": {str(tiny_extras.lora(name)): 0.8}}
    ranks = pool.run(in_8_bits, 2, sharded, backend, name, flags, plan, timeout=240)
    holder = next(rank for rank in ranks if rank["exact"] is not None)
    assert psnr(holder["exact"], holder["plain"]) >= 50
    assert np.array_equal(holder["exact"], holder["again"])
    for rank in ranks:
        sizes = rank["parameters"][MODELS[name].denoiser]
        assert sizes["kept"] < 0.7 * sizes["whole"]
