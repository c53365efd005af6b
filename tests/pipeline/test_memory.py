"""VAE tiling and slicing, offload and xformers: their effect, or a refusal in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shared.backends import BACKENDS
from shared.launch.backend import Needs
from shared.launch.errors import UsageError
from shared.models import MODELS
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import load_pipeline
from shared.pipeline.memory import (
    KeptOffload,
    MemoryFlagError,
    apply_vae_flags,
    check_memory_flags,
    place,
)
from tests import tiny
from tests.pool import RankPool
from tests.seldom import seldom
from tests.test_matrix import SETTINGS, launch

# Tiles of a video's VAE are larger than these pictures.
TILING = [
    name
    for name, spec in MODELS.items()
    if "enable_vae_tiling" not in spec.refuses and spec.vae_kind == "image"
]
CUDA = torch.device("cuda", 0)


@cache
def plain(name: str) -> np.ndarray:
    return tiny.run(tiny.load(name), name)


def note_calls(pipe: Any, monkeypatch: pytest.MonkeyPatch, note: Callable[[torch.Tensor], None]) -> None:
    """Call `note` with what the VAE's decoder gets."""
    decode = pipe.vae.decoder.forward

    def noted(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        note(z)
        return decode(z, *args, **kwargs)

    monkeypatch.setattr(pipe.vae.decoder, "forward", noted)


# The others have the same class of VAE as one of these.
@pytest.mark.parametrize("name", seldom(TILING, ("sd1", "ad", "sd3", "flux2")))
def test_tiling_decodes_in_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.host(name, enable_vae_tiling=True)
    shapes: list[tuple[int, ...]] = []
    note_calls(pipe, monkeypatch, lambda z: shapes.append(tuple(z.shape)))
    whole = tiny.run(tiny.load(name), name, size=128)
    tiled = tiny.run(pipe, name, size=128)
    side = 128 // (whole.shape[-2] // 128 or 1) // (2 ** (len(pipe.vae.config.block_out_channels) - 1))
    assert len(shapes) > 1 and all(shape[-1] < side for shape in shapes), shapes
    assert tiled.shape == whole.shape
    assert 0 < np.abs(tiled - whole).mean() < 0.2, "seams are blended"


def test_slicing_decodes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.host("sd1", enable_vae_slicing=True)
    batches: list[int] = []
    note_calls(pipe, monkeypatch, lambda z: batches.append(len(z)))
    made = tiny.run(pipe, "sd1", num_images_per_prompt=3)
    assert batches == [1, 1, 1]
    assert np.abs(made - tiny.run(tiny.load("sd1"), "sd1", num_images_per_prompt=3)).max() < 1e-5


def test_the_video_vae_says_no() -> None:
    with pytest.raises(MemoryFlagError, match="AutoencoderKLTemporalDecoder has no enable_tiling"):
        apply_vae_flags(tiny.load("svd"), tiny.config("svd", enable_vae_tiling=True))


@pytest.mark.parametrize(
    "flag",
    [
        "enable_model_cpu_offload",
        "enable_sequential_cpu_offload",
        "enable_group_offload",
        "xformers_efficient",
    ],
)
def test_refused_on_a_cpu_before_anything_is_read(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.pipeline.loading._load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match=f"--{flag}: .*CPU"):
        tiny.host("sd1", **{flag: True})


def test_refused_on_a_gpu() -> None:
    with pytest.raises(MemoryFlagError, match="xformers package is not installed"):
        check_memory_flags(tiny.config("sd1", xformers_efficient=True), CUDA)
    check_memory_flags(tiny.config("sd1", enable_model_cpu_offload=True, compile_unet=True), CUDA)


class Recorder:
    """A pipeline that notes what is asked of it: offload needs a GPU that this machine may lack."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _exclude_from_cpu_offload = ("safety_checker",)
    _all_hooks = ()

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_model_offload_is_to_the_ranks_own_gpu() -> None:
    pipe: Any = Recorder()
    config = tiny.config("sd1", enable_model_cpu_offload=True)
    place(pipe, MODELS["sd1"], config, torch.device("cuda", 3), Needs())
    assert pipe.calls == [("enable_model_cpu_offload", (), {"gpu_id": 3, "device": "cuda"})]


def test_a_denoiser_in_parts_is_not_model_offloaded() -> None:
    pipe: Any = Recorder()
    place(pipe, MODELS["sd1"], tiny.config("sd1", enable_model_cpu_offload=True), CUDA, Needs(in_parts=True))
    assert pipe.model_cpu_offload_seq == "text_encoder->vae"
    assert pipe._exclude_from_cpu_offload == ["safety_checker", "unet", "controlnet"]


class Far(nn.Linear):
    """A model that goes to a GPU as a copy on the CPU."""

    def to(self, *args: Any, **kwargs: Any) -> Far:
        if torch.device(args[0]).type == "cuda":
            for weight in self.parameters():
                weight.data = weight.data.clone()
        return self


def test_a_model_goes_without_a_copy_back() -> None:
    model, hook = Far(4, 4), KeptOffload(CUDA)
    hook.init_hook(model)
    at = [weight.data_ptr() for weight in model.parameters()]
    for _ in range(2):
        hook.pre_forward(model)
        assert not set(at) & {weight.data_ptr() for weight in model.parameters()}
        hook.init_hook(model)
        assert at == [weight.data_ptr() for weight in model.parameters()]
    hook.pre_forward(model)
    model.half()
    hook.init_hook(model)
    assert model.weight.dtype == torch.float16


def test_every_model_keeps_its_weights_under_model_offload() -> None:
    pipe = tiny.load("sd1")
    place(
        pipe, MODELS["sd1"], tiny.config("sd1", enable_model_cpu_offload=True), torch.device("cpu"), Needs()
    )
    for model, after in ((pipe.text_encoder, None), (pipe.unet, pipe.text_encoder), (pipe.vae, pipe.unet)):
        assert isinstance(model._hf_hook, KeptOffload)
        assert getattr(model._hf_hook.prev_module_hook, "model", None) is after
    assert np.abs(tiny.run(pipe, "sd1") - plain("sd1")).max() < 1e-4


def offloaded(backend: str, name: str, flags: dict[str, Any], how: str) -> list[float]:
    """On each rank: how far latents of a host whose layers come and go are from the plain pipeline's."""
    # A scheduler may call the denoiser more often than there are steps.
    config, world, host, latents = launch(backend, name, flags, {"warm_up_steps": 99})
    spec, cpu = MODELS[name], world.device
    pipe = load_pipeline(spec, config, cpu, Needs(), quiet=True)
    plain = latents(PipelineEngine(pipe, config, world))
    offload: dict[str, Any] = {f"enable_{how}_offload": True}
    place(pipe, spec, replace(config, **offload), cpu, BACKENDS[backend].needs(config, world.size))
    groups = [host.make_groups(config, world)] if hasattr(host, "make_groups") else []
    engine = PipelineEngine(pipe, config, world, lambda p: host.attach(p, config, world, *groups))
    made = [latents(engine) for _ in range(2)]
    engine.close()
    return [float(np.abs(one - plain).max()) for one in made if one is not None and plain is not None]


def offload_cells() -> list[Any]:
    """Each method, each feature, by turns under one of the two; sequential leaves no weight to read."""
    cells: list[tuple[str, str, tuple[str, ...], str]] = [
        ("asyncdiff", "sd1", ("lora", "control_net"), "sequential_cpu"),
        ("asyncdiff", "sd1", ("ip_adapter", "lora"), "group"),
        ("asyncdiff", "sd3", ("ip_adapter",), "sequential_cpu"),
        ("distrifuser", "sdxl", ("lora", "control_net", "ip_adapter"), "sequential_cpu"),
        ("distrifuser", "sdxl", ("lora", "control_net", "ip_adapter"), "group"),
        ("asyncdiff", "sd1", ("lora", "control_net"), "model_cpu"),
        ("distrifuser", "sdxl", ("control_net",), "model_cpu"),
        ("xdit", "sd3", ("lora",), "model_cpu"),
        ("xdit", "flux", ("lora", "ip_adapter"), "sequential_cpu"),
        ("xdit", "flux", ("control_net",), "group"),
        ("xdit", "hy", ("lora",), "sequential_cpu"),
    ]
    return seldom(cells, (cells[0], cells[7], cells[9]))


@pytest.mark.parametrize(("backend", "name", "features", "how"), offload_cells())
def test_layers_come_and_go_under_every_method(
    pool: RankPool, backend: str, name: str, features: tuple[str, ...], how: str
) -> None:
    """From a CPU to a CPU, as the hooks are the same ones."""
    flags: dict[str, Any] = {}
    for feature in features:
        flags |= SETTINGS[feature](name)
    far = pool.run(offloaded, 2, backend, name, flags, how)
    assert 0 <= max(far[0]) < 1e-4, far


def test_what_runs_in_one_piece_stays_under_group_offload() -> None:
    pipe = tiny.load("sd1")
    pipe.register_modules(image_encoder=nn.Sequential(nn.MultiheadAttention(8, 2)))
    config = tiny.config("sd1", enable_group_offload=True)
    place(pipe, MODELS["sd1"], config, torch.device("cpu"), Needs(in_parts=True))

    def comes_and_goes(part: nn.Module) -> bool:
        return any(hasattr(module, "_diffusers_hook") for module in part.modules())

    assert comes_and_goes(pipe.unet) and not comes_and_goes(pipe.image_encoder)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "flag", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"]
)
def test_offload_on_a_gpu(flag: str) -> None:
    from shared.pipeline.loading import load_pipeline

    config = tiny.config("sd1", variant="fp32", **{flag: True})
    pipe: Any = load_pipeline(MODELS["sd1"], config, CUDA, Needs(), quiet=True)
    for _ in range(2):
        assert np.abs(tiny.run(pipe, "sd1") - plain("sd1")).max() < 0.01
    assert next(pipe.unet.parameters()).device.type in ("cpu", "meta")
