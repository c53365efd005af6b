"""Launches that cannot work with any backend: refused before any weight is read, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from shared.launch.backend import Backend
from shared.launch.errors import UsageError
from shared.launch.file_header import has_weights, index_of
from shared.launch.flags import HostConfig
from shared.launch.wording import shown
from shared.models import FEATURES, MODELS, OTHER_PIPELINES, SCHEDULERS, ModelSpec, schedulers_for
from shared.models.spec import Kind


def check_type(name: str, backend: Backend, backends: Mapping[str, Backend]) -> None:
    """Refuse a type that the backend does not serve, and name the hosts that do. Raises UsageError."""
    if name not in backend.types:
        scripts = " and ".join(b.script for b in backends.values() if name in b.types)
        given = repr(name) if name else "nothing"
        raise UsageError(
            f"--type: {backend.script} serves {', '.join(backend.types)}; got {given}"
            + (f" ({scripts} {'serve' if ' and ' in scripts else 'serves'} it)" if scripts else "")
        )


def check_config(config: HostConfig, backend: Backend, world_size: int) -> None:
    """Refuse what cannot work, before any weight is read. Raises UsageError.

    Args:
        config: of a type that the backend serves.
    """
    if not config.checkpoint:
        raise UsageError("--checkpoint: must be a diffusers folder or a .safetensors file; got nothing")
    _check_paths(config)
    _check_features(config, backend)
    _check_size(config)
    _check_scheduler(config)
    backend.check(config, world_size)
    if config.shard_weights and config.enable_model_cpu_offload and world_size == 1:
        raise UsageError(
            "--shard_weights: with --enable_model_cpu_offload it needs 2 ranks or more; got one rank, for "
            "which --enable_model_cpu_offload alone is enough"
        )
    _check_sizes(config, backend, world_size)


def preset_line(config: HostConfig, backend: Backend, world_size: int) -> str | None:
    """The flags that --preset has set, as they could be given; None without one."""
    if config.preset is None:
        return None
    given = config.changed(*(f.name for f in backend.config_flags))
    values = {
        name: getattr(config, name) for name in backend.presets(config.spec, world_size, given)[config.preset]
    }
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]
    return f"preset {config.preset}: {' '.join(flags) or 'no flags'}"


def idle_flags(config: HostConfig, backend: Backend, world_size: int) -> list[str]:
    """A line for each flag that changes nothing in this launch."""
    alone = ["--shard_weights has no effect: there is one rank"] if config.shard_weights else []
    return [*backend.idle(config, world_size), *(alone if world_size == 1 else [])]


_FILES = ("gguf_model",)
_SAFETENSORS = ("lora", "motion_adapter_lora", "control_net")


def folder_problem(spec: ModelSpec, folder: str, index: dict[str, Any]) -> str | None:
    """Why a folder with this model_index.json is no checkpoint of the type; None where it is one.

    One of another type loads in part and fails later, or not at all.
    """
    given, name = f"--checkpoint {folder!r}", index.get("_class_name")
    if what := OTHER_PIPELINES.get(str(name)):
        return f"{given} is {what} ({name}), not of type {spec.name}"
    for key, what in spec.other_settings.items():
        if index.get(key) and index[key] != [None, None]:
            return f"{given} is {what}"
    if index.get("requires_aesthetics_score"):
        return f"{given} is the SDXL refiner: give it as --refiner"
    owners = [s for s in MODELS.values() if name in s.index_classes]
    kin = [s for s in owners if s.single_file_config == spec.single_file_config and s.output == "image"]
    # Some were trained to look at pictures, which others know nothing of.
    alike = bool(kin and spec.single_file_config) and len({s.refers for s in (spec, *owners)}) == 1
    if owners and name not in spec.index_classes and not alike:
        types = " or ".join(s.name for s in owners)
        return f"{given} is a {name}, so its type is {types}; got --type={spec.name}"
    present = {key for key, value in index.items() if isinstance(value, list) and value and value[0]}
    encoders = {key for key in present if key.startswith("text_encoder")}
    wrong = [spec.denoiser] if spec.denoiser not in present else sorted(encoders - set(spec.text_encoders))
    if wrong:
        return f"{given} is not of type {spec.name} ({wrong[0]}); it has {', '.join(sorted(present))}"
    return None


def _check_paths(config: HostConfig) -> None:
    for f in fields(HostConfig):
        value = getattr(config, f.name)
        if not f.metadata.get("path") or value is None:
            continue
        for path in value if isinstance(value, dict | tuple) else [value]:
            if f.name in ("cache_dir", "state_dir"):  # are made where they are not there
                if os.path.exists(path) and not os.path.isdir(path):
                    raise UsageError(f"--{f.name}: must be a folder; got the file {path!r}")
                continue
            if not os.path.exists(path):
                raise UsageError(f"--{f.name}: no such file or folder: {path!r}")
            if f.metadata["several"] and not os.path.isdir(path):
                raise UsageError(f"--{f.name}: must be a folder; got the file {path!r}")
            if f.name in _FILES and os.path.isdir(path):
                raise UsageError(f"--{f.name}: must be a file; got the folder {path!r}")
            if f.name in _SAFETENSORS and os.path.isfile(path) and not path.endswith(".safetensors"):
                raise UsageError(f"--{f.name}: a file must be .safetensors (no pickles); got {path!r}")
            if f.name == "control_net" and os.path.isdir(path) and not Path(path, "config.json").is_file():
                text = "must be a diffusers folder with a config.json, or a .safetensors file"
                raise UsageError(f"--control_net: {text}; got {path!r}")
    checkpoint = Path(config.checkpoint)
    if checkpoint.is_dir() and not (checkpoint / "model_index.json").is_file():
        raise UsageError(
            f"--checkpoint: no model_index.json in {config.checkpoint!r}; not a diffusers folder"
        )
    index = index_of(config.checkpoint) if checkpoint.is_dir() else None
    known = index if isinstance(index, dict) and "_class_name" in index else None  # the loader refuses others
    if known and (problem := folder_problem(config.spec, config.checkpoint, known)):
        raise UsageError(problem)
    if known:
        _check_parts(config, known)
    if config.refiner and Path(config.refiner).is_dir():
        if not (Path(config.refiner) / "model_index.json").is_file():
            raise UsageError(f"--refiner: no model_index.json in {config.refiner!r}; not a diffusers folder")
    elif config.refiner and Path(config.refiner).suffix not in (".safetensors", ".sft"):
        raise UsageError(
            f"--refiner: a single file must be .safetensors or .sft (no pickles); got {config.refiner!r}"
        )
    if checkpoint.is_file():
        if checkpoint.suffix not in (".safetensors", ".sft"):
            hint = "; a .gguf goes to --gguf_model" if checkpoint.suffix == ".gguf" else ""
            raise UsageError(
                f"--checkpoint: a single file must be .safetensors or .sft (no pickles{hint}); "
                f"got {config.checkpoint!r}"
            )
        if config.spec.single_file_config is None:
            raise UsageError(
                f"--checkpoint: type {config.type} loads from a diffusers folder only; "
                f"got the file {config.checkpoint!r}"
            )


def _check_parts(config: HostConfig, index: dict[str, Any]) -> None:
    """Refuse a folder that lacks a model which its model_index.json names, unless a flag replaces it."""
    replaced = {"vae": config.vae, config.spec.denoiser: config.gguf_model}
    for part in (config.spec.denoiser, *config.spec.text_encoders, "vae"):
        given = index.get(part)
        if not (isinstance(given, list) and given and given[0]) or replaced.get(part):
            continue
        folder = Path(config.checkpoint) / part
        if not folder.exists():
            missing = ""
        elif not (folder / "config.json").exists():
            missing = "/config.json"
        elif not has_weights(folder):
            missing = "/*.safetensors"
        else:
            continue
        named = f"{config.checkpoint!r} has no {part}{missing}"
        raise UsageError(f"--checkpoint: {named}, which its model_index.json names")


_UNTRACEABLE = "it moves each layer when it is called, which torch.compile cannot trace"
_PACKED = "it moves weights one by one, and quantized weights must stay together"
_COMPILED = {flag: _UNTRACEABLE for flag in ("compile_unet", "compile_vae", "compile_text_encoder")}
_OF_COMPILE = ("compile_backend", "compile_mode", "compile_options", "compile_fullgraph_off")
_LAYER_BY_LAYER: dict[str, dict[str, str]] = {
    "enable_sequential_cpu_offload": {
        **_COMPILED,
        "quantize_to": _PACKED,
        "gguf_model": _PACKED,
        "compel": "compel reads the text encoder's device, and its weights are on none between calls",
    },
    "enable_group_offload": {**_COMPILED, "quantize_to": _PACKED},
}
"""Flags that conflict with offload layer by layer, and why."""


def _check_features(config: HostConfig, backend: Backend) -> None:
    spec = config.spec
    for flag in FEATURES:
        if getattr(config, flag) and (reason := backend.refusal(spec, flag)):
            raise UsageError(f"--{flag}: not supported for type {spec.name} on {backend.script}: {reason}")
    offloads = [
        flag
        for flag in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
        if getattr(config, flag)
    ]
    if len(offloads) > 1:
        raise UsageError(
            f"--{offloads[1]}: only one kind of offload can be used; --{offloads[0]} is given too"
        )
    if offloads and config.device == "cpu":
        raise UsageError(f"--{offloads[0]}: needs a GPU; got --device=cpu")
    for flag, others in _LAYER_BY_LAYER.items():
        for other, why in others.items():
            if getattr(config, flag) and getattr(config, other):
                raise UsageError(
                    f"--{flag}: not supported with --{other}: {why}; use --enable_model_cpu_offload"
                )
    by_layer = [flag for flag in offloads if flag != "enable_model_cpu_offload"]
    if config.shard_weights and (by_layer or config.compile_text_encoder):
        other, why = (
            (by_layer[0], "each rank's part of the weights stays on its GPU")
            if by_layer
            else ("compile_text_encoder", "encoders are compiled whole, and weights are gathered by block")
        )
        raise UsageError(f"--shard_weights: not supported with --{other}: {why}")
    if config.shard_weights and config.refiner:
        raise UsageError("--refiner: not supported with --shard_weights, which shards one denoiser")
    if config.control_net and spec.one_control_net and len(config.control_net) > 1:
        given = len(config.control_net)
        raise UsageError(f"--control_net: type {spec.name} takes one ControlNet; got {given}")
    if config.control_net and spec.control_net_shares:
        shared = ("shard_weights", "enable_sequential_cpu_offload", "enable_group_offload")
        if moving := next((name for name in shared if getattr(config, name)), None):
            why = f"which runs layers of the denoiser in type {spec.name}, and weights come and go by layer"
            raise UsageError(f"--{moving}: not supported with --control_net, {why}")
    if config.gguf_model and config.quantize_to:
        raise UsageError(
            "--quantize_to: the weights of --gguf_model are quantized already; give only one of them"
        )
    if config.compile_mode and config.compile_options:
        raise UsageError(
            "--compile_options: torch.compile takes a mode or options, not both; --compile_mode is given too"
        )
    idle = next((flag for flag in _OF_COMPILE if getattr(config, flag)), None)
    if idle and not any(getattr(config, flag) for flag in _COMPILED):
        raise UsageError(f"--{idle}: has no effect without {' or '.join(f'--{flag}' for flag in _COMPILED)}")
    if config.ip_adapter and len(config.ip_adapter) > 1 and config.spec.ip_adapter_takes == "one":
        raise UsageError(
            f"--ip_adapter: type {config.spec.name} takes one adapter; got {len(config.ip_adapter)}"
        )
    if config.motion_module and config.motion_adapter:
        raise UsageError("--motion_module: not supported with --motion_adapter; give only one of them")


def _check_size(config: HostConfig) -> None:
    multiple = config.spec.size_multiple
    for name, value in zip(("width", "height"), config.size, strict=True):
        if value % multiple:
            low = value // multiple * multiple
            raise UsageError(
                f"--{name}: must be a multiple of {multiple} for type {config.type}; got {value} "
                f"(nearest: {max(low, multiple)} and {low + multiple})"
            )
        if problem := too_long(config, value):
            raise UsageError(f"--{name}: {problem}")


def too_long(config: HostConfig, side: int) -> str | None:
    """Why the checkpoint has no positions for a side of so many pixels, or None."""
    tokens, pixels = config.position_table or (side, 1)
    if side <= tokens * pixels:
        return None
    return (
        f"must be at most {tokens * pixels} for this checkpoint, which has positions for {tokens} x {tokens} "
        f"tokens of {pixels} x {pixels} pixels; got {side}"
    )


def _check_sizes(config: HostConfig, backend: Backend, world_size: int) -> None:
    """Refuse what could not be the launch's own size."""
    spec = config.spec
    if config.sizes and "width" not in spec.fields:
        raise UsageError(f"--sizes: type {spec.name} makes pictures of the size of its input only")
    for width, height in config.sizes or ():
        sized = replace(config, width=width, height=height, sizes=None)
        try:
            _check_size(sized)
            backend.check(sized, world_size)
        except UsageError as error:
            problem = str(error).removeprefix("--").replace(":", "", 1)
            raise UsageError(f"--sizes: {width}x{height}: {problem}") from None
        if width * height * (spec.frames or 1) > config.max_pixel_steps:
            most = config.max_pixel_steps
            raise UsageError(f"--sizes: {width}x{height}: one step of it exceeds --max_pixel_steps={most}")


def _check_scheduler(config: HostConfig) -> None:
    if config.scheduler is not None and (problem := scheduler_problem(config.spec, config.scheduler)):
        raise UsageError(f"--scheduler: {problem}")


def scheduler_problem(spec: ModelSpec, scheduler: str | dict[str, Any]) -> str | None:
    """Why the type cannot use this scheduler, or None. Names are short names or diffusers class names."""
    name = scheduler["scheduler"] if isinstance(scheduler, dict) else scheduler
    short = schedulers_for(spec)
    classes = sorted({s.cls for s in SCHEDULERS.values() if spec.scheduler_family in s.families})
    if name in short or name in classes:
        return None
    return f"type {spec.name} supports {', '.join(short)} or {', '.join(classes)}; got {shown(name)}"


def runs_whole(config: HostConfig, masked: bool) -> bool:
    """Whether all steps run although there is a picture: it is looked at, and not started from."""
    start = config.spec.start("inpaint" if masked else "image", bool(config.control_net))
    return start is not None and start.strength is None


def start_problem(config: HostConfig, kind: Kind) -> str | None:
    """Why a launch of a type that starts from pictures cannot do so, or only without a mask; None: it can."""
    spec, what = config.spec, "takes a mask" if kind == "inpaint" else "starts from a picture"
    start = spec.start(kind, bool(config.control_net))
    looks = start is not None and start.strength is None
    if (config.pipefusion_parallel_degree or 1) > 1 and not looks:
        return f"is not supported with PipeFusion: no pipeline of xfuser {what}; the other degrees support it"
    if start is None and config.control_net:
        return f"type {spec.name} with --control_net: this host has no pipeline that {what}"
    if start is not None and config.ip_adapter and not start.ip_adapter:
        return f"is not supported with --ip_adapter: {start.pipeline} takes none"
    return None
