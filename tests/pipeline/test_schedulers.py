"""Schedulers: every name on a type's list runs, changes the picture, and is gone after a request."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from shared.launch.errors import UsageError
from shared.models import MODELS, SCHEDULERS, scheduler_named, schedulers_for
from shared.pipeline.schedulers import SchedulerError, make_scheduler, scheduler_for_request
from shared.pipeline.steps import StepWatch, step_without_sync
from tests import tiny
from tests.seldom import seldom

FAMILIES = {
    "discrete": "sd1",
    "video": "svd",
    "flow": "sd3",
    "flow_flux": "flux",
    "flow_sigmas": "chroma",
    "flow_video": "wan",
}


@cache
def pipe_of(name: str) -> Any:
    return tiny.load(name)


def named(wanted: str) -> Any:
    return scheduler_named(wanted)


def latents(pipe: Any, name: str) -> np.ndarray:
    return tiny.run(pipe, name, steps=4, output_type="latent")


def predict(*inputs: torch.Tensor, **named_inputs: Any) -> tuple[torch.Tensor]:
    """In place of a denoiser, which takes long and here may be any function of its input."""
    noisy = inputs[0] if inputs else named_inputs["hidden_states"]
    return (torch.tanh(noisy[:, :, :4] if noisy.ndim == 5 else noisy),)  # of a video: without its first frame


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_a_family_runs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = FAMILIES[family]
    pipe, spec = pipe_of(name), MODELS[name]
    monkeypatch.setattr(getattr(pipe, spec.denoiser), "forward", predict)
    launched = pipe.scheduler
    before = latents(pipe, name)
    pictures = {}
    for wanted in schedulers_for(spec):
        with scheduler_for_request(pipe, spec, wanted):
            assert type(pipe.scheduler).__name__ == named(wanted)[0].cls
            pictures[wanted] = latents(pipe, name)
            assert np.array_equal(watched(pipe, name), pictures[wanted]), wanted
        assert np.isfinite(pictures[wanted]).all(), wanted
        assert pipe.scheduler is launched
    assert np.array_equal(latents(pipe, name), before)
    for wanted in pictures:
        entry, settings = named(wanted)
        set_already = all(launched.config.get(key, False) == value for key, value in settings.items())
        if not set_already:
            assert not np.array_equal(pictures[wanted], pictures[entry.name]), wanted
    short = [pictures[name] for name in pictures if name in SCHEDULERS]
    assert len({picture.tobytes() for picture in short}) >= len(short) - 2, "they differ"


@pytest.mark.parametrize(
    ("wanted", "cls", "settings", "eta"),
    [
        ("lcm", "LCMScheduler", {}, None),
        ("tcd", "TCDScheduler", {}, None),
        ({"scheduler": "tcd", "eta": 0.3}, "TCDScheduler", {}, 0.3),
        ("euler_trailing", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, None),
        ("ddim_trailing", "DDIMScheduler", {"timestep_spacing": "trailing"}, None),
        ("exponential_dpmpp_2m", "DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}, None),
        ("beta_euler", "EulerDiscreteScheduler", {"use_beta_sigmas": True}, None),
    ],
)
def test_the_picture_is_plain_diffusers(wanted: Any, cls: str, settings: dict[str, Any], eta: Any) -> None:
    from shared.api.requests import GenerateRequest
    from shared.launch.flags import HostConfig
    from shared.pipeline.engine import PipelineEngine

    pipe, launched = pipe_of("sd1"), pipe_of("sd1").scheduler
    config = HostConfig(backend="asyncdiff", type="sd1", checkpoint="x", port=0, width=64, height=64)
    engine = PipelineEngine(pipe, config, tiny.world())
    request = GenerateRequest(positive="a cat", steps=4, seed=3, scheduler=wanted, width=64, height=64)
    reply = engine.generate(request.filled(config), lambda step, steps: None)
    engine.close()
    pipe.scheduler = getattr(diffusers, cls).from_config(launched.config, **settings)
    try:
        more = {} if eta is None else {"eta": eta}
        plain = pipe(
            "a cat",
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(3),
            width=64,
            height=64,
            **more,
        ).images[0]
    finally:
        pipe.scheduler = launched
    assert reply is not None and np.array_equal(np.asarray(reply.pictures[0]), np.asarray(plain))


OTHERS = ("sd1", "sdxl", "svd", "ad", "flux", "sd3", "hy", "pixa", "wan", "qwen", "ltx2")


@pytest.mark.parametrize("name", seldom(MODELS, OTHERS))
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
    lightning = {"scheduler": "flow_euler", "base_shift": 1.0986, "max_shift": 1.0986, "shift_terminal": None}
    qwen = make_scheduler(pipe_of("qwen").scheduler, MODELS["qwen"], lightning)
    assert (qwen.config.base_shift, qwen.config.shift_terminal) == (1.0986, None)
    flux = make_scheduler(pipe_of("flux").scheduler, MODELS["flux"], "DPMSolverMultistepScheduler")
    assert flux.config.use_flow_sigmas and flux.config.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    ("name", "wanted", "says"),
    [
        ("sd3", "ddim", "type sd3 supports flow_euler"),
        ("sd1", "flow_euler", "type sd1 supports ddim"),
        ("svd", "UniPCMultistepScheduler", "type svd supports"),
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
        ("sd1", {"scheduler": "unipc", "disable_corrector": "x"}, "must be a list, each a whole number"),
        ("sd1", {"scheduler": "unipc", "solver_p": {}}, "solver_p must be left out"),
        ("sd1", {"scheduler": "dpmpp_2m", "lower_order_final": "no"}, "must be true or false; got 'no'"),
        ("sd1", {"scheduler": "euler", "steps_offset": "1"}, "must be a whole number; got '1'"),
        ("sd1", {"scheduler": "dpmpp_2m", "solver_type": "x"}, "must be one of midpoint, heun; got 'x'"),
        ("sd1", {"scheduler": "ddim", "thresholding": True, "dynamic_thresholding_ratio": 7}, "quantile"),
        ("sd1", {"scheduler": "lcm", "original_inference_steps": 0}, "lcm with"),
        ("sd1", {"scheduler": "tcd", "eta": 2}, "eta must be a number from 0 to 1; got 2"),
        ("sd1", {"scheduler": "lcm", "eta": 0.5}, "LCMScheduler has no setting 'eta'"),
        ("svd", {"scheduler": "unipc_trailing"}, "type svd supports"),
    ],
)
def test_refused(name: str, wanted: Any, says: str) -> None:
    with pytest.raises(SchedulerError, match=says):
        make_scheduler(pipe_of(name).scheduler, MODELS[name], wanted)


@pytest.mark.parametrize("setting", [{"steps_offset": 150}, {"trained_betas": [0.01] * 900}])
def test_settings_that_break_longer_schedules_only(setting: dict[str, Any]) -> None:
    pipe, wanted = pipe_of("sd1"), {"scheduler": "ddim", "timestep_spacing": "leading", **setting}
    with scheduler_for_request(pipe, MODELS["sd1"], wanted, 5):
        tiny.run(pipe, "sd1", steps=5)
    launched = pipe.scheduler
    with (
        pytest.raises(SchedulerError, match="out of bounds"),
        scheduler_for_request(pipe, MODELS["sd1"], wanted, 50),
    ):
        pass
    assert pipe.scheduler is launched


def test_launch_flag() -> None:
    assert type(tiny.host("sd1", scheduler="k_dpmpp_2m").scheduler).__name__ == "DPMSolverMultistepScheduler"
    with pytest.raises(UsageError, match="--scheduler: type sd1 supports"):
        tiny.host("sd1", scheduler="flow_euler")


@pytest.mark.parametrize("launched", ["k_dpmpp_2m_sde", "dpmpp_2m_sde", "euler_trailing", "ddpm"])
@pytest.mark.parametrize(
    "wanted", ["dpmpp_2m", "euler", "k_heun", {"scheduler": "ddim", "clip_sample": False}]
)
def test_a_requests_scheduler_is_the_same_whatever_the_launchs_is(launched: str, wanted: Any) -> None:
    spec, checkpoints = MODELS["sd1"], pipe_of("sd1").scheduler
    plain = make_scheduler(checkpoints, spec, wanted)
    made = make_scheduler(make_scheduler(checkpoints, spec, launched), spec, wanted)
    assert type(made) is type(plain) and settings_of(made) == settings_of(plain)


def test_what_a_launch_says_in_json_holds_for_the_schedulers_of_requests_too() -> None:
    spec, checkpoints = MODELS["sd1"], pipe_of("sd1").scheduler
    words = {"scheduler": "k_dpmpp_2m", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    made = make_scheduler(make_scheduler(checkpoints, spec, words), spec, "euler")
    assert (made.config.prediction_type, made.config.timestep_spacing) == ("v_prediction", "trailing")
    assert made.config.beta_end == checkpoints.config.beta_end and not made.config.use_karras_sigmas


def settings_of(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def watched(pipe: Any, name: str) -> np.ndarray:
    torch.manual_seed(99)  # not what the request's own generator draws from
    with StepWatch(pipe, torch.device("cpu"), lambda step, steps: None):
        return latents(pipe, name)


def test_steps_get_their_timestep_from_a_copy() -> None:
    scheduler = diffusers.DDIMScheduler()
    seen: list[Any] = []
    scheduler.step = lambda output, timestep, sample: seen.append(timestep)
    step = step_without_sync(scheduler)
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
    step_without_sync(scheduler)(None, launched[0], None)
    assert seen[0] is not launched and torch.equal(seen[0], launched) and scheduler.timesteps is launched


# torchsde's noise; a table that UniPC brings to the GPU, and Heun's sigma on the GPU, in each step.
WAITS = frozenset({"dpmpp_sde", "unipc", "flow_unipc", "flow_heun"})


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
        plain, without_sync = (make_scheduler(current, spec, wanted) for _ in range(2))
        usual, waits = stepped(plain, plain.step, None), named(wanted)[0].name in WAITS
        try:
            made = stepped(without_sync, step_without_sync(without_sync), None if waits else 1)
        except RuntimeError as error:
            failed[wanted] = str(error)
            continue
        if not waits and not torch.allclose(made, usual, atol=1e-5):
            failed[wanted] = f"{float((made - usual).abs().max())} off"
    assert not failed


@pytest.mark.parametrize("name", ["dpmpp_sde", "euler", "unipc"])
def test_noise_beyond_all_measure_is_refused(name: str) -> None:
    current = pipe_of("sd1").scheduler
    with pytest.raises(SchedulerError, match="the largest sigma must be at most 100000; it is"):
        make_scheduler(current, MODELS["sd1"], {"scheduler": name, "beta_end": 0.9999999}, 2)
