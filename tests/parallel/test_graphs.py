"""shared.parallel.graphs: a call-through on the CPU, capture and replay on CUDA."""

from __future__ import annotations

import pytest
import torch

from shared.parallel.graphs import Graphs, signature

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_signature_tells_shapes_dtypes_structure_and_values_apart() -> None:
    x = torch.zeros(2, 3)
    base = {"x": x, "scale": 1.0, "more": [x, None]}
    assert signature(base) == signature({"x": x + 1, "scale": 1.0, "more": [x * 2, None]})
    others = [
        base | {"x": torch.zeros(3, 2)},
        base | {"x": x.half()},
        base | {"scale": 2.0},
        base | {"scale": 1},
        base | {"more": (x, None)},
        base | {"more": [x, x]},
        base | {"more": [x, {"unhashable": {1}}]},
    ]
    assert len({signature(base), *map(signature, others)}) == len(others) + 1


def test_without_cuda_every_call_goes_through() -> None:
    calls = []

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return 2 * x

    graphs = Graphs()
    for i in range(3):
        x = torch.full((2,), float(i))
        assert torch.equal(graphs.run("double", double, x=x), 2 * x)
        assert calls[-1] is x
    assert len(calls) == 3
    graphs.close()


@cuda
def test_third_call_is_replayed_and_results_are_the_callers() -> None:
    calls = []

    def scaled(x: torch.Tensor, t: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
        calls.append(scale)
        return {"out": x * t * scale}

    graphs = Graphs(size=2)
    results = []
    for i in range(4):
        x = torch.full((4,), float(i), device="cuda")
        results.append(graphs.run("scaled", scaled, x=x, t=torch.tensor(2.0), scale=3.0)["out"])
    assert calls == [3.0, 3.0]
    assert [r[0].item() for r in results] == [0, 6, 12, 18]
    for scale in (4.0, 5.0, 3.0):  # two newer signatures push the first one out
        out = graphs.run("scaled", scaled, x=torch.ones(4, device="cuda"), t=torch.tensor(1.0), scale=scale)
        assert out["out"][0].item() == scale
    assert calls == [3.0, 3.0, 4.0, 5.0, 3.0]


@cuda
def test_switched_off_it_never_captures() -> None:
    calls = []
    graphs = Graphs(enabled=False)
    for _ in range(3):
        graphs.run("x", lambda x: calls.append(x), x=torch.ones(1, device="cuda"))
    assert len(calls) == 3
