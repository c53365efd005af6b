"""Schedulers by short name: the diffusers class, its settings, and which types may use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from shared.models.spec import ModelSpec


@dataclass(frozen=True)
class SchedulerSpec:
    """A scheduler's short name: the diffusers class and its settings."""

    name: str
    cls: str
    settings: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    families: frozenset[str] = frozenset({"discrete"})
    sigmas: bool = False  # whether it takes Karras, exponential and beta sigmas
    trailing: bool = False  # whether its timesteps may be spaced from the end
    one_noise: bool = False  # whether it draws one noise for all pictures of a call


def _scheduler(
    name: str,
    cls: str,
    *families: str,
    sigmas: bool = False,
    trailing: bool = False,
    one_noise: bool = False,
    **settings: object,
) -> SchedulerSpec:
    of = frozenset(families)
    return SchedulerSpec(name, cls, MappingProxyType(settings), of, sigmas, trailing, one_noise)


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
        # With trailing timesteps its last step leaves torchsde's noise interval: the noise differs each time.
        _scheduler("dpmpp_sde", "DPMSolverSDEScheduler", "discrete", sigmas=True, one_noise=True),
        _scheduler("euler", "EulerDiscreteScheduler", "discrete", "video", sigmas=True, trailing=True),
        _scheduler("euler_a", "EulerAncestralDiscreteScheduler", "discrete", "video", trailing=True),
        _scheduler("heun", "HeunDiscreteScheduler", "discrete", sigmas=True, trailing=True),
        _scheduler("lcm", "LCMScheduler", "discrete"),
        _scheduler("lms", "LMSDiscreteScheduler", "discrete", sigmas=True, trailing=True),
        _scheduler("pndm", "PNDMScheduler", "discrete", trailing=True),
        _scheduler("tcd", "TCDScheduler", "discrete"),
        _scheduler("unipc", "UniPCMultistepScheduler", "discrete", sigmas=True, trailing=True),
        _scheduler(
            "flow_euler", "FlowMatchEulerDiscreteScheduler", "flow", "flow_flux", "flow_sigmas", sigmas=True
        ),
        _scheduler("flow_heun", "FlowMatchHeunDiscreteScheduler", "flow"),
        _scheduler("flow_lcm", "FlowMatchLCMScheduler", "flow_flux", "flow_sigmas"),
        _scheduler("flow_dpmpp_2m", "DPMSolverMultistepScheduler", "flow_flux", "flow_video", **_FLOW),
        _scheduler("flow_unipc", "UniPCMultistepScheduler", "flow_flux", "flow_video", **_FLOW),
    )
}


_NO_SIGMAS = {f"use_{kind}_sigmas": False for kind in ("karras", "exponential", "beta")}
VARIANTS: dict[str, Mapping[str, object]] = {
    "k_": _NO_SIGMAS | {"use_karras_sigmas": True},
    "exponential_": _NO_SIGMAS | {"use_exponential_sigmas": True},
    "beta_": _NO_SIGMAS | {"use_beta_sigmas": True},
    "_trailing": {"timestep_spacing": "trailing"},
}
"""Prefixes and suffixes of short names, and their settings."""


def with_variant(name: str, variant: str) -> str | None:
    """The short name of a scheduler's variant, or None if the scheduler does not support it."""
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
    """Short names that the type supports, sorted, then those of variants."""
    fitting = (name for name, (s, _) in _NAMED.items() if spec.scheduler_family in s.families)
    return sorted(fitting, key=lambda name: (name not in SCHEDULERS, name))


ONE_NOISE = frozenset(entry.cls for entry in SCHEDULERS.values() if entry.one_noise)

EDM_CLASSES = {
    "EulerDiscreteScheduler": "EDMEulerScheduler",
    "DPMSolverMultistepScheduler": "EDMDPMSolverMultistepScheduler",
}
"""Schedulers with a variant for models trained with EDM's sigmas, such as Playground v2.5."""
