"""PipeFusion's stages as captured calls: what they keep between calls does not move, and no Python tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from benchmarks.pipefusion import CALLS, drawn
from shared.parallel.graphs import Graphs, signature
from shared.parallel.xdit import stage_buffers
from shared.parallel.xdit.cpu import load_xfuser
from shared.parallel.xdit.degrees import Degrees, may_capture
from shared.pipeline.compile import blocks, graph_count
from tests import tiny
from tests.pool import RankPool
from tests.seldom import seldom

TO_AND_FRO = 5
"""Requests: each of two sizes comes, and comes again after the other."""


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
    Replaying.replays, device, calls = 0, torch.device("cpu"), CALLS[:TO_AND_FRO]
    plain = drawn(name, Degrees(**degrees), device, calls)
    with mock.patch("shared.parallel.xdit.pipefusion.Graphs", Replaying):
        replayed = drawn(name, Degrees(**degrees), device, calls)
    return [float((a - b).abs().max()) for a, b in zip(plain, replayed, strict=True)], Replaying.replays


@pytest.mark.parametrize("name", seldom(["flux", "flux2", "sd3", "pixs", "pixa", "hy"], ("sd3",)))
def test_replayed_stages_are_those_that_python_calls(pool: RankPool, name: str) -> None:
    tiny.checkpoint(name)
    for differences, replays in pool.run(compared, 2, name, {"pipefusion": 2}):
        assert differences == [0.0] * TO_AND_FRO, differences
        assert replays >= TO_AND_FRO  # HunyuanDiT has five, the others more


def compiled(name: str) -> tuple[list[float], int]:
    """On each rank: the largest difference that compiling blocks makes, by request, and how many graphs."""
    torch._dynamo.reset()
    load, device = tiny.load, torch.device("cpu")

    def compiling(name: str) -> Any:
        pipe = load(name)
        for block in blocks(pipe.transformer):
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="eager")
        return pipe

    calls = CALLS[1:3]
    plain = drawn(name, Degrees(pipefusion=2), device, calls)
    before = graph_count()
    with mock.patch.object(tiny, "load", compiling), torch._dynamo.config.patch(recompile_limit=64):
        made = drawn(name, Degrees(pipefusion=2), device, calls)
    found = [float((a - b).abs().max()) for a, b in zip(plain, made, strict=True)]
    return found, graph_count() - before


@pytest.mark.slow  # a minute of tracing each
@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "pixs", "hy"])
def test_compiled_blocks_share_code_and_not_what_they_keep(pool: RankPool, name: str) -> None:
    tiny.checkpoint(name)
    for differences, graphs in pool.run(compiled, 2, name, timeout=240):
        assert differences == [0.0, 0.0], differences
        assert graphs >= 6  # of each of two sizes: whole pictures and both patches


def kept(tokens: list[int]) -> list[list[int]]:
    """Tokens of two Ulysses ranks that a layer has after a full step, and when each patch has come again."""
    load_xfuser("cpu")
    starts = [sum(tokens[:i]) for i in range(len(tokens) + 1)]
    state = SimpleNamespace(
        num_pipeline_patch=len(tokens),
        patch_mode=False,
        pp_patches_token_num=tokens,
        pp_patches_token_start_idx_local=starts,
    )
    layer = SimpleNamespace(all_patches=torch.empty(2 * starts[-1]))
    every = torch.arange(2 * starts[-1]).float().view(1, -1, 1)
    seen = []
    with mock.patch("xfuser.core.distributed.get_runtime_state", lambda: state):
        stage_buffers._with_other_patches(every, layer, 1, 2)
        seen.append(layer.all_patches.tolist())
        state.patch_mode = True
        for patch, length in enumerate(tokens):
            state.pipeline_patch_idx = patch
            new = torch.cat([half.narrow(1, starts[patch], length) for half in every.chunk(2, 1)], 1)
            seen.append(stage_buffers._with_other_patches(new, layer, 1, 2).flatten().tolist())
    return [sorted(int(token) for token in one) for one in seen]


def test_no_token_is_lost_or_doubled_between_ulysses_ranks(pool: RankPool) -> None:
    """xfuser keeps a full step's tokens rank by rank, and writes patches over them as if patch by patch."""
    for found in pool.run(kept, 2, [3, 3, 2]):
        assert found == [list(range(16))] * 4


def test_stages_are_captured_where_none_can_wait_in_a_circle() -> None:
    assert [patches for patches in range(1, 9) if may_capture(2, patches)] == [1, 2, 3]
    assert may_capture(4, 4) and not may_capture(4, 8)
