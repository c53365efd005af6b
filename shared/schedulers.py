"""Schedulers: from a short name, a diffusers class name or JSON to an instance, for a launch or a request."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from shared.config import scheduler_problem
from shared.models import EDM_CLASSES, SCHEDULERS, ModelSpec, SchedulerSpec

BOUNDS = {"num_train_timesteps": (1, 10000), "solver_order": (1, 3)}
CHOICES = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
}  # of what the constructors take unseen


class SchedulerError(ValueError):
    """A scheduler that this type or installation does not have; the sentence says what there is."""


def make_scheduler(current: Any, spec: ModelSpec, wanted: str | Mapping[str, Any]) -> Any:
    """A new scheduler with the settings of `current`, changed by what the name and the JSON say.

    Args:
        current: the checkpoint's scheduler: its betas, prediction type and so on stay.
        wanted: `"k_euler"`, `"EulerDiscreteScheduler"`, or `{"scheduler": name, **settings}`.

    Raises:
        SchedulerError: not on the type's list, a setting that the class does not take, a package missing.
    """
    import diffusers

    if problem := scheduler_problem(spec, dict(wanted) if isinstance(wanted, Mapping) else wanted):
        raise SchedulerError(problem)
    given = dict(wanted) if isinstance(wanted, Mapping) else {"scheduler": wanted}
    name = given.pop("scheduler")
    entry, settings = _entry(name, spec)
    cls = getattr(diffusers, entry.cls)
    if "sigma_data" in current.config:
        cls, settings = getattr(diffusers, _edm_class(name, entry.cls)), {}
    allowed = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "kwargs")]
    if current.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in allowed:
        raise SchedulerError(
            f"{name} cannot do the zero terminal SNR that this checkpoint was trained with; "
            f"those that can: {', '.join(_with_zero_snr(spec))}"
        )
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise SchedulerError(
            f"{entry.cls} has no setting {unknown[0]!r}; it has {', '.join(sorted(allowed))}"
        )
    for key, value in given.items():
        if problem := _senseless(key, value):
            raise SchedulerError(f"{name}: {key} must be {problem}; got {value!r}")
    try:
        return cls.from_config(current.config, **{**entry.settings, **settings, **given})
    except ImportError as error:
        raise SchedulerError(f"{name} needs a package that is not installed: {_last_line(error)}") from None
    except Exception as error:  # whatever a setting of another type or size leads to
        raise SchedulerError(f"{name} with {given or 'no settings'}: {_last_line(error)}") from None


def set_scheduler(pipe: Any, spec: ModelSpec, wanted: str | Mapping[str, Any] | None) -> None:
    """Make it the pipeline's scheduler; None leaves the checkpoint's. Raises SchedulerError."""
    if wanted is not None:
        pipe.register_modules(scheduler=make_scheduler(pipe.scheduler, spec, wanted))


@contextlib.contextmanager
def scheduler_for_request(
    pipe: Any, spec: ModelSpec, wanted: str | Mapping[str, Any] | None
) -> Iterator[None]:
    """Another scheduler for one call; the launch's is back afterwards. Raises SchedulerError."""
    launched = pipe.scheduler
    try:
        set_scheduler(pipe, spec, wanted)
        yield
    finally:
        pipe.register_modules(scheduler=launched)


def unhurried_step(scheduler: Any) -> Callable[..., Any]:
    """`scheduler.step` without its waits for the GPU: the same numbers, from the CPU.

    Some schedulers look their tables up by timesteps on the GPU (DDIM, DDPM, LCM, PNDM), and noise that a
    CPU's generator draws is copied with a wait (DDPM, Euler ancestral). Each waits, in every step, until the
    GPU has done all that is queued, and then the GPU waits for the next step.
    """
    inner = scheduler.step
    names = vars(sys.modules[type(scheduler).__module__])
    timesteps: torch.Tensor | None = None
    on_host: torch.Tensor | None = None

    @functools.wraps(inner)
    def step(model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal timesteps, on_host
        if timesteps is not scheduler.timesteps or on_host is None:
            timesteps = scheduler.timesteps
            on_host = timesteps.to("cpu", copy=True)
        if _is_one_of(timestep, timesteps):
            timestep = on_host[timestep.storage_offset() - timesteps.storage_offset()]
        with _replaced(vars(scheduler), "timesteps", on_host), _replaced(names, "randn_tensor", _noise):
            return inner(model_output, timestep, *args, **kwargs)

    return step


@contextlib.contextmanager
def _replaced(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Another value under a name, where there is one."""
    if name not in names:
        yield
        return
    before = names[name]
    names[name] = value
    try:
        yield
    finally:
        names[name] = before


def _noise(
    shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
) -> torch.Tensor:
    """diffusers' `randn_tensor`; what a CPU's generator draws reaches the GPU without a wait."""
    first = generator[0] if isinstance(generator, list) else generator
    drawn_here = first is not None and first.device.type == "cpu"
    if not drawn_here or device is None or torch.device(device).type != "cuda":
        return randn_tensor(shape, generator, device, dtype, layout)
    drawn = randn_tensor(shape, generator, torch.device("cpu"), dtype, layout)
    return drawn.pin_memory().to(device, non_blocking=True)


def _is_one_of(timestep: Any, timesteps: torch.Tensor) -> bool:
    """Whether it is an element of them: a view, as pipelines get when they go through them."""
    return (
        isinstance(timestep, torch.Tensor)
        and timestep.ndim == 0
        and timesteps.stride() == (1,)
        and timestep.dtype == timesteps.dtype
        and timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
        and 0 <= timestep.storage_offset() - timesteps.storage_offset() < len(timesteps)
    )


def _entry(name: str, spec: ModelSpec) -> tuple[SchedulerSpec, dict[str, Any]]:
    """What the table says of a short name, or of the first entry of a class that the type may use."""
    if name in SCHEDULERS:
        return SCHEDULERS[name], {}
    if name.removeprefix("k_") in SCHEDULERS:
        return SCHEDULERS[name.removeprefix("k_")], {"use_karras_sigmas": True}
    fitting = (s for s in SCHEDULERS.values() if s.cls == name and spec.scheduler_family in s.families)
    return next(fitting), {}


def _edm_class(name: str, cls: str) -> str:
    """The form of a scheduler for a checkpoint that was trained with EDM's sigmas. Raises SchedulerError."""
    if cls not in EDM_CLASSES:
        known = ", ".join(s.name for s in SCHEDULERS.values() if s.cls in EDM_CLASSES and not s.settings)
        raise SchedulerError(f"{name} does not fit this checkpoint, which has EDM's sigmas; it takes {known}")
    return EDM_CLASSES[cls]


def _with_zero_snr(spec: ModelSpec) -> list[str]:
    import diffusers

    names = [s for s in SCHEDULERS.values() if spec.scheduler_family in s.families]
    return [
        s.name
        for s in names
        if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, s.cls).__init__).parameters
    ]


def _senseless(key: str, value: Any) -> str | None:
    """What a setting must be that constructors take as it comes, or None where it is that."""
    if key in BOUNDS:
        least, most = BOUNDS[key]
        if type(value) is not int or not least <= value <= most:
            return f"a whole number from {least} to {most}"
    if key in CHOICES and value not in CHOICES[key]:
        return f"one of {', '.join(CHOICES[key])}"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    return None


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
