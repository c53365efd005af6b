"""Single-file checkpoints: equal to the folder they were made from; the shipped configurations are true."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.api.parsing import check_request
from shared.api.warned import collecting_warnings
from shared.launch.backend import Needs
from shared.launch.errors import UsageError
from shared.launch.file_header import CONFIGS, DENOISER
from shared.models import MODELS
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import LoadError, load_pipeline
from shared.pipeline.single_file import clip_tokenizer
from shared.pipeline.single_file_models import as_converted
from tests import tiny, tiny_extras, tiny_original, tiny_qwen

NAME = "diffusion_pytorch_model.safetensors"
SD2_KEY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
# Parameters of the published models.
PARAMETERS = {
    "sd1": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sd2": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
    "sdxl": {"unet": 2_567_463_684, "text_encoder_2": 694_659_840, "vae": 83_653_863},
    "sd3": {"transformer": 2_028_328_000, "text_encoder_3": 4_762_310_656, "vae": 83_819_683},
    "qwen": {"transformer": 20_430_401_088, "text_encoder": 8_292_166_656, "vae": 126_892_531},
    "zimage": {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096, "vae": 83_819_683},
    "flux": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656, "vae": 83_819_683},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_equals_the_folder(name: str) -> None:
    pipe = tiny.host(name, checkpoint=str(tiny_original.single_file(name)))
    assert type(pipe).__name__ == MODELS[name].pipeline and not pipe.text_encoder.training
    assert np.abs(tiny.run(pipe, name) - tiny.run(tiny.load(name), name)).max() < 1e-5


@pytest.mark.parametrize("kind", ["2511", "2509", "first"])
def test_qwen_image_edit(kind: str, tmp_path: Path) -> None:
    """As ComfyUI has it: -2511 by a mark, the first one by what lies beside the file."""
    folder = tiny_qwen.edit(kind)
    parts = tiny.own_parts("qwenedit", folder)
    right = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **parts)
    tensors = tiny_original.tensors("qwenedit", right)
    del tensors["text_encoders.qwen25_7b.transformer.lm_head.weight"]
    if kind == "2511":
        tensors["model.diffusion_model.__index_timestep_zero__"] = torch.tensor([])
    file = save(tensors, tmp_path / "a.safetensors")
    shutil.copytree(folder, tmp_path / "a", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = tmp_path / "a" / "transformer" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"zero_cond_t": False}))
    launch = tiny.config("qwenedit", checkpoint=file)
    pipe: Any = load_pipeline(launch.spec, launch, torch.device("cpu"), Needs(), quiet=True)
    assert type(pipe) is type(right) and pipe.transformer.config.zero_cond_t == (kind == "2511")
    assert np.abs(tiny.run(pipe, "qwenedit") - tiny.run(right, "qwenedit")).max() < 1e-5


def test_a_vae_in_wans_layout(tmp_path: Path) -> None:
    other = tiny.video_vae("AutoencoderKLQwenImage", 61)
    file = save(tiny_original.wan_vae(other), tmp_path / "vae.safetensors")
    pipe = tiny.host("qwen", vae=file)
    assert all(torch.equal(a, b) for a, b in zip(pipe.vae.parameters(), other.parameters(), strict=True))
    lacking = {k: t for k, t in tiny_original.wan_vae(other).items() if not k.startswith("decoder.head")}
    with pytest.raises(LoadError, match=r"lacks 3 tensors, such as 'decoder\.conv_out\.bias'"):
        tiny.host("qwen", vae=save(lacking, tmp_path / "less.safetensors"))


def test_with_control_net_and_motion() -> None:
    file = str(tiny_original.single_file("sd1"))
    control = tiny.host("sd1", checkpoint=file, control_net={str(tiny_extras.control_net("sd1")): 1.0})
    assert type(control).__name__ == "StableDiffusionControlNetPipeline"
    motion = {"motion_adapter": str(tiny_extras.motion_adapter())}
    from_file = tiny.host("ad", checkpoint=file, **motion)
    from_folder = tiny.host("ad", checkpoint=str(tiny.checkpoint("sd1")), **motion)
    assert np.abs(tiny.run(from_file, "ad") - tiny.run(from_folder, "ad")).max() < 1e-5


def test_sd3_without_t5(tmp_path: Path) -> None:
    file = tiny_original.single_file("sd3")
    tensors = {key: t for key, t in load_file(file).items() if "t5xxl" not in key}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copytree(file.with_suffix(""), tmp_path / "model")
    pipe = tiny.host("sd3", checkpoint=str(tmp_path / "model.safetensors"))
    assert pipe.text_encoder_3 is None and np.isfinite(tiny.run(pipe, "sd3")).all()


@pytest.mark.parametrize(
    ("drop", "says"),
    [("cond_stage_model", "has no text_encoder"), ("output_blocks.0.0", "lacks|does not load")],
)
def test_incomplete(tmp_path: Path, drop: str, says: str) -> None:
    file = tiny_original.single_file("sd1")
    save_file({k: t for k, t in load_file(file).items() if drop not in k}, tmp_path / "model.safetensors")
    shutil.copytree(file.with_suffix(""), tmp_path / "model")
    with pytest.raises(LoadError, match=says) as caught:
        tiny.host("sd1", checkpoint=str(tmp_path / "model.safetensors"))
    assert len(str(caught.value).splitlines()) == 1


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(LoadError, match="cannot be read"):
        tiny.host("sd1", checkpoint=str(tmp_path / "a.safetensors"))
    with pytest.raises(LoadError, match="a diffusers folder only"):
        tiny.host("sdup", checkpoint=str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_configurations(name: str) -> None:
    import diffusers
    import transformers

    folder = CONFIGS / name
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == MODELS[name].pipeline
    for part, count in PARAMETERS[name].items():
        library, class_name = index[part]
        cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
        with torch.device("meta"):
            if library == "diffusers":
                model = cls.from_config(cls.load_config(str(folder / part)))
            else:
                model = cls(cls.config_class.from_pretrained(folder / part))
        assert sum(p.numel() for p in model.parameters()) == count, part
    getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")


def test_clip_tokenizer() -> None:
    tokenizer = clip_tokenizer("<|endoftext|>")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = clip_tokenizer("!")("a cat", padding="max_length")["input_ids"]
    assert padded[:5] == [49406, 320, 2368, 49407, 0] and len(padded) == 77


V = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@cache
def base(name: str) -> np.ndarray:
    return tiny.run(tiny.load(name), name)


def source(name: str) -> dict[str, torch.Tensor]:
    return load_file(tiny_original.single_file(name))


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny checkpoints' configurations in the place of the shipped ones; an empty folder for files."""
    for name in ("sd1", "sd2", "sdxl", "sd3", "flux"):
        shutil.copytree(tiny_original.single_file(name).with_suffix(""), tmp_path / "configs" / name)
    monkeypatch.setattr("shared.launch.file_header.CONFIGS", tmp_path / "configs")
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> str:
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata)
    return str(path)


def scaled(weight: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in float8, and its scale: of all, of each row, or of each block of 16 x 16."""
    if form == "block":
        rows, columns = (max(1, size // 16) for size in weight.shape)
        tiles = weight.unflatten(0, (rows, -1)).unflatten(2, (columns, -1))
        scale = tiles.abs().amax((1, 3), keepdim=True) / 448
        return (tiles / scale).reshape(weight.shape).to(torch.float8_e4m3fn), scale[:, 0, :, 0]
    dims = (1,) if form.startswith("row") else (0, 1)
    scale = weight.abs().amax(dims, keepdim=True) / 448
    packed = (weight / scale).to(torch.float8_e4m3fn)
    return packed, {"row": scale, "all": scale.sum()}.get(form, scale.flatten())


@pytest.mark.parametrize(
    ("name", "spelling", "form"),
    [
        ("sd3", "scale_weight", "all1"),
        ("flux", "weight_scale", "all"),
        ("flux", "scale_weight", "row"),
        ("sdxl", "weight_scale", "row1"),
        ("sd1", "weight_scale_inv", "block"),
    ],
)
def test_scales(name: str, spelling: str, form: str, shipped: Path) -> None:
    """In the denoiser and the text encoders; the oracle is a file with the products in it."""
    given, products = source(name), source(name)
    for key, value in source(name).items():
        layer = key.removesuffix(".weight")
        if layer != key and value.ndim == 2 and "embed" not in key and "shared" not in key:
            packed, scale = scaled(value, form)
            given |= {key: packed, f"{layer}.{spelling}": scale, f"{layer}.scale_input": torch.ones(1)}
            whole = scale if scale.ndim != 1 or len(scale) == 1 else scale[:, None]
            for axis, size in enumerate(packed.shape if whole.ndim == 2 else ()):
                whole = whole.repeat_interleave(size // whole.shape[axis], axis)
            products[key] = packed.float() * whole
    given["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    made = tiny.run(tiny.host(name, checkpoint=save(given, shipped / "a.safetensors")), name)
    right = tiny.run(tiny.host(name, checkpoint=save(products, shipped / "b.safetensors")), name)
    assert np.abs(made - right).max() < 1e-5 and 0 < np.abs(right - base(name)).max() < 0.2


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.diffusion_model.time_embed.0.scale_weight", torch.ones(7), "has a scale of shape [7]"),
        ("model.diffusion_model.time_embed.0.scale_weight", torch.tensor(torch.inf), "is not a number"),
        ("model.diffusion_model.nothing.scale_weight", torch.ones(1), "belongs to no weight"),
        ("model.diffusion_model.time_embed.0.weight.absmax", torch.ones(1), "packed in a way"),
        ("model.diffusion_model.time_embed.0.weight", torch.ones(4, dtype=torch.uint8), "has no scale"),
    ],
)
def test_scales_that_are_refused(key: str, value: torch.Tensor, says: str, shipped: Path) -> None:
    file = save(source("sd1") | {key: value}, shipped / "a.safetensors")
    with pytest.raises(LoadError, match=re.escape(says)):
        tiny.host("sd1", checkpoint=file)


@pytest.mark.parametrize(
    ("name", "keys", "metadata", "yaml", "cls", "settings"),
    [
        ("sdxl", ("v_pred", "ztsnr"), {}, "", "EulerDiscreteScheduler", V | ZERO_SNR),
        pytest.param("sdxl", ("v_pred",), {}, "", "EulerDiscreteScheduler", V, marks=pytest.mark.slow),
        ("sdxl", (), {"modelspec.prediction_type": "v"}, "", "EulerDiscreteScheduler", V),
        pytest.param(
            "sd1",
            ("v_pred", "ztsnr"),
            {},
            "",
            "DDIMScheduler",
            V | ZERO_SNR | {"clip_sample": False},
            marks=pytest.mark.slow,
        ),
        ("sd1", (), {}, 'model:\n  params:\n    parameterization: "v"\n', "PNDMScheduler", V),
    ],
)
def test_velocity(
    name: str,
    keys: Any,
    metadata: Any,
    yaml: str,
    cls: str,
    settings: Any,
    shipped: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Recognised from marks, metadata and YAML; it stays under another scheduler."""
    tensors = source(name) | {key: torch.tensor([]) for key in keys}
    file = save(tensors, shipped / "a.safetensors", metadata)
    if yaml:
        (shipped / "a.yaml").write_text(yaml)
    with caplog.at_level("INFO", "host"):
        made = tiny.host(name, checkpoint=file)
    assert "a.safetensors: recognised v" in caplog.text
    right = tiny.load(name)
    right.scheduler = getattr(diffusers, cls).from_config(right.scheduler.config, **settings)
    assert type(made.scheduler).__name__ == cls
    assert np.abs(tiny.run(made, name) - tiny.run(right, name)).max() < 1e-5
    assert np.abs(tiny.run(right, name) - base(name)).max() > 0.01
    wanted = {"scheduler": "k_dpmpp_2m"}
    other = tiny.host(name, checkpoint=file, scheduler=wanted)
    right.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        right.scheduler.config, use_karras_sigmas=True
    )
    assert np.abs(tiny.run(other, name) - tiny.run(right, name)).max() < 1e-5
    if "ztsnr" in keys:
        with pytest.raises(UsageError, match=r"heun does not support the zero terminal SNR .*: ddim, "):
            tiny.host(name, checkpoint=file, scheduler="heun")


@pytest.mark.parametrize(
    ("file", "extra", "metadata", "prediction"),
    [
        ("v2-1_768-ema-pruned", {}, {}, "v_prediction"),
        ("v2-1_512-ema-pruned", {}, {}, "epsilon"),
        ("512-base-ema", {}, {}, "epsilon"),
        ("mine", {}, {}, "v_prediction"),
        ("mine", {}, {"modelspec.resolution": "512x512"}, "epsilon"),
        ("v2-1_512", {}, {"modelspec.predict_key": "v"}, "v_prediction"),
        ("mine", {"global_step": torch.tensor(875000)}, {}, "epsilon"),
        ("mine", {SD2_KEY: torch.linspace(-0.1, 0.1, 64)}, {}, "epsilon"),
        ("v2-1_512", {SD2_KEY: torch.linspace(-0.3, 0.3, 64)}, {}, "v_prediction"),
    ],
)
def test_sd2_of_512_and_768(
    file: str, extra: Any, metadata: Any, prediction: str, shipped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(source("sd2") | extra, shipped / f"{file}.safetensors", metadata)
    with caplog.at_level("INFO", "host"):
        pipe = tiny.host("sd2", checkpoint=path)
    assert pipe.scheduler.config.prediction_type == prediction
    assert f"{file}.safetensors: recognised " in caplog.text
    said = tiny.host("sd2", checkpoint=path, scheduler={"scheduler": "ddim", "prediction_type": "sample"})
    assert said.scheduler.config.prediction_type == "sample"


def test_playground(shipped: Path) -> None:
    mean, std = torch.tensor([[-1.6, 1.8, -1.3, 2.5]]), torch.tensor([[8.4, 5.9, 6.5, 5.2]])
    tensors = source("sdxl") | {"edm_mean": mean, "edm_std": std}
    made = tiny.host("sdxl", checkpoint=save(tensors, shipped / "a.safetensors"))
    right = tiny.load("sdxl")
    right.scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5
    )
    right.vae.register_to_config(
        latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist(), scaling_factor=0.5
    )
    assert np.abs(tiny.run(made, "sdxl") - tiny.run(right, "sdxl")).max() < 1e-5
    right.save_pretrained(shipped / "folder")
    for checkpoint in (str(shipped / "a.safetensors"), str(shipped / "folder")):
        euler = tiny.host("sdxl", checkpoint=checkpoint, scheduler="euler")
        right.scheduler = diffusers.EDMEulerScheduler.from_config(right.scheduler.config)
        assert np.abs(tiny.run(euler, "sdxl") - tiny.run(right, "sdxl")).max() < 1e-5
        with pytest.raises(
            UsageError, match=r"heun does not fit this checkpoint, .* supported: dpmpp_2m, euler"
        ):
            tiny.host("sdxl", checkpoint=checkpoint, scheduler="heun")


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("flux", "model.diffusion_model."),
        ("flux", ""),
        ("flux", "transformer."),
        ("kontext", ""),
        ("sd3", "model.diffusion_model."),
        ("sd3", ""),
        ("sdxl", ""),
    ],
)
def test_a_denoiser_alone(name: str, prefix: str, shipped: Path) -> None:
    known = "model.diffusion_model."
    tensors = {
        prefix + key.removeprefix(known): t for key, t in source(name).items() if key.startswith(known)
    }
    file = save(tensors, shipped / "a.safetensors")
    beside = shipped / "a"
    with pytest.raises(LoadError, match=f"has no text_encoder .*in '{beside}/text_encoder'"):
        tiny.host(name, checkpoint=file)
    ignore = shutil.ignore_patterns("transformer", "unet", "model_index.json")
    shutil.copytree(tiny.checkpoint(name), beside, ignore=ignore)
    made = tiny.host(name, checkpoint=file)
    assert np.abs(tiny.run(made, name) - base(name)).max() < 1e-5


def test_schnell(shipped: Path) -> None:
    tensors = {key: t for key, t in source("flux").items() if "guidance" not in key}
    made = tiny.host("flux", checkpoint=save(tensors, shipped / "a.safetensors"))
    right = tiny.load("flux")
    right.transformer.register_to_config(guidance_embeds=False)
    state = {k: t for k, t in right.transformer.state_dict().items() if "guidance" not in k}
    right.transformer = diffusers.FluxTransformer2DModel.from_config(right.transformer.config)
    right.transformer.load_state_dict(state)
    right.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert np.abs(tiny.run(made, "flux") - tiny.run(right, "flux")).max() < 1e-5
    config = tiny.config("flux", width=64, height=64)
    on = PipelineEngine(made, config, tiny.world())
    for cfg, told in (
        (7.0, ["cfg: 7 has no effect: this checkpoint is distilled and takes no guidance"]),
        (None, []),
    ):
        with collecting_warnings() as warnings:
            on.generate(check_request({"positive": "a", "steps": 1, "cfg": cfg}, config), lambda *_: None)
        assert warnings == told


def test_the_names_that_converters_want() -> None:
    """With the usual prefix for UNets in their authors' names, whatever the file has; else without it."""
    one = torch.zeros(1)
    for type, name, prefix in (
        ("sd1", "input_blocks.0.0.weight", DENOISER),
        ("sd1", "conv_in.weight", ""),
        ("flux", "double_blocks.0.img_attn.norm.query_norm.scale", ""),
    ):
        for given in (name, DENOISER + name):
            assert set(as_converted({given: one}, MODELS[type])) == {prefix + name}


def test_sd35(shipped: Path) -> None:
    """Its blocks norm queries and keys, which the shipped configuration does not."""
    right = tiny.load("sd3")
    config = {**right.transformer.config, "qk_norm": "rms_norm"}
    right.transformer = tiny.seeded(6, lambda: diffusers.SD3Transformer2DModel.from_config(config))
    own = right.transformer.state_dict()
    norms = {"norm_q": "x_block.attn.ln_q", "norm_k": "x_block.attn.ln_k",
             "norm_added_q": "context_block.attn.ln_q",
             "norm_added_k": "context_block.attn.ln_k"}  # fmt: skip
    tensors = source("sd3") | tiny_original.prefixed(
        "model.diffusion_model.", tiny_original.sd3(right.transformer)
    )
    for key, tensor in own.items():
        if found := re.fullmatch(r"transformer_blocks\.(\d+)\.attn\.(norm_\w+)\.weight", key):
            tensor.uniform_(0.5, 3)
            block = f"model.diffusion_model.joint_blocks.{found[1]}"
            tensors[f"{block}.{norms[found[2]]}.weight"] = tensor
    made = tiny.host("sd3", checkpoint=save(tensors, shipped / "a.safetensors"))
    assert made.transformer.config.qk_norm == "rms_norm"
    assert np.abs(tiny.run(made, "sd3") - tiny.run(right, "sd3")).max() < 1e-5


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux"])
def test_inpainting(name: str, shipped: Path) -> None:
    tensors, spec = source(name), MODELS[name]
    key = next(key for key in tensors if key.endswith(("input_blocks.0.0.weight", "x_embedder.weight")))
    latents = tensors[key].shape[1]
    channels = spec.fill_channels(latents)
    assert channels is not None
    more = torch.zeros(len(tensors[key]), channels - latents, *tensors[key].shape[2:])
    tensors[key] = torch.cat([tensors[key], more], 1)
    made = tiny.host(name, checkpoint=save(tensors, shipped / "a.safetensors"))
    start = spec.start("fill", control=False)
    assert start and type(made).__name__ == start.pipeline
    config = getattr(made, spec.denoiser).config
    assert (config.in_channels, config.out_channels) == (channels, latents)


@pytest.mark.parametrize("suffix", [".sft", ".fp16.safetensors"])
def test_other_names(suffix: str, shipped: Path) -> None:
    flat = "cond_stage_model.transformer."
    tensors = {key.replace(f"{flat}text_model.", flat): t for key, t in source("sd1").items()}
    tensors |= {"alphas_cumprod": torch.rand(1000), "model_ema.decay": torch.tensor(0.9)}
    made = tiny.host("sd1", checkpoint=save(tensors, shipped / f"a{suffix}"))
    assert np.abs(tiny.run(made, "sd1") - base("sd1")).max() < 1e-5


def other_kinds() -> dict[str, tuple[str, Any, str]]:
    """What a file is -> a type that it is not, its tensors, and the words."""
    known = "model.diffusion_model."

    def inputs(name: str, times: int, key: str) -> dict[str, torch.Tensor]:
        tensors = source(name)
        return tensors | {known + key: torch.cat([tensors[known + key]] * times, 1)}

    one = torch.ones(1)
    first = "input_blocks.0.0.weight"
    return {
        "lora": ("sdxl", lambda: load_file(tiny_extras.lora("sdxl", "kohya")), "a LoRA, .* --lora takes it"),
        "vae": ("sd1", lambda: load_file(tiny_extras.vae("sd1") / NAME), "a VAE, .* --vae takes it"),
        "vae2": ("sd1", lambda: tiny_original.vae(tiny.load("sd1").vae), "a VAE"),
        "t5": ("flux", lambda: tiny.load("flux").text_encoder_2.state_dict(), "a text encoder"),
        "control": ("sd1", lambda: load_file(tiny_extras.control_net("sd1") / NAME), "a ControlNet"),
        "ema": ("sd1", lambda: {"model_ema.a": one, "first_stage_model.b": one}, "only averaged weights"),
        "sdxl": ("sd1", lambda: source("sdxl"), "is Stable Diffusion XL, not of type sd1: --type=sdxl loads"),
        "sd1": ("sdxl", lambda: source("sd1"), "is Stable Diffusion 1, .*: --type=ad or sd1 loads it"),
        "sd2": ("sd1", lambda: source("sd2"), "is Stable Diffusion 2"),
        "flux": ("sd3", lambda: source("flux"), "is FLUX.1"),
        "sd3": ("flux", lambda: source("sd3"), "is Stable Diffusion 3"),
        "refiner": ("sdxl", lambda: {"conditioner.embedders.0.model.a": one, f"{known}b": one}, "refiner"),
        "pix2pix": ("sdxl", lambda: inputs("sdxl", 2, first), "is InstructPix2Pix"),
        "depth": ("flux", lambda: inputs("flux", 2, "x_embedder.weight"), "is FLUX.1 Canny or Depth"),
        "chroma": ("flux", lambda: {"distilled_guidance_layer.in_proj.bias": one}, "is Chroma"),
        "motion": ("sd1", lambda: {"down_blocks.0.motion_modules.0.a": one}, "a motion module"),
        "else": ("sd1", lambda: {"what": one}, "not a supported model; its tensors are 'what'"),
    }


@pytest.mark.parametrize("kind", other_kinds())
def test_what_a_file_is_is_said_before_weights_are_read(
    kind: str, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unread = "shared.pipeline.single_file.read_weights"
    monkeypatch.setattr(unread, lambda *_: pytest.fail("weights were read"))
    name, tensors, says = other_kinds()[kind]
    with pytest.raises(LoadError, match=says) as caught:
        tiny.host(name, checkpoint=save(tensors(), shipped / "a.safetensors"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}, "InstructPix2Pix"),
        ({"requires_aesthetics_score": True}, "the SDXL refiner"),
    ],
)
def test_what_a_folder_is(index: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.checkpoint("sdxl"), tmp_path / "a"))
    whole = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(whole | index))
    with pytest.raises(LoadError, match=f"is {says}|is the {says}"):
        tiny.host("sdxl", checkpoint=str(folder))


def test_scales_in_a_folder_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.checkpoint("sd1"), tmp_path / "a"))
    file = folder / "unet" / NAME
    save(load_file(file) | {"conv_in.scale_weight": torch.ones(1)}, file)
    with pytest.raises(LoadError, match=r"scaled weights \(key 'conv_in.scale_weight'\)"):
        tiny.host("sd1", checkpoint=str(folder))
