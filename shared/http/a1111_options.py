"""A1111's options that change the picture: which values mean nothing, and ControlNet's part of a request.

Whatever is not served and means something is refused by name. Keys outside A1111's schema are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.api.faults import FieldProblem
from shared.api.retouch import CROP, FILL, JUST_RESIZE
from shared.api.warned import warn
from shared.launch.flags import HostConfig
from shared.launch.wording import shown

# Option -> the values that mean nothing, beside those of `is_nothing`.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "firstphase_width": (),
    "firstphase_height": (),
    "firstpass_image": (),
    "infotext": (),
    "restore_faces": (),
    "tiling": (),
    "styles": (),
    "script_name": (),
    "subseed_strength": (),
    "seed_resize_from_w": (-1,),
    "seed_resize_from_h": (-1,),
    "s_churn": (),
    "s_tmin": (),
    "s_tmax": (),
    "s_min_uncond": (),
    "s_noise": (1,),
    "latent_mask": (),
}
OF_IMAGES: dict[str, tuple[Any, ...]] = {
    "enable_hr": (),
    "initial_noise_multiplier": (1,),
    "image_cfg_scale": (1, 1.5),  # which only InstructPix2Pix reads
}
OVERRIDES: dict[str, tuple[Any, ...]] = {
    "eta_noise_seed_delta": (),
    "eta_ancestral": (1,),
    "eta_ddim": (),
    "s_churn": (),
    "s_tmin": (),
    "s_tmax": (),
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
    "img2img_extra_noise": (),
    "img2img_color_correction": (),
    "img2img_fix_steps": (),
    "k_sched_type": (),
    "sd_noise_schedule": ("Default",),
    "emphasis": ("Original",),
    "use_old_emphasis_implementation": (),
    "use_old_karras_scheduler_sigmas": (),
    "use_old_hires_fix_width_height": (),
    "use_old_scheduling": (),
    "uni_pc_variant": ("bh1",),
    "uni_pc_skip_type": ("time_uniform",),
    "sdxl_crop_top": (),
    "sdxl_crop_left": (),
}
# Options of A1111's schema that are read elsewhere, or that mean nothing to a host.
_OTHERS = {
    "prompt", "negative_prompt", "steps", "cfg_scale", "seed", "width", "height", "subseed",
    "sampler_name", "sampler_index", "scheduler", "eta", "batch_size", "n_iter", "clip_skip",
    "refiner_checkpoint", "refiner_switch_at", "disable_extra_networks", "override_settings",
    "override_settings_restore_afterwards", "alwayson_scripts", "script_args", "comments",
    "force_task_id", "do_not_save_samples", "do_not_save_grid", "denoising_strength",
}  # fmt: skip
_OF_TXT2IMG = {
    "enable_hr", "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y",
    "hr_checkpoint_name", "hr_additional_modules", "hr_sampler_name", "hr_scheduler", "hr_prompt",
    "hr_negative_prompt", "hr_cfg",
}  # fmt: skip
_OF_IMG2IMG = {
    "init_images", "resize_mode", "mask", "mask_blur", "mask_blur_x", "mask_blur_y", "mask_round",
    "inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding", "inpainting_mask_invert",
    *OF_IMAGES,
}  # fmt: skip
# Options that have a meaning only with this value: all pictures are sent, and none is kept.
_FIXED = {"send_images": True, "save_images": False, "include_init_images": False}
_OTHER_OVERRIDES = {
    "sd_model_checkpoint", "sd_vae", "CLIP_stop_at_last_layers", "enable_pnginfo", "samples_format",
}  # fmt: skip
# A ControlNet unit's fields; the preprocessor's own do nothing without one.
_UNIT: dict[str, tuple[Any, ...]] = {
    "module": (),
    "guidance_start": (),
    "guidance_end": (1,),
    "control_mode": ("Balanced",),
    "mask": (),
    "mask_image": (),
    "effective_region_mask": (),
    "hr_option": ("Both",),
    "union_control_type": ("Unknown",),
    "inpaint_crop_input_image": (),
}
# Of the control image, and what each is in shared.api.retouch.
RESIZE_MODES: dict[Any, int] = {
    0: JUST_RESIZE, 1: CROP, 2: FILL,
    "Just Resize": JUST_RESIZE, "Crop and Resize": CROP, "Resize and Fill": FILL,
}  # fmt: skip
_CONTROL_NET = "controlnet"
MOST_NAMED = 10  # options in one warning
_HASH = re.compile(r"\s*\[[^\]]*\]$")  # "name [a1b2c3d4]"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")
_NOTHING = ("none", "automatic")


@dataclass(frozen=True)
class Options:
    """What A1111's options mean here.

    Attributes:
        data: what they add to a body of POST /generate.
        problems: the faults of those that are not served.
        controls: the control images, None for img2img's own picture, each with how it is resized, as
            shared.api.retouch has it: one for all ControlNets of the launch, or one for each.
    """

    data: dict[str, Any]
    problems: list[FieldProblem]
    controls: tuple[tuple[Any, int], ...] = ()


def is_nothing(value: Any, more: tuple[Any, ...] = ()) -> bool:
    """Whether an option's value asks for nothing; `more` values do so for this option."""
    return not value or value in more or (isinstance(value, str) and value.lower() in _NOTHING)


def warn_of_unread(asked: dict[str, Any], overrides: dict[str, Any], with_image: bool) -> None:
    """Warn of what a request of A1111's says and nothing here reads."""
    for name, only in _FIXED.items():
        if asked.get(name, only) not in (only, None):
            warn(f"{name}: has no effect; pictures come in the answer, and nowhere else")
    known = {*OPTIONS, *_OTHERS, *_FIXED, *(_OF_IMG2IMG if with_image else _OF_TXT2IMG)}
    unread = [shown(name) for name in asked if name not in known]
    unread += [
        f"override_settings.{name}" for name in overrides if name not in {*OVERRIDES, *_OTHER_OVERRIDES}
    ]
    _warn_of_left_out("options", unread)


def warn_of_unset(settings: dict[str, Any]) -> None:
    """Warn of settings for all later requests that nothing here reads."""
    known = {*OVERRIDES, *_OTHER_OVERRIDES, "sd_checkpoint_hash"}  # the last one is told beside the others
    _warn_of_left_out("settings", [shown(name) for name in settings if name not in known])


def _warn_of_left_out(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        warn(f"{what} that nothing here reads were left out: {', '.join(names[:MOST_NAMED])}{more}")


def _refused(values: dict[str, Any], table: dict[str, tuple[Any, ...]], where: str) -> Iterator[FieldProblem]:
    for key, more in table.items():
        if not is_nothing(value := values.get(key), more):
            yield FieldProblem(f"{where}{key}", f"is not supported: leave it out; got {shown(value)}")


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
    if "ad_model" in unit and is_nothing(unit["ad_model"]):
        return False
    return bool(unit) and not any(unit.get(key) is False for key in ("enabled", "enable", "is_enabled"))


def check_options(asked: dict[str, Any], config: HostConfig, with_image: bool) -> Options:
    """What A1111's options add to a body of POST /generate, and the faults of those that are not served."""
    table = OPTIONS | (OF_IMAGES if with_image else {"mask": ()})
    problems = list(_refused(asked, table, ""))
    sampler = str(asked.get("sampler_name") or asked.get("sampler_index") or "").lower()
    ancestral = sampler.split(" karras")[0].endswith((" a", "_a", "sde"))
    if ancestral or sampler in ("", "automatic") or sampler.startswith(("ddim", "tcd")):  # others read none
        problems += _refused(asked, {"eta": (1,) if ancestral else ()}, "")
    overrides = asked.get("override_settings")
    if isinstance(overrides, dict):
        vae = (config.vae, Path(config.vae).name) if config.vae else ()
        problems += _refused(overrides, OVERRIDES | {"sd_vae": vae}, "override_settings.")
    elif not is_nothing(overrides):
        problems.append(FieldProblem("override_settings", f"must be an object, got {shown(overrides)}"))
    scripts = asked.get("alwayson_scripts") or {}
    if not isinstance(scripts, dict):
        problems.append(FieldProblem("alwayson_scripts", f"must be an object, got {shown(scripts)}"))
        return Options({}, problems)
    units: list[Any] = []
    for name, script in scripts.items():
        args = _args(script)
        if name.lower() == _CONTROL_NET:
            units += args
        elif args:
            text = (
                f"is not supported: leave it out; the only supported script is ControlNet; got {shown(args)}"
            )
            problems.append(FieldProblem(f"alwayson_scripts.{shown(name)}", text))
    field = "alwayson_scripts.ControlNet"
    if wrong := [unit for unit in units if not isinstance(unit, dict)]:
        problems.append(FieldProblem(field, f"must hold objects, got {shown(wrong[0])}"))
    elif units:
        found = _controls(units, field, config, with_image)
        return replace(found, problems=problems + found.problems)
    return Options({}, problems)


def check_settings(settings: dict[str, Any], config: HostConfig) -> list[FieldProblem]:
    """The faults of settings for all later requests: those that change pictures, and which a host has not."""
    vae = (config.vae, Path(config.vae).name) if config.vae else ()
    problems = list(_refused(settings, OVERRIDES | {"sd_vae": vae}, ""))
    if not is_nothing(format := settings.get("samples_format"), ("png",)):
        text = f"must be png for all requests, got {shown(format)}; one asks for it in its override_settings"
        problems.append(FieldProblem("samples_format", text))
    if settings.get("enable_pnginfo") not in (True, None):
        text = f"must be true for all requests, got {shown(settings['enable_pnginfo'])}"
        problems.append(FieldProblem("enable_pnginfo", f"{text}; one sets it in its override_settings"))
    if not is_nothing(layers := settings.get("CLIP_stop_at_last_layers"), (1,)):
        text = f"must be 1 for all requests, got {shown(layers)}; one asks for more in its override_settings"
        problems.append(FieldProblem("CLIP_stop_at_last_layers", text))
    return problems


def _controls(units: list[dict[str, Any]], field: str, config: HostConfig, with_image: bool) -> Options:
    """ControlNet's units -> our fields: each acts on the ControlNet that it names, else on the next free one.

    A single one that names none acts on all of them. Where some are named, the others do not act.
    """
    launched = config.control_net or {}
    if len(units) > max(len(launched), 1):
        most = f"{len(launched)} enabled units" if len(launched) > 1 else "one enabled unit"
        return Options({}, [FieldProblem(field, f"must hold at most {most}, as launched; got {len(units)}")])
    read = [_control(unit, field, config, with_image) for unit in units]
    problems = [fault for unit in read for fault in unit.problems]
    weights = [unit.data.get("controlnet_scale") for unit in read]
    data: dict[str, Any] = {} if weights[0] is None else {"controlnet_scale": weights[0]}
    if problems or len(launched) < 2 or (len(units) == 1 and not units[0].get("model")):
        return Options(data, problems, read[0].controls)
    nets = [_stem(path) for path in launched]
    taken: dict[int, int] = {}  # net -> unit
    names = [_stem(unit["model"]) if unit.get("model") else "" for unit in units]
    for number in sorted(range(len(units)), key=lambda number: not names[number]):
        name = names[number]
        free = [n for n, net in enumerate(nets) if n not in taken and name in ("", net)]
        if not free:
            return Options({}, [FieldProblem(f"{field}.model", f"{shown(name)} is named by two units")])
        taken[free[0]] = number
    scales = []
    for net, own in enumerate(launched.values()):
        weight = weights[taken[net]] if net in taken else 0.0
        scales.append(own if weight is None else weight)
    controls = tuple(read[taken.get(net, 0)].controls[0] for net in range(len(nets)))
    return Options({"controlnet_scale": scales}, [], controls if len(units) > 1 else controls[:1])


def _stem(name: str) -> str:
    """A ControlNet's name without folder, suffix and A1111's hash."""
    name = _HASH.sub("", name.strip()).replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    return name.removesuffix(next((end for end in _SUFFIXES if name.endswith(end)), ""))


def _control(unit: dict[str, Any], field: str, config: HostConfig, with_image: bool) -> Options:
    """One ControlNet unit -> our fields. It may name a ControlNet of the launch, and no other.

    In img2img the image may be None: a unit without a picture takes that of img2img.
    """
    problems = list(_refused(unit, _UNIT, f"{field}."))
    launched, model = list(config.control_net or ()), unit.get("model")
    if launched and model and not (isinstance(model, str) and _stem(model) in map(_stem, launched)):
        names = ", ".join(Path(path).name for path in launched)
        problems.append(FieldProblem(f"{field}.model", f"must be {names}, as launched; got {shown(model)}"))
    # A given 0 is not the end's default: the ControlNet would act nowhere.
    if unit.get("guidance_end") is not None and is_nothing(unit["guidance_end"]):
        problems.append(
            FieldProblem(f"{field}.guidance_end", f"must be 1, got {shown(unit['guidance_end'])}")
        )
    image = unit.get("image") or unit.get("input_image")
    if isinstance(image, dict):  # as the extension's page sends it
        problems += _refused(image, {"mask": ()}, f"{field}.image.")
        image = image.get("image")
    if not image and not with_image:
        problems.append(FieldProblem(f"{field}.image", "is needed: a picture in base64"))
    mode = 1 if unit.get("resize_mode") is None else unit["resize_mode"]
    if isinstance(mode, bool) or not isinstance(mode, int | str) or mode not in RESIZE_MODES:
        names = ", ".join(map(str, RESIZE_MODES))
        problems.append(FieldProblem(f"{field}.resize_mode", f"must be one of {names}; got {shown(mode)}"))
        mode = 1
    data = {} if unit.get("weight") is None else {"controlnet_scale": unit["weight"]}
    return Options(data, problems, ((image or None, RESIZE_MODES[mode]),))
