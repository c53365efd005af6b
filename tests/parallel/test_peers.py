"""Memory of other ranks: how it is opened, and where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.parallel import peers
from shared.parallel.exchange import Ranks


class OnDevice(torch.Tensor):
    """A tensor of the CPU that says it is on the third GPU."""

    @property
    def device(self) -> Any:
        return torch.device("cuda", 2)


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
    own = torch.zeros(4, dtype=torch.uint8).as_subclass(OnDevice)
    return own, peers._opened([("here", ARGUMENTS)] * 3, own, 1)


def test_another_ranks_memory_is_opened_for_this_ranks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = opened(monkeypatch, lambda device: f"on {device}")
    assert seen == ["on 2", own, "on 2"]


def test_memory_that_cannot_be_opened_is_left_to_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: int) -> Any:
        raise RuntimeError("CUDA error: invalid device context\nmore")

    assert opened(monkeypatch, refuse)[1] is None


def test_the_user_may_switch_peer_copies_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    own = torch.zeros(4, dtype=torch.uint8).as_subclass(OnDevice)
    assert peers.seen_by_all(own, Ranks(None, 0, 2)) is None  # else it would ask the other rank
