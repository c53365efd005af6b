"""The flags and degrees of xdit_host.py, and which of them conflict. Without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shared.backends.xdit_cost import SCALE_BYTES, Choice, Speeds, choose, step_of
from shared.launch.errors import UsageError
from shared.launch.file_header import config_folder
from shared.launch.flags import HostConfig
from shared.models import MODELS, ModelSpec, StagePlan, TokenPlan, scheduler_named
from shared.parallel.xdit.degrees import (
    Degrees,
    DegreesError,
    choose_degrees,
    fitting_sizes,
    patch_count,
    scheduler_problem,
    stages_problem,
)

DEGREES = {
    "data": "data_parallel_degree",
    "cfg": "use_cfg_parallel",
    "pipefusion": "pipefusion_parallel_degree",
    "ring": "ring_degree",
    "ulysses": "ulysses_degree",
    "tensor": "tensor_parallel_degree",
}
"""Field of Degrees -> its flag."""
FLAGS = frozenset(
    {
        *DEGREES.values(),
        "num_pipeline_patch",
        "attn_layer_num_for_pp",
        "use_parallel_vae",
        "exchange_dtype",
        "no_cuda_graph",
        "step_cache",
        "use_teacache",
        "use_fbcache",
    }
)

PLANS: Mapping[str, TokenPlan] = {name: spec.tokens for name, spec in MODELS.items() if spec.tokens}
TYPES = tuple(sorted(PLANS))
"""The types whose transformer has a token plan."""


def _refused(spec: ModelSpec, plan: TokenPlan) -> Iterator[tuple[str, str]]:
    """The flags that a type's transformer or VAE does not support, and why."""

    def types(fitting: Callable[[TokenPlan], Any]) -> str:
        return ", ".join(name for name in TYPES if fitting(PLANS[name]))

    if plan.branches == 1:
        yield "use_cfg_parallel", "its transformer has only one guidance branch"
    if not plan.tensor:
        have = types(lambda other: other.tensor)
        yield "tensor_parallel_degree", f"xDiT has no tensor parallelism for it; types with it: {have}"
    if "teacache" not in plan.caches:
        have = types(lambda other: "teacache" in other.caches)
        yield "use_teacache", f"nobody has measured TeaCache's polynomial for it; types with it: {have}"
    if plan.stages is None:
        have = types(lambda other: other.stages)
        yield "pipefusion_parallel_degree", f"xfuser has no PipeFusion stages for it; types with them: {have}"
    elif plan.stages.equal:
        yield "attn_layer_num_for_pp", "its skip connections need equal stages"


REFUSES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {name: MappingProxyType(dict(_refused(MODELS[name], plan))) for name, plan in PLANS.items()}
)


def xdit_degrees(config: HostConfig, world_size: int) -> Degrees:
    """How xDiT divides the ranks. Raises UsageError where the flags and the world size do not fit."""
    given = {name: getattr(config, flag) for name, flag in DEGREES.items() if getattr(config, flag)}
    if "cfg" in given:
        given["cfg"] = 2
    tokens = tokens_of(config)
    heads = _number(_denoiser(config), tokens.heads)
    nets = {
        path: _number(_read(Path(path) / "config.json"), tokens.heads) for path in config.control_net or ()
    }
    ulysses = given.get("ulysses", 1)
    for path, found in nets.items():
        if found and found % ulysses:
            raise UsageError(
                f"--ulysses_degree: must divide the {found} attention heads of --control_net {path!r}; got "
                f"{ulysses}"
            )
    if heads and "ulysses" not in given:
        heads = math.gcd(heads, *(found for found in nets.values() if found))
    try:
        return choose_degrees(world_size, given, 1 if tokens.unguided else tokens.branches, heads)
    except DegreesError as error:
        asked = [f"--{DEGREES[name]}={value}" for name, value in error.asked.items()]
        first = DEGREES[next(iter(error.asked), "ulysses")]
        got = ", ".join(asked) or "no degree"
        raise UsageError(f"--{first}: {error.must}; got {got}{error.more}") from None


def link_choice(config: HostConfig, world_size: int, link: Speeds, device_type: str) -> Choice | None:
    """What the measured link makes of this launch; None where nothing is to be chosen or known.

    `exchange_dtype` "auto" counts as not given.
    """
    degrees = xdit_degrees(config, world_size)
    if degrees.sequence == 1 or not degrees.exact:
        return None
    itemsize = 4 if config.variant == "fp32" or (config.variant is None and device_type == "cpu") else 2
    settings, tokens = _denoiser(config), tokens_of(config)
    sent = 1.0
    if config.exchange_dtype in ("int8", "float8") and settings.get(tokens.heads):
        channels = max(tokens.head_channels(settings), 1)
        sent = (channels + SCALE_BYTES) / channels / itemsize
    step = step_of(config, settings, _read(_folder(config, "vae") / "config.json"), itemsize, sent)
    if step is None:
        return None
    free = not config.ulysses_degree and not config.ring_degree
    heads = _number(settings, tokens.heads)
    return choose(step, link, degrees, free and heads is not None and not config.control_net, heads)


def tokens_of(config: HostConfig) -> TokenPlan:
    """The token plan of the launch's type; all types of xdit have one."""
    assert config.spec.tokens is not None
    return config.spec.tokens


def _cut_of(config: HostConfig) -> StagePlan:
    """How PipeFusion cuts the transformer; types without a plan are refused before."""
    cut = tokens_of(config).stages
    assert cut is not None
    return cut


def _folder(config: HostConfig, name: str) -> Path:
    """Where the configuration of this component is, as shared.pipeline.loading looks for it."""
    checkpoint = Path(config.checkpoint)
    place = config_folder(config.spec, checkpoint, name) if checkpoint.is_file() else checkpoint
    return place / name


def _denoiser(config: HostConfig) -> dict[str, Any]:
    return _read(_folder(config, config.spec.denoiser) / "config.json")


def _read(path: Path) -> dict[str, Any]:
    """A configuration; empty if it cannot be read, which the loader reports."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _number(settings: dict[str, Any], name: str) -> int | None:
    value = settings.get(name)
    return value if isinstance(value, int) else None


def _scheduler(config: HostConfig) -> tuple[str, dict[str, Any]]:
    """Class and settings of the launch's scheduler: the checkpoint's, changed by the flag."""
    settings = _read(_folder(config, "scheduler") / "scheduler_config.json")
    if config.scheduler is None:
        return str(settings.get("_class_name", "")), settings
    given = dict(config.scheduler) if isinstance(config.scheduler, dict) else {"scheduler": config.scheduler}
    name = given.pop("scheduler")
    if (found := scheduler_named(name)) is None:
        return name, settings | given
    entry, variant = found
    return entry.cls, settings | dict(entry.settings) | dict(variant) | given


def check(config: HostConfig, world_size: int) -> None:
    """Refuse what xDiT cannot do with these flags and so many ranks. Raises UsageError."""
    for flag, reason in _refused(config.spec, tokens_of(config)):
        value = getattr(config, flag)
        if value and (value is True or value != 1):  # a degree of 1 divides nothing
            raise UsageError(f"--{flag}: not supported for type {config.type} on xdit_host.py: {reason}")
    degrees = xdit_degrees(config, world_size)
    for flag, value, wrong in _xdit_conflicts(config, degrees):
        if value:
            raise UsageError(f"--{flag}: {wrong}")
    unit = config.spec.size_multiple * degrees.sequence
    if degrees.pipefusion > 1 and config.size[1] % unit:
        raise UsageError(
            f"--height: must be a multiple of {unit} with {degrees}; got {config.size[1]} "
            f"(nearest: {fitting_sizes(config.size[1], unit)})"
        )
    if problem := _one_patch(config, degrees):
        patches = config.num_pipeline_patch or degrees.pipefusion
        if patch_count(config.size[1], patches, degrees.sequence) == 1:
            raise UsageError(
                f"--height: must be {2 * unit} or more with {degrees}; {config.size[1]} makes 1 patch: "
                f"{problem}"
            )


def _one_patch(config: HostConfig, degrees: Degrees) -> str | None:
    """Why PipeFusion needs more than one patch, or None."""
    shared = degrees.pipefusion > 1 and degrees.sequence > 1
    return _cut_of(config).one_patch if shared else None


def _xdit_conflicts(config: HostConfig, degrees: Degrees) -> Iterator[tuple[str, Any, str]]:
    """(flag, whether it is in the way, why) for the flags that these degrees do not support."""
    pipefusion, tensor = degrees.pipefusion > 1, degrees.tensor > 1
    cache = config.cache
    no_pipefusion = "needs PipeFusion: --pipefusion_parallel_degree of 2 or more"
    yield "num_pipeline_patch", config.num_pipeline_patch and not pipefusion, no_pipefusion
    stages = config.attn_layer_num_for_pp
    yield "attn_layer_num_for_pp", stages and not pipefusion, no_pipefusion
    yield (
        "attn_layer_num_for_pp",
        stages and len(stages) != degrees.pipefusion,
        f"must be one number for each of the {degrees.pipefusion} stages; got {len(stages or ())}",
    )
    if pipefusion:
        yield from _pipefusion_conflicts(config, degrees)
    yield (
        "warm_up_steps",
        pipefusion and config.warm_up_steps in (0, "auto"),
        f"must be a number of at least 1 with PipeFusion (the first step fills the buffers); got "
        f"{config.warm_up_steps}",
    )
    for flag in ("control_net", "ip_adapter"):
        yield (
            flag,
            pipefusion and getattr(config, flag),
            f"not supported with PipeFusion ({degrees}); the other methods support it",
        )
    for flag in ("enable_sequential_cpu_offload", "enable_group_offload"):
        why = "not supported with PipeFusion, whose layers read weights; use --enable_model_cpu_offload"
        yield flag, pipefusion and getattr(config, flag), why
    yield "pipefusion_parallel_degree", pipefusion and tensor, "not supported with --tensor_parallel_degree"
    for flag in ("quantize_to", "gguf_model", "compile_unet"):
        why = "not supported with --tensor_parallel_degree, which divides plain weights in memory"
        yield flag, tensor and getattr(config, flag), why
    yield (
        "tensor_parallel_degree",
        tensor and config.offloads,
        "not supported with CPU offload, as it divides weights in memory",
    )
    given = [flag for flag in ("step_cache", "use_teacache", "use_fbcache") if getattr(config, flag)]
    yield given[-1] if given else "step_cache", len(given) > 1, f"give only one cache; got {len(given)} flags"
    if cache is not None:
        problem = tokens_of(config).cache_problem(cache)
        yield given[0], problem, f"{cache.cache} {problem}"
        why = "not supported with PipeFusion, whose stages have parts of the picture from different steps"
        yield given[0], pipefusion, why
    yield (
        "use_parallel_vae",
        config.use_parallel_vae and degrees.world == degrees.data,
        f"needs ranks that share a picture; got {degrees}",
    )
    yield (
        "compile_vae",
        config.compile_vae and config.use_parallel_vae,
        "not supported with --use_parallel_vae, as a compiled decoder is one piece",
    )
    yield (
        "exchange_dtype",
        config.exchange_dtype and degrees.ulysses > 1 and degrees.ring > 1,
        f"supported with Ulysses or with ring, not both; got {degrees}",
    )
    yield (
        "exchange_dtype",
        config.exchange_dtype == "int4",
        "int4 is for differences between steps, which DistriFusion exchanges; use int8 or float8 here",
    )
    yield (
        "exchange_dtype",
        config.exchange_dtype and pipefusion,
        "not supported with PipeFusion, whose stages exchange tokens as they are",
    )
    yield "shard_weights", config.shard_weights and tensor, "not supported with --tensor_parallel_degree"
    yield (
        "shard_weights",
        config.shard_weights and degrees.world == degrees.data > 1,
        f"needs ranks that share a picture; got {degrees}",
    )
    yield (
        "xformers_efficient",
        config.xformers_efficient and degrees.world > 1,
        "not supported on several ranks, where xDiT uses an attention of its own",
    )


def _pipefusion_conflicts(config: HostConfig, degrees: Degrees) -> Iterator[tuple[str, Any, str]]:
    """What PipeFusion's stages cannot run, as far as the checkpoint's configurations show."""
    cut, denoiser, stages = _cut_of(config), _denoiser(config), config.attn_layer_num_for_pp
    blocks = (_number(denoiser, "num_layers") or 0) + (_number(denoiser, "num_single_layers") or 0)
    if blocks:
        problem = stages_problem(degrees.pipefusion, blocks, stages, cut.equal)
        yield "attn_layer_num_for_pp" if stages else "pipefusion_parallel_degree", problem, str(problem)
    for setting, why in cut.unshared.items():
        found = degrees.sequence > 1 and denoiser.get(setting)
        yield "pipefusion_parallel_degree", found, f"not supported with {degrees} on this checkpoint: {why}"
    problem = _one_patch(config, degrees)
    single = config.num_pipeline_patch == 1 and problem
    yield "num_pipeline_patch", single, f"must be 2 or more with {degrees}: {problem}"
    name, settings = _scheduler(config)
    problem = scheduler_problem(tokens_of(config).flow, name, settings)
    yield "scheduler", name and problem, str(problem)
