"""shared.parallel.graphs: a call-through on the CPU, capture and replay on CUDA."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shared.parallel import graphs as module
from shared.parallel.graphs import Graphs, Pool, signature

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


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


def test_calls_are_not_captured_where_they_are_to_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(*args: Any) -> Any:
        raise AssertionError("captured")

    monkeypatch.setattr(module, "pool_of", captured)
    graphs, x = Graphs(), torch.ones(2).as_subclass(OnGpu)
    with module.uncaptured():
        for _ in range(3):
            assert graphs.run("double", lambda x: 2 * x, x=x).sum() == 4
    graphs.run("double", lambda x: 2 * x, x=x)
    with pytest.raises(AssertionError, match="captured"):
        graphs.run("double", lambda x: 2 * x, x=x)


class Device:
    """Memory as a pool of graphs takes it: what only one needs while it runs is shared by all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.handles = 0
        self.shared: dict[int, int] = {}
        self.own: dict[int, int] = {}
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self.handle)

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    def in_use(self) -> int:
        return sum(self.shared.values()) + sum(self.own.values())

    def capture(self, handle: int, running: int, own: int) -> Any:
        self.shared[handle] = max(self.shared.get(handle, 0), running)
        self.own[handle] = self.own.get(handle, 0) + own
        return SimpleNamespace(handle=handle)


def test_a_pool_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    device, owners = Device(monkeypatch), [Graphs(), Graphs()]
    pool = Pool(100, device.in_use)

    def capture(owner: Graphs, running: int, own: int) -> Any:
        seen = module._Seen()
        owner._seen.put(len(owner._seen), seen)
        seen.graph = pool.captured(owner, lambda handle: device.capture(handle, running, own))
        for old in set(device.shared) - {pool.handle}:
            device.shared.pop(old), device.own.pop(old)
        return seen.graph

    def kept() -> list[int]:
        return [sum(seen.graph is not None for seen in owner._seen) for owner in owners]

    for number in range(4):
        assert capture(owners[number % 2], 60, 10)
    assert pool.nbytes == 100 and kept() == [2, 2], "60 once, and 10 each"
    assert capture(owners[0], 60, 10)
    assert (pool.nbytes, kept()) == (70, [1, 0]), "the others are dropped, and their pool with them"
    assert capture(owners[1], 120, 0) is None, "it is too large alone"
    assert (pool.nbytes, kept()) == (0, [0, 0])
    assert capture(owners[1], 10, 10) and pool.nbytes == 20
    owners[1].close()
    pool.left(owners[0])
    pool.left(owners[1])
    assert pool.nbytes == 0 and pool.handle is None


@cuda
def test_third_call_is_replayed_and_results_are_the_callers() -> None:
    calls = []

    def scaled(x: torch.Tensor, t: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
        calls.append(scale)
        return {"out": x * t * scale}

    graphs = Graphs()
    results = []
    for i in range(4):
        x = torch.full((4,), float(i), device="cuda")
        results.append(graphs.run("scaled", scaled, x=x, t=torch.tensor(2.0), scale=3.0)["out"])
    assert calls == [3.0, 3.0]
    assert [r[0].item() for r in results] == [0, 6, 12, 18]
    for scale in (4.0, 5.0, 3.0):
        out = graphs.run("scaled", scaled, x=torch.ones(4, device="cuda"), t=torch.tensor(1.0), scale=scale)
        assert out["out"][0].item() == scale
    assert calls == [3.0, 3.0, 4.0, 5.0]


@cuda
def test_graphs_of_all_models_share_one_bounded_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(module, "_pools", {})
    calls = []

    def large(x: torch.Tensor, mib: int) -> torch.Tensor:
        calls.append(mib)
        return (x.repeat(mib << 18) + 1).sum(0, keepdim=True)

    owners = [Graphs() for _ in range(3)]
    pool = module.pool_of(device)
    assert 0.2 * torch.cuda.mem_get_info(device)[1] < pool.limit < torch.cuda.mem_get_info(device)[1]
    x = torch.ones(1, device=device)
    for owner in owners:
        for _ in range(3):
            assert owner.run("large", large, x=x, mib=256).item() == 2 * 2**26
    assert calls == [256] * 6
    # Two tensors of 256 MiB while it runs, shared by the three.
    assert 512 << 20 <= pool.nbytes < 700 << 20
    pool.limit = 300 << 20
    for _ in range(3):
        assert owners[0].run("large", large, x=2 * x, mib=128).item() == 3 * 2**25
    assert calls[6:] == [128, 128] and pool.nbytes <= pool.limit, "the others are dropped"
    for _ in range(2):
        assert owners[1].run("large", large, x=x, mib=256).item() == 2 * 2**26
    assert calls[8:] == [256] * 4, "captured twice, the second time alone, then eager twice"
    assert pool.nbytes == 0


@cuda
def test_switched_off_it_never_captures() -> None:
    calls = []
    graphs = Graphs(enabled=False)
    for _ in range(3):
        graphs.run("x", lambda x: calls.append(x), x=torch.ones(1, device="cuda"))
    assert len(calls) == 3
