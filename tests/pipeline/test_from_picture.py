"""Image to image and inpainting on one rank: what diffusers' own pipeline of the type makes of a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from shared.api.faults import RequestError
from shared.api.media import encode_image
from shared.api.parsing import check_request
from shared.api.replies import Reply
from shared.api.warned import collecting_warnings
from shared.backends import BACKENDS
from shared.models import MODELS, Start
from shared.parallel.asyncdiff import AsyncDiff
from shared.parallel.pipeline import statistics_of_squares
from shared.parallel.xdit.pipefusion import XDiTPipeFusion
from shared.pipeline.adapters import load_ip_adapters
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import load_pipeline
from tests import tiny, tiny_extras
from tests.seldom import seldom

EXACT_DB = 45.0
SIZE = (72, 104)  # width and height: neither is a power of two
STEPS = 10
FRAMES = (5, 6, 7)
"""The seeds of a video's pictures."""


def picture(seed: int = 5) -> Image.Image:
    return tiny.picture(64, seed).resize(SIZE, Image.Resampling.BICUBIC)


def mask() -> Image.Image:
    """White on the right side, with an edge over a third of the width."""
    ramp = np.clip(np.linspace(-1, 2, SIZE[0]), 0, 1) * 255
    return Image.fromarray(np.tile(ramp.astype(np.uint8), (SIZE[1], 1)))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS)


def png(image: Image.Image) -> bytes:
    return encode_image(image, "png")


@cache
def engine(name: str) -> PipelineEngine:
    config = tiny.config(name, width=64, height=64)
    return PipelineEngine(tiny.load(name), config, tiny.world())


def reply(on: PipelineEngine, **fields: Any) -> Reply:
    body = {"seed": 3, "steps": STEPS, "cfg": 4.0, "positive": "a cat"} | fields
    made = on.generate(check_request(body, on.config), lambda step, steps: None)
    assert made is not None
    return made


def latents(on: PipelineEngine, **fields: Any) -> np.ndarray:
    made = reply(on, output_format="latent", **fields).latent
    assert made is not None
    return safetensors.torch.load(made)["latent"].float().numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(float(np.ptp(b)) ** 2 / error)


def theirs(
    name: str,
    start: Start,
    strength: float,
    folder: Path | None = None,
    painted: Image.Image | None = None,
    put_on: Callable[[Any], None] = lambda pipe: None,
    parts: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> np.ndarray:
    """Latents that diffusers' class makes, loaded from the checkpoint by itself."""
    multiple = MODELS[name].size_multiple
    size = (SIZE[0] // multiple * multiple, SIZE[1] // multiple * multiple)
    folder = folder or tiny.checkpoint(name)
    parts = tiny.own_parts(name, folder) | dict(parts)
    pipe = getattr(diffusers, start.pipeline).from_pretrained(folder, local_files_only=True, **parts)
    put_on(pipe)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        **MODELS[name].pipeline_defaults,
        "prompt": "a cat",
        start.image: [resized(picture(seed), size) for seed in FRAMES]
        if start.frames
        else resized(picture(), size),
        "num_inference_steps": STEPS,
        **start.arguments,
        MODELS[name].cfg_field: 4.0 + MODELS[name].cfg_offset,
        "generator": torch.Generator("cpu").manual_seed(3),
        "output_type": "latent",
    }
    if start.refers:
        seen = [picture(seed) for seed in FRAMES]
        arguments[start.image] = seen if start.most > 1 else picture()
    elif start.strength is not None:
        arguments["strength"] = strength
    if start.sized:
        arguments |= {"width": size[0], "height": size[1]}
    if area := MODELS[name].area_field:
        arguments[area] = size[0] * size[1]
    if start.kind != "image":
        arguments["mask_image"] = resized(painted or mask(), size)
    made = pipe(**arguments, **more)
    if MODELS[name].squares:
        mean, deviation = (x.view(1, -1, 1, 1) for x in statistics_of_squares(pipe.vae))
        normed = (pipe._patchify_latents(made.images) - mean) / deviation
        return pipe._pack_latents(normed).numpy()
    return (made.frames if start.frames else made.images).float().numpy()


FILLS = [name for name, spec in MODELS.items() if spec.start("fill", control=False)]


PAINTED = [(n, *how) for n in FILLS for how in ((True, 1.0), (True, 0.5), (False, 0.5))]


@pytest.mark.parametrize(
    ("name", "with_mask", "strength"),
    seldom(PAINTED, [("sd1", True, 0.5), ("sdxl", True, 1.0), ("sdxl", False, 0.5), ("flux", True, 0.5)]),
)
def test_a_checkpoint_for_inpainting_paints_the_mask_or_all(
    name: str, with_mask: bool, strength: float
) -> None:
    folder = tiny_extras.fill_checkpoint(name)
    config = tiny.config(name, width=64, height=64, checkpoint=str(folder))
    needs = BACKENDS[config.backend].needs(config, 1)
    on = PipelineEngine(load_pipeline(MODELS[name], config, torch.device("cpu"), needs), config, tiny.world())
    start = MODELS[name].start("fill", control=False)
    assert start is not None and type(on.pipe).__name__ == start.pipeline
    fields = {"image": png(picture()), "strength": strength} | ({"mask": png(mask())} if with_mask else {})
    made = latents(on, **fields)
    painted = mask() if with_mask else Image.new("L", SIZE, 255)
    assert psnr(made, theirs(name, start, strength, folder, painted)) >= EXACT_DB


def starts(kind: str) -> list[tuple[str, Start]]:
    """But of videos that begin with the picture, which test_video_begins.py has."""
    found = [(name, start) for name, spec in MODELS.items() for start in spec.starts]
    return [(n, s) for n, s in found if s.kind == kind and not s.control and not s.begins]


# A UNet and its frames, latents in squares and as they are, pictures to look at.
OFTEN = ("sd1", "ad", "flux", "sd3", "qwenedit", "kontext")
CELLS = [
    pytest.param(
        name,
        start,
        strength,
        id=f"{name}-{start.kind}-{strength}",
        # One strength of some types in every test run, another from type to type.
        marks=[] if name in OFTEN and (start.refers or place == number % 3) else [pytest.mark.slow],
    )
    for kind in ("image", "inpaint")
    for number, (name, start) in enumerate(starts(kind))
    for place, strength in enumerate((0.2, 0.5, 1.0))
    if strength == 1 or not start.refers
]


@pytest.mark.parametrize(("name", "start", "strength"), CELLS)
def test_a_picture_becomes_what_diffusers_makes_of_it(name: str, start: Start, strength: float) -> None:
    fields: dict[str, Any] = {"image": png(picture()), "strength": strength}
    if start.frames or start.most > 1:
        fields["image"] = [png(picture(seed)) for seed in FRAMES]
    if start.kind == "inpaint":
        fields["mask"] = png(mask())
    if MODELS[name].aspect_multiple:
        fields |= {"width": SIZE[0] // 16 * 16, "height": SIZE[1] // 16 * 16}
    made = latents(engine(name), **fields)
    # Random weights see little of a picture that they only look at: 79 dB between two of them.
    assert psnr(made, theirs(name, start, strength)) >= (100 if start.refers else EXACT_DB)


def test_an_edit_has_the_size_that_was_asked_for_and_is_of_its_picture() -> None:
    """Kontext takes width and height only as an aspect, of 1024 x 1024 pixels where nothing else is said."""
    on = engine("kontext")
    fields: dict[str, Any] = {"image": png(picture()), "width": 80, "height": 48, "steps": 2}
    made = reply(on, **fields)
    assert made.pictures[0].size == (made.width, made.height) == (80, 48)
    other = latents(on, **fields | {"image": png(picture(6))})
    alone = latents(on, **{name: value for name, value in fields.items() if name != "image"})
    assert not any(np.array_equal(latents(on, **fields), one) for one in (other, alone))


def controlled() -> list[Any]:
    """Every pipeline whose ControlNet sees a control image, those that take an IP-Adapter with one too."""
    every = [(n, s) for n, spec in MODELS.items() for s in spec.starts if s.control and s.kind != "fill"]
    found = [(n, s) for n, s in every if s.control_image is not None]
    often = ("sdxl", "flux", "zimage")
    return [
        pytest.param(n, s, id=f"{n}-{s.kind}", marks=[] if n in often else [pytest.mark.slow])
        for n, s in found
    ]


@pytest.mark.parametrize(("name", "start"), controlled())
def test_beside_a_control_net_and_an_ip_adapter(name: str, start: Start) -> None:
    flags: dict[str, Any] = {"control_net": {str(tiny_extras.control_net(name)): 0.8}}
    hint = picture(9)
    fields: dict[str, Any] = {"image": png(picture()), "control_image": png(hint)}
    if start.strength is not None:
        fields["strength"] = 0.5
    more: dict[str, Any] = {"controlnet_conditioning_scale": 0.8}
    if start.ip_adapter:
        flags["ip_adapter"] = {str(tiny_extras.ip_adapter(name)): 0.7}
        fields["ip_image"], more["ip_adapter_image"] = png(picture(8)), picture(8)
    if start.kind == "inpaint":
        fields["mask"] = png(mask())
    if start.frames:
        fields["image"] = [png(picture(seed)) for seed in FRAMES]
    more[str(start.control_image)] = [hint] * len(FRAMES) if start.frames else hint
    config = tiny.config(name, width=64, height=64, **flags)
    made = latents(PipelineEngine(tiny.host(name, **flags), config, tiny.world()), **fields)

    def put_on(pipe: Any) -> None:
        if start.ip_adapter:
            load_ip_adapters(pipe, MODELS[name], {str(tiny_extras.ip_adapter(name)): 0.7}, torch.float32)

    net = getattr(diffusers, MODELS[name].control_net_class or "").from_pretrained(
        tiny_extras.control_net(name)
    )
    wanted = theirs(name, start, 0.5, put_on=put_on, parts={"controlnet": net}, **more)
    assert psnr(made, wanted) >= EXACT_DB


def test_a_control_net_without_masks_refuses_one() -> None:
    """Version 1 of Z-Image's sees the control picture alone; it controls all the same."""
    flags: dict[str, Any] = {"control_net": {str(tiny_extras.control_net("zimage", masks=False)): 0.8}}
    config = tiny.config("zimage", width=64, height=64, **flags)
    on = PipelineEngine(tiny.host("zimage", **flags), config, tiny.world())
    hints = {"control_image": png(picture(9))}
    with pytest.raises(RequestError, match="mask: needs a ControlNet that was trained with masks"):
        latents(on, image=png(picture()), mask=png(mask()), **hints)
    with pytest.raises(RequestError, match="strength: type zimage with a mask and --control_net runs all"):
        latents(on, image=png(picture()), mask=png(mask()), strength=0.5, **hints)
    with pytest.raises(
        RequestError, match="image: type zimage with --control_net: this host has no pipeline"
    ):
        latents(on, image=png(picture()), **hints)
    assert not np.array_equal(latents(on, **hints), latents(on, control_image=png(picture(8))))


def test_a_mask_changes_only_the_inside() -> None:
    fields: dict[str, Any] = {"image": png(picture()), "strength": 1.0, "seed": 4}
    hard = mask().point(lambda value: 255 if value > 127 else 0)
    made, whole = (
        np.asarray(reply(engine("sd1"), mask=png(one), **fields).pictures[0]).astype(int)
        for one in (hard, Image.new("L", SIZE, 255))
    )
    inside, own = np.asarray(hard) == 255, np.asarray(picture()).astype(int)
    assert np.array_equal(made[~inside], own[~inside])
    assert np.abs(made[inside] - own[inside]).mean() > 8 and not np.array_equal(made, whole)
    soft = np.asarray(reply(engine("sd1"), mask=png(mask()), **fields).pictures[0]).astype(int)
    edge = (np.asarray(mask()) > 0) & (np.asarray(mask()) < 64)
    assert 0 < np.abs(soft[edge] - own[edge]).mean() < np.abs(soft[inside] - own[inside]).mean()


def test_a_mask_that_is_nowhere_white_is_told() -> None:
    fields: dict[str, Any] = {"image": png(picture()), "seed": 4, "steps": 1}
    for grey, warned in ((0, ["mask: is nowhere white, so nothing is painted anew"]), (127, None), (128, [])):
        with collecting_warnings() as told:
            request = check_request(
                {"positive": "a cat", "mask": png(Image.new("L", SIZE, grey)), **fields}, engine("sd1").config
            )
            assert not told  # the server's thread does not decode it again
            engine("sd1").generate(request, lambda step, steps: None)
        assert bool(told) == (grey < 128) and (warned is None or told == warned)


def test_the_latent_of_an_inpainted_picture_is_the_blended_one() -> None:
    fields: dict[str, Any] = {"image": png(picture()), "mask": png(mask()), "strength": 0.5}
    told = reply(engine("sd1"), return_latent=True, **fields).latent
    assert told is not None
    assert np.array_equal(safetensors.torch.load(told)["latent"].numpy(), latents(engine("sd1"), **fields))


def test_requests_of_every_kind_follow_each_other() -> None:
    on = engine("sd1")
    start: dict[str, Any] = {"image": png(picture()), "strength": 0.5}
    asked: list[dict[str, Any]] = [
        {},
        start,
        {**start, "mask": png(mask()), "scheduler": "heun"},
        {**start, "width": 64, "height": 96, "scheduler": "euler_a"},
        {"scheduler": "dpmpp_2m"},
        {**start, "mask": png(mask()), "negative": "blur", "strength": 0.2},
    ]
    first = [latents(on, **fields) for fields in asked]
    again = [latents(on, **fields) for fields in reversed(asked)]
    for fields, one, other in zip(asked, first, reversed(again), strict=True):
        fresh = PipelineEngine(tiny.load("sd1"), on.config, tiny.world())
        assert np.array_equal(one, other) and np.array_equal(one, latents(fresh, **fields))


@pytest.mark.parametrize(("scheduler", "calls"), [("ddim", 5), ("heun", 10), ("pndm", 6)])
def test_steps_and_progress_are_those_that_run(scheduler: str, calls: int) -> None:
    on, told = engine("sd1"), []
    body = {"seed": 3, "steps": STEPS, "image": png(picture()), "strength": 0.5, "scheduler": scheduler}
    made = on.generate(check_request(body, on.config), lambda step, steps: told.append((step, steps)))
    assert made is not None and made.steps == (6 if scheduler == "pndm" else 5)
    assert told[-1][0] == told[-1][1] and abs(len(told) - calls) <= 1


def test_the_progress_bar_is_hidden_in_the_warm_up_only() -> None:
    pipe = tiny.load("sd1")
    on = PipelineEngine(pipe, tiny.config("sd1", width=64, height=64), tiny.world())
    image, shown = png(picture()), pipe._progress_bar_config
    pipe.set_progress_bar_config(disable=True)
    reply(on, image=image)
    pipe.set_progress_bar_config(desc="steps")
    reply(on, image=image)
    running = on._pipelines._of(MODELS["sd1"].starts[0])[0]
    assert running._progress_bar_config == {"desc": "steps"}  # type: ignore[attr-defined]
    pipe.set_progress_bar_config(**shown)


def test_models_leave_the_device_and_pictures_are_watermarked_as_from_noise() -> None:
    pipe: Any = tiny.load("sdxl")
    freed: list[bool] = []
    pipe.maybe_free_model_hooks = lambda: freed.append(True)
    pipe.watermark = SimpleNamespace(apply_watermark=torch.ones_like)
    on = PipelineEngine(pipe, tiny.config("sdxl", width=64, height=64), tiny.world())
    for fields in ({}, {"image": png(picture())}):
        freed.clear()
        assert np.asarray(reply(on, output_format="png", **fields).pictures[0]).min() == 255
        assert len(freed) == 2, fields  # at the pipeline's end, and whatever happens


@pytest.mark.parametrize("fields", [{"strength": 0.05}, {"strength": 0.2, "steps": 4}])
def test_a_strength_that_leaves_no_step(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"strength: leaves no step to run: 0\.\d+ of \d+ steps"):
        reply(engine("sd1"), image=png(picture()), scheduler="ddim", **fields)


def test_what_a_pipeline_has_no_argument_for_is_refused() -> None:
    flags = {"control_net": {str(tiny_extras.control_net("flux")): 1.0}}
    config = tiny.config("flux", width=64, height=64, **flags)
    on = PipelineEngine(tiny.host("flux", **flags), config, tiny.world())
    with pytest.raises(RequestError, match="negative: is not supported from a picture") as caught:
        reply(on, image=png(picture()), control_image=png(picture()), negative="blur", true_cfg_scale=2.0)
    assert caught.value.status == 422


def test_a_late_start_has_its_place_in_the_schedule() -> None:
    pipe = tiny.load("sd1")
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(6)  # all but the first come twice
    with AsyncDiff(pipe, 1, time_shift=True) as method:
        for first in (0, 2, 4):
            method.begin_late(11 - first, first)
            assert method._position(pipe.scheduler.timesteps[first]) == first
        method.begin(6)
        assert method._position(pipe.scheduler.timesteps[1]) == 1


def test_pipe_fusion_starts_from_no_picture() -> None:
    method = SimpleNamespace(pipeline=object())
    XDiTPipeFusion.take(method, method.pipeline)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image: PipeFusion runs xfuser's own pipelines"):
        XDiTPipeFusion.take(method, object())  # type: ignore[arg-type]
