"""What each rank of a launch will need of its device's memory, before any weight is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from shared.api.requests import GenerateRequest
from shared.launch.backend import Backend
from shared.launch.errors import UsageError
from shared.launch.fit import cheapest, singles, worded
from shared.launch.flags import COMPUTED, HostConfig
from shared.parallel.graphs import SHARE
from shared.pipeline.eight_bits import for_device, obstacle, weight_only
from shared.pipeline.layer_choice import Chosen, chosen
from shared.pipeline.loading import compute_dtype
from shared.pipeline.single_file import BROKEN
from shared.pipeline.unloaded import Stored, unloaded_models
from shared.pipeline.work import Work
from shared.ranks.channel import Channel
from shared.ranks.device import LIMIT, free_memory

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
    work: int  # of prompts, a step or decoding, whichever is the most
    encode: int
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
        binding: whether a launch that does not fit is refused; host memory can be paged, shared and freed.
    """

    def __init__(
        self,
        config: HostConfig,
        backend: Backend,
        world_size: int,
        device_type: str,
        dtype: torch.dtype,
        free: list[int],
        binding: bool = True,
    ) -> None:
        self.config, self.backend, self.size, self.device_type = config, backend, world_size, device_type
        self.dtype, self.free, self.binding = dtype, free, binding
        self.warning = ""
        """What `fitted` has found to say."""
        self.models = unloaded_models(config, dtype, backend.needs(config, world_size).divides_weights)
        self._weights: dict[Any, tuple[dict[str, int], int, int]] = {}
        self.work = Work(config.spec, self.models, dtype)
        self.bits: Chosen | None = None
        """Which layers compute in 8 bits, where that is chosen."""

    def weights_of(self, config: HostConfig, world_size: int) -> tuple[dict[str, int], int, int]:
        """By model the bytes that a rank keeps; those of the gathering buffers or the moved part; loading."""
        needs = self.backend.needs(config, world_size)
        offloads = config.offloads or config.enable_model_cpu_offload
        key = (config.quantize_to, config.in_16_bits, needs, offloads and config, world_size)
        if key not in self._weights:
            self._weights[key] = self._find_weights(config, world_size)
        return self._weights[key]

    def _find_weights(self, config: HostConfig, ranks: int) -> tuple[dict[str, int], int, int]:
        spec, needs = config.spec, self.backend.needs(config, ranks)
        kept: dict[str, int] = {}
        whole: dict[str, int] = {}
        largest, buffers = 0, 0
        for name, model in self.models.items():
            denoises = name in (*spec.denoisers, "refiner")
            how = Stored(self.dtype)
            if denoises:
                whole_blocks, compiled = not needs.inside_blocks, config.compile_unet
                how = Stored(self.dtype, config.quantize_to, spec.kept, whole_blocks, spec.few_rows, compiled)
                how = replace(how, component=name, in_16_bits=config.in_16_bits)
            elif name in spec.text_encoders:
                how = Stored(self.dtype, weight_only(config.quantize_to))
            elif name == "vae" and name in needs.shards and self.work.upcasts:
                how = Stored(torch.float32)
            whole[name] = kept[name] = model.nbytes(how)
            part = "controlnet" if name.startswith("controlnet") else name
            part = spec.denoiser if name == "refiner" else part
            if part in needs.shards:
                share = model.share(ranks, how)
                if config.enable_model_cpu_offload and not (denoises or part == "controlnet"):
                    share = 1 - (1 - share) * ranks / (ranks - 1)  # the parts wait in host memory
                kept[name] = int(whole[name] * share)
                buffers = max(buffers, 2 * model.largest_block(how))
            elif part in needs.stages:
                kept[name] = whole[name] // needs.stage_count
            largest = max(largest, model.largest_block(how))
        loading = 0
        if self.device_type == "cuda" and not config.offloads and not (needs.shards or needs.stages):
            loading = sum(whole.values())
        if config.enable_model_cpu_offload and not (needs.shards or needs.stages):
            stays = {n for n in kept if n in (spec.denoiser, "refiner") or n.startswith("controlnet")}
            stays = stays if needs.in_parts else set()
            resident = sum(kept[name] for name in stays)
            moved = max((size for name, size in kept.items() if name not in stays), default=0)
            return {"on the device at a time": resident + moved}, 0, 0
        if config.enable_sequential_cpu_offload or config.enable_group_offload:
            return {"on the device at a time": 2 * largest}, 0, 0
        return kept, buffers, loading

    def need(self, config: HostConfig, world_size: int | None = None, frames: int | None = None) -> Need:
        """What the ranks that need the most of a launch need, for videos of so many frames."""
        ranks = self.size if world_size is None else world_size
        needs = self.backend.needs(config, ranks)
        kept, buffers, loading = self.weights_of(config, ranks)
        weights = sum(kept.values()) + buffers
        encode = self.work.encode()
        step = self.work.step(config, frames) // needs.step_parts
        if needs.keeps_patches:
            step += self.work.stale(config, frames)
        if needs.copies and self.device_type == "cuda":
            step += self.work.copied(config, frames) // needs.step_parts
        decode = self.work.decode(config, frames, needs.decode_parts)
        # Larger ones are not kept (shared.parallel.graphs.Pool).
        captures = config.captures(self.device_type)
        graphs = min(step + encode, int(SHARE * self.least_free)) if captures else 0
        libraries = LIBRARIES if self.device_type == "cuda" else 0
        work = max(encode, step, decode)
        trust = STAGES_TRUST if needs.stages else WEIGHTS_TRUST
        margin = int(trust * weights + WORK_TRUST * (graphs + work) + WORK_TRUST * libraries)
        return Need(weights, graphs, work, encode, step, decode, libraries, loading, margin)

    def safe(self, config: HostConfig, frames: int | None = None) -> int:
        """Bytes with which a launch fits, however far the estimate is off."""
        need = self.need(config, frames=frames)
        return need.total + need.margin

    @property
    def least_free(self) -> int:
        return min(self.free)

    def line(self) -> str:
        """For the log."""
        need, (width, height) = self.need(self.config), self.config.size
        models = ", ".join(
            f"{name} {gib(size)}"
            for name, size in self.weights_of(self.config, self.size)[0].items()
            if size > need.weights / 100
        )
        what = (
            f"{gib(need.total)} GiB for {width}x{height} (weights {gib(need.weights)}: {models}; captured "
            f"steps {gib(need.graphs)}, prompts {gib(need.encode)}, a step {gib(need.step)}, decoding "
            f"{gib(need.decode)}), give or take {gib(need.margin)}"
        )
        free = f"{gib(self.least_free)} GiB are free"
        if max(self.free) > 1.05 * self.least_free:
            free += f" on rank {self.free.index(self.least_free)}, {gib(max(self.free))} on others"
        return f"memory: each rank needs {what}; {free}"

    def told(self) -> dict[str, Any]:
        """For /health, bytes."""
        need = self.need(self.config)
        models = self.weights_of(self.config, self.size)[0]
        return asdict(need) | {"total": need.total, "models": models, "free": self.free}

    def advice(self, config: HostConfig | None = None, frames: int | None = None, spent: bool = False) -> str:
        """What would make a launch fit, with the memory that each then needs.

        Args:
            frames: of its videos.
            spent: whether it is known not to fit: then estimates are raised until they say so too.
        """
        config = config or self.config
        free, args = self.least_free, (self.backend, self.size, self.device_type)
        raised = max(1.0, free / self.safe(config, frames)) if spent else 1.0

        def safe(made: HostConfig) -> int:
            return int(raised * self.safe(made, frames))

        found = [f"{flag} ({gib(b)} GiB)" for flag, b in singles(config, *args, safe, free)]
        if not found and (best := cheapest(config, *args, safe, free)):
            found = [f"{worded(best[0])} ({gib(best[1])} GiB)"]
        found += self._more_ranks(config, frames, raised) + self._smaller(config, safe)
        if found:
            return "it would fit with " + ", or ".join(found)
        return "no flag of this type and method makes it fit"

    def advice_for(self, request: GenerateRequest | None) -> str:
        """The advice after a request that has run out of memory."""
        if request is None:
            return self.advice(spent=True)
        width, height = request.width or self.config.width, request.height or self.config.height
        return self.advice(replace(self.config, width=width, height=height), request.frames, spent=True)

    def _more_ranks(self, config: HostConfig, frames: int | None, raised: float) -> list[str]:
        for ranks in (2 * self.size, 4 * self.size):
            try:
                more = replace(config, shard_weights=True)
                self.backend.check(more, ranks)
                need = self.need(more, ranks, frames)
            except ValueError:
                continue
            size = int(raised * (need.total + need.margin))
            if ranks <= 8 and size <= self.least_free:
                return [f"{ranks} ranks and --shard_weights ({gib(size)} GiB)"]
        return []

    def _smaller(self, config: HostConfig, safe: Callable[[HostConfig], int]) -> list[str]:
        multiple = 8 * config.spec.size_multiple
        for part in SIZES:
            width, height = (max(int(s * part) // multiple, 1) * multiple for s in config.size)
            smaller = replace(config, width=width, height=height)
            if (width, height) < config.size and safe(smaller) <= self.least_free:
                return [f"{width}x{height} ({gib(safe(smaller))} GiB)"]
        return []

    def fitted(self) -> HostConfig:
        """The launch, with --fit the flags added that make it fit; `warning` says which, or what is unsure.

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
                self.warning = f"--fit chooses {worded(best[0])}: {gib(best[1])} GiB on each rank"
                self.config = replace(self.config, **best[0])
                return self.config
        if not self.binding or need.total - need.margin <= free:
            self.warning = f"memory may not suffice: {self.advice()}"
            return self.config
        width, height = self.config.size
        raise UsageError(
            f"--{'fit' if self.config.fit else 'checkpoint'}: each rank needs {gib(need.total)} GiB for "
            f"{width}x{height} (weights {gib(need.weights)}, decoding {gib(need.decode)}); got "
            f"{gib(free)} GiB free; {self.advice()}"
        )

    def choose_bits(self, channel: Channel) -> HostConfig:
        """The launch with the layers that stay in 16 bits as they are faster so, where that fits in memory.

        All ranks must call it.
        """
        config = self.config
        self.bits = found = chosen(config, self.backend.needs(config, self.size), self.work, channel)
        if found is None:
            return config
        faster = replace(config, in_16_bits=found.in_16_bits)
        if found.in_16_bits and self.safe(faster) > self.least_free:
            self.bits = replace(found, memory_asks=True)
        else:
            self.config = faster
        return self.config


def gib(size: int) -> str:
    """GiB, with three digits."""
    return f"{size / GIB:.3g}"


def planned(config: HostConfig, backend: Backend, channel: Channel) -> tuple[HostConfig, MemoryPlan | None]:
    """The launch, with --fit the flags added that make it fit, and its plan. All ranks must call it.

    Raises:
        UsageError: it does not fit.
    """
    world = channel.world
    problems = {kind: obstacle(kind, world.device) for kind in COMPUTED}
    infos = channel.gather_infos({"free": free_memory(world), "problems": problems})
    free = [info["free"] for info in infos]

    def alike(config: HostConfig) -> HostConfig:
        others = (info["problems"].get(config.quantize_to) for info in infos)
        problem = next(filter(None, others), None)
        return for_device(config, world.device, problem, tells=world.rank == 0)

    config = alike(config)
    dtype = compute_dtype(config, world.device)
    binding = world.device.type == "cuda" or LIMIT in os.environ
    plan = plan_of(config, backend, world.size, world.device.type, dtype, free, binding)
    if plan is None:
        return config, None
    plan.config = alike(plan.fitted())
    config = plan.choose_bits(channel)
    if world.rank == 0:
        if plan.bits is not None:
            log.info("%s", plan.bits.line())
        log.info("%s", plan.line())
        if plan.warning:
            log.warning("%s", plan.warning)
    return config, plan


def plan_of(
    config: HostConfig,
    backend: Backend,
    world_size: int,
    device_type: str,
    dtype: torch.dtype,
    free: list[int],
    binding: bool,
) -> MemoryPlan | None:
    """The plan of a launch; None where its files cannot be read, which loading says better."""
    try:
        plan = MemoryPlan(config, backend, world_size, device_type, dtype, free, binding)
        plan.need(config)
    except UsageError:
        raise
    except (*BROKEN, NotImplementedError, AssertionError) as error:
        log.warning("memory is not planned: %s", error)
        return None
    return plan
