"""shared.parallel.distrifusion on CPU ranks: exact in warm-up, then the paper's schedule."""

from __future__ import annotations

import functools
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from optimum.quanto import freeze, qint8, quantize
from peft import LoraConfig
from torch import nn

from shared.backends import BACKENDS
from shared.launch.errors import UsageError
from shared.launch.flags import HostConfig
from shared.parallel.cfg_split import CfgSplit
from shared.parallel.distrifusion import DistriFusion
from shared.parallel.distrifusion.decoder import PatchDecoder
from shared.parallel.distrifusion.differences import Differences
from shared.parallel.distrifusion.layers import PatchLayers, PatchRun
from shared.parallel.distrifusion.moments import (
    Shares,
    StaleMoments,
    apply_moments,
    group_moments,
    join_moments,
    pack_other_moments,
    whole_moments,
)
from shared.parallel.distrifusion.patch_exchange import PatchExchange
from shared.parallel.distrifusion.patched import cuts
from shared.parallel.rounding import BITS, SCALE_BYTES
from shared.parallel.surgery import Surgery
from shared.pipeline.compile import blocks
from tests import tiny, tiny_extras
from tests.pool import RankPool, is_last, once
from tests.seldom import seldom

STEPS = 3
DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
EXACT = 80.0
"""dB in fp32 that count as equal to the plain pipeline; patches reach 120 and more."""
SYNC_MODES = ("corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "full_sync", "no_sync")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures in 0..1, in dB; 200 when equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 200.0 if error == 0 else float(-10 * np.log10(error))


@functools.cache
def pipeline(name: str) -> Any:
    pipe = tiny.load(name)
    # One call of the UNet a step, none of which the scheduler forgets.
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def picture(pipe: Any, name: str, parallel: DistriFusion | None = None, **changes: Any) -> np.ndarray:
    changes = {"steps": STEPS} | changes
    if parallel is not None:
        parallel.begin(changes["steps"])
    return tiny.run(pipe, name, **changes)


def exact(name: str, cases: list[dict[str, Any]], size: dict[str, Any]) -> dict[str, Any]:
    """On each rank: how close every case is to the plain pipeline, and whether all is given back."""
    pipe = pipeline(name)
    parts = (pipe.unet, pipe.vae)
    plain = once(lambda: picture(pipe, name, **size))
    text = [repr(part) for part in parts]
    found = []
    for case in cases:
        with DistriFusion(pipe, **case) as parallel:
            found.append(psnr(picture(pipe, name, parallel, **size), plain))
            assert json.dumps(parallel.plan)
            assert [repr(part) for part in parts] == text or case.get("parallelism") == "tensor"
    untouched = not any("forward" in m.__dict__ for part in parts for m in part.modules())
    same = untouched and [repr(part) for part in parts] == text
    if is_last():
        same &= np.array_equal(picture(pipe, name, **size), plain)
    return {"psnr": found, "given back": same}


WARM: dict[str, Any] = {"warm_up_steps": 99}
WHOLE: dict[str, Any] = {"split_batch": False}
EXACT_CASES: dict[tuple[str, int], tuple[dict[str, Any], list[dict[str, Any]]]] = {
    # Sizes in pixels; a patch boundary is a multiple of 16 of them here.
    ("sdxl", 1): ({"height": 64, "width": 64}, [WARM, {"parallelism": "tensor"}]),
    ("sd1", 2): (
        {"height": 72, "width": 88},
        [
            WARM,
            WARM | WHOLE,
            WARM | WHOLE | {"projects": True},
            {"parallelism": "tensor"} | WHOLE,
            {"parallelism": "naive_patch", "split_scheme": "alternate"} | WARM | WHOLE,
        ],
    ),
    ("sdxl", 3): (
        {"height": 104, "width": 72},
        [
            {"sync_mode": "full_sync", "warm_up_steps": 0},
            {"sync_mode": "full_sync", "split_scheme": "col", "projects": True},
            {"parallelism": "tensor"},
            {"parallelism": "naive_patch", "sync_mode": "full_sync"},
        ],
    ),
    ("sd2", 4): (
        {"height": 88, "width": 64},
        [WARM, WARM | WHOLE, {"parallelism": "tensor"}, {"parallelism": "naive_patch"} | WARM],
    ),
    ("sd2", 5): ({"height": 72, "width": 64}, [WARM]),
}


@pytest.mark.parametrize(("name", "world_size"), seldom(EXACT_CASES, [("sdxl", 1), ("sd1", 2), ("sdxl", 3)]))
def test_full_warm_up_equals_the_plain_pipeline(pool: RankPool, name: str, world_size: int) -> None:
    tiny.checkpoint(name)
    size, cases = EXACT_CASES[name, world_size]
    for rank in pool.run(exact, world_size, name, cases, size):
        assert rank["given back"]
        assert min(rank["psnr"]) >= EXACT, dict(zip(map(str, cases), rank["psnr"], strict=True))


def simulated(unet: nn.Module, ranks: int, warm_up: int, mode: str, units: int) -> Any:
    """A UNet forward that plays the ranks one after the other.

    Every layer sees its whole input as it was one step before, with this rank's rows of this step in it; it
    computes the whole and keeps this rank's rows.
    """
    older: dict[str, torch.Tensor] = {}
    old: dict[str, torch.Tensor] = {}
    new: dict[str, torch.Tensor] = {}
    state = SimpleNamespace(rank=None, calls=0)
    rows = cuts(units, 2, ranks)

    def mine(whole: torch.Tensor, dim: int) -> slice:
        length = whole.shape[dim]
        return slice(rows[state.rank] * length // units, rows[state.rank + 1] * length // units)

    def inserted(name: str, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, slice]:
        at = mine(old[name], dim)
        new.setdefault(name, old[name].clone()).narrow(dim, at.start, at.stop - at.start).copy_(x)
        whole = old[name].clone()
        whole.narrow(dim, at.start, at.stop - at.start).copy_(x)
        return whole, at

    def norm(x: torch.Tensor, name: str, layer: nn.GroupNorm, original: Any) -> torch.Tensor:
        whole, at = inserted(name, x, 2)
        if mode == "separate_gn":
            return original(x)
        if mode == "stale_gn":
            return original(whole)[:, :, at]

        def moments(t: torch.Tensor, mine: bool) -> torch.Tensor:
            others = torch.cat([t[:, :, : at.start], t[:, :, at.stop :]], 2)
            t = (t[:, :, at] if mine else others).reshape(t.shape[0], layer.num_groups, -1)
            return torch.stack([t.mean(2), t.var(2, correction=0)])

        before, own = moments(old[name], True), group_moments(x, layer.num_groups)
        scale = torch.stack([before[1].sqrt(), before[1]])
        then, now = (before - moments(older[name], True)) / scale, (own - before) / scale
        ratio = ((now * then).sum((0, 2)) / then.square().sum((0, 2))).clamp(0, 2)[:, None]
        others = moments(old[name], False)
        others = others + ratio * (others - moments(older[name], False))
        share = (at.stop - at.start) / whole.shape[2]
        mean = share * own[0] + (1 - share) * others[0]
        square = share * (own[1] + own[0] ** 2) + (1 - share) * (others[1].clamp_min(0) + others[0] ** 2)
        return apply_moments(x, mean, square - mean**2, layer.weight, layer.bias, layer.eps)

    def override(name: str, module: nn.Module) -> None:
        original = module.forward

        def forward(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if state.rank is None:
                new[name] = x
                return original(x, **kwargs)
            if isinstance(module, Attention):
                return original(x, **(kwargs | {"encoder_hidden_states": inserted(name, x, 1)[0]}))
            if isinstance(module, nn.GroupNorm):
                return norm(x, name, module, original)
            whole, at = inserted(name, x, 2)
            conv: Any = module
            stride = conv.stride[0]
            return original(whole)[:, :, at.start // stride : -(-at.stop // stride)]

        module.forward = forward

    for name, module in unet.named_modules():
        if (isinstance(module, Attention) and not module.is_cross_attention) or isinstance(
            module, nn.GroupNorm | nn.Conv2d
        ):
            override(name, module)
    forward = unet.forward

    def answer(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        step, state.calls = state.calls, state.calls + 1
        new.clear()
        if step < warm_up:
            out = forward(sample, *args, **kwargs)
        else:
            # The first convolution always sees the whole sample of this step.
            old["conv_in"] = sample
            parts = []
            for state.rank, (start, stop) in enumerate(pairwise(rows)):
                parts.append(forward(sample[:, :, start:stop], *args, **kwargs)[0])
            state.rank = None
            out = (torch.cat(parts, 2),)
        older.update(old)
        old.update(new)
        return out

    return answer


def steady(name: str, modes: tuple[str, ...], steps: int, size: dict[str, Any]) -> dict[str, Any]:
    pipe = pipeline(name)
    plain = once(lambda: picture(pipe, name, steps=steps, **size))
    found: dict[str, Any] = {}
    ranks = dist.get_world_size()
    for mode in modes:
        settings: dict[str, Any] = {
            "sync_mode": mode,
            "warm_up_steps": 2,
            "split_batch": False,
            "bundle_bytes": 20_000,
        }
        with DistriFusion(pipe, **settings) as parallel:
            first = picture(pipe, name, parallel, steps=steps, **size)
            exchange = next(iter(parallel.models[0].layouts)).exchange
            assert exchange is not None
            counts = [exchange.messages, exchange.bytes, exchange.waits]
            again = picture(pipe, name, parallel, steps=steps, **size)
            held = parallel.plan["buffers_bytes"]
        found[mode] = {
            "psnr": psnr(first, plain), "bytes": first.tobytes(), "again": np.array_equal(first, again),
            "counts": counts, "held": held,
        }  # fmt: skip
        if mode in ("corrected_async_gn", "stale_gn", "separate_gn") and dist.get_rank() == 0:
            pretend = tiny.load(name)
            pretend.scheduler = pipe.scheduler
            pretend.unet.forward = simulated(pretend.unet, ranks, 2, mode, size["height"] // 8)
            simulation = tiny.run(pretend, name, steps=steps, **size)
            found[mode]["simulation"] = psnr(first, simulation)
    return found


@pytest.mark.parametrize(
    ("name", "world_size", "height"), seldom([("sd1", 2, 64), ("sdxl", 3, 80)], [("sd1", 2, 64)])
)
def test_steady_state_is_on_schedule_in_every_sync_mode(
    pool: RankPool, name: str, world_size: int, height: int
) -> None:
    tiny.checkpoint(name)
    steps = 5
    found = pool.run(steady, world_size, name, SYNC_MODES, steps, {"height": height, "width": 64})
    for mode in SYNC_MODES:
        assert len({rank[mode]["bytes"] for rank in found}) == 1 and all(
            rank[mode]["again"] for rank in found
        )
    mine = found[0]
    assert mine["full_sync"]["psnr"] >= EXACT
    for mode in SYNC_MODES:
        if mode != "full_sync":
            assert 15 <= mine[mode]["psnr"] < EXACT, (mode, mine[mode]["psnr"])
    for mode in ("corrected_async_gn", "stale_gn", "separate_gn"):
        assert mine[mode]["simulation"] >= 75, (mode, mine[mode]["simulation"])
    assert len({mine[mode]["bytes"] for mode in SYNC_MODES}) >= 5

    # What travels: [messages, bytes, times a layer waited], of this rank.
    counts = {mode: mine[mode]["counts"] for mode in SYNC_MODES}
    warm = counts["no_sync"][2]
    layers = warm // 2
    assert counts["no_sync"][2] == counts["stale_gn"][2] == counts["separate_gn"][2] == 2 * layers
    assert warm < counts["sync_gn"][2] < steps * layers
    # Where all steps are exact, a norm and its convolution wait once.
    fused = counts["full_sync"][2] // steps
    assert counts["full_sync"][2] == fused * steps and fused < 0.75 * layers
    assert counts["no_sync"][1] < counts["separate_gn"][1] < counts["stale_gn"][1]
    assert counts["corrected_async_gn"][1] == counts["stale_gn"][1]
    # Three steps without waiting take less than a third of the messages of three steps with it.
    late = counts["stale_gn"][0] - counts["no_sync"][0]
    assert 0 < late < (steps - 2) * counts["full_sync"][0] / steps / 3
    assert mine["full_sync"]["held"] == 0 < mine["no_sync"]["held"] < mine["separate_gn"]["held"]


def on_the_demo() -> dict[str, list[float]]:
    """How far one step leads from the path of plain diffusers, summed over its steps, for each picture.

    Every step starts on that path: over many steps, deviations grow by chance more than by method.
    """
    pipe = diffusers.DiffusionPipeline.from_pretrained(DEMO)
    pipe.set_progress_bar_config(disable=True)
    far = torch.zeros(4)

    def recorded() -> list[torch.Tensor]:
        path: list[torch.Tensor] = []

        def record(pipe: Any, step: int, t: Any, given: dict[str, torch.Tensor]) -> dict[str, Any]:
            path.append(given["latents"])
            return {}

        paint(record)
        return path

    def compare(pipe: Any, step: int, t: Any, given: dict[str, torch.Tensor]) -> dict[str, Any]:
        far.add_((given["latents"] - path[step]).square().mean((1, 2, 3)))
        return {"latents": path[step].clone()}

    def paint(at_end: Any) -> None:
        pipe(
            ["two small green circles", "a large red square", "three blue triangles", "a yellow circle"],
            num_inference_steps=12, guidance_scale=4.0, generator=torch.Generator().manual_seed(3),
            output_type="latent", callback_on_step_end=at_end,
        )  # fmt: skip

    path = once(recorded)
    found = {}
    for mode in ("corrected_async_gn", "stale_gn", "sync_gn"):
        with DistriFusion(pipe, sync_mode=mode, warm_up_steps=2, split_batch=False) as parallel:
            parallel.begin(12)
            paint(compare)
        found[mode] = far.tolist()
        far.zero_()
    return found


@pytest.mark.slow
def test_corrected_moments_lead_less_astray_than_stale_ones(pool: RankPool) -> None:
    corrected, stale, waited = pool.run(on_the_demo, 2)[0].values()
    assert all(a < b for a, b in zip(corrected, stale, strict=True)), (corrected, stale)
    assert 0 < sum(waited) < sum(corrected) < 0.8 * sum(stale)


def shapes() -> dict[str, Any]:
    name, pipe = "sd1", pipeline("sd1")
    changes: tuple[dict[str, Any], ...]
    changes = {}, {"height": 88, "width": 40}, {"guidance_scale": 1.0}, {"height": 32, "width": 48}, {}
    requests = [{"steps": 2} | change for change in changes]
    plain = once(lambda: [picture(pipe, name, **request) for request in requests])
    found: dict[str, Any] = {}
    with DistriFusion(pipe, max_shapes=1, **WARM) as parallel:
        made = [picture(pipe, name, parallel, **request) for request in requests]
        found["exact"] = [psnr(a, b) for a, b in zip(made, plain, strict=True)]
    for kept in (3, 1):
        with DistriFusion(pipe, warm_up_steps=1, max_shapes=kept, **WHOLE) as parallel:
            made = [picture(pipe, name, parallel, **request) for request in requests]
            found[f"steady {kept}"] = [psnr(a, b) for a, b in zip(made, plain, strict=True)]
            found[f"bytes {kept}"] = [image.tobytes() for image in made]
            with pytest.raises(
                ValueError, match=r"16 pixels make only 1 patches of 16.*\(32 for equal patches"
            ):
                picture(pipe, name, parallel, height=16)
    with DistriFusion(pipe), pytest.raises(RuntimeError, match="must be called before a generation"):
        tiny.run(pipe, name)
    return found


def test_other_sizes_and_guidance_and_back(pool: RankPool) -> None:
    tiny.checkpoint("sd1")
    for rank in pool.run(shapes, 2):
        assert min(rank["exact"]) >= EXACT
        assert max(rank["steady 3"]) < EXACT
        assert rank["bytes 3"] == rank["bytes 1"]
        assert rank["bytes 3"][0] == rank["bytes 3"][-1]


def dressed(name: str) -> dict[str, Any]:
    """LoRA, IP-Adapter and ControlNet together on a quantized UNet; scales that change in between."""
    base = tiny.load(name)
    nets = [diffusers.ControlNetModel.from_pretrained(tiny_extras.control_net(name, seed)) for seed in (0, 1)]
    cls = {
        "sd1": diffusers.StableDiffusionControlNetPipeline,
        "sdxl": diffusers.StableDiffusionXLControlNetPipeline,
    }[name]
    pipe = cls.from_pipe(base, controlnet=nets)
    pipe.set_progress_bar_config(disable=True)
    weights = tiny_extras.ip_adapter(name)
    pipe.load_ip_adapter(
        str(weights.parent), subfolder="", weight_name=weights.name, image_encoder_folder="image_encoder"
    )
    lora = tiny_extras.lora(name)
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="one")
    extra: dict[str, Any] = {
        "image": [tiny.picture(), tiny.picture(seed=1)], "ip_adapter_image": tiny.picture(32, 2), "steps": 2,
        "controlnet_conditioning_scale": [0.7, 0.4],
    }  # fmt: skip
    found: dict[str, Any] = {}

    def scaled(parallel: DistriFusion | None, scales: tuple[float, ...] = (1.0, 0.3)) -> list[np.ndarray]:
        made = []
        for scale in scales:
            pipe.set_ip_adapter_scale(scale)
            pipe.set_adapters("one", scale)
            made.append(picture(pipe, name, parallel, **extra))
        return made

    plain = once(lambda: scaled(None))
    assert psnr(*plain) < EXACT - 20

    def check(key: str, **settings: Any) -> None:
        text = repr(pipe.unet), repr(pipe.controlnet)
        with DistriFusion(pipe, **settings) as parallel:
            made = scaled(parallel)
        found[key] = [psnr(a, b) for a, b in zip(made, plain, strict=True)], (
            repr(pipe.unet), repr(pipe.controlnet)
        ) == text  # fmt: skip

    check("all", **WARM | WHOLE)
    check("all, steady", warm_up_steps=1, **WHOLE)
    with pytest.raises(ValueError, match="LoRA; fuse it first"):
        DistriFusion(pipe, "tensor", split_batch=False)
    assert not any("forward" in m.__dict__ for m in pipe.unet.modules())
    assert not is_last() or np.array_equal(scaled(None, (0.3,))[0], plain[1])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with DistriFusion(pipe, "tensor", split_batch=False) as parallel:
        made = picture(pipe, name, parallel, **extra)
    found["tensor"] = [psnr(made, picture(pipe, name, **extra))], True
    quantize(pipe.unet, weights=qint8)
    freeze(pipe.unet)
    with DistriFusion(pipe, **WARM | WHOLE) as parallel:
        made = picture(pipe, name, parallel, **extra)
    found["quantized"] = [psnr(made, picture(pipe, name, **extra))], True
    with pytest.raises(ValueError, match=r"supports only plain weights; this is a Q"):
        DistriFusion(pipe, "tensor", split_batch=False)
    return found


def refused() -> None:
    """On a rank: what tensor parallelism cannot divide."""
    pipe, lora = tiny.load("sd1"), tiny_extras.lora("sd1")
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="one")
    with pytest.raises(ValueError, match="LoRA; fuse it first"):
        DistriFusion(pipe, "tensor", split_batch=False)
    pipe.unload_lora_weights()
    quantize(pipe.unet, weights=qint8)
    freeze(pipe.unet)
    with pytest.raises(ValueError, match=r"supports only plain weights; this is a Q"):
        DistriFusion(pipe, "tensor", split_batch=False)


def test_tensor_parallelism_refuses_what_it_cannot_divide(pool: RankPool) -> None:
    pool.run(refused, 2)


@pytest.mark.slow  # on hosts in every run: test_matrix.py
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_adapters_controlnets_and_quantized_weights(pool: RankPool, name: str) -> None:
    tiny.checkpoint(name)
    for rank in pool.run(dressed, 2, name):
        for key, (values, same) in rank.items():
            assert same, key
            if key.endswith("steady"):
                # One stale step of two.
                assert min(values) >= 15 and max(values) < 105, (key, values)
            else:
                assert min(values) >= (50 if key == "quantized" else EXACT), (key, values)


def exchanges(name: str) -> tuple[int, int, int]:
    """On each rank: how often a full_sync step waits, what there is to exchange in it, and resnets."""
    pipe = pipeline(name)
    with DistriFusion(pipe, sync_mode="full_sync", **WHOLE) as parallel:
        picture(pipe, name, parallel, steps=1)
        exchange = parallel.models[0].layouts.last.exchange
        resnets = sum(isinstance(module, ResnetBlock2D) for module in pipe.unet.modules())
        return exchange.waits, sum(map(len, exchange._slots.values())), resnets


def test_a_norm_and_its_convolution_exchange_at_once(pool: RankPool) -> None:
    tiny.checkpoint("sdxl")
    for waits, slots, resnets in pool.run(exchanges, 2, "sdxl"):
        assert resnets and waits == slots - 2 * resnets


def fewer_bytes(name: str) -> dict[str, Any]:
    """On each rank: the steady state with less sent, against that of keys and values as they are."""
    pipe = pipeline(name)
    found: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {"": {}, "both": {"projects": True, "bits": "int8"}}
    cases |= {"projects": {"projects": True}} | {bits: {"bits": bits} for bits in BITS}
    for key, more in cases.items():
        with DistriFusion(pipe, warm_up_steps=1, **WHOLE, **more) as parallel:
            for _ in range(2):  # the second generation begins with what the first has left behind
                made = picture(pipe, name, parallel, steps=3)
            found[key] = made, parallel.plan["buffers_bytes"]
    whole, size = found.pop("")
    return {key: (psnr(made, whole), held / size) for key, (made, held) in found.items()}


def test_patches_may_send_less(pool: RankPool) -> None:
    tiny.checkpoint("sdxl")
    one, other = pool.run(fewer_bytes, 2, "sdxl")
    for rank in (one, other):
        assert rank["projects"][0] >= EXACT and rank["projects"][1] < 0.9
        assert all(40 < rank[key][0] < 100 for key in ("both", *BITS)), rank
        assert rank["int8"][0] > rank["float8"][0]


def test_differences_leave_no_error_behind() -> None:
    """Two ranks' sides of one exchange: alike, and nearer with each step that changes little."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 6, 128)
    sender, receiver = Differences("int4"), Differences("int4")
    for side in (sender, receiver):
        side.begin([x])
    inbox: list[torch.Tensor | None] = [None]
    errors = []
    for step in range(4):
        x = x + 0.1 * torch.randn_like(x) * (step < 2)
        inbox[0] = sender.sent(x, 0)
        assert inbox[0] is not None and inbox[0].numel() == x.numel() // 64 * (32 + SCALE_BYTES)
        receiver.arrived(inbox)
        receiver.arrived(inbox)  # counts once
        assert torch.equal(sender.known[0], receiver.known[0])
        errors.append(float((receiver.known[0] - x).norm() / x.norm()))
    assert errors[0] < 0.02 and errors[1] < 0.02 and errors[2] < 0.003 and errors[3] < 0.0005, errors


def compiled(split_batch: bool, mode: str) -> dict[str, Any]:
    """Whole blocks compiled in one piece, exchanges and all."""
    torch._dynamo.reset()
    pipe = tiny.load("sd1")
    settings: dict[str, Any] = {"warm_up_steps": 2, "split_batch": split_batch, "projects": not split_batch}
    settings["sync_mode"] = mode
    with DistriFusion(pipe, **settings) as parallel:
        eager = picture(pipe, "sd1", parallel)
    for block in blocks(pipe.unet):
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True, dynamic=False)
    torch._dynamo.utils.counters.clear()
    limits = torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=4096)
    made, graphs = [], []
    with limits, DistriFusion(pipe, **settings) as parallel:
        for _ in range(2):
            made.append(picture(pipe, "sd1", parallel))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return {
        "psnr": [psnr(one, eager) for one in made],
        "graphs": graphs,
        "blocks": len(list(blocks(pipe.unet))),
    }


PLANS = [(False, "corrected_async_gn"), (True, "corrected_async_gn"), (False, "full_sync")]


@pytest.mark.parametrize(("split_batch", "mode"), seldom(PLANS, []))  # in every run, the operators below
def test_compiled_blocks_exchange_too(pool: RankPool, split_batch: bool, mode: str) -> None:
    tiny.checkpoint("sd1")
    for rank in pool.run(compiled, 2, split_batch, mode):
        assert min(rank["psnr"]) >= 100
        first, second = rank["graphs"]
        # Blocks alike share their graphs: and so do all kinds of steps.
        assert 0 < first < rank["blocks"]
        # A CUDA graph is captured in the second generation, and nothing can be compiled meanwhile.
        assert second == first


def operators() -> None:
    """What compiled code is told of the exchanges' results, strides too, is what they are."""
    patch_layers = PatchLayers(nn.Identity(), Surgery())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 8, 4).to(memory_format=memory_format)
        exchange = PatchExchange(None, x.device, sizes=[1] * dist.get_world_size())
        for dim in (2, 3):
            first, last = x.narrow(dim, 0, 1), x.narrow(dim, 3, 1)
            border = dist.get_rank() == dist.get_world_size() - 1
            cases = {
                torch.ops.displaced_patches.rows.default: (first, last, dim, border),
                torch.ops.displaced_patches.tokens.default: (torch.randn(2, 1, 5, 6), 5 * exchange.ranks),
                torch.ops.displaced_patches.moments.default: (torch.randn(2, 1, 4), 3),
            }
            for operator, arguments in cases.items():
                exchange.start()
                with patch_layers.running(PatchRun(exchange, dim)):
                    torch.library.opcheck(operator, arguments, test_utils=["test_schema", "test_faketensor"])


def test_operators_in_compiled_code_are_what_it_is_told(pool: RankPool) -> None:
    pool.run(operators, 2)


def inpainting() -> list[float]:
    """A UNet of nine channels with a LoRA on convolutions, and forwards that hooks have replaced."""
    unet = tiny.unet(in_channels=9)
    layers = ["to_q", "to_v", "conv1", "conv"]
    torch.manual_seed(0)  # the LoRA is drawn, and must be the same on every rank
    unet.add_adapter(LoraConfig(r=4, target_modules=layers, init_lora_weights=False))
    for module in (unet, unet.mid_block.resnets[0].norm1, unet.conv_out, unet.mid_block.resnets[0].conv1):
        add_hook_to_module(module, ModelHook())
    base = tiny.load("sd1", unet=unet)
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pipe(base)
    pipe.set_progress_bar_config(disable=True)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48] = 255
    extra: dict[str, Any] = {
        "image": tiny.picture(), "mask_image": tiny.Image.fromarray(mask), "strength": 1.0, "steps": 2,
    }  # fmt: skip
    plain = picture(pipe, "sd1", **extra)
    with DistriFusion(pipe, **WARM | WHOLE) as parallel:
        made = picture(pipe, "sd1", parallel, **extra)
    return [psnr(made, plain)]


def test_an_inpainting_unet_with_lora_on_convolutions_and_hooks(pool: RankPool) -> None:
    tiny.checkpoint("sd1")
    assert all(min(rank) >= EXACT for rank in pool.run(inpainting, 3))


def decoded() -> list[float]:
    vae, found = pipeline("sdxl").vae, []
    for shape in ((1, 4, 7, 5), (2, 4, 12, 9), (1, 4, 2, 3)):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            plain = vae.decode(z).sample
            with PatchDecoder(vae):
                joint = vae.decode(z, return_dict=False)[0]
        assert joint.shape == plain.shape
        found.append(float((joint - plain).abs().max()))
    return found


def test_joint_decoding_is_exact(pool: RankPool) -> None:
    tiny.checkpoint("sdxl")
    for rank in pool.run(decoded, 3):
        assert max(rank) < 1e-4


class Adder(nn.Module):
    """Answers with the sum of what it gets, as a tuple, and remembers the batch."""

    def forward(self, sample: torch.Tensor, t: Any, more: list[torch.Tensor], one: Any = None) -> tuple:
        self.batch = len(sample), len(more[0])
        return sample + more[0][: len(sample)] * t, one


def branches() -> dict[str, Any]:
    model, other = Adder(), Adder()
    sample, more = torch.arange(6.0).view(2, 3), [torch.ones(4, 3).cumsum(0)]
    with CfgSplit([model], None, dist.get_rank(), local=[other]) as split:
        both = model(sample, 2, more)
        seen = model.batch
        half = other(sample, t=2, more=more)[0]
        single = model(sample[:1], 2, more)[0]
        whole = model.batch
        active = split.active
    again = model(sample, 2, more)[0]
    return {"both": both[0], "seen": seen, "half": half, "single": single, "whole": whole, "again": again,
            "active": active}  # fmt: skip


def test_guidance_branches_on_two_ranks(pool: RankPool) -> None:
    for branch, rank in enumerate(pool.run(branches, 2)):
        assert rank["seen"] == (1, 2) and rank["whole"] == (1, 4) and not rank["active"]
        halves = torch.stack([torch.tensor([2.0, 3, 4]), torch.tensor([3.0, 4, 5]) + 6])
        assert torch.equal(rank["both"], halves) and torch.equal(rank["half"], halves[branch : branch + 1])
        assert torch.equal(rank["single"], torch.tensor([[2.0, 3, 4]]))
        assert torch.equal(rank["again"][0], rank["single"][0])


def test_moments_of_parts_make_the_norm_of_the_whole() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 10, 5) * torch.arange(1.0, 11).view(10, 1) + 20
    norm = nn.GroupNorm(4, 12)
    nn.init.normal_(norm.weight)
    parts = x.split([2, 5, 3], 2)
    weights = torch.tensor([0.2, 0.5, 0.3]).view(3, 1, 1)
    moments = torch.stack([group_moments(part, 4) for part in parts])
    mean, variance = join_moments(moments, weights)
    made = apply_moments(x, mean, variance, norm.weight, norm.bias, norm.eps)
    assert torch.allclose(made, norm(x), atol=1e-4)
    bare = nn.GroupNorm(4, 12, affine=False)
    assert torch.allclose(apply_moments(x, mean, variance, None, None, bare.eps), bare(x), atol=1e-4)
    # One part fresh, the others known.
    shares = Shares.of([2, 5, 3], 1, x.device)
    known = pack_other_moments(join_moments(moments[[0, 2]], shares.others), shares.own)
    assert torch.allclose(
        torch.stack(whole_moments(moments[1], known)), join_moments(moments, weights), rtol=1e-5
    )
    half = group_moments(x.bfloat16(), 4)
    assert half.dtype == torch.float32
    assert torch.allclose(half, group_moments(x.bfloat16().float(), 4), rtol=1e-2)


WEIGHTS = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])


def drift(step: float) -> torch.Tensor:
    """Moments that move evenly, each at its own speed: [norms, parts, 2, batch, groups]."""
    start, speed = torch.rand(2, 2, 3, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    return start + 1 + step * 0.02 * (speed - 0.4)


def whole(own: torch.Tensor, others: torch.Tensor, norm: int) -> torch.Tensor:
    """Moments of the whole from this rank's and from all ranks', of which this one's are not used."""
    return join_moments(torch.cat([own[None], others[norm, 1:]]), WEIGHTS[norm].view(-1, 1, 1))


class Arrivals:
    """A forecast, and what arrives for it in each step."""

    def __init__(self, *steps: torch.Tensor) -> None:
        self.inboxes = [[torch.zeros(2, 2, 4) for _ in range(2)] for _ in range(2)]
        counts = (WEIGHTS * 10).round().int().tolist()
        shares = [Shares.of(row, 0, WEIGHTS.device) for row in counts]
        self.forecast = StaleMoments(self.inboxes, shares, forecast=True)
        for moments in steps:
            self.arrive(moments)

    def arrive(self, moments: torch.Tensor) -> None:
        for norm, inboxes in enumerate(self.inboxes):
            self.forecast.keep(norm, moments[norm, 0])
            for inbox, sent in zip(inboxes, moments[norm, 1:], strict=True):
                inbox.copy_(sent)
        self.forecast.advance()

    def whole(self, norm: int, own: torch.Tensor) -> torch.Tensor:
        return torch.stack(whole_moments(own, self.forecast.known(norm)))


@pytest.mark.parametrize("norm", [0, 1])
def test_a_forecast_of_moments_follows_a_drift(norm: int) -> None:
    still = Arrivals(drift(2), drift(2)).whole(norm, drift(2)[norm, 0])
    assert torch.allclose(still, whole(drift(2)[norm, 0], drift(2), norm))

    before, own = drift(1)[norm, 0], drift(2)[norm, 0]
    truth, old = whole(own, drift(2), norm), whole(before, drift(1), norm)

    def square(m: torch.Tensor) -> torch.Tensor:
        return torch.stack([m[0], m[1] + m[0].square()])

    paper = square(old) + square(own) - square(before)
    paper[1] -= paper[0].square()

    def error(found: torch.Tensor) -> float:
        return float((found - truth).abs().max())

    forecast = Arrivals(drift(0), drift(1))
    late = min(error(whole(own, drift(1), norm)), error(paper))
    assert error(forecast.whole(norm, own)) < late / 10

    # Own faster by half, and so are the others; the other way, so nobody knows; more than is believed.
    for rate, expected in ((1.5, 1.5), (-1.0, 0.0), (9.0, 2.0)):
        own = drift(1 + rate)[norm, 0]
        assert torch.allclose(forecast.whole(norm, own), whole(own, drift(1 + expected), norm), atol=5e-4)

    # The two pictures of a batch have nothing to do with each other.
    own = torch.cat([drift(1)[norm, 0, :, :1], own[:, 1:]], 1)
    both = torch.cat([drift(1)[..., :1, :], drift(3)[..., 1:, :]], -2)
    assert torch.allclose(forecast.whole(norm, own), whole(own, both, norm), atol=5e-4)


def test_a_forecast_of_moments_begins_anew() -> None:
    used = Arrivals(drift(0), drift(20))
    used.forecast.reset()
    used.arrive(drift(5))
    own = drift(6)[0, 0]
    assert torch.allclose(used.whole(0, own), whole(own, drift(5), 0))
    used.arrive(drift(6))
    own = drift(7)[0, 0]
    assert torch.allclose(used.whole(0, own), whole(own, drift(7), 0), atol=5e-4)


def test_a_forecast_variance_is_never_negative() -> None:
    more, less = drift(0), drift(0)
    more[:, :, 1] *= 10
    found = Arrivals(more, less).whole(0, less[0, 0] / 50)
    assert found[1].min() >= 0


@pytest.mark.parametrize(
    ("length", "unit", "ranks", "expected"),
    [
        (128, 4, 2, [0, 64, 128]),
        (64, 8, 3, [0, 16, 40, 64]),
        (13, 2, 3, [0, 4, 8, 13]),
        (65, 8, 8, [0, 8, 16, 24, 32, 40, 48, 56, 65]),
        (9, 8, 2, [0, 8, 9]),
    ],
)
def test_cuts(length: int, unit: int, ranks: int, expected: list[int]) -> None:
    assert cuts(length, unit, ranks) == expected


def test_too_small_a_picture_is_refused_with_what_fits() -> None:
    with pytest.raises(ValueError, match=r"512 pixels make only 8 patches of 64 for 9 .* 520 .*\(576"):
        cuts(64, 8, 9, 8)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"parallelism": "rows"}, "must be one of patch, tensor, naive_patch"),
        ({"sync_mode": "none"}, "must be one of corrected_async_gn"),
        ({"split_scheme": "alternate"}, "'alternate' needs parallelism 'naive_patch'"),
        ({"warm_up_steps": 0}, "warm_up_steps must be 1 or more; got 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DistriFusion(SimpleNamespace(unet=nn.Linear(1, 1)), **settings)


@pytest.mark.parametrize(
    ("flags", "ranks", "problem"),
    [
        ({}, 9, "1 to 8 ranks"),
        ({"split_scheme": "alternate"}, 2, "must be row or col with --parallelism=patch"),
        ({"warm_up_steps": 0}, 2, "must be at least 1"),
        ({"parallelism": "tensor", "quantize_to": "int8"}, 2, "not supported with --quantize_to"),
        ({"parallelism": "tensor", "enable_model_cpu_offload": True}, 2, "not supported with CPU offload"),
    ],
)
def test_impossible_launches_are_refused(flags: dict[str, Any], ranks: int, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        BACKENDS["distrifuser"].check(
            HostConfig(backend="distrifuser", type="sd1", checkpoint="x", **flags), ranks
        )


@pytest.mark.parametrize(
    "flags",
    [
        {"warm_up_steps": 0, "sync_mode": "full_sync"},
        {"warm_up_steps": 0, "parallelism": "naive_patch", "split_scheme": "alternate"},
        {"warm_up_steps": 0, "parallelism": "tensor"},
    ],
)
def test_possible_launches_are_not(flags: dict[str, Any]) -> None:
    BACKENDS["distrifuser"].check(HostConfig(backend="distrifuser", type="sd1", checkpoint="x", **flags), 7)
