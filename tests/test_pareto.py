"""Time against closeness: the figures are those of docs/MEASURED.md, and the presets are on its edge."""

from __future__ import annotations

import math

from benchmarks.pareto import ROOT, SETTINGS, Point, draw, frontier, points, rows
from shared.backends.presets import asyncdiff
from shared.models import MODELS


def test_what_is_beaten_in_both_is_left_out() -> None:
    fast, slow, beaten = Point("a", 1.0, 30.0), Point("b", 2.0, math.inf), Point("c", 1.5, 30.0)
    assert frontier([slow, beaten, fast]) == [fast, slow]


def test_figures_are_those_of_the_tables_and_presets_are_on_the_edge() -> None:
    page = (ROOT / "docs" / "MEASURED.md").read_text()
    found = points(page)
    printed = [cells for cells in rows(page, "quality-hybrid") if cells[1:4] == ["async_steps 4", "2", "15"]]
    four = next(p for p in found if p.preset == "balanced")
    assert str(four.decibels) == printed[0][5] and four.seconds > 0
    assert {p.preset for p in frontier(found)} >= {"fast", "balanced", "exact"}
    assert draw(found).size == (760, 420)


def test_the_settings_with_a_preset_are_what_it_sets() -> None:
    presets = asyncdiff(MODELS["sdxl"], 2, ())
    measured = {preset: setting for _, setting, preset in SETTINGS.values()}
    assert measured["fast"][1] == "async_steps auto" and measured["balanced"][1:4] == (
        "async_steps 4",
        "2",
        "15",
    )
    assert presets["fast"] == {"use_cfg_parallel": True, "async_steps": "auto"}
    assert presets["balanced"] == {"use_cfg_parallel": True, "warm_up_steps": 15, "async_steps": 4}
    assert presets["exact"] == {"use_cfg_parallel": True}
