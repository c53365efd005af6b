"""LoHa, LoKr, LoCon, DoRA on every type: equal to weights changed by the papers' formulas, and to PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from shared.launch.backend import Needs
from shared.models import MODELS
from shared.parallel.pipeline import model_of
from shared.pipeline.loading import load_pipeline
from shared.pipeline.lora import loras_of
from shared.pipeline.lora_file import LoraError
from shared.pipeline.lora_layers import delta
from shared.pipeline.lora_names import match_layers
from tests import tiny, tiny_extras, tiny_lycoris
from tests.seldom import seldom
from tests.tiny_lycoris import mixed, write


def with_weights(name: str, changes: list[tuple[Mapping[str, dict[str, torch.Tensor]], float]]) -> np.ndarray:
    """The picture of the plain pipeline with the weights changed by each file at its scale."""
    pipe = tiny.load(name)
    model = getattr(pipe, MODELS[name].denoiser)
    for layer in set().union(*(by_layer for by_layer, _ in changes)):
        module: Any = model.get_submodule(layer)
        added = sum(
            scale * tiny_lycoris.changed(module.weight.detach(), by_layer[layer])
            for by_layer, scale in changes
            if layer in by_layer
        )
        with torch.no_grad():
            module.weight += torch.from_numpy(np.asarray(added)).to(module.weight.dtype)
    return tiny.run(pipe, name)


@pytest.mark.parametrize("name", seldom(tiny.BUILDERS, ("sd1", "flux")))
def test_equal_to_weights_changed_by_the_formulas(name: str, tmp_path: Path) -> None:
    pipe = tiny.load(name)
    model, loras = getattr(pipe, MODELS[name].denoiser), loras_of(pipe, MODELS[name])
    before, plain = repr(model), tiny.run(pipe, name)
    lora = tiny_extras.lora(name, "kohya")
    pairs = by_layers(model, load_file(lora))
    first, firsts = mixed(name, model, 0)
    second, seconds = mixed(name, model, 1)
    one, two = write(tmp_path / "one.safetensors", first), write(tmp_path / "two.safetensors", second)
    entry = loras.add(one, 0.7)
    assert (entry.matched, entry.unmatched) == (len(firsts), 0)
    alone = tiny.run(pipe, name)
    error = np.abs(alone - with_weights(name, [(firsts, 0.7)])).max()
    assert error < 1e-4 and np.abs(alone - plain).mean() > 20 * error
    loras.set_scales({one: 0.0})
    assert np.abs(tiny.run(pipe, name) - plain).max() < 1e-5
    loras.set_scales({})
    loras.add(two, 0.4)
    loras.add(str(lora), 0.5)
    together = with_weights(name, [(firsts, 0.7), (seconds, 0.4), (pairs, 0.5)])
    assert np.abs(tiny.run(pipe, name) - together).max() < 1e-4
    loras.remove(two)
    loras.remove(str(lora))
    assert np.abs(tiny.run(pipe, name) - alone).max() < 1e-5
    loras.add(two, 0.4)
    loras.add(str(lora), 0.5)
    loras.fuse("a test")
    assert repr(model) == before
    assert np.abs(tiny.run(pipe, name) - together).max() < 1e-4


def by_layers(model: Any, kohya: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    names = {layer.replace(".", "_"): layer for layer in tiny_extras.adapted_layers(model)}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in kohya.items():
        flat, _, role = key.partition(".")
        flat = flat.removeprefix("lora_unet_").removeprefix("lora_transformer_")
        found.setdefault(names[flat], {})[role] = value
    return found


CONFIGS: dict[str, Any] = {
    "loha": peft.LoHaConfig(r=2, alpha=2, target_modules=["to_q", "conv1"], init_weights=False),
    "lokr": peft.LoKrConfig(r=2, alpha=2, target_modules=["to_q", "conv1"], init_weights=False),
    "dora": peft.LoraConfig(
        r=2, lora_alpha=2, use_dora=True, target_modules=["to_q", "conv1"], init_lora_weights=False
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_peft(kind: str, tmp_path: Path) -> None:
    theirs, ours = tiny.load("sd1"), tiny.load("sd1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(CONFIGS[kind], theirs.unet, "x")
        for key, parameter in theirs.unet.named_parameters():
            if "lora_magnitude_vector" in key:
                parameter.data *= 0.8 + 0.4 * torch.rand_like(parameter)
    state = peft.get_peft_model_state_dict(theirs.unet, adapter_name="x")
    path = write(tmp_path / "peft.safetensors", {f"base_model.model.{k}": v.data for k, v in state.items()})
    entry = loras_of(ours, MODELS["sd1"]).add(path)
    assert entry.matched > 10 and not entry.unmatched
    picture = tiny.run(ours, "sd1")
    assert np.abs(picture - tiny.run(theirs, "sd1")).max() < 1e-4
    assert np.abs(picture - tiny.run(tiny.load("sd1"), "sd1")).max() > 0.005


def changes(pipe: Any, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    """What a file adds to the weight of each layer of the pipeline; all of the file must fit."""
    matched, unmatched = match_layers(pipe, MODELS[name], dict(tensors))
    assert not unmatched
    return {
        (part, layer): (
            lambda u: (delta(u.tensors) * u.scale)[slice(None) if u.rows is None else u.rows].flatten(1)
        )(update)
        for part, layers in matched.items()
        for layer, update in layers.items()
    }


def same(a: dict[tuple[str, str], torch.Tensor], b: dict[tuple[str, str], torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)


def renamed(tensors: Mapping[str, torch.Tensor], *pairs: tuple[str, str]) -> dict[str, torch.Tensor]:
    for old, new in pairs:
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
    return dict(tensors)


def test_names_of_sdxl() -> None:
    pipe = tiny.load("sdxl")
    dotted = load_file(tiny_extras.lora("sdxl", "diffusers", text=True))
    kohya = load_file(tiny_extras.lora("sdxl", "kohya", text=True))
    wanted = changes(pipe, "sdxl", kohya)
    assert {part for part, _ in wanted} == {"unet", "text_encoder", "text_encoder_2"}
    clip = (("text_encoder_2.text_model", "clip_g.transformer.text_model"),
            ("text_encoder.text_model", "clip_l.transformer.text_model"))  # fmt: skip
    prefixed = tuple((old, f"text_encoders.{new}") for old, new in clip)
    original: dict[str, torch.Tensor] = {}
    for key, value in dotted.items():  # as ComfyUI's node LoraSave writes them
        layer, _, role = key.removeprefix("unet.").rpartition(".lora_")
        role = {"A.weight": "down.weight", "B.weight": "up.weight"}[role]
        if key.startswith("unet."):
            layer = f"diffusion_model.{tiny_extras.sgm_name(layer)}"
        original[f"{layer}.lora_{role}"] = value
    for tensors in (
        dotted,
        renamed(dotted, *clip),
        renamed(dotted, *prefixed),
        renamed(dotted, ("unet.", "lora_unet.")),
        renamed(kohya, ("lora_te1_", "lora_te1."), ("lora_unet_", "lora_unet.")),
        renamed(original, *prefixed),
    ):
        assert same(changes(pipe, "sdxl", tensors), wanted)


def test_original_names_in_every_format() -> None:
    pipe = tiny.load("sdxl")
    file, by_layer = mixed("sdxl", pipe.unet, 0)
    attention = {
        layer: found for layer, found in by_layer.items() if "attentions" in layer and "attn" in layer
    }
    assert len(attention) > 10
    wanted = {key: t for key, t in changes(pipe, "sdxl", file).items() if key[1] in attention}
    for style in ("lora_unet_{}", "lycoris_{}", "diffusion_model.{}"):
        tensors: dict[str, torch.Tensor] = {}
        for layer, found in attention.items():
            name = tiny_extras.sgm_name(layer)
            name = style.format(name if "." in style else name.replace(".", "_"))
            tensors |= {f"{name}.{key}": value for key, value in found.items()}
        assert same(changes(pipe, "sdxl", tensors), wanted), style


FLUX = {
    "double_blocks.0.img_attn.qkv": (3072, 9216), "double_blocks.0.img_mlp.0": (3072, 12288),
    "double_blocks.0.txt_attn.proj": (3072, 3072), "double_blocks.0.img_mod.lin": (3072, 18432),
    "single_blocks.0.linear1": (3072, 21504), "single_blocks.0.linear2": (15360, 3072),
    "single_blocks.0.modulation.lin": (3072, 9216),
}  # fmt: skip
FLUX_PARTS = {
    ("double_blocks.0.img_attn.qkv", 0): ("transformer_blocks.0.attn.to_q", 3072),
    ("double_blocks.0.img_attn.qkv", 3072): ("transformer_blocks.0.attn.to_k", 3072),
    ("double_blocks.0.img_attn.qkv", 6144): ("transformer_blocks.0.attn.to_v", 3072),
    ("double_blocks.0.img_mlp.0", 0): ("transformer_blocks.0.ff.net.0.proj", 12288),
    ("double_blocks.0.txt_attn.proj", 0): ("transformer_blocks.0.attn.to_add_out", 3072),
    ("double_blocks.0.img_mod.lin", 0): ("transformer_blocks.0.norm1.linear", 18432),
    ("single_blocks.0.linear1", 0): ("single_transformer_blocks.0.attn.to_q", 3072),
    ("single_blocks.0.linear1", 3072): ("single_transformer_blocks.0.attn.to_k", 3072),
    ("single_blocks.0.linear1", 6144): ("single_transformer_blocks.0.attn.to_v", 3072),
    ("single_blocks.0.linear1", 9216): ("single_transformer_blocks.0.proj_mlp", 12288),
    ("single_blocks.0.linear2", 0): ("single_transformer_blocks.0.proj_out", 3072),
    ("single_blocks.0.modulation.lin", 0): ("single_transformer_blocks.0.norm.linear", 9216),
}


@pytest.mark.parametrize("kind", seldom(("lora", "loha", "lokr"), ("lokr",)))
def test_names_of_flux(kind: str) -> None:
    """BFL's names, which join projections, at FLUX's real width, which diffusers' conversion rests on."""
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
        shapes = {name: torch.nn.Linear(*size) for name, size in FLUX.items()}
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))
    pipe = diffusers.FluxPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts
    )
    tensors: dict[str, torch.Tensor] = {}
    wanted = {}
    for name, layer in shapes.items():
        outer, inner = layer.out_features, layer.in_features
        if kind == "lora":
            found = {"lora_A.weight": torch.randn(2, inner), "lora_B.weight": torch.randn(outer, 2)}
            whole = found["lora_B.weight"] @ found["lora_A.weight"]
        elif kind == "loha":
            found = {f"hada_w{n}_{side}": torch.randn(*((outer, 2) if side == "a" else (2, inner)))
                     for n in "12" for side in "ab"}  # fmt: skip
            whole = (found["hada_w1_a"] @ found["hada_w1_b"]) * (found["hada_w2_a"] @ found["hada_w2_b"])
        else:
            found = {"lokr_w1": torch.randn(6, 4), "lokr_w2": torch.randn(outer // 6, inner // 4)}
            whole = torch.kron(found["lokr_w1"], found["lokr_w2"])
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
        for (source, start), (ours, size) in FLUX_PARTS.items():
            if source == name:  # some rows, and some columns: whole ones would fill the memory
                wanted[ours] = whole[start : start + size][::97, :64].clone()
    kohya = {}
    for key, value in renamed(tensors, ("lora_A", "lora_down"), ("lora_B", "lora_up")).items():
        layer_name = next(name for name in FLUX if key.startswith(f"{name}."))
        kohya[f"lora_unet_{layer_name.replace('.', '_')}{key[len(layer_name) :]}"] = value
    for form in (
        tensors,
        {f"diffusion_model.{key}": value for key, value in tensors.items()},
        {f"base_model.model.{key}": value for key, value in tensors.items()},
        renamed({f"diffusion_model.{key}": t for key, t in tensors.items()},
                ("lora_A", "lora_down"), ("lora_B", "lora_up")),
        kohya,
    ):  # fmt: skip
        matched, unmatched = match_layers(pipe, MODELS["flux"], form)
        assert not unmatched and matched["transformer"].keys() == wanted.keys()
    for name, update in matched["transformer"].items():
        made = delta(update.tensors) * update.scale
        made = made if update.rows is None else made[update.rows]
        assert torch.allclose(made[::97, :64], wanted[name], atol=1e-3), name


def test_dora_by_inputs_of_joined_layers_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=0)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))
    pipe = diffusers.FluxPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts
    )
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(1, 3072),
        f"{name}.lora_up.weight": torch.ones(9216, 1),
        f"{name}.dora_scale": torch.ones(1, 3072),
    }
    with pytest.raises(LoraError, match="DoRA with a scale for each input is not supported on layers"):
        match_layers(pipe, MODELS["flux"], tensors)
    del tensors[f"{name}.dora_scale"]
    assert len(match_layers(pipe, MODELS["flux"], tensors)[0]["transformer"]) == 3


@pytest.mark.parametrize("needs", [Needs(shards=("unet",)), Needs(stages=("unet",))])
def test_a_dora_is_not_added_to_weights_that_lie_elsewhere(needs: Needs, tmp_path: Path) -> None:
    config = tiny.config("sd1")
    pipe = load_pipeline(config.spec, config, torch.device("cpu"), needs, quiet=True)
    loras = loras_of(pipe, config.spec)
    generator = torch.Generator().manual_seed(0)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for kind, says in (("dora", "is a DoRA: .*under --shard_weights"), ("loha", None)):
        tensors = tiny_lycoris.tensors_of(kind, model_of(pipe, "unet").get_submodule(layer), generator)
        path = write(tmp_path / f"{kind}.safetensors", {f"unet.{layer}.{k}": t for k, t in tensors.items()})
        if says is None:
            assert loras.add(path).matched == 1
            continue
        with pytest.raises(LoraError, match=says):
            loras.add(path)


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_in_what_diffusers_and_peft_save(rslora: bool, tmp_path: Path) -> None:
    """Alphas that are no tensors of the file: in its metadata, and in adapter_config.json beside it."""
    theirs = tiny.load("sd1")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_v"], alpha_pattern={"attn2.to_v": 3.0},
        use_rslora=rslora, init_lora_weights=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs.unet.add_adapter(config)
    picture = tiny.run(theirs, "sd1")
    state = peft.get_peft_model_state_dict(theirs.unet)
    told = theirs.unet.peft_config["default"].to_dict()
    folders = tmp_path / "diffusers", tmp_path / "peft"
    type(theirs).save_lora_weights(folders[0], unet_lora_layers=state, unet_lora_adapter_metadata=told)
    folders[1].mkdir()
    config.save_pretrained(folders[1])
    write(folders[1] / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in state.items()})
    ours = loras_of(tiny.load("sd1"), MODELS["sd1"])
    for folder in folders:
        assert not ours.add(str(folder)).unmatched
        assert np.abs(tiny.run(ours.pipe, "sd1") - picture).max() < 1e-5, folder
        ours.remove(str(folder))
    assert np.abs(tiny.run(ours.pipe, "sd1") - picture).max() > 1e-3


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_layers_whose_weights_come_and_go(name: str, tmp_path: Path) -> None:
    """As under --enable_sequential_cpu_offload: weights are there only while their module runs."""
    pipe = tiny.load(name)
    model = getattr(pipe, MODELS[name].denoiser)
    tensors, _ = mixed(name, model, 0)
    loras_of(pipe, MODELS[name]).add(write(tmp_path / "mixed.safetensors", tensors), 0.7)
    whole = tiny.run(pipe, name)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert np.array_equal(tiny.run(pipe, name), whole)
