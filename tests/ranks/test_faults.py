"""benchmarks/faults.py: a short part of its table, on the demo checkpoint; and what it covers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.faults import Fault, all_faults, chain


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
