"""The registry: all that is known of a model type, as data.

Nothing else in the code asks for a type by name. A family of types is one file here, named in FAMILIES.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from shared.models import flux, hunyuan, pixart, sd, sd3
from shared.models.files import INPUTS, PARTS, VAE_PREFIXES, FileKind
from shared.models.schedulers import (
    EDM_CLASSES,
    SCHEDULERS,
    VARIANTS,
    SchedulerSpec,
    scheduler_named,
    schedulers_for,
    with_variant,
)
from shared.models.spec import Family, ModelSpec

__all__ = [
    "EDM_CLASSES",
    "FAMILIES",
    "FEATURES",
    "FILE_KINDS",
    "INPUTS",
    "MODELS",
    "OTHER_PIPELINES",
    "SCHEDULERS",
    "VAE_PREFIXES",
    "VARIANTS",
    "Family",
    "FileKind",
    "ModelSpec",
    "SchedulerSpec",
    "scheduler_named",
    "schedulers_for",
    "with_variant",
]

# A file that fits several kinds is of the family that comes first; SD3's marks are the widest.
FAMILIES: tuple[Family, ...] = (sd.FAMILY, flux.FAMILY, sd3.FAMILY, hunyuan.FAMILY, pixart.FAMILY)


def _collected(rows: tuple[ModelSpec, ...]) -> dict[str, ModelSpec]:
    """By name; a reason to refuse a flag tells the types that have what the others lack."""

    def told(flag: str, reason: str) -> str:
        return reason.format(types=", ".join(sorted(row.name for row in rows if flag not in row.refuses)))

    return {
        row.name: replace(
            row, refuses=MappingProxyType({flag: told(flag, why) for flag, why in row.refuses.items()})
        )
        for row in rows
    }


MODELS = _collected(tuple(row for family in FAMILIES for row in family.rows))

FILE_KINDS: tuple[FileKind, ...] = (*PARTS, *(kind for family in FAMILIES for kind in family.files))

OTHER_PIPELINES = {name: what for family in FAMILIES for name, what in family.other_pipelines.items()}
"""Classes in model_index.json that share components with a type here and mean another model."""


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
