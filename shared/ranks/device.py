"""A rank's device and heap: memory in use, speed, what a garbage collection walks. Imports no diffusers."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from shared.launch.errors import UsageError
from shared.launch.wording import shown
from shared.ranks.groups import World

Result = TypeVar("Result")

_peaks: dict[torch.device, int] = {}
"""The most that was in use on each GPU before its count was started anew."""
_latest: dict[torch.device, int] = {}
"""The same, since the latest request began."""

COLLECTIONS = gc.get_threshold()
NEVER = 2**31 - 1

LIMIT = "MULTIGPU_DIFFUSION_MEMORY_LIMIT"
"""The environment variable with the GiB that a rank may take of its device."""
OWN = Path("/proc/self")
HOST_FULL = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What libraries say in errors of no class of their own."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, is that memory is full."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in HOST_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def give_back_memory() -> None:
    """Return what this process no longer uses to its device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def begin_request(device: torch.device) -> None:
    """The next request's peak is counted from here."""
    if device.type == "cuda":
        _count_anew(device)
        _latest[device] = 0
    else:
        with contextlib.suppress(OSError):  # not every kernel lets a process start it anew
            (OWN / "clear_refs").write_text("5")


def request_peak(device: torch.device) -> int:
    """The most bytes in use since `begin_request`: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return max(_latest.get(device, 0), torch.cuda.max_memory_allocated(device))
    found = re.search(r"VmHWM:\s+(\d+) kB", (OWN / "status").read_text())
    return int(found[1]) * 1024 if found else memory_report(device)["allocated"]


def peak_since(device: torch.device, act: Callable[[], Result]) -> tuple[Result, int]:
    """What `act` returns, and the most bytes that it had in use on a GPU beyond those in use before it."""
    before = torch.cuda.memory_allocated(device)
    _count_anew(device)
    result = act()
    return result, torch.cuda.max_memory_allocated(device) - before


def _count_anew(device: torch.device) -> None:
    now = torch.cuda.max_memory_allocated(device)
    for kept in (_peaks, _latest):
        kept[device] = max(kept.get(device, 0), now)
    torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return max(_peaks.get(device, 0), torch.cuda.max_memory_allocated(device))


def free_memory(world: World) -> int:
    """Bytes of its device that this rank may take, with the limit of the variable LIMIT.

    On a GPU the limit is set, so that torch raises where it is passed; on a CPU ranks of a machine share what
    is available.

    Raises:
        UsageError: the limit is not a number above 0.
    """
    limit = None
    if given := os.environ.get(LIMIT):
        try:
            limit = int(float(given) * 2**30)
        except (ValueError, OverflowError):
            limit = 0
        if limit <= 0:
            raise UsageError(f"{LIMIT}: must be a number of GiB above 0; got {shown(given)}")
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), world.device)
        share = torch.cuda.get_per_process_memory_fraction(world.device)
        return min(free, int(share * total) - torch.cuda.memory_reserved(world.device))
    free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free if limit is None else min(free, limit)


def memory_report(device: torch.device) -> dict[str, int]:
    """Bytes that this rank uses now and at its peak: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "peak": _peak(device),
            "reserved": torch.cuda.memory_reserved(device),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB
    return {"allocated": psutil.Process().memory_info().rss, "peak": peak}


def rank_device_info(world: World) -> dict[str, Any]:
    """Device and memory of this rank, for /health: memory in MiB."""
    info: dict[str, Any] = {"rank": world.rank, "device": str(world.device)}
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        info |= {
            "name": torch.cuda.get_device_name(world.device),
            "memory_used_mib": (total - free) >> 20,
            "memory_total_mib": total >> 20,
            "memory_peak_mib": _peak(world.device) >> 20,
        }
    else:
        info["memory_used_mib"] = memory_report(world.device)["allocated"] >> 20
    return info


def measured_speeds(world: World, group: dist.ProcessGroup, size: int = 2048) -> list[float]:
    """How fast each rank of the group multiplies matrices [size, size], relative to the fastest."""
    dtype = torch.float32 if world.device.type == "cpu" else torch.bfloat16
    a = torch.randn(size, size, device=world.device, dtype=dtype)

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(3):
            a @ a
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    mine = 1 / min(seconds() for _ in range(4))
    speeds = [torch.zeros(1, device=world.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(speeds, torch.tensor([mine], device=world.device), group=group)
    fastest = max(float(speed) for speed in speeds)
    return [round(float(speed) / fastest, 2) for speed in speeds]


def put_off_full_collections() -> None:
    """Until `freeze_heap`, collect only young garbage: what loading and tracing make stays.

    Full collections take 2 s of a start with --compile_unet.
    """
    gc.freeze()
    gc.set_threshold(*COLLECTIONS[:2], NEVER)


def freeze_heap() -> None:
    """Free what is unused, and exclude what is in use from later garbage collections.

    A full one walks every object of torch, diffusers and the model: 0.3 s, in the middle of a request.
    """
    gc.set_threshold(*COLLECTIONS)
    gc.unfreeze()
    gc.collect()
    gc.freeze()
