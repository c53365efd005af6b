"""PipeFusion's stages as captured calls: what they keep between calls does not move, and no Python tells."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from benchmarks.pipefusion import CALLS, drawn
from shared.parallel.graphs import Graphs, signature
from shared.parallel.xdit.degrees import Degrees
from tests import tiny
from tests.pool import RankPool
from tests.seldom import seldom


class Replaying(Graphs):
    """As blind as captured graphs are, on the CPU: the third call and those after it repeat the operators
    that the second one ran, on the same memory but for their inputs, and none of its Python."""

    replays = 0

    def run(self, kind: Any, fn: Any, **kwargs: Any) -> Any:
        key, (leaves, spec) = (kind, signature(kwargs)), tree_flatten(kwargs)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        seen: Any = self._seen.get(key)
        if seen is None:
            self._seen.put(key, object())  # type: ignore[arg-type]
            return fn(**kwargs)
        given = [leaves[i].clone() for i in places]
        if not isinstance(seen, torch.fx.GraphModule):

            def call(*tensors: torch.Tensor) -> Any:
                for place, tensor in zip(places, tensors, strict=True):
                    leaves[place] = tensor
                return fn(**tree_unflatten(leaves, spec))

            with torch.no_grad():
                seen = make_fx(call)(*(x.clone() for x in given))
            self._seen._values[key] = seen
            return seen(*given)
        Replaying.replays += 1
        with torch.no_grad():
            return seen(*given)


def compared(name: str, degrees: dict[str, int]) -> tuple[list[float], int]:
    """On each rank: the largest difference that replaying makes, by request, and the calls it repeats."""
    Replaying.replays, device = 0, torch.device("cpu")
    plain = drawn(name, Degrees(**degrees), device)
    with mock.patch("shared.parallel.xdit.pipefusion.Graphs", Replaying):
        replayed = drawn(name, Degrees(**degrees), device)
    return [float((a - b).abs().max()) for a, b in zip(plain, replayed, strict=True)], Replaying.replays


@pytest.mark.parametrize("name", seldom(["flux", "sd3", "pixs", "pixa", "hy"], ("sd3", "pixs")))
def test_replayed_stages_are_those_that_python_calls(pool: RankPool, name: str) -> None:
    tiny.checkpoint(name)
    for differences, replays in pool.run(compared, 2, name, {"pipefusion": 2}):
        assert differences == [0.0] * len(CALLS), differences
        assert replays > 10
