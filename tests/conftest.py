"""Fixtures shared by all test modules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.ranks import RankPool
from tests.tables import RESULTS, results


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to five rank processes that stay up for the session."""
    pool = RankPool()
    yield pool
    pool.close()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what each cell of tests/test_matrix.py said, for `make matrix`."""
    found = re.search(r"test_matrix\.py::test_(asyncdiff|distrifuser|xdit)\[(\w+)-(\w+)\]$", report.nodeid)
    if found and (report.when == "call" or report.failed):
        RESULTS.parent.mkdir(exist_ok=True)
        noted = results() | {"/".join(found.groups()): report.outcome}
        RESULTS.write_text(json.dumps(noted, indent=1, sort_keys=True))
