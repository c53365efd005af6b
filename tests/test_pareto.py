"""Time against closeness: the figures are those of docs/MEASURED.md, and the presets are on its edge."""

from __future__ import annotations

import math

from benchmarks.pareto import FAMILIES, ROOT, Point, draw, frontier, points, rows
from shared.backends.presets import asyncdiff
from shared.models import MODELS


def test_what_is_beaten_in_both_is_left_out() -> None:
    fast, slow, beaten = Point("a", 1.0, 30.0), Point("b", 2.0, math.inf), Point("c", 1.5, 30.0)
    assert frontier([slow, beaten, fast]) == [fast, slow]


def test_figures_are_those_of_the_tables_and_presets_are_on_the_edge() -> None:
    page = (ROOT / "docs" / "MEASURED.md").read_text()
    family = FAMILIES["unet"]
    found = points(page, family)
    printed = [cells for cells in rows(page, "quality-hybrid") if cells[1:4] == ["async_steps 4", "2", "15"]]
    four = next(p for p in found if p.preset == "balanced")
    assert str(four.decibels) == printed[0][5] and four.seconds > 0
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


def test_the_settings_with_a_preset_are_what_it_sets() -> None:
    presets = asyncdiff(MODELS["sdxl"], 2, ())
    measured = {preset: setting for _, setting, preset in FAMILIES["unet"].settings.values()}
    assert measured["fast"][1] == "async_steps auto" and measured["balanced"][1:4] == (
        "async_steps 4",
        "2",
        "15",
    )
    assert presets["fast"] == {"use_cfg_parallel": True, "async_steps": "auto"}
    assert presets["balanced"] == {"use_cfg_parallel": True, "warm_up_steps": 15, "async_steps": 4}
    assert presets["exact"] == {"use_cfg_parallel": True}
