"""Phases of a start: what each took, also before the program ran, and that they are told together."""

from __future__ import annotations

import re

import pytest

from shared.launch import phases
from shared.launch.phases import Phases


def test_each_phase_lasts_until_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    found = Phases()
    monkeypatch.setattr(phases.time, "time", lambda: now[0])
    found._began = 0.0
    for name, seconds in (("imports", 1.0), ("ranks", 2.5), ("imports", 0.04), ("warm-up", 3.0)):
        now[0] += seconds
        found.begin(name)
    now[0] += 5
    told = found.told()
    assert told.pop("python") > 0
    assert told == {"flags": 1.0, "imports": 5.5, "ranks": 0.0, "warm-up": 5.0}
    line = r"start: \d+\.\d s \(python .*, flags 1\.0, imports 5\.5, warm-up 5\.0\)"
    assert re.fullmatch(line, found.line())


def test_under_torchrun_its_own_start_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torchrun" not in Phases().seconds
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert next(iter(Phases().seconds)) == "torchrun"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "torchrun" in Phases().seconds
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # it has run for long then
    assert "torchrun" not in Phases().seconds
