"""LoRA on every type: formats, counts, scales, removal, fusing; and equal to diffusers' own loader."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from shared.api.faults import RequestError
from shared.api.parsing import check_request
from shared.api.warned import collecting_warnings
from shared.launch.backend import Needs
from shared.launch.errors import UsageError
from shared.models import MODELS
from shared.pipeline import lora as lora_module
from shared.pipeline import lora_by_name
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import LoadError, check_environment, load_pipeline
from shared.pipeline.lora import LoraSet, loras_of
from shared.pipeline.lora_file import LoraError, read_lora
from shared.pipeline.lora_layers import inject, lora_layers
from shared.pipeline.lora_names import match_layers
from tests import test_matrix, tiny, tiny_extras, tiny_lycoris
from tests.pool import RankPool
from tests.seldom import seldom

PIPELINE_LOADERS = ("sd1", "sdxl", "sd3", "flux")


@cache
def plain(name: str) -> np.ndarray:
    return tiny.run(tiny.load(name), name)


@cache
def shared_pipe(name: str) -> Any:
    return tiny.load(name)


@pytest.fixture(params=seldom(tiny.BUILDERS, ("sd1", "flux")))
def loras(request: pytest.FixtureRequest) -> Iterator[LoraSet]:
    """The LoRA set of each type's pipeline, empty before and after."""
    found = loras_of(shared_pipe(request.param), MODELS[request.param])
    yield found
    for path in list(found.loaded):
        found.remove(path)


def change(loras: LoraSet) -> float:
    name = loras.spec.name
    return float(np.abs(tiny.run(loras.pipe, name) - plain(name)).max())


def test_every_format_means_the_same(loras: LoraSet) -> None:
    name = loras.spec.name
    denoiser = getattr(loras.pipe, loras.spec.denoiser)
    before, layers = repr(denoiser), len(tiny_extras.adapted_layers(denoiser))
    weights = {}
    own = ("own", "own-kohya") if loras.spec.own_names else ()
    for form in ("diffusers", "kohya", "peft", *own):
        path = str(tiny_extras.lora(name, form))
        entry = loras.add(path)
        assert entry.matched == layers > 10 and entry.unmatched == 0
        weights[form] = {key: value for key, value in denoiser.state_dict().items() if "lora_" in key}
        if form == "diffusers":
            assert change(loras) > 0.02
            loras.set_scales({path: 0.0})
            assert change(loras) == 0, "scale 0 is the plain picture"
        loras.remove(path)
        assert repr(denoiser) == before
    assert change(loras) == 0
    matrices = {form: [w.numpy().tobytes() for w in found.values()] for form, found in weights.items()}
    assert len(matrices["diffusers"]) == 2 * layers
    assert all(found == matrices["diffusers"] for found in matrices.values())


def test_several_at_their_scales_and_fused(loras: LoraSet) -> None:
    name = loras.spec.name
    first, second = (str(tiny_extras.lora(name, seed=seed)) for seed in (0, 1))
    loras.add(first, 0.7)
    one = tiny.run(loras.pipe, name)
    loras.add(second, 0.4)
    both = tiny.run(loras.pipe, name)
    assert np.abs(both - one).max() > 1e-3
    loras.set_scales({second: 0.0})
    assert np.abs(tiny.run(loras.pipe, name) - one).max() < 1e-5
    loras.set_scales({})
    assert np.array_equal(tiny.run(loras.pipe, name), both)

    fused = loras_of(tiny.load(name), loras.spec)
    fused.add(first, 0.7)
    fused.add(second, 0.4)
    fused.fuse("a test")
    assert "lora" not in repr(getattr(fused.pipe, loras.spec.denoiser)).lower()
    assert np.abs(tiny.run(fused.pipe, name) - both).max() < 1e-3
    for act in (lambda: fused.add(first), lambda: fused.remove(first), lambda: fused.set_scales({first: 1})):
        with pytest.raises(LoraError, match="fused into the weights because of a test"):
            act()


def test_layers_are_searched_only_where_scales_change(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []

    def searched(module: torch.nn.Module) -> Any:
        searches.append(module)
        return lora_layers(module)

    monkeypatch.setattr(lora_module, "lora_layers", searched)

    def changed(act: Callable[[], object]) -> bool:
        searches.clear()
        act()
        return bool(searches)

    pipe = tiny.load("sd1")
    loras, plain_picture = loras_of(pipe, MODELS["sd1"]), plain("sd1")
    first, second = (str(tiny_extras.lora("sd1", seed=seed)) for seed in (0, 1))
    loras.set_scales({})
    assert not changed(lambda: loras.set_scales({}))
    assert changed(lambda: loras.add(first, 0.7)) and not changed(lambda: loras.set_scales({}))
    one = tiny.run(pipe, "sd1")
    assert changed(lambda: loras.set_scales({first: 0.0}))
    assert not changed(lambda: loras.set_scales({first: 0.0}))
    assert np.array_equal(tiny.run(pipe, "sd1"), plain_picture)
    assert changed(lambda: loras.set_scales({}))
    assert np.array_equal(tiny.run(pipe, "sd1"), one)

    def fails(*args: Any) -> None:
        inject(*args)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lora_module, "inject", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        loras.add(second, 1.0)
    assert changed(lambda: loras.set_scales({})), "another LoRA was put on and taken off"
    assert np.array_equal(tiny.run(pipe, "sd1"), one)


@pytest.mark.parametrize("name", PIPELINE_LOADERS)
@pytest.mark.parametrize("text", seldom((False, True), (True,)))
def test_equals_diffusers_own_loader(name: str, text: bool) -> None:
    path = tiny_extras.lora(name, text=text)
    theirs = tiny.load(name)
    theirs.load_lora_weights(load_file(path), adapter_name="x")
    theirs.set_adapters(["x"], [0.6])
    ours = loras_of(tiny.load(name), MODELS[name])
    ours.add(str(path), 0.6)
    assert np.abs(tiny.run(ours.pipe, name) - tiny.run(theirs, name)).max() < 1e-5
    assert np.abs(tiny.run(ours.pipe, name) - plain(name)).max() > 0.02


def test_alpha_scales_and_original_sdxl_names(tmp_path: Path) -> None:
    kohya = load_file(tiny_extras.lora("sdxl", "kohya", text=True))
    halved = {key: value / 2 if key.endswith(".alpha") else value for key, value in kohya.items()}
    save_file(halved, tmp_path / "half.safetensors")
    pictures = []
    for path, scale in (
        (tmp_path / "half.safetensors", 1.0),
        (tiny_extras.lora("sdxl", "kohya", text=True), 0.5),
        (tiny_extras.lora("sdxl", "sgm", text=True), 0.5),
    ):
        loras = loras_of(shared_pipe("sdxl"), MODELS["sdxl"])
        entry = loras.add(str(path), scale)
        assert entry.unmatched == 0
        pictures.append(tiny.run(loras.pipe, "sdxl"))
        loras.remove(str(path))
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-5
    assert np.array_equal(pictures[1], pictures[2])
    # Diffusers cannot read the text encoders' part of this file (0.42.1), so the denoiser's part is compared.
    alone = {key: value for key, value in halved.items() if key.startswith("lora_unet_")}
    save_file(alone, tmp_path / "alone.safetensors")
    theirs = tiny.load("sdxl")
    theirs.load_lora_weights(dict(alone))
    loras.add(str(tmp_path / "alone.safetensors"))
    assert np.abs(tiny.run(theirs, "sdxl") - tiny.run(loras.pipe, "sdxl")).max() < 1e-5
    loras.remove("alone")


def test_convolutions_too(tmp_path: Path) -> None:
    tensors = {}
    for name in ("down_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.2.conv_shortcut"):
        conv = shared_pipe("sd1").unet.get_submodule(name)
        flat = "lora_unet_" + name.replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = torch.randn(4, conv.in_channels, *conv.kernel_size) * 0.2
        tensors[f"{flat}.lora_up.weight"] = torch.randn(conv.out_channels, 4, 1, 1) * 0.2
    save_file(tensors, tmp_path / "locon.safetensors")
    loras = loras_of(shared_pipe("sd1"), MODELS["sd1"])
    assert loras.add(str(tmp_path / "locon.safetensors")).matched == 2
    assert change(loras) > 0.01
    loras.remove("locon")
    assert change(loras) == 0


def test_partly_matched_is_told(caplog: pytest.LogCaptureFixture) -> None:
    loras = loras_of(shared_pipe("sd1"), MODELS["sd1"])
    path = str(tiny_extras.lora("sd1", "partial"))
    with caplog.at_level("WARNING", "host"):
        entry = loras.add(path)
    assert entry.matched == entry.unmatched > 0
    assert f"{entry.matched} of {2 * entry.matched} layers fit" in caplog.text
    loras.remove(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda tmp: tiny_extras.lora("sd1", "alien"), "fits no layer of type sd1"),
        (lambda tmp: tiny_extras.lora("sd3"), "fits no layer of type sd1"),
        (lambda tmp: _file(tmp / "a.safetensors", b"not a tensor file"), "cannot be read"),
        (lambda tmp: _file(tmp / "a.bin", b"x"), r"must be a \.safetensors file"),
        (lambda tmp: tmp, r"must hold one \.safetensors file, got 0"),
        (lambda tmp: _oft(tmp / "oft.safetensors"), "'lora_unet_x.oft_blocks' is of a format that is not"),
        (lambda tmp: _linear(tmp / "flat.safetensors", down=(32,)), "fits no layer of type sd1"),
        (lambda tmp: _linear(tmp / "flat.safetensors", up=(32,)), "fits no layer of type sd1"),
        (lambda tmp: _linear(tmp / "rank0.safetensors", (0, 32), (32, 0)), "fits no layer of type sd1"),
        (lambda tmp: _linear(tmp / "kernel.safetensors", (4, 32, 3, 3)), "fits no layer of type sd1"),
        (lambda tmp: _linear(tmp / "alpha.safetensors", alpha=2), r"alpha' must be one number.*shape \[2\]"),
        (lambda tmp: tmp / ("long" * 100 + ".safetensors"), "cannot be read: .*too long"),
        (lambda tmp: tmp / "nul\0.safetensors", "cannot be read"),
    ],
)
def test_refused(make: Callable[[Path], Path], says: str, tmp_path: Path) -> None:
    loras = loras_of(shared_pipe("sd1"), MODELS["sd1"])
    unet = shared_pipe("sd1").unet
    before = repr(unet)
    with pytest.raises(LoraError, match=says):
        loras.add(str(make(tmp_path)))
    assert not loras.loaded and repr(unet) == before


def test_names_of_loaded_ones() -> None:
    loras = loras_of(shared_pipe("sd1"), MODELS["sd1"])
    path = tiny_extras.lora("sd1")
    loras.add(str(path))
    assert loras.name_of(path.name) == loras.name_of(path.stem) == loras.name_of(str(path)) == str(path)
    with pytest.raises(LoraError, match=r"'other' is not loaded; loaded: .*lora-sd1"):
        loras.set_scales({"other": 1.0})
    with pytest.raises(LoraError, match="loaded already"):
        loras.add(str(path))
    loras.remove(path.stem)


def test_launch_flag_fuses_where_weights_are_fixed() -> None:
    path = str(tiny_extras.lora("sd1"))
    free, fixed = tiny.host("sd1", lora={path: 0.5}), tiny.host("sd1", lora={path: 0.5}, quantize_to="int8")
    assert free.lora_set.frozen is None and "lora_A" in repr(free.unet)
    assert "--quantize_to" in fixed.lora_set.frozen and "lora_A" not in repr(fixed.unet)
    quantized = tiny.run(tiny.host("sd1", quantize_to="int8"), "sd1")
    difference = np.abs(tiny.run(fixed, "sd1") - quantized).max()
    assert difference > 0.02, "the LoRA is in the quantized weights"
    assert np.abs(tiny.run(fixed, "sd1") - tiny.run(free, "sd1")).max() < difference / 2
    with pytest.raises(LoadError, match="fits no layer"):
        tiny.host("sd1", lora={str(tiny_extras.lora("sd1", "alien")): 1.0})


def test_a_difference_of_the_bias_and_zeros_for_norms(tmp_path: Path) -> None:
    """As the LoRAs that distil Wan have them, in its authors' names."""
    drawn = torch.Generator().manual_seed(1)
    down, up, shift = (torch.randn(*size, generator=drawn) * 0.3 for size in ((2, 64), (64, 2), (64,)))
    own = "diffusion_model.blocks.1.self_attn"
    tensors = {
        f"{own}.q.lora_down.weight": down, f"{own}.q.lora_up.weight": up, f"{own}.q.diff_b": shift,
        f"{own}.q.alpha": torch.tensor(1.0), f"{own}.norm_q.diff": torch.zeros(64),
        "diffusion_model.blocks.1.norm3.diff_b": torch.zeros(64),
    }  # fmt: skip
    path = str(tmp_path / "distilled.safetensors")
    save_file(tensors, path)
    changed, pipe = tiny.load("wan"), tiny.load("wan")
    layer = changed.transformer.blocks[1].attn1.to_q
    layer.weight.data += 0.7 * 0.5 * up @ down
    layer.bias.data += 0.7 * shift
    wanted = tiny.run(changed, "wan")
    loras = loras_of(pipe, MODELS["wan"])
    entry = loras.add(path, 0.7)
    assert (entry.matched, entry.unmatched) == (1, 0)
    assert np.abs(tiny.run(pipe, "wan") - wanted).max() < 1e-4 < np.abs(plain("wan") - wanted).max()
    loras.fuse("a test")
    assert np.abs(tiny.run(pipe, "wan") - wanted).max() < 1e-4


def in_8_bits(tensors: dict[str, torch.Tensor], suffix: str) -> dict[str, torch.Tensor]:
    """Weights as float8 with a scale each, as `*_fp8_scaled` files have them; one scale a row for `up`."""
    found: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for key, value in tensors.items():
        if value.ndim < 2:
            found[key] = value
            continue
        rows = value.abs().amax(1) if "up" in key else value.abs().max()
        scale = rows / 448
        found[key] = (value / (scale[:, None] if scale.ndim else scale)).to(torch.float8_e4m3fn)
        found[key.removesuffix(".weight") + suffix] = scale
    return found


@pytest.mark.parametrize("suffix", [None, ".scale_weight", ".weight_scale"])
def test_in_float8(tmp_path: Path, suffix: str | None) -> None:
    tensors = load_file(tiny_extras.lora("sdxl", "kohya"))
    if suffix is None:
        stored = {key: t.to(torch.float8_e4m3fn) if t.ndim else t for key, t in tensors.items()}
    else:
        stored = in_8_bits(tensors, suffix)
    save_file(stored, tmp_path / "eight.safetensors")
    loras = loras_of(shared_pipe("sdxl"), MODELS["sdxl"])
    pictures = []
    for path in (str(tiny_extras.lora("sdxl", "kohya")), str(tmp_path / "eight.safetensors")):
        assert loras.add(path).unmatched == 0
        pictures.append(tiny.run(loras.pipe, "sdxl"))
        loras.remove(path)
    effect = np.abs(pictures[0] - plain("sdxl")).mean()
    assert np.abs(pictures[1] - pictures[0]).mean() < effect / 5


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t.fill_(float("nan")), "holds NaN or Inf"),
        (lambda t: t.fill_(float("-inf")), "holds NaN or Inf"),
        (lambda t: t.fill_(float("nan")).to(torch.float8_e4m3fn), "holds NaN or Inf"),
        (lambda t: t.to(torch.int8), "must hold floats, got int8"),
        (lambda t: t.to(torch.int64), "must hold floats, got int64"),
    ],
)
def test_what_is_no_number_is_refused(
    spoil: Callable[[torch.Tensor], torch.Tensor], says: str, tmp_path: Path
) -> None:
    tensors = load_file(tiny_extras.lora("sd1", "kohya"))
    key = next(key for key in tensors if "lora_up" in key)
    tensors[key] = spoil(tensors[key].clone())
    path = str(tmp_path / "spoilt.safetensors")
    save_file(tensors, path)
    loras = loras_of(shared_pipe("sd1"), MODELS["sd1"])
    with pytest.raises(LoraError, match=f"spoilt.*{key}.*{says}"):
        loras.add(path)
    assert change(loras) == 0
    with pytest.raises(UsageError, match=f"--lora: .*spoilt.*{key}.*{says}"):
        check_environment(tiny.config("sd1", lora={path: 1.0}), torch.device("cpu"))


def test_flux_in_float8_gets_no_wrong_reason() -> None:
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(transformer=transformer, scheduler=scheduler, **parts)
    tensors = {
        key: t.to(torch.float8_e4m3fn) if t.ndim else t for key, t in original_lora(BFL_LAYERS).items()
    }
    matched, unmatched = match_layers(pipe, MODELS["flux"], tensors)
    assert not unmatched and len(matched["transformer"]) == 14


def ranks_name_loras(backend: str, name: str, folder: str) -> dict[str, list[np.ndarray]]:
    """On each rank: pictures of a host that was started with --lora_dir, and of plain pipelines."""
    config, world, host, _ = test_matrix.launch(backend, name, {"lora_dir": (folder,)}, {})
    engine = host.build_engine(config, world)
    found: dict[str, list[Any]] = {"named": [], "plain": []}

    def made(engine: Any, **fields: Any) -> np.ndarray | None:
        request = check_request(test_matrix.body(name, {}) | fields, config)
        reply = engine.generate(request, lambda step, steps: None)
        return None if reply is None else load(reply.latent)["latent"].float().numpy()

    orders: tuple[dict[str, float], ...] = ({}, {"one": 0.8}, {}, {"one": 0.3, "two": 0.4}, {})
    found["named"] = [made(engine, lora_scales=scales) for scales in orders]
    for wrong, says in (("none", "is not in --lora_dir"), ("broken", "holds NaN")):
        with pytest.raises(RequestError, match=says) as error:
            engine.generate(
                check_request(test_matrix.body(name, {}) | {"lora_scales": {wrong: 1.0}}, config), print
            )
        assert error.value.status == 422
    found["named"].append(made(engine))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_by_name, "NAMED_LORAS", 2)
        made(engine, lora_scales={"more": 0.1}, steps=1)
    assert len(engine.pipe.lora_set.loaded) == 2 and not engine.list_loras()
    added = engine.add_lora(f"{folder}/more.safetensors", 0.1)
    assert [entry["scale"] for entry in added] == [0.1]
    engine.close()
    if found["named"][0] is None:
        return found  # another rank has the pictures
    plain: dict[str, np.ndarray | None] = {}
    for scales in (*orders, {}):
        paths = {f"{folder}/{stem}.safetensors": scale for stem, scale in scales.items()}
        if str(paths) not in plain:
            flags = replace(config, lora=paths or None, lora_dir=None)
            pipe = load_pipeline(flags.spec, flags, world.device, Needs(), quiet=True)
            plain[str(paths)] = made(PipelineEngine(pipe, flags, world))
        found["plain"].append(plain[str(paths)])
    return found


@pytest.mark.parametrize(
    ("backend", "name"),
    seldom((("asyncdiff", "sd1"), ("distrifuser", "sdxl"), ("xdit", "pixa")), [("asyncdiff", "sd1")]),
)
def test_named_in_a_request_on_two_ranks(pool: RankPool, tmp_path: Path, backend: str, name: str) -> None:
    for stem, seed in (("one", 0), ("two", 1), ("more", 2)):
        tensors = load_file(tiny_extras.lora(name, seed=seed))
        save_file(tensors, tmp_path / f"{stem}.safetensors")
    lycoris, _ = tiny_lycoris.mixed(name, tiny_extras.denoiser(name), 0)
    tiny_lycoris.write(tmp_path / "two.safetensors", lycoris)
    save_file({key: t * float("nan") for key, t in tensors.items()}, tmp_path / "broken.safetensors")
    ranks = pool.run(ranks_name_loras, 2, backend, name, str(tmp_path))
    holder = next(r for r in ranks if r["named"][0] is not None)
    for number, (named, alone) in enumerate(zip(holder["named"], holder["plain"], strict=True)):
        assert test_matrix.psnr(named, alone) >= 60, number
    for number in (1, 3):
        assert test_matrix.psnr(holder["plain"][number], holder["plain"][0]) < 40
    assert all(np.array_equal(holder["named"][0], holder["named"][n]) for n in (2, 4, 5))


def test_files_come_change_and_go_while_a_host_runs(tmp_path: Path) -> None:
    config = tiny.config("sd1", width=64, height=64, lora_dir=(str(tmp_path),))
    engine = PipelineEngine(tiny.load("sd1"), config, tiny.world())
    first, second = (load_file(tiny_extras.lora("sd1", seed=seed)) for seed in (0, 1))
    file = tmp_path / "my styles" / "ink wash.safetensors"

    def made(**scales: float) -> bytes:
        request = check_request({"positive": "x", "steps": 2, "seed": 1, "lora_scales": scales}, config)
        reply = engine.generate(request, lambda step, steps: None)
        assert reply is not None
        return reply.pictures[0].tobytes()

    without = made()
    with pytest.raises(RequestError, match="'ink wash' is not in --lora_dir, which has none"):
        made(**{"ink wash": 1.0})
    file.parent.mkdir()
    save_file(first, file)
    as_first = made(**{"ink wash": 1.0})
    assert as_first == made(**{"my styles/ink wash.safetensors": 1.0}) != without
    times = file.stat()
    save_file(second, tmp_path / "other")
    os.utime(tmp_path / "other", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "other").replace(file)  # as a copy that keeps the time of its source
    as_second = made(**{"ink wash": 1.0})
    assert as_second not in (as_first, without)
    file.unlink()
    with pytest.raises(RequestError, match="ink wash"):
        made(**{"ink wash": 1.0})
    assert made() == without and not loras_of(engine.pipe, config.spec).loaded


def test_named_and_partly_matched_is_told_in_the_answer(tmp_path: Path) -> None:
    save_file(load_file(tiny_extras.lora("sd1", "partial")), tmp_path / "half.safetensors")
    config = tiny.config("sd1", width=64, height=64, lora_dir=(str(tmp_path),))
    engine = PipelineEngine(tiny.load("sd1"), config, tiny.world())
    request = check_request({"positive": "x", "steps": 2, "lora_scales": {"half": 0.5}}, config)
    for _ in range(2):  # loaded, and kept
        with collecting_warnings() as warned:
            engine.generate(request, lambda step, steps: None)
        matched = next(iter(loras_of(engine.pipe, config.spec).loaded.values())).matched
        assert (
            f"lora_scales: {matched} of {2 * matched} layers of 'half' fit; the others are left out" in warned
        )


@pytest.mark.parametrize(
    "flags", [{"quantize_to": "int8"}, pytest.param({"compile_unet": True}, marks=pytest.mark.slow)]
)
def test_named_where_weights_are_fixed_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    save_file(load_file(tiny_extras.lora("sd1")), tmp_path / "style.safetensors")
    config = tiny.config("sd1", lora_dir=(str(tmp_path),), **flags)
    pipe = tiny.load("sd1")
    loras_of(pipe, config.spec).freeze(f"the weights are fixed by {next(iter(flags))}")
    world = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))
    engine = PipelineEngine(pipe, config, world)  # type: ignore[arg-type]
    request = check_request({"positive": "x", "lora_scales": {"style": 1.0}}, config)
    with pytest.raises(RequestError, match="lora_scales: the weights are fixed by") as error:
        engine.generate(request, lambda step, steps: None)
    assert error.value.status == 422


def test_read_folder(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert list(read_lora(str(tmp_path))) == ["x"]


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _oft(path: Path) -> Path:
    save_file({"lora_unet_x.oft_blocks": torch.zeros(2, 2)}, path)
    return path


def _linear(
    path: Path, down: tuple[int, ...] = (4, 32), up: tuple[int, ...] = (32, 4), alpha: int = 1
) -> Path:
    """A LoRA on one layer of 32 inputs and outputs."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {"lora_down.weight": torch.ones(down), "lora_up.weight": torch.ones(up)}
    save_file({f"{name}.{key}": t for key, t in (tensors | {"alpha": torch.ones(alpha)}).items()}, path)
    return path


def test_the_layer_of_the_broken_ones_fits(tmp_path: Path) -> None:
    loras = loras_of(shared_pipe("sd1"), MODELS["sd1"])
    assert loras.add(str(_linear(tmp_path / "whole.safetensors"))).matched == 1
    loras.remove("whole")


BFL_LAYERS = {
    "double_blocks_0_img_attn_qkv": (3072, 9216),
    "double_blocks_0_img_attn_proj": (3072, 3072),
    "double_blocks_0_img_mlp_0": (3072, 12288),
    "double_blocks_0_img_mlp_2": (12288, 3072),
    "double_blocks_0_txt_attn_qkv": (3072, 9216),
    "single_blocks_0_linear1": (3072, 21504),
    "single_blocks_0_linear2": (15360, 3072),
}


def original_lora(layers: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (inner, outer) in layers.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, inner, generator=generator)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(outer, 4, generator=generator)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    return tensors


def test_flux_in_the_names_of_its_authors() -> None:
    """Joint projections are taken apart, at FLUX's real width, which the names rest on."""
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))
    pipe = diffusers.FluxPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts
    )
    tensors = original_lora(BFL_LAYERS)
    matched, unmatched = match_layers(pipe, MODELS["flux"], tensors)
    pairs = matched["transformer"]
    assert not unmatched and len(pairs) == 3 + 1 + 2 + 3 + 4 + 1
    delta = (
        tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"]
        @ (tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"])
    )
    for name, start, size in (("attn.to_q", 0, 3072), ("attn.to_v", 6144, 3072), ("proj_mlp", 9216, 12288)):
        pair = pairs[f"single_transformer_blocks.0.{name}"]
        found = pair.scale * pair.tensors["up"] @ pair.tensors["down"]
        assert torch.allclose(found, delta[start : start + size], atol=1e-3)


def in_authors_names(prefix: str, layers: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """A LoRA of these layers in kohya's names (lora_unet_, joined by _), or in ai-toolkit's."""
    flat = prefix == "lora_unet_"
    named = {name.replace(".", "_") if flat else name: size for name, size in layers.items()}
    return {key.replace("lora_unet_", prefix): tensor for key, tensor in original_lora(named).items()}


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_zimage_in_the_names_of_its_authors(prefix: str) -> None:
    """kohya's and ai-toolkit's names, with query, key and value as one layer."""
    layers = {
        "layers.0.attention.qkv": (96, 288),
        "noise_refiner.0.attention.out": (96, 96),
        "layers.2.feed_forward.w2": (256, 96),
        "context_refiner.0.attention.qkv": (96, 288),
        "x_embedder": (16, 96),
    }
    flat = prefix == "lora_unet_"
    tensors = in_authors_names(prefix, layers)
    matched, unmatched = match_layers(shared_pipe("zimage"), MODELS["zimage"], tensors)
    pairs = matched["transformer"]
    assert not unmatched and len(pairs) == 3 + 1 + 1 + 3 + 1
    joint = f"{prefix}{'layers_0_attention_qkv' if flat else 'layers.0.attention.qkv'}"
    delta = tensors[f"{joint}.lora_up.weight"] @ tensors[f"{joint}.lora_down.weight"]
    for place, name in enumerate(("to_q", "to_k", "to_v")):
        pair = pairs[f"layers.0.attention.{name}"]
        found = pair.scale * pair.tensors["up"] @ pair.tensors["down"]
        assert torch.allclose(found, delta[96 * place :][:96], atol=1e-5)
    assert {"noise_refiner.0.attention.to_out.0", "layers.2.feed_forward.w2"} <= pairs.keys()


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_flux2_in_the_names_of_its_authors(prefix: str) -> None:
    """kohya's and ai-toolkit's names; the single blocks' joint projection is one in diffusers too."""
    layers = {
        "single_blocks.0.linear1": (64, 576),
        "single_blocks.3.linear2": (256, 64),
        "double_blocks.0.img_attn.qkv": (64, 192),
        "double_blocks.1.txt_attn.qkv": (64, 192),
        "double_blocks.1.img_attn.proj": (64, 64),
        "double_blocks.1.txt_mlp.0": (64, 384),
        "double_blocks.1.img_mlp.2": (192, 64),
    }
    flat = prefix == "lora_unet_"
    tensors = in_authors_names(prefix, layers)
    matched, unmatched = match_layers(shared_pipe("flux2"), MODELS["flux2"], tensors)
    pairs = matched["transformer"]
    assert not unmatched and len(pairs) == 1 + 1 + 3 + 3 + 1 + 1 + 1
    joint = f"{prefix}{'double_blocks_1_txt_attn_qkv' if flat else 'double_blocks.1.txt_attn.qkv'}"
    delta = tensors[f"{joint}.lora_up.weight"] @ tensors[f"{joint}.lora_down.weight"]
    for place, name in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
        pair = pairs[f"transformer_blocks.1.attn.{name}"]
        found = pair.scale * pair.tensors["up"] @ pair.tensors["down"]
        assert torch.allclose(found, delta[64 * place :][:64], atol=1e-5)
    single = {"single_transformer_blocks.0.attn.to_qkv_mlp_proj", "single_transformer_blocks.3.attn.to_out"}
    assert single | {"transformer_blocks.1.ff.linear_out"} <= pairs.keys()


def test_sd3_in_the_names_of_its_authors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "original.safetensors"
    layers = {f"joint_blocks_{n}_x_block_attn_qkv": (32, 96) for n in range(2)}
    save_file(original_lora(layers), path)
    pipe = tiny.load("sd3")
    with pytest.raises(LoraError, match="fits no layer of type sd3: 'lora_unet_joint_blocks_0_x_block"):
        loras_of(pipe, MODELS["sd3"]).add(str(path))
