"""What each rank of a launch will need of its device's memory, before any weight is read."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from shared.api.requests import GenerateRequest
from shared.launch.backend import Backend
from shared.launch.errors import UsageError
from shared.launch.fit import cheapest, singles, worded
from shared.launch.flags import HostConfig
from shared.parallel.peak import FlashAttention, PeakBytes
from shared.pipeline.loading import compute_dtype
from shared.pipeline.single_file import BROKEN
from shared.pipeline.unloaded import unloaded_models
from shared.ranks.channel import Channel
from shared.ranks.device import free_memory

log = logging.getLogger("host")

LIBRARIES = 600 << 20
"""Bytes that cuBLAS, cuDNN and NCCL take of a GPU beside torch's tensors."""
WEIGHTS_TRUST, WORK_TRUST = 0.02, 0.4
"""How far the estimates of weights, and of a step and of decoding, may be off."""
STAGES_TRUST = 0.1
"""The same of weights that are cut into stages, which are equal as far as units allow."""
SIZES = (0.75, 0.5, 0.375, 0.25)
"""Smaller sides that are tried for the advice."""
GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Bytes that a rank needs."""

    weights: int
    graphs: int
    work: int  # of a step or of decoding, whichever is more
    step: int
    decode: int
    libraries: int
    loading: int  # in all, while weights are put on the device
    margin: int  # by which the sum may be off

    @property
    def total(self) -> int:
        return max(self.weights + self.graphs + self.work, self.loading) + self.libraries


class MemoryPlan:
    """The memory of a launch and of launches that differ in flags, sizes or ranks.

    Args:
        config: the launch.
        backend: its backend.
        world_size: of the launch.
        device_type: "cuda" or "cpu".
        dtype: of weights and computation.
        free: bytes that each rank may take of its device.
    """

    def __init__(
        self,
        config: HostConfig,
        backend: Backend,
        world_size: int,
        device_type: str,
        dtype: torch.dtype,
        free: list[int],
    ) -> None:
        self.config, self.backend, self.size, self.device_type = config, backend, world_size, device_type
        self.dtype, self.free = dtype, free
        self.models = unloaded_models(config, dtype)
        self._weights: dict[Any, tuple[dict[str, int], int, int]] = {}
        self._decodes: dict[Any, int] = {}

    def weights_of(self, config: HostConfig, world_size: int) -> tuple[dict[str, int], int, int]:
        """By model the bytes that a rank keeps; those of the gathering buffers or the moved part; loading."""
        needs = self.backend.needs(config, world_size)
        key = (config.quantize_to, needs, config.offloads and config, world_size)
        if key not in self._weights:
            self._weights[key] = self._find_weights(config, world_size)
        return self._weights[key]

    def _find_weights(self, config: HostConfig, ranks: int) -> tuple[dict[str, int], int, int]:
        spec, needs = config.spec, self.backend.needs(config, ranks)
        kept: dict[str, int] = {}
        whole: dict[str, int] = {}
        largest, buffers = 0, 0
        for name, model in self.models.items():
            quantized = config.quantize_to if name in (spec.denoiser, *spec.text_encoders) else None
            args = (self.dtype, quantized, spec.kept if name == spec.denoiser else ())
            whole[name] = kept[name] = model.nbytes(*args)
            part = name.rpartition("_")[0] if name.startswith("controlnet_") else name
            if part in needs.shards:
                kept[name] = int(whole[name] * model.share(ranks, *args))
                buffers = max(buffers, 2 * model.largest_block(*args))
            elif part in needs.stages:
                kept[name] = whole[name] // needs.stage_count
            largest = max(largest, model.largest_block(*args))
        loading = 0
        if self.device_type == "cuda" and not config.offloads and not (needs.shards or needs.stages):
            loading = sum(whole.values())
            if config.quantize_to:
                # Each model is whole on the device before it is quantized there.
                done = 0
                for name in (spec.denoiser, *spec.text_encoders):
                    if name in whole:
                        loading = max(loading, done + self.models[name].nbytes(self.dtype, None, ()))
                        done += whole[name]
        if config.enable_model_cpu_offload:
            stays = (spec.denoiser, "controlnet") if needs.in_parts else ()
            resident = sum(size for name, size in kept.items() if name in stays)
            moved = max((size for name, size in kept.items() if name not in stays), default=0)
            return {"on the device at a time": resident + moved}, 0, 0
        if config.enable_sequential_cpu_offload or config.enable_group_offload:
            return {"on the device at a time": 2 * largest}, 0, 0
        return kept, buffers, loading

    def need(self, config: HostConfig, world_size: int | None = None) -> Need:
        """What the ranks that need the most of a launch need."""
        ranks = self.size if world_size is None else world_size
        needs = self.backend.needs(config, ranks)
        kept, buffers, loading = self.weights_of(config, ranks)
        weights = sum(kept.values()) + buffers
        step = self._step(config) // needs.step_parts
        if needs.keeps_patches:
            step += self._maps(config, config.spec.stale_maps)
        decode = self._decode(config) // needs.decode_parts
        graphs = step if config.captures(self.device_type) else 0
        libraries = LIBRARIES if self.device_type == "cuda" else 0
        work = max(step, decode)
        trust = STAGES_TRUST if needs.stages else WEIGHTS_TRUST
        margin = int(trust * weights + WORK_TRUST * (graphs + work) + WORK_TRUST * libraries)
        return Need(weights, graphs, work, step, decode, libraries, loading, margin)

    def _maps(self, config: HostConfig, maps: float) -> int:
        spec, denoiser = config.spec, self.models[config.spec.denoiser].modules[0]
        settings: Any = denoiser.config
        width, height = (side * spec.size_scale // self._vae_scale() for side in config.size)
        frames = 1 if spec.frames is None else (spec.frames - 1) // spec.frames_factor + 1
        if spec.denoiser == "unet":
            channels, places = settings.block_out_channels[0], width * height * frames
        else:
            patch = 2 if spec.packed else _side(settings.patch_size)
            channels = settings.num_attention_heads * settings.attention_head_dim
            places = (width // patch) * (height // patch) * frames + spec.text_tokens
        branches = 2 if spec.tokens is None or spec.tokens.guidance == "batch" else 1
        return int(maps * channels * places * branches * self.dtype.itemsize)

    def _step(self, config: HostConfig) -> int:
        return self._maps(config, config.spec.step_maps)

    def _vae_scale(self) -> int:
        settings: Any = self._vae.config
        if self.config.spec.vae_kind == "video":
            return 8
        return 2 ** (len(settings.block_out_channels) - 1)

    @property
    def _vae(self) -> nn.Module:
        return self.models["vae"].modules[0]

    def _decode(self, config: HostConfig) -> int:
        """The most that decoding one picture at this size takes, counted in a call on meta."""
        spec = config.spec
        key = (config.size, config.enable_vae_tiling, config.enable_vae_slicing)
        if key in self._decodes:
            return self._decodes[key]
        vae: Any = self._vae
        upcast = getattr(vae.config, "force_upcast", False) and self.dtype == torch.float16
        dtype = torch.float32 if upcast else self.dtype
        side = [s * spec.size_scale // self._vae_scale() for s in (config.size[1], config.size[0])]
        frames = spec.frames or 1
        more: dict[str, Any] = {}
        if spec.vae_kind == "video":
            shape = (1, vae.config[spec.latent_setting], (frames - 1) // spec.frames_factor + 1, *side)
        else:
            shape = (frames, vae.config[spec.latent_setting], *side)
            if spec.image == "needed" and spec.output == "video":
                more["num_frames"] = frames
        for flag, name in (("enable_vae_tiling", "tiling"), ("enable_vae_slicing", "slicing")):
            if hasattr(vae, f"disable_{name}"):
                getattr(vae, f"{'enable' if getattr(config, flag) else 'disable'}_{name}")()
        with torch.no_grad(), torch.device("meta"), FlashAttention(), PeakBytes() as peak:
            vae.to(dtype).decode(torch.empty(shape, dtype=dtype), return_dict=False, **more)
        found = peak.most
        if upcast:
            found += 2 * self.models["vae"].nbytes(self.dtype, None, ())
        self._decodes[key] = found
        return found

    def safe(self, config: HostConfig) -> int:
        """Bytes with which a launch fits, however far the estimate is off."""
        need = self.need(config)
        return need.total + need.margin

    @property
    def least_free(self) -> int:
        return min(self.free)

    def lines(self) -> list[str]:
        """For the log: one line, or one a rank where their free memory differs."""
        need, (width, height) = self.need(self.config), self.config.size
        models = ", ".join(
            f"{name} {gib(size)}"
            for name, size in self.weights_of(self.config, self.size)[0].items()
            if size > need.weights / 100
        )
        what = (
            f"{gib(need.total)} GiB for {width}x{height} (weights {gib(need.weights)}: {models}; captured "
            f"steps {gib(need.graphs)}, a step {gib(need.step)}, decoding {gib(need.decode)}), give or take "
            f"{gib(need.margin)}"
        )
        if max(self.free) < 1.05 * self.least_free:
            return [f"memory: each rank needs {what}; {gib(self.least_free)} GiB are free"]
        return [f"memory: rank {r} needs {what}; {gib(f)} GiB are free" for r, f in enumerate(self.free)]

    def told(self) -> dict[str, Any]:
        """For /health, bytes."""
        need = self.need(self.config)
        models = self.weights_of(self.config, self.size)[0]
        return asdict(need) | {"total": need.total, "models": models, "free": self.free}

    def advice(self, config: HostConfig | None = None) -> str:
        """What would make a launch fit, with the memory that each then needs."""
        config = config or self.config
        free, args = self.least_free, (self.backend, self.size, self.device_type)
        found = [f"{flag} ({gib(b)} GiB)" for flag, b in singles(config, *args, self.safe, free)]
        if not found and (best := cheapest(config, *args, self.safe, free)):
            found = [f"{worded(best[0])} ({gib(best[1])} GiB)"]
        found += self._more_ranks(config) + self._smaller(config)
        if found:
            return "it would fit with " + ", or ".join(found)
        return "no flag of this type and method makes it fit"

    def advice_for(self, request: GenerateRequest | None) -> str:
        """The advice after a request that has run out of memory."""
        if request is None or not request.width or not request.height:
            return self.advice()
        return self.advice(replace(self.config, width=request.width, height=request.height))

    def _more_ranks(self, config: HostConfig) -> list[str]:
        for ranks in (2 * self.size, 4 * self.size):
            try:
                more = replace(config, shard_weights=True)
                self.backend.check(more, ranks)
                need = self.need(more, ranks)
            except ValueError:
                continue
            if ranks <= 8 and need.total + need.margin <= self.least_free:
                return [f"{ranks} ranks and --shard_weights ({gib(need.total + need.margin)} GiB)"]
        return []

    def _smaller(self, config: HostConfig) -> list[str]:
        multiple = 8 * config.spec.size_multiple
        for part in SIZES:
            width, height = (max(int(s * part) // multiple, 1) * multiple for s in config.size)
            smaller = replace(config, width=width, height=height)
            if (width, height) < config.size and self.safe(smaller) <= self.least_free:
                return [f"{width}x{height} ({gib(self.safe(smaller))} GiB)"]
        return []

    def fitted(self) -> HostConfig:
        """The launch, with --fit the flags added that make it fit.

        Raises:
            UsageError: it does not fit; the message has what would make it.
        """
        need, free = self.need(self.config), self.least_free
        if need.total + need.margin <= free:
            return self.config
        if self.config.fit:
            args = (self.backend, self.size, self.device_type)
            best = cheapest(self.config, *args, self.safe, free)
            if best is not None:
                log.info("--fit chooses %s: %s GiB on each rank", worded(best[0]), gib(best[1]))
                self.config = replace(self.config, **best[0])
                return self.config
        if need.total - need.margin <= free:
            log.warning("memory may not suffice: %s", self.advice())
            return self.config
        width, height = self.config.size
        raise UsageError(
            f"--{'fit' if self.config.fit else 'checkpoint'}: each rank needs {gib(need.total)} GiB for "
            f"{width}x{height} (weights {gib(need.weights)}, decoding {gib(need.decode)}); got "
            f"{gib(free)} GiB free; {self.advice()}"
        )


def gib(size: int) -> str:
    """GiB, with three digits."""
    return f"{size / GIB:.3g}"


def _side(patch: Any) -> int:
    return int(patch[-1]) if isinstance(patch, list | tuple) else int(patch)


def planned(config: HostConfig, backend: Backend, channel: Channel) -> tuple[HostConfig, MemoryPlan | None]:
    """The launch, with --fit the flags added that make it fit, and its plan. All ranks must call it.

    Raises:
        UsageError: it does not fit.
    """
    world = channel.world
    free = [info["free"] for info in channel.gather_infos({"free": free_memory(world)})]
    dtype = compute_dtype(config, world.device)
    plan = plan_of(config, backend, world.size, world.device.type, dtype, free)
    if plan is None:
        return config, None
    config = plan.fitted()
    for line in plan.lines() if world.rank == 0 else ():
        log.info("%s", line)
    return config, plan


def plan_of(
    config: HostConfig,
    backend: Backend,
    world_size: int,
    device_type: str,
    dtype: torch.dtype,
    free: list[int],
) -> MemoryPlan | None:
    """The plan of a launch; None where its files cannot be read, which loading says better."""
    try:
        plan = MemoryPlan(config, backend, world_size, device_type, dtype, free)
        plan.need(config)
    except UsageError:
        raise
    except (*BROKEN, NotImplementedError, AssertionError) as error:
        log.warning("memory is not planned: %s", error)
        return None
    return plan
