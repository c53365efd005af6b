"""Schedulers: from a short name, a diffusers class name or JSON to an instance, for a launch or a request."""

from __future__ import annotations

import contextlib
import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from shared.launch.checks import scheduler_problem
from shared.models import EDM_CLASSES, SCHEDULERS, ModelSpec, SchedulerSpec, scheduler_named
from shared.parallel.pipeline import Pipeline

BOUNDS = {"num_train_timesteps": (1, 10000), "solver_order": (1, 3)}
CHOICES = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
}  # of what the constructors do not check
HINTS: dict[str, Any] = {"sigma_min": float | None, "sigma_max": float | None, "shift_terminal": float | None}
"""Types of settings that diffusers annotates wrongly somewhere."""
TRIED_STEPS = 5
MOST_NOISE = 1e5  # the largest sigma (4096 with zero SNR); where it is much larger torchsde never ends


class SchedulerError(ValueError):
    """A scheduler that this type or installation does not support; the message says what is supported."""


def make_scheduler(
    current: Any, spec: ModelSpec, wanted: str | Mapping[str, Any], steps: int | None = None
) -> Any:
    """A new scheduler with the settings of `current`, changed by what the name and the JSON say.

    Args:
        current: the pipeline's scheduler. The checkpoint's betas, prediction type and so on stay, and what
            --scheduler says in JSON beside a name; what that name stands for does not.
        wanted: `"k_euler"`, `"EulerDiscreteScheduler"`, or `{"scheduler": name, **settings}`; a setting `eta`
            is what the pipeline hands to the scheduler's steps.
        steps: of the request; some settings break longer schedules only.

    Raises:
        SchedulerError: not on the type's list, a setting that the class does not take, a package missing.
    """
    import diffusers

    if problem := scheduler_problem(spec, dict(wanted) if isinstance(wanted, Mapping) else wanted):
        raise SchedulerError(problem)
    given = dict(wanted) if isinstance(wanted, Mapping) else {"scheduler": wanted}
    name = given.pop("scheduler")
    config = getattr(current, "beneath", current.config)
    entry, settings = _entry(name, spec)
    cls = getattr(diffusers, entry.cls)
    if "sigma_data" in config:
        if settings and not settings.get("use_karras_sigmas"):
            raise SchedulerError(f"{name} does not fit this checkpoint: EDM's sigmas are Karras sigmas")
        cls, settings = getattr(diffusers, _edm_class(name, entry.cls)), {}
    allowed = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "kwargs")]
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in allowed:
        raise SchedulerError(
            f"{name} does not support the zero terminal SNR that this checkpoint was trained with; "
            f"supported: {', '.join(_with_zero_snr(spec))}"
        )
    if "discrete" in entry.families and "eta" in inspect.signature(cls.step).parameters:
        allowed.append("eta")
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise SchedulerError(
            f"{entry.cls} has no setting {unknown[0]!r}; it has {', '.join(sorted(allowed))}"
        )
    for key, value in given.items():
        if problem := _invalid_value(key, value) or _wrong_type(cls, key, value):
            raise SchedulerError(f"{name}: {key} must be {problem}; got {_shown(value)}")
    eta = given.pop("eta", None)
    try:
        made = cls.from_config(config, **{**entry.settings, **settings, **given})
        if given:
            _try_out(cls.from_config(made.config), steps or TRIED_STEPS)
    except ImportError as error:
        raise SchedulerError(f"{name} needs a package that is not installed: {_last_line(error)}") from None
    except Exception as error:  # of any kind: a setting of another type or size
        raise SchedulerError(f"{name} with {_shown(given or 'no settings')}: {_last_line(error)}") from None
    made.eta, made.beneath = eta, _with(config, given)
    return made


def set_scheduler(
    pipe: Pipeline, spec: ModelSpec, wanted: str | Mapping[str, Any] | None, steps: int | None = None
) -> None:
    """Make it the pipeline's scheduler; None leaves the checkpoint's. Raises SchedulerError."""
    if wanted is not None:
        pipe.register_modules(scheduler=make_scheduler(pipe.scheduler, spec, wanted, steps))


@contextlib.contextmanager
def scheduler_for_request(
    pipe: Pipeline,
    spec: ModelSpec,
    wanted: str | Mapping[str, Any] | None,
    steps: int | None = None,
    default: Any = None,
) -> Iterator[None]:
    """Another scheduler for one call of `steps`; the launch's is back afterwards. Raises SchedulerError.

    Args:
        default: in place of the launch's, where the request names none.
    """
    launched = pipe.scheduler
    try:
        if wanted is None and default is not None:
            pipe.register_modules(scheduler=default)
        set_scheduler(pipe, spec, wanted, steps)
        yield
    finally:
        pipe.register_modules(scheduler=launched)


def _with(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's settings with some more, which are then as good as the checkpoint's own."""
    unset = [key for key in config.get("_use_default_values", []) if key not in given]
    return {**config, **given, "_use_default_values": unset}


def _entry(name: str, spec: ModelSpec) -> tuple[SchedulerSpec, dict[str, Any]]:
    """What the table says of a short name, or of the first entry of a class that the type may use."""
    if found := scheduler_named(name):
        return found[0], dict(found[1])
    fitting = (s for s in SCHEDULERS.values() if s.cls == name and spec.scheduler_family in s.families)
    return next(fitting), {}


def _edm_class(name: str, cls: str) -> str:
    """The form of a scheduler for a checkpoint that was trained with EDM's sigmas. Raises SchedulerError."""
    if cls not in EDM_CLASSES:
        known = ", ".join(s.name for s in SCHEDULERS.values() if s.cls in EDM_CLASSES and not s.settings)
        raise SchedulerError(
            f"{name} does not fit this checkpoint, which was trained with EDM's sigmas; supported: {known}"
        )
    return EDM_CLASSES[cls]


def _with_zero_snr(spec: ModelSpec) -> list[str]:
    import diffusers

    names = [s for s in SCHEDULERS.values() if spec.scheduler_family in s.families]
    return [
        s.name
        for s in names
        if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, s.cls).__init__).parameters
    ]


def _invalid_value(key: str, value: Any) -> str | None:
    """What a setting that constructors do not check must be, or None if it is valid."""
    if key == "eta" and not (type(value) in (int, float) and 0 <= value <= 1):
        return "a number from 0 to 1"
    if key in BOUNDS:
        least, most = BOUNDS[key]
        if type(value) is not int or not least <= value <= most:
            return f"a whole number from {least} to {most}"
    if key in CHOICES and value not in CHOICES[key]:
        return f"one of {', '.join(CHOICES[key])}"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    return None


def _wrong_type(cls: type, key: str, value: Any) -> str | None:
    """What a setting must be by the constructor's annotation, or None if it is valid."""
    if key in CHOICES or key == "eta":
        return None
    hints = _alternatives(HINTS.get(key) or typing.get_type_hints(cls.__init__)[key])  # type: ignore[misc]
    if any(_fits(value, hint) for hint in hints):
        return None
    return " or ".join(dict.fromkeys(_words(hint) for hint in hints))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint and hint in (bool, int, str, types.NoneType)


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if typing.get_origin(hint) is list:
        return f"a list, each {_words(typing.get_args(hint)[0])}"
    known = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return known.get(hint, "null" if hint is types.NoneType else "left out")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _try_out(scheduler: Any, steps: int) -> None:
    """All steps on a tiny sample: settings that fail are reported before the ranks work. Raises anything."""
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    drawn = "generator" in inspect.signature(scheduler.step).parameters
    with torch.random.fork_rng(devices=[]):
        scheduler.set_timesteps(steps, **shift)
        most = float(torch.as_tensor(getattr(scheduler, "sigmas", 0.0)).max())
        if not most <= MOST_NOISE:
            raise ValueError(f"the largest sigma must be at most {MOST_NOISE:g}; it is {most:g}")
        sample = torch.ones(1, 4, 8, 8)
        for timestep in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, timestep)
            more = {"generator": torch.Generator().manual_seed(0)} if drawn else {}
            sample = scheduler.step(torch.ones_like(sample), timestep, sample, **more)[0]


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
