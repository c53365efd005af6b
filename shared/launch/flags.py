"""The flags: each with its default, help and bounds, as a field of one frozen dataclass.

`HostConfig` holds the defaults; shared.launch.parser shows them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from shared.launch.file_header import index_of, position_table
from shared.launch.values import (
    as_count_or_auto,
    as_counts,
    as_folders,
    as_hosts,
    as_integer,
    as_json_object,
    as_networks,
    as_origins,
    as_scales,
    as_scales_or_path,
    as_scheduler,
    as_seconds,
    as_sizes,
    as_step_cache,
    as_text,
    as_weights,
)
from shared.models import MODELS, Cache, CacheSettings, ModelSpec

DECODED_ALONE = 1024 * 1024
"""Pixels up to which a rank decodes by itself where nothing else is asked for."""


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


COMPUTED = {"float8": "float8_weight", "int8": "int8_weight"}
"""Of --quantize_to: what also computes in 8 bits, and what only keeps weights as small."""


@dataclass(frozen=True)
class HostConfig:
    """One launch. Field names are flag names (PROTOCOL: command line); None means "not given"."""

    backend: str = field(default="", metadata={})
    in_16_bits: frozenset[str] = field(default=frozenset(), metadata={})
    """No flag: layers that --quantize_to leaves as they are since 8 bits are slower here, by component."""

    type: str = _flag("", _MODEL, "model type", as_text)
    checkpoint: str = _flag("", _MODEL, "diffusers folder or single .safetensors file", as_text, path=True)
    variant: str | None = _flag(
        None,
        _MODEL,
        "dtype of weights and computation (default: fp16 on GPUs, fp32 on CPUs)",
        as_text,
        choices=("fp16", "bf16", "fp32"),
    )
    height: int | None = _flag(
        None, _MODEL, "default height, pixels (default: the type's)", as_integer, least=16, most=8192
    )
    width: int | None = _flag(
        None, _MODEL, "default width, pixels (default: the type's)", as_integer, least=16, most=8192
    )
    scheduler: str | dict[str, Any] | None = _flag(
        None, _MODEL, "short name, diffusers class or JSON (default: the checkpoint's)", as_scheduler
    )
    refiner: str | None = _flag(
        None,
        _MODEL,
        "the model's refiner, a diffusers folder or single .safetensors file, for the end of the schedule",
        as_text,
        path=True,
    )
    vae: str | None = _flag(None, _MODEL, "VAE to use instead of the checkpoint's", as_text, path=True)
    gguf_model: str | None = _flag(None, _MODEL, "GGUF file for the denoiser", as_text, path=True)
    quantize_to: str | None = _flag(
        None,
        _MODEL,
        "quantize denoiser and text encoders; float8 and int8 also compute in 8 bits, compiled, where the "
        "GPU can",
        as_text,
        choices=("float8", "int8", "float8_weight", "int8_weight", "int4", "int2"),
    )

    lora: dict[str, float] | None = _flag(None, _FEATURES, 'LoRAs, {"path": scale}', as_scales, path=True)
    lora_dir: tuple[str, ...] | None = _flag(
        None,
        _FEATURES,
        "folders whose LoRAs clients may use by name; separated by commas, or repeat the flag",
        as_folders,
        path=True,
        several=True,
    )
    embeddings_dir: tuple[str, ...] | None = _flag(
        None,
        _FEATURES,
        "folders of textual inversion embeddings, whose file names are words in prompts; separated by commas",
        as_folders,
        path=True,
        several=True,
    )
    allow_lora_paths: bool = _flag(
        False, _FEATURES, "let clients add any LoRA file on the server by its path (POST /lora)"
    )
    control_net: dict[str, float] | None = _flag(
        None, _FEATURES, 'ControlNets, path or {"path": scale}', as_scales_or_path, path=True
    )
    ip_adapter: dict[str, float] | None = _flag(
        None, _FEATURES, 'IP-Adapter, {"path": scale}', as_scales, path=True
    )
    motion_module: str | None = _flag(
        None, _FEATURES, "AnimateDiff motion module, a single file", as_text, path=True
    )
    motion_adapter: str | None = _flag(
        None, _FEATURES, "AnimateDiff motion adapter, a diffusers folder", as_text, path=True
    )
    motion_adapter_lora: dict[str, float] | None = _flag(
        None, _FEATURES, 'motion LoRAs, {"path": scale}', as_scales, path=True
    )
    compel: bool = _flag(False, _FEATURES, "prompt weighting and long prompts through compel")

    compile_unet: bool = _flag(False, _COMPILE, "compile the denoiser (UNet or transformer)")
    compile_vae: bool = _flag(False, _COMPILE, "compile the VAE")
    compile_text_encoder: bool = _flag(False, _COMPILE, "compile the text encoders")
    compile_backend: str | None = _flag(
        None, _COMPILE, "torch.compile's backend (default: inductor)", as_text
    )
    compile_mode: str | None = _flag(
        None,
        _COMPILE,
        "torch.compile's mode",
        as_text,
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    compile_options: dict[str, Any] | None = _flag(
        None, _COMPILE, "torch.compile's options, JSON", as_json_object
    )
    compile_fullgraph_off: bool = _flag(False, _COMPILE, "allow graph breaks")

    sizes: tuple[tuple[int, int], ...] | None = _flag(
        None,
        _COMPILE,
        "more sizes that are warmed at start (compiled, captured), in pixels, such as 1024x1024,832x1216",
        as_sizes,
    )

    enable_vae_tiling: bool = _flag(False, _MEMORY, "decode in tiles, with less memory")
    enable_vae_slicing: bool = _flag(False, _MEMORY, "decode pictures of a batch one by one")
    shard_weights: bool = _flag(
        False,
        _MEMORY,
        "keep a part of the weights of all models on each rank, and decode on all of them",
    )
    xformers_efficient: bool = _flag(
        False, _MEMORY, "use the attention of the xformers package (needs a GPU)"
    )
    enable_model_cpu_offload: bool = _flag(False, _MEMORY, "keep idle models in CPU memory (needs a GPU)")
    enable_sequential_cpu_offload: bool = _flag(
        False, _MEMORY, "keep idle layers in CPU memory (needs a GPU)"
    )
    enable_group_offload: bool = _flag(
        False, _MEMORY, "keep idle groups of layers in CPU memory (needs a GPU)"
    )
    fit: bool = _flag(
        False, _MEMORY, "choose the flags that make the launch fit the memory, the cheapest first"
    )

    warm_up_steps: int | str | None = _flag(
        None,
        _PARALLEL,
        "synchronous steps before stale activations are used (default: a sixth of the steps, 1 to 3); "
        "auto: until predictions change little from step to step, and again when they do not",
        as_count_or_auto,
        least=0,
        most=1000,
        aliases=("warm_up", "warmup_steps"),
    )
    preset: str | None = _flag(
        None,
        _PARALLEL,
        "flags for this type and number of ranks, which are printed; flags that are given win",
        as_text,
        choices=("fast", "balanced", "exact"),
    )
    device: str = _flag("auto", _PARALLEL, "where to compute", as_text, choices=("auto", "cuda", "cpu"))
    model_n: int | None = _method_flag(
        None, "stages of the denoiser (default: from the world size)", as_integer, least=1, most=4
    )
    stride: int = _method_flag(1, "steps served by one parallel batch", as_integer, least=1, most=2)
    async_steps: int | str | None = _method_flag(
        None,
        "asynchronous steps after the warm-up, then exact ones (default: all); with --use_cfg_parallel on 2 "
        "ranks: steps in which both share one guidance branch (default: none); auto: those in which little "
        "changes, by what is measured meanwhile",
        as_count_or_auto,
        least=1,
        most=1000,
    )
    time_shift: bool = _method_flag(False, "use the time embedding of the previous step")
    stage_weights: tuple[float, ...] | None = _method_flag(
        None, "relative speed of each stage's GPU, such as 1,1,0.5", as_weights
    )
    auto_balance: bool = _method_flag(
        False, "balance the stages by the measured time of each part and the speed of each GPU"
    )
    parallelism: str = _method_flag(
        "patch", "how the work is divided", as_text, choices=("patch", "tensor", "naive_patch")
    )
    split_scheme: str = _method_flag(
        "row",
        "how pictures are cut into patches: rows, columns, or alternating (naive_patch)",
        as_text,
        choices=("row", "col", "alternate"),
    )
    sync_mode: str = _method_flag(
        "corrected_async_gn",
        "what is exchanged after warm-up",
        as_text,
        choices=("corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "full_sync", "no_sync"),
    )
    no_split_batch: bool = _method_flag(False, "do not put the guidance branches on different ranks")
    use_cfg_parallel: bool = _method_flag(False, "run the two guidance branches on two halves of the ranks")
    no_cuda_graph: bool = _method_flag(False, "do not capture steps as CUDA graphs")
    ulysses_degree: int | None = _method_flag(
        None,
        "Ulysses: parts of the sequence, exchanged for attention heads (default: what divides the heads)",
        as_integer,
        least=1,
        most=8,
    )
    ring_degree: int | None = _method_flag(
        None,
        "ring attention: parts of the sequence, keys and values passed around (default: the remaining ranks)",
        as_integer,
        least=1,
        most=8,
    )
    pipefusion_parallel_degree: int | None = _method_flag(
        None,
        "PipeFusion stages; asynchronous after --warm_up_steps (default: 1)",
        as_integer,
        least=1,
        most=8,
    )
    tensor_parallel_degree: int | None = _method_flag(
        None,
        "tensor parallelism: parts of the feed-forward layers, type flux only (default: 1)",
        as_integer,
        least=1,
        most=8,
    )
    data_parallel_degree: int | None = _method_flag(
        None, "pictures of one request made at the same time (default: 1)", as_integer, least=1, most=8
    )
    num_pipeline_patch: int | None = _method_flag(
        None, "patches of PipeFusion (default: as many as stages)", as_integer, least=1, most=64
    )
    attn_layer_num_for_pp: tuple[int, ...] | None = _method_flag(
        None, "transformer blocks of each PipeFusion stage, such as 10,9 (default: equal)", as_counts
    )
    use_parallel_vae: bool = _method_flag(
        False, "decode in parts, one on each rank that shares the picture or video"
    )
    exchange_dtype: str | None = _method_flag(
        None,
        "send what attention exchanges in fewer bits, an approximation: int8, float8, or int4 for its "
        "difference to the step before (DistriFusion); auto: int8 where the measured link is slow "
        "(default: as it is)",
        as_text,
        choices=("int8", "float8", "int4", "auto"),
    )
    step_cache: CacheSettings | None = _method_flag(
        None,
        "leave out the blocks of steps in which little changes, an approximation: fbcache or teacache (flux, "
        "kontext), with a threshold such as fbcache:0.12; magcache:0.06; taylorseer:5, which computes one of "
        "5 steps; mask:1101, which computes those with 1; or JSON with more settings. UNets: deepcache:3, "
        "which computes the deep layers in one of 3 steps, or mask",
        as_step_cache,
    )
    use_teacache: bool = _method_flag(False, "short for --step_cache=teacache (flux, kontext)")
    use_fbcache: bool = _method_flag(False, "short for --step_cache=fbcache")

    port: int = _flag(6000, _HOST, "port that rank 0 listens on", as_integer, least=1, most=65535)
    host: str = _flag("127.0.0.1", _HOST, "address that rank 0 listens on", as_text)
    max_queue: int = _flag(
        16, _HOST, "requests that may wait; further ones are answered 503", as_integer, least=0, most=1024
    )
    max_queue_per_client: int | None = _flag(
        None,
        _HOST,
        "requests of one client that may wait; further ones are answered 429 (default: --max_queue)",
        as_integer,
        least=1,
        most=1024,
    )
    request_timeout: float = _flag(
        1800.0,
        _HOST,
        "seconds that one request may run, with all of its pictures; then it is answered 504",
        as_seconds,
    )
    collective_timeout: float = _flag(
        300.0, _HOST, "seconds that a rank waits for another before the host is broken", as_seconds
    )
    stop_grace: float = _flag(
        20.0, _HOST, "seconds that the running request may still take after a first SIGTERM", as_seconds
    )
    log_level: str = _flag(
        "info", _HOST, "log detail", as_text, choices=("debug", "info", "warning", "error")
    )
    log_json: bool = _flag(False, _HOST, "log as JSON lines")
    api_key: str | None = _flag(
        None,
        _HOST,
        "bearer token required on every route except /health; other users of the machine can see it in ps: "
        "use --api_key_file or the variable MULTIGPU_DIFFUSION_API_KEY there",
        as_text,
    )
    api_key_file: str | None = _flag(None, _HOST, "file that contains the API key", as_text, path=True)
    trusted_hosts: tuple[str, ...] | None = _flag(
        None,
        _HOST,
        "more host names under which clients reach this host, separated by commas; * for any",
        as_hosts,
    )
    allow_origin: tuple[str, ...] | None = _flag(
        None,
        _HOST,
        "origins of other web pages that may call this host (CORS), separated by commas; * for any",
        as_origins,
    )
    trusted_proxies: tuple[str, ...] | None = _flag(
        None,
        _HOST,
        "addresses or networks of proxies whose X-Forwarded-For is believed, separated by commas: clients "
        "behind them then take turns (default: none)",
        as_networks,
    )
    max_pixel_steps: int = _flag(
        10**10,
        _HOST,
        "most width x height x frames x steps of one picture; above it 422",
        as_integer,
        least=1,
    )
    cache_dir: str | None = _flag(
        None,
        _HOST,
        "folder for what a second start need not make again: bytecode, compiled code, quantized and "
        "converted weights, hashes of files (default: multigpu_diffusion in the user's cache folder)",
        as_text,
        path=True,
    )
    state_dir: str | None = _flag(
        None,
        _HOST,
        "folder where accepted requests and their answers are kept, so that they outlive the host "
        "(default: in memory)",
        as_text,
        path=True,
    )
    keep_jobs: float | None = _flag(
        None,
        _HOST,
        "seconds that finished requests are kept for GET /jobs (default: an hour, with --state_dir a day)",
        as_seconds,
    )
    keep_bytes: int | None = _flag(
        None,
        _HOST,
        "bytes that the answers of finished requests may take; the oldest are forgotten first (default: "
        "256 MiB, with --state_dir 4 GiB)",
        as_integer,
        least=1,
    )
    legacy_pickle: bool = _flag(
        False, _HOST, "accept and send base64(pickle), for the original project's clients"
    )

    def shards(self, world_size: int) -> tuple[str, ...]:
        """The models of which each rank keeps a part, by the names of their components."""
        if not self.shard_weights or world_size == 1:
            return ()
        divided = self.decode_from is not None and self.spec.decodes_in_patches
        vae = ("vae",) if divided else ()
        return (*self.spec.denoisers, "controlnet", *self.spec.text_encoders, "image_encoder", *vae)

    @property
    def decode_from(self) -> int | None:
        """Pixels of a call of the VAE from which all ranks decode it in parts; None: never."""
        by_layer = self.enable_sequential_cpu_offload or self.enable_group_offload
        if self.compile_vae or by_layer:
            return None
        return 0 if self.shard_weights or self.use_parallel_vae else DECODED_ALONE + 1

    def decode_pixels(self, width: int | None, height: int | None, frames: int | None) -> int:
        """Pixels of what a request gets, with the launch's size where it has none."""
        sides = (width or self.size[0]) * (height or self.size[1]) * self.spec.size_scale**2
        return sides * (frames or self.spec.frames or 1)

    def decode_parts(self, ranks: int) -> int:
        """Over how many of so many ranks decoding is divided, at the launch's size."""
        least = self.decode_from
        return 1 if least is None or self.decode_pixels(None, None, None) < least else ranks

    @property
    def spec(self) -> ModelSpec:
        """The type, as the checkpoint has it."""
        spec = MODELS[self.type]
        index = index_of(self.checkpoint) if spec.variants else None
        return spec.of_checkpoint(index) if isinstance(index, dict) else spec

    def changed(self, *flags: str) -> list[str]:
        """Those of the flags that are not at their defaults."""
        defaults = {f.name: f.default for f in fields(self)}
        return [flag for flag in flags if getattr(self, flag) != defaults[flag]]

    @property
    def refiner_id(self) -> str | None:
        """The refiner's name, as the checkpoint's."""
        return Path(self.refiner).name.removesuffix(".safetensors") if self.refiner else None

    @property
    def model_id(self) -> str:
        """The checkpoint's name, without folder and suffix."""
        return Path(self.checkpoint).name.removesuffix(".safetensors") or self.type

    @property
    def offloads(self) -> bool:
        """Whether whole models or layers come and go; sharded ones stay where they are."""
        whole = self.enable_model_cpu_offload and not self.shard_weights
        return whole or self.enable_sequential_cpu_offload or self.enable_group_offload

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is used, or is on a device that computes in 8 bits."""
        asked = self.compile_unet or self.compile_vae or self.compile_text_encoder
        return asked or self.quantize_to in COMPUTED

    @property
    def cache(self) -> CacheSettings | None:
        """The step cache, by whichever flag."""
        short: Cache | None = "teacache" if self.use_teacache else "fbcache" if self.use_fbcache else None
        return self.step_cache or (CacheSettings(short) if short else None)

    def captures(self, device_type: str) -> bool:
        """Whether steps are captured as CUDA graphs, which hold on to addresses that offloading changes."""
        return device_type == "cuda" and not self.no_cuda_graph and not self.offloads

    def keeps_weights(self, ranks: int) -> bool:
        """Whether weights stay whole and in place; sharded and offloaded ones come when a block is called."""
        return not self.offloads and not (self.shard_weights and ranks > 1)

    def joins(self, device_type: str, ranks: int) -> bool:
        """Whether layers of one input are one product: on CPUs weights may be pages of a file that all ranks
        share, and one product is no faster than three."""
        return device_type == "cuda" and self.keeps_weights(ranks)

    @property
    def position_table(self) -> tuple[int, int] | None:
        """Tokens a side that the checkpoint has positions for, and pixels a side of one; None: any size."""
        return position_table(self.type, self.checkpoint, tuple(self.control_net or ()))

    @property
    def size(self) -> tuple[int, int]:
        """Default (width, height) of a picture, pixels."""
        return self.width or self.spec.width, self.height or self.spec.height
