"""Time on two GPUs against how close the pictures are, of a family, as a picture: which setting to take.

python benchmarks/pareto.py [unet | transformer | student] [--folder docs]

Both figures are rows of docs/MEASURED.md, dB those against plain diffusers. UNet: seconds of SDXL at 1024,
30 steps, compiled, on two H100 (the steps chosen at run time: on two H200, whose other times are the same
within 1 %), and the demo's UNet, 30 steps. Transformer: seconds of Stable Diffusion 3 at 1024, 28 steps, on
two H100, and the demo's. Student: seconds of SDXL at 1024, 4 steps without guidance, compiled, on two H200,
and the demo's. A time that was not measured is drawn hollow: an asynchronous step is taken to save what each
one of a measured setting does (the eight of hybrid-12-8, the three of AsyncDiff after one exact step of 4).
Settings that no other one beats in both are joined.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
TOP = 60.0  # dB from which on pictures are drawn as equal
WIDTH, HEIGHT, LEFT, BOTTOM = 760, 420, 60, 50
Setting = tuple[str, tuple[str, ...], str]
"""The table of the quality, its setting there, its preset."""
SHARED = "`--use_cfg_parallel"
TIMES = ("speed-few-steps", "speed-hybrid", "speed-chosen")
"""Tables of seconds."""


@dataclass(frozen=True)
class Family:
    work: str
    label: str
    quality: str
    file: str
    settings: dict[str, Setting]
    """By the system's name in the tables of seconds."""
    late: dict[str, str]
    """Systems whose time was not measured, with their asynchronous steps; empty: those in `quality`."""
    saved: tuple[str, str, int]
    """What one of these steps saves: between these two systems, by so many asynchronous steps."""
    names: dict[str, str]
    """How systems are called in the picture, where otherwise."""


FAMILIES = {
    "unet": Family(
        "sdxl 1024, 30 steps",
        "SDXL 1024, 30 steps, two H100, compiled",
        "demo's UNet",
        "pareto.png",
        {
            "compiled cfg": ("", (), "exact"),
            "compiled hybrid-demo": ("tradeoff-unet", ("asyncdiff", f"{SHARED} --async_steps=auto`"), "fast"),
            **{
                # Where the four steps are does not change the time.
                f"compiled hybrid-{10 if n == 4 else w}-{n}": (
                    "tradeoff-unet",
                    ("asyncdiff", f"{SHARED} --warm_up_steps={w} --async_steps={n}`"),
                    "balanced" if n == 4 else "",
                )
                for w, n in ((15, 4), (12, 8), (10, 15))
            },
            "compiled asyncdiff": ("tradeoff-unet", ("asyncdiff", "`--warm_up_steps=3`"), ""),
        },
        {},
        ("compiled cfg", "compiled hybrid-12-8", 8),
        {"compiled hybrid-demo": "hybrid-auto", "compiled hybrid-10-4": "hybrid-15-4"},
    ),
    "transformer": Family(
        "sd3 1024, 28 steps",
        "Stable Diffusion 3 1024, 28 steps, two H100",
        "demo's transformer",
        "pareto-transformer.png",
        {
            "cfg": ("", (), "exact"),
            "hybrid-auto": ("tradeoff-transformer", ("asyncdiff", f"{SHARED} --async_steps=auto`"), "fast"),
            **{
                f"hybrid-{w}-{n}": (
                    "tradeoff-transformer",
                    ("asyncdiff", f"{SHARED} --warm_up_steps={w} --async_steps={n}`"),
                    "balanced" if n == 4 else "",
                )
                for w, n in ((15, 4), (12, 8), (10, 15))
            },
            "asyncdiff": ("tradeoff-transformer", ("asyncdiff", "`--warm_up_steps=3`"), ""),
        },
        {"hybrid-auto": "", "hybrid-15-4": "4", "hybrid-10-15": "15"},
        ("cfg", "hybrid-12-8", 8),
        {},
    ),
    "student": Family(
        "sdxl 1024, 4 steps",
        "SDXL 1024, 4 steps, no guidance, two H200, compiled",
        "demo's student",
        "pareto-student.png",
        {
            "compiled graph": ("", (), ""),
            # What a launch without flags does in 4 steps.
            "compiled asyncdiff": ("tradeoff-student", ("asyncdiff", "`--warm_up_steps=1`"), ""),
            "asyncdiff-2": ("tradeoff-student", ("asyncdiff", "`--warm_up_steps=2`"), ""),
            "asyncdiff-3": ("tradeoff-student", ("asyncdiff", "`--warm_up_steps=3`"), ""),
        },
        {"asyncdiff-2": "2", "asyncdiff-3": "1"},
        ("compiled graph", "compiled asyncdiff", 3),
        {
            "compiled graph": "one GPU",
            "compiled asyncdiff": "AsyncDiff, 1 exact step",
            "asyncdiff-2": "2 exact steps",
            "asyncdiff-3": "3 exact steps",
        },
    ),
}


@dataclass(frozen=True)
class Point:
    name: str
    seconds: float
    decibels: float  # infinite where the pictures are equal
    preset: str = ""
    estimated: bool = False
    """Whether its time was not measured."""


def rows(page: str, name: str) -> list[list[str]]:
    """The cells of the rows between the markers `name`. Raises ValueError where there are none."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page, re.DOTALL)
    if found is None:
        raise ValueError(f"docs/MEASURED.md has no table {name}")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines() if line]


def points(page: str, family: Family) -> list[Point]:
    """The settings with both figures."""
    timed = [cells for name in TIMES for cells in rows(page, name)]
    times = {cells[1]: float(cells[2]) for cells in timed if cells[0] == family.work}
    made = []
    for name, (table, setting, preset) in family.settings.items():
        level, late = math.inf, 0.0  # the branches' split changes nothing
        if table:
            head, *body = rows(page, table)
            cells = next(cells for cells in body if tuple(cells[: len(setting)]) == setting)
            level = float(cells[head.index("PSNR dB")].split()[0])
        estimated = name in family.late and name not in times
        if estimated:
            late = float(family.late[name] or cells[head.index("asynchronous")])
            exact, other, count = family.saved
            times[name] = round(times[exact] - late * (times[exact] - times[other]) / count, 3)
        made.append(Point(name, times[name], level, preset, estimated))
    return made


def frontier(found: list[Point]) -> list[Point]:
    """Those that no other one beats or equals in both, the fastest first."""
    best = [
        p
        for p in found
        if not any(q != p and q.seconds <= p.seconds and q.decibels >= p.decibels for q in found)
    ]
    return sorted(best, key=lambda p: p.seconds)


def draw(found: list[Point], family: Family) -> Image.Image:
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    first, last = min(p.seconds for p in found), max(p.seconds for p in found)
    tick = 0.05 if last - first > 0.1 else 0.01  # seconds
    first, last = first - 0.6 * tick, last + 1.2 * tick
    low = 10 * math.floor(min(p.decibels for p in found) / 10)

    def place(seconds: float, decibels: float) -> tuple[float, float]:
        x = LEFT + (seconds - first) / (last - first) * (WIDTH - LEFT - 20)
        return x, HEIGHT - BOTTOM - (min(decibels, TOP) - low) / (TOP - low) * (HEIGHT - BOTTOM - 50)

    for level in range(low, int(TOP) + 1, 5):
        y = place(first, level)[1]
        pen.line([(LEFT, y), (WIDTH - 20, y)], fill=(225, 225, 225))
        pen.text((LEFT - 8, y), "equal" if level == TOP else str(level), fill="black", font=font, anchor="rm")
    for number in range(math.ceil(first / tick), math.floor(last / tick) + 1):
        x = place(number * tick, low)[0]
        pen.text((x, HEIGHT - BOTTOM + 6), f"{number * tick:.2f} s", fill="black", font=font, anchor="ma")
    pen.text((LEFT, 8), f"dB against plain diffusers ({family.quality})", fill="black", font=font)
    pen.text((WIDTH - 20, HEIGHT - 8), family.label, fill="black", font=font, anchor="rs")
    pen.line([place(p.seconds, p.decibels) for p in frontier(found)], fill=(40, 80, 220), width=2)
    for p in found:
        x, y = place(p.seconds, p.decibels)
        colour = (215, 30, 40) if p.preset else (120, 120, 120)
        inside = "white" if p.estimated else colour
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=inside, outline=colour, width=2)
        name = family.names.get(p.name, p.name.removeprefix("compiled "))
        name += f" ({p.preset})" if p.preset else ""
        pen.text((x + 9, y + 4), name, fill="black", font=font)
    return sheet


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("family", nargs="?", choices=FAMILIES, help="default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    for name in [options.family] if options.family else FAMILIES:
        family = FAMILIES[name]
        found = points((ROOT / "docs" / "MEASURED.md").read_text(), family)
        draw(found, family).save(options.folder / family.file, optimize=True)
        for p in frontier(found):
            print(f"{p.name}: {p.seconds} s, {p.decibels} dB {p.preset}")


if __name__ == "__main__":
    main()
