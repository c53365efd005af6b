"""Does a demo checkpoint follow its prompt? Draws held-out prompts and counts by the rule of draw.py."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from checkpoints import CHECKPOINTS, Checkpoint
from draw import Judgement, Scene, held_out_scenes, judge
from PIL import Image, ImageDraw

STEPS, CFG = CHECKPOINTS["unet"].steps, CHECKPOINTS["unet"].cfg
NEGATIVE = ""


def load(kind: Checkpoint, folder: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Plain diffusers' pipeline of a checkpoint, by default of that in demo/, without progress bars."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder or kind.path, dtype=dtype, **dict.fromkeys(kind.absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(
    pipe: Any,
    scenes: list[Scene],
    *,
    steps: int = STEPS,
    cfg: float = CFG,
    seed: int = 0,
    batch: int = 50,
    output_type: str = "pil",
) -> list[Any]:
    """One picture per scene by plain diffusers; picture k has start noise of its own from seed + k.

    With `output_type` "latent" its latents instead, [4, h, w].
    """
    pictures: list[Any] = []
    for first in range(0, len(scenes), batch):
        part = scenes[first : first + batch]
        generators = [torch.Generator("cpu").manual_seed(seed + first + k) for k in range(len(part))]
        pictures += pipe(
            [scene.caption for scene in part],
            negative_prompt=[NEGATIVE] * len(part),
            num_inference_steps=steps,
            guidance_scale=cfg,
            generator=generators,
            output_type=output_type,
        ).images
    return pictures


def count_right(scenes: list[Scene], verdicts: list[Judgement]) -> tuple[int, Counter[str]]:
    """How many pictures are right in all that their caption says, and how many wrong in each attribute."""
    right = 0
    wrong: Counter[str] = Counter()
    for scene, verdict in zip(scenes, verdicts, strict=True):
        checks = verdict.right(scene)
        right += all(checks.values())
        wrong.update(name for name, good in checks.items() if not good)
    return right, wrong


def contact_sheet(
    scenes: list[Scene], verdicts: list[Judgement], pictures: list[Image.Image], columns: int = 20
) -> Image.Image:
    """All pictures on one sheet at half size; a red bar below a picture says that it is wrong."""
    cell, bar = 64, 4
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + 4), rows * (cell + bar + 4)), (128, 128, 128))
    pen = ImageDraw.Draw(sheet)
    for k, (scene, verdict, picture) in enumerate(zip(scenes, verdicts, pictures, strict=True)):
        x, y = k % columns * (cell + 4), k // columns * (cell + bar + 4)
        sheet.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        if not all(verdict.right(scene).values()):
            pen.rectangle((x, y + cell, x + cell - 1, y + cell + bar - 1), fill=(255, 0, 0))
    return sheet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "kind", nargs="?", choices=CHECKPOINTS, default="unet", help="which one (default unet)"
    )
    parser.add_argument("--checkpoint", type=Path, help="a diffusers folder (default: that kind's in demo/)")
    parser.add_argument("--count", type=int, default=200, help="how many held-out prompts (default 200)")
    parser.add_argument("--steps", type=int, help="default: as many as its kind needs")
    parser.add_argument("--cfg", type=float, help="default: its kind's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--at-least", type=float, default=90.0, help="per cent right, else exit code 1")
    parser.add_argument("--strip", type=Path, help="write a contact sheet of all pictures here")
    args = parser.parse_args()

    kind = CHECKPOINTS[args.kind]
    steps, cfg = args.steps or kind.steps, kind.cfg if args.cfg is None else args.cfg
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    scenes = held_out_scenes(args.count)
    pipe = load(kind, args.checkpoint, dtype).to(args.device)
    started = time.monotonic()
    pictures = paint(pipe, scenes, steps=steps, cfg=cfg, seed=args.seed, batch=args.batch)
    seconds = time.monotonic() - started
    verdicts = [judge(picture) for picture in pictures]
    right, wrong = count_right(scenes, verdicts)
    for scene, verdict in zip(scenes, verdicts, strict=True):
        if not all(verdict.right(scene).values()):
            seen = f"{verdict.size} {verdict.colour} {verdict.shape} on {verdict.background}"
            print(f"wrong: {scene.caption!r} shows {seen}")
    faults = ", ".join(f"{name} {count}" for name, count in sorted(wrong.items())) or "none"
    share = 100 * right / len(scenes)
    print(f"{right} of {len(scenes)} held-out prompts right ({share:.1f} %), wrong in: {faults}")
    print(f"{steps} steps, cfg {cfg}, {args.dtype} on {args.device}: {seconds:.1f} s")
    if args.strip:
        contact_sheet(scenes, verdicts, pictures).save(args.strip)
    if share < args.at_least:
        print(f"below the required {args.at_least} %", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
