"""benchmarks/faults.py: a short part of its table, on the demo checkpoint; and what it covers."""

from __future__ import annotations

from benchmarks.faults import Fault, all_faults, run


def test_a_host_comes_back_from_a_kill_and_makes_the_same_picture() -> None:
    fault = Fault("steady", "rank 0", "KILL", True)
    [(made, row)] = run([fault])
    assert made == fault and row["running request"].startswith("connection closed")
    assert row["back"].endswith("s, same picture") and row["left"] == "0"


def test_a_launcher_that_is_killed_leaves_nothing() -> None:
    [(_, row)] = run([Fault("steady", "launcher", "KILL", False)])
    assert row["launcher"] == "exit -9" and row["left"] == "0"
    assert row["running request"].startswith("500") and row["ranks gone"].endswith(" s")


def test_the_table_is_long() -> None:
    assert len(all_faults()) == len({fault.key for fault in all_faults()}) >= 30
