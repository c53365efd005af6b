"""Time on two GPUs against how close the pictures are, of one family, as a picture: which setting to take.

python benchmarks/pareto.py [--out docs/pareto.png]

Both figures are rows of docs/MEASURED.md: seconds of SDXL at 1024, 30 steps, compiled, on two H100 (the steps
chosen at run time: on two H200, whose other times are the same within 1 %); dB of the demo's UNet, 30 steps,
against plain diffusers. Settings that no other one beats in both are joined.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
WORK = "sdxl 1024, 30 steps"
TOP = 60.0  # dB at which equal pictures are drawn
WIDTH, HEIGHT, LEFT, BOTTOM = 760, 420, 60, 50
# Of the tables speed-hybrid and speed-chosen -> the table of the quality, its setting there, its preset.
SETTINGS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "compiled cfg": ("", (), "exact"),
    "compiled hybrid-demo": ("quality-hybrid", ("hybrid", "async_steps auto", "2", "auto"), "fast"),
    # Where the four steps are does not change the time.
    "compiled hybrid-10-4": ("quality-hybrid", ("hybrid", "async_steps 4", "2", "15"), "balanced"),
    "compiled hybrid-12-8": ("quality-hybrid", ("hybrid", "async_steps 8", "2", "12"), ""),
    "compiled hybrid-10-15": ("quality-hybrid", ("hybrid", "async_steps 15", "2", "10"), ""),
    "compiled asyncdiff": ("quality", ("asyncdiff", "model_n 2, stride 1", "2", "3"), ""),
}

NAMES = {"compiled hybrid-demo": "hybrid-auto", "compiled hybrid-10-4": "hybrid-15-4"}


@dataclass(frozen=True)
class Point:
    name: str
    seconds: float
    decibels: float  # infinite where the pictures are equal
    preset: str = ""


def rows(page: str, name: str) -> list[list[str]]:
    """The cells of the rows between the markers `name`. Raises ValueError where there are none."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page, re.DOTALL)
    if found is None:
        raise ValueError(f"docs/MEASURED.md has no table {name}")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines() if line]


def points(page: str) -> list[Point]:
    """The settings with both figures."""
    timed = rows(page, "speed-hybrid") + rows(page, "speed-chosen")
    times = {cells[1]: float(cells[2]) for cells in timed if cells[0] == WORK}
    made = []
    for name, (table, setting, preset) in SETTINGS.items():
        level = math.inf  # the branches' split changes nothing
        if table:
            head, *body = rows(page, table)
            place = head.index("PSNR dB")
            level = next(float(cells[place]) for cells in body if tuple(cells[:4]) == setting)
        made.append(Point(name, times[name], level, preset))
    return made


def frontier(found: list[Point]) -> list[Point]:
    """Those that no other one beats or equals in both, the fastest first."""
    best = [
        p
        for p in found
        if not any(q != p and q.seconds <= p.seconds and q.decibels >= p.decibels for q in found)
    ]
    return sorted(best, key=lambda p: p.seconds)


def draw(found: list[Point]) -> Image.Image:
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    first, last = min(p.seconds for p in found) - 0.03, max(p.seconds for p in found) + 0.06
    low = 10 * math.floor(min(p.decibels for p in found) / 10)

    def place(seconds: float, decibels: float) -> tuple[float, float]:
        x = LEFT + (seconds - first) / (last - first) * (WIDTH - LEFT - 20)
        return x, HEIGHT - BOTTOM - (min(decibels, TOP) - low) / (TOP - low) * (HEIGHT - BOTTOM - 50)

    for level in range(low, int(TOP) + 1, 5):
        y = place(first, level)[1]
        pen.line([(LEFT, y), (WIDTH - 20, y)], fill=(225, 225, 225))
        pen.text((LEFT - 8, y), "equal" if level == TOP else str(level), fill="black", font=font, anchor="rm")
    for tenth in range(math.ceil(first * 20), math.floor(last * 20) + 1):
        x = place(tenth / 20, low)[0]
        pen.text((x, HEIGHT - BOTTOM + 6), f"{tenth / 20:.2f} s", fill="black", font=font, anchor="ma")
    pen.text((LEFT, 8), "dB against plain diffusers (demo's UNet)", fill="black", font=font)
    label = "SDXL 1024, 30 steps, two H100, compiled"
    pen.text((WIDTH - 20, HEIGHT - 8), label, fill="black", font=font, anchor="rs")
    pen.line([place(p.seconds, p.decibels) for p in frontier(found)], fill=(40, 80, 220), width=2)
    for p in found:
        x, y = place(p.seconds, p.decibels)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=(215, 30, 40) if p.preset else (120, 120, 120))
        name = NAMES.get(p.name, p.name.removeprefix("compiled ")) + (f" ({p.preset})" if p.preset else "")
        pen.text((x + 9, y + 4), name, fill="black", font=font)
    return sheet


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pareto.png")
    options = parser.parse_args()
    found = points((ROOT / "docs" / "MEASURED.md").read_text())
    draw(found).save(options.out, optimize=True)
    for p in frontier(found):
        print(f"{p.name}: {p.seconds} s, {p.decibels} dB {p.preset}")


if __name__ == "__main__":
    main()
