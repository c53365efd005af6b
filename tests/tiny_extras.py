"""What goes with the tiny checkpoints: LoRAs, ControlNets, IP-Adapters, motion adapters, single files, GGUF.

Every function returns the path of a file or folder in the cache of `tiny`. All weights are random and large
enough to change a picture.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from shared.models import MODELS
from tests import tiny

Tensors = dict[str, torch.Tensor]
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj")
CONTROL_NETS = {
    "sd1": "ControlNetModel", "sd2": "ControlNetModel", "sdxl": "ControlNetModel", "ad": "ControlNetModel",
    "sd3": "SD3ControlNetModel", "flux": "FluxControlNetModel", "hy": "HunyuanDiT2DControlNetModel",
    "zimage": "ZImageControlNetModel", "qwen": "QwenImageControlNetModel",
}  # fmt: skip
UNET_CONTROL: dict[str, Any] = {"conditioning_embedding_out_channels": (8, 16, 16, 16)}
CONTROL_SIZES: dict[str, dict[str, Any]] = {
    "sd3": {"num_layers": 2, "num_extra_conditioning_channels": 0},
    "flux": {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4},
    "qwen": {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4},
}
KOHYA_PREFIX = {"text_encoder": "lora_te", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}


def denoiser(name: str) -> Any:
    """The untrained denoiser of the tiny checkpoint of this type, as its builder makes it."""
    pipe = tiny.BUILDERS[name]()
    return getattr(pipe, "unet", None) or pipe.transformer


def fill_checkpoint(name: str) -> Path:
    """The checkpoint of this type as one trained for inpainting: its denoiser sees a mask too."""

    def make(folder: Path) -> None:
        pipe, spec = tiny.load(name), MODELS[name]
        model = denoiser(name)
        latents = model.config.in_channels
        config = {**model.config, "in_channels": spec.fill_channels(latents), "out_channels": latents}
        config["_use_default_values"] = []  # else out_channels would be forgotten
        made = tiny.seeded(9, lambda: type(model).from_config(config))
        start = spec.start("fill", control=False)
        assert start is not None
        cls = getattr(diffusers, start.pipeline)
        takes = inspect.signature(cls.__init__).parameters
        parts = {key: part for key, part in pipe.components.items() if key in takes}
        cls(**(parts | {spec.denoiser: made})).save_pretrained(folder)

    return tiny.cached(f"fill_{name}", make)


def adapted_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith(LORA_LAYERS) and ".pooler." not in name
    }


def sgm_name(name: str) -> str:
    """A UNet module of this size in the naming of the original SDXL code: input_blocks.4.1. ..."""
    kind, *rest = name.split(".")
    if kind == "mid_block":
        return ".".join(["middle_block", "1", *rest[2:]])
    level, _, layer = rest[:3]
    number = 3 * int(level) + int(layer) + (kind == "down_blocks")
    return ".".join(
        ["input_blocks" if kind == "down_blocks" else "output_blocks", str(number), "1", *rest[3:]]
    )


def lora(
    name: str, form: str = "diffusers", seed: int = 0, strength: float = 0.2, text: bool = False
) -> Path:
    """A LoRA of rank 4 on the attention layers of the denoiser, and of the text encoders with `text`.

    `form`: diffusers, kohya (flattened names and alphas), sgm (kohya with the original SDXL block names),
    peft (`base_model.model.` in front), own (its authors' names, `diffusion_model.` in front), own-kohya,
    partial (as many keys fit nothing), alien (none fits).
    """
    label = f"lora-{name}-{form}-{seed}-{strength}{'-text' if text else ''}"
    return tiny.cached(
        label, lambda path: save_file(_lora(name, form, seed, strength, text), path), ".safetensors"
    )


def _lora(name: str, form: str, seed: int, strength: float, text: bool) -> Tensors:
    pipe = tiny.BUILDERS[name]()
    key = "unet" if hasattr(pipe, "unet") else "transformer"
    models = {key: getattr(pipe, key)}
    if text:
        models |= {key: getattr(pipe, key) for key in KOHYA_PREFIX if getattr(pipe, key, None) is not None}
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors: Tensors = {}
    for part, model in models.items():
        for layer, linear in adapted_layers(model).items():
            down = torch.randn(4, linear.in_features, generator=generator) / linear.in_features**0.5
            up = torch.randn(linear.out_features, 4, generator=generator) * strength
            if part.startswith("text") and not layer.startswith("text_model."):
                layer = f"text_model.{layer}"  # the name that transformers before 5.6 and all files have
            if form.startswith("own"):
                for ours, theirs in MODELS[name].own_names.items():
                    layer = layer.replace(ours, theirs)
            if form in ("kohya", "sgm", "own-kohya"):
                flat = (sgm_name(layer) if form == "sgm" and part == "unet" else layer).replace(".", "_")
                prefix = KOHYA_PREFIX.get(part, "lora_unet" if form == "own-kohya" else f"lora_{part}")
                if name == "sdxl" and part == "text_encoder":
                    prefix = "lora_te1"
                tensors[f"{prefix}_{flat}.lora_down.weight"] = down
                tensors[f"{prefix}_{flat}.lora_up.weight"] = up
                tensors[f"{prefix}_{flat}.alpha"] = torch.tensor(4.0)
                continue
            prefix = {"peft": "base_model.model", "own": "diffusion_model"}.get(form, part)
            if form != "alien":
                tensors[f"{prefix}.{layer}.lora_A.weight"] = down
                tensors[f"{prefix}.{layer}.lora_B.weight"] = up
            if form in ("partial", "alien"):
                tensors[f"{prefix}.nowhere.{layer}.lora_A.weight"] = down.clone()
                tensors[f"{prefix}.nowhere.{layer}.lora_B.weight"] = up.clone()
    return tensors


def hy_control_net(base: Any, **unused: Any) -> Any:
    config = {key: value for key, value in base.config.items() if key not in ("num_layers", "norm_type")}
    return diffusers.HunyuanDiT2DControlNetModel.from_config(
        config, transformer_num_layers=base.config.num_layers, conditioning_channels=3
    )


def zimage_control_net(base: Any, masks: bool = True, **unused: Any) -> Any:
    """One of version 2, which was trained with masks too, or of 1, which sees the control picture alone."""
    sizes = {key: base.config[key] for key in ("dim", "n_heads", "n_kv_heads", "n_refiner_layers")}
    inputs = base.config.in_channels
    if masks:
        inputs, places = 2 * inputs + 1, list(range(base.config.n_refiner_layers))
        sizes |= {
            "add_control_noise_refiner": "control_noise_refiner",
            "control_refiner_layers_places": places,
        }
    return diffusers.ZImageControlNetModel([0, base.config.n_layers - 1], control_in_dim=inputs, **sizes)


OWN_MAKERS = {"hy": hy_control_net, "zimage": zimage_control_net}
"""For classes whose from_transformer takes the sizes of the real model, or makes none."""


def control_net(name: str, seed: int = 0, **more: Any) -> Path:
    """A ControlNet folder made from the denoiser, its zero-initialised layers randomised.

    `more`: of its maker.
    """

    def make(path: Path) -> None:
        cls = getattr(diffusers, CONTROL_NETS[name])
        base = denoiser("sd1" if name == "ad" else name)
        make_one = OWN_MAKERS.get(name) or getattr(cls, "from_unet", None) or cls.from_transformer
        model = tiny.seeded(
            40 + seed, lambda: make_one(base, **CONTROL_SIZES.get(name, UNET_CONTROL), **more)
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(40 + seed)
            for name_, parameter in model.named_parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.1)
                if "cond_embedding" in name_:  # else the control image is hardly seen
                    parameter.normal_(0, parameter[0].numel() ** -0.5 * 2)
        model.save_pretrained(path)

    return tiny.cached(f"control-{name}-{seed}{more or ''}", make)


def vae(name: str, seed: int = 77) -> Path:
    """The folder of another VAE that fits type `name`."""

    def make(path: Path) -> None:
        config = dict(tiny.BUILDERS[name]().vae.config)
        tiny.seeded(seed, lambda: diffusers.AutoencoderKL.from_config(config)).save_pretrained(path)

    return tiny.cached(f"vae-{name}-{seed}", make)


def refiner(seed: int = 95, **changes: Any) -> Path:
    """The diffusers folder of a refiner for the tiny sdxl: it reads the second text encoder only."""

    def make(folder: Path) -> None:
        base = tiny.load("sdxl")
        sizes = {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 5 * 8 + 64}
        denoiser = tiny.seeded(
            seed, lambda: diffusers.UNet2DConditionModel.from_config({**base.unet.config, **sizes, **changes})
        )
        diffusers.StableDiffusionXLImg2ImgPipeline(
            vae=base.vae, text_encoder=None, tokenizer=None, text_encoder_2=base.text_encoder_2,
            tokenizer_2=base.tokenizer_2, unet=denoiser, scheduler=base.scheduler,
            requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
        ).save_pretrained(folder)  # fmt: skip

    return tiny.cached(f"refiner-{seed}-{'-'.join(map(str, changes.values()))}", make)


def embeddings(name: str, vectors: int = 3) -> Path:
    """A folder with a textual inversion for this type, whose word is cat, as trainers write it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        widths = [part.config.hidden_size for key, part in sorted(tiny.load(name).components.items())
                  if key.startswith("text_encoder")]  # fmt: skip
        keys = ["emb_params"] if len(widths) == 1 else ["clip_l", "clip_g"]
        drawn = torch.Generator().manual_seed(91)
        save_file(
            {k: torch.randn(vectors, w, generator=drawn) for k, w in zip(keys, widths, strict=True)},
            folder / "cat.safetensors",
        )

    return tiny.cached(f"embeddings-{name}-{vectors}", make)


def _resampler(width: int, out: int, in_dim: int = 32, queries: int = 4, ff: int = 4) -> Tensors:
    """IP-Adapter Plus's resampler in its authors' naming: four layers, one head of 64."""
    sizes: dict[str, tuple[int, ...]] = {
        "latents": (1, queries, width), "proj_in.weight": (width, in_dim), "proj_in.bias": (width,),
        "proj_out.weight": (out, width), "proj_out.bias": (out,), "norm_out.weight": (out,),
        "norm_out.bias": (out,),
    }  # fmt: skip
    for i in range(4):
        sizes |= {
            f"layers.{i}.0.{norm}.{kind}": (width,)
            for norm in ("norm1", "norm2")
            for kind in ("weight", "bias")
        }
        sizes |= {
            f"layers.{i}.0.to_q.weight": (64, width), f"layers.{i}.0.to_kv.weight": (128, width),
            f"layers.{i}.0.to_out.weight": (width, 64), f"layers.{i}.1.0.weight": (width,),
            f"layers.{i}.1.0.bias": (width,), f"layers.{i}.1.1.weight": (ff * width, width),
            f"layers.{i}.1.3.weight": (width, ff * width),
        }  # fmt: skip
    return {key: torch.randn(size) / max(size[-1], 1) ** 0.5 for key, size in sizes.items()}


def _ip_unet(name: str, plus: bool) -> dict[str, Tensors]:
    model = denoiser(name)
    cross = model.config.cross_attention_dim
    ip: Tensors = {}
    for number, (layer, processor) in enumerate(
        (key, value) for key, value in model.attn_processors.items()
        if key.endswith("attn2.processor") and "motion_modules" not in key
    ):  # fmt: skip
        out = model.get_submodule(layer.removesuffix(".processor")).to_q.out_features
        for kind in ("k", "v"):
            ip[f"{2 * number + 1}.to_{kind}_ip.weight"] = torch.randn(out, cross) * 0.3
        del processor
    if plus:
        return {"image_proj": _resampler(64, cross), "ip_adapter": ip}
    projection = {
        "proj.weight": torch.randn(4 * cross, 32) * 0.3, "proj.bias": torch.zeros(4 * cross),
        "norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": ip}


def _ip_flux() -> dict[str, Tensors]:
    config = denoiser("flux").config
    inner, cross = config.num_attention_heads * config.attention_head_dim, config.joint_attention_dim
    ip = {}
    for i in range(config.num_layers):
        for kind in ("k", "v"):
            ip[f"{i}.to_{kind}_ip.weight"] = torch.randn(inner, cross) * 0.3
            ip[f"{i}.to_{kind}_ip.bias"] = torch.zeros(inner)
    projection = {
        "proj.weight": torch.randn(4 * cross, 32) * 0.3, "proj.bias": torch.zeros(4 * cross),
        "norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": ip}


def _ip_sd3() -> dict[str, Tensors]:
    model, width = denoiser("sd3"), 64
    inner = model.config.num_attention_heads * model.config.attention_head_dim
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    processor = SD3IPAdapterJointAttnProcessor2_0(inner, inner, model.config.attention_head_dim, width)
    ip = {}
    for i in range(len(model.attn_processors)):
        for key, value in processor.state_dict().items():
            ip[f"{i}.{key}"] = torch.randn_like(value) * 0.3 if value.ndim > 1 else value.clone()
    projection = IPAdapterTimeImageProjection(32, inner, width, heads=1, num_queries=4, timestep_in_dim=32)
    return {"image_proj": dict(projection.state_dict()), "ip_adapter": ip}


def ip_adapter(name: str, form: str = "plain", suffix: str = ".safetensors", encoder: bool = True) -> Path:
    """The weight file of an IP-Adapter in a folder of its own, with `image_encoder/` beside it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(50)
            own = {"flux": _ip_flux, "kontext": _ip_flux, "sd3": _ip_sd3}
            parts = own.get(name, lambda: _ip_unet(name, form == "plus"))()
        if suffix == ".safetensors":
            flat = {
                f"{part}.{key}": value.contiguous()
                for part, group in parts.items()
                for key, value in group.items()
            }
            save_file(flat, folder / f"ip-adapter{suffix}")
        else:
            torch.save(parts, folder / f"ip-adapter{suffix}")
        if encoder:
            image_encoder(name).save_pretrained(folder / "image_encoder")
            if name == "sd3":
                transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(
                    folder / "image_encoder"
                )

    folder = tiny.cached(f"ip-{name}-{form}{suffix}{'' if encoder else '-bare'}", make)
    return folder / f"ip-adapter{suffix}"


def image_encoder(name: str) -> Any:
    if name != "sd3":
        return tiny.clip_vision()
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return tiny.seeded(3, lambda: transformers.SiglipVisionModel(config))


def _original_motion(key: str) -> str:
    """A motion adapter's key in its authors' naming."""
    for ours, theirs in (
        ("pos_embed.pe", "attention_blocks.0.pos_encoder.pe"), ("attn1", "attention_blocks.0"),
        ("attn2", "attention_blocks.1"), ("norm1", "norms.0"), ("norm2", "norms.1"), ("norm3", "ff_norm"),
    ):  # fmt: skip
        key = key.replace(ours, theirs)
    head, _, tail = key.partition("motion_modules.")
    number, _, rest = tail.partition(".")
    return f"{head}motion_modules.{number}.temporal_transformer.{rest}"


def motion_adapter(form: str = "folder", seed: int = 80) -> Path:
    """A motion adapter that fits type ad. `form`: folder, or file (.safetensors, the authors' naming)."""
    adapter = tiny.motion_adapter(seed)
    if form == "folder":
        return tiny.cached(f"motion-{seed}", adapter.save_pretrained)
    tensors = {_original_motion(key): value.contiguous() for key, value in adapter.state_dict().items()}
    return tiny.cached(f"motion-{seed}", lambda path: save_file(tensors, path), ".safetensors")


def motion_lora(seed: int = 0) -> Path:
    """A LoRA on the temporal attention of type ad, diffusers naming."""

    def make(path: Path) -> None:
        generator = torch.Generator().manual_seed(seed)
        tensors: Tensors = {}
        for name, layer in adapted_layers(denoiser("ad")).items():
            if "motion_modules" in name:
                tensors[f"unet.{name}.lora_A.weight"] = (
                    torch.randn(4, layer.in_features, generator=generator) * 0.3
                )
                tensors[f"unet.{name}.lora_B.weight"] = (
                    torch.randn(layer.out_features, 4, generator=generator) * 0.3
                )
        save_file(tensors, path)

    return tiny.cached(f"motion-lora-{seed}", make, ".safetensors")
