"""benchmarks/faults.py, kills.py and soak.py: a short part of their tables; what they count as wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import kills, patient, soak
from benchmarks.faults import Fault, all_faults, chain
from tests.httphost import FakeHost


@pytest.mark.slow
def test_a_host_comes_back_from_a_kill_and_leaves_nothing_when_its_launcher_is_killed(tmp_path: Path) -> None:
    kill, launcher = Fault("steady", "rank 0", "KILL", True), Fault("steady", "launcher", "KILL", False)
    rows = dict(chain([kill, launcher], tmp_path))  # both on one host
    assert rows[kill]["running request"].startswith("connection closed")
    assert rows[kill]["back"].endswith("s, same picture") and rows[kill]["left"] == "0"
    assert rows[launcher]["launcher"] == "exit -9" and rows[launcher]["left"] == "0"
    assert rows[launcher]["running request"].startswith("500")
    assert rows[launcher]["ranks gone"].endswith(" s")


def test_the_table_is_long() -> None:
    assert len(all_faults()) == len({fault.key for fault in all_faults()}) >= 30


@pytest.mark.slow
def test_clients_at_work_lose_nothing_when_a_rank_is_killed(tmp_path: Path) -> None:
    [row] = kills.run([("steady", "rank 0", "KILL")], tmp_path)
    assert row["jobs at work"] >= 6 and row["state"] == "steady" and kills.wrong(row) == []
    assert [job for job in row["jobs"] if job.hit and job.other is False], "pictures are compared"
    assert any(job.again for job in row["jobs"]), "the kill was felt"


def asked(way: str, seed: int, known: bool) -> patient.Asked:
    """What a client finds that saw its job accepted with a seed, on a host that knows the job or not."""
    with FakeHost() as host:
        job = patient.Asked(way, {"positive": "x", "steps": 2, "width": 64, "height": 64, "seed": 5})
        if known:
            patient.ask(host.url, patient.Asked(way, job.body, id=job.id), {}, 20)
        patient.ask(host.url, job, {job.id: seed}, 20)
        return job


@pytest.mark.parametrize("way", patient.WAYS)
def test_a_client_knows_a_lost_job_from_one_that_was_kept(way: str) -> None:
    kept, lost, drawn = (asked(way, seed, known) for seed, known in ((5, True), (5, False), (6, True)))
    assert kept.picture is not None and kept.seed == 5 and not kept.lost
    assert lost.picture is None and "not known any more" in lost.lost
    assert drawn.lost == "its seed was 6, then 5"


def test_the_table_of_kills_counts_and_keeps_the_rows_of_other_runs() -> None:
    row = {"state": "idle", "victim": "rank 0", "signal": "KILL", "jobs at work": 2}
    row |= {"gone": "0.5 s", "back": "30.0 s", "orphans": 0}
    good, bad = patient.Asked("raw", {}, picture=b"a"), patient.Asked("raw", {}, lost="gone")
    good.other, bad.other = False, True
    text = kills.table([row | {"jobs": [good, bad]}])
    assert "| idle | rank 0 | KILL | 2 | 0.5 s | 30.0 s | 1 | 1 | 1 | 0 |" in text
    both = kills.table([row | {"signal": "TERM", "back": "9.0 s", "jobs": [good]}], text)
    assert (
        both.splitlines()[-1] == "| all | 2 kills |  | 4 | at most 0.5 s | at most 30.0 s | 2 | 1 | 1 | 0 |"
    )
    kill, _, stop = every = [("idle", "rank 0", number) for number in ("KILL", "TERM", "STOP")]
    assert kills.missing(every, both) == [stop, kill]  # without a row; with a lost job
    good.other = None
    part = kills.table([row | {"jobs": [good]}], both)
    assert kills.missing(every, part) == [stop, kill]  # whose pictures are not compared
    good.other = False
    assert kills.missing(every, kills.table([row | {"jobs": [good]}], both)) == [stop]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({}, []),
        ({"orphans": 1}, ["1 processes are left"]),
        (
            {"back": "9.0 s, 3.0 s of them loading, LATE"},
            ["gone 0.5 s, back 9.0 s, 3.0 s of them loading, LATE"],
        ),
        ({"gone": "NOT GONE"}, ["gone NOT GONE, back 9.0 s, 8.0 s of them loading"]),
        ({"lost": "422: no"}, ["1: 422: no"]),
        ({"other": True}, ["1: other bytes"]),
        ({"picture": None}, ["1: no picture"]),
    ],
)
def test_what_a_kill_must_not_show_is_told(fault: dict[str, Any], words: list[str]) -> None:
    job = patient.Asked("raw", {}, id="1", picture=b"a", other=False)
    for name in ("lost", "other", "picture"):
        setattr(job, name, fault.get(name, getattr(job, name)))
    row: dict[str, Any] = {"state": "idle", "victim": "rank 0", "signal": "KILL", "jobs": [job]}
    row |= {"gone": "0.5 s", "back": "9.0 s, 8.0 s of them loading", "orphans": 0} | fault
    assert kills.wrong(row) == [f"idle/rank 0/KILL: {text}" for text in words]


@pytest.mark.parametrize(
    ("what", "grows"), [("memory", True), ("threads", True), ("files", True), ("", False)]
)
def test_a_soak_sees_growth_and_only_growth(what: str, grows: bool) -> None:
    samples = []
    for at in range(100):
        late = at > 60
        memory = 500.0 + 20 * (late and what == "memory") + at % 3  # some noise
        held = soak.Held(
            at, memory, 10 + (late and what == "threads"), 20 + 5 * (at % 2) + (late and what == "files")
        )
        samples.append(held)
    text, grew = soak.table({0: samples}, 100, soak.ALLOWED)
    assert [one.split(":")[0] for one in grew] == ["rank 0"] * grows and (what in "".join(grew))
    assert "| 0 | memory | 501 MiB | 501 MiB |" in text
