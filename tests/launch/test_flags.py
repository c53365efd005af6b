"""Every flag of every host has an effect, or is refused in words on a machine without a GPU.

One entry a flag: `EFFECTS[flag](ground)` fails when the flag, once accepted, changes nothing.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image

from shared.api.parsing import check_request
from shared.api.status import HostStatus
from shared.api.warned import collecting_warnings
from shared.backends import BACKENDS
from shared.host import warm_up
from shared.launch.checks import check_config
from shared.launch.errors import UsageError
from shared.launch.logs import set_up_logging
from shared.launch.parser import parse_config
from shared.models import CacheSettings
from shared.parallel.method import Plain
from shared.parallel.xdit.degrees import Degrees
from shared.pipeline.compile import graph_count
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import load_pipeline
from shared.ranks.groups import World, init_world, make_groups
from tests import tiny, tiny_extras, tiny_original
from tests.httphost import FakeHost, asyncdiff, config_of, wait_for
from tests.pool import RankPool
from tests.seldom import seldom
from tests.test_host import until
from tests.test_matrix import body, psnr

STEPS = 3
CPU = torch.device("cpu")
EXACT_DB = 80.0


@dataclass
class Ground:
    """What an effect may stand on."""

    pool: RankPool
    folder: Path
    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]


@dataclass
class Made:
    """What a launch with some flags made of the tiny checkpoint."""

    pipe: Any
    latents: np.ndarray
    picture: np.ndarray
    plan: dict[str, Any]
    pictures: int


def made(name: Any = "sd1", ask: Any = None, **flags: Any) -> Made:
    """One request to a host of one rank, in this process."""
    size = {"width": 64, "height": 64} | {k: flags.pop(k) for k in ("width", "height") if k in flags}
    config = tiny.config(name, **size, **flags)
    backend = BACKENDS[config.backend]
    check_config(config, backend, 1)
    pipe = load_pipeline(config.spec, config, CPU, backend.needs(config, 1), quiet=True)
    world = tiny.world()
    return answer(PipelineEngine(pipe, config, world), config, ask or {})


def answer(engine: PipelineEngine, config: Any, ask: dict[str, Any]) -> Made:
    """What this rank holds of the picture: empty arrays where another one does."""
    given = {"lora": config.lora, "control_net": config.control_net, "ip_adapter": config.ip_adapter}
    asked = body(config.type, given) | {"output_format": None, "return_latent": True, "steps": STEPS} | ask
    reply = engine.generate(check_request(asked, config), lambda *_: None)
    latents = picture = np.zeros(())
    if reply is not None:
        reply.encode()
        latents = safetensors.torch.load(reply.latent or b"")["latent"].float().numpy()
        if config.spec.output == "image":
            picture = np.asarray(Image.open(io.BytesIO(reply.output[0])), dtype=np.float32) / 255
    return Made(engine.pipe, latents, picture, engine.plan, len(reply.output) if reply else 0)


@cache
def plain(name: str = "sd1") -> Made:
    return made(name)


def differs(a: np.ndarray, b: np.ndarray, decibels: float = EXACT_DB) -> bool:
    return a.shape != b.shape or psnr(a, b) < decibels


def rank_made(backend: str, name: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Runs on every rank."""
    ask = flags.pop("ask", {})
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    world = World(rank, size, rank, CPU, *make_groups(60, "gloo"))
    launch: dict[str, Any] = {"backend": backend, "width": 64, "height": 64, "warm_up_steps": 1}
    config = replace(tiny.config(name), **launch | flags)
    check_config(config, BACKENDS[backend], size)
    engine = BACKENDS[backend].build_engine(config, world)
    with collecting_warnings() as warned:
        found = answer(engine, config, ask)
    parameters = engine.parameters
    engine.close()
    return {
        "latents": found.latents, "picture": found.picture, "plan": found.plan, "parameters": parameters,
        "warnings": warned,
    }  # fmt: skip


PARALLEL: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
"""What launches have made that several flags are compared with."""


def parallel(ground: Ground, ranks: int, backend: str = "asyncdiff", name: str = "sd1", **flags: Any) -> Any:
    """(latents, plan) of the rank that holds the picture."""
    launch = repr((ranks, backend, name, {"warm_up_steps": 1} | flags))
    if launch not in PARALLEL:
        found = ground.pool.run(rank_made, ranks, backend, name, flags)
        PARALLEL[launch] = next((f["latents"], f["plan"]) for f in found if f["latents"].ndim)
    return PARALLEL[launch]


Effect = Callable[[Ground], None]
EFFECTS: dict[str, Effect] = {}


def shows(*flags: str) -> Callable[[Effect], Effect]:
    def add(effect: Effect) -> Effect:
        EFFECTS.update({flag: effect for flag in flags})
        return effect

    return add


# The model


@shows("type")
def _(ground: Ground) -> None:
    assert type(made("pixa").pipe).__name__ == "PixArtAlphaPipeline"
    assert type(plain().pipe).__name__ == "StableDiffusionPipeline"


@shows("checkpoint")
def _(ground: Ground) -> None:
    other = ground.folder / "other"
    pipe = tiny.load("sd1")
    pipe.unet.conv_out.weight.data += 0.1
    pipe.save_pretrained(other)
    assert differs(made(checkpoint=str(other)).latents, plain().latents)


@shows("variant")
def _(ground: Ground) -> None:
    half = made(variant="bf16")
    assert half.pipe.unet.dtype == half.pipe.vae.dtype == torch.bfloat16
    assert plain().pipe.unet.dtype == torch.float32 and 15 < psnr(half.latents, plain().latents) < 60


@shows("width", "height")
def _(ground: Ground) -> None:
    assert made(width=96, height=80).picture.shape == (80, 96, 3)


@shows("scheduler")
def _(ground: Ground) -> None:
    found = made(scheduler="k_euler")
    assert type(found.pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert found.pipe.scheduler.config.use_karras_sigmas and differs(found.latents, plain().latents)


@shows("vae")
def _(ground: Ground) -> None:
    found = made(vae=str(tiny_extras.vae("sd1")))
    assert not differs(found.latents, plain().latents) and differs(found.picture, plain().picture)


@shows("gguf_model")
def _(ground: Ground) -> None:
    found = made(gguf_model=str(tiny_original.gguf("sd1")))
    kinds = {type(p).__name__ for p in found.pipe.unet.parameters()}
    assert "GGUFParameter" in kinds and differs(found.latents, plain().latents)


@shows("quantize_to")
def _(ground: Ground) -> None:
    found = made(quantize_to="int8")
    assert any("QLinear" in type(m).__name__ for m in found.pipe.unet.modules())
    assert any("QLinear" in type(m).__name__ for m in found.pipe.text_encoder.modules())
    assert differs(found.latents, plain().latents)


# Features


@shows("lora")
def _(ground: Ground) -> None:
    path = str(tiny_extras.lora("sd1"))
    assert differs(made(lora={path: 1.0}).latents, plain().latents)
    assert not differs(made(lora={path: 0.0}).latents, plain().latents)


@shows("lora_dir", "allow_lora_paths")
def _(ground: Ground) -> None:
    folder = ground.folder / "loras"
    folder.mkdir()
    style = folder / "style.safetensors"
    shutil.copy(tiny_extras.lora("sd1"), style)
    found = made(lora_dir=(str(folder),), ask={"lora_scales": {"style": 1.0}})
    assert not differs(found.latents, made(lora={str(style): 1.0}).latents)
    assert differs(found.latents, plain().latents)
    for allowed, status in ((False, 422), (True, 200)):
        with FakeHost(config_of(allow_lora_paths=allowed)) as host:
            assert host.post("/lora", json={"path": str(style)}).status_code == status


@shows("cache_dir")
def _(ground: Ground) -> None:
    checkpoint, kept = ground.folder / "x.safetensors", ground.folder / "kept"
    checkpoint.write_bytes(b"weights")
    with FakeHost(config_of(checkpoint=str(checkpoint), cache_dir=str(kept))) as host:
        host.status.ready()
        until(lambda: (kept / "hashes.json").exists(), 10)
    assert hashlib.sha256(b"weights").hexdigest() in (kept / "hashes.json").read_text()


@shows("sizes")
def _(ground: Ground) -> None:
    """A size that is warmed compiles nothing at its first request."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = {"compile_unet": True, "compile_backend": "eager", "width": 64, "height": 64}
    config = tiny.config("pixa", **flags, sizes=((96, 64), (64, 64)))
    status, told = HostStatus(config.backend, config.type, 1), list[tuple[int, str]]()
    ground.patch.setattr(status, "at", lambda *state: told.append(state))
    pipe = load_pipeline(config.spec, config, CPU, BACKENDS[config.backend].needs(config, 1), quiet=True)
    on = PipelineEngine(pipe, config, tiny.world())
    warm_up(on, config, status)
    assert told == [(75, "warming up at 64x64, size 1 of 2"), (85, "warming up at 96x64, size 2 of 2")]
    counts = []
    for width in (96, 64, 128):
        counts.append(graph_count())
        answer(on, config, {"width": width, "height": 64})
    assert counts[0] == counts[1] == counts[2] < graph_count()


@shows("state_dir", "keep_jobs", "keep_bytes")
def _(ground: Ground) -> None:
    def listed(host: FakeHost) -> list[str]:
        return [job["id"] for job in host.get("/jobs").json()["jobs"]]

    kept = {"state_dir": str(ground.folder / "state")}
    for more, left in (
        ({}, ["second-1", "first-01"]),
        ({"keep_bytes": 1}, ["second-1"]),
        ({"keep_jobs": 1e-3}, []),
    ):
        with FakeHost(config_of(**kept)) as host:
            for id in ("first-01", "second-1"):
                host.generate({"seed": 7}, headers={"X-Request-Id": id})
        with FakeHost(config_of(**kept | more)) as host:
            assert listed(host) == left


@shows("refiner")
def _(ground: Ground) -> None:
    path = str(tiny_extras.refiner())
    found = made("sdxl", refiner=path)
    assert differs(found.latents, plain("sdxl").latents) and found.plan["refiner"]
    without = made("sdxl", refiner=path, ask={"refiner_start": 1.0})
    assert not differs(without.latents, plain("sdxl").latents)


@shows("embeddings_dir")
def _(ground: Ground) -> None:
    folder = (str(tiny_extras.embeddings("sd1")),)
    assert differs(made(embeddings_dir=folder).latents, plain().latents)
    other = {"positive": "a small red dog"}
    assert not differs(made(embeddings_dir=folder, ask=other).latents, made(ask=other).latents)


@shows("control_net")
def _(ground: Ground) -> None:
    path = str(tiny_extras.control_net("sd1"))
    assert differs(made(control_net={path: 1.0}).latents, plain().latents)
    assert not differs(made(control_net={path: 0.0}).latents, plain().latents)


@shows("ip_adapter")
def _(ground: Ground) -> None:
    path = str(tiny_extras.ip_adapter("sd1"))
    assert differs(made(ip_adapter={path: 1.0}).latents, plain().latents)


@shows("motion_module", "motion_adapter", "motion_adapter_lora")
def _(ground: Ground) -> None:
    base = plain("ad").latents
    assert differs(made("ad", motion_adapter=str(tiny_extras.motion_adapter())).latents, base)
    assert differs(made("ad", motion_module=str(tiny_extras.motion_adapter("file"))).latents, base)
    assert differs(made("ad", motion_adapter_lora={str(tiny_extras.motion_lora()): 1.0}).latents, base)


@shows("compel")
def _(ground: Ground) -> None:
    """A weight in the prompt is a weight with compel, and plain text without."""

    def apart(**flags: Any) -> float:
        light, heavy = ({"positive": f"a (small){weight} cat"} for weight in ("0.2", "1.8"))
        return psnr(made(ask=light, **flags).latents, made(ask=heavy, **flags).latents)

    assert abs(apart(compel=True) - apart()) > 0.1


# Compiling


def compiled(ground: Ground, part: str, **flags: Any) -> tuple[int, Made]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = torch._dynamo.config
    kept = config.recompile_limit, config.accumulated_recompile_limit, config.fail_on_recompile_limit_hit
    try:
        found = made(**{part: True, "compile_backend": "eager"} | flags)
        return graph_count(), found
    finally:
        torch._dynamo.reset()
        config.recompile_limit, config.accumulated_recompile_limit, config.fail_on_recompile_limit_hit = kept


@shows("compile_unet", "compile_vae", "compile_text_encoder", "compile_backend")
def _(ground: Ground) -> None:
    """Each compiles a part of its own, through the backend that was named, and changes no picture."""
    seen: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        seen.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.register_backend(counting, "counting")
    for part in ("compile_unet", "compile_vae", "compile_text_encoder"):
        seen.clear()
        count, found = compiled(ground, part, compile_backend="counting")
        assert len(seen) == count > 0
        assert not differs(found.latents, plain().latents) and not differs(found.picture, plain().picture)


@shows("compile_mode", "compile_options", "compile_fullgraph_off")
def _(ground: Ground) -> None:
    given: list[dict[str, Any]] = []

    def noting(forward: Any, **named: Any) -> Any:
        given.append(named)
        return forward

    ground.patch.setattr(torch, "compile", noting)
    made(compile_vae=True, compile_mode="max-autotune", compile_fullgraph_off=True)
    assert given[0] == {"mode": "max-autotune", "fullgraph": False, "dynamic": False}
    given.clear()
    made(compile_vae=True, compile_options={"max_autotune": True})
    assert given[0] == {"options": {"max_autotune": True}, "fullgraph": True, "dynamic": False}


# Memory


@shows("enable_vae_tiling", "enable_vae_slicing")
def _(ground: Ground) -> None:
    tiled, sliced = made(enable_vae_tiling=True), made(enable_vae_slicing=True)
    assert tiled.pipe.vae.use_tiling and not plain().pipe.vae.use_tiling
    assert sliced.pipe.vae.use_slicing and not plain().pipe.vae.use_slicing
    big: dict[str, Any] = {"width": 128, "height": 128}
    assert differs(made(enable_vae_tiling=True, **big).picture, made(**big).picture)


@shows(
    "xformers_efficient",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_group_offload",
)
def _(ground: Ground) -> None:
    """Not on a CPU, and said before a weight is read; what they do on a GPU: test_memory.py."""
    ground.patch.setattr("shared.pipeline.loading._load", lambda *_: pytest.fail("weights were read"))
    flags = [flag for flag in EFFECTS if "offload" in flag or flag == "xformers_efficient"]
    for flag in flags:
        with pytest.raises(UsageError, match=f"--{flag}: .*CPU"):
            made(**{flag: True})


@shows("shard_weights")
def _(ground: Ground) -> None:
    """Each rank keeps half of what is sharded, and makes the same picture."""
    found = {}
    for shard in (False, True):
        flags = {"warm_up_steps": STEPS, "no_split_batch": True, "shard_weights": shard}
        found[shard] = ground.pool.run(rank_made, 2, "distrifuser", "sd1", flags)
    assert not differs(found[True][0]["latents"], found[False][0]["latents"], 120)
    for before, after in zip(found[False], found[True], strict=True):
        for model, sizes in before["parameters"].items():
            share = after["parameters"][model]["kept"] / sizes["kept"]
            assert sizes["kept"] == sizes["whole"] == after["parameters"][model]["whole"]
            # A tiny VAE has relatively large first and last layers, which stay whole.
            assert 0.5 <= share < (0.55 if model == "vae" else 0.52), model


@shows("fit")
def _(ground: Ground) -> None:
    """A launch that does not fit is refused without it, and given the flags that make it fit with it."""
    from shared.pipeline.memory_plan import MemoryPlan

    plan = MemoryPlan(tiny.config("sd1", width=64, height=64), BACKENDS["asyncdiff"], 1, "cpu",
                      torch.float32, [4 << 20])  # fmt: skip
    with pytest.raises(UsageError, match="it would fit with --quantize_to=float8"):
        plan.fitted()
    plan.config = replace(plan.config, fit=True)
    assert plan.fitted().quantize_to == "float8"


# Plans


@shows("preset")
def _(ground: Ground) -> None:
    """Its flags are set as if they had been given, and one that is given wins."""
    argv = ["--type=sd1", f"--checkpoint={tiny.checkpoint('sd1')}", "--preset=fast"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        asked, own = (
            parse_config(BACKENDS["asyncdiff"], BACKENDS, [*argv, *more])
            for more in ([], ["--async_steps=2"])
        )
    assert (asked.use_cfg_parallel, asked.async_steps) == (True, "auto")
    assert own == replace(asked, async_steps=2)


@shows("warm_up_steps")
def _(ground: Ground) -> None:
    exact, _ = parallel(ground, 2, warm_up_steps=STEPS)
    stale, plan = parallel(ground, 2, warm_up_steps=1)
    assert not differs(exact, plain().latents) and differs(stale, plain().latents)
    assert plan["warm_up_steps"] == 1
    one, other = ground.pool.run(rank_made, 2, "asyncdiff", "sd1", {"warm_up_steps": "auto"})
    assert one["plan"]["warm_up_steps"] == "auto" and one["warnings"] == other["warnings"]
    assert re.match(r"steps: \d+ of \d+ steps were asynchronous", one["warnings"][0])
    flags = {"warm_up_steps": None, "ask": {"steps": 1, "scheduler": "ddim"}}
    few = ground.pool.run(rank_made, 2, "asyncdiff", "sd1", flags)
    told = "this takes about as long as on one rank, or longer: 1 of 1 steps are exact"
    assert all(rank["warnings"][0].startswith(told) and len(rank["warnings"]) == 1 for rank in few)


@shows("device")
def _(ground: Ground) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device: cuda needs a GPU for every rank"):
            ground.patch.setenv("RANK", "0")
            ground.patch.setenv("WORLD_SIZE", "1")
            init_world("cuda", 5)
    assert ground.pool.run(rank_device, 1, "cpu") == ["cpu"]


def rank_device(device: str) -> str:
    os.environ.update(RANK="0", WORLD_SIZE="1")
    return init_world(device, 5).device.type


@shows("model_n", "stride")
def _(ground: Ground) -> None:
    three, plan = parallel(ground, 3, model_n=3)
    assert len(plan["stages"]) == 3
    strided, plan = parallel(ground, 3, model_n=2, stride=2)
    assert len(plan["stages"]) == 2 and differs(strided, three)


@shows("async_steps")
def _(ground: Ground) -> None:
    every, _ = parallel(ground, 2)
    one, plan = parallel(ground, 2, async_steps=1)
    assert plan["async_steps"] == 1 and differs(one, every) and differs(one, plain().latents)
    shared, plan = parallel(ground, 2, use_cfg_parallel=True, async_steps=1)
    assert plan["hybrid"] and differs(shared, one) and differs(shared, plain().latents)
    _, plan = parallel(ground, 2, use_cfg_parallel=True, async_steps="auto")
    assert plan["hybrid"] and plan["async_steps"] == "auto"


@shows("time_shift")
def _(ground: Ground) -> None:
    shifted, _ = parallel(ground, 2, time_shift=True)
    assert differs(shifted, parallel(ground, 2)[0])


@shows("stage_weights")
def _(ground: Ground) -> None:
    _, plan = parallel(ground, 2, stage_weights=(4.0, 1.0))
    first, second = (stage["share"] for stage in plan["stages"])
    assert first > 2 * second


@shows("auto_balance")
def _(ground: Ground) -> None:
    """Measured speeds of the ranks take the place of equal ones."""
    _, plan = parallel(ground, 2, auto_balance=True)
    assert len(plan["stage_weights"]) == 2 and all(0 < w <= 1 for w in plan["stage_weights"])
    assert parallel(ground, 2, stage_weights=(1.0, 1.0))[1]["stage_weights"] == (1.0, 1.0)


@shows("use_cfg_parallel")
def _(ground: Ground) -> None:
    exact, plan = parallel(ground, 2, use_cfg_parallel=True)
    assert plan["cfg_split"] and not differs(exact, plain().latents)


@shows("no_cuda_graph")
def _(ground: Ground) -> None:
    """On a GPU, where one rank captures its steps too; its pipeline is not touched at all without."""
    world = tiny.world("cuda")
    captured: list[bool] = []

    def note(*args: Any, **named: Any) -> Any:
        captured.append(named["cuda_graph"])
        return Plain(args[0])

    ground.patch.setattr("shared.parallel.asyncdiff.AsyncDiff", note)
    ground.patch.setattr("shared.parallel.distrifusion.DistriFusion", note)
    for backend in ("asyncdiff", "distrifuser"):
        attach = importlib.import_module(f"shared.backends.{backend}").attach
        for no_graph in (False, True):
            config = replace(tiny.config("sd1"), backend=backend, no_cuda_graph=no_graph)
            attach(plain().pipe, config, world).close()
    assert captured == [True, True]
    for name, method, degree in (
        ("XDiT", "exact", "ulysses"),
        ("XDiTPipeFusion", "pipefusion", "pipefusion"),
    ):
        ground.patch.setattr(f"shared.parallel.xdit.{method}.{name}", note)
        degrees = Degrees(**{degree: 2})
        for no_graph in (False, True):
            config = replace(tiny.config("flux"), backend="xdit", no_cuda_graph=no_graph)
            groups: Any = SimpleNamespace(degrees=degrees, device=torch.device("cuda"))
            importlib.import_module("shared.backends.xdit").attach(plain("flux").pipe, config, world, groups)
    assert captured == [True, True, True, False, True, False]


def test_one_stage_on_a_gpu_takes_the_flags_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def note(*args: Any, **named: Any) -> Any:
        given.append((args[1], named["pace"].warm_up_steps, named["stage_weights"]))
        return Plain(args[0])

    monkeypatch.setattr("shared.parallel.asyncdiff.AsyncDiff", note)
    attach = importlib.import_module("shared.backends.asyncdiff").attach
    config = tiny.config("sd1", warm_up_steps=0, stage_weights=(1.0, 1.0))
    attach(plain().pipe, config, tiny.world("cuda"))
    assert given == [(1, None, None)]  # the default warm-up: one stage has none to wait for


@shows("parallelism")
def _(ground: Ground) -> None:
    patch, _ = parallel(ground, 2, "distrifuser", no_split_batch=True)
    naive, _ = parallel(ground, 2, "distrifuser", no_split_batch=True, parallelism="naive_patch")
    tensor, plan = parallel(ground, 2, "distrifuser", no_split_batch=True, parallelism="tensor")
    assert differs(patch, naive) and differs(patch, plain().latents)
    assert not differs(tensor, plain().latents) and "channels" in plan["ranks"][0]


@shows("split_scheme", "sync_mode")
def _(ground: Ground) -> None:
    row, _ = parallel(ground, 2, "distrifuser", no_split_batch=True)
    column, _ = parallel(ground, 2, "distrifuser", no_split_batch=True, split_scheme="col")
    alone, _ = parallel(ground, 2, "distrifuser", no_split_batch=True, sync_mode="no_sync")
    exact, _ = parallel(ground, 2, "distrifuser", no_split_batch=True, sync_mode="full_sync")
    assert differs(row, column) and differs(row, alone)
    assert not differs(exact, plain().latents)


@shows("no_split_batch")
def _(ground: Ground) -> None:
    split, plan = parallel(ground, 2, "distrifuser")
    assert plan["split_batch"] and not differs(split, plain().latents)
    whole, plan = parallel(ground, 2, "distrifuser", no_split_batch=True)
    assert not plan["split_batch"] and differs(whole, plain().latents)


def xdit(ground: Ground, ranks: int, **flags: Any) -> Any:
    return parallel(ground, ranks, "xdit", "flux", **flags)


@shows("ulysses_degree", "ring_degree", "tensor_parallel_degree")
def _(ground: Ground) -> None:
    """Exact, and each in its own place of the plan."""
    for flag, name in (("ulysses", "ulysses"), ("ring", "ring"), ("tensor_parallel", "tensor")):
        latents, plan = xdit(ground, 2, **{f"{flag}_degree": 2})
        assert plan["degrees"][name] == 2 and psnr(latents, plain("flux").latents) >= EXACT_DB


@shows("pipefusion_parallel_degree", "num_pipeline_patch", "attn_layer_num_for_pp")
def _(ground: Ground) -> None:
    """Stale from the second step on, and otherwise so with other patches; the stages are as given."""
    two, plan = xdit(ground, 2, pipefusion_parallel_degree=2)
    assert plan["degrees"]["pipefusion"] == 2 and differs(two, plain("flux").latents, 100)
    four, _ = xdit(ground, 2, pipefusion_parallel_degree=2, num_pipeline_patch=4)
    assert differs(four, two, 100)
    _, uneven = xdit(ground, 2, pipefusion_parallel_degree=2, attn_layer_num_for_pp=(2, 4))
    assert (plan["blocks"], uneven["blocks"]) == (3, 2)


@shows("data_parallel_degree")
def _(ground: Ground) -> None:
    _, plan = xdit(ground, 2, data_parallel_degree=2)
    assert plan["degrees"]["data"] == 2


@shows("use_parallel_vae")
def _(ground: Ground) -> None:
    _, plan = xdit(ground, 2, use_parallel_vae=True)
    assert plan["parallel_vae"]


@shows("exchange_dtype")
def _(ground: Ground) -> None:
    """Close to the exact picture and not equal to it, in xDiT and in DistriFusion."""
    for backend, name in (("xdit", "flux"), ("distrifuser", "sd1")):
        flags = {} if name == "flux" else {"no_split_batch": True, "warm_up_steps": 9}
        latents, plan = parallel(ground, 2, backend, name, exchange_dtype="int8", **flags)
        assert plan["exchange"] == "int8" and differs(latents, plain(name).latents, 120)
        assert not differs(latents, plain(name).latents, 30)


@shows("use_teacache", "use_fbcache")
def _(ground: Ground) -> None:
    """Blocks are passed over where steps differ little, which the picture shows."""
    sigmas = safetensors.torch.save({"sigmas": torch.linspace(1, 0.997, 4)})
    alike = {"steps": 4, "sigmas": base64.b64encode(sigmas).decode()}
    all_computed = made("flux", alike).latents
    for flag in ("use_teacache", "use_fbcache"):
        latents, plan = xdit(ground, 1, ask=alike, **{flag: True})
        assert plan["cache"]["cache"] in flag and differs(latents, all_computed, 130), flag


@shows("step_cache")
def _(ground: Ground) -> None:
    """A step is left out, which the picture shows."""
    settings = CacheSettings("mask", mask="1101")
    latents, plan = xdit(ground, 1, ask={"steps": 4}, step_cache=settings)
    assert plan["cache"] == {"cache": "mask", "mask": "1101"}
    assert differs(latents, made("flux", {"steps": 4}).latents, 130)
    latents, kept = parallel(ground, 1, step_cache=settings)
    assert kept["cache"] == plan["cache"] and differs(latents, plain().latents)


# Serving


@shows("port", "host")
def _(ground: Ground) -> None:
    with FakeHost() as first:
        port = first.server.port
    with FakeHost(config_of(port=port, host="127.0.0.2")) as host:
        assert requests.get(f"http://127.0.0.2:{port}/initialize", timeout=5).status_code == 200
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{port}/initialize", timeout=5)
        assert host.server.port == port


@shows("max_queue")
def _(ground: Ground) -> None:
    with FakeHost(config_of(max_queue=0)) as host:
        held = threading.Thread(target=host.generate, args=({"positive": "hold"},))
        held.start()
        while host.queue.running is None:
            time.sleep(0.005)
        refused = host.generate()
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        host.go_on.set()
        held.join()


@shows("max_queue_per_client", "trusted_proxies")
def _(ground: Ground) -> None:
    """tests/http/test_fairness.py: one client of two, behind a proxy, may let nothing wait but its own."""
    config = config_of(max_queue_per_client=1, trusted_proxies=("127.0.0.1/32",))
    with FakeHost(config) as host, ThreadPoolExecutor(3) as pool:

        def ask(client: str) -> requests.Response:
            return host.generate({"positive": "hold"}, headers={"X-Forwarded-For": client})

        held = [pool.submit(ask, "192.0.2.1")]
        wait_for(lambda: host.queue.running is not None)
        held.append(pool.submit(ask, "192.0.2.1"))
        wait_for(lambda: len(host.queue) == 1)
        refused = ask("192.0.2.1")
        assert refused.status_code == 429 and refused.headers["Retry-After"]
        held.append(pool.submit(ask, "192.0.2.2"))
        wait_for(lambda: len(host.queue) == 2)
        host.go_on.set()
        assert [future.result().status_code for future in held] == [200] * 3


@shows("request_timeout")
def _(ground: Ground) -> None:
    with FakeHost(config_of(request_timeout=0.2)) as host:
        assert host.generate({"positive": "slow", "steps": 20}).status_code == 504


@shows("stop_grace")
def _(ground: Ground) -> None:
    """tests/test_host.py stops hosts by it; here, that it is counted in seconds above 0."""
    assert config_of().stop_grace == 20.0 and config_of(stop_grace=3.0).stop_grace == 3.0


@shows("collective_timeout")
def _(ground: Ground) -> None:
    first, _ = ground.pool.run(left_alone, 2)
    assert 0.5 < first < 3


def left_alone() -> float:
    """Seconds until rank 0 gives up on a rank that does not come."""
    *_, compute = make_groups(1.0, "gloo")
    began = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1), group=compute)
    else:
        time.sleep(2.5)
    return time.monotonic() - began


@shows("log_level", "log_json")
def _(ground: Ground) -> None:
    log = logging.getLogger("host")
    try:
        set_up_logging(config_of(log_level="error"), 0)
        log.info("not told")
        set_up_logging(config_of(log_level="info", log_json=True), 0)
        log.info("told")
        warnings.warn("by a library", stacklevel=1)
    finally:
        logging.captureWarnings(False)
    lines = ground.capture.readouterr().err.splitlines()
    told, warned = map(json.loads, lines)
    assert told["message"] == "told" and told["level"] == "info"
    assert "by a library" in warned["message"] and warned["level"] == "warning"


@shows("api_key")
def _(ground: Ground) -> None:
    with FakeHost(config_of(api_key="secret")) as host:
        assert host.generate().status_code == 401
        assert host.generate(headers={"Authorization": "Bearer secret"}).status_code == 200
        assert host.get("/health").status_code == 200


@shows("api_key_file")
def _(ground: Ground) -> None:
    (ground.folder / "key").write_text("of-the-file\n")
    launch = ["--type=sd1", f"--checkpoint={tiny.checkpoint('sd1')}"]
    config = asyncdiff([*launch, f"--api_key_file={ground.folder}/key"])
    assert config.api_key == "of-the-file"


@shows("trusted_hosts", "allow_origin")
def _(ground: Ground) -> None:
    foreign = {"Host": "gpu.example", "Origin": "https://app.example"}
    with FakeHost() as host:
        assert host.get("/health", headers=foreign).status_code == 403
    trusting = config_of(trusted_hosts=("gpu.example",), allow_origin=("https://app.example",))
    with FakeHost(trusting) as host:
        answer = host.get("/health", headers=foreign)
        assert answer.status_code == 200
        assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"


@shows("max_pixel_steps")
def _(ground: Ground) -> None:
    with FakeHost(config_of(max_pixel_steps=64 * 64 * 10)) as host:
        assert host.generate({"width": 64, "height": 64, "steps": 10}).status_code == 200
        assert host.generate({"width": 64, "height": 64, "steps": 11}).status_code == 422


@shows("legacy_pickle")
def _(ground: Ground) -> None:
    """Without the flag the answer is a PNG, with it the pickle that the original clients read."""
    with FakeHost() as host:
        assert base64.b64decode(host.generate().json()["output"]).startswith(b"\x89PNG")
    with FakeHost(config_of(legacy_pickle=True)) as host:
        found = pickle.loads(base64.b64decode(host.generate().json()["output"]))
        assert isinstance(found, Image.Image)


@shows("config")
def _(ground: Ground) -> None:
    path = ground.folder / "host.yaml"
    path.write_text(f"type: sd1\ncheckpoint: {tiny.checkpoint('sd1')}\nport: 7777\nwidth: 128\n")
    config = asyncdiff([f"--config={path}", "--width=96"])
    assert (config.type, config.port, config.width) == ("sd1", 7777, 96)


# Of these test_matrix.py and the tests of parallel/ and pipeline/ show more, on hosts with these flags.
SHOWN_ELSEWHERE = {
    "async_steps",
    "auto_balance",
    "compile_unet",
    "pipefusion_parallel_degree",
    "shard_weights",
    "split_scheme",
    "ulysses_degree",
}


@pytest.mark.parametrize("flag", seldom(sorted(EFFECTS), set(EFFECTS) - SHOWN_ELSEWHERE))
def test_the_flag_has_its_effect(
    flag: str,
    pool: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = next(name for name, effect in EFFECTS.items() if effect is EFFECTS[flag])
    if flag != first:
        pytest.skip(f"shown together with --{first}")
    EFFECTS[flag](Ground(pool, tmp_path, monkeypatch, capsys))


def test_no_flag_is_left_out() -> None:
    flags = {f.name for backend in BACKENDS for f in BACKENDS[backend].config_flags} | {"config"}
    assert set(EFFECTS) == flags
