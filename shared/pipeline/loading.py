"""A launch's configuration -> a diffusers pipeline on this rank's device, with every feature on it.

Order matters: what renames keys or replaces layers (LoRA, IP-Adapter, quantization) comes before what holds
on to a module's forward (compile, offload), and parallel surgery comes after all of it.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from shared.launch import file_header
from shared.launch.backend import Needs
from shared.launch.checks import folder_problem
from shared.launch.errors import LoadError, UsageError, first_line
from shared.launch.file_header import (
    SingleFileError,
    check_kind,
    config_folder,
    input_channels,
    other_inputs,
    read_header,
    read_index,
)
from shared.launch.flags import HostConfig
from shared.launch.logs import shows_progress
from shared.launch.phases import PHASES
from shared.models import ModelSpec
from shared.parallel.pipeline import Pipeline, part_of, parts_of
from shared.pipeline import adapters, control_nets, eight_bits, memory, quantize
from shared.pipeline.compile import compile_pipeline
from shared.pipeline.converted import converted_parts, once_a_machine, ranks_here
from shared.pipeline.embeddings import check_alike, load_embeddings
from shared.pipeline.lora import loras_of
from shared.pipeline.lora_file import LoraError, check_lora
from shared.pipeline.processors import picture_processor
from shared.pipeline.refiner import load_refiner
from shared.pipeline.schedulers import SchedulerError, make_scheduler, set_scheduler
from shared.pipeline.single_file import BROKEN, load_single_file, model_from_folder, pick_variant
from shared.pipeline.single_file_models import wan_vae
from shared.pipeline.single_file_schedule import schedule_of
from shared.pipeline.store import KeptWeights
from shared.pipeline.weights_file import read_weights, scale_names
from shared.ranks.device import memory_report
from shared.ranks.groups import World

log = logging.getLogger("host")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OUR_ERRORS = (
    adapters.AdapterError, LoraError, memory.MemoryFlagError, quantize.QuantizeError, SchedulerError,
    SingleFileError,
)  # fmt: skip


def load_on_rank(config: HostConfig, world: World, needs: Needs) -> Pipeline:
    """`load_pipeline` for a launch, on this rank's device; progress bars only where the rank shows them."""
    quiet = not shows_progress(config, world.rank)
    pipe = load_pipeline(config.spec, config, world.device, needs, quiet=quiet)
    if config.embeddings_dir:
        check_alike(pipe, world)
    return pipe


def load_pipeline(
    spec: ModelSpec, config: HostConfig, device: torch.device, needs: Needs, quiet: bool = False
) -> Pipeline:
    """Load the checkpoint and put every feature of the launch on it. Reads local files only.

    Args:
        device: this rank's; where the pipeline ends unless it is offloaded.
        needs: what the parallel method needs of it.
        quiet: show no progress bars.

    Returns:
        a diffusers pipeline; its `lora_set` is the shared.pipeline.lora.LoraSet.

    Raises:
        UsageError: what this device cannot do, before any weight is read.
        LoadError: a part is broken, missing, or made for another model.
    """
    check_environment(config, device)
    config = eight_bits.for_device(config, device)
    try:
        pipe = _load(spec, config, device, needs, quiet)
    except OUR_ERRORS as error:
        raise LoadError(str(error)) from error
    return pipe


def check_environment(config: HostConfig, device: torch.device) -> None:
    """What must hold before any weight is read, beyond shared.launch.checks. Raises UsageError."""
    try:
        memory.check_memory_flags(config, device)
    except memory.MemoryFlagError as error:
        raise UsageError(str(error)) from None
    for package in config.spec.packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"--type: {config.type} needs the Python package {package}, which is not installed"
            )
    _check_compile(config)
    _check_scheduler(config)
    for flag in ("lora", "motion_adapter_lora"):
        for path in getattr(config, flag) or {}:
            try:
                check_lora(path)
            except LoraError as error:
                raise UsageError(f"--{flag}: {error}") from None


def _check_compile(config: HostConfig) -> None:
    """Refuse here what torch.compile would refuse at the first request, or not at all."""
    if not (config.compile_unet or config.compile_vae or config.compile_text_encoder):
        return
    import torch._dynamo
    import torch._inductor

    backend, options = config.compile_backend or "inductor", config.compile_options or {}
    backends = [name for name in torch._dynamo.list_backends(None) if "TESTING_ONLY" not in name]
    if backend not in backends:
        raise UsageError(f"--compile_backend: must be one of {', '.join(backends)}; got {backend!r}")
    if backend != "inductor":
        return
    known = torch._inductor.list_options()
    for key in options:
        if key.replace("-", "_") not in known:
            near = ", ".join(difflib.get_close_matches(key, known)) or "torch._inductor.list_options()"
            raise UsageError(f"--compile_options: inductor has no option {key!r}; see {near}")
    try:
        torch._TorchCompileInductorWrapper(None, options, None)
    except RuntimeError as error:
        raise UsageError(f"--compile_options: {first_line(error)}") from None


def _check_scheduler(config: HostConfig) -> None:
    """Make the scheduler that --scheduler asks for, out of the checkpoint's settings."""
    if config.scheduler is None:
        return
    checkpoint = Path(config.checkpoint)
    try:
        if checkpoint.is_file():
            folder = config_folder(config.spec, checkpoint, "scheduler")
            shipped = file_header.CONFIGS in folder.parents
            settings = schedule_of(read_header(checkpoint), config.spec, folder, shipped)
        else:
            settings = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    except BROKEN:
        settings = None
    # Loading reports what is wrong with the file itself.
    current = SimpleNamespace(config=settings if isinstance(settings, dict) else {})
    try:
        make_scheduler(current, config.spec, config.scheduler)
    except SchedulerError as error:
        raise UsageError(f"--scheduler: {error}") from None


def compute_dtype(config: HostConfig, device: torch.device) -> torch.dtype:
    """--variant's dtype; by default fp16 on GPUs and fp32 on CPUs."""
    return DTYPES[config.variant or ("fp32" if device.type == "cpu" else "fp16")]


def _load(spec: ModelSpec, config: HostConfig, device: torch.device, needs: Needs, quiet: bool) -> Pipeline:
    import diffusers
    import transformers

    if quiet:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    dtype = compute_dtype(config, device)
    PHASES.begin("reading")
    pipe = _load_components(spec, config, dtype)
    _check_tokenizers(pipe, spec, config)
    _check_guider(pipe, spec, config)
    if config.embeddings_dir:
        load_embeddings(pipe, spec, config.embeddings_dir)
    if quiet:
        pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    if config.control_net:
        control_nets.check_control_nets(pipe, spec)
    set_scheduler(pipe, spec, config.scheduler)
    _load_loras(pipe, spec, config, needs)
    if config.ip_adapter:
        adapters.load_ip_adapters(pipe, spec, config.ip_adapter, dtype)
    memory.apply_vae_flags(pipe, config)
    memory.decode_in_bands(getattr(pipe, "vae", None), config)
    _prepare(pipe, spec, config, device, needs)
    if config.refiner:
        pipe.refiner = _load_refiner(pipe, spec, config, device, needs)
        pipe.refiner.set_progress_bar_config(disable=quiet)
    used = memory_report(device)
    log.info("loaded %s in %s, %.1f MB in use on %s", spec.name, dtype, used["allocated"] / 1e6, device)
    return pipe


def _load_refiner(
    base: Pipeline, spec: ModelSpec, config: HostConfig, device: torch.device, needs: Needs
) -> Pipeline:
    """The pipeline of --refiner, with what the launch puts on denoisers; it has no other part of its own."""
    log.info("loading the refiner from %s", config.refiner)
    pipe = load_refiner(config.refiner or "", base, spec, compute_dtype(config, device))
    set_scheduler(pipe, spec, config.scheduler)
    alone = replace(spec, text_encoders=(), tokenizers=())
    flags = replace(config, compile_vae=False, compile_text_encoder=False)
    _prepare(pipe, alone, flags, device, needs, "refiner.")
    return pipe


def _prepare(
    pipe: Pipeline,
    spec: ModelSpec,
    config: HostConfig,
    device: torch.device,
    needs: Needs,
    prefix: str = "",
) -> None:
    """Quantize, compile and place a pipeline that is loaded with all its adapters.

    Args:
        prefix: of its components' names among the weights that are kept.
    """
    if config.quantize_to:
        PHASES.begin("quantizing")
        stays = torch.device("cpu") if config.offloads or needs.shards or needs.stages else device
        kept = KeptWeights(config, compute_dtype(config, device), device)
        whole = not needs.inside_blocks
        quantize.quantize_pipeline(
            pipe, spec, config.quantize_to, device, kept, prefix, whole, stays, config.in_16_bits
        )
    memory.apply_xformers(pipe, config)
    if config.compile_unet and device.type == "cuda":
        # Compiled convolutions are fastest in this layout: 15 % of an SDXL step on an H200.
        for denoiser in parts_of(pipe, spec.denoisers).values():
            channels_last(denoiser)
    compile_pipeline(pipe, spec, config, whole_blocks=not needs.inside_blocks)
    PHASES.begin("moving")
    memory.place(pipe, spec, config, device, needs)


def channels_last(model: torch.nn.Module) -> None:
    """Lay the weights of 2-D convolutions out by pixels; torch's own refuses models that have 3-D ones."""
    for weight in model.parameters():
        if weight.ndim == 4 and type(weight) is torch.nn.Parameter:  # no packed one
            weight.data = weight.data.to(memory_format=torch.channels_last)


def _load_loras(pipe: Pipeline, spec: ModelSpec, config: HostConfig, needs: Needs) -> None:
    loras = loras_of(pipe, spec)
    for path, scale in {**(config.lora or {}), **(config.motion_adapter_lora or {})}.items():
        loras.add(path, scale)
    flags = ("quantize_to", "compile_unet", "compile_text_encoder")
    reason = next((f"--{flag}" for flag in flags if getattr(config, flag)), needs.divides_weights)
    if reason and config.gguf_model:
        loras.freeze(f"no LoRA can be added, removed or scaled under {reason}")
    elif reason:
        loras.fuse(reason)
        loras.freeze(f"no LoRA can be added, removed or scaled: the weights are fixed by {reason}")
    if needs.shards or needs.stages:
        loras.unread = "it cannot be added to a running host under --shard_weights; give it at the launch"
    for flag in ("enable_sequential_cpu_offload", "enable_group_offload"):
        if getattr(config, flag):
            loras.fixed = f"no LoRA can be added or removed: layers come and go one by one under --{flag}"


def _check_tokenizers(pipe: Pipeline, spec: ModelSpec, config: HostConfig) -> None:
    """Without a vocabulary transformers silently makes a tokenizer that knows no word."""
    for name, tokenizer in parts_of(pipe, spec.tokenizers).items():
        # T5's empty one has one piece beside the special ones, for a space.
        if len(tokenizer) <= len(tokenizer.all_special_ids) + 1:
            raise LoadError(
                f"--checkpoint {config.checkpoint!r}: {name} has no vocabulary; its folder must hold "
                "tokenizer.json or the vocabulary files"
            )
        if spec.chat is not None and not tokenizer.chat_template:
            raise LoadError(
                f"--checkpoint {config.checkpoint!r}: {name} has no template of a conversation; its folder "
                "must hold chat_template.jinja"
            )


def _check_guider(pipe: Pipeline, spec: ModelSpec, config: HostConfig) -> None:
    """Guidance is split over ranks, and its scale is set, as this class has them."""
    if spec.tokens is None or spec.tokens.guider is None:
        return
    guider = part_of(pipe, spec.tokens.guider)
    name = type(guider).__name__
    if name != "ClassifierFreeGuidance" or (guider.config.start, guider.config.stop) != (0.0, 1.0):
        raise LoadError(
            f"--checkpoint {config.checkpoint!r}: its guider must be ClassifierFreeGuidance in all steps; "
            f"got {name}"
        )


def _load_components(spec: ModelSpec, config: HostConfig, dtype: torch.dtype) -> Pipeline:
    """The pipeline of the checkpoint and of what replaces or joins its components."""
    import diffusers

    cls = getattr(diffusers, (config.control_net and spec.control_net_pipeline) or spec.pipeline)
    checkpoint = Path(config.checkpoint)
    single = checkpoint.is_file()
    if single and spec.single_file_config is None:
        raise LoadError(
            f"type {spec.name} loads from a diffusers folder only; got the file {config.checkpoint!r}"
        )
    header = read_header(checkpoint) if single else None
    if header is not None:
        check_kind(header, spec)

    def configured(name: str) -> Path:
        """The folder in which `name` configures this component."""
        return checkpoint if header is None else config_folder(spec, checkpoint, name)

    index = _index_of(checkpoint)
    if header is not None:
        inputs = input_channels(header, spec)
    else:
        if problem := folder_problem(spec, str(checkpoint), index):
            raise LoadError(problem)
        inputs = _input_channels(checkpoint / spec.denoiser)
        _check_inputs(spec, checkpoint, inputs)
        _check_scales(checkpoint)
    if inputs is not None and inputs == _fill_channels(spec, configured("vae")):
        start = spec.start("fill", bool(config.control_net))
        if start is None:
            raise LoadError(
                f"--control_net: not supported with an inpainting checkpoint of type {spec.name}: diffusers "
                "has no pipeline for both"
            )
        if config.ip_adapter and not start.ip_adapter:
            raise LoadError(f"--ip_adapter: not supported with this checkpoint: {start.pipeline} takes none")
        cls = getattr(diffusers, start.pipeline)
    parts: dict[str, Any] = {}
    if config.vae:
        parts["vae"] = load_vae(config.vae, spec, index, configured("vae"), dtype)
    if config.control_net:
        parts["controlnet"] = control_nets.load_control_nets(
            spec, config.control_net, dtype, configured(spec.denoiser) / spec.denoiser
        )
    if config.gguf_model:
        denoiser_class = getattr(diffusers, index[spec.denoiser][1])
        parts[spec.denoiser] = quantize.load_gguf(
            config.gguf_model, spec, denoiser_class, configured(spec.denoiser), dtype
        )
    motion = config.motion_adapter or config.motion_module
    takes_motion = "motion_adapter" in inspect.signature(cls.__init__).parameters
    if takes_motion and motion:
        parts["motion_adapter"] = adapters.load_motion_adapter(motion, dtype)
    elif takes_motion and not index.get("motion_adapter", [None])[0]:
        raise LoadError(
            f"type {spec.name} needs --motion_adapter or --motion_module with a checkpoint that has no "
            "motion adapter of its own; got neither"
        )
    name = spec.picture_processor
    if name and header is None and index.get(name):
        parts[name] = load_processor(checkpoint / name, index[name][1])
    log.info("loading %s from %s", cls.__name__, config.checkpoint)
    if header is not None:
        return load_single_file(cls, spec, header, index, parts, dtype, partial(once_a_machine, config))
    readers = {name: _tokenizer(checkpoint / name) for name in spec.text_only}
    # diffusers takes a folder without them, such as Stable Diffusion 3 without T5, only where it is told so.
    absent = [name for name in spec.optional_parts if not (index.get(name) or [None])[0]]
    pipe = _from_folder(cls, checkpoint, parts | dict.fromkeys([*readers, *absent]), config, dtype)
    pipe.register_modules(**readers)
    if "motion_adapter" in parts and index[spec.denoiser][1] == type(part_of(pipe, "unet")).__name__:
        adapters.put_motion_adapter(pipe, parts["motion_adapter"])
    return pipe


def _from_folder(
    cls: Any, folder: Path, parts: dict[str, Any], config: HostConfig, dtype: torch.dtype
) -> Any:
    accepted = inspect.signature(cls.__init__).parameters
    for name, value in (("safety_checker", None), ("requires_safety_checker", False)):
        if name in accepted:
            parts = {**parts, name: value}
    variant = pick_variant([f.name for f in folder.glob("*/*")], config.variant)
    try:
        if ranks_here() > 1:
            parts = parts | converted_parts(config, folder, parts, variant, dtype)
        return cls.from_pretrained(folder, variant=variant, dtype=dtype, local_files_only=True, **parts)
    except BROKEN as error:
        raise LoadError(f"--checkpoint {str(folder)!r} cannot be loaded: {first_line(error)}") from error


def load_processor(folder: Path, cls: str) -> Any:
    """A processor of pictures that needs no torchvision. Raises LoadError: files are missing or broken."""
    try:
        return picture_processor(folder, cls)
    except BROKEN as error:
        raise LoadError(f"--checkpoint: {str(folder)!r} cannot be loaded: {first_line(error)}") from error


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a processor, which reads texts as the whole of it does, and needs no torchvision."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except BROKEN as error:
        raise LoadError(f"--checkpoint: {str(folder)!r} cannot be loaded: {first_line(error)}") from error


def load_vae(path: str, spec: ModelSpec, index: dict[str, Any], config: Path, dtype: torch.dtype) -> Any:
    """A VAE from a diffusers folder (with or without a `vae` folder inside) or a single file.

    Args:
        index: the checkpoint's model_index.json, which names the class.
        config: folder with the VAE's configuration in `vae`, for a single file.

    Raises:
        LoadError: unreadable, or with another number of latent channels than the checkpoint's.
    """
    import diffusers

    cls = getattr(diffusers, index["vae"][1])
    place, setting = Path(path), spec.latent_setting
    try:
        if place.is_file():
            settings = {"config": str(config), "subfolder": "vae"}
            pickled = place.suffix in (".bin", ".ckpt", ".pt", ".pth")
            tensors = (
                adapters.read_tensors(place, "--vae") if pickled else read_weights(place, dtype, "--vae")
            )
            if spec.single_file_vae == "wan":
                vae = wan_vae(cls, tensors, config / "vae", dtype)
            else:
                vae = cls.from_single_file(tensors, dtype=dtype, local_files_only=True, **settings)
        else:
            place = place / "vae" if (place / "vae" / "config.json").is_file() else place
            vae = model_from_folder(cls, place, dtype)
    except BROKEN as error:
        raise LoadError(f"--vae {path!r} cannot be loaded as {cls.__name__}: {first_line(error)}") from error
    expected = json.loads((config / "vae" / "config.json").read_text()).get(setting)
    if vae.config[setting] != expected:
        raise LoadError(
            f"--vae {path!r} has {vae.config[setting]} latent channels, the checkpoint's has {expected}"
        )
    return vae


def _index_of(checkpoint: Path) -> dict[str, Any]:
    index = read_index(str(checkpoint))
    if index is None:
        raise LoadError(f"--checkpoint {str(checkpoint)!r}: no model_index.json that can be read")
    if not isinstance(index, dict):
        raise LoadError(f"--checkpoint {str(checkpoint)!r}: model_index.json must hold an object")
    return index


def _input_channels(denoiser: Path) -> int | None:
    try:
        return json.loads((denoiser / "config.json").read_text()).get("in_channels")
    except (OSError, ValueError):
        return None


def _latent_inputs(spec: ModelSpec, folder: Path) -> int | None:
    """The input channels of a denoiser that sees latents only; None where loading reports what is wrong."""
    try:
        latent = json.loads((folder / "vae" / "config.json").read_text())[spec.latent_setting]
    except (OSError, ValueError, KeyError):
        return None
    return latent * (4 if spec.packed else 1)


def _fill_channels(spec: ModelSpec, folder: Path) -> int | None:
    expected = _latent_inputs(spec, folder)
    return None if expected is None else spec.fill_channels(expected)


def _check_inputs(spec: ModelSpec, folder: Path, inputs: int | None) -> None:
    """A denoiser with other inputs fails only in its first call, if at all: refuse it here."""
    expected = _latent_inputs(spec, folder)
    if spec.image == "needed" or None in (inputs, expected) or spec.single_file_config is None:
        return
    assert inputs is not None and expected is not None
    if inputs not in (expected, spec.fill_channels(expected)):
        raise LoadError(f"--checkpoint {str(folder)!r} {other_inputs(spec, inputs, expected)}")


def _check_scales(folder: Path) -> None:
    """Diffusers would silently ignore the scales of weights."""
    for file in sorted(folder.glob("*/*.safetensors")):
        try:
            scales = scale_names(list(read_header(file).shapes))
        except SingleFileError:
            continue  # loading reports it
        if scales:
            raise LoadError(
                f"--checkpoint {str(folder)!r}: {file.name} of {file.parent.name} has scaled weights (key "
                f"{scales[0]!r}), which are supported only in a single file"
            )
