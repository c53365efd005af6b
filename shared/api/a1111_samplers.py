"""A1111's names for samplers and schedulers, and ours. Imports no torch."""

from __future__ import annotations

from typing import Any

from shared.api.faults import FieldProblem
from shared.launch.flags import HostConfig
from shared.launch.wording import shown
from shared.models import schedulers_for, with_variant

AUTOMATIC = "Automatic"
# A1111's names -> our schedulers; the first that the type supports is used.
SAMPLERS: dict[str, tuple[str, ...]] = {
    "DPM++ 2M": ("dpmpp_2m", "flow_dpmpp_2m"),
    "DPM++ SDE": ("dpmpp_sde",),
    "DPM++ 2M SDE": ("dpmpp_2m_sde",),
    "Euler": ("euler", "flow_euler"),
    "Euler a": ("euler_a",),
    "Heun": ("heun", "flow_heun"),
    "LMS": ("lms",),
    "DPM2": ("dpm_2",),
    "DPM2 a": ("dpm_2_a",),
    "DDIM": ("ddim",),
    "DDPM": ("ddpm",),
    "PLMS": ("pndm",),
    "UniPC": ("unipc", "flow_unipc"),
    "LCM": ("lcm", "flow_lcm"),
    "TCD": ("tcd",),
}
# A1111's names -> the variants of our schedulers.
SCHEDULES = {
    "Karras": "k_",
    "Exponential": "exponential_",
    "SGM Uniform": "_trailing",
    "Simple": "_trailing",
    "Beta": "beta_",
}


def samplers_for(config: HostConfig) -> dict[str, str]:
    """A1111's sampler names -> scheduler names of the type."""
    have = schedulers_for(config.spec)
    found = {name: next((s for s in ours if s in have), None) for name, ours in SAMPLERS.items()}
    return {name: ours for name, ours in found.items() if ours is not None}


def sampler_labels(name: str) -> tuple[str, str | None]:
    """A1111's sampler and scheduler for a name of ours; the name itself where A1111 has none for it."""
    for theirs, ours in SAMPLERS.items():
        for short in ours:
            if name == short:
                return theirs, None
            for label, variant in SCHEDULES.items():
                if with_variant(short, variant) == name:
                    return theirs, label
    return name, None


def taken_variant(ours: str, variant: str) -> str | None:
    """Our name for a sampler with one of A1111's schedulers; None where there is no such pair."""
    if ours.startswith("flow_") and variant == "_trailing":
        return ours  # flow matching has this spacing already
    return with_variant(ours, variant)


def scheduler_for(asked: dict[str, Any], samplers: dict[str, str]) -> tuple[str | None, FieldProblem | None]:
    """Sampler and scheduler of a request -> our scheduler's name, None for the checkpoint's own."""
    sampler = asked.get("sampler_name") or asked.get("sampler_index") or AUTOMATIC
    noise = str(asked.get("scheduler") or AUTOMATIC).lower().replace("_", " ")
    known = {name.lower(): ours for name, ours in samplers.items()} | {
        ours: ours for ours in samplers.values()
    }
    labels = {label.lower(): label for label in SCHEDULES}
    wanted = str(sampler).lower()
    for label in labels:  # as in older versions: "DPM++ 2M Karras"
        if wanted.endswith(f" {label}"):
            wanted, noise = wanted.removesuffix(f" {label}"), label
    if noise not in (AUTOMATIC.lower(), "normal", *labels):
        allowed = ", ".join((AUTOMATIC, *SCHEDULES))
        return None, FieldProblem("scheduler", f"must be one of {allowed}; got {shown(asked['scheduler'])}")
    if wanted == AUTOMATIC.lower():
        if noise in labels:
            return None, FieldProblem("scheduler", f"{labels[noise]} needs a sampler_name")
        return None, None
    ours = known.get(wanted)
    if ours is None:
        return None, FieldProblem(
            "sampler_name", f"must be one of {', '.join(samplers)}; got {shown(sampler)}"
        )
    if noise not in labels:
        return ours, None
    variant = SCHEDULES[labels[noise]]
    if name := taken_variant(ours, variant):
        return name, None
    fitting = [theirs for theirs, ours in samplers.items() if taken_variant(ours, variant)]
    text = f"{sampler} does not support {labels[noise]}; samplers that do: {', '.join(fitting) or 'none'}"
    return None, FieldProblem("scheduler", text)
