"""What a launch is said to need of memory: weights to the byte, advice that is tried and fits."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
import transformers

from shared.api.requests import GenerateRequest
from shared.backends import BACKENDS
from shared.launch.errors import UsageError
from shared.launch.file_header import SingleFileError
from shared.launch.fit import LADDER, changed, worded
from shared.launch.flags import HostConfig
from shared.models import MODELS
from shared.parallel import sharded
from shared.parallel.distrifusion import bands
from shared.parallel.peak import PeakBytes
from shared.parallel.video_decoder import shared_decoder
from shared.pipeline import unloaded, work
from shared.pipeline.memory_plan import MemoryPlan
from shared.pipeline.sharding import parameter_bytes
from shared.pipeline.unloaded import Stored, Unloaded
from shared.pipeline.work import FlashAttention, Work
from shared.ranks.device import LIMIT
from tests import tiny, tiny_extras, tiny_original, tiny_wan
from tests.pool import RankPool
from tests.seldom import seldom
from tests.test_host import DEMO_CHECKPOINT, ROOT, free_port
from tests.test_matrix import launch

GIB = 2**30


def plan_of(config: HostConfig, ranks: int = 1, free: int = GIB, device: str = "cpu") -> MemoryPlan:
    dtype = torch.float16 if config.variant == "fp16" else torch.float32
    return MemoryPlan(config, BACKENDS[config.backend], ranks, device, dtype, [free] * ranks)


def flags_of(name: str) -> dict[str, Any]:
    return {"motion_adapter": str(tiny_extras.motion_adapter())} if name == "ad" else {}


QUICK = ("sd1", "zimage", "kontext")


@pytest.mark.parametrize("name", seldom(MODELS, QUICK))
def test_weights_are_those_that_are_loaded(name: str) -> None:
    if MODELS[name].packages:
        pytest.importorskip(*MODELS[name].packages)
    launches: list[dict[str, Any]] = [{"variant": "fp16", "quantize_to": "int4" if name in QUICK else None}]
    if name in ("flux", "sd1", "sd3"):
        launches += [{"checkpoint": str(tiny_original.single_file(name))}]
    if name not in QUICK:
        launches += [{"variant": "fp16"}]
    for more in launches:
        flags = flags_of(name) | more
        plan = plan_of(tiny.config(name, **flags))
        loaded = parameter_bytes(tiny.host(name, **flags))
        assert plan.weights_of(plan.config, 1)[0] == {model: kept for model, (kept, _) in loaded.items()}
        need = plan.need(plan.config)
        assert min(need.encode if MODELS[name].text_encoders else 1, need.step, need.decode) > 0


def test_parts_in_host_memory_are_not_counted() -> None:
    """Under model offload the parts of all but the denoiser wait there; it is allowed beside the shards."""
    sharded = tiny.config("sdxl", shard_weights=True)
    plan = plan_of(sharded, 2)
    moved = replace(sharded, enable_model_cpu_offload=True)
    before, after = (plan.weights_of(config, 2)[0] for config in (sharded, moved))
    assert before["unet"] == after["unet"]
    whole = plan.weights_of(replace(sharded, shard_weights=False), 2)[0]
    for model in ("text_encoder", "text_encoder_2", "vae"):
        # A half of the blocks is on each device; what is no block is whole on both.
        assert after[model] == pytest.approx(2 * before[model] - whole[model], abs=2), model
        assert after[model] < 0.15 * whole[model]
    assert changed(sharded, {"enable_model_cpu_offload": True}, plan.backend, 2, "cuda") == moved
    assert changed(moved, {"enable_group_offload": True}, plan.backend, 2, "cuda") is None


def test_keys_and_values_that_other_gpus_copy_are_counted() -> None:
    plan = plan_of(tiny.config("flux", ring_degree=2), 2, device="cuda")
    ring, both = plan.config, replace(plan.config, ring_degree=None, ulysses_degree=2)
    settings: Any = plan.models["transformer"].modules[0].config
    channels = settings.num_attention_heads * settings.attention_head_dim
    tokens = (ring.size[0] // 16) * (ring.size[1] // 16) + MODELS["flux"].text_tokens
    one = channels * tokens // 2 * 4  # bytes of a rank's keys in fp32
    assert plan.need(ring).step - plan.need(both).step == 4 * one
    on_cpu = plan_of(ring, 2)
    assert on_cpu.need(ring).step == on_cpu.need(both).step


def test_both_transformers_are_quantized() -> None:
    flags = {"checkpoint": str(tiny_wan.wan22("a14b")), "quantize_to": "int8"}
    plan = plan_of(tiny.config("wan", **flags))
    found = plan.weights_of(plan.config, 1)[0]
    assert found == {m: kept for m, (kept, _) in parameter_bytes(tiny.host("wan", **flags)).items()}
    assert (
        found["transformer_2"]
        == found["transformer"]
        < 0.5 * plan.models["transformer"].nbytes(Stored(torch.float32))
    )


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


Sizes = dict[str, int]


def kept_and_planned(
    backend: str, name: str, flags: dict[str, Any], largest: int
) -> tuple[Sizes, Sizes, int, int]:
    """By model, of blocks above `largest` bytes in parts; and of the buffer that they are gathered in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "LARGEST", largest)
        config, world, host, latents = launch(backend, name, flags, {"shard_weights": True})
        planned, buffer, _ = plan_of(config, world.size).weights_of(config, world.size)
        engine = host.build_engine(config, world)
        latents(engine)
        kept = {model: sizes["kept"] for model, sizes in engine.parameters.items()}
        weights: Any = engine._weights
        made = weights.buffer_bytes
        engine.close()
    return kept, planned, made, buffer


@pytest.mark.parametrize(
    ("backend", "name", "flags", "within"),
    [
        pytest.param("xdit", "flux", {}, 0.02, marks=pytest.mark.slow),
        ("xdit", "sd3", {"quantize_to": "int8"}, 0.02),
        pytest.param("distrifuser", "sdxl", {"no_split_batch": True}, 0.02, marks=pytest.mark.slow),
        ("asyncdiff", "sd1", {}, 0.1),
    ],
)
def test_sharded_on_two_ranks(
    pool: RankPool, backend: str, name: str, flags: dict[str, Any], within: float
) -> None:
    buffers = list[int]()
    for largest in (sharded.LARGEST, 20_000):
        for kept, planned, made, buffer in pool.run(kept_and_planned, 2, backend, name, flags, largest):
            assert kept.keys() == planned.keys()
            for model, size in kept.items():
                assert planned[model] == pytest.approx(size, rel=within), model
            assert buffer == pytest.approx(made, rel=0.03)
        buffers.append(buffer)
    assert buffers[1] < buffers[0]


def measured(config: HostConfig) -> int:
    """Bytes of parameters, and the most of a step and of decoding, of a picture that is made."""
    pipe = tiny.host(config.type, **{f: getattr(config, f) for f in config.changed(*FLAGS)})
    full = {"max_sequence_length": 512} if config.type in ("flux", "pixs") else {}
    with PeakBytes() as peak:
        tiny.run(pipe, config.type, size=config.size[0], steps=1, **full)
    return sum(kept for kept, _ in parameter_bytes(pipe).values()) + peak.most


FLAGS = ("width", "height", "variant", "quantize_to", "enable_vae_tiling", "enable_vae_slicing")


LAUNCHES = [("sd1", 64, 0.9), ("sdxl", 256, 0.8), ("sd2", 384, 0.7), ("sd1", 256, 0.6), ("sd2", 192, 0.8)]


@pytest.mark.parametrize(
    ("name", "size", "share"),
    [LAUNCHES[0], *(pytest.param(*launch, marks=pytest.mark.slow) for launch in LAUNCHES[1:])],
)
def test_what_is_advised_is_tried_and_fits(name: str, size: int, share: float) -> None:
    config = tiny.config(name, width=size, height=size)
    whole = measured(config)
    plan = plan_of(config)
    need = plan.need(config)
    assert need.total - need.margin <= whole <= need.total + need.margin
    plan.free = [int(share * (need.total - need.margin))]
    with pytest.raises(UsageError, match=r"each rank needs .* GiB free; it would fit with") as refused:
        plan.fitted()
    advised = re.split(r", or (?:\d+ ranks)?", str(refused.value).partition("would fit with ")[2])
    tried = [made for said in advised if (made := launch_of(config, said)) is not None]
    assert tried and all(measured(made) <= plan.free[0] < whole for made in tried), advised


def test_advice_looks_at_each_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice is thirty launches, most of which store a model as another does: of SDXL they took 15 s."""
    divided: list[int] = []

    def counted(model: torch.nn.Module, *more: Any) -> list[sharded.Block]:
        divided.append(id(model))
        return sharded.blocks_of(model, *more)

    monkeypatch.setattr(unloaded, "blocks_of", counted)
    config = tiny.config("sdxl", width=64, height=64, shard_weights=True)
    plan = plan_of(config, ranks=2, free=1 << 20)
    plan.advice()
    kinds = 6  # as it is, and the kinds of --quantize_to
    assert max(map(divided.count, divided)) <= kinds, divided


def test_tiles_of_one_shape_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large picture there are a hundred; the most that they need is the same."""
    config = tiny.config("sd1", width=256, height=256, enable_vae_tiling=True)
    plan = plan_of(config)
    decoder: Any = plan.models["vae"].modules[0].decoder
    calls: list[torch.Size] = []
    decoder.conv_in.register_forward_hook(lambda _, given, __: calls.append(given[0].shape))
    found = plan.work.decode(config, None)
    assert 1 < len(calls) == len(set(calls)), calls

    def each(*_: Any) -> Any:
        return lambda original, args, kwargs: original(*args, **kwargs)

    monkeypatch.setattr(work, "_once_a_shape", each)
    calls.clear()
    again = Work(config.spec, plan.models, plan.dtype)
    assert again.decode(config, None) == found
    assert len(calls) > len(set(calls))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "pixs"])
def test_prompts_are_counted(name: str) -> None:
    """Of tiny models they need the most."""
    config = tiny.config(name, width=64, height=64)
    need = plan_of(config).need(config)
    assert need.work == need.encode
    assert need.total - need.margin <= measured(config) <= need.total + need.margin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_another_dtype_are_not_counted_as_work(dtype: torch.dtype) -> None:
    config = transformers.CLIPTextConfig(hidden_size=768, num_hidden_layers=12, projection_dim=768)
    vae = tiny.load("sd1").vae
    with torch.device("meta"):
        encoder = transformers.CLIPTextModel(config)
    work = Work(MODELS["sd1"], {"text_encoder": Unloaded([encoder]), "vae": Unloaded([vae])}, dtype)
    assert 0 < work.encode() < 4 << 20, "123 million parameters, 77 tokens"


TI2V = {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336}


WANS: dict[str, tuple[dict[str, Any], int]] = {
    "14B": ({}, 8),
    "14B-I2V": ({"in_channels": 36, "added_kv_proj_dim": 5120, "image_dim": 1280}, 8),
    "1.3B": ({"num_attention_heads": 12, "ffn_dim": 8960}, 8),
    "TI2V-5B": (TI2V, 16),
}


@pytest.mark.parametrize(("settings", "pixels"), WANS.values(), ids=WANS)
@pytest.mark.parametrize(("width", "height"), [(832, 480), (1280, 704)])
def test_a_step_of_81_frames_is_near_what_its_operations_take(
    settings: dict[str, Any], pixels: int, width: int, height: int
) -> None:
    """At full width, of two blocks: the others use the same memory."""
    each = settings is TI2V
    spec = MODELS["wani2v" if "image_dim" in settings else "wan"].of_checkpoint({"expand_timesteps": each})
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(num_layers=2, **settings).to(torch.bfloat16)
        vae = SimpleNamespace(config={"scale_factor_spatial": pixels})
        rows, columns = height // pixels, width // pixels
        latents = torch.zeros(1, settings.get("in_channels", 16), 21, rows, columns, dtype=torch.bfloat16)
        timestep = torch.zeros(1, 21 * (rows // 2) * (columns // 2)) if each else torch.zeros(1)
        text = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
        picture = torch.zeros(1, 257, 1280, dtype=torch.bfloat16) if "image_dim" in settings else None
    with torch.no_grad(), torch.device("meta"), FlashAttention(), PeakBytes() as peak:
        model(latents, timestep, text, picture)
    models: Any = {
        name: SimpleNamespace(modules=[one]) for name, one in (("transformer", model), ("vae", vae))
    }
    planned = Work(spec, models, torch.bfloat16).step(tiny.config("wan", width=width, height=height), 81)
    assert peak.most <= planned <= 1.05 * peak.most


VIDEOS = ("ad", "svd", "wan", "ti2v", "wani2v", "hv15", "ltx2")


def decoding(kind: str, side: int, frames: int, dtype: torch.dtype = torch.float32) -> int:
    """On each rank: the most bytes from the call of the VAE, which ranks share, to the pipeline's pixels."""
    path = tiny_wan.wan22(kind) if kind == "ti2v" else None
    pipe = tiny.load(kind) if path is None else diffusers.WanPipeline.from_pretrained(path)
    pipe.to(dtype)
    peak, decode, finish = PeakBytes(), pipe.vae.decode, pipe.video_processor.postprocess_video

    def begin(*args: Any, **kwargs: Any) -> Any:
        with peak:
            return decode(*args, **kwargs)

    def end(*args: Any, **kwargs: Any) -> Any:
        with peak:
            return finish(*args, **kwargs)

    pipe.vae.decode, pipe.video_processor.postprocess_video = begin, end
    more = {"decode_chunk_size": frames} if kind in ("ad", "svd") else {}
    asked = {"output_type": "pt", "num_frames": frames} | more
    several = dist.is_initialized() and dist.get_world_size() > 1
    with shared_decoder(pipe.vae, None) if several else contextlib.nullcontext():
        args = tiny.call_args("wan" if kind == "ti2v" else kind, steps=3, size=side) | asked
        pipe(**args)
    return peak.most


@pytest.mark.parametrize("kind", seldom(VIDEOS, ("wan",)))
def test_shared_decoding_of_videos_takes_what_is_planned(pool: RankPool, kind: str) -> None:
    if kind == "wani2v":
        pytest.importorskip("ftfy")
    name, files = kind, {}
    if kind == "ti2v":
        name, files = "wan", {"checkpoint": str(tiny_wan.wan22(kind))}
    side, frames = (192, 9) if kind in ("ti2v", "ltx2") else (96, 5)
    config = tiny.config(name, width=side, height=side, **files, **flags_of(name))
    work = plan_of(config).work
    for ranks in (1, 2, 3):
        found = decoding(kind, side, frames)
        if ranks > 1:
            found = max(pool.run(decoding, ranks, kind, side, frames, timeout=300))
        planned = work.decode(config, frames, ranks)
        # Inside a tiny LTX-2 there is less than in its pixels, of which gloo holds on to what it sent last.
        least = 0.85 if kind == "ltx2" and ranks > 1 else 0.95
        assert least * found <= planned <= 1.1 * found, (ranks, planned / found)
    shared = replace(config, shard_weights=True)
    assert plan_of(shared, ranks).need(shared, frames=frames).decode == planned


def picture_in_bands(large: int) -> tuple[int, int]:
    """On each rank: the most bytes of decoding a picture whose maps above `large` bytes are in bands of as
    many, and what is planned for it."""
    config = tiny.config("sdxl", width=256, height=256)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "LARGE", large)
        patch.setattr(bands, "BAND", large)
        work = plan_of(config).work
        planned = work.decode(config, None, ranks)
        vae = tiny.host("sdxl").vae
        latents, _ = work.latents(config, None, torch.float32, torch.device("cpu"))
        shared = shared_decoder(vae, None) if ranks > 1 else contextlib.nullcontext()
        with torch.inference_mode(), shared, PeakBytes() as peak:
            pixels = vae.decode(latents.normal_(), return_dict=False)[0]
            (pixels * 0.5 + 0.5).clamp(0, 1)
    return peak.most, planned


def test_decoding_in_bands_takes_what_is_planned(pool: RankPool) -> None:
    for ranks in (1, 3):
        planned = list[int]()
        for large in (1 << 17, 1 << 40):
            for _ in range(3):  # gloo holds on to what it sends while another rank is late
                found = pool.run(picture_in_bands, ranks, large) if ranks > 1 else [picture_in_bands(large)]
                most, need = max(rank[0] for rank in found), found[0][1]
                if 0.95 * most <= need:
                    break
            planned.append(need)
            assert 0.95 * most <= need <= 1.1 * most, (ranks, large, need / most)
        assert planned[0] < 0.75 * planned[1], ranks


@pytest.mark.parametrize("name", seldom(["ad", "svd"], ["ad"]))
def test_frames_are_decoded_in_half_precision(name: str) -> None:
    """Their VAEs are said to overflow in it, but their pipelines decode in it; Stable Video Diffusion's
    encodes in fp32."""
    config = tiny.config(name, width=96, height=96, variant="fp16", **flags_of(name))
    work = plan_of(config).work
    found = decoding(name, 96, 5, torch.float16)
    assert work.upcasts and 0.95 * found <= work.decode(config, 5) <= 1.1 * found


def launch_of(config: HostConfig, said: str) -> HostConfig | None:
    """The launch that a part of the advice names; None for one with more ranks."""
    if sides := re.match(r"(\d+)x(\d+) ", said):
        return replace(config, width=int(sides[1]), height=int(sides[2]))
    found = re.findall(r"--(\w+)(?:=(\w+))?", said)
    if not found or "ranks" in said or "--shard_weights" in said:
        return None
    changes: dict[str, Any] = {flag: value or True for flag, value in found}
    return replace(config, **changes)


def test_fit_chooses_what_costs_least() -> None:
    config = tiny.config("sd1", width=64, height=64, fit=True)
    plan = plan_of(config)
    allowed = [c for c in LADDER if changed(config, c, plan.backend, 1, "cpu") is not None]
    needs = [plan.safe(replace(config, **changes)) for changes in allowed]
    plan.free = [needs[allowed.index({"quantize_to": "int8"})]]
    first = next(c for c, need in zip(allowed, needs, strict=True) if need <= plan.free[0])
    assert plan.fitted() == replace(config, **first) and plan.config.quantize_to
    assert f"--fit chooses {worded(first)}" in plan.warning


def test_near_the_limit_and_without_a_card_it_warns() -> None:
    plan = plan_of(tiny.config("sd1", width=64, height=64))
    need = plan.need(plan.config)
    plan.free = [need.total]
    assert plan.fitted() is plan.config and "memory may not suffice" in plan.warning
    plan.free, plan.warning = [need.total + need.margin], ""
    assert plan.fitted() is plan.config and not plan.warning
    plan.free, plan.binding = [need.total // 2], False
    assert plan.fitted() is plan.config and "it would fit with" in plan.warning


def test_advice_after_an_out_of_memory_is_for_that_size() -> None:
    """Memory that should have sufficed did not: what was thought to need as much is not advised."""
    plan = plan_of(tiny.config("sd1", width=64, height=64))
    at = replace(plan.config, width=128, height=128)
    plan.free = [2 * plan.safe(at)]
    request = GenerateRequest(width=128, height=128)
    said = plan.advice_for(request)
    assert "--enable_vae_slicing" not in said
    sizes = [(launch_of(at, one), one) for one in said.partition("fit with ")[2].split(", or ")]
    assert sizes and all(2 * plan.safe(made) <= plan.free[0] for made, _ in sizes if made is not None)
    plan.free = [plan.safe(plan.config)]
    assert re.search(r"\b(64x64|48x48|32x32) ", plan.advice_for(request))


@pytest.mark.slow
def test_a_host_that_does_not_fit_ends_with_2_before_any_weight_is_read() -> None:
    command = [sys.executable, "asyncdiff_host.py", "--type=sd1", f"--checkpoint={DEMO_CHECKPOINT}"]
    ended = subprocess.run(
        [*command, f"--port={free_port()}"],
        cwd=ROOT, env={**os.environ, LIMIT: "0.01"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert re.search(r"error: --checkpoint: each rank needs 0\.\d+ GiB .* got 0\.01 GiB free; ", last), last
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("flag", ["lora", "ip_adapter", "control_net"])
def test_a_file_that_cannot_be_read_is_told_by_its_flag(tmp_path: Path, flag: str) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    config = tiny.config("sd1", **{flag: {str(tmp_path / "broken.safetensors"): 1.0}})
    with pytest.raises(SingleFileError, match=f"^--{flag} .*broken.safetensors' cannot be read"):
        plan_of(config)
