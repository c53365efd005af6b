"""The two guidance branches on two ranks: exact, and nothing but the predictions crosses the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from shared.parallel.exchange import all_gather
from shared.parallel.surgery import Closing, Forward, Surgery

BATCH = 2
"""Guidance doubles the batch, without it there is one picture: [without prompt, with prompt]."""
POSITIONS = frozenset({"image_rotary_emb", "img_ids", "txt_ids"})
"""Keyword arguments whose first dimension is tokens, not pictures."""
RESIDUALS = frozenset({"down_block_additional_residuals", "mid_block_additional_residual"})
"""What a UNet is given of ControlNets that are halved themselves."""


class CfgSplit(Closing):
    """Makes modules compute one guidance branch only, and answer with both.

    A call whose first argument has a batch of two is halved: of every tensor among its arguments whose first
    dimension is a multiple of two (branch-major), positions aside, the module gets this branch's half. Any
    other call goes through as it is. Overrides must be put on after all others of these modules, and closed
    before them.

    Args:
        modules: denoisers; what they return is gathered from both ranks along the first dimension.
        group: two ranks, that of branch 0 first.
        branch: 0 or 1, which half is this rank's.
        local: modules whose output is only used by the others here (ControlNets): it stays one branch's.
        guided: whether the call of a local module that comes has both branches; by default as for the
            others, by its batch, which is no sign where pictures are frames.

    Raises:
        ValueError: the group is not one of two ranks, or the branch is not this rank's place in it.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        group: dist.ProcessGroup | None,
        branch: int,
        local: Sequence[nn.Module] = (),
        guided: Callable[[], bool] | None = None,
    ) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if ranks != BATCH or branch != rank:
            raise ValueError(
                f"branch {branch} on rank {rank} of a group of {ranks}: 2 ranks are needed, in branch order"
            )
        self.group, self.branch, self.guided = group, branch, guided
        self._whole = POSITIONS | RESIDUALS if local else POSITIONS
        self.active = False
        """Whether a halved call is under way."""
        self._surgery = Surgery()
        for module in (*modules, *local):
            self._surgery.override(module, self._gathering if module in modules else self._local)

    def close(self) -> None:
        """Give the modules back as they were. May be called any number of times."""
        self._surgery.close()

    def _gathering(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        if not _guided(args, kwargs):
            return original(*args, **kwargs)
        return tree_map(self._both, self._halved(original, args, kwargs))

    def _local(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        guided = _guided(args, kwargs) if self.guided is None else self.guided()
        return self._halved(original, args, kwargs) if guided else original(*args, **kwargs)

    def _halved(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        self.active = True
        try:
            whole = {name: value for name, value in kwargs.items() if name in self._whole}
            args, kwargs = tree_map(self._mine, (args, kwargs))
            return original(*args, **(kwargs | whole))
        finally:
            self.active = False

    def _mine(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0 or leaf.shape[0] % BATCH:
            return leaf
        return leaf.chunk(BATCH)[self.branch]

    def _both(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return all_gather(leaf, self.group)


def _guided(args: tuple, kwargs: dict) -> bool:
    first = args[0] if args else next(iter(kwargs.values()))
    return isinstance(first, torch.Tensor) and first.ndim > 0 and first.shape[0] == BATCH
