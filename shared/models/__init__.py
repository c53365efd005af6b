"""The registry: everything about a model type, as data.

No other code asks for a type by name. A family of types is one file here, listed in FAMILIES.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from shared.models import (
    chroma,
    flux,
    flux2,
    hunyuan,
    hunyuan_video,
    kontext,
    ltx2,
    pixart,
    qwen,
    sd,
    sd3,
    wan,
    zimage,
)
from shared.models.caches import CACHES, Cache, CacheSettings, LeftOut, Modulated, Rule
from shared.models.files import INPUTS, PARTS, VAE_PREFIXES, FileForm, FileKind, FilePart
from shared.models.schedulers import (
    EDM_CLASSES,
    ONE_NOISE,
    SCHEDULERS,
    VARIANTS,
    SchedulerSpec,
    scheduler_named,
    schedulers_for,
    with_variant,
)
from shared.models.spec import Chat, Family, ModelSpec, Start
from shared.models.tokens import Beside, Padding, Section, Site, StagePlan, Stream, TokenPlan

__all__ = [
    "CACHES",
    "EDM_CLASSES",
    "FAMILIES",
    "FEATURES",
    "FILE_KINDS",
    "INPUTS",
    "MODELS",
    "ONE_NOISE",
    "OTHER_PIPELINES",
    "SCHEDULERS",
    "TOKEN_PLANS",
    "VAE_PREFIXES",
    "VARIANTS",
    "Beside",
    "Cache",
    "CacheSettings",
    "Chat",
    "Family",
    "FileForm",
    "FileKind",
    "FilePart",
    "LeftOut",
    "ModelSpec",
    "Modulated",
    "Padding",
    "Rule",
    "SchedulerSpec",
    "Section",
    "Site",
    "StagePlan",
    "Start",
    "Stream",
    "TokenPlan",
    "scheduler_named",
    "schedulers_for",
    "token_plan",
    "with_variant",
]

# A file that matches several kinds belongs to the first family; SD3's marks match the most.
FAMILIES: tuple[Family, ...] = (
    sd.FAMILY,
    chroma.FAMILY,
    flux2.FAMILY,  # whose files have FLUX's marks too
    flux.FAMILY,
    kontext.FAMILY,  # behind flux, whose plan its transformer has
    qwen.FAMILY,  # whose files have SD3's marks too
    sd3.FAMILY,
    hunyuan.FAMILY,
    hunyuan_video.FAMILY,
    ltx2.FAMILY,
    pixart.FAMILY,
    wan.FAMILY,
    zimage.FAMILY,
)


def _collected(rows: tuple[ModelSpec, ...]) -> dict[str, ModelSpec]:
    """The rows by name; {types} in a reason becomes the types that do not refuse the flag."""

    def with_types(flag: str, reason: str) -> str:
        return reason.format(types=", ".join(sorted(row.name for row in rows if flag not in row.refuses)))

    refining = ", ".join(sorted(row.name for row in rows if row.refiner_pipeline))
    no_refiner = {"refiner": f"it has no refiner; types with one: {refining}"}
    return {
        row.name: replace(
            row,
            refuses=MappingProxyType(
                {flag: with_types(flag, why) for flag, why in row.refuses.items()}
                | ({} if row.refiner_pipeline else no_refiner)
            ),
        )
        for row in rows
    }


MODELS = _collected(tuple(row for family in FAMILIES for row in family.rows))

TOKEN_PLANS: dict[str, TokenPlan] = {
    plan.name: plan
    for spec in reversed(MODELS.values())
    if spec.tokens
    for plan in (spec.tokens, spec.tokens.control_net)
    if plan
}
"""By class name, of transformers and of their ControlNets: that of the first type with the class."""


def token_plan(class_name: str) -> TokenPlan:
    """The plan of a class of transformers. Raises ValueError, which names the classes with one."""
    if class_name not in TOKEN_PLANS:
        raise ValueError(
            f"{class_name} has no token plan; classes with one: {', '.join(sorted(TOKEN_PLANS))}"
        )
    return TOKEN_PLANS[class_name]


FILE_KINDS: tuple[FileKind, ...] = (*PARTS, *(kind for family in FAMILIES for kind in family.files))

OTHER_PIPELINES = {name: what for family in FAMILIES for name, what in family.other_pipelines.items()}
"""Classes in model_index.json that share components with a type here but are another model."""


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
    "embeddings_dir": "textual inversion",
    "refiner": "refiner",
    "motion_module": "motion module",
    "motion_adapter": "motion adapter",
    "motion_adapter_lora": "motion LoRA",
}
