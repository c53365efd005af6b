"""AsyncDiff on a plain diffusers pipeline, without a host: torchrun --nproc_per_node=2 demo/library.py

Start it from the project's folder; the picture is library.png.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from shared.parallel.asyncdiff import AsyncDiff  # noqa: E402


def draw(checkpoint: str, prompt: str, steps: int = 20, seed: int = 7) -> Image.Image:
    """One picture, made by all ranks of the default process group."""
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    with AsyncDiff(pipe, model_n=dist.get_world_size(), warm_up_steps=3) as method:
        method.begin(steps)
        generator = torch.Generator("cpu").manual_seed(seed)
        return pipe(prompt, num_inference_steps=steps, generator=generator).images[0]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    picture = draw(str(ROOT / "demo" / "checkpoint"), "a red circle on a blue background")
    if dist.get_rank() == 0:
        picture.save("library.png")
    dist.destroy_process_group()
