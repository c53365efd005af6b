"""Parameters of tests of which a few run always and the others, slow and alike, in `make matrix`."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def seldom(values: Iterable[Any], often: Container[Any]) -> list[Any]:
    """Each value, a tuple where a test takes several, as a parameter; those not in `often` marked as slow."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if value in often else [pytest.mark.slow],
        )
        for value in values
    ]
