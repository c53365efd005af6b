"""Fixtures shared by all test modules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.pool import RankPool
from tests.tables import RESULTS, results
from tests.test_host import DEMO_CHECKPOINT, DEMO_STEPS, Launch


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to five rank processes that stay up for the session."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def demo_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """A real host on the demo checkpoint: two ranks under torchrun, 128x128, exact up to DEMO_STEPS steps.

    Shared by all tests that leave it as it was; a test that ends a host starts its own.
    """
    flags = [f"--checkpoint={DEMO_CHECKPOINT}", "--variant=fp32", "--width=128", "--height=128"]
    folder = tmp_path_factory.mktemp("demo_host")
    launch = Launch(
        folder, 2, *flags, f"--warm_up_steps={DEMO_STEPS}", "--allow_lora_paths", script="asyncdiff_host.py"
    )
    try:
        yield launch.ready()
    finally:
        launch.end()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what each cell of tests/test_matrix.py said, for `make matrix`."""
    found = re.search(r"test_matrix\.py::test_(asyncdiff|distrifuser|xdit)\[(\w+)-(\w+)\]$", report.nodeid)
    if found and (report.when == "call" or report.failed):
        RESULTS.parent.mkdir(exist_ok=True)
        noted = results() | {"/".join(found.groups()): report.outcome}
        RESULTS.write_text(json.dumps(noted, indent=1, sort_keys=True))
