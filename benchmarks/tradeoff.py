"""How close a host's pictures are and how often they obey, by its flags, on each of the demo's checkpoints.

python benchmarks/tradeoff.py student [--prompts 64] [--only warm_up] [--strip docs/student.png] [--write]
python benchmarks/tradeoff.py transformer --device cuda

Each row is a launch: the host's own engine draws the same held-out prompts with the same seeds one by one, on
ranks of this machine, in fp32. Compared with plain diffusers: PSNR of the 8-bit pictures (the mean of each
one's, with its standard error; equal ones count as 100 dB), the worst picture, SSIM (Wang et al. 2004, a
Gaussian of 1.5 pixels), and how many show what the prompt asks for by the rule of demo/draw.py. --write puts
the rows into docs/MEASURED.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from checkpoints import CHECKPOINTS, Checkpoint  # noqa: E402
from draw import PIXELS, Scene, held_out_scenes, judge  # noqa: E402
from evaluate import count_right, load, paint  # noqa: E402

from benchmarks.quality import psnr, strip  # noqa: E402
from shared.backends import BACKENDS  # noqa: E402
from tests.pool import RankPool  # noqa: E402
from tests.tables import put  # noqa: E402

EQUAL = 100.0  # dB of pictures that are equal; one value that differs by one makes 95
HEAD = "| host | flags | ranks | PSNR dB | worst | SSIM | obeyed |\n|---|---|---:|---:|---:|---:|---:|"
PIPEFUSION = "--pipefusion_parallel_degree=2"


@dataclass(frozen=True)
class Launch:
    host: str
    flags: str
    ranks: int = 2
    pictured: bool = False
    """Whether its pictures go into the strip."""


def quantized(host: str) -> list[Launch]:
    kept = ("float8_weight", "int8_weight", "int4", "int2")  # computing in 8 bits is for GPUs
    return [Launch(host, f"--quantize_to={bits}", 1, bits == "int2") for bits in kept]


LAUNCHES: dict[str, list[Launch]] = {
    "unet": [
        Launch("asyncdiff", "--use_cfg_parallel"),
        *(Launch("asyncdiff", f"--use_cfg_parallel --warm_up_steps={w} --async_steps=8") for w in (10, 15)),
        *(Launch("asyncdiff", f"--warm_up_steps={w}", 2, w == 3) for w in (1, 3, 5, 10)),
        *(Launch("distrifuser", f"--warm_up_steps={w}", 2, w == 4) for w in (1, 4, 8)),
        Launch("distrifuser", "--no_split_batch --warm_up_steps=4"),
        Launch("distrifuser", "--warm_up_steps=4", 4),
        *quantized("asyncdiff"),
        Launch("asyncdiff", "--warm_up_steps=5 --quantize_to=int8_weight"),
    ],
    "transformer": [
        Launch("xdit", "--ulysses_degree=2"),
        Launch("xdit", "--ring_degree=2"),
        Launch("xdit", "--use_cfg_parallel"),
        Launch("xdit", "--ulysses_degree=2 --ring_degree=2", 4),
        *(Launch("xdit", f"--ring_degree=2 --exchange_dtype={bits}") for bits in ("float8", "int8")),
        *(
            Launch("xdit", f"{PIPEFUSION} --num_pipeline_patch={n} --warm_up_steps={w}", 2, w == 3)
            for n in (2, 4)
            for w in (1, 3, 5, 10)
        ),
        Launch("xdit", "--pipefusion_parallel_degree=4 --num_pipeline_patch=4 --warm_up_steps=5", 4),
        *(Launch("asyncdiff", f"--warm_up_steps={w}", 2, w == 5) for w in (1, 3, 5, 10)),
        Launch("asyncdiff", "--use_cfg_parallel --warm_up_steps=10 --async_steps=8"),
        *quantized("xdit"),
        *(Launch("xdit", f"--step_cache=fbcache:{most}", 1, most == 0.12) for most in (0.05, 0.12, 0.2)),
        *(Launch("xdit", f"--step_cache={cache}", 1) for cache in ("taylorseer:3", "taylorseer:5")),
        Launch("xdit", "--ring_degree=2 --quantize_to=int8_weight --step_cache=fbcache:0.12"),
        Launch("xdit", "--ring_degree=2 --exchange_dtype=int8 --quantize_to=int8_weight"),
    ],
    "student": [
        *(Launch("asyncdiff", f"--warm_up_steps={w}", 2, w == 1) for w in (1, 2, 3)),
        *(Launch("distrifuser", f"--warm_up_steps={w}", 2, w == 1) for w in (1, 2, 3)),
        *(Launch("distrifuser", f"--warm_up_steps={w}", 4, w == 1) for w in (1, 2)),
        *quantized("asyncdiff"),
        Launch("distrifuser", "--warm_up_steps=2 --quantize_to=int8_weight"),
    ],
}  # fmt: skip


def plain(kind: Checkpoint, scenes: list[Scene]) -> list[Image.Image]:
    """Runs on a rank alone."""
    return paint(load(kind), scenes, steps=kind.steps, cfg=kind.cfg, batch=8)


def launched(kind: Checkpoint, launch: Launch, scenes: list[Scene], device: str) -> list[Image.Image]:
    """Runs on every rank: what the host's engine draws, on the rank that has the pictures; else nothing."""
    import torch
    import torch.distributed as dist

    from shared.api.parsing import check_request
    from shared.launch.parser import parse_config
    from shared.ranks.groups import World, make_groups

    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    if device == "cuda":
        torch.cuda.set_device(rank)
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    world = World(rank, size, rank, place, *make_groups(600, "nccl" if device == "cuda" else "gloo"))
    own = [f"--type={kind.type}", f"--checkpoint={kind.path}", "--variant=fp32", f"--device={device}"]
    own += [f"--width={PIXELS}", f"--height={PIXELS}"]
    config = parse_config(BACKENDS[launch.host], BACKENDS, [*own, *launch.flags.split()])
    engine = importlib.import_module(f"shared.backends.{launch.host}").build_engine(config, world)
    made: list[Image.Image] = []
    try:
        for seed, scene in enumerate(scenes):
            body = {"positive": scene.caption, "seed": seed, "steps": kind.steps, "cfg": kind.cfg}
            reply = engine.generate(check_request(body, config), lambda step, steps: None)
            made += reply.pictures if reply is not None else []
    finally:
        engine.close()
    return made


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Mean structural similarity of two pictures, 1 where they are equal."""
    from scipy.ndimage import gaussian_filter

    x, y = (np.asarray(picture, dtype=np.float64) for picture in (a, b))
    blur = functools.partial(gaussian_filter, sigma=(1.5, 1.5, 0), truncate=3.5)
    small, contrast = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    both = blur(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + small) * (2 * both + contrast)
    return float((top / ((mean_x**2 + mean_y**2 + small) * (var_x + var_y + contrast))).mean())


def obeyed(scenes: list[Scene], pictures: list[Image.Image]) -> str:
    """Count and per cent, with the standard error of the share."""
    count, _ = count_right(scenes, [judge(picture) for picture in pictures])
    share = count / len(scenes)
    error = math.sqrt(share * (1 - share) / len(scenes))
    return f"{count} of {len(scenes)} ({100 * share:.0f} ± {100 * error:.0f} %)"


def row(launch: Launch, scenes: list[Scene], made: list[Image.Image], wanted: list[Image.Image]) -> str:
    levels = [min(EQUAL, psnr([a], [b])) for a, b in zip(made, wanted, strict=True)]
    likeness = statistics.mean(ssim(a, b) for a, b in zip(made, wanted, strict=True))
    if min(levels) == EQUAL:
        level, worst = "equal", "equal"
    else:
        error = statistics.stdev(levels) / math.sqrt(len(levels)) if len(levels) > 1 else math.nan
        level, worst = f"{statistics.mean(levels):.1f} ± {error:.1f}", f"{min(levels):.1f}"
    flags = f"`{launch.flags}`"
    cells = (launch.host, flags, launch.ranks, level, worst, f"{likeness:.4f}", obeyed(scenes, made))
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("kind", choices=LAUNCHES)
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts (default 64)")
    parser.add_argument("--only", action="append", help="launches whose flags contain this (repeatable)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=1, help="launches at the same time, each on its ranks")
    parser.add_argument("--strip", type=Path, help="write pictures of some launches side by side here")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/MEASURED.md")
    options = parser.parse_args()
    kind = CHECKPOINTS[options.kind]
    scenes = held_out_scenes(200)[: options.prompts]  # the first ones that demo/evaluate.py draws
    chosen = [
        one for one in LAUNCHES[options.kind] if not options.only or any(o in one.flags for o in options.only)
    ]
    if not chosen:
        parser.error(f"--only must be part of a launch's flags, such as {LAUNCHES[options.kind][0].flags}")

    def draw(launch: Launch | None) -> list[Image.Image]:
        pool = RankPool(timeout=3600)
        try:
            if launch is None:
                return list(pool.run(plain, 1, kind, scenes)[0])
            found = pool.run(launched, launch.ranks, kind, launch, scenes, options.device)
            return next(made for made in found if made)
        finally:
            pool.close()

    with ThreadPoolExecutor(options.jobs) as jobs:
        wanted, *all_made = [jobs.submit(draw, launch) for launch in (None, *chosen)]
        rows = [HEAD, f"| plain diffusers |  | 1 |  |  |  | {obeyed(scenes, wanted.result())} |"]
        print(*rows, sep="\n", flush=True)
        columns = {"plain\ndiffusers": wanted.result()}
        for launch, made in zip(chosen, all_made, strict=True):
            rows.append(row(launch, scenes, made.result(), wanted.result()))
            print(rows[-1], flush=True)
            if launch.pictured:
                columns[f"{launch.host}, {launch.ranks}\n" + launch.flags.replace(" ", "\n")] = made.result()
    if options.strip:
        strip(scenes, columns).save(options.strip, optimize=True)
    if options.write:
        page = ROOT / "docs" / "MEASURED.md"
        page.write_text(put(page.read_text(), f"tradeoff-{options.kind}", "\n".join(rows)))


if __name__ == "__main__":
    main()
