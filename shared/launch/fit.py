"""Launches that need less memory than a given one, in order of what they cost. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from shared.launch.backend import Backend
from shared.launch.checks import check_config, idle_flags
from shared.launch.errors import UsageError
from shared.launch.flags import HostConfig

LADDER: tuple[Mapping[str, Any], ...] = (
    {"enable_vae_tiling": True},
    {"enable_vae_slicing": True},
    {"shard_weights": True},
    {"quantize_to": "float8"},
    {"quantize_to": "int8"},
    {"quantize_to": "float8_weight"},
    {"quantize_to": "int4"},
    {"enable_model_cpu_offload": True},
    {"enable_group_offload": True},
    {"enable_sequential_cpu_offload": True},
)
"""Flags that lower the memory a rank needs; the first cost the least."""
GAIN = 0.01
"""The least part of the memory that a flag must save to be worth it."""

Bytes = Callable[[HostConfig], int]


def worded(changes: Mapping[str, Any]) -> str:
    """Flags as they are typed."""
    return " ".join(f"--{name}" if value is True else f"--{name}={value}" for name, value in changes.items())


def changed(
    config: HostConfig, changes: Mapping[str, Any], backend: Backend, world_size: int, device_type: str
) -> HostConfig | None:
    """The launch with these flags too; None where the type or the method does not allow them."""
    offloads = config.offloads or config.enable_model_cpu_offload
    if any(name.endswith("_offload") for name in changes) and (device_type == "cpu" or offloads):
        return None
    if all(getattr(config, name) == value for name, value in changes.items()):
        return None
    made = replace(config, **changes)
    try:
        check_config(made, backend, world_size)
    except UsageError:
        return None
    said = " ".join(idle_flags(made, backend, world_size))
    return None if any(f"--{name} has no effect:" in said for name in changes) else made


def singles(
    config: HostConfig, backend: Backend, world_size: int, device_type: str, need: Bytes, free: int
) -> list[tuple[str, int]]:
    """The single flags that save memory and with which the launch fits, with the bytes that it then needs."""
    found, now = [], need(config)
    for changes in LADDER:
        made = changed(config, changes, backend, world_size, device_type)
        if made is not None and (bytes := need(made)) <= min(free, now * (1 - GAIN)):
            found.append((worded(changes), bytes))
    return found


def cheapest(
    config: HostConfig, backend: Backend, world_size: int, device_type: str, need: Bytes, free: int
) -> tuple[dict[str, Any], int] | None:
    """The flags that cost the least with which the launch fits, and the bytes that it then needs."""
    for changes in LADDER:
        made = changed(config, changes, backend, world_size, device_type)
        if made is not None and (bytes := need(made)) <= free:
            return dict(changes), bytes
    chosen: dict[str, Any] = {}
    now, current = need(config), config
    for changes in LADDER:
        made = changed(current, changes, backend, world_size, device_type)
        if made is None or need(made) > now * (1 - GAIN):
            continue
        current, now = made, need(made)
        chosen |= changes
        if now <= free:
            return _pruned(config, chosen, backend, world_size, device_type, need, free)
    return None


def _pruned(
    config: HostConfig,
    chosen: dict[str, Any],
    backend: Backend,
    world_size: int,
    device_type: str,
    need: Bytes,
    free: int,
) -> tuple[dict[str, Any], int]:
    """Without the flags that the later ones have made needless, the dearest left out first."""
    for name in reversed(list(chosen)):
        fewer = {key: value for key, value in chosen.items() if key != name}
        made = changed(config, fewer, backend, world_size, device_type)
        if made is not None and need(made) <= free:
            chosen = fewer
    return chosen, need(replace(config, **chosen))
