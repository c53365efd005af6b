"""A host over two machines (network namespaces): the cable is pulled, and no accepted job is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.faults import BAD
from benchmarks.netns import Pair, cut


def namespaces() -> bool:
    """Whether network namespaces may be made here."""
    if os.getuid() or not shutil.which("ip") or not shutil.which("curl"):
        return False
    made = subprocess.run(["ip", "netns", "add", "probe"], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", "probe"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("state", ["busy"])
def test_a_cut_cable_loses_no_job(tmp_path: Path, state: str) -> None:
    if not namespaces():
        pytest.skip("needs root, iproute2, curl and the right to make network namespaces")
    request = {"positive": '{"sleep": 0.1}', "steps": 10, "seed": 7}
    pair = None
    try:
        pair = Pair(tmp_path, True, "tests/fake_host.py", request)
        row = cut(pair, state, True)
        assert not any(map(BAD.search, row.values())), row
        assert row["jobs"] == "3 of 3, same pictures" and row["back"].endswith("after the link")
    finally:
        if pair is not None:
            pair.end()
