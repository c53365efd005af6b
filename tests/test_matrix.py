"""Every cell of the compatibility tables that says yes, through a host's own build_engine on two ranks.

For each backend, type and feature: at full warm-up the parallel engine makes what the plain pipeline makes,
in steady state it stays close, the feature changes the picture, and close() gives the plain pipeline back.
"""

from __future__ import annotations

import base64
import importlib
import io
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from shared.backends import BACKENDS
from shared.models import FEATURES, MODELS
from tests import tiny, tiny_extras, tiny_lycoris
from tests.pool import RankPool
from tests.seldom import seldom
from tests.tables import FROM_PICTURE

STEPS = 3
EXACT_DB = 45.0  # what the acceptance asks for in fp32; most are bit-identical

Flags = dict[str, Any]

# How a feature is switched on with the tiny files of a type. Flags that leave latents alone are seen by the
# decoded picture.
SETTINGS: dict[str, Callable[[str], Flags]] = {
    "lora": lambda name: {"lora": {str(tiny_extras.lora(name)): 1.0}},
    "control_net": lambda name: {"control_net": {str(tiny_extras.control_net(name)): 1.0}},
    "ip_adapter": lambda name: {"ip_adapter": {str(tiny_extras.ip_adapter(name)): 1.0}},
    "quantize_to": lambda name: {"quantize_to": "int8"},
    "compile_unet": lambda name: {"compile_unet": True, "compile_backend": "eager"},
    "compel": lambda name: {"compel": True},
    "embeddings_dir": lambda name: {"embeddings_dir": (str(tiny_extras.embeddings(name)),)},
    "refiner": lambda name: {"refiner": str(tiny_extras.refiner())},
    "motion_adapter": lambda name: {"motion_adapter": str(tiny_extras.motion_adapter())},
    "motion_module": lambda name: {"motion_module": str(tiny_extras.motion_adapter("file"))},
    "motion_adapter_lora": lambda name: {"motion_adapter_lora": {str(tiny_extras.motion_lora()): 1.0}},
}
SETTINGS |= {field: lambda name, field=field: {"start": field} for field in FROM_PICTURE}  # type: ignore[misc]
UNCHANGED = {"compile_unet"}  # same picture, made otherwise
# The second plan of a host whose methods differ in more than the warm-up steps, for a cell with these flags.
OTHERWISE: dict[str, Callable[[str, Flags], Flags]] = {
    "xdit": lambda name, flags: (
        {"ring_degree": 2}
        if {"control_net", "ip_adapter", "compile_unet", "start"} & set(flags)
        or BACKENDS["xdit"].refusal(MODELS[name], "pipefusion_parallel_degree")
        else {"pipefusion_parallel_degree": 2}
    )
}
EVERYTHING = ("lora", "control_net", "ip_adapter", "quantize_to", "compile_unet")
PAIRED = (*EVERYTHING, "compel", *FROM_PICTURE)


def encoded(name: str, seed: int, mode: str = "RGB") -> str:
    """A picture for a type, as a request has it."""
    out = io.BytesIO()
    tiny.picture(64 if MODELS[name].size_scale == 1 else 16, seed).convert(mode).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def body(name: str, flags: Flags) -> dict[str, Any]:
    """A request of this type, with the inputs that the flags want."""

    request: dict[str, Any] = {"steps": STEPS, "seed": 11, "output_format": "latent"}
    if "positive" in MODELS[name].fields:
        request |= {"positive": "a (small)1.5 red cat", "cfg": 5.0}
        if MODELS[name].guidance_branches == 2:
            request["negative"] = "blur"
    if MODELS[name].image == "needed" or flags.get("start"):
        request["image"] = encoded(name, 1)
        if MODELS[name].output == "video" and MODELS[name].image == "start":
            request["image"] = [encoded(name, seed) for seed in (1, 5, 6, 7)]
    if start := flags.get("start"):
        # Twice as many, of which the last half runs.
        request["steps"] = 2 * STEPS
        kind = MODELS[name].start(FROM_PICTURE[start], bool(flags.get("control_net")))
        if kind is not None and kind.strength is not None:
            request["strength"] = 0.5
        if start == "mask":
            request["mask"] = encoded(name, 4, "L")
    if flags.get("control_net"):
        request["control_image"] = encoded(name, 2)
    if flags.get("ip_adapter"):
        request["ip_image"] = encoded(name, 3)
    if MODELS[name].output == "video":
        request |= {"frames": 4 if MODELS[name].frames_factor == 1 else MODELS[name].frames_factor + 1}
        if "decode_chunk_size" in MODELS[name].fields:
            request["decode_chunk_size"] = 2
    return request


def fitting(name: str, flags: Flags) -> Flags:
    """With a ControlNet that was trained with masks where there is one and only such takes them."""
    start = MODELS[name].start("inpaint", control=True)
    if flags.get("start") != "mask" or not flags.get("control_net") or not (start and start.control_extra):
        return flags
    trained = tiny_extras.control_net(name, **{start.control_extra: 4})
    return flags | {"control_net": {str(trained): 1.0}}


def launch(
    backend: str, name: str, flags: Flags, parallel_flags: Flags
) -> tuple[Any, Any, Any, Callable[[Any], np.ndarray | None]]:
    """On one rank: a checked HostConfig, its World, the host's module, and latents that an engine makes of
    `body`; None on ranks that hold none."""
    import torch

    from shared.api.parsing import check_request
    from shared.launch.checks import check_config
    from shared.launch.flags import HostConfig
    from shared.ranks.groups import World, make_groups

    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    world = World(rank, size, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    asked = parallel_flags.pop("ask", {})
    common: Flags = {"backend": backend, "type": name, "width": 64, "height": 64}
    common["checkpoint"] = parallel_flags.pop("checkpoint", str(tiny.checkpoint(name)))
    launched = {flag: value for flag, value in fitting(name, flags).items() if flag != "start"}
    config = HostConfig(**common, **launched, **{"warm_up_steps": STEPS, **parallel_flags})
    check_config(config, BACKENDS[backend], size)
    request = check_request(body(name, flags) | asked, config)

    def latents(engine: Any) -> np.ndarray | None:
        reply = engine.generate(request, lambda step, steps: None)
        if reply is None:
            return None
        import safetensors.torch

        return safetensors.torch.load(reply.latent)["latent"].float().numpy()

    return config, world, importlib.import_module(f"shared.backends.{backend}"), latents


def run_cell(
    backend: str, name: str, flags: Flags, parallel_flags: Flags, twice: bool = True
) -> dict[str, Any]:
    """On one rank: the latents of the plain pipeline, exact, asynchronous; and, with `twice`, again each."""
    import torch

    from shared.pipeline.engine import PipelineEngine

    torch.manual_seed(0)
    torch._dynamo.reset()
    config, world, host, latents = launch(backend, name, flags, parallel_flags)
    engine = host.build_engine(config, world)
    text = repr(getattr(engine.pipe, config.spec.denoiser))
    exact = latents(engine)
    again = latents(engine) if twice else exact
    engine.close()
    plain_engine = PipelineEngine(engine.pipe, config, world)
    plain = None if exact is None else latents(plain_engine)  # of a rank that holds none, nothing is compared
    assert repr(getattr(engine.pipe, config.spec.denoiser)) == text
    fast = replace(config, warm_up_steps=1, **OTHERWISE.get(backend, lambda name, flags: {})(name, flags))
    if backend in OTHERWISE:
        stale_engine = host.build_engine(fast, world)
    else:
        stale_engine = PipelineEngine(engine.pipe, fast, world, lambda pipe: host.attach(pipe, fast, world))
    asynchronous = latents(stale_engine)
    plan = stale_engine.plan
    stale_engine.close()
    return {
        "exact method": plan.get("exact", False),
        "exact": exact,
        "again": again,
        "plain": plain,
        "asynchronous": asynchronous,
        "restored": latents(plain_engine) if twice and exact is not None else plain,
    }


def plain_of_one(backend: str, name: str, flags: Flags, parallel_flags: Flags) -> np.ndarray | None:
    """The latents of the plain pipeline, on a rank alone."""
    from shared.pipeline.engine import PipelineEngine

    config, world, host, latents = launch(backend, name, flags, parallel_flags)
    engine = host.build_engine(config, world)
    engine.close()
    return latents(PipelineEngine(engine.pipe, config, world))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB, with the range of `b` as the peak; infinite for equal arrays."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(float(np.ptp(b)) ** 2 / error)


# Types whose cell with everything is compiled too, and whose compiled cells are recorded: tracing takes long.
COMPILED = {"asyncdiff": ("sd1", "sdxl"), "distrifuser": (), "xdit": ()}
# The cells that run in every test run. launch/test_flags.py shows what each flag changes, and test_xdit.py,
# test_distrifusion.py and test_asyncdiff.py in parallel/ compare the types that are not named here.
OFTEN = {
    "asyncdiff": {
        ("ad", "motion_adapter_lora"),
        ("sd1", "nothing"),
        ("sd1", "compel"),
        ("sd1", "embeddings_dir"),
        ("sd1", "mask"),
        ("sdup", "everything"),
    },
    "distrifuser": {("sdxl", "refiner"), ("sdxl", "everything")},
    "xdit": {
        ("flux2", "nothing"),
        ("qwen", "image"),
    },
}
OFTEN_PAIRS = {("distrifuser", "sd2", "control_net", "ip_adapter")}


def supports(backend: str, name: str, *features: str) -> bool:
    """Whether a type may combine these on a host."""
    fields = [f for f in features if f in FROM_PICTURE]
    flags = [f for f in features if f not in FROM_PICTURE]
    if fields and MODELS[name].image == "needed":
        return False
    if len(fields) > 1 or any(BACKENDS[backend].refusal(MODELS[name], f) for f in flags):
        return False
    starts = [MODELS[name].start(FROM_PICTURE[f], "control_net" in flags) for f in fields]
    return all(s is not None and ("ip_adapter" not in flags or s.ip_adapter) for s in starts)


def cells(backend: str) -> list[Any]:
    """(type, feature) of every yes that has a setting above, and nothing and everything of each type."""
    found = []
    for name in BACKENDS[backend].types:
        features = [f for f in (*FEATURES, *FROM_PICTURE) if f in SETTINGS and supports(backend, name, f)]
        found += [(name, feature) for feature in ("nothing", *features, "everything")]
    assert OFTEN[backend] <= set(found)
    return seldom(found, OFTEN[backend])


def flags_of(backend: str, name: str, feature: str) -> Flags:
    if feature == "nothing":
        return {}
    features = [feature]
    if feature == "everything":
        left_out = () if name in COMPILED[backend] else ("compile_unet",)
        yes = [f for f in EVERYTHING if BACKENDS[backend].refusal(MODELS[name], f) is None]
        features = [f for f in yes if f not in left_out]
    flags: Flags = {}
    for f in features:
        flags |= SETTINGS[f](name)
    return flags


@pytest.fixture(scope="module")
def plain_latents() -> dict[tuple[str, str], np.ndarray]:
    """Latents of each type without any feature, kept for the question whether a feature changes anything."""
    return {}


@pytest.mark.parametrize(("name", "feature"), cells("asyncdiff"))
def test_asyncdiff(pool: RankPool, plain_latents: dict[Any, Any], name: str, feature: str) -> None:
    run_and_check(pool, plain_latents, "asyncdiff", name, feature)


@pytest.mark.parametrize(("name", "feature"), cells("distrifuser"))
def test_distrifuser(pool: RankPool, plain_latents: dict[Any, Any], name: str, feature: str) -> None:
    run_and_check(pool, plain_latents, "distrifuser", name, feature)


@pytest.mark.parametrize(("name", "feature"), cells("xdit"))
def test_xdit(pool: RankPool, plain_latents: dict[Any, Any], name: str, feature: str) -> None:
    run_and_check(pool, plain_latents, "xdit", name, feature)


def run_and_check(
    pool: RankPool, plain_latents: dict[Any, Any], backend: str, name: str, feature: str
) -> None:
    twice = feature in ("nothing", "everything")
    ranks = pool.run(run_cell, 2, backend, name, flags_of(backend, name, feature), {}, twice)
    check_cell(ranks, plain_latents, backend, name, feature)


def check_plans(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of the rank that holds the picture: equal to plain, and close by the second plan."""
    holder = next(r for r in ranks if r["exact"] is not None)
    assert psnr(holder["exact"], holder["plain"]) >= EXACT_DB
    stale = psnr(holder["asynchronous"], holder["plain"])
    if holder["exact method"]:
        assert stale >= EXACT_DB, f"the second plan: {stale:.1f} dB"
    else:
        assert 10 < stale < float("inf"), f"steady state: {stale:.1f} dB"
    return holder


def check_cell(
    ranks: list[dict[str, Any]], plain_latents: dict[Any, Any], backend: str, name: str, feature: str
) -> None:
    holder = check_plans(ranks)
    assert np.array_equal(holder["exact"], holder["again"]), "the same seed twice gives other latents"
    assert np.array_equal(holder["plain"], holder["restored"]), "close() did not give the pipeline back"
    if feature == "nothing":
        plain_latents[backend, name] = holder["plain"]
    elif (backend, name) in plain_latents:
        same = psnr(holder["plain"], plain_latents[backend, name])
        if feature in UNCHANGED:
            assert same >= EXACT_DB, f"{feature} must not change the picture: {same:.1f} dB"
        else:
            assert same < 80, f"{feature} changes nothing"


def pairs() -> list[Any]:
    """(backend, type, feature, feature) of all pairs that a type may combine."""
    found = [
        (backend, name, a, b)
        for a, b in itertools.combinations(PAIRED, 2)
        for backend, spec in BACKENDS.items()
        for name in spec.types
        if supports(backend, name, a, b)
    ]
    assert set(found) >= OFTEN_PAIRS
    return seldom(found, OFTEN_PAIRS)


@pytest.mark.parametrize(("backend", "name", "a", "b"), pairs())
def test_two_features_together(pool: RankPool, backend: str, name: str, a: str, b: str) -> None:
    flags = SETTINGS[a](name) | SETTINGS[b](name)
    check_plans(pool.run(run_cell, 2, backend, name, flags, {}, False, timeout=240))


def test_the_setting_of_every_feature_of_a_request_is_known() -> None:
    decoded_only = {"compile_vae", "compile_text_encoder", "enable_vae_tiling", "enable_vae_slicing"}
    gpu_only = {f for f in FEATURES if f.endswith("offload")}
    assert set(FEATURES) - decoded_only - gpu_only - {"gguf_model"} == set(SETTINGS) - set(FROM_PICTURE)


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        pytest.param(2, {"use_cfg_parallel": True}, marks=pytest.mark.slow),
        (2, {"use_cfg_parallel": True, "async_steps": 2}),
        pytest.param(4, {"use_cfg_parallel": True}, marks=pytest.mark.slow),
        pytest.param(3, {"stride": 2, "auto_balance": True}, marks=pytest.mark.slow),
        pytest.param(3, {"stage_weights": (1.0, 2.0, 1.0), "time_shift": True}, marks=pytest.mark.slow),
    ],
    ids=["cfg-2", "hybrid-2", "cfg-4", "stride-2", "weights"],
)
def test_asyncdiff_plans(pool: RankPool, size: int, flags: Flags) -> None:
    features = flags_of("asyncdiff", "sd1", "control_net")
    ranks = pool.run(run_cell, size, "asyncdiff", "sd1", features, flags)
    holder = next(r for r in ranks if r["exact"] is not None)
    assert psnr(holder["exact"], holder["plain"]) >= EXACT_DB
    stale = psnr(holder["asynchronous"], holder["plain"])
    if size == 2 and "async_steps" not in flags:
        assert stale >= EXACT_DB, "the CFG split alone is exact whatever the warm-up"
    else:
        assert 10 < stale < float("inf")


@pytest.mark.parametrize(
    ("backend", "name", "flags", "field"),
    [
        pytest.param(
            "asyncdiff", "sd1", {"use_cfg_parallel": True}, {"guidance_rescale": 0.7}, marks=pytest.mark.slow
        ),
        pytest.param("asyncdiff", "sdxl", {}, {"guidance_rescale": 0.7}, marks=pytest.mark.slow),
        ("asyncdiff", "sdup", {"use_cfg_parallel": True, "async_steps": 1}, {"noise_level": 60}),
        pytest.param("distrifuser", "sdxl", {}, {"guidance_rescale": 0.7}, marks=pytest.mark.slow),
    ],
)
def test_fields_on_two_ranks(pool: RankPool, backend: str, name: str, flags: Flags, field: Flags) -> None:
    holders = []
    for ask in ({}, field):
        ranks = pool.run(run_cell, 2, backend, name, {}, {**flags, "ask": ask}, False)
        holders.append(next(r for r in ranks if r["exact"] is not None))
        assert psnr(holders[-1]["exact"], holders[-1]["plain"]) >= EXACT_DB
    assert psnr(holders[1]["exact"], holders[0]["exact"]) < EXACT_DB, "the field changes nothing"


def second_ip_adapter(name: str) -> Path:
    """Another IP-Adapter of a type, for the same image encoder."""
    tensors = {key: t.flip(0).contiguous() for key, t in load_file(tiny_extras.ip_adapter(name)).items()}
    return tiny.cached(f"ip-second-{name}", lambda path: save_file(tensors, path), ".safetensors")


@pytest.mark.parametrize(
    ("backend", "name", "plan", "nets", "adapters"),
    [
        pytest.param("asyncdiff", "sdxl", {}, 2, 1, marks=pytest.mark.slow),
        ("asyncdiff", "sd1", {"use_cfg_parallel": True}, 2, 2),
        pytest.param("distrifuser", "sd1", {}, 2, 2, marks=pytest.mark.slow),
        pytest.param("distrifuser", "sdxl", {}, 0, 1, marks=pytest.mark.slow),
        ("xdit", "flux", {}, 2, 2),
        pytest.param("xdit", "sd3", {}, 2, 0, marks=pytest.mark.slow),
    ],
)
def test_several_pictures_and_lycoris(
    pool: RankPool, tmp_path: Path, backend: str, name: str, plan: Flags, nets: int, adapters: int
) -> None:
    """LoHa, LoKr, DoRA; a control image for each of several ControlNets; several adapter pictures."""
    lycoris, _ = tiny_lycoris.mixed(name, tiny_extras.denoiser(name), 0)
    flags: Flags = {"lora": {tiny_lycoris.write(tmp_path / "lycoris.safetensors", lycoris): 0.8}}
    ask: Flags = {}
    if nets:
        flags["control_net"] = {str(tiny_extras.control_net(name, seed)): 1.0 for seed in range(nets)}
        ask |= {"control_image": [encoded(name, 5), encoded(name, 6)], "controlnet_scale": [0.9, 0.4]}
    if adapters:
        flags["ip_adapter"] = {str(tiny_extras.ip_adapter(name)): 0.8}
        ask["ip_image"] = [encoded(name, 7), encoded(name, 8)]
    if adapters == 2:
        flags["ip_adapter"][str(second_ip_adapter(name))] = 0.5
        ask["ip_adapter_scale"] = [0.3, 0.6]
    ranks = pool.run(run_cell, 2, backend, name, flags, {**plan, "ask": ask}, False, timeout=240)
    others = {"control_image": [encoded(name, 6), encoded(name, 5)], "ip_image": [encoded(name, 9)]}
    asked = ask | {key: value for key, value in others.items() if key in ask}
    other = pool.run(plain_of_one, 1, backend, name, flags, {"ask": asked})[0]
    assert psnr(check_plans(ranks)["plain"], other) < 80, "which picture is whose must count"


@pytest.mark.parametrize(
    ("backend", "size", "flags"),
    [
        pytest.param("asyncdiff", 3, {"stride": 2, "time_shift": True}, marks=[pytest.mark.slow]),
        pytest.param("asyncdiff", 2, {"use_cfg_parallel": True, "async_steps": 1}, marks=[pytest.mark.slow]),
        ("distrifuser", 2, {"no_split_batch": True, "split_scheme": "col"}),
        pytest.param("distrifuser", 2, {"parallelism": "tensor"}, marks=[pytest.mark.slow]),
    ],
    ids=["stride-2", "hybrid-2", "columns", "tensor"],
)
def test_plans_from_a_picture(pool: RankPool, backend: str, size: int, flags: Flags) -> None:
    features = SETTINGS["control_net"]("sd1") | {"start": "mask"}
    ranks = pool.run(run_cell, size, backend, "sd1", features, flags, False)
    holder = next(r for r in ranks if r["exact"] is not None)
    assert psnr(holder["exact"], holder["plain"]) >= EXACT_DB
    assert psnr(holder["asynchronous"], holder["plain"]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS["asyncdiff"].types)
def test_the_hybrid_of_branches_and_stages(pool: RankPool, name: str) -> None:
    ranks = pool.run(run_cell, 2, "asyncdiff", name, {}, {"use_cfg_parallel": True, "async_steps": 2})
    holder = next(r for r in ranks if r["exact"] is not None)
    assert psnr(holder["exact"], holder["plain"]) >= EXACT_DB
    assert 10 < psnr(holder["asynchronous"], holder["plain"]) < float("inf")


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("sd1", ()),
        pytest.param("sd1", ("image",), marks=pytest.mark.slow),
        pytest.param("sd1", ("mask", "control_net", "ip_adapter"), marks=pytest.mark.slow),
        pytest.param("sdxl", (), marks=pytest.mark.slow),
        pytest.param("sdxl", ("mask", "control_net", "lora"), marks=pytest.mark.slow),
        ("flux", ("mask", "lora")),
    ],
)
def test_inpainting_checkpoints(pool: RankPool, name: str, features: tuple[str, ...]) -> None:
    flags: Flags = {}
    for feature in features:
        flags |= SETTINGS[feature](name)
    backend = "xdit" if name == "flux" else "asyncdiff"
    folder = str(tiny_extras.fill_checkpoint(name))
    check_plans(pool.run(run_cell, 2, backend, name, flags, {"checkpoint": folder}))
