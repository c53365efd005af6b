"""Launch configuration: every flag, its default, its help and its checks, in one frozen dataclass.

`HostConfig` owns the defaults; the parser quotes them. Parsing and checking import no torch, so that `--help`
and a usage error answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from shared.models import BACKENDS, FEATURES, MODELS, SCHEDULERS, ModelSpec, refusal, schedulers_for

EXIT_USAGE = 2


class UsageError(ValueError):
    """A launch that cannot work; one line names the flag, what was given and what is allowed."""


class LoadError(RuntimeError):
    """Files that cannot be loaded or do not fit each other; one line says which, and what was expected."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text that is not empty")
    return value


def _integer(value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError("a whole number") from None


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ValueError("a number of seconds") from None
    if not 0 < seconds < 1e9:
        raise ValueError("a number of seconds above 0")
    return seconds


def _scales(value: Any) -> dict[str, float]:
    """JSON `{"path": scale, ...}`."""
    wanted = 'JSON such as {"path": 1.0}'
    try:
        data = json.loads(value) if isinstance(value, str) else value
        scales = {str(path): float(scale) for path, scale in data.items() if not isinstance(scale, bool)}
        if len(scales) != len(data) or not scales:
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise ValueError(wanted) from None
    return scales


def _scales_or_path(value: Any) -> dict[str, float]:
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        return {_text(value): 1.0}
    return _scales(value)


def _json_object(value: Any) -> dict[str, Any]:
    try:
        data = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise ValueError("a JSON object")
    return data


def _scheduler(value: Any) -> str | dict[str, Any]:
    if isinstance(value, dict) or str(value).lstrip().startswith("{"):
        data = _json_object(value)
        if not isinstance(data.get("scheduler"), str):
            raise ValueError('a name, or JSON with the name under "scheduler"')
        return data
    return _text(value)


def _weights(value: Any) -> tuple[float, ...]:
    try:
        data = value if isinstance(value, list | tuple) else str(value).strip("[]").split(",")
        weights = tuple(float(w) for w in data)
    except ValueError:
        weights = ()
    if not weights or min(weights) <= 0:
        raise ValueError("numbers above 0 with commas between, such as 1,1,0.5")
    return weights


def _flag(
    default: Any,
    group: str,
    help: str,
    parse: Callable[[Any], Any] | None = None,
    *,
    choices: Sequence[str] = (),
    least: int | None = None,
    most: int | None = None,
    aliases: Sequence[str] = (),
    backend: str | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field with all that the parser and the checks need. `parse=None` makes a bare switch."""
    meta = dict(
        group=group,
        help=help,
        parse=parse,
        choices=tuple(choices),
        least=least,
        most=most,
        aliases=tuple(aliases),
        backend=backend,
        path=path,
    )
    return field(default=default, metadata=meta)


_HOST, _MODEL, _FEATURES, _COMPILE, _MEMORY, _PARALLEL = (
    "serving",
    "model",
    "features",
    "compile",
    "memory",
    "parallel",
)


@dataclass(frozen=True)
class HostConfig:
    """One launch. Field names are flag names (PROTOCOL: command line); None means "not given"."""

    backend: str = field(default="", metadata={})

    type: str = _flag("", _MODEL, "model type", _text)
    checkpoint: str = _flag("", _MODEL, "diffusers folder or single .safetensors file", _text, path=True)
    variant: str | None = _flag(
        None,
        _MODEL,
        "dtype of weights and computation (default: fp16 on GPUs, fp32 on CPUs)",
        _text,
        choices=("fp16", "bf16", "fp32"),
    )
    height: int | None = _flag(
        None, _MODEL, "default height, pixels (default: the type's)", _integer, least=16, most=8192
    )
    width: int | None = _flag(
        None, _MODEL, "default width, pixels (default: the type's)", _integer, least=16, most=8192
    )
    scheduler: str | dict[str, Any] | None = _flag(
        None, _MODEL, "short name, diffusers class or JSON (default: the checkpoint's)", _scheduler
    )
    vae: str | None = _flag(None, _MODEL, "VAE to use instead of the checkpoint's", _text, path=True)
    gguf_model: str | None = _flag(None, _MODEL, "GGUF file for the denoiser", _text, path=True)
    quantize_to: str | None = _flag(
        None,
        _MODEL,
        "quantize denoiser and text encoders",
        _text,
        choices=("float8", "int8", "int4", "int2"),
    )

    lora: dict[str, float] | None = _flag(None, _FEATURES, 'LoRAs, {"path": scale}', _scales, path=True)
    control_net: dict[str, float] | None = _flag(
        None, _FEATURES, 'ControlNets, path or {"path": scale}', _scales_or_path, path=True
    )
    ip_adapter: dict[str, float] | None = _flag(
        None, _FEATURES, 'IP-Adapter, {"path": scale}', _scales, path=True
    )
    motion_module: str | None = _flag(
        None, _FEATURES, "AnimateDiff motion module, a single file", _text, path=True
    )
    motion_adapter: str | None = _flag(
        None, _FEATURES, "AnimateDiff motion adapter, a diffusers folder", _text, path=True
    )
    motion_adapter_lora: dict[str, float] | None = _flag(
        None, _FEATURES, 'motion LoRAs, {"path": scale}', _scales, path=True
    )
    compel: bool = _flag(False, _FEATURES, "prompt weighting and long prompts through compel")

    compile_unet: bool = _flag(False, _COMPILE, "compile the denoiser, whatever its kind")
    compile_vae: bool = _flag(False, _COMPILE, "compile the VAE")
    compile_text_encoder: bool = _flag(False, _COMPILE, "compile the text encoders")
    compile_backend: str | None = _flag(None, _COMPILE, "torch.compile's backend (default: inductor)", _text)
    compile_mode: str | None = _flag(
        None,
        _COMPILE,
        "torch.compile's mode",
        _text,
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    compile_options: dict[str, Any] | None = _flag(
        None, _COMPILE, "torch.compile's options, JSON", _json_object
    )
    compile_fullgraph_off: bool = _flag(False, _COMPILE, "allow graph breaks")

    enable_vae_tiling: bool = _flag(False, _MEMORY, "decode in tiles")
    enable_vae_slicing: bool = _flag(False, _MEMORY, "decode pictures of a batch one by one")
    xformers_efficient: bool = _flag(False, _MEMORY, "attention of the xformers package (GPU)")
    enable_model_cpu_offload: bool = _flag(False, _MEMORY, "keep idle models on the CPU (GPU)")
    enable_sequential_cpu_offload: bool = _flag(False, _MEMORY, "keep idle layers on the CPU (GPU)")
    enable_group_offload: bool = _flag(False, _MEMORY, "keep idle groups of layers on the CPU (GPU)")

    warm_up_steps: int = _flag(
        3,
        _PARALLEL,
        "synchronous steps before stale activations are used",
        _integer,
        least=0,
        most=1000,
        aliases=("warm_up", "warmup_steps"),
    )
    device: str = _flag("auto", _PARALLEL, "where to compute", _text, choices=("auto", "cuda", "cpu"))
    model_n: int | None = _flag(
        None,
        _PARALLEL,
        "stages of the denoiser (default: from the world size)",
        _integer,
        least=1,
        most=4,
        backend="asyncdiff",
    )
    stride: int = _flag(
        1, _PARALLEL, "steps served by one parallel batch", _integer, least=1, most=2, backend="asyncdiff"
    )
    time_shift: bool = _flag(
        False, _PARALLEL, "use the time embedding of the step before", backend="asyncdiff"
    )
    stage_weights: tuple[float, ...] | None = _flag(
        None, _PARALLEL, "relative speed of each stage's GPU, 1,1,0.5", _weights, backend="asyncdiff"
    )
    auto_balance: bool = _flag(
        False, _PARALLEL, "measure each GPU's speed at start and cut by it", backend="asyncdiff"
    )
    parallelism: str = _flag(
        "patch",
        _PARALLEL,
        "how the work is divided",
        _text,
        choices=("patch", "tensor", "naive_patch"),
        backend="distrifuser",
    )
    split_scheme: str = _flag(
        "row",
        _PARALLEL,
        "how naive patches are cut",
        _text,
        choices=("row", "col", "alternate"),
        backend="distrifuser",
    )
    sync_mode: str = _flag(
        "corrected_async_gn",
        _PARALLEL,
        "what is exchanged after warm-up",
        _text,
        choices=("corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "full_sync", "no_sync"),
        backend="distrifuser",
    )
    no_split_batch: bool = _flag(
        False, _PARALLEL, "do not put the guidance branches on different ranks", backend="distrifuser"
    )
    use_cfg_parallel: bool = _flag(
        False, _PARALLEL, "guidance branches on two halves of the ranks", backend="asyncdiff xdit"
    )
    no_cuda_graph: bool = _flag(False, _PARALLEL, "do not capture steps", backend="asyncdiff distrifuser")
    ulysses_degree: int | None = _flag(
        None, _PARALLEL, "Ulysses sequence parallelism", _integer, least=1, most=8, backend="xdit"
    )
    ring_degree: int | None = _flag(
        None, _PARALLEL, "ring sequence parallelism", _integer, least=1, most=8, backend="xdit"
    )
    pipefusion_parallel_degree: int | None = _flag(
        None, _PARALLEL, "PipeFusion stages", _integer, least=1, most=8, backend="xdit"
    )
    tensor_parallel_degree: int | None = _flag(
        None, _PARALLEL, "tensor parallelism (flux)", _integer, least=1, most=8, backend="xdit"
    )
    data_parallel_degree: int | None = _flag(
        None, _PARALLEL, "several pictures of one request at once", _integer, least=1, most=8, backend="xdit"
    )
    num_pipeline_patch: int | None = _flag(
        None, _PARALLEL, "patches of PipeFusion", _integer, least=1, most=64, backend="xdit"
    )
    attn_layer_num_for_pp: tuple[float, ...] | None = _flag(
        None, _PARALLEL, "blocks of each PipeFusion stage, 10,9", _weights, backend="xdit"
    )
    use_parallel_vae: bool = _flag(False, _PARALLEL, "decode on all ranks", backend="xdit")
    use_teacache: bool = _flag(False, _PARALLEL, "TeaCache (flux)", backend="xdit")
    use_fbcache: bool = _flag(False, _PARALLEL, "first-block cache (flux)", backend="xdit")

    port: int = _flag(6000, _HOST, "port that rank 0 serves", _integer, least=1, most=65535)
    host: str = _flag("127.0.0.1", _HOST, "address that rank 0 serves", _text)
    max_queue: int = _flag(16, _HOST, "requests that may wait, then 503", _integer, least=0, most=1024)
    request_timeout: float = _flag(1800.0, _HOST, "seconds that one request may run, then 504", _seconds)
    collective_timeout: float = _flag(
        300.0, _HOST, "seconds that a rank waits for another before the job is broken", _seconds
    )
    log_level: str = _flag("info", _HOST, "log detail", _text, choices=("debug", "info", "warning", "error"))
    log_json: bool = _flag(False, _HOST, "log as JSON lines")
    api_key: str | None = _flag(None, _HOST, "bearer token asked of every route but /health", _text)
    legacy_pickle: bool = _flag(False, _HOST, "base64(pickle) for the original project's clients")

    @property
    def spec(self) -> ModelSpec:
        return MODELS[self.type]

    @property
    def size(self) -> tuple[int, int]:
        """Default (width, height) of a picture, pixels."""
        return self.width or self.spec.width, self.height or self.spec.height


def config_flags(backend: str) -> list[Field[Any]]:
    """The flags of one host, in the order of their definition."""
    return [
        f
        for f in fields(HostConfig)
        if f.metadata and (f.metadata["backend"] is None or backend in f.metadata["backend"].split())
    ]


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


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
            group.add_argument(
                *names, dest=f.name, default=argparse.SUPPRESS, help=text, metavar=f.name.upper()
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
    values = {**(_read_yaml(backend, config_file) if config_file else {}), **given}
    by_name = {f.name: f for f in config_flags(backend)}
    parsed = {name: _parse_value(by_name[name], value) for name, value in values.items()}
    config = HostConfig(backend=backend, **parsed)
    check_config(config, world_from_environment()[1])
    return config


def parse_or_exit(backend: str, argv: Sequence[str] | None = None) -> HostConfig:
    """`parse_config`; a usage error ends the process with exit code 2 and one line from rank 0 alone."""
    try:
        return parse_config(backend, argv)
    except UsageError as error:
        exit_usage(backend, error)


def exit_usage(backend: str, error: Exception) -> NoReturn:
    """End this rank with exit code 2; rank 0 alone says why, in one line."""
    if world_from_environment()[0] == 0:
        print(f"{backend}_host.py: error: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(EXIT_USAGE)


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
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config: cannot read {path!r}: {str(error).splitlines()[0]}") from None
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


def _parse_value(f: Field[Any], value: Any) -> Any:
    meta = f.metadata
    if meta["parse"] is None:
        if not isinstance(value, bool):
            raise UsageError(f"--{f.name}: a switch, true or false; got {value!r}")
        return value
    try:
        parsed = meta["parse"](value)
    except ValueError as error:
        raise UsageError(f"--{f.name}: must be {error}; got {_shown(value)}") from None
    if meta["choices"] and parsed not in meta["choices"]:
        raise UsageError(f"--{f.name}: must be one of {', '.join(meta['choices'])}; got {_shown(value)}")
    if meta["least"] is not None and parsed < meta["least"]:
        raise UsageError(f"--{f.name}: must be at least {meta['least']}; got {_shown(value)}")
    if meta["most"] is not None and parsed > meta["most"]:
        raise UsageError(f"--{f.name}: must be at most {meta['most']}; got {_shown(value)}")
    return parsed


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


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


def _check_paths(config: HostConfig) -> None:
    for f in config_flags(config.backend):
        value = getattr(config, f.name)
        if not f.metadata["path"] or value is None:
            continue
        for path in value if isinstance(value, dict) else [value]:
            if not os.path.exists(path):
                raise UsageError(f"--{f.name}: no such file or folder: {path!r}")
    checkpoint = Path(config.checkpoint)
    if checkpoint.is_dir() and not (checkpoint / "model_index.json").is_file():
        raise UsageError(
            f"--checkpoint: no model_index.json in {config.checkpoint!r}; not a diffusers folder"
        )
    if checkpoint.is_file():
        if checkpoint.suffix != ".safetensors":
            raise UsageError(
                f"--checkpoint: a single file must be .safetensors (no pickles); got {config.checkpoint!r}"
            )
        if config.spec.single_file_config is None:
            raise UsageError(
                f"--checkpoint: type {config.type} loads from a diffusers folder only; "
                f"got the file {config.checkpoint!r}"
            )


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
    if config.gguf_model and config.quantize_to:
        raise UsageError(
            "--quantize_to: the weights of --gguf_model are quantized already; give one of the two"
        )
    if config.compile_mode and config.compile_options:
        raise UsageError(
            "--compile_options: torch.compile takes a mode or options; --compile_mode is given too"
        )
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
    return f"type {spec.name} takes {', '.join(short)} or {', '.join(classes)}; got {name!r}"


def _check_world(config: HostConfig, world_size: int) -> None:
    """The plan must fit the world size; each backend's own arithmetic is in `PLANS`."""
    check = PLANS.get(config.backend)
    if check is not None:
        check(config, world_size)


def asyncdiff_model_n(config: HostConfig, world_size: int) -> int:
    """Number of stages: world size = (model_n + stride - 1) x (2 with use_cfg_parallel).

    Raises:
        UsageError: where the world size and the flags do not fit each other.
    """
    branches = 2 if config.use_cfg_parallel else 1
    if world_size == 1:
        if config.model_n not in (None, 1) or config.stride != 1 or config.use_cfg_parallel:
            raise UsageError(
                f"--model_n={config.model_n or 2} --stride={config.stride} needs "
                f"{branches * ((config.model_n or 2) + config.stride - 1)} ranks; the world size is 1 "
                "(start it under torchrun --nproc_per_node=N)"
            )
        return 1
    least, most = (1 if config.use_cfg_parallel else 2), 4
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
    if config.use_cfg_parallel and model_n == 1 and config.stride == 2:
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


PLANS: dict[str, Callable[[HostConfig, int], None]] = {"asyncdiff": _check_asyncdiff}


def default_of(name: str) -> Any:
    """The default of one flag."""
    f = next(f for f in fields(HostConfig) if f.name == name)
    return None if f.default is MISSING else f.default
