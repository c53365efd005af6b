"""The estimate of a wait, from jobs that were made."""

from __future__ import annotations

import time
from typing import Any

import pytest

from shared.api.jobs import GenerationJob, Job, OperationJob, SecondPass
from shared.api.operations import RemoveLora
from shared.api.pace import Pace
from shared.api.requests import GenerateRequest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def job(id: str, **body: Any) -> GenerationJob:
    request = GenerateRequest(**{"width": 64, "height": 64, "steps": 10, **body})
    return GenerationJob(request=request, id=id)


def test_work_counts_pixels_steps_frames_pictures_and_passes() -> None:
    assert job("a").work() == 64 * 64 * 10
    assert job("a", pictures=3, frames=4, strength=0.5).work() == 64 * 64 * 10 * 3 * 4 * 0.5
    second = SecondPass(
        job("b", width=128, strength=0.5).request, "Latent", "bilinear", False, "sd", (64, 64)
    )
    both = GenerationJob(request=job("a").request, second=second)
    assert both.work() == 64 * 64 * 10 + 128 * 64 * 10 * 0.5


def test_nothing_is_told_before_anything_is_known() -> None:
    running = job("running")
    running.start()
    assert Pace().estimates(None, [job("waiting")]) == {}
    assert Pace().estimates(running, [job("waiting")]) == {}


def test_a_wait_is_what_is_left_and_all_that_comes_before(clock: list[float]) -> None:
    pace, made = Pace(), job("made")
    made.start()
    clock[0] += 4
    pace.add(made)  # 4 s for 64 x 64 x 10
    waiting: list[Job] = [
        job("first"),
        OperationJob(operation=RemoveLora("a"), id="lora"),
        job("second", width=128, pictures=2),
    ]
    assert pace.estimates(None, waiting) == pytest.approx({"first": 4, "second": 4 + 16})
    running = job("running", steps=20)
    running.start()
    assert pace.estimates(running, waiting) == pytest.approx({"running": 8, "first": 12, "second": 28})
    clock[0] += 6  # slower than the others: 6 s for half of it
    running.at_step(10, 20)
    left = 6 / 0.495 * 0.505
    wanted = {"running": left, "first": left + 4, "second": left + 20}
    assert pace.estimates(running, waiting) == pytest.approx(wanted)


def test_the_first_job_is_its_own_measure(clock: list[float]) -> None:
    running = job("running")
    running.start()
    clock[0] += 2
    running.at_step(5, 10)
    found = Pace().estimates(running, [job("waiting")])
    assert found == pytest.approx({"running": 2 / 0.495 * 0.505, "waiting": 2 / 0.495 * 1.505})


def test_only_the_last_jobs_count(clock: list[float]) -> None:
    pace = Pace()
    for seconds in (100, *[1] * 16):
        made = job("made")
        made.start()
        clock[0] += seconds
        pace.add(made)
    assert pace.estimates(None, [job("waiting")]) == pytest.approx({"waiting": 1})
