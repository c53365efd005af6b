"""shared.arguments: parts of a schedule, on one rank."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import safetensors.torch
import torch

from shared.comm import World
from shared.generate import PipelineEngine
from shared.media import encode_image
from shared.models import MODELS, schedulers_for
from shared.requests import RequestError, check_request
from tests import tiny

PAIRED = ("dpm_2", "heun", "dpmpp_sde")
"""Schedulers whose steps come in pairs."""
ONE_STEP = ("ddim", "euler", "k_euler")
"""Those that remember nothing of the step before, and draw nothing."""
DRAWING = ("ddpm", "euler_a", "dpmpp_2m_sde", "k_dpmpp_2m_sde")
EVERY = [name for name in schedulers_for(MODELS["sd1"]) if not name.removeprefix("k_").startswith(PAIRED)]
PARTIAL = [name for name, spec in MODELS.items() if "denoising_start" in spec.fields]


@cache
def engine(name: str) -> PipelineEngine:
    config = tiny.config(name, width=64, height=64)
    groups: Any = (None, None, None)
    return PipelineEngine(tiny.load(name), config, World(0, 1, 0, torch.device("cpu"), *groups))


def latents(name: str, **fields: Any) -> torch.Tensor:
    spec, on = MODELS[name], engine(name)
    body = {"seed": 3, "steps": 12, "cfg": 2.0, "output_format": "latent"} | fields
    if "positive" in spec.fields:
        body["positive"] = "a cat"
    if spec.image == "needed":
        body["image"] = encode_image(tiny.picture(16), "png")
    if spec.output == "video":
        body["frames"] = 2
    reply = on.generate(check_request(body, on.config), lambda step, steps: None)
    assert reply is not None and reply.latent is not None
    return safetensors.torch.load(reply.latent)["latent"]


def packed(tensor: torch.Tensor) -> bytes:
    return safetensors.torch.save({"latent": tensor.contiguous()})


def distance(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("scheduler", EVERY)
def test_two_parts_make_the_whole_with_every_scheduler(scheduler: str):
    whole = latents("sd1", scheduler=scheduler)
    half = latents("sd1", scheduler=scheduler, denoising_end=0.5)
    rest = latents("sd1", scheduler=scheduler, denoising_start=0.5, latent=packed(half))
    assert torch.isfinite(rest).all() and distance(half, whole) > 0.01
    if scheduler in ONE_STEP:
        assert distance(rest, whole) < 1e-5
    elif scheduler not in DRAWING:  # multistep solvers begin anew, and forget a little
        assert distance(rest, whole) < 0.01
    again = latents("sd1", scheduler=scheduler, denoising_start=0.3, add_noise=True, latent=packed(whole))
    assert torch.isfinite(again).all() and distance(again, whole) < 2


@pytest.mark.parametrize("name", PARTIAL)
def test_two_parts_make_the_whole_of_every_type(name: str):
    scheduler = {"discrete": "ddim"}.get(MODELS[name].scheduler_family, "flow_euler")
    asked: dict[str, Any] = {"scheduler": scheduler, "steps": 4}
    whole = latents(name, **asked)
    half = latents(name, **asked, denoising_end=0.5)
    rest = latents(name, **asked, denoising_start=0.5, latent=packed(half))
    assert distance(half, whole) > 1e-3 and distance(rest, whole) < 1e-5


def test_parts_of_pairs_are_refused():
    for scheduler in ("heun", "dpm_2", "k_dpmpp_sde"):
        with pytest.raises(RequestError, match="cannot run in parts"):
            latents("sd1", scheduler=scheduler, denoising_end=0.5)
    with pytest.raises(RequestError, match="PNDMScheduler cannot run in parts"):
        latents("sd1", scheduler={"scheduler": "pndm", "skip_prk_steps": False}, denoising_end=0.5)


def test_true_guidance_hears_a_negative_prompt():
    usual = latents("flux", steps=2)
    guided = [latents("flux", steps=2, true_cfg_scale=3.0, **more) for more in ({}, {"negative": "blur"})]
    assert distance(guided[0], usual) > 1e-4 and distance(*guided) > 1e-4
    assert distance(latents("flux", steps=2, true_cfg_scale=1.0), usual) == 0
    for fields in ({}, {"true_cfg_scale": 1.0}):
        with pytest.raises(RequestError, match="type flux hears it with true_cfg_scale above 1 alone"):
            latents("flux", negative="blur", **fields)
