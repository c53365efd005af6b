"""The tiny checkpoints: there, small, repeatable, and sensitive to what goes in."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.seldom import seldom


# A builder that is broken fails the tests of its type; of each kind of output, one is tested here as well.
@pytest.mark.parametrize("name", seldom(tiny.BUILDERS, ("sd1", "svd", "flux", "wan", "sdup")))
def test_runs_and_answers_to_its_inputs(name: str) -> None:
    pipe = tiny.load(name)
    first = tiny.run(pipe, name)
    assert first.shape[-3:] == (64, 64, 3) and np.isfinite(first).all() and first.std() > 0.05
    assert np.array_equal(first, tiny.run(pipe, name))
    assert np.abs(first - tiny.run(pipe, name, seed=1)).max() > 0.05
    other = {"image": tiny.picture(64, 1)} if name == "svd" else {"prompt": "a dog on a hill"}
    assert np.abs(first - tiny.run(pipe, name, **other)).max() > 1e-3


def test_cache_survives_several_builders_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_CACHE", str(tmp_path))
    built = []

    def make(path: Path) -> None:
        built.append(path)
        path.mkdir()
        (path / "weights").write_text("x" * 1000)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: tiny.cached("thing", make), range(4)))
    assert len(set(paths)) == 1 and (paths[0] / "weights").stat().st_size == 1000
    assert [p.name for p in paths[0].parent.iterdir()] == ["thing"], "nothing half built is left behind"
    count = len(built)
    tiny.cached("thing", make)
    assert len(built) == count
