"""The choices of the dropdowns: model files and folders that ComfyUI's `folder_paths` finds."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

TYPES = [
    "sdxl",
    "sd1",
    "sd2",
    "sd3",
    "ad",
    "svd",
    "sdup",
    "flux",
    "kontext",
    "flux2",
    "chroma",
    "hv15",
    "hy",
    "ltx2",
    "pixa",
    "pixs",
    "qwen",
    "qwenedit",
    "wan",
    "wani2v",
    "zimage",
]
BACKENDS = ["asyncdiff", "distrifuser", "xdit"]
VARIANTS = ["default", "fp16", "bf16", "fp32"]
QUANTIZATIONS = ["float8", "int8", "float8_weight", "int8_weight", "int4", "int2"]
_SIGMAS = ["dpm_2", "dpm_2_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "euler", "heun", "lms", "unipc"]
_PLAIN = sorted([*_SIGMAS, "ddim", "ddpm", "euler_a", "pndm"])
SCHEDULERS = [
    *sorted([*_PLAIN, "lcm", "tcd"]),
    *("flow_euler", "flow_heun", "flow_lcm", "flow_dpmpp_2m", "flow_unipc"),
    *(f"{kind}_{name}" for kind in ("k", "exponential", "beta") for name in (*_SIGMAS, "flow_euler")),
    *(f"{name}_trailing" for name in _PLAIN if name != "dpmpp_sde"),
]
_DEPTH = 3  # how deep below a model folder a diffusers folder may be

# Folders of other node packs, by the names under which those register them.
for _kind in ("ipadapter", "animatediff_models"):
    folder_paths.add_model_folder_path(_kind, os.path.join(folder_paths.models_dir, _kind))


def folders(kind: str, marker: str) -> dict[str, str]:
    """Folders below ComfyUI's folders of a kind that hold the file `marker`: shown name -> path."""
    found: dict[str, str] = {}
    for root in folder_paths.get_folder_paths(kind):
        for folder, below, files in os.walk(root, followlinks=True):
            relative = os.path.relpath(folder, root)
            if marker in files:
                found.setdefault(f"{relative}/", folder)
                below.clear()
            elif relative != "." and relative.count(os.sep) + 1 >= _DEPTH:
                below.clear()
    return dict(sorted(found.items()))


def files(kind: str, *suffixes: str) -> dict[str, str]:
    """Files of a kind: shown name -> path."""
    names = [n for n in folder_paths.get_filename_list(kind) if not suffixes or n.endswith(suffixes)]
    return {name: folder_paths.get_full_path_or_raise(kind, name) for name in names}


def checkpoints() -> dict[str, str]:
    """Diffusers folders and single files."""
    return folders("diffusers", "model_index.json") | files("checkpoints", ".safetensors")


def loras() -> dict[str, str]:
    return files("loras")


def control_nets() -> dict[str, str]:
    return folders("controlnet", "config.json")


def ip_adapters() -> dict[str, str]:
    return files("ipadapter", ".safetensors", ".bin")


def motion_modules() -> dict[str, str]:
    return folders("animatediff_models", "config.json") | files("animatediff_models")


def project() -> str:
    """The project's folder, where this pack is a link into it; MULTIGPU_DIFFUSION names it otherwise."""
    named = os.environ.get("MULTIGPU_DIFFUSION", "")
    around = Path(__file__).resolve().parents[2]
    return named or (str(around) if (around / "asyncdiff_host.py").is_file() else "")


def chosen(found: dict[str, str], name: str, what: str) -> str:
    """The path of a dropdown's entry. Raises ValueError."""
    if name not in found:
        raise ValueError(f"{what}: no {name!r}; available: {', '.join(found) or 'none'}")
    return found[name]
