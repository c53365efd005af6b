"""How close a picture made from a picture is in the steady state, by strength, on the demo checkpoint.

torchrun --nproc_per_node=2 benchmarks/strength.py [asyncdiff] [distrifuser] [--pictures 4] [--steps 30]

Drawn scenes get another colour by image to image, or another background by inpainting, in fp32 on CPUs. A
Markdown table shows, by host and warm-up steps, the PSNR of the latents against those with every step exact.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from draw import COLOURS, Scene, draw  # noqa: E402

from shared.api.media import encode_image  # noqa: E402
from shared.api.requests import GenerateRequest  # noqa: E402
from shared.backends import BACKENDS  # noqa: E402
from shared.launch.flags import HostConfig  # noqa: E402
from shared.pipeline.engine import PipelineEngine  # noqa: E402
from shared.ranks.groups import World, init_world  # noqa: E402

STRENGTHS = (0.2, 0.5, 0.8, 1.0)
WARM_UPS = (1, 3, 5)
SCENES = (
    ("circle", "red", "white"), ("square", "blue", "black"), ("star", "yellow", "blue"),
    ("triangle", "green", "white"),
)  # fmt: skip


def background(picture: Image.Image, colour: str) -> Image.Image:
    """White where a drawn scene shows its background."""
    off = np.abs(np.asarray(picture).astype(int) - np.asarray(COLOURS[colour])).max(axis=2)
    return Image.fromarray(np.where(off < 40, 255, 0).astype(np.uint8))


def requests(count: int, steps: int, masked: bool) -> list[dict[str, Any]]:
    """Bodies without strength: shapes that become purple, or come before an orange background."""
    made = []
    for seed, (shape, colour, ground) in enumerate(SCENES[:count]):
        picture = draw(Scene(shape, colour, ground, "large"), seed)
        words = f"a {colour} {shape} on an orange" if masked else f"a purple {shape} on a {ground}"
        body = {"positive": f"{words} background", "image": encode_image(picture, "png"), "seed": seed}
        if masked:
            body["mask"] = encode_image(background(picture, ground), "png")
        made.append(body | {"steps": steps, "output_format": "latent"})
    return made


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("hosts", nargs="*", default=["asyncdiff", "distrifuser"])
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    world = init_world("cpu", 120)
    say = print if world.rank == 0 else lambda *_: None
    say(f"| host | from | warm-up | {' | '.join(f'strength {s:g}' for s in STRENGTHS)} |")
    say("|---" * 3 + "|---:" * len(STRENGTHS) + "|")
    for backend in options.hosts:
        config = HostConfig(
            backend=backend, type="sd1", checkpoint=str(ROOT / "demo" / "checkpoint"), width=128, height=128
        )
        config = replace(config, no_split_batch=backend == "distrifuser")
        exact = table(config, options, world, options.steps)
        for warm_up in WARM_UPS:
            made = table(config, options, world, warm_up)
            for masked in (False, True):
                told = [decibels(made[masked, s], exact[masked, s]) for s in STRENGTHS]
                kind = "picture and mask" if masked else "picture"
                say(f"| {backend} | {kind} | {warm_up} | {' | '.join(told)} |")


def table(
    config: HostConfig, options: argparse.Namespace, world: World, warm_up: int
) -> dict[tuple[bool, float], list[np.ndarray]]:
    """The latents of all requests, by whether they have a mask and by strength."""
    config = replace(config, warm_up_steps=warm_up)
    engine: PipelineEngine = BACKENDS[config.backend].build_engine(config, world)
    engine.pipe.set_progress_bar_config(disable=True)
    made = {}
    for masked in (False, True):
        for strength in STRENGTHS:
            made[masked, strength] = [
                latents(engine, GenerateRequest.model_construct(**body, strength=strength).filled(config))
                for body in requests(options.pictures, options.steps, masked)
            ]
    engine.close()
    return made


def latents(engine: PipelineEngine, request: GenerateRequest) -> np.ndarray:
    reply = engine.generate(request, lambda step, steps: None)
    if reply is None or reply.latent is None:  # this rank holds none
        return np.zeros(1)
    return safetensors.torch.load(reply.latent)["latent"].numpy()


def decibels(made: list[np.ndarray], exact: list[np.ndarray]) -> str:
    """PSNR over all pictures, with the range of the exact ones as the peak."""
    error = float(np.mean([np.mean((a - b) ** 2) for a, b in zip(made, exact, strict=True)]))
    peak = max(float(np.ptp(one)) for one in exact)
    return "equal" if error == 0 else f"{10 * np.log10(peak**2 / error):.1f}"


if __name__ == "__main__":
    main()
