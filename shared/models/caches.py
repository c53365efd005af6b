"""Step caches: their settings, which steps they compute, and what they need to know of a transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

Cache = Literal["fbcache", "teacache", "magcache", "taylorseer", "deepcache", "mask"]
CACHES: tuple[Cache, ...] = get_args(Cache)

THRESHOLDS: Mapping[Cache, float] = MappingProxyType({"fbcache": 0.12, "teacache": 0.25, "magcache": 0.06})
"""Change below which a step is left out, as ParaAttention, TeaCache's paper (arXiv 2411.19108, for 1.5 times
the speed) and diffusers take it. xfuser's own for TeaCache is 0.12, which its polynomial for FLUX never falls
below: no step would be left out."""


@dataclass(frozen=True)
class LeftOut:
    """A list of blocks that a step cache leaves out; the lists of a transformer follow each other."""

    blocks: str
    """The module list."""
    returns: tuple[str, ...] = ("hidden_states",)
    """The arguments of a block that it changes, in the order in which it returns them."""
    picture: str = "hidden_states"
    """Which of them is the picture's, whose change is measured."""


@dataclass(frozen=True)
class Modulated:
    """What TeaCache measures in the first block."""

    module: str
    """The module whose (first) output is the modulated input."""
    polynomial: tuple[float, ...]
    """From its relative change to the output's, the highest power first."""


@dataclass(frozen=True)
class CacheSettings:
    """A step cache with its settings, which have diffusers' names. Raises ValueError where they are wrong."""

    cache: Cache
    threshold: float | None = None
    """Relative change below which a step is left out; 0 computes all. None: as in THRESHOLDS."""
    cache_interval: int = 5
    """TaylorSeer, DeepCache: of so many steps one is computed."""
    disable_cache_before_step: int = 3
    """TaylorSeer, DeepCache: steps at the start that are computed."""
    max_order: int | None = None
    """Order of the forecast of what is left out; None: 1 for TaylorSeer, 0 (as it was) for others."""
    max_skip_steps: int = 3
    """MagCache: the most steps in a row that are left out."""
    retention_ratio: float = 0.2
    """MagCache: share of the steps at the start that are computed."""
    mag_ratios: tuple[float, ...] | None = None
    """MagCache: by step, how much larger the blocks' residual is than in the step before."""
    calibrate: bool = False
    """MagCache: compute all steps, and tell the ratios."""
    mask: str = ""
    """By step: 1 computes, 0 leaves out. Steps behind its end are computed."""

    def __post_init__(self) -> None:
        allowed = ", ".join(sorted(self.settings_of(self.cache)))
        for field in fields(self)[1:]:
            if getattr(self, field.name) != field.default and field.name not in self.settings_of(self.cache):
                raise ValueError(f"{self.cache} has no {field.name}; it has {allowed}")
        if self.cache == "mask" and (self.mask[:1] != "1" or set(self.mask) - {"0", "1"}):
            raise ValueError("a mask is 1 (compute) and 0 (leave out) for each step, the first one 1")
        if self.threshold is not None and not 0 <= self.threshold < 1e6:
            raise ValueError("threshold must be 0 or more")
        least = {"cache_interval": 1, "disable_cache_before_step": 1, "max_skip_steps": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be {bound} or more")
        if not 0 <= self.order <= 3:
            raise ValueError("max_order must be 0 to 3")
        if not 0 <= self.retention_ratio <= 1:
            raise ValueError("retention_ratio must be 0 to 1")
        if self.mag_ratios is not None and not (self.mag_ratios and min(self.mag_ratios) > 0):
            raise ValueError("mag_ratios must be numbers above 0, one for each step")

    @staticmethod
    def settings_of(cache: Cache) -> frozenset[str]:
        """The settings that a cache has."""
        return _SETTINGS[cache]

    @property
    def limit(self) -> float:
        """The threshold, or the cache's usual one."""
        return THRESHOLDS[self.cache] if self.threshold is None else self.threshold

    @property
    def order(self) -> int:
        """The order of the forecast."""
        return int(self.cache == "taylorseer") if self.max_order is None else self.max_order

    @property
    def measures(self) -> bool:
        """Whether a step's change decides, which the first block shows; else it is known before the step."""
        return self.cache in ("fbcache", "teacache")

    @property
    def for_unets(self) -> bool:
        """Whether it leaves out the deep layers of a UNet."""
        return self.cache in ("deepcache", "mask")

    @property
    def computes_all(self) -> bool:
        """Whether no step can be left out."""
        return self.calibrate or (self.cache in THRESHOLDS and self.limit == 0)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: the cache, and what is not its default."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


_FORECAST = frozenset({"max_order"})
_SETTINGS: Mapping[Cache, frozenset[str]] = MappingProxyType(
    {
        "fbcache": frozenset({"threshold"}) | _FORECAST,
        "teacache": frozenset({"threshold"}) | _FORECAST,
        "magcache": _FORECAST | {"threshold", "max_skip_steps", "retention_ratio", "mag_ratios", "calibrate"},
        "taylorseer": _FORECAST | {"cache_interval", "disable_cache_before_step"},
        "deepcache": frozenset({"cache_interval", "disable_cache_before_step"}),
        "mask": _FORECAST | {"mask"},
    }
)


class Rule:
    """Which steps of one guidance branch are computed, in order.

    Args:
        settings: of the cache.
        steps: of the whole schedule, that of which `first` is the first step.
        first: steps of it that are not run.
        ratios: MagCache's.
        polynomial: TeaCache's.
    """

    def __init__(
        self,
        settings: CacheSettings,
        steps: int,
        first: int = 0,
        ratios: Sequence[float] = (),
        polynomial: Sequence[float] = (),
    ) -> None:
        self.settings, self.steps, self.polynomial = settings, steps, polynomial
        self.first, self.ratios = first, _stretched(ratios, steps)
        self._sum = 0.0  # TeaCache: change since a step was computed. MagCache: error since then
        self._ratio, self._in_a_row = 1.0, 0

    def ahead(self, step: int) -> bool | None:
        """Whether a step (from 0) is computed; None: its change decides. Each step is asked for once."""
        settings = self.settings
        if step == 0 or settings.computes_all:
            return True
        match settings.cache:
            case "mask":
                return settings.mask[step : step + 1] != "0"
            case "taylorseer" | "deepcache":
                behind = step - settings.disable_cache_before_step
                return behind < 0 or (behind - 1) % settings.cache_interval == 0
            case "magcache":
                return self._magnitude(step + self.first)
            case "teacache" if self.first + step == self.steps - 1:
                return True
        return None

    def both_kinds(self, steps: int) -> int:
        """Steps of so many after which both kinds, computed and left out, have come twice; 2 where one does
        not, and 4 where what is measured decides. For a rule that has not been asked yet."""
        if self.settings.measures or self.settings.computes_all:
            return 4
        kinds = [0, 0]
        for step in range(steps):
            computes = self.ahead(step) is not False
            kinds[computes] += 1
            if computes:
                self.computed()
            if min(kinds) == 2:
                return step + 1
        return 2

    def changed(self, change: float) -> bool:
        """Whether a step with this relative change is computed."""
        if self.settings.cache == "fbcache":
            return change > self.settings.limit
        powers = range(len(self.polynomial) - 1, -1, -1)
        self._sum += sum(
            factor * change**power for factor, power in zip(self.polynomial, powers, strict=True)
        )
        return not self._sum < self.settings.limit

    def computed(self) -> None:
        """A step was computed, so that what adds up begins anew."""
        self._sum, self._ratio, self._in_a_row = 0.0, 1.0, 0

    def _magnitude(self, step: int) -> bool:
        if step < int(self.settings.retention_ratio * self.steps + 0.5):
            return True
        self._ratio *= self.ratios[step] if step < len(self.ratios) else 1.0
        self._in_a_row += 1
        self._sum += abs(1 - self._ratio)
        return self._sum > self.settings.limit or self._in_a_row > self.settings.max_skip_steps


def _stretched(ratios: Sequence[float], steps: int) -> list[float]:
    """Ratios for another number of steps: the nearest ones, as diffusers does it."""
    if not ratios or steps < 2:
        return list(ratios[-1:])
    return [ratios[round(step * (len(ratios) - 1) / (steps - 1))] for step in range(steps)]
