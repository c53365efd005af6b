"""The flags: every one with its default, its help and its bounds, as fields of one frozen dataclass.

`HostConfig` owns the defaults; shared.launch.parser quotes them. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from shared.launch.logs import on_terminal
from shared.models import MODELS, ModelSpec

NOT_NUMBERS = (ValueError, TypeError, OverflowError)


def _number(value: Any) -> float:
    """A finite number. Raises one of NOT_NUMBERS."""
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _json(text: str) -> Any:
    """Raises ValueError, for NaN (which JSON has not) and for what is nested too deeply as well."""
    try:
        return json.loads(text, parse_constant=_number)
    except RecursionError:
        raise ValueError from None


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
        seconds = _number(value)
    except NOT_NUMBERS:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError("a number of seconds above 0")
    return seconds


def _folders(value: Any) -> tuple[str, ...]:
    """Folders: a list, or a text with commas between; each text of a list may be either."""
    given = value if isinstance(value, list | tuple) else [value]
    if not given or not all(isinstance(text, str) and text.strip() for text in given):
        raise ValueError("folders with commas between")
    return tuple(part.strip() for text in given for part in text.split(",") if part.strip())


def _scales(value: Any) -> dict[str, float]:
    """JSON `{"path": scale, ...}`."""
    wanted = 'JSON such as {"path": 1.0}'
    try:
        data = _json(value) if isinstance(value, str) else value
        scales = {str(path): _number(scale) for path, scale in data.items()}
        if len(scales) != len(data) or not scales:
            raise ValueError
    except (*NOT_NUMBERS, AttributeError):
        raise ValueError(wanted) from None
    return scales


def _scales_or_path(value: Any) -> dict[str, float]:
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        return {_text(value): 1.0}
    return _scales(value)


def _json_object(value: Any) -> dict[str, Any]:
    try:
        data = _json(value) if isinstance(value, str) else value
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
        weights = tuple(_number(w) for w in data)
    except NOT_NUMBERS:
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
    common: bool = True,
    path: bool = False,
    several: bool = False,
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
        common=common,
        path=path,
        several=several,
    )
    return field(default=default, metadata=meta)


def _counts(value: Any) -> tuple[int, ...]:
    try:
        data = value if isinstance(value, list | tuple) else str(value).strip("[]").split(",")
        counts = tuple(int(str(n)) for n in data)
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ValueError("whole numbers above 0 with commas between, such as 10,9")
    return counts


def _names(value: Any) -> tuple[str, ...]:
    """Names with commas between, or a list of YAML."""
    names = value if isinstance(value, list | tuple) else str(value).split(",")
    names = tuple(str(name).strip() for name in names)
    if not all(names):
        raise ValueError("names with commas between")
    return names


def _hosts(value: Any) -> tuple[str, ...]:
    names = _names(value)
    if any("/" in name for name in names):
        raise ValueError("names without http:// and path, such as gpu.example.org")
    return names


def _origins(value: Any) -> tuple[str, ...]:
    origins = _names(value)
    if not all(o in ("*", "null") or re.fullmatch(r"[\w.+-]+://[^/]+/?", o) for o in origins):
        raise ValueError("pages such as https://app.example.org, without a path; or *")
    return origins


_HOST, _MODEL, _FEATURES, _COMPILE, _MEMORY, _PARALLEL = (
    "serving",
    "model",
    "features",
    "compile",
    "memory",
    "parallel",
)


def _method_flag(default: Any, help: str, parse: Callable[[Any], Any] | None = None, **bounds: Any) -> Any:
    """A flag that belongs to the backends which name it among theirs (shared.launch.backend)."""
    return _flag(default, _PARALLEL, help, parse, common=False, **bounds)


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
    lora_dir: tuple[str, ...] | None = _flag(
        None,
        _FEATURES,
        "folders whose LoRAs clients may name; commas between, or the flag again",
        _folders,
        path=True,
        several=True,
    )
    allow_lora_paths: bool = _flag(
        False, _FEATURES, "let clients add any LoRA file of the server by its path (POST /lora)"
    )
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
    model_n: int | None = _method_flag(
        None, "stages of the denoiser (default: from the world size)", _integer, least=1, most=4
    )
    stride: int = _method_flag(1, "steps served by one parallel batch", _integer, least=1, most=2)
    async_steps: int | None = _method_flag(
        None,
        "asynchronous steps after the warm-up, then exact ones (default: all); with --use_cfg_parallel on 2 "
        "ranks: steps in which both share one guidance branch (default: none)",
        _integer,
        least=1,
        most=1000,
    )
    time_shift: bool = _method_flag(False, "use the time embedding of the step before")
    stage_weights: tuple[float, ...] | None = _method_flag(
        None, "relative speed of each stage's GPU, 1,1,0.5", _weights
    )
    auto_balance: bool = _method_flag(False, "cut by the measured time of each part and speed of each GPU")
    parallelism: str = _method_flag(
        "patch", "how the work is divided", _text, choices=("patch", "tensor", "naive_patch")
    )
    split_scheme: str = _method_flag(
        "row",
        "how pictures are cut into patches: rows, columns, or by turns (naive_patch)",
        _text,
        choices=("row", "col", "alternate"),
    )
    sync_mode: str = _method_flag(
        "corrected_async_gn",
        "what is exchanged after warm-up",
        _text,
        choices=("corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "full_sync", "no_sync"),
    )
    no_split_batch: bool = _method_flag(False, "do not put the guidance branches on different ranks")
    use_cfg_parallel: bool = _method_flag(False, "guidance branches on two halves of the ranks")
    no_cuda_graph: bool = _method_flag(False, "do not capture steps")
    ulysses_degree: int | None = _method_flag(
        None,
        "parts of the sequence, exchanged for attention heads (default: what the heads divide)",
        _integer,
        least=1,
        most=8,
    )
    ring_degree: int | None = _method_flag(
        None,
        "parts of the sequence, keys and values handed around (default: what is left)",
        _integer,
        least=1,
        most=8,
    )
    pipefusion_parallel_degree: int | None = _method_flag(
        None, "PipeFusion stages; asynchronous after --warm_up_steps (default: 1)", _integer, least=1, most=8
    )
    tensor_parallel_degree: int | None = _method_flag(
        None, "parts of the feed-forward layers, type flux (default: 1)", _integer, least=1, most=8
    )
    data_parallel_degree: int | None = _method_flag(
        None, "pictures of one request made at the same time (default: 1)", _integer, least=1, most=8
    )
    num_pipeline_patch: int | None = _method_flag(
        None, "patches of PipeFusion (default: as many as stages)", _integer, least=1, most=64
    )
    attn_layer_num_for_pp: tuple[int, ...] | None = _method_flag(
        None, "transformer blocks of each PipeFusion stage, 10,9 (default: equal)", _counts
    )
    use_parallel_vae: bool = _method_flag(
        False, "decode in patches, one on each rank that shares the picture"
    )
    use_teacache: bool = _method_flag(False, "leave out steps in which little changes, TeaCache (flux)")
    use_fbcache: bool = _method_flag(
        False, "leave out steps in which little changes, first-block cache (flux)"
    )

    port: int = _flag(6000, _HOST, "port that rank 0 serves", _integer, least=1, most=65535)
    host: str = _flag("127.0.0.1", _HOST, "address that rank 0 serves", _text)
    max_queue: int = _flag(16, _HOST, "requests that may wait, then 503", _integer, least=0, most=1024)
    request_timeout: float = _flag(
        1800.0, _HOST, "seconds that one request may run, with all of its pictures, then 504", _seconds
    )
    collective_timeout: float = _flag(
        300.0, _HOST, "seconds that a rank waits for another before the job is broken", _seconds
    )
    stop_grace: float = _flag(
        20.0, _HOST, "seconds that the running request may take to end after a first SIGTERM", _seconds
    )
    log_level: str = _flag("info", _HOST, "log detail", _text, choices=("debug", "info", "warning", "error"))
    log_json: bool = _flag(False, _HOST, "log as JSON lines")
    api_key: str | None = _flag(
        None,
        _HOST,
        "bearer token asked of every route but /health; other users of the machine can see it in ps, unlike "
        "--api_key_file and the variable MULTIGPU_DIFFUSION_API_KEY",
        _text,
    )
    api_key_file: str | None = _flag(None, _HOST, "file that holds the api_key", _text, path=True)
    trusted_hosts: tuple[str, ...] | None = _flag(
        None, _HOST, "more names under which clients reach this host, with commas between; * for any", _hosts
    )
    allow_origin: tuple[str, ...] | None = _flag(
        None,
        _HOST,
        "pages elsewhere that may call this host (Origin, CORS), commas between; * for any",
        _origins,
    )
    max_pixel_steps: int = _flag(
        10**10, _HOST, "width x height x frames x steps of one picture, then 422", _integer, least=1
    )
    legacy_pickle: bool = _flag(False, _HOST, "base64(pickle) for the original project's clients")

    @property
    def spec(self) -> ModelSpec:
        return MODELS[self.type]

    def changed(self, *flags: str) -> list[str]:
        """Those of the flags that are not at their defaults."""
        defaults = {f.name: f.default for f in fields(self)}
        return [flag for flag in flags if getattr(self, flag) != defaults[flag]]

    @property
    def model_id(self) -> str:
        """The checkpoint's name, without folder and suffix."""
        return Path(self.checkpoint).name.removesuffix(".safetensors") or self.type

    @property
    def offloads(self) -> bool:
        """Whether any kind of CPU offload is on."""
        return (
            self.enable_model_cpu_offload or self.enable_sequential_cpu_offload or self.enable_group_offload
        )

    def captures(self, device_type: str) -> bool:
        """Whether steps are captured as CUDA graphs, which hold on to addresses that offloading changes."""
        return device_type == "cuda" and not self.no_cuda_graph and not self.offloads

    def shows_progress(self, rank: int) -> bool:
        """Whether this rank shows progress bars: on a terminal, where they are no JSON lines, no warnings."""
        return rank == 0 and on_terminal() and not self.log_json and self.log_level in ("info", "debug")

    @property
    def size(self) -> tuple[int, int]:
        """Default (width, height) of a picture, pixels."""
        return self.width or self.spec.width, self.height or self.spec.height
