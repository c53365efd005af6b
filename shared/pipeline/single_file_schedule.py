"""Which noise schedule a single file was trained with: from its marks, its metadata, the files beside it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from shared.launch.file_header import DENOISER, PREFIXES, Header
from shared.models import ModelSpec

log = logging.getLogger("host")

V = {"prediction_type": "v_prediction"}
EPSILON = {"prediction_type": "epsilon"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
PREDICTIONS = {"v": V, "v_prediction": V, "v-prediction": V, "epsilon": EPSILON, "eps": EPSILON}
PLAYGROUND = {
    "_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5,
    "rho": 7.0, "solver_order": 2, "prediction_type": "epsilon", "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint", "final_sigmas_type": "zero", "lower_order_final": True,
    "euler_at_final": False,
}  # fmt: skip
SD2_BASE_STEP = 875000  # of the 512 model; diffusers goes by it, too
SD2_NORM = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
SD2_V_SPREAD = 0.09  # of that bias, by which ComfyUI distinguishes the 768 model from the 512 one


def schedule_of(header: Header, spec: ModelSpec, folder: Path, shipped: bool) -> dict[str, Any]:
    """The scheduler's configuration, with its class, for a single file.

    Args:
        folder: with the configuration of the scheduler.
        shipped: whether that is the type's, and not one beside the file.
    """
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    found = _marked(header, spec)
    if (
        shipped
        and spec.single_file_predicts == "noise_or_velocity"
        and "prediction_type" not in _merged(found)
    ):
        found += _guessed(header)
    if not found:
        return config
    log.info("%s: recognised %s", header.file.name, "; ".join(why for _, why in found))
    settings = _merged(found)
    if "_class_name" in settings:
        return settings
    if settings.get("rescale_betas_zero_snr") and config["_class_name"] == "PNDMScheduler":
        # It has no betas of zero SNR; DDIM is what it was made from.
        config = config | {"_class_name": "DDIMScheduler", "clip_sample": False}
    return config | settings


def _merged(found: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    return {key: value for settings, _ in reversed(found) for key, value in settings.items()}


def _marked(header: Header, spec: ModelSpec) -> list[tuple[dict[str, Any], str]]:
    """What the file, or a YAML file of its name, says explicitly; the first entry takes precedence."""
    if spec.single_file_settings == "guidance_embeds" and not has_guidance(header):
        schnell = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "shift": 1.0,
            "use_dynamic_shifting": False,
        }
        return [(schnell, "FLUX.1 schnell (no guidance embedding)")]
    if spec.scheduler_family != "discrete":
        return []
    found: list[tuple[dict[str, Any], str]] = []
    if {"edm_mean", "edm_std"} <= set(header.shapes):
        return [(PLAYGROUND, "Playground v2.5's EDM sigmas and latents (keys edm_mean, edm_std)")]
    if "v_pred" in header.shapes:
        found.append((V, "v-prediction (key v_pred)"))
    if "ztsnr" in header.shapes:
        found.append((ZERO_SNR, "zero terminal SNR (key ztsnr)"))
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        value = header.metadata.get(key, "").lower()
        if value in PREDICTIONS:
            found.append((PREDICTIONS[value], f"{PREDICTIONS[value]['prediction_type']} (metadata {key})"))
    config = header.file.with_suffix(".yaml")
    if config.is_file():
        said = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", config.read_text(errors="replace"), re.M)
        if said and said[1] in PREDICTIONS:
            found.append((PREDICTIONS[said[1]], f"{PREDICTIONS[said[1]]['prediction_type']} ({config.name})"))
    return found


def has_guidance(header: Header) -> bool:
    """Whether FLUX takes a guidance scale: dev does, schnell does not."""
    names = ("guidance_in.", "time_text_embed.guidance_embedder.")
    return header.has(*(prefix + name for prefix in PREFIXES for name in names))


def _guessed(header: Header) -> list[tuple[dict[str, Any], str]]:
    """Stable Diffusion 2 of 512 predicts noise, that of 768 velocity; no key and no shape says which."""
    shape = header.shape("input_blocks.0.0.weight")
    if shape is not None and shape[1] == 9:
        return [(EPSILON, "epsilon (an inpainting model)")]
    if "global_step" in header.shapes:
        step = int(_tensor(header, "global_step").reshape(-1)[0])
        if step == SD2_BASE_STEP:
            return [(EPSILON, f"epsilon (global_step {step}, that of 2-base)")]
    for name in (DENOISER + SD2_NORM, SD2_NORM):
        if name in header.shapes:
            spread = float(_tensor(header, name).float().std(unbiased=False))
            guess = V if spread > SD2_V_SPREAD else EPSILON
            return [(guess, f"{guess['prediction_type']} (the spread of {SD2_NORM}, {spread:.3f}; {_SAY})")]
    resolution = header.metadata.get("modelspec.resolution", "")
    words = re.split(r"[^a-z0-9]+", header.file.stem.lower()) + re.split(r"\D+", resolution)
    if {"512", "base", "eps", "epsilon"} & set(words) and not {"768", "v"} & set(words):
        return [(EPSILON, f"epsilon (the file's name or resolution; {_SAY})")]
    return [(V, f"v_prediction (as Stable Diffusion 2 of 768; {_SAY})")]


_SAY = """to say it: --scheduler='{"scheduler": "ddim", "prediction_type": "epsilon"}'"""


def _tensor(header: Header, name: str) -> torch.Tensor:
    with safe_open(header.file, framework="pt") as opened:
        return opened.get_tensor(name)
