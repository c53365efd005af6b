"""Real hosts with --state_dir: ranks and launchers are killed, and nothing that was accepted is lost."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.faults import REQUEST, START, Host, until

LONG = {"positive": "a blue square", "steps": 24}  # its seed is drawn


def accept(host: Host, id: str, **body: Any) -> None:
    headers = {"Prefer": "respond-async", "X-Request-Id": id}
    answer = requests.post(f"{host.url}/generate", json=body, headers=headers, timeout=START)
    assert answer.status_code == 202, answer.text


def job(host: Host, id: str, wait: float = 0) -> dict[str, Any]:
    with contextlib.suppress(requests.ConnectionError):
        answer = requests.get(f"{host.url}/jobs/{id}?wait={wait}", timeout=START)
        found: dict[str, Any] = answer.json() | {"http": answer.status_code}
        return found
    return {"state": "", "progress": 0}


def runs(host: Host, id: str) -> bool:
    """Whether the job comes to a few steps."""
    return until(lambda: (found := job(host, id))["state"] == "running" and found["progress"] > 2, 2 * START)


def done(host: Host, id: str) -> dict[str, Any]:
    assert until(lambda: job(host, id, 5)["state"] in ("done", "failed", "cancelled"), 2 * START)
    return job(host, id)


def back(host: Host, old: list[int]) -> None:
    """Wait until ranks other than `old` take jobs, or already have one; long, for a loaded machine."""
    serves = until(
        lambda: host.ended() or (host.started(old) and host.state() in ("ready", "busy")), 2 * START
    )
    assert serves and not host.ended(), host.log.read_text()


@pytest.mark.slow  # with an engine that draws nothing: test_host.py
def test_a_killed_rank_loses_no_job_and_changes_no_picture(tmp_path: Path) -> None:
    host = Host(tmp_path, True, f"--state_dir={tmp_path / 'state'}")
    try:
        back(host, [])
        alone = host.ask(**REQUEST).json()["output"]
        accept(host, "running-1", **LONG)
        accept(host, "waiting-1", **REQUEST)
        accept(host, "waiting-2", **REQUEST | {"seed": None})
        assert runs(host, "running-1")
        seeds = [job(host, id)["seed"] for id in ("running-1", "waiting-2")]
        os.kill((old := host.ranks())[0], signal.SIGKILL)
        back(host, old)
        headers = {"X-Request-Id": "running-1"}  # by a client that was cut off
        again = requests.post(f"{host.url}/generate", json=LONG, headers=headers, timeout=2 * START)
        assert again.status_code == 200, again.text
        answers = [again.json(), *(done(host, id)["answer"] for id in ("waiting-1", "waiting-2"))]
        assert answers[1]["output"] == alone
        assert [answers[0]["seed"], answers[2]["seed"]] == seeds
        for body, answer in ((LONG, answers[0]), (REQUEST, answers[2])):
            assert host.ask(**body | {"seed": answer["seed"]}).json()["output"] == answer["output"]
    finally:
        host.end()


@pytest.mark.slow
def test_two_deaths_of_one_job_an_orderly_stop_and_a_new_launch(tmp_path: Path) -> None:
    state = f"--state_dir={tmp_path / 'state'}"
    host = Host(tmp_path, True, state)
    try:
        back(host, [])
        alone = host.ask(**REQUEST).json()["output"]
        accept(host, "deadly-01", **LONG)
        accept(host, "waiting-1", **REQUEST)
        for _ in range(2):
            assert runs(host, "deadly-01")
            os.kill((old := host.ranks())[1], signal.SIGKILL)
            back(host, old)
        found = done(host, "deadly-01")
        assert (found["state"], found["message"]) == ("failed", "the host ended twice while this ran")
        assert done(host, "waiting-1")["answer"]["output"] == alone
        accept(host, "stopped-1", **LONG)
        accept(host, "waiting-2", **REQUEST)
        assert runs(host, "stopped-1")
        for _ in range(2):  # the second ends the host at once
            os.kill(host.ranks()[0], signal.SIGTERM)
        assert until(host.ended, 60) and host.process.returncode == 0, host.log.read_text()
    finally:
        host.end()
    host = Host(tmp_path, False, state)
    try:
        back(host, [])
        other = Host(tmp_path, False, state)
        try:
            assert until(other.ended, START)
            assert "--state_dir" in other.log.read_text() and "used by another host" in other.log.read_text()
        finally:
            other.end()
        assert done(host, "stopped-1")["state"] == "done"
        assert done(host, "waiting-2")["answer"]["output"] == alone
        kept = {id: done(host, id)["state"] for id in ("waiting-1", "deadly-01")}
        assert kept == {"waiting-1": "done", "deadly-01": "failed"}
    finally:
        host.end()
