"""CFG split: the two guidance branches on two ranks. Exact; only the predictions are exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from shared.parallel.chosen_steps import Pace
from shared.parallel.exchange import Ranks, all_gather
from shared.parallel.method import Part
from shared.parallel.shapes import Latest
from shared.parallel.surgery import Forward, Surgery

BRANCHES = 2
"""Guidance doubles the batch: [pictures without prompt, pictures with prompt]."""
POSITIONS = frozenset({"image_rotary_emb", "img_ids", "txt_ids"})
"""Keyword arguments whose first dimension is tokens, not pictures."""
RESIDUALS = frozenset(
    {"down_block_additional_residuals", "mid_block_additional_residual", "controlnet_block_samples"}
)
"""What a denoiser gets from ControlNets that are halved themselves."""


class CfgSplit(Part):
    """Makes modules compute only one guidance branch, and return both.

    A call whose first argument has a batch of twice as many as ``begin`` was told is halved: of every tensor
    among its arguments whose first dimension is a multiple of two (branch-major), positions aside, the module
    gets this branch's half. Models that take lists of one tensor a picture get half of each list. Any other
    call is unchanged. Overrides must be put on after all others of these
    modules, and closed before them.

    Args:
        modules: denoisers; what they return is gathered from both ranks along the first dimension, or as a
            list of tensors of one shape.
        group: two ranks, that of branch 0 first.
        branch: 0 or 1, which half is this rank's.
        local: modules whose output is only used by the others here (ControlNets): it stays one branch's.
        guided: whether the next call of a local module has both branches; by default its batch says so, as
            for the others. A batch of frames needs it.

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
        super().__init__()
        ranks = Ranks.of(group)
        if ranks.size != BRANCHES or branch != ranks.rank:
            raise ValueError(
                f"CFG split needs a group of 2 ranks, in branch order; got branch {branch} on rank "
                f"{ranks.rank} of {ranks.size}"
            )
        self.group, self.branch, self.guided = group, branch, guided
        self._whole = POSITIONS | RESIDUALS if local else POSITIONS
        self.active = False
        """Whether a halved call is running."""
        surgery = self.held.enter_context(Surgery())
        for module in (*modules, *local):
            surgery.override(module, self._gathering if module in modules else self._local)

    @property
    def taken(self) -> int:
        """The branch that this rank computes."""
        return self.branch

    def _gathering(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        if not self._has_both(args, kwargs):
            return original(*args, **kwargs)
        lists = _is_list(_first(args, kwargs))
        return tree_map(self._both, self._halved(original, args, kwargs), is_leaf=_is_list if lists else None)

    def _local(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        guided = self._has_both(args, kwargs) if self.guided is None else self.guided()
        return self._halved(original, args, kwargs) if guided else original(*args, **kwargs)

    def _has_both(self, args: tuple, kwargs: dict) -> bool:
        first = _first(args, kwargs)
        batch = BRANCHES * self.pictures
        if _is_list(first):
            return len(first) == batch
        return isinstance(first, torch.Tensor) and first.ndim > 0 and first.shape[0] == batch

    def _halved(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        self.active = True
        try:
            whole = {name: value for name, value in kwargs.items() if name in self._whole}
            lists = _is_list(_first(args, kwargs))
            args, kwargs = tree_map(self._mine, (args, kwargs), is_leaf=_is_list if lists else None)
            return original(*args, **(kwargs | whole))
        finally:
            self.active = False

    def _mine(self, leaf: Any) -> Any:
        if _is_list(leaf) and len(leaf) == BRANCHES * self.pictures:
            return leaf[self.taken * self.pictures :][: self.pictures]
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0 or leaf.shape[0] % BRANCHES:
            return leaf
        return leaf.chunk(BRANCHES)[self.taken]

    def _both(self, leaf: Any) -> Any:
        if _is_list(leaf):
            return list(all_gather(torch.stack(leaf), self.group).unbind())
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return all_gather(leaf, self.group)


def _first(args: tuple, kwargs: dict) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _is_list(leaf: Any) -> bool:
    return isinstance(leaf, list) and bool(leaf) and all(isinstance(item, torch.Tensor) for item in leaf)


class HybridSplit(CfgSplit):
    """The guidance branches on two ranks, except in some steps, in which both ranks work on one branch.

    In those, the ranks share the branch with the prompt (by AsyncDiff, underneath), and the other one is that
    less the difference of the two in the last step that computed both; where the steps are chosen by what is
    measured, less that difference gone on as it changed between the last two such steps. After Hybridiff
    (arXiv 2602.21760, section 3), which pipelines while the branches agree as well, but lets each rank go on
    with stages of different branches. Before the first shared step the rank of the branch with the prompt
    hands over what the other one needs of it (AsyncDiff's ``leader``).

    Args:
        shared: whether the ranks share the branch with the prompt in a step of the generation, counted from
            0; not in the first one.
        pace: is told what each step made, where it measures.
        Others as in CfgSplit.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        group: dist.ProcessGroup | None,
        branch: int,
        shared: Callable[[int], bool],
        local: Sequence[nn.Module] = (),
        guided: Callable[[], bool] | None = None,
        pace: Pace | None = None,
    ) -> None:
        super().__init__(modules, group, branch, local, guided)
        self.shared, self._step = shared, 0
        self.pace = pace if pace is not None and pace.measures else None
        self._known: list[tuple[int, list[torch.Tensor]]] = []
        """The branches' difference in the last two steps that computed both."""

    def begin(self, steps: int, pictures: int = 1) -> None:
        super().begin(steps, pictures)
        self._step = 0
        self._known.clear()

    @property
    def taken(self) -> int:
        """The branch that this rank computes in the next step."""
        return 1 if self.shared(self._step) else self.branch

    def _gathering(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        step = self._step
        both = self._has_both(args, kwargs)
        exact = both and not self.shared(step)
        answer = self._answer(original, args, kwargs)
        if self.pace is not None:
            made = next(leaf for leaf in tree_leaves(answer) if isinstance(leaf, torch.Tensor))
            prompted = made.chunk(BRANCHES)[1] if both else made
            self.pace.note(step, prompted, self._known[-1][1][0] if exact else None)
        return answer

    def _answer(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        try:
            if not self._has_both(args, kwargs):
                return original(*args, **kwargs)
            if not self.shared(self._step):
                return self._keep(tree_map(self._both, self._halved(original, args, kwargs)))
            if not self._known:
                raise RuntimeError("guidance begins in a step in which the ranks share one branch")
            kept = iter(self._expected())
            return tree_map(lambda leaf: self._completed(leaf, kept), self._halved(original, args, kwargs))
        finally:
            self._step += 1

    def _keep(self, answer: Any) -> Any:
        leaves = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
        difference = [prompted - other for other, prompted in (x.chunk(BRANCHES) for x in leaves)]
        self._known = [*self._known[-1:], (self._step, difference)]
        return answer

    def _expected(self) -> list[torch.Tensor]:
        """The branches' difference in this step."""
        step, difference = self._known[-1]
        if self.pace is None or len(self._known) < 2:
            return difference
        before, old = self._known[0]
        ahead = (self._step - step) / (step - before)
        return [torch.lerp(b, a, 1 + ahead) for b, a in zip(old, difference, strict=True)]

    def _completed(self, leaf: Any, kept: Iterator[torch.Tensor]) -> Any:
        return torch.cat([leaf - next(kept), leaf]) if isinstance(leaf, torch.Tensor) else leaf


class CallsSplit(Part):
    """The two guidance branches of a step, each a call of its own, on two ranks.

    Each rank computes one of the two calls. The first call's answer on the other rank is filled in during the
    second, so a pipeline may only cut it until then, which all of diffusers' do. The first step of a size
    computes both calls on both ranks: it shows what a call returns.

    Args:
        module: the denoiser; overridden after all others, and closed before them.
        group: two ranks.

    Raises:
        ValueError: the group is not one of two ranks.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        ranks = Ranks.of(group)
        if ranks.size != BRANCHES:
            raise ValueError(f"CFG split needs a group of 2 ranks; got {ranks.size}")
        self.group, self.branch = group, ranks.rank
        self.guided = False
        """Whether the running generation makes two calls a step."""
        self._call, self._divided = 0, False
        self._first: list[torch.Tensor] = []
        self._shapes: Latest[list[torch.Tensor]] = Latest(8)
        self.held.enter_context(Surgery()).override(module, self._one)

    def begin(self, steps: int, pictures: int = 1) -> None:
        super().begin(steps, pictures)
        self._call = 0

    def _one(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        if not self.guided:
            return original(*args, **kwargs)
        number, self._call = self._call, 1 - self._call
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        shape = tensors[0].shape, tensors[0].dtype
        if number == 0:
            self._divided = self._shapes.get(shape) is not None
        if not self._divided:
            answer = original(*args, **kwargs)
            if self._shapes.get(shape) is None:
                self._shapes.put(shape, [torch.empty_like(x, device="meta") for x in tree_leaves(answer)])
            return answer
        if number == 0:
            if self.branch == 0:
                answer = original(*args, **kwargs)
            else:
                answer = tuple(
                    torch.empty_like(x, device=tensors[0].device) for x in self._shapes.get(shape) or ()
                )
            self._first = tree_leaves(answer)
            return answer
        own = tree_leaves(original(*args, **kwargs)) if self.branch == 1 else self._first
        second = []
        for mine, first in zip(own, self._first, strict=True):
            both = all_gather(mine, self.group).chunk(BRANCHES)
            if self.branch == 1:
                first.copy_(both[0])
            second.append(both[1])
        self._first = []
        return tuple(second)
