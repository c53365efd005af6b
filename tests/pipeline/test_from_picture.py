"""Image to image and inpainting on one rank: what diffusers' own pipeline of the type makes of a picture."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from shared.api.media import encode_image
from shared.api.parsing import check_request
from shared.api.replies import Reply
from shared.backends import BACKENDS
from shared.models import MODELS, Start
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import load_pipeline
from tests import tiny, tiny_extras

EXACT_DB = 45.0
SIZE = (72, 104)  # width and height: neither is a power of two
STEPS = 10


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
    name: str, start: Start, strength: float, folder: Path | None = None, painted: Image.Image | None = None
) -> np.ndarray:
    """Latents that diffusers' class makes, loaded from the checkpoint by itself."""
    multiple = MODELS[name].size_multiple
    size = (SIZE[0] // multiple * multiple, SIZE[1] // multiple * multiple)
    folder = folder or tiny.checkpoint(name)
    pipe = getattr(diffusers, start.pipeline).from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        start.image: resized(picture(), size),
        "strength": strength,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "generator": torch.Generator("cpu").manual_seed(3),
        "output_type": "latent",
    }
    if start.sized:
        arguments |= {"width": size[0], "height": size[1]}
    if start.kind != "image":
        arguments["mask_image"] = resized(painted or mask(), size)
    return pipe(**arguments).images.float().numpy()


FILLS = [name for name, spec in MODELS.items() if spec.start("fill", control=False)]


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.parametrize(("with_mask", "strength"), [(True, 1.0), (True, 0.5), (False, 0.5)])
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
    return [(n, s) for n, spec in MODELS.items() for s in spec.starts if s.kind == kind and not s.control]


CELLS = [
    pytest.param(name, start, strength, id=f"{name}-{start.kind}-{strength}")
    for kind in ("image", "inpaint")
    for name, start in starts(kind)
    for strength in (0.2, 0.5, 1.0)
]


@pytest.mark.parametrize(("name", "start", "strength"), CELLS)
def test_a_picture_becomes_what_diffusers_makes_of_it(name: str, start: Start, strength: float) -> None:
    fields = {"image": png(picture()), "strength": strength}
    if start.kind == "inpaint":
        fields["mask"] = png(mask())
    made = latents(engine(name), **fields)
    assert psnr(made, theirs(name, start, strength)) >= EXACT_DB
