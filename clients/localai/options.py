"""Options of a model's YAML: from LoadModel's options to the host to start or to call, and its defaults."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Options that are not flags of a host.
OWN = ("project", "backend", "ranks", "python", "host_url", "api_key", "strength")
BACKENDS = ("asyncdiff", "distrifuser", "xdit")
# `type` where the options do not say it: what LocalAI calls the pipeline.
PIPELINES = {
    "StableDiffusionPipeline": "sd1",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionUpscalePipeline": "sdup",
    "StableVideoDiffusionPipeline": "svd",
    "AnimateDiffPipeline": "ad",
    "FluxPipeline": "flux",
    "FluxKontextPipeline": "kontext",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2",
    "ChromaPipeline": "chroma",
    "HunyuanDiTPipeline": "hy",
    "HunyuanVideo15Pipeline": "hv15",
    "HunyuanVideo15ImageToVideoPipeline": "hv15",
    "LTX2ImageToVideoPipeline": "ltx2",
    "LTX2Pipeline": "ltx2",
    "PixArtAlphaPipeline": "pixa",
    "PixArtSigmaPipeline": "pixs",
    "QwenImagePipeline": "qwen",
    "QwenImageEditPipeline": "qwenedit",
    "QwenImageEditPlusPipeline": "qwenedit",
    "WanPipeline": "wan",
    "WanImageToVideoPipeline": "wani2v",
    "ZImagePipeline": "zimage",
}
VIDEO_TYPES = ("ad", "svd", "wan", "wani2v", "hv15", "ltx2")
# The same, by what LocalAI calls them where they start from a picture.
PIPELINES |= {
    name.replace("Pipeline", f"{end}Pipeline"): PIPELINES[name]
    for name in (
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "FluxKontextPipeline",
    )
    for end in ("Img2Img", "Inpaint")
}
IMG2IMG_WITH_CONTROL = "img2img: not supported with a ControlNet, as `src` is the control image then"
STRENGTH_WITH_CONTROL = "strength: not supported with a ControlNet, as `src` is the control image then"


class OptionError(ValueError):
    """A model that cannot be loaded as its YAML says; names the option."""


@dataclass(frozen=True)
class LoadPlan:
    """One model.

    Attributes:
        host_url: a running host to ask; empty where one is to be started.
        flags: of the host to start.
        defaults: request fields of every picture: cfg, clip_skip.
        strength: of the pictures that start from another one, 0 to 1; None: the host's own.
        img2img: whether `src` is to be what a picture starts from.
    """

    host_url: str = ""
    api_key: str = ""
    project: str = ""
    backend: str = "asyncdiff"
    ranks: int = 1
    python: str = ""
    flags: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    strength: float | None = None
    img2img: bool = False


def plan(request: Any) -> LoadPlan:
    """From a ModelOptions message. Raises OptionError."""
    given = _pairs(request.Options)
    own = {name: given.pop(name) for name in OWN if name in given}
    defaults: dict[str, Any] = {}
    if request.CFGScale:
        defaults["cfg"] = round(request.CFGScale, 6)
    if request.CLIPSkip:
        defaults["clip_skip"] = request.CLIPSkip
    controlled = bool(request.ControlNet or "control_net" in given)
    if request.IMG2IMG and controlled:
        raise OptionError(IMG2IMG_WITH_CONTROL)
    strength = _strength(own, controlled)
    if own.get("host_url"):
        extra = sorted([*given, *(set(own) - {"host_url", "api_key", "strength"})])
        if extra or request.LoraAdapters or request.ControlNet or request.SchedulerType or request.LowVRAM:
            named = ", ".join(extra) or "LoRA, ControlNet, scheduler and low_vram"
            raise OptionError(f"host_url: the host is running already and cannot change {named}")
        api_key = own.get("api_key", "")
        return LoadPlan(
            host_url=own["host_url"],
            api_key=api_key,
            defaults=defaults,
            strength=strength,
            img2img=request.IMG2IMG,
        )
    backend = own.get("backend", "asyncdiff")
    if backend not in BACKENDS:
        raise OptionError(f"backend: must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if "api_key" in own:
        given["api_key"] = own["api_key"]
    flags = _flags(request, given)
    return LoadPlan(
        project=own.get("project") or _project(backend),
        backend=backend,
        ranks=_ranks(own, request.TensorParallelSize),
        python=own.get("python", ""),
        flags=tuple(f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items()),
        defaults=defaults,
        strength=strength,
        img2img=request.IMG2IMG,
    )


def _strength(own: dict[str, Any], controlled: bool) -> float | None:
    if "strength" not in own:
        return None
    if controlled:
        raise OptionError(STRENGTH_WITH_CONTROL)
    try:
        strength = float(own["strength"])
    except ValueError:
        strength = 0.0
    if not 0 < strength <= 1:
        raise OptionError(f"strength: must be a number above 0 and at most 1; got {own['strength']!r}")
    return strength


def _pairs(options: Any) -> dict[str, Any]:
    """`key:value`; `key` and `key:true` are switches. Raises OptionError for a key given twice."""
    found: dict[str, Any] = {}
    for option in options:
        key, colon, value = option.partition(":")
        key = key.strip().lstrip("-")
        if key in found:
            raise OptionError(f"options: {key} is given twice")
        found[key] = value.strip() if colon and value.strip().lower() != "true" else None
        if value.strip().lower() == "false":
            del found[key]
    for key in OWN:
        if key in found and not found[key]:
            raise OptionError(f"options: {key} needs a value, as in {key}:...")
    return found


def _ranks(own: dict[str, Any], tensor_parallel_size: int) -> int:
    text = own.get("ranks") or str(tensor_parallel_size or 1)
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise OptionError(f"ranks: must be a whole number from 1 to 64; got {text!r}")
    return int(text)


def _flags(request: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The host's flags by name, None for a switch; what the options say wins over LocalAI's own fields."""
    flags: dict[str, Any] = {}
    if request.PipelineType:
        if request.PipelineType not in PIPELINES and "type" not in given:
            known = ", ".join(PIPELINES)
            raise OptionError(
                f"pipeline_type: must be one of {known}, or give the option type:...; "
                f"got {request.PipelineType!r}"
            )
        flags["type"] = PIPELINES.get(request.PipelineType)
    flags["checkpoint"] = _checkpoint(request)
    if request.SchedulerType:
        flags["scheduler"] = request.SchedulerType
    if request.CUDA:
        flags["device"] = "cuda"
    if request.LowVRAM:
        flags["enable_model_cpu_offload"] = None
    if request.ControlNet:
        flags["control_net"] = _beside(request, request.ControlNet)
    if request.LoraAdapters:
        scales = list(request.LoraScales) or [1.0] * len(request.LoraAdapters)
        if len(scales) != len(request.LoraAdapters):
            raise OptionError(
                f"lora_scales: must be one for each of {len(request.LoraAdapters)} lora_adapters; "
                f"got {len(scales)}"
            )
        pairs = zip(request.LoraAdapters, scales, strict=True)
        flags["lora"] = json.dumps({_beside(request, path): round(scale, 6) for path, scale in pairs})
    flags |= given
    if not flags.get("type"):
        raise OptionError("type: required, as the option type:sdxl or as diffusers.pipeline_type")
    return flags


def _checkpoint(request: Any) -> str:
    if request.ModelFile and Path(request.ModelFile).exists():
        return request.ModelFile
    return _beside(request, request.Model)


def _beside(request: Any, path: str) -> str:
    """A path of the YAML: as it is, or in LocalAI's models folder."""
    inside = Path(request.ModelPath) / path
    return str(inside) if request.ModelPath and inside.exists() else path


def _project(backend: str) -> str:
    around = Path(__file__).resolve().parents[2]
    found = os.environ.get("MULTIGPU_DIFFUSION") or str(around)
    if not (Path(found) / f"{backend}_host.py").is_file():
        raise OptionError(f"project: required, the folder of {backend}_host.py, as the option project:/path")
    return found
