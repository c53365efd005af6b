"""The interface of a backend, as data and functions. The backends are in shared.backends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from shared.launch.flags import HostConfig
from shared.models import ModelSpec

World = TypeVar("World")  # a rank's place among the others
Engine = TypeVar("Engine")  # what runs requests on it


@dataclass(frozen=True)
class Needs:
    """What a parallel method needs to know before a pipeline is loaded for it."""

    in_parts: bool = False  # it never calls the denoiser whole: model offload leaves it on the device
    inside_blocks: bool = False  # it works inside the denoiser's blocks: compilation leaves whole ones apart
    divides_weights: str | None = None  # the flag by which it does: LoRAs are fused, and stay
    shards: tuple[str, ...] = ()  # models of which each rank keeps a part: they are loaded to host memory
    stages: tuple[str, ...] = ()  # the same, where each rank keeps a stage of them
    stage_count: int = 1  # how many of those there are
    step_parts: int = 1  # ranks that divide what a step needs while it runs
    row_parts: int = 1  # calls of the denoiser, at once or one after the other, that divide a step's tokens
    decode_parts: int = 1  # ranks that divide what decoding needs
    keeps_patches: bool = False  # whether a rank keeps what the others' patches were in the step before
    copies: bool = False  # whether keys and values lie in memory from which the other ranks' GPUs copy them


def _no_idle_flags(config: HostConfig, world_size: int) -> list[str]:
    return []


def _one_picture(config: HostConfig) -> int:
    return 1


def _as_given(config: HostConfig, world: Any) -> HostConfig:
    return config


def _no_presets(spec: ModelSpec, ranks: int, given: Collection[str]) -> Mapping[str, Mapping[str, Any]]:
    return {}


def runs_plain(config: HostConfig, world_size: int, device_type: str) -> bool:
    """Whether a single rank runs the plain pipeline: there is nothing to divide, and no step to capture."""
    return world_size == 1 and not config.captures(device_type)


@dataclass(frozen=True)
class Backend(Generic[World, Engine]):
    """One host: its types and flags, and how it makes a pipeline parallel.

    The functions take a launch and its world size or this rank's World, and import torch only when called.
    """

    name: str
    title: str
    types: tuple[str, ...]
    flags: frozenset[str]  # beyond the common ones
    check: Callable[[HostConfig, int], None]  # raises UsageError where the plan does not fit the ranks
    needs: Callable[[HostConfig, int], Needs]
    build_engine: Callable[[HostConfig, World], Engine]  # on every rank; loads and makes parallel
    # Type -> flag -> why this method does not support it for this type.
    refuses: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: MappingProxyType({}))
    idle: Callable[[HostConfig, int], list[str]] = _no_idle_flags  # a line for each flag that changes nothing
    plans_memory: bool = True  # whether what its ranks need is planned before anything is loaded
    pictures_at_once: Callable[[HostConfig], int] = _one_picture  # of one request
    # Fills in what the measured link decides, and logs it; on every rank, before anything is loaded.
    choose: Callable[[HostConfig, World], HostConfig] = _as_given
    # Preset -> flag -> value, for a type on so many ranks where these flags are given.
    presets: Callable[[ModelSpec, int, Collection[str]], Mapping[str, Mapping[str, Any]]] = _no_presets

    @property
    def script(self) -> str:
        """The file that starts it."""
        return f"{self.name}_host.py"

    def refusal(self, spec: ModelSpec, flag: str) -> str | None:
        """Why this backend or the type refuses a flag; None if it is supported."""
        return spec.refuses.get(flag) or self.refuses.get(spec.name, {}).get(flag)

    @property
    def config_flags(self) -> list[Field[Any]]:
        """Its flags, common ones too, in the order of their definition."""
        return [
            f for f in fields(HostConfig) if f.metadata and (f.metadata["common"] or f.name in self.flags)
        ]
