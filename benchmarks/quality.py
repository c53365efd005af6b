"""How close parallel pictures are to those of plain diffusers, on the demo checkpoint, by warm-up.

python benchmarks/quality.py asyncdiff [--prompts 8] [--strip docs/asyncdiff.png] [--only 2:1] [--warm-up 3]
python benchmarks/quality.py hybrid
python benchmarks/quality.py distrifusion [--strip docs/distrifusion.png] [--only 2:row:stale_gn]

Ranks are processes on this machine's CPU, in fp32. The same held-out prompts with the same seeds are drawn by
plain diffusers and by every setting; a Markdown table shows the PSNR of the 8-bit pictures, over all of them
and of the worst one, and how many still show what the prompt asks for by the rule of demo/draw.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from draw import PIXELS, Scene, held_out_scenes, judge  # noqa: E402
from evaluate import STEPS, count_right, paint  # noqa: E402

from tests.pool import RankPool  # noqa: E402

STRIP_ROWS = 4
EXCHANGES = ("int8", "float8", "int4")
SYNC_MODES = ("corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "no_sync", "full_sync")


@dataclass(frozen=True)
class Setting:
    """One row of the table: how a parallel method is set, and its exact steps at the start."""

    method: str
    options: tuple[tuple[str, Any], ...]
    ranks: int
    warm_up: int | str
    pictured: bool = False
    """Whether its pictures go into the strip."""

    @property
    def label(self) -> str:
        if self.method != "distrifusion":
            return ", ".join(f"{name} {value}" for name, value in self.options)
        parallelism, scheme, mode, *bits = (value for _, value in self.options)
        return ", ".join([scheme, mode if parallelism == "patch" else parallelism, *bits])

    @property
    def key(self) -> str:
        values = [str(value) for _, value in self.options]
        return ":".join([str(self.ranks), *values] if self.method == "distrifusion" else values)

    @property
    def caption(self) -> str:
        if self.method == "asyncdiff":
            return ", ".join(f"{name.removeprefix('model_')} = {value}" for name, value in self.options)
        return f"{self.ranks} ranks" + ("" if self.options[-1][1] == SYNC_MODES[0] else ", no_sync")

    def parallel(self, pipe: Any) -> AbstractContextManager[Any]:
        """The parallel object around `pipe`, with `begin(steps)`."""
        options = dict(self.options)
        if self.method == "asyncdiff":
            from shared.parallel.asyncdiff import AsyncDiff

            return AsyncDiff(pipe, warm_up_steps=self.warm_up, **options)
        if self.method == "hybrid":
            return hybrid(pipe, self.warm_up, **options)
        from shared.parallel.distrifusion import DistriFusion

        return DistriFusion(
            pipe, warm_up_steps=self.warm_up, split_batch=False, split_decode=False, **options
        )


@contextlib.contextmanager
def hybrid(pipe: Any, warm_up: int | str, async_steps: int | str) -> Iterator[Any]:
    """Guidance branches on two ranks, which share one of them for some steps."""
    import torch.distributed as dist

    from shared.parallel.asyncdiff import AsyncDiff
    from shared.parallel.cfg_split import HybridSplit
    from shared.parallel.chosen_steps import Pace
    from shared.parallel.method import CombinedMethod

    pace = Pace(warm_up, async_steps)
    stages = AsyncDiff(pipe, 2, pace=pace, notes=False, leader=1)
    split = HybridSplit([pipe.unet], dist.group.WORLD, dist.get_rank(), stages.asynchronous, pace=pace)
    with CombinedMethod(stages, [split]) as both:
        yield both


def hybrid_settings(steps: int) -> list[Setting]:
    """By where the shared steps begin, and how many they are."""
    middle = [(w, n) for n in (4, 8, 15) for w in (8, 10, 12, 15) if w + n < steps]
    fixed = [Setting("hybrid", (("async_steps", n),), 2, w) for w, n in middle]
    return [Setting("hybrid", (("async_steps", "auto"),), 2, "auto"), *fixed]


def asyncdiff_settings(steps: int) -> list[Setting]:
    """By plan and warm-up; the first is chosen by itself, the last is the whole generation."""
    return [
        Setting("asyncdiff", (("model_n", n), ("stride", stride)), n + stride - 1, warm_up, warm_up == 3)
        for stride, n in itertools.product((1, 2), (2, 3, 4))
        for warm_up in ("auto", *(w for w in (1, 3, 5, 6, 10) if w < steps), steps)
    ]


def distrifusion_settings(steps: int) -> list[Setting]:
    """By ranks, split and what patches exchange, after the paper's 4 exact steps."""

    def setting(
        ranks: int,
        scheme: str,
        mode: str,
        parallelism: str = "patch",
        bits: str = "",
        warm_up: int | str = min(4, steps),
    ) -> Setting:
        options: tuple[tuple[str, Any], ...]
        options = (("parallelism", parallelism), ("split_scheme", scheme), ("sync_mode", mode))
        options += (("bits", bits),) if bits else ()
        pictured = (scheme, parallelism, bits) == ("row", "patch", "") and (
            mode == "corrected_async_gn" or (ranks, mode) == (4, "no_sync")
        )
        return Setting("distrifusion", options, ranks, warm_up, pictured and warm_up != "auto")

    rows = [
        setting(ranks, scheme, mode)
        for ranks in (2, 3, 4)
        for scheme in ("row", "col")
        for mode in SYNC_MODES
        if scheme == "row" or mode in SYNC_MODES[:2]
    ]
    rows += [
        setting(2, "row", mode, bits=bits) for mode in (SYNC_MODES[0], "full_sync") for bits in EXCHANGES
    ]
    rows += [setting(ranks, "row", SYNC_MODES[0], warm_up="auto") for ranks in (2, 4)]
    return rows + [setting(ranks, "alternate", SYNC_MODES[0], "naive_patch") for ranks in (2, 4)]


METHODS = {
    "asyncdiff": asyncdiff_settings,
    "hybrid": hybrid_settings,
    "distrifusion": distrifusion_settings,
}


@functools.cache
def load(checkpoint: str) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_on_rank(
    checkpoint: str, scenes: list[Scene], steps: int, setting: Setting | None
) -> tuple[list[Image.Image], float] | None:
    """Runs on every rank; rank 0 has the pictures, and how many steps were asynchronous, on average.

    Without a setting: plain diffusers.
    """
    import torch.distributed as dist

    pipe = load(checkpoint)
    if setting is None:
        return paint(pipe, scenes, steps=steps, batch=len(scenes)), 0.0
    first = dist.get_rank() == 0
    # The hybrid knows both branches by a batch of two; steps are chosen for each picture.
    batch = 1 if setting.method == "hybrid" or setting.warm_up == "auto" else len(scenes)
    pictures: list[Image.Image] = []
    late: list[int] = []
    with setting.parallel(pipe) as parallel:
        for at in range(0, len(scenes), batch):
            parallel.begin(steps)
            output, part = "pil" if first else "latent", scenes[at : at + batch]
            pictures += paint(pipe, part, steps=steps, batch=batch, seed=at, output_type=output)
            pace = (parallel.method if setting.method == "hybrid" else parallel).pace
            late.append(sum(pace.chosen))
    return (pictures, sum(late) / len(late)) if first else None


def psnr(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> float:
    """Peak signal-to-noise ratio in dB over all the 8-bit pictures together; infinite when equal."""
    first, second = (np.stack([np.asarray(p, dtype=np.float64) for p in pictures]) for pictures in (a, b))
    error = np.mean((first - second) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else math.inf


def decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f}"


def strip(scenes: list[Scene], columns: dict[str, list[Image.Image]]) -> Image.Image:
    """A row per scene, a column per setting, named at the top; columns[name][row] is drawn."""
    gap, head, caption = 6, 60, 18
    font = ImageFont.load_default(size=12)
    rows = min(STRIP_ROWS, len(scenes))
    width, height = gap + len(columns) * (PIXELS + gap), head + rows * (PIXELS + caption + gap)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, scene in enumerate(scenes[:rows]):
        y = head + row * (PIXELS + caption + gap)
        pen.text((gap, y), f'"{scene.caption}"', fill="black", font=font)
        for column, pictures in enumerate(columns.values()):
            sheet.paste(pictures[row], (gap + column * (PIXELS + gap), y + caption))
    for column, name in enumerate(columns):
        x = gap + column * (PIXELS + gap) + PIXELS / 2
        pen.multiline_text((x, 4), name, fill="black", font=font, anchor="ma", align="center")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "demo" / "checkpoint")
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts (default 8)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", action="append", help="settings to run, such as 2:1 (repeatable)")
    parser.add_argument("--warm-up", action="append", help="warm-ups to run, or auto (repeatable)")
    parser.add_argument("--strip", type=Path, help="write pictures of some settings side by side here")
    options = parser.parse_args()
    scenes = held_out_scenes(200)[: options.prompts]  # the first ones that demo/evaluate.py draws
    known = METHODS[options.method](options.steps)
    for flag, given, allowed in (
        ("--only", options.only, list(dict.fromkeys(s.key for s in known))),
        ("--warm-up", options.warm_up, list(dict.fromkeys(str(s.warm_up) for s in known))),
    ):
        if wrong := [value for value in given or () if value not in allowed]:
            parser.error(f"{flag} must be one of {', '.join(map(str, allowed))}; got {wrong[0]}")
    chosen = [
        s
        for s in known
        if (not options.only or s.key in options.only)
        and (not options.warm_up or str(s.warm_up) in options.warm_up)
    ]

    pool = RankPool(timeout=3600)
    work = functools.partial(pool.run, draw_on_rank)
    try:
        plain, _ = work(1, str(options.checkpoint), scenes, options.steps, None)[0]
        columns = {"plain\ndiffusers": plain}
        count, _ = count_right(scenes, [judge(p) for p in plain])
        print("| method | setting | ranks | warm-up | asynchronous | PSNR dB | worst picture | right |")
        print("|---|---|---:|---:|---:|---:|---:|---:|")
        print(f"| plain diffusers |  | 1 |  |  |  |  | {count} of {len(scenes)} |", flush=True)
        for setting in chosen:
            made, late = work(setting.ranks, str(options.checkpoint), scenes, options.steps, setting)[0]
            count, _ = count_right(scenes, [judge(p) for p in made])
            level = decibels(psnr(made, plain))
            worst = decibels(min(psnr([a], [b]) for a, b in zip(made, plain, strict=True)))
            warm_up = "all" if setting.warm_up == options.steps else setting.warm_up
            print(
                f"| {setting.method} | {setting.label} | {setting.ranks} | {warm_up} | {late:.1f} | {level} "
                f"| {worst} | {count} of {len(scenes)} |",
                flush=True,
            )
            if setting.pictured:
                columns[f"{setting.method}\n{setting.caption}\n{level} dB"] = made
    finally:
        pool.close()
    if options.strip:
        strip(scenes, columns).save(options.strip, optimize=True)


if __name__ == "__main__":
    main()
