"""Schedulers: every name on a type's list runs, changes the picture, and is gone after a request."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from shared.config import UsageError
from shared.generate import StepWatch
from shared.models import MODELS, SCHEDULERS, schedulers_for
from shared.schedulers import SchedulerError, make_scheduler, scheduler_for_request, unhurried_step
from tests import tiny

FAMILIES = {"discrete": "sd1", "video": "svd", "flow": "sd3", "flow_flux": "flux"}


@cache
def pipe_of(name: str) -> Any:
    return tiny.load(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_a_family_runs(family: str) -> None:
    name = FAMILIES[family]
    pipe, spec = pipe_of(name), MODELS[name]
    launched = pipe.scheduler
    before = tiny.run(pipe, name, steps=4)
    pictures = {}
    for wanted in schedulers_for(spec):
        with scheduler_for_request(pipe, spec, wanted):
            assert type(pipe.scheduler).__name__ == SCHEDULERS[wanted.removeprefix("k_")].cls
            pictures[wanted] = tiny.run(pipe, name, steps=4)
            assert np.array_equal(watched(pipe, name), pictures[wanted]), wanted
        assert np.isfinite(pictures[wanted]).all(), wanted
        assert pipe.scheduler is launched
    assert np.array_equal(tiny.run(pipe, name, steps=4), before)
    assert len({picture.tobytes() for picture in pictures.values()}) >= len(pictures) - 2, "they differ"
    for wanted in pictures:
        if wanted.startswith("k_") and not launched.config.get("use_karras_sigmas"):
            assert not np.array_equal(pictures[wanted], pictures[wanted[2:]]), wanted


@pytest.mark.parametrize("name", MODELS)
def test_each_type_takes_another_scheduler(name: str) -> None:
    pipe, spec = pipe_of(name), MODELS[name]
    current = type(pipe.scheduler).__name__
    wanted = next(w for w in schedulers_for(spec) if w in SCHEDULERS and SCHEDULERS[w].cls != current)
    with scheduler_for_request(pipe, spec, wanted):
        changed = tiny.run(pipe, name, steps=4)
    assert not np.array_equal(changed, tiny.run(pipe, name, steps=4))


def test_class_names_and_json() -> None:
    spec, current = MODELS["sd1"], pipe_of("sd1").scheduler
    made = make_scheduler(
        current, spec, {"scheduler": "ddim", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    )
    assert made.config.timestep_spacing == "trailing" and made.config.rescale_betas_zero_snr
    assert made.config.beta_end == current.config.beta_end, "the checkpoint's settings stay"
    assert type(make_scheduler(current, spec, "EulerDiscreteScheduler")).__name__ == "EulerDiscreteScheduler"
    assert make_scheduler(current, spec, "k_euler").config.use_karras_sigmas
    flux = make_scheduler(pipe_of("flux").scheduler, MODELS["flux"], "DPMSolverMultistepScheduler")
    assert flux.config.use_flow_sigmas and flux.config.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    ("name", "wanted", "says"),
    [
        ("sd3", "ddim", "type sd3 takes flow_euler"),
        ("sd1", "flow_euler", "type sd1 takes ddim"),
        ("svd", "UniPCMultistepScheduler", "type svd takes"),
        ("sd1", "k_ddim", "got 'k_ddim'"),
        (
            "sd1",
            {"scheduler": "ddim", "spacing": "trailing"},
            "DDIMScheduler has no setting 'spacing'; it has beta",
        ),
        ("sd1", {"scheduler": "ddim", "num_train_timesteps": -5}, "whole number from 1 to 10000; got -5"),
        ("sd1", {"scheduler": "ddim", "num_train_timesteps": True}, "whole number from 1 to 10000"),
        (
            "sd1",
            {"scheduler": "dpmpp_2m", "solver_order": 9},
            "solver_order must be a whole number from 1 to 3",
        ),
        ("sd1", {"scheduler": "ddim", "timestep_spacing": "trialing"}, "must be one of linspace, leading"),
        ("sd1", {"scheduler": "euler", "beta_start": float("inf")}, "beta_start must be a finite number"),
        ("sd1", {"scheduler": "ddim", "trained_betas": []}, "trained_betas"),  # IndexError
        ("sd1", {"scheduler": "ddim", "trained_betas": "x"}, "trained_betas"),
    ],
)
def test_refused(name: str, wanted: Any, says: str) -> None:
    with pytest.raises(SchedulerError, match=says):
        make_scheduler(pipe_of(name).scheduler, MODELS[name], wanted)


def test_launch_flag() -> None:
    assert type(tiny.host("sd1", scheduler="k_dpmpp_2m").scheduler).__name__ == "DPMSolverMultistepScheduler"
    with pytest.raises(UsageError, match="--scheduler: type sd1 takes"):
        tiny.host("sd1", scheduler="flow_euler")


def watched(pipe: Any, name: str) -> np.ndarray:
    torch.manual_seed(99)  # not what the request's own generator draws from
    with StepWatch(pipe, torch.device("cpu"), lambda step, steps: None):
        return tiny.run(pipe, name, steps=4)


def test_steps_get_their_timestep_from_a_copy() -> None:
    scheduler = diffusers.DDIMScheduler()
    seen: list[Any] = []
    scheduler.step = lambda output, timestep, sample: seen.append(timestep)
    step = unhurried_step(scheduler)
    for steps in (4, 7):
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps[2:]:  # as image-to-image does
            step(None, timestep, None)
            assert seen[-1] == timestep
            assert seen[-1].untyped_storage().data_ptr() != scheduler.timesteps.untyped_storage().data_ptr()
    for other in (torch.tensor(5), 5, scheduler.timesteps[:2], scheduler.timesteps.clone()[1]):
        step(None, other, sample=None)
        assert seen[-1] is other


def test_steps_look_up_a_copy_of_the_timesteps() -> None:
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(4)
    launched, seen = scheduler.timesteps, []
    scheduler.step = lambda output, timestep, sample: seen.append(scheduler.timesteps)
    unhurried_step(scheduler)(None, launched[0], None)
    assert seen[0] is not launched and torch.equal(seen[0], launched) and scheduler.timesteps is launched


# torchsde's noise; a table that UniPC brings to the GPU, and Heun's sigma on the GPU, in each step.
WAITS = frozenset({"dpmpp_sde", "k_dpmpp_sde", "unipc", "k_unipc", "flow_unipc", "flow_heun"})


def stepped(scheduler: Any, step: Any, from_step: int | None) -> torch.Tensor:
    """Latents on a GPU after five steps; from `from_step` on, whatever waits for the GPU raises."""
    cuda = torch.device("cuda")
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(5, device=cuda, **shift)
    drawn = "generator" in inspect.signature(scheduler.step).parameters
    more = {"generator": torch.Generator().manual_seed(1)} if drawn else {}
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)).to(cuda)
    try:
        for number, timestep in enumerate(scheduler.timesteps):
            if number == from_step:
                torch.cuda.set_sync_debug_mode("error")
            sample = step(torch.sin(scale(sample, timestep)), timestep, sample, **more)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sample


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_do_not_wait_for_the_gpu(family: str) -> None:
    """Not the first one, which looks for its place in the schedule."""
    current, spec = pipe_of(FAMILIES[family]).scheduler, MODELS[FAMILIES[family]]
    failed = {}
    for wanted in schedulers_for(spec):
        plain, unhurried = (make_scheduler(current, spec, wanted) for _ in range(2))
        usual = stepped(plain, plain.step, None)
        try:
            made = stepped(unhurried, unhurried_step(unhurried), None if wanted in WAITS else 1)
        except RuntimeError as error:
            failed[wanted] = str(error)
            continue
        if wanted not in WAITS and not torch.allclose(made, usual, atol=1e-5):
            failed[wanted] = f"{float((made - usual).abs().max())} off"
    assert not failed
