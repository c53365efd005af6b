"""Fixtures shared by all test modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to five rank processes that stay up for the session."""
    pool = RankPool()
    yield pool
    pool.close()
