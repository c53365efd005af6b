"""Memory of other ranks: how it is opened, and where it is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from shared.parallel import peers
from shared.parallel.exchange import Ranks
from tests.pool import RankPool

OWN: Any = SimpleNamespace(device=torch.device("cuda", 2))
"""A tensor of bytes on the third GPU."""
ARGUMENTS = [f"argument {i}" for i in range(15)]


def opened(monkeypatch: pytest.MonkeyPatch, rebuild: Any) -> Any:
    def signed(
        cls: Any,
        size: Any,
        stride: Any,
        offset: Any,
        storage_cls: Any,
        dtype: Any,
        storage_device: Any,
        *rest: Any,
    ) -> Any:
        return rebuild(storage_device)

    monkeypatch.setattr(peers, "rebuild_cuda_tensor", signed)
    return peers._opened([("here", ARGUMENTS)] * 3, OWN, 1)


def test_another_ranks_memory_is_opened_for_this_ranks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(monkeypatch, lambda device: f"on {device}") == ["on 2", OWN, "on 2"]


def test_memory_that_cannot_be_opened_is_left_to_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: int) -> Any:
        raise RuntimeError("CUDA error: invalid device context\nmore")

    assert opened(monkeypatch, refuse) is None


def test_the_user_may_switch_peer_copies_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert peers.seen_by_all(OWN, Ranks(None, 0, 2)) is None  # else it would ask the other rank


def between() -> tuple[bool, bool]:
    group = dist.group.WORLD
    assert group is not None
    made = peers.PeerGather.between(group, torch.device("cpu"))
    return made is None, peers.PeerGather.of(group) is None


def test_ranks_without_gpus_leave_it_to_collectives(pool: RankPool) -> None:
    assert pool.run(between, 2) == [(True, True)] * 2


def test_waiting_for_a_tensor_waits_for_its_copies() -> None:
    waits: list[int] = []
    event: Any = SimpleNamespace(wait=lambda: waits.append(1))
    copied, tensor = peers._Copied(event), torch.zeros(2)
    torch._C._distributed_c10d._register_work(tensor, copied)
    assert not copied.waited
    functional.wait_tensor(tensor)
    assert copied.waited and waits == [1]


def test_a_shared_buffer_is_not_filled_before_it_was_read() -> None:
    gather = peers.PeerGather.__new__(peers.PeerGather)
    event: Any = SimpleNamespace(wait=lambda: None)
    read, unread = peers._Copied(event), peers._Copied(event)
    read.wait()
    gather._turn, gather._under_way = 1, [[read], [read, unread]]
    with pytest.raises(RuntimeError, match="more than 2 gatherings under way"):
        gather.start([torch.zeros(1)])
    gather.begin()
    assert gather._turn == 0 and gather._under_way == [[], []]
