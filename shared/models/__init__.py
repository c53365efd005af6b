"""The registry: all that is known of a model type, as data.

Nothing else in the code asks for a type by name. Reading this file answers which types there are, what
each needs and takes, which features it has and, where it has none, why. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal


def _refusals(*groups: Mapping[str, str]) -> Mapping[str, str]:
    merged: dict[str, str] = {}
    for group in groups:
        merged.update(group)
    return MappingProxyType(merged)


@dataclass(frozen=True)
class ModelSpec:
    """What is known of one model type.

    `fields` are the request fields it takes beyond the common ones; `refuses` maps a launch flag to the
    reason why this type has no such thing, whatever the backend.
    """

    name: str
    title: str
    pipeline: str  # diffusers class names are strings, resolved by shared.pipeline.loading
    denoiser: Literal["unet", "transformer"]
    output: Literal["image", "video"]
    width: int
    height: int
    steps: int
    cfg: float
    cfg_field: str = "guidance_scale"
    size_multiple: int = 8
    size_scale: int = 1  # output pixels per pixel of the size that the pipeline is given (x4 upscaler: 4)
    frames: int | None = None
    fps: int = 8
    text_encoders: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    image: Literal["none", "needed"] = "none"
    latent_layout: Literal["nchw", "ncfhw", "nfchw", "packed"] = "nchw"
    pooled_embeds: bool = False
    prompt_chunks: bool = False  # whether its denoiser reads a prompt of any length, in CLIP's chunks
    most_tokens: int = 0  # that T5 may read, where that is more than usual
    embeds_mask: bool = False  # whether embeddings come with an attention mask
    scheduler_family: Literal["discrete", "video", "flow", "flow_flux"] = "discrete"
    fields: frozenset[str] = frozenset()
    image_pipeline: str = "StableDiffusionImg2ImgPipeline"  # whose `strength` is ours
    inpaint_pipeline: str | None = None  # for checkpoints whose UNet has 9 input channels
    control_net_class: str | None = None
    control_net_pipeline: str | None = None
    control_image_field: str = "image"  # the ControlNet pipeline's argument for the control image
    ip_adapter_encoder: Literal["clip", "siglip"] | None = None
    compel_class: str | None = None  # compel's wrapper for its text encoders
    guidance_branches: int = 2  # that one call of the denoiser computes, with and without the prompt
    lora_loader: Literal["pipeline", "peft"] = "pipeline"
    single_file_config: str | None = None  # folder under configs/, to load a single file offline
    pipeline_defaults: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    refuses: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


PROMPTS = frozenset({"positive", "negative", "prompt_syntax"})
EMBEDS = frozenset({"positive_embeds", "negative_embeds"})
CONTROL = frozenset({"control_image", "control_image_scale", "controlnet_scale"})
IP = frozenset({"ip_image", "ip_image_scale", "ip_adapter_scale"})
IMAGE = frozenset({"image", "image_scale"})
SIZE = frozenset({"width", "height"})
SCHEDULE = frozenset({"sigmas", "timesteps"})
PARTIAL = frozenset({"strength", "denoise", "denoising_start", "denoising_end", "add_noise"})
VIDEO = frozenset({"frames", "decode_chunk_size", "fps"})
LORA = frozenset({"lora_scales"})

SD_FIELDS = PROMPTS | EMBEDS | CONTROL | IP | SIZE | SCHEDULE | PARTIAL | LORA | {"clip_skip", "latent"}

_NO_MOTION = {
    flag: "only AnimateDiff (type ad) has motion modules"
    for flag in ("motion_module", "motion_adapter", "motion_adapter_lora")
}
_NO_GGUF = "there is no GGUF loader in diffusers for this denoiser; types with one: flux, sd1, sd2, sd3, sdxl"
_NO_CONTROL = "diffusers has no ControlNet pipeline for it; types with one: ad, flux, hy, sd1, sd2, sd3, sdxl"
_NO_IP = "there is no IP-Adapter for it in diffusers; types with one: ad, flux, sd1, sd2, sd3, sdxl"
_NO_COMPEL = "compel has no support for its text encoders; types with it: ad, flux, sd1, sd2, sdup, sdxl"

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="ad",
            prompt_chunks=True,
            title="AnimateDiff (Stable Diffusion 1.5 with a motion module)",
            pipeline="AnimateDiffPipeline",
            denoiser="unet",
            output="video",
            width=512,
            height=512,
            steps=25,
            cfg=7.5,
            frames=16,
            latent_layout="ncfhw",
            text_encoders=("text_encoder",),
            tokenizers=("tokenizer",),
            compel_class="CompelForSD",
            fields=SD_FIELDS - SCHEDULE | VIDEO,
            control_net_class="ControlNetModel",
            control_net_pipeline="AnimateDiffControlNetPipeline",
            control_image_field="conditioning_frames",
            ip_adapter_encoder="clip",
            single_file_config="sd1",
            refuses=_refusals({"gguf_model": _NO_GGUF}),
        ),
        ModelSpec(
            name="sd1",
            prompt_chunks=True,
            title="Stable Diffusion 1.x",
            pipeline="StableDiffusionPipeline",
            inpaint_pipeline="StableDiffusionInpaintPipeline",
            denoiser="unet",
            output="image",
            width=512,
            height=512,
            steps=30,
            cfg=7.5,
            text_encoders=("text_encoder",),
            tokenizers=("tokenizer",),
            compel_class="CompelForSD",
            fields=SD_FIELDS,
            control_net_class="ControlNetModel",
            control_net_pipeline="StableDiffusionControlNetPipeline",
            ip_adapter_encoder="clip",
            single_file_config="sd1",
            refuses=_refusals(_NO_MOTION),
        ),
        ModelSpec(
            name="sd2",
            prompt_chunks=True,
            title="Stable Diffusion 2.x",
            pipeline="StableDiffusionPipeline",
            inpaint_pipeline="StableDiffusionInpaintPipeline",
            denoiser="unet",
            output="image",
            width=768,
            height=768,
            steps=30,
            cfg=7.5,
            text_encoders=("text_encoder",),
            tokenizers=("tokenizer",),
            compel_class="CompelForSD",
            fields=SD_FIELDS,
            control_net_class="ControlNetModel",
            control_net_pipeline="StableDiffusionControlNetPipeline",
            ip_adapter_encoder="clip",
            single_file_config="sd2",
            refuses=_refusals(_NO_MOTION),
        ),
        ModelSpec(
            name="sdxl",
            prompt_chunks=True,
            title="Stable Diffusion XL",
            pipeline="StableDiffusionXLPipeline",
            image_pipeline="StableDiffusionXLImg2ImgPipeline",
            inpaint_pipeline="StableDiffusionXLInpaintPipeline",
            denoiser="unet",
            output="image",
            width=1024,
            height=1024,
            steps=30,
            cfg=5.0,
            text_encoders=("text_encoder", "text_encoder_2"),
            tokenizers=("tokenizer", "tokenizer_2"),
            pooled_embeds=True,
            compel_class="CompelForSDXL",
            fields=SD_FIELDS,
            control_net_class="ControlNetModel",
            control_net_pipeline="StableDiffusionXLControlNetPipeline",
            ip_adapter_encoder="clip",
            single_file_config="sdxl",
            refuses=_refusals(_NO_MOTION),
        ),
        ModelSpec(
            name="sd3",
            most_tokens=512,
            title="Stable Diffusion 3",
            pipeline="StableDiffusion3Pipeline",
            image_pipeline="StableDiffusion3Img2ImgPipeline",
            denoiser="transformer",
            output="image",
            width=1024,
            height=1024,
            steps=28,
            cfg=7.0,
            size_multiple=16,
            text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
            tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
            pooled_embeds=True,
            scheduler_family="flow",
            fields=PROMPTS
            | EMBEDS
            | CONTROL
            | IP
            | SIZE
            | LORA
            | PARTIAL
            | {"sigmas", "clip_skip", "latent"},
            control_net_class="SD3ControlNetModel",
            control_net_pipeline="StableDiffusion3ControlNetPipeline",
            control_image_field="control_image",
            ip_adapter_encoder="siglip",
            single_file_config="sd3",
            refuses=_refusals(_NO_MOTION, {"compel": _NO_COMPEL}),
        ),
        ModelSpec(
            name="sdup",
            prompt_chunks=True,
            title="Stable Diffusion x4 upscaler",
            pipeline="StableDiffusionUpscalePipeline",
            denoiser="unet",
            output="image",
            width=512,
            height=512,
            steps=30,
            cfg=9.0,
            size_scale=4,
            text_encoders=("text_encoder",),
            tokenizers=("tokenizer",),
            image="needed",
            compel_class="CompelForSD",
            fields=PROMPTS | EMBEDS | IMAGE | PARTIAL | LORA | {"clip_skip", "latent"},
            refuses=_refusals(
                _NO_MOTION, {"control_net": _NO_CONTROL, "ip_adapter": _NO_IP, "gguf_model": _NO_GGUF}
            ),
        ),
        ModelSpec(
            name="svd",
            title="Stable Video Diffusion",
            pipeline="StableVideoDiffusionPipeline",
            denoiser="unet",
            output="video",
            width=1024,
            height=576,
            steps=25,
            cfg=3.0,
            cfg_field="max_guidance_scale",
            frames=14,
            latent_layout="nfchw",
            fps=7,
            image="needed",
            scheduler_family="video",
            fields=IMAGE
            | SIZE
            | VIDEO
            | LORA
            | {"sigmas", "latent", "motion_bucket_id", "noise_aug_strength"},
            lora_loader="peft",
            refuses=_refusals(
                _NO_MOTION,
                {
                    "control_net": _NO_CONTROL,
                    "ip_adapter": _NO_IP,
                    "gguf_model": _NO_GGUF,
                    "compel": "it takes a picture, not a prompt",
                    "compile_text_encoder": "it has no text encoder",
                    "enable_vae_tiling": "its VAE decoder cannot tile; decode_chunk_size bounds its memory",
                    "enable_vae_slicing": "its VAE decoder cannot slice; decode_chunk_size bounds its memory",
                },
            ),
        ),
        ModelSpec(
            name="flux",
            title="FLUX.1",
            pipeline="FluxPipeline",
            image_pipeline="FluxImg2ImgPipeline",
            denoiser="transformer",
            latent_layout="packed",
            output="image",
            width=1024,
            height=1024,
            steps=28,
            cfg=3.5,
            size_multiple=16,
            text_encoders=("text_encoder", "text_encoder_2"),
            tokenizers=("tokenizer", "tokenizer_2"),
            pooled_embeds=True,
            scheduler_family="flow_flux",
            compel_class="CompelForFlux",
            guidance_branches=1,
            fields=PROMPTS
            | EMBEDS
            | CONTROL
            | IP
            | SIZE
            | PARTIAL
            | LORA
            | {"sigmas", "latent", "true_cfg_scale"},
            control_net_class="FluxControlNetModel",
            control_net_pipeline="FluxControlNetPipeline",
            control_image_field="control_image",
            ip_adapter_encoder="clip",
            single_file_config="flux",
            refuses=_refusals(_NO_MOTION),
        ),
        ModelSpec(
            name="hy",
            title="HunyuanDiT",
            pipeline="HunyuanDiTPipeline",
            denoiser="transformer",
            output="image",
            width=1024,
            height=1024,
            steps=25,
            cfg=5.0,
            size_multiple=16,
            text_encoders=("text_encoder", "text_encoder_2"),
            tokenizers=("tokenizer", "tokenizer_2"),
            fields=PROMPTS | CONTROL | SIZE | PARTIAL | LORA | {"latent"},
            control_net_class="HunyuanDiT2DControlNetModel",
            control_net_pipeline="HunyuanDiTControlNetPipeline",
            control_image_field="control_image",
            lora_loader="peft",
            pipeline_defaults=MappingProxyType({"use_resolution_binning": False}),
            refuses=_refusals(
                _NO_MOTION,
                {
                    "ip_adapter": _NO_IP,
                    "gguf_model": _NO_GGUF,
                    "compel": _NO_COMPEL,
                    "enable_group_offload": "diffusers has no group offloading for HunyuanDiT2DModel",
                },
            ),
        ),
        *(
            ModelSpec(
                name=name,
                title=title,
                pipeline=pipeline,
                denoiser="transformer",
                output="image",
                width=1024,
                height=1024,
                steps=20,
                cfg=4.5,
                size_multiple=16,
                text_encoders=("text_encoder",),
                tokenizers=("tokenizer",),
                embeds_mask=True,
                fields=PROMPTS | EMBEDS | SIZE | SCHEDULE | PARTIAL | LORA | {"latent"},
                lora_loader="peft",
                pipeline_defaults=MappingProxyType({"use_resolution_binning": False, "clean_caption": False}),
                refuses=_refusals(
                    _NO_MOTION,
                    {
                        "control_net": _NO_CONTROL,
                        "ip_adapter": _NO_IP,
                        "gguf_model": _NO_GGUF,
                        "compel": _NO_COMPEL,
                    },
                ),
            )
            for name, title, pipeline in (
                ("pixa", "PixArt-alpha", "PixArtAlphaPipeline"),
                ("pixs", "PixArt-Sigma", "PixArtSigmaPipeline"),
            )
        ),
    )
}

# Launch flags that are features of a model, in the order in which the compatibility tables show them.
FEATURES: dict[str, str] = {
    "lora": "LoRA",
    "control_net": "ControlNet",
    "ip_adapter": "IP-Adapter",
    "quantize_to": "quantization",
    "gguf_model": "GGUF",
    "compile_unet": "compile (denoiser)",
    "compile_vae": "compile (VAE)",
    "compile_text_encoder": "compile (text encoders)",
    "enable_model_cpu_offload": "model CPU offload",
    "enable_sequential_cpu_offload": "sequential CPU offload",
    "enable_group_offload": "group offload",
    "enable_vae_tiling": "VAE tiling",
    "enable_vae_slicing": "VAE slicing",
    "compel": "compel",
    "motion_module": "motion module",
    "motion_adapter": "motion adapter",
    "motion_adapter_lora": "motion LoRA",
}


@dataclass(frozen=True)
class SchedulerSpec:
    """A scheduler's short name: the diffusers class and the settings that make it what the name says."""

    name: str
    cls: str
    settings: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    families: frozenset[str] = frozenset({"discrete"})
    sigmas: bool = False  # whether it takes Karras, exponential and beta sigmas
    trailing: bool = False  # whether its timesteps may be spaced from the end


def _scheduler(
    name: str, cls: str, *families: str, sigmas: bool = False, trailing: bool = False, **settings: object
) -> SchedulerSpec:
    return SchedulerSpec(name, cls, MappingProxyType(settings), frozenset(families), sigmas, trailing)


_FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

SCHEDULERS: dict[str, SchedulerSpec] = {
    s.name: s
    for s in (
        _scheduler("ddim", "DDIMScheduler", "discrete", "video", trailing=True),
        _scheduler("ddpm", "DDPMScheduler", "discrete", trailing=True),
        _scheduler("dpm_2", "KDPM2DiscreteScheduler", "discrete", sigmas=True, trailing=True),
        _scheduler("dpm_2_a", "KDPM2AncestralDiscreteScheduler", "discrete", sigmas=True, trailing=True),
        _scheduler("dpmpp_2m", "DPMSolverMultistepScheduler", "discrete", sigmas=True, trailing=True),
        _scheduler(
            "dpmpp_2m_sde",
            "DPMSolverMultistepScheduler",
            "discrete",
            sigmas=True,
            trailing=True,
            algorithm_type="sde-dpmsolver++",
        ),
        # Spaced from the end its last step asks torchsde beyond the noise it has: other noise each time.
        _scheduler("dpmpp_sde", "DPMSolverSDEScheduler", "discrete", sigmas=True),
        _scheduler("euler", "EulerDiscreteScheduler", "discrete", "video", sigmas=True, trailing=True),
        _scheduler("euler_a", "EulerAncestralDiscreteScheduler", "discrete", "video", trailing=True),
        _scheduler("heun", "HeunDiscreteScheduler", "discrete", sigmas=True, trailing=True),
        _scheduler("lcm", "LCMScheduler", "discrete"),
        _scheduler("lms", "LMSDiscreteScheduler", "discrete", sigmas=True, trailing=True),
        _scheduler("pndm", "PNDMScheduler", "discrete", trailing=True),
        _scheduler("tcd", "TCDScheduler", "discrete"),
        _scheduler("unipc", "UniPCMultistepScheduler", "discrete", sigmas=True, trailing=True),
        _scheduler("flow_euler", "FlowMatchEulerDiscreteScheduler", "flow", "flow_flux", sigmas=True),
        _scheduler("flow_heun", "FlowMatchHeunDiscreteScheduler", "flow"),
        _scheduler("flow_lcm", "FlowMatchLCMScheduler", "flow_flux"),
        _scheduler("flow_dpmpp_2m", "DPMSolverMultistepScheduler", "flow_flux", **_FLOW),
        _scheduler("flow_unipc", "UniPCMultistepScheduler", "flow_flux", **_FLOW),
    )
}


_NO_SIGMAS = {f"use_{kind}_sigmas": False for kind in ("karras", "exponential", "beta")}
VARIANTS: dict[str, Mapping[str, object]] = {
    "k_": _NO_SIGMAS | {"use_karras_sigmas": True},
    "exponential_": _NO_SIGMAS | {"use_exponential_sigmas": True},
    "beta_": _NO_SIGMAS | {"use_beta_sigmas": True},
    "_trailing": {"timestep_spacing": "trailing"},
}
"""What may stand in front of a short name, or after it, and the settings that it stands for."""


def with_variant(name: str, variant: str) -> str | None:
    """The short name of a scheduler's variant, or None where the scheduler has no such one."""
    entry = SCHEDULERS[name]
    if variant.startswith("_"):
        return name + variant if entry.trailing else None
    return variant + name if entry.sigmas else None


_NAMED: dict[str, tuple[SchedulerSpec, Mapping[str, object]]] = {
    name: (SCHEDULERS[short], settings)
    for short in SCHEDULERS
    for variant, settings in VARIANTS.items()
    if (name := with_variant(short, variant))
} | {short: (entry, {}) for short, entry in SCHEDULERS.items()}


def scheduler_named(name: str) -> tuple[SchedulerSpec, Mapping[str, object]] | None:
    """A short name's scheduler, and the settings of its variant."""
    return _NAMED.get(name)


def schedulers_for(spec: ModelSpec) -> list[str]:
    """Short names that the type may use, sorted, and then those of variants."""
    fitting = (name for name, (s, _) in _NAMED.items() if spec.scheduler_family in s.families)
    return sorted(fitting, key=lambda name: (name not in SCHEDULERS, name))


@dataclass(frozen=True)
class FileKind:
    """What a single file is, from the names of its tensors; the first kind that fits in FILE_KINDS is it.

    `name` is the `single_file_config` of the types that load it, or "" where none does.
    """

    title: str
    name: str = ""
    marks: tuple[str, ...] = ()  # names begin with it, after the denoiser's usual prefix or without
    parts: tuple[str, ...] = ()  # are in a name
    only: tuple[str, ...] = ()  # all names begin with one of them
    hint: str = ""


FILE_KINDS = (
    FileKind("a LoRA", parts=(".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1", ".lokr_w1"),
             hint="--lora takes it"),
    FileKind("a ControlNet", marks=("control_model.", "controlnet_cond_embedding.", "controlnet_x_embedder.",
             "controlnet_blocks.", "controlnet_down_blocks."),
             hint="--control_net takes its diffusers folder"),
    FileKind("an IP-Adapter", marks=("image_proj.", "ip_adapter."), hint="--ip_adapter takes it"),
    FileKind("a motion module", parts=("motion_modules.",), hint="--motion_module takes it, with --type=ad"),
    FileKind("a VAE", only=("encoder.conv", "encoder.down", "encoder.mid", "encoder.norm", "decoder.",
             "quant_conv.", "post_quant_conv.", "first_stage_model.", "vae."), hint="--vae takes it"),
    FileKind("a text encoder", only=("text_model.", "text_projection", "logit_scale", "shared.", "encoder.",
             "embeddings.", "final_layer_norm.", "scaled_fp8", "spiece_model", "text_encoders.",
             "cond_stage_model.", "conditioner."), hint="it is a part of a checkpoint"),
    FileKind("Stable Video Diffusion", parts=("time_stack.", "time_mixer."),
             hint="type svd loads from a diffusers folder"),
    FileKind("the Stable Diffusion x4 upscaler", marks=("label_emb.weight", "low_res_scheduler"),
             hint="type sdup loads from a diffusers folder"),
    FileKind("the SDXL refiner", marks=("conditioner.embedders.0.model.",), hint="no type here loads it"),
    FileKind("Stable Diffusion XL", "sdxl", ("label_emb.0.0.weight", "add_embedding.linear_1.weight")),
    FileKind("Chroma", marks=("distilled_guidance_layer.",), hint="no type here loads it"),
    FileKind("FLUX.2", marks=("double_stream_modulation_img.", "single_stream_modulation."),
             hint="no type here loads it"),
    FileKind("FLUX.1", "flux", ("double_blocks.0.img_attn.", "single_transformer_blocks.0.")),
    FileKind("Stable Diffusion 3", "sd3", ("joint_blocks.0.", "transformer_blocks.0.attn.add_q_proj.")),
    FileKind("Stable Diffusion 2", "sd2", ("cond_stage_model.model.",)),
    FileKind("Stable Diffusion 1", "sd1", ("cond_stage_model.transformer.",)),
)  # fmt: skip

INPUTS: dict[str, tuple[str, ...]] = {
    "unet": ("input_blocks.0.0.weight", "conv_in.weight"),
    "transformer": ("img_in.weight", "x_embedder.weight", "x_embedder.proj.weight", "pos_embed.proj.weight"),
}
"""The denoiser's first weights, in its authors' and in diffusers' naming: [.., input channels, ..]."""

ENCODERS: dict[str, dict[str, str]] = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sd3": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    },
    "flux": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
    },
}
"""How single files name the tensors of text encoders, by `single_file_config`."""
VAE_PREFIXES = ("first_stage_model.", "vae.")

OTHER_PIPELINES: dict[str, str] = {
    "StableDiffusionInstructPix2PixPipeline": "InstructPix2Pix",
    "StableDiffusionXLInstructPix2PixPipeline": "InstructPix2Pix for SDXL",
    "StableDiffusionDepth2ImgPipeline": "Stable Diffusion 2 depth",
    "StableDiffusionImageVariationPipeline": "Stable Diffusion image variations",
    "StableDiffusionLatentUpscalePipeline": "the latent x2 upscaler",
    "FluxFillPipeline": "FLUX.1 Fill",
    "FluxControlPipeline": "FLUX.1 Canny or Depth",
    "Flux2Pipeline": "FLUX.2",
    "ChromaPipeline": "Chroma",
}
"""Classes in model_index.json that share components with a type here and mean another model."""

EDM_CLASSES = {
    "EulerDiscreteScheduler": "EDMEulerScheduler",
    "DPMSolverMultistepScheduler": "EDMDPMSolverMultistepScheduler",
}
"""Schedulers that have a form for models trained with EDM's sigmas, such as Playground v2.5."""
