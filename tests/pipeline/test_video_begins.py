"""Videos that begin with a picture, of LTX-2 and HunyuanVideo 1.5, are those that plain diffusers makes."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load

from shared.api.faults import RequestError
from shared.api.media import encode_image
from shared.api.parsing import check_request
from shared.api.replies import Reply
from shared.backends import BACKENDS
from shared.launch.flags import HostConfig
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.exact import XDiT
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import load_pipeline
from tests import tiny, tiny_hv15
from tests.parallel.test_xdit import psnr
from tests.pool import RankPool

FRAMES = {"ltx2": 9, "hv15": 5}
PICTURE = tiny.picture(80).resize((80, 72))


def config(name: str, **flags: Any) -> HostConfig:
    folder = {"checkpoint": str(tiny_hv15.from_picture())} if name == "hv15" else {}
    return tiny.config(name, width=64, height=96, **folder, **flags)


def loaded(launch: HostConfig) -> Any:
    needs = BACKENDS["xdit"].needs(launch, 1)
    return load_pipeline(launch.spec, launch, torch.device("cpu"), needs, quiet=True)


def body(name: str, **fields: Any) -> dict[str, Any]:
    image = encode_image(PICTURE, "png")
    asked = {"positive": "a cat", "steps": 2, "seed": 1, "frames": FRAMES[name], "image": image}
    return asked | {"width": 64, "height": 96} | fields


def made(engine: PipelineEngine, name: str, **fields: Any) -> Reply | None:
    asked = check_request(body(name, **fields), engine.config).filled(engine.config)
    return engine.generate(asked, lambda step, steps: None)


def own(name: str, launch: HostConfig, output: str) -> Any:
    """What diffusers' pipeline makes of it by itself."""
    arguments = {
        "image": PICTURE, "prompt": "a cat", "num_inference_steps": 2, "num_frames": FRAMES[name],
        "generator": torch.Generator("cpu").manual_seed(1), "output_type": output,
    }  # fmt: skip
    if name == "hv15":
        pipe = diffusers.HunyuanVideo15ImageToVideoPipeline.from_pretrained(launch.checkpoint)
        size = (96, 64)
        pipe.video_processor.calculate_default_height_width = lambda **_: size
    else:
        pipe = diffusers.LTX2ImageToVideoPipeline(**tiny.load("ltx2").components)
        arguments |= {"height": 96, "width": 64, "guidance_scale": 3.0}
    pipe.set_progress_bar_config(disable=True)
    return pipe(**arguments)


@pytest.mark.parametrize("name", FRAMES)
def test_it_is_the_video_of_plain_diffusers(name: str) -> None:
    launch = config(name)
    engine = PipelineEngine(loaded(launch), launch, tiny.world())
    reply, wanted = made(engine, name, output_format="mp4"), own(name, launch, "np").frames[0]
    assert reply is not None and (reply.width, reply.height, reply.steps) == (64, 96, 2)
    frames = np.stack([np.asarray(frame) for frame in reply.pictures])
    assert frames.shape == wanted.shape and np.abs(frames - wanted * 255).max() <= 0.51
    if name == "ltx2":
        latents = made(engine, name, output_format="latent")
        text = made(engine, name, image=None, output_format="mp4")
        assert latents is not None and text is not None and text.sound is not None
        assert load(latents.output[0])["latent"].shape == (1, 2 * 3 * 2, 8)
        assert np.abs(np.stack([np.asarray(one) for one in text.pictures]) - frames).max() > 10


def test_what_does_not_fit_is_refused() -> None:
    for name, fields, words in (
        ("hv15", {"image": None}, "needs an input image"),
        ("ltx2", {"image": [encode_image(PICTURE, "png")] * 2}, "must be one picture"),
        ("ltx2", {"latent": b""}, "image or latent, not both|must be"),
        ("ltx2", {"strength": 0.5}, "does not support strength"),
    ):
        given = {key: value for key, value in body(name, **fields).items() if value is not None}
        with pytest.raises(RequestError, match=words):
            check_request(given, config(name))
    with pytest.raises(RequestError, match="does not support image"):
        check_request(body("hv15"), tiny.config("hv15"))


def on_ranks(name: str) -> list[float]:
    """How close the pipeline of pictures comes under each degree to itself without."""
    launch = config(name)
    engine = PipelineEngine(loaded(launch), launch, tiny.world())
    reply = made(engine, name, output_format="mp4")
    assert reply is not None
    plain = np.stack([np.asarray(frame) for frame in reply.pictures]) / 255
    found = []
    for degrees in (Degrees(ulysses=2), Degrees(ring=2), Degrees(cfg=2)):
        engine = PipelineEngine(loaded(launch), launch, tiny.world(), partial(XDiT, degrees=degrees))
        reply = made(engine, name, output_format="mp4")
        assert reply is not None
        found.append(psnr(np.stack([np.asarray(frame) for frame in reply.pictures]) / 255, plain))
        engine.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FRAMES)
def test_two_ranks_equal_one(pool: RankPool, name: str) -> None:
    config(name)
    for rank in pool.run(on_ranks, 2, name, timeout=300):
        assert min(rank) >= 60, rank
