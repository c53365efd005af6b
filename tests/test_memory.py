"""VAE tiling and slicing, offload and xformers: their effect, or a refusal in words."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from shared.config import UsageError
from shared.memory import MemoryFlagError, apply_vae_flags, check_memory_flags, memory_report, place
from shared.models import MODELS
from tests import tiny

TILING = [name for name, spec in MODELS.items() if "enable_vae_tiling" not in spec.refuses]
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


@pytest.mark.parametrize("name", TILING)
def test_tiling_decodes_in_tiles(name: str, monkeypatch) -> None:
    pipe = tiny.host(name, enable_vae_tiling=True)
    shapes: list[tuple[int, ...]] = []
    note_calls(pipe, monkeypatch, lambda z: shapes.append(tuple(z.shape)))
    whole = tiny.run(tiny.load(name), name, size=128)
    tiled = tiny.run(pipe, name, size=128)
    side = 128 // (whole.shape[-2] // 128 or 1) // (2 ** (len(pipe.vae.config.block_out_channels) - 1))
    assert len(shapes) > 1 and all(shape[-1] < side for shape in shapes), shapes
    assert tiled.shape == whole.shape
    assert 0 < np.abs(tiled - whole).mean() < 0.2, "seams are blended"


def test_slicing_decodes_one_by_one(monkeypatch) -> None:
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
def test_refused_on_a_cpu_before_anything_is_read(flag: str, monkeypatch) -> None:
    monkeypatch.setattr("shared.loading._load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match=f"--{flag}: .*CPU"):
        tiny.host("sd1", **{flag: True})


def test_refused_on_a_gpu() -> None:
    with pytest.raises(MemoryFlagError, match="xformers package is not installed"):
        check_memory_flags(tiny.config("sd1", xformers_efficient=True), CUDA)
    both = tiny.config("sd1", enable_sequential_cpu_offload=True, compile_unet=True)
    with pytest.raises(MemoryFlagError, match=r"torch\.compile cannot trace"):
        check_memory_flags(both, CUDA)
    check_memory_flags(tiny.config("sd1", enable_model_cpu_offload=True, compile_unet=True), CUDA)


class Recorder:
    """A pipeline that notes what is asked of it: offload needs a GPU that this machine may lack."""

    _exclude_from_cpu_offload = ("safety_checker",)

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.mark.parametrize(
    ("flag", "call"),
    [
        ("enable_model_cpu_offload", ("enable_model_cpu_offload", (), {"gpu_id": 3, "device": "cuda"})),
        (
            "enable_sequential_cpu_offload",
            ("enable_sequential_cpu_offload", (), {"gpu_id": 3, "device": "cuda"}),
        ),
    ],
)
def test_offload_is_to_the_ranks_own_gpu(flag: str, call: Any) -> None:
    pipe = Recorder()
    place(pipe, MODELS["sd1"], tiny.config("sd1", **{flag: True}), torch.device("cuda", 3), parallel=False)
    assert pipe.calls == [call]


def test_a_denoiser_in_parts_is_not_model_offloaded() -> None:
    pipe = Recorder()
    place(pipe, MODELS["sd1"], tiny.config("sd1", enable_model_cpu_offload=True), CUDA, parallel=True)
    assert pipe._exclude_from_cpu_offload == ["safety_checker", "unet"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "flag", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"]
)
def test_offload_on_a_gpu(flag: str) -> None:
    from shared.loading import load_pipeline

    config = tiny.config("sd1", variant="fp32", **{flag: True})
    pipe = load_pipeline(MODELS["sd1"], config, CUDA, quiet=True)
    assert np.abs(tiny.run(pipe, "sd1") - plain("sd1")).max() < 0.01
    assert next(pipe.unet.parameters()).device.type in ("cpu", "meta")


def test_report() -> None:
    before = memory_report(torch.device("cpu"))
    kept = torch.ones(40_000_000 // 4)
    after = memory_report(torch.device("cpu"))
    assert after["allocated"] - before["allocated"] > 30_000_000 and after["peak"] >= after["allocated"] * 0.9
    del kept
