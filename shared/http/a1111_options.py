"""A1111's options that change the picture: which values mean nothing, and ControlNet's part of a request.

Whatever is not served and means something is refused by name. Keys outside A1111's schema are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.api.requests import FieldProblem
from shared.launch.flags import HostConfig
from shared.launch.wording import shown

# Option -> the values that mean nothing, beside those of `_is_nothing`.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "enable_hr": (),
    "firstphase_width": (),
    "firstphase_height": (),
    "restore_faces": (),
    "tiling": (),
    "styles": (),
    "script_name": (),
    "refiner_checkpoint": (),
    "subseed_strength": (),
    "seed_resize_from_w": (-1,),
    "seed_resize_from_h": (-1,),
    "s_churn": (),
    "s_min_uncond": (),
    "s_noise": (1,),
    "mask": (),
    "latent_mask": (),
}
OF_IMAGES: dict[str, tuple[Any, ...]] = {"resize_mode": (), "initial_noise_multiplier": (1,)}
OVERRIDES: dict[str, tuple[Any, ...]] = {
    "eta_noise_seed_delta": (),
    "eta_ancestral": (1,),
    "eta_ddim": (),
    "s_churn": (),
    "s_min_uncond": (),
    "s_noise": (1,),
    "sigma_min": (),
    "sigma_max": (),
    "rho": (),
    "token_merging_ratio": (),
    "token_merging_ratio_hr": (),
    "token_merging_ratio_img2img": (),
    "face_restoration": (),
    "tiling": (),
    "sd_hypernetwork": (),
    "sd_lora": (),
    "initial_noise_multiplier": (1,),
    "always_discard_next_to_last_sigma": (),
    "sgm_noise_multiplier": (),
    "skip_early_cond": (),
}
# A ControlNet unit's fields; the preprocessor's own do nothing without one.
_UNIT: dict[str, tuple[Any, ...]] = {
    "module": (),
    "guidance_start": (),
    "guidance_end": (1,),
    "control_mode": ("Balanced",),
    "resize_mode": (1, "Just Resize", "Crop and Resize"),
    "mask": (),
    "mask_image": (),
    "effective_region_mask": (),
}
_CONTROL_NET = "controlnet"
_NOTHING = ("none", "automatic")


def _is_nothing(value: Any, more: tuple[Any, ...] = ()) -> bool:
    return not value or value in more or (isinstance(value, str) and value.lower() in _NOTHING)


def _refused(values: dict[str, Any], table: dict[str, tuple[Any, ...]], where: str) -> Iterator[FieldProblem]:
    for key, more in table.items():
        if not _is_nothing(value := values.get(key), more):
            yield FieldProblem(f"{where}{key}", f"is not served, leave it out; got {shown(value)}")


def _args(script: Any) -> list[Any]:
    """A script's arguments; none where they switch it off."""
    args = script.get("args") if isinstance(script, dict) else script
    args = list(args.values()) if isinstance(args, dict) else args
    if not isinstance(args, list):
        return [args] if args else []
    if args and args[0] is False:
        return []
    if all(isinstance(arg, dict | bool) for arg in args):  # units; ADetailer puts two switches before its own
        return [arg for arg in args if isinstance(arg, dict) and _is_on(arg)]
    return args


def _is_on(unit: dict[str, Any]) -> bool:
    if "ad_model" in unit and _is_nothing(unit["ad_model"]):
        return False
    return bool(unit) and not any(unit.get(key) is False for key in ("enabled", "enable", "is_enabled"))


def check_options(
    asked: dict[str, Any], config: HostConfig, with_image: bool
) -> tuple[dict[str, Any], list[FieldProblem]]:
    """What A1111's options add to a body of POST /generate, and the faults of those that are not served."""
    problems = list(_refused(asked, OPTIONS | (OF_IMAGES if with_image else {}), ""))
    sampler = str(asked.get("sampler_name") or asked.get("sampler_index") or "").lower()
    ancestral = sampler.split(" karras")[0].endswith((" a", "_a", "sde"))
    problems += _refused(asked, {"eta": (1,) if ancestral else ()}, "")
    overrides = asked.get("override_settings")
    if isinstance(overrides, dict):
        vae = (config.vae, Path(config.vae).name) if config.vae else ()
        problems += _refused(overrides, OVERRIDES | {"sd_vae": vae}, "override_settings.")
    elif not _is_nothing(overrides):
        problems.append(FieldProblem("override_settings", f"must be an object, got {shown(overrides)}"))
    scripts = asked.get("alwayson_scripts") or {}
    if not isinstance(scripts, dict):
        return {}, [*problems, FieldProblem("alwayson_scripts", f"must be an object, got {shown(scripts)}")]
    data: dict[str, Any] = {}
    units: list[Any] = []
    for name, script in scripts.items():
        args = _args(script)
        if name.lower() == _CONTROL_NET:
            units += args
        elif args:
            text = f"is not served, leave it out; ControlNet is the one script served; got {shown(args)}"
            problems.append(FieldProblem(f"alwayson_scripts.{shown(name)}", text))
    field = "alwayson_scripts.ControlNet"
    if len(units) > 1:
        problems.append(FieldProblem(field, f"takes one enabled unit, got {len(units)}"))
    elif units and not isinstance(units[0], dict):
        problems.append(FieldProblem(field, f"takes a unit as an object, got {shown(units[0])}"))
    elif units:
        data, faults = _control(units[0], field)
        problems += faults
    return data, problems


def _control(unit: dict[str, Any], field: str) -> tuple[dict[str, Any], list[FieldProblem]]:
    """One ControlNet unit -> our fields. The model is the launch's, whatever name a client gives it."""
    problems = list(_refused(unit, _UNIT, f"{field}."))
    # A given 0 is not the end's default: the ControlNet would act nowhere.
    if unit.get("guidance_end") is not None and _is_nothing(unit["guidance_end"]):
        problems.append(
            FieldProblem(f"{field}.guidance_end", f"must be 1, got {shown(unit['guidance_end'])}")
        )
    image = unit.get("image") or unit.get("input_image")
    if isinstance(image, dict):  # as the extension's page sends it
        problems += _refused(image, {"mask": ()}, f"{field}.image.")
        image = image.get("image")
    if not image:
        problems.append(FieldProblem(f"{field}.image", "needed: a picture in base64"))
    data = {"control_image": image}
    if unit.get("weight") is not None:
        data["controlnet_scale"] = unit["weight"]
    return data, problems
