"""From the command line to a checked HostConfig: the parser, the YAML file, and every refusal.

Imports no torch, so that `--help` and a usage error answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from shared.backends.xdit_plan import check_xdit
from shared.launch.flags import HostConfig as HostConfig
from shared.launch.logs import finish, one_line
from shared.launch.logs import world_from_environment as world_from_environment
from shared.launch.wording import shown
from shared.models import BACKENDS, FEATURES, MODELS, SCHEDULERS, ModelSpec, refusal, schedulers_for

EXIT_USAGE = 2
API_KEY_VARIABLE = "MULTIGPU_DIFFUSION_API_KEY"
RANK_0_SECONDS = 5.0  # how long rank 0 may take to say what all ranks have met


class UsageError(ValueError):
    """A launch that cannot work; one line names the flag, what was given and what is allowed."""


class LoadError(RuntimeError):
    """Files that cannot be loaded or do not fit each other; one line says which, and what was expected."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line of 300 characters at most; its type when it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def config_flags(backend: str) -> list[Field[Any]]:
    """The flags of one host, in the order of their definition."""
    return [
        f
        for f in fields(HostConfig)
        if f.metadata and (f.metadata["backend"] is None or backend in f.metadata["backend"].split())
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser(backend: str) -> argparse.ArgumentParser:
    """The argparse parser of one host: flags in groups, each with default, unit and choices."""
    spec = BACKENDS[backend]
    parser = _Parser(
        prog=f"{backend}_host.py",
        description=f"{spec.title}. Types: {', '.join(spec.types)}.",
        epilog=f"Start it as: torchrun --nproc_per_node=2 {backend}_host.py --type={spec.types[0]} "
        "--checkpoint=/models/x",
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of these flags; flags win over it"
    )
    for f in config_flags(backend):
        meta = f.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        names = [f"--{name}" for name in (f.name, *meta["aliases"])]
        text = meta["help"]
        if meta["choices"]:
            text += f"; one of {', '.join(meta['choices'])}"
        if f.name == "type":
            text += f"; one of {', '.join(spec.types)}"
        if meta["parse"] is not None and f.default not in (None, ""):
            text += f" (default: {f.default})"
        text = text.replace("%", "%%")
        if meta["parse"] is None:
            group.add_argument(*names, dest=f.name, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            action = "append" if meta["several"] else "store"
            group.add_argument(
                *names,
                dest=f.name,
                default=argparse.SUPPRESS,
                help=text,
                metavar=f.name.upper(),
                action=action,
            )
    return parser


def parse_config(backend: str, argv: Sequence[str] | None = None) -> HostConfig:
    """Parse and check the command line of one host.

    Raises:
        UsageError: naming the flag, what was given and what is allowed.
    """
    parser = build_parser(backend)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(_unknown(backend, unknown[0].split("=")[0]))
    given = vars(known)
    config_file = given.pop("config", None)
    values = {**({} if config_file is None else _read_yaml(backend, config_file)), **given}
    by_name = {f.name: f for f in config_flags(backend)}
    parsed = {name: _parse_value(by_name[name], value) for name, value in values.items()}
    if (key := _api_key(parsed)) is not None:
        parsed["api_key"] = key
    config = HostConfig(backend=backend, **parsed)
    check_config(config, world_from_environment()[1])
    return config


def _api_key(parsed: dict[str, Any]) -> str | None:
    """The key of the flag, of the file or of the environment."""
    if (file := parsed.get("api_key_file")) is None:
        key = parsed.get("api_key", os.environ.get(API_KEY_VARIABLE))
        if key == "":
            raise UsageError(f"{API_KEY_VARIABLE}: must be a key, or not set; it is empty")
        return key
    if "api_key" in parsed:
        raise UsageError("--api_key_file: not with --api_key; give one of the two")
    try:
        key = Path(file).read_text().strip()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--api_key_file: cannot read {file!r}: {error}") from None
    if not key:
        raise UsageError(f"--api_key_file: must hold the key; {file!r} is empty")
    return key


def parse_or_exit(backend: str, argv: Sequence[str] | None = None) -> HostConfig:
    """`parse_config`; a usage error ends the process with exit code 2 and one line from rank 0 alone."""
    try:
        return parse_config(backend, argv)
    except UsageError as error:
        exit_usage(backend, error)


def exit_usage(backend: str, error: Exception) -> NoReturn:
    """End this rank with exit code 2; rank 0 alone says why, in one line.

    torchrun ends all ranks of a machine with the first one, so the others let rank 0 go first. One that is
    still there after that has met what rank 0 has not (a file that this machine lacks), and says so itself.
    """
    rank = world_from_environment()[0]
    if rank > 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_USAGE))
        time.sleep(RANK_0_SECONDS)
    print(usage_line(backend, error), file=sys.stderr, flush=True)
    finish()
    os._exit(EXIT_USAGE)


def usage_line(backend: str, error: Exception) -> str:
    """What a rank says of a usage error."""
    rank = world_from_environment()[0]
    who = f"[rank {rank}] " if rank > 0 else ""
    return one_line(f"{who}{backend}_host.py: error: {error}")


def _unknown(backend: str, flag: str) -> str:
    names = [f.name for f in config_flags(backend)]
    if not flag.startswith("-"):
        return f"{flag!r} is not a flag; every argument is --name=value (see --help)"
    name = flag.lstrip("-")
    elsewhere = [b for b in BACKENDS if b != backend and name in {f.name for f in config_flags(b)}]
    if elsewhere:
        return (
            f"--{name}: a flag of {' and '.join(f'{b}_host.py' for b in elsewhere)}, not of {backend}_host.py"
        )
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
    hint = f"did you mean --{near[0]}? " if near else ""
    return f"--{name}: unknown flag; {hint}--help lists all of them"


def _read_yaml(backend: str, path: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(Path(path).expanduser().read_text())
    except (yaml.YAMLError, *_UNREADABLE) as error:
        raise UsageError(f"--config: cannot read {path!r}: {_problem(error)}") from None
    if data is None:  # an empty file
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"--config: {path!r} must hold `flag: value` lines, got {type(data).__name__}")
    flags = config_flags(backend)
    aliases = {alias: f.name for f in flags for alias in f.metadata["aliases"]}
    names = {f.name for f in flags}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = aliases.get(str(key), str(key))
        if name not in names:
            raise UsageError(f"--config {path}: {_unknown(backend, '--' + str(key))}")
        if value is not None:
            values[name] = value
    return values


_UNREADABLE = (OSError, ValueError, LookupError, AttributeError, RecursionError)
"""What YAML's constructors let through, such as ValueError for the date 2024-13-13."""


def _problem(error: Exception) -> str:
    """What is wrong with a YAML file, in one line, and where."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    lines = str(getattr(error, "problem", None) or error).splitlines()
    mark = getattr(error, "problem_mark", None)
    return (f"line {mark.line + 1}: " if mark else "") + (lines[0] if lines else type(error).__name__)


def _parse_value(f: Field[Any], value: Any) -> Any:
    meta = f.metadata
    if meta["parse"] is None:
        if not isinstance(value, bool):
            raise UsageError(f"--{f.name}: a switch, true or false; got {value!r}")
        return value
    try:
        parsed = meta["parse"](value)
    except ValueError as error:
        raise UsageError(f"--{f.name}: must be {error}; got {shown(value, 100)}") from None
    if meta["path"]:
        homed = os.path.expanduser
        if isinstance(parsed, dict):
            parsed = {homed(k): v for k, v in parsed.items()}
        else:
            parsed = tuple(map(homed, parsed)) if meta["several"] else homed(parsed)
    if meta["choices"] and parsed not in meta["choices"]:
        raise UsageError(f"--{f.name}: must be one of {', '.join(meta['choices'])}; got {shown(value, 100)}")
    if meta["least"] is not None and parsed < meta["least"]:
        raise UsageError(f"--{f.name}: must be at least {meta['least']}; got {shown(value, 100)}")
    if meta["most"] is not None and parsed > meta["most"]:
        raise UsageError(f"--{f.name}: must be at most {meta['most']}; got {shown(value, 100)}")
    return parsed


def check_config(config: HostConfig, world_size: int) -> None:
    """Refuse what cannot work, before any weight is read. Raises UsageError."""
    backend = BACKENDS[config.backend]
    if config.type not in backend.types:
        given = repr(config.type) if config.type else "nothing"
        raise UsageError(
            f"--type: {config.backend}_host.py serves {', '.join(backend.types)}; got {given}"
            + (_served_elsewhere(config.type) if config.type in MODELS else "")
        )
    if not config.checkpoint:
        raise UsageError("--checkpoint: needed, a diffusers folder or a .safetensors file; got nothing")
    _check_paths(config)
    _check_features(config)
    _check_size(config)
    _check_scheduler(config)
    _check_world(config, world_size)


def _served_elsewhere(type_name: str) -> str:
    return (
        f" ({' and '.join(f'{b.name}_host.py' for b in BACKENDS.values() if type_name in b.types)} serves it)"
    )


_FOLDERS = ("control_net",)
_FILES = ("gguf_model",)
_LORAS = ("lora", "motion_adapter_lora")


def _check_paths(config: HostConfig) -> None:
    for f in config_flags(config.backend):
        value = getattr(config, f.name)
        if not f.metadata["path"] or value is None:
            continue
        for path in value if isinstance(value, dict | tuple) else [value]:
            if not os.path.exists(path):
                raise UsageError(f"--{f.name}: no such file or folder: {path!r}")
            if f.name in _FOLDERS and not os.path.isdir(path):
                raise UsageError(f"--{f.name}: must be a diffusers folder; got the file {path!r}")
            if f.name == "lora_dir" and not os.path.isdir(path):
                raise UsageError(f"--lora_dir: must be a folder; got the file {path!r}")
            if f.name in _FILES and os.path.isdir(path):
                raise UsageError(f"--{f.name}: must be a file; got the folder {path!r}")
            if f.name in _LORAS and os.path.isfile(path) and not path.endswith(".safetensors"):
                raise UsageError(f"--{f.name}: a file must be .safetensors (no pickles); got {path!r}")
    checkpoint = Path(config.checkpoint)
    if checkpoint.is_dir() and not (checkpoint / "model_index.json").is_file():
        raise UsageError(
            f"--checkpoint: no model_index.json in {config.checkpoint!r}; not a diffusers folder"
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


_UNTRACEABLE = "it moves every layer as it is called, which torch.compile cannot trace"
_PACKED = "it takes apart every layer's weights, which must stay together when they are packed"
_COMPILED = {flag: _UNTRACEABLE for flag in ("compile_unet", "compile_vae", "compile_text_encoder")}
_OF_COMPILE = ("compile_backend", "compile_mode", "compile_options", "compile_fullgraph_off")
_LAYER_BY_LAYER: dict[str, dict[str, str]] = {
    "enable_sequential_cpu_offload": {
        **_COMPILED,
        "quantize_to": _PACKED,
        "gguf_model": _PACKED,
        "compel": "compel works where the text encoder's weights are, and they are nowhere between calls",
    },
    "enable_group_offload": {**_COMPILED, "quantize_to": _PACKED},
}
"""What does not go with layers that come to the GPU one by one, and why."""


def _check_features(config: HostConfig) -> None:
    backend, spec = BACKENDS[config.backend], config.spec
    for flag in FEATURES:
        if getattr(config, flag) and (reason := refusal(backend, spec, flag)):
            raise UsageError(f"--{flag}: not for type {spec.name} on {backend.name}_host.py: {reason}")
    offloads = [
        flag
        for flag in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
        if getattr(config, flag)
    ]
    if len(offloads) > 1:
        raise UsageError(f"--{offloads[1]}: one way to offload at a time; --{offloads[0]} is given too")
    if offloads and config.device == "cpu":
        raise UsageError(f"--{offloads[0]}: offloads from a GPU; with --device=cpu there is none")
    for flag, others in _LAYER_BY_LAYER.items():
        for other, why in others.items():
            if getattr(config, flag) and getattr(config, other):
                raise UsageError(
                    f"--{flag}: not with --{other}: {why}; --enable_model_cpu_offload goes with it"
                )
    if config.gguf_model and config.quantize_to:
        raise UsageError(
            "--quantize_to: the weights of --gguf_model are quantized already; give one of the two"
        )
    if config.compile_mode and config.compile_options:
        raise UsageError(
            "--compile_options: torch.compile takes a mode or options; --compile_mode is given too"
        )
    idle = next((flag for flag in _OF_COMPILE if getattr(config, flag)), None)
    if idle and not any(getattr(config, flag) for flag in _COMPILED):
        raise UsageError(f"--{idle}: does nothing without {' or '.join(f'--{flag}' for flag in _COMPILED)}")
    if config.ip_adapter and len(config.ip_adapter) > 1:
        raise UsageError(f"--ip_adapter: one adapter at a time; got {len(config.ip_adapter)}")
    if config.motion_module and config.motion_adapter:
        raise UsageError("--motion_module: a file or --motion_adapter's folder, not both")


def _check_size(config: HostConfig) -> None:
    multiple = config.spec.size_multiple
    for name, value in zip(("width", "height"), config.size, strict=True):
        if value % multiple:
            low = value // multiple * multiple
            raise UsageError(
                f"--{name}: must be a multiple of {multiple} for type {config.type}; got {value} "
                f"(nearest: {max(low, multiple)} and {low + multiple})"
            )


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
    return f"type {spec.name} takes {', '.join(short)} or {', '.join(classes)}; got {shown(name)}"


def idle_flags(config: HostConfig, world_size: int) -> list[str]:
    """A line for each flag that this launch takes and that changes nothing in it."""
    defaults = {f.name: f.default for f in config_flags(config.backend)}

    def given(*flags: str) -> list[str]:
        return [flag for flag in flags if getattr(config, flag) != defaults[flag]]

    idle: list[str] = []
    reason = ""
    if config.backend == "asyncdiff" and asyncdiff_model_n(config, world_size) == 1:
        idle = given("time_shift", "stage_weights", "auto_balance", "async_steps")
        reason = "there is one stage"
    elif config.backend == "distrifuser" and config.parallelism == "tensor":
        idle, reason = given("split_scheme", "sync_mode"), "--parallelism=tensor cuts no patches"
    elif config.backend == "distrifuser" and config.parallelism == "naive_patch":
        if config.sync_mode != "full_sync":
            idle = given("sync_mode")
        reason = "naive patches tell each other nothing, except under full_sync"
    return [f"--{flag} has no effect: {reason}" for flag in idle]


def _check_world(config: HostConfig, world_size: int) -> None:
    """The plan must fit the world size; each backend's own arithmetic is in `PLANS`."""
    check = PLANS.get(config.backend)
    if check is not None:
        check(config, world_size)


def shares_branch(config: HostConfig, world_size: int) -> bool:
    """Whether two ranks divide the guidance branches in some steps and stages of one of them in others."""
    return config.use_cfg_parallel and config.async_steps is not None and world_size == 2


def asyncdiff_model_n(config: HostConfig, world_size: int) -> int:
    """Number of stages: world size = (model_n + stride - 1) x (2 with use_cfg_parallel).

    Raises:
        UsageError: where the world size and the flags do not fit each other.
    """
    branches = 2 if config.use_cfg_parallel and not shares_branch(config, world_size) else 1
    if world_size == 1:
        if config.model_n not in (None, 1) or config.stride != 1 or config.use_cfg_parallel:
            raise UsageError(
                f"--model_n={config.model_n or 2} --stride={config.stride} needs "
                f"{branches * ((config.model_n or 2) + config.stride - 1)} ranks; the world size is 1 "
                "(start it under torchrun --nproc_per_node=N)"
            )
        return 1
    least, most = (1 if branches == 2 else 2), 4
    model_n = config.model_n
    if model_n is None:
        model_n = world_size // branches - config.stride + 1
    needed = branches * (model_n + config.stride - 1)
    allowed = sorted({branches * (n + config.stride - 1) for n in range(least, most + 1)})
    if needed != world_size or not least <= model_n <= most:
        formula = "model_n + stride - 1" if branches == 1 else "2 x (model_n + stride - 1)"
        raise UsageError(
            f"--model_n: the world size must be {formula} with model_n {least} to {most}; got world size "
            f"{world_size}, stride {config.stride}"
            + (f", model_n {config.model_n}" if config.model_n else "")
            + f" (world sizes that fit this stride: {', '.join(map(str, allowed))})"
        )
    if model_n == 1 and config.stride == 2:
        raise UsageError("--stride: 2 needs model_n of 2 or more; got model_n 1")
    if config.stage_weights and len(config.stage_weights) != model_n:
        raise UsageError(
            f"--stage_weights: one number for each of the {model_n} stages; got {len(config.stage_weights)}"
        )
    return model_n


def _check_asyncdiff(config: HostConfig, world_size: int) -> None:
    asyncdiff_model_n(config, world_size)
    if world_size > 1 and config.warm_up_steps < 1:
        raise UsageError("--warm_up_steps: must be at least 1 (the first step fills the activations); got 0")
    if config.auto_balance and config.stage_weights:
        raise UsageError("--auto_balance: measures what --stage_weights tells; give one of the two")


def _check_distrifuser(config: HostConfig, world_size: int) -> None:
    if world_size > 8:
        raise UsageError(f"--parallelism: 1 to 8 ranks; the world size is {world_size}")
    if config.split_scheme == "alternate" and config.parallelism == "patch":
        raise UsageError(
            "--split_scheme: alternate is for --parallelism=naive_patch; other patches stay in place from "
            "step to step (row, col); got alternate with patch"
        )
    patched = config.parallelism == "patch" and config.sync_mode != "full_sync"
    if patched and world_size > 1 and config.warm_up_steps < 1:
        raise UsageError("--warm_up_steps: must be at least 1 (the first step fills the activations); got 0")
    if config.parallelism == "tensor":
        # A LoRA is fused when it is loaded.
        flags = ("quantize_to", "gguf_model", "compile_unet")
        given = next((f"--{flag}" for flag in flags if getattr(config, flag)), None)
        if given or config.offloads:
            raise UsageError(
                f"--parallelism: tensor divides plain weights in memory, so not with "
                f"{given or 'an --enable_..._offload flag'}; patch goes with all of them"
            )


def _check_xdit(config: HostConfig, world_size: int) -> None:
    try:
        check_xdit(config, world_size)
    except ValueError as error:
        raise UsageError(str(error)) from None


PLANS: dict[str, Callable[[HostConfig, int], None]] = {
    "asyncdiff": _check_asyncdiff,
    "distrifuser": _check_distrifuser,
    "xdit": _check_xdit,
}
