"""Time against closeness: the figures are those of docs/MEASURED.md, and the presets are on its edge."""

from __future__ import annotations

import math
import re

import pytest

from benchmarks.pareto import FAMILIES, ROOT, Point, draw, frontier, points, rows
from shared.backends.presets import Presets, asyncdiff, distrifuser, xdit
from shared.models import MODELS


def test_what_is_beaten_in_both_is_left_out() -> None:
    fast, slow, beaten = Point("a", 1.0, 30.0), Point("b", 2.0, math.inf), Point("c", 1.5, 30.0)
    assert frontier([slow, beaten, fast]) == [fast, slow]


def test_figures_are_those_of_the_tables_and_presets_are_on_the_edge() -> None:
    page = (ROOT / "docs" / "MEASURED.md").read_text()
    family = FAMILIES["unet"]
    found = points(page, family)
    flags = "`--use_cfg_parallel --warm_up_steps=15 --async_steps=4`"
    [level] = [cells[4] for cells in rows(page, "tradeoff-unet") if cells[1] == flags]
    four = next(p for p in found if p.preset == "balanced")
    assert level.startswith(f"{four.decibels} ±") and four.seconds > 0
    assert {p.preset for p in frontier(found)} >= {"fast", "balanced", "exact"}
    assert draw(found, family).size == (760, 420)


def test_a_time_that_was_not_measured_is_what_its_shared_steps_save() -> None:
    page = (ROOT / "docs" / "MEASURED.md").read_text()
    family = FAMILIES["transformer"]
    found = {p.name: p for p in points(page, family)}
    split, eight, four = (found[name].seconds for name in ("cfg", "hybrid-12-8", "hybrid-15-4"))
    assert found["hybrid-15-4"].estimated and not found["hybrid-12-8"].estimated
    assert abs(four - (split + eight) / 2) < 0.001
    edge = frontier(list(found.values()))
    assert {p.preset for p in edge} >= {"fast", "balanced", "exact"}
    assert "asyncdiff" not in {p.name for p in edge}


def test_asynchronous_steps_of_few_save_alike_and_every_family_has_its_picture() -> None:
    page = (ROOT / "docs" / "MEASURED.md").read_text()
    found = {p.name: p for p in points(page, FAMILIES["student"])}
    three, two, one, none = (
        found[name].seconds for name in ("compiled asyncdiff", "asyncdiff-2", "asyncdiff-3", "compiled graph")
    )
    assert found["compiled graph"].decibels == math.inf and not found["compiled asyncdiff"].estimated
    assert abs(two - (none - (none - three) * 2 / 3)) < 0.001 < abs(one - two)
    for family in FAMILIES.values():
        assert f"]({family.file})" in page and (ROOT / "docs" / family.file).exists()


@pytest.mark.parametrize(
    ("host", "presets"),
    [
        ("`asyncdiff_host.py`, 2 ranks", asyncdiff(MODELS["sdxl"], 2, ())),
        ("the same, other numbers of ranks, or with flags of stages", asyncdiff(MODELS["sdxl"], 3, ())),
        ("`distrifuser_host.py`", distrifuser(MODELS["sdxl"], 2, ())),
        ("`xdit_host.py`", xdit(MODELS["sd3"], 2, (), True)),
        (
            "the same, with `--pipefusion_parallel_degree`",
            xdit(MODELS["sd3"], 2, ("pipefusion_parallel_degree",), True),
        ),
    ],
)
def test_the_table_of_presets_is_what_they_set(host: str, presets: Presets) -> None:
    page = (ROOT / "docs" / "USING.md").read_text()
    assert told(page, host) == flags_of(presets)


@pytest.mark.parametrize(
    ("host", "presets"),
    [
        ("`asyncdiff_host.py`", asyncdiff(MODELS["sdxl"], 2, ())),
        ("`distrifuser_host.py`", distrifuser(MODELS["sdxl"], 2, ())),
        ("`xdit_host.py`", xdit(MODELS["sd3"], 2, (), True)),
    ],
)
def test_the_readme_says_what_they_set_on_two_ranks(host: str, presets: Presets) -> None:
    assert told((ROOT / "README.md").read_text(), host) == flags_of(presets)


def told(page: str, host: str) -> list[list[str]]:
    """The flags in the row of a host, in a document's table of presets."""
    lines = page.split("| host | fast | balanced | exact |")[1].splitlines()
    row = next(line for line in lines if line.startswith(f"| {host} |"))
    return [re.findall(r"--[^ `]+", cell) for cell in row.split("|")[2:5]]


def flags_of(presets: Presets) -> list[list[str]]:
    return [
        [f"--{flag}" + ("" if value is True else f"={value}") for flag, value in presets[name].items()]
        for name in ("fast", "balanced", "exact")
    ]


def test_presets_of_pipefusion_take_exact_steps_that_more_of_them_hardly_beat() -> None:
    """By at most 3 dB, for nine exact steps more."""
    page = (ROOT / "docs" / "MEASURED.md").read_text()
    presets = xdit(MODELS["sd3"], 2, ("pipefusion_parallel_degree",), True)
    for patches in (2, 4):
        start = f"`--pipefusion_parallel_degree=2 --num_pipeline_patch={patches} --warm_up_steps="
        found = {
            int(cells[1].removeprefix(start).rstrip("`")): tuple(map(float, cells[4].split(" ± ")))
            for cells in rows(page, "tradeoff-transformer")
            if cells[1].startswith(start)
        }
        best = max(level for level, _ in found.values())
        for name in ("fast", "balanced"):
            level, error = found[presets[name]["warm_up_steps"]]
            assert level + error > best - 3


def test_the_settings_with_a_preset_are_what_it_sets() -> None:
    presets = asyncdiff(MODELS["sdxl"], 2, ())
    for family in ("unet", "transformer"):
        for _, setting, preset in FAMILIES[family].settings.values():
            if preset and setting:
                flags = [f"--{k}" + ("" if v is True else f"={v}") for k, v in presets[preset].items()]
                assert setting == ("asyncdiff", f"`{' '.join(flags)}`")
    assert presets["fast"] == {"use_cfg_parallel": True, "async_steps": "auto"}
    assert presets["balanced"] == {"use_cfg_parallel": True, "warm_up_steps": 15, "async_steps": 4}
    assert presets["exact"] == {"use_cfg_parallel": True}
