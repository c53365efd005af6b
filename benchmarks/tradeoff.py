"""How close a host's pictures are and how often they obey, by its flags, on each of the demo's checkpoints.

python benchmarks/tradeoff.py student [--prompts 64] [--only warm_up] [--strip docs] [--write]
python benchmarks/tradeoff.py unet transformer student --cores 32 --results results.jsonl

Each row is a launch: the host's own engine draws the same held-out prompts with the same seeds one by one, on
ranks of this machine, in fp32. Compared with plain diffusers: PSNR of the 8-bit pictures (the mean of each
one's, with its standard error; equal ones count as 100 dB), the worst picture, SSIM (Wang et al. 2004, a
Gaussian of 1.5 pixels), and how many show what the prompt asks for by the rule of demo/draw.py. What was
drawn is kept in --results, and not drawn again; all launches draw the first prompts before any draws the next
ones, so that a run that is cut has rows of all. --write puts the rows into docs/MEASURED.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import statistics
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from checkpoints import CHECKPOINTS, Checkpoint  # noqa: E402
from draw import PIXELS, Scene, held_out_scenes, judge  # noqa: E402
from evaluate import load, paint  # noqa: E402

from benchmarks.quality import psnr, strip  # noqa: E402
from benchmarks.tradeoff_launches import LAUNCHES, Launch  # noqa: E402
from shared.backends import BACKENDS  # noqa: E402
from tests.pool import RankError, RankPool  # noqa: E402
from tests.tables import put  # noqa: E402

EQUAL = 100.0  # dB of pictures that are equal; one value that differs by one makes 95
HEAD = "| host | flags | ranks | asynchronous | PSNR dB | worst | SSIM | obeyed |\n|---|---|" + "---:|" * 6
PART = 8
"""Prompts that a launch draws before the others draw theirs."""


@dataclass(frozen=True)
class Drawn:
    """What is known of one picture; of plain diffusers' own only whether it is right."""

    kind: str
    host: str
    flags: str
    ranks: int
    prompt: int
    right: bool
    psnr: float = EQUAL
    ssim: float = 1.0
    late: int | None = None
    """How many steps were asynchronous, where the launch chooses them."""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.host, self.flags, self.ranks


PLAIN = "plain diffusers"
Made = tuple[list[Drawn], list[Image.Image]]


def plain(kind: Checkpoint, scheduler: str | None, scenes: list[Scene], first: int) -> list[Image.Image]:
    """Runs on a rank alone."""
    from shared.models import MODELS
    from shared.pipeline.schedulers import set_scheduler

    pipe = load(kind)
    set_scheduler(pipe, MODELS[kind.type], scheduler, kind.steps)
    return paint(pipe, scenes, steps=kind.steps, cfg=kind.cfg, seed=first, batch=PART)


def launched(
    kind: Checkpoint, launch: Launch, scenes: list[Scene], device: str, first: int = 0
) -> tuple[list[Image.Image], list[int | None]]:
    """Runs on every rank: what the host's engine draws, on the rank that has the pictures; else nothing.

    And of each picture how many steps were asynchronous, where the launch chooses them.
    """
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
    late: list[int | None] = []
    try:
        for seed, scene in enumerate(scenes, first):
            body = {"positive": scene.caption, "seed": seed, "steps": kind.steps, "cfg": kind.cfg}
            reply = engine.generate(check_request(body, config), lambda step, steps: None)
            made += reply.pictures if reply is not None else []
            chosen = engine.parallel.choice or ""  # such as "17 of 30 steps were asynchronous: 8-24"
            late.append(int(chosen.split()[0]) if "steps were asynchronous" in chosen else None)
    finally:
        engine.close()
    return made, late


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


def obeyed(right: list[bool]) -> str:
    """Count and per cent, with the standard error of the share."""
    share = sum(right) / len(right)
    error = math.sqrt(share * (1 - share) / len(right))
    return f"{sum(right)} of {len(right)} ({100 * share:.0f} ± {100 * error:.0f} %)"


def compared(
    kind: str,
    launch: Launch,
    first: int,
    scenes: list[Scene],
    made: list[Image.Image],
    late: list[int | None],
    wanted: list[Image.Image],
) -> list[Drawn]:
    return [
        Drawn(
            kind,
            *launch.key,
            first + k,
            all(judge(a).right(scene).values()),
            min(EQUAL, psnr([a], [b])),
            ssim(a, b),
            late[k],
        )
        for k, (scene, a, b) in enumerate(zip(scenes, made, wanted, strict=True))
    ]


def row(drawn: list[Drawn]) -> str:
    """Of one launch's pictures."""
    host, flags, ranks = drawn[0].key
    flags = f"`{flags}`" if flags else ""
    count = obeyed([one.right for one in drawn])
    if host == PLAIN:
        return f"| {PLAIN} | {flags} | {ranks} |  |  |  |  | {count} |"
    levels = [one.psnr for one in drawn]
    if min(levels) == EQUAL:
        level, worst = "equal", "equal"
    else:
        error = statistics.stdev(levels) / math.sqrt(len(levels)) if len(levels) > 1 else math.nan
        level, worst = f"{statistics.mean(levels):.1f} ± {error:.1f}", f"{min(levels):.1f}"
    chosen = [one.late for one in drawn if one.late is not None]
    late = f"{statistics.mean(chosen):.1f}" if chosen else ""
    likeness = f"{statistics.mean(one.ssim for one in drawn):.4f}"
    return f"| {' | '.join(map(str, (host, flags, ranks, late, level, worst, likeness, count)))} |"


def table(kind: str, drawn: Iterable[Drawn]) -> str:
    """The rows of a checkpoint in the order of its launches, those without a picture left out."""
    of: dict[tuple[str, str, int], list[Drawn]] = {}
    for one in drawn:
        if one.kind == kind:
            of.setdefault(one.key, []).append(one)
    keys = [key for key in of if key[0] == PLAIN] + [launch.key for launch in LAUNCHES[kind]]
    return "\n".join([HEAD, *(row(of[key]) for key in keys if key in of)])


def read(path: Path | None) -> list[Drawn]:
    if path is None or not path.exists():
        return []
    return [Drawn(**json.loads(line)) for line in path.read_text().splitlines()]


@dataclass
class Machine:
    """Pools of ranks, of which so many ranks work at the same time."""

    cores: int
    turn: threading.Condition = field(default_factory=threading.Condition)
    idle: list[RankPool] = field(default_factory=list)

    @contextlib.contextmanager
    def pool(self, ranks: int) -> Iterator[RankPool]:
        with self.turn:
            self.turn.wait_for(lambda: self.cores >= ranks)
            self.cores -= ranks
            pool = self.idle.pop() if self.idle else RankPool(timeout=3600)
        try:
            yield pool
        finally:
            with self.turn:
                self.cores += ranks
                self.idle.append(pool)
                self.turn.notify_all()


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("kinds", choices=LAUNCHES, nargs="+")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts (default 64)")
    parser.add_argument("--only", action="append", help="launches whose flags contain this (repeatable)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cores", type=int, default=4, help="ranks at the same time (default 4)")
    parser.add_argument("--results", type=Path, help="keep what is known of each picture in this file")
    parser.add_argument(
        "--strip", type=Path, help="write pictures of some launches side by side into this folder"
    )
    parser.add_argument("--write", action="store_true", help="put the rows into docs/MEASURED.md")
    options = parser.parse_args()
    scenes = held_out_scenes(200)[: options.prompts]  # the first ones that demo/evaluate.py draws
    launches = [
        (kind, one)
        for kind in options.kinds
        for one in LAUNCHES[kind]
        if not options.only or any(o in one.flags for o in options.only)
    ]
    if not launches:
        parser.error(f"--only must be part of a launch's flags, such as {LAUNCHES['unet'][0].flags}")
    if options.cores < (most := max(one.ranks for _, one in launches)):
        parser.error(f"--cores must be at least {most}, which a launch needs; got {options.cores}")
    # What takes long comes first: no core is alone with it at the end.
    launches.sort(key=lambda pair: ("quantize_to" not in pair[1].flags, -pair[1].ranks))
    machine = Machine(options.cores)
    drawn = read(options.results)
    known = {(one.kind, one.key, one.prompt) for one in drawn}

    def draw_plain(kind: str, launch: Launch, first: int) -> Made:
        part = scenes[first : first + PART]
        with machine.pool(1) as pool:
            [made] = pool.run(plain, 1, CHECKPOINTS[kind], launch.scheduler, part, first)
        pairs = enumerate(zip(part, made, strict=True), first)
        return [
            Drawn(kind, *launch.key, k, all(judge(picture).right(scene).values()))
            for k, (scene, picture) in pairs
        ], made

    def draw(kind: str, launch: Launch, first: int, wanted: Future[Made]) -> Made:
        part = scenes[first : first + PART]
        with machine.pool(launch.ranks) as pool:
            args = (CHECKPOINTS[kind], launch, part, options.device, first)
            made, late = next(found for found in pool.run(launched, launch.ranks, *args) if found[0])
        return compared(kind, launch, first, part, made, late, wanted.result()[1]), made

    pictured: dict[str, dict[Launch, list[Image.Image]]] = {}
    failed = False
    with ThreadPoolExecutor(options.cores) as jobs:
        waiting: dict[Future[Made], tuple[str, Launch, int]] = {}
        for first in range(0, options.prompts, PART):
            plains: dict[tuple[str, str | None], Future[Made]] = {}
            for kind, launch in launches:
                if all((kind, launch.key, k) in known for k in range(first, min(first + PART, len(scenes)))):
                    continue
                if (kind, launch.scheduler) not in plains:
                    flags = f"--scheduler={launch.scheduler}" if launch.scheduler else ""
                    alone = Launch(PLAIN, flags, 1, not flags)
                    plains[kind, launch.scheduler] = jobs.submit(draw_plain, kind, alone, first)
                    waiting[plains[kind, launch.scheduler]] = kind, alone, first
                job = jobs.submit(draw, kind, launch, first, plains[kind, launch.scheduler])
                waiting[job] = kind, launch, first
        for job in as_completed(waiting):
            kind, launch, first = waiting[job]
            try:
                new, made = job.result()
            except RankError as error:
                failed = True
                print(f"{kind}, {launch.host} {launch.flags}: {error}", file=sys.stderr, flush=True)
                continue
            new = [one for one in new if (one.kind, one.key, one.prompt) not in known]
            drawn += new
            if options.results:
                with options.results.open("a") as file:
                    file.writelines(json.dumps(asdict(one)) + "\n" for one in new)
            if first == 0 and launch.pictured and options.strip:
                pictured.setdefault(kind, {})[launch] = made
                columns = {
                    f"{one.host}, {one.ranks}\n" + one.flags.replace(" ", "\n"): there
                    for one, there in sorted(pictured[kind].items(), key=lambda p: p[0].host != PLAIN)
                }
                strip(scenes, columns).save(options.strip / f"tradeoff-{kind}.png", optimize=True)
    for pool in machine.idle:
        pool.close()
    page = ROOT / "docs" / "MEASURED.md"
    for kind in options.kinds:
        print(f"{kind}\n\n{table(kind, drawn)}\n")
        if options.write:
            page.write_text(put(page.read_text(), f"tradeoff-{kind}", table(kind, drawn)))
    sys.exit(failed)


if __name__ == "__main__":
    main()
