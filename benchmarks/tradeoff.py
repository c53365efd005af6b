"""How close a host's pictures are and how often they obey, by its flags, on each of the demo's checkpoints.

python benchmarks/tradeoff.py student [--prompts 64] [--only warm_up] [--strip docs] [--write]
python benchmarks/tradeoff.py unet transformer student --cores 32 --results results.jsonl --minutes 8
python benchmarks/tradeoff.py unet transformer student --device cuda --cores 32 --results results.jsonl

Each row is a launch: the host's own engine draws the same held-out prompts with the same seeds, in fp32, one
by one on CPU ranks of this machine. With --device cuda launches that make the same pictures of many prompts
at the same time draw them so on pairs of GPUs, which several launches share; the others stay on CPU ranks, as
do those of more ranks, on two thirds of --cores. Compared with plain diffusers on the same device: PSNR of
the 8-bit pictures (the mean of each one's, with its standard error; equal ones count as 100 dB), the worst
picture, SSIM (Wang et al. 2004, a Gaussian of 1.5 pixels), and how many show what the prompt asks for by the
rule of demo/draw.py. What was drawn is kept in --results, and not drawn again. All launches draw their first
prompts before any draws more, and then those of the presets, of docs/pareto*.png and one of each method come
first, so that a run that is cut, or ends by --minutes, has rows of all, each with its own count; the same
command draws what is left. A row is of one device, the one that drew more of it; --agree says how far the two
are apart where both drew. --write puts the rows into docs/MEASURED.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from checkpoints import CHECKPOINTS  # noqa: E402
from draw import held_out_scenes, judge  # noqa: E402

from benchmarks.quality import strip  # noqa: E402
from benchmarks.tradeoff_launches import GPUS, LAUNCHES, WANTED, Launch, shares  # noqa: E402
from benchmarks.tradeoff_ranks import EQUAL, Drawn, Machine, Part, measured, plain  # noqa: E402
from tests.pool import RankError  # noqa: E402
from tests.tables import put  # noqa: E402

HEAD = "| host | flags | ranks | asynchronous | PSNR dB | worst | SSIM | obeyed |\n|---|---|" + "---:|" * 6
PART = 8
"""Prompts that a launch draws before the others draw theirs."""
EDGES = {"cpu": (0, *range(PART, 200, 16)), "cuda": (0, PART, 64, 128)}
"""Where parts begin. Starting a launch takes as long as drawing a few prompts, on GPUs many together."""
TOGETHER = {"cpu": 1, "cuda": 64}
PLAIN = "plain diffusers"
Made = tuple[list[Drawn], list[Image.Image]]


def parts(prompts: int, first: int, device: str, together: int) -> list[Part]:
    """Of the held-out prompts from `first` to `prompts`."""
    scenes = held_out_scenes(200)  # the first ones that demo/evaluate.py draws
    edges = [first, *(edge for edge in EDGES[device] if first < edge < prompts), prompts]
    return [Part(scenes[low:high], low, device, together) for low, high in pairwise(edges)]


class TimeUpError(RuntimeError):
    """A part that was to begin after --minutes."""


Job = tuple[str, Launch, Part]


def plan(launches: list[tuple[str, Launch]], part: Part, known: set[tuple]) -> list[Job]:
    """What is left to draw of a part."""
    jobs = []
    for kind, launch in launches:
        left = [k for k in part.numbers if (part.device, kind, launch.key, k) not in known]
        if left:
            jobs.append((kind, launch, part.only(range(left[0], left[-1] + 1))))
    return jobs


def in_order(
    launches: list[tuple[str, Launch]], asked: list[Part], known: set[tuple]
) -> list[tuple[Part, list[Job]]]:
    """What is left to draw, by parts: the first one of all launches, then what is wanted most."""
    soon = [pair for pair in launches if pair[1].flags in WANTED[pair[0]]]
    others = [pair for pair in launches if pair not in soon]
    turns = [(asked[0], launches), *((part, some) for some in (soon, others) for part in asked[1:])]
    return [(part, plan(some, part, known)) for part, some in turns]


def obeyed(right: list[bool]) -> str:
    """Count and per cent, with the standard error of the share."""
    share = sum(right) / len(right)
    error = math.sqrt(share * (1 - share) / len(right))
    return f"{sum(right)} of {len(right)} ({100 * share:.0f} ± {100 * error:.0f} %)"


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


def rows_of(kind: str, drawn: Iterable[Drawn], device: str) -> dict[tuple[str, str, int], list[Drawn]]:
    of: dict[tuple[str, str, int], list[Drawn]] = {}
    for one in drawn:
        if one.kind == kind and one.device == device:
            of.setdefault(one.key, []).append(one)
    return of


def table(kind: str, drawn: list[Drawn]) -> str:
    """The rows of a checkpoint in the order of its launches, those without a picture left out.

    Each is of one device, the one that drew more of it.
    """
    of = rows_of(kind, drawn, "cpu")
    for key, ones in rows_of(kind, drawn, "cuda").items():
        of[key] = max(ones, of.get(key, []), key=len)
    keys = [key for key in of if key[0] == PLAIN] + [launch.key for launch in LAUNCHES[kind]]
    return "\n".join([HEAD, *(row(of[key]) for key in keys if key in of)])


def agreement(kind: str, drawn: list[Drawn]) -> list[str]:
    """Of each launch that both devices drew: how far their dB are apart for the same prompts."""
    lines = []
    on_cpu = rows_of(kind, drawn, "cpu")
    for key, ones in rows_of(kind, drawn, "cuda").items():
        at = {one.prompt: one for one in on_cpu.get(key, [])}
        pairs = [(one, at[one.prompt]) for one in ones if one.prompt in at]
        if not pairs:
            continue
        gaps = [one.psnr - other.psnr for one, other in pairs]
        flips = sum(one.right != other.right for one, other in pairs)
        far = f"{statistics.mean(gaps):+.2f} dB, at most {max(map(abs, gaps)):.2f}, {flips} judged otherwise"
        lines.append(f"{kind}, {key[0]} {key[1]}: {len(pairs)} prompts, {far}")
    return lines


def read(path: Path | None) -> list[Drawn]:
    if path is None or not path.exists():
        return []
    return [Drawn(**json.loads(line)) for line in path.read_text().splitlines()]


def weight(kind: str, launch: Launch) -> tuple[bool, bool, int, int]:
    """What takes longer sorts higher."""
    return launch.alone, "quantize_to" in launch.flags, CHECKPOINTS[kind].steps, launch.ranks


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("kinds", choices=LAUNCHES, nargs="+")
    parser.add_argument("--prompts", type=int, default=64, help="up to this held-out prompt (default 64)")
    parser.add_argument("--first", type=int, default=0, help="from this held-out prompt (default 0)")
    parser.add_argument("--only", action="append", help="launches whose flags contain this (repeatable)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cores", type=int, default=4, help="ranks at the same time (default 4)")
    parser.add_argument("--together", type=int, help="prompts of a call (default 1, on GPUs 64)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after these no part is begun")
    parser.add_argument("--results", type=Path, help="keep what is known of each picture in this file")
    parser.add_argument("--tables", action="store_true", help="draw nothing: only what --results has")
    parser.add_argument("--agree", action="store_true", help="say how far GPUs' rows are from the CPU's")
    parser.add_argument(
        "--strip", type=Path, help="write pictures of some launches side by side into this folder"
    )
    parser.add_argument("--write", action="store_true", help="put the rows into docs/MEASURED.md")
    options = parser.parse_args()
    if not 0 <= options.first < options.prompts <= 200:
        parser.error(f"--first must be less than --prompts, and that at most 200; got {options.first}")
    launches = [
        (kind, one)
        for kind in options.kinds
        for one in LAUNCHES[kind]
        if not options.only or any(o in one.flags for o in options.only)
    ]
    if not launches:
        parser.error(f"--only must be part of a launch's flags, such as {LAUNCHES['unet'][0].flags}")
    at = {pair: pair[1].device(options.device) for pair in launches}
    cores, gpus = shares(options.cores, set(at.values())), torch.cuda.device_count()
    most = max((launch.ranks for (_, launch), device in at.items() if device == "cpu"), default=0)
    if cores.get("cpu", 0) < most:
        parser.error(
            f"--cores must leave {most} to a launch's CPU ranks; {options.cores} leaves {cores['cpu']}"
        )
    if "cuda" in cores and (gpus < GPUS or cores["cuda"] < GPUS) and not options.tables:
        parser.error(f"--device: cuda needs {GPUS} GPUs and as many --cores; there are {gpus} GPUs")
    # What takes long comes first: no core is alone with it at the end.
    launches.sort(key=lambda pair: weight(*pair), reverse=True)
    machines = {device: Machine(count, device, gpus) for device, count in cores.items()}
    end = time.monotonic() + 60 * options.minutes
    drawn = read(options.results)
    known = {(one.device, one.kind, one.key, one.prompt) for one in drawn}

    def in_time() -> None:
        if time.monotonic() > end:
            raise TimeUpError

    def draw_plain(kind: str, launch: Launch, part: Part) -> Made:
        with machines[part.device].pool(1) as pool:
            in_time()
            [made] = pool.run(plain, 1, CHECKPOINTS[kind], launch.scheduler, part)
        pairs = enumerate(zip(part.scenes, made, strict=True), part.first)
        return [
            Drawn(kind, *launch.key, k, all(judge(picture).right(scene).values()), device=part.device)
            for k, (scene, picture) in pairs
        ], made

    def draw(kind: str, launch: Launch, part: Part, plain: Future[Made], first: int) -> Made:
        wanted = plain.result()[1][part.first - first :][: len(part.scenes)]
        with machines[part.device].pool(launch.ranks) as pool:
            in_time()
            found = pool.run(measured, launch.ranks, kind, CHECKPOINTS[kind], launch, part, wanted)
        return next(one for one in found if one[0])

    pictured: dict[str, dict[Launch, list[Image.Image]]] = {}
    failed, left_out = False, 0
    scenes = held_out_scenes(200)
    with contextlib.ExitStack() as held:
        waiting: dict[Future[Made], tuple[str, Launch, int]] = {}
        for device, count in ({} if options.tables else cores).items():
            jobs = held.enter_context(ThreadPoolExecutor(count))
            mine = [pair for pair in launches if at[pair] == device]
            together = options.together or TOGETHER[device]
            asked = parts(options.prompts, options.first, device, together)
            plains: dict[tuple[str, str | None, int], Future[Made]] = {}
            for part, todo in in_order(mine, asked, known):
                for kind, launch, _ in todo:
                    if (key := (kind, launch.scheduler, part.first)) not in plains:
                        flags = f"--scheduler={launch.scheduler}" if launch.scheduler else ""
                        alone = Launch(PLAIN, flags, 1, not flags)
                        plains[key] = jobs.submit(draw_plain, kind, alone, part)
                        waiting[plains[key]] = kind, alone, part.first
                for kind, launch, left in todo:
                    wanted = plains[kind, launch.scheduler, part.first]
                    job = jobs.submit(draw, kind, launch, left, wanted, part.first)
                    waiting[job] = kind, launch, left.first
        for job in as_completed(waiting):
            kind, launch, first = waiting[job]
            try:
                new, made = job.result()
            except TimeUpError:
                left_out += 1
                continue
            except RankError as error:
                failed = True
                print(f"{kind}, {launch.host} {launch.flags}: {error}", file=sys.stderr, flush=True)
                continue
            new = [one for one in new if (one.device, one.kind, one.key, one.prompt) not in known]
            drawn += new
            if options.results:
                with options.results.open("a") as file:
                    file.write("".join(json.dumps(asdict(one)) + "\n" for one in new))
            if first == 0 and launch.pictured and options.strip:
                pictured.setdefault(kind, {})[launch] = made
                columns = {
                    f"{one.host}, {one.ranks}\n" + one.flags.replace(" ", "\n"): there
                    for one, there in sorted(pictured[kind].items(), key=lambda p: p[0].host != PLAIN)
                }
                strip(scenes, columns).save(options.strip / f"tradeoff-{kind}.png", optimize=True)
    for pool in (pool for machine in machines.values() for pool in machine.idle):
        pool.close()
    page = ROOT / "docs" / "MEASURED.md"
    for kind in options.kinds:
        print(f"{kind}\n\n{table(kind, drawn)}\n")
        if options.agree:
            print("\n".join(agreement(kind, drawn)), end="\n\n")
        if options.write:
            page.write_text(put(page.read_text(), f"tradeoff-{kind}", table(kind, drawn)))
    if left_out:
        print(
            f"{left_out} parts are left after {options.minutes:g} minutes: run the same again",
            file=sys.stderr,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
