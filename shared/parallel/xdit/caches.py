"""Step caches: leave out a transformer's blocks in steps in which little changes. An approximation.

What the blocks add to their tokens is forecast from the steps that computed it; the embeddings before them
and the layers behind them run in every step. A forward is either one that computes or one that leaves out, so
that each can be captured as a whole. Where the change of a step decides (First Block Cache, TeaCache), the
forward that leaves out runs the first block and measures; if too much has changed, the one that computes
follows. diffusers' hooks decide inside of a block, by a number on the CPU, which no graph can hold, and they
do not fit Chroma, LTX-2, FLUX.2, Z-Image, HunyuanDiT, HunyuanVideo 1.5 and Stable Diffusion 3.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from shared.models import CacheSettings, LeftOut, Rule, TokenPlan
from shared.parallel.graphs import Graphs
from shared.parallel.method import Part
from shared.parallel.surgery import Forward, Surgery

Streams = list[torch.Tensor | None]
"""What a block changes, in the order in which it returns it."""
CALIBRATED = "step cache: the mag_ratios of this generation are "


@dataclass
class _Known:
    """What the computed steps of a branch have shown of one transformer."""

    shapes: list[torch.Size]
    residuals: list[Streams]
    """Of the latest computed step, then its differences by step, of growing order."""
    step: int
    """The latest one that was computed."""
    measured: torch.Tensor | None


@dataclass
class _Branch:
    """One guidance branch of a generation."""

    rule: Rule
    step: int = -1
    left_out: int = 0
    known: dict[int, _Known] = field(default_factory=dict)
    """By transformer."""
    ratios: list[torch.Tensor] = field(default_factory=list)


class _Blocks:
    """The blocks of one transformer that may be left out, and the forward that runs through them.

    Args:
        model: the transformer.
        plan: its.
        settings: of the cache.
        surgery: collects what is overridden.

    Raises:
        ValueError: there is only one block, and a step's change is measured in the first.
    """

    def __init__(self, model: nn.Module, plan: TokenPlan, settings: CacheSettings, surgery: Surgery) -> None:
        lists = [(list(model.get_submodule(part.blocks).children()), part) for part in plan.left_out]
        found = [(block, part) for blocks, part in lists for block in blocks]
        self.count, self.measures = len(found), settings.measures
        if self.measures and self.count < 2:
            raise ValueError(f"{settings.cache}: needs two blocks or more; this {plan.name} has {self.count}")
        self.modulated = plan.modulated if settings.cache == "teacache" else None
        self._running = False
        self._forecast: Streams | None = None  # None: all is computed
        self._base: Streams = []
        self._residual: Streams = []
        self._measured: torch.Tensor | None = None
        for place, (block, part) in enumerate(found):
            names = list(inspect.signature(type(block).forward).parameters)[1:]
            places = [(name, names.index(name)) for name in part.returns]
            whole = functools.partial(self._block, part, places, place)
            surgery.override(block, whole)
        if self.modulated is not None:
            surgery.override(found[0][0].get_submodule(self.modulated.module), self._note)

    def run(
        self, original: Forward, args: tuple, kwargs: dict, forecast: Streams | None
    ) -> tuple[Any, Streams, torch.Tensor | None]:
        """The transformer's answer, what its blocks add, and what shows their change, from one forward.

        Args:
            forecast: what the blocks are to add, in place of all but the first one that is measured.
        """
        # HunyuanDiT empties the list of residuals that it gets.
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
        with Surgery() as during:
            during.replace(self, "_running", True)
            during.replace(self, "_forecast", forecast)
            answer = original(*args, **kwargs)
        residual, measured = self._residual, self._measured
        self._base, self._residual, self._measured = [], [], None
        return answer, residual, measured

    def _note(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        answer = original(*args, **kwargs)
        self._measured = answer[0] if isinstance(answer, tuple) else answer
        return answer

    def _block(
        self,
        part: LeftOut,
        places: list[tuple[str, int]],
        place: int,
        original: Forward,
        args: tuple,
        kwargs: dict,
    ) -> Any:
        if not self._running:  # a ControlNet's forward may run them too
            return original(*args, **kwargs)
        streams = [kwargs[name] if name in kwargs else args[at] for name, at in places]
        first, last = place == 0, place == self.count - 1
        if first and not self.measures:
            self._base = streams
        if self._forecast is None or (first and self.measures):
            answer = original(*args, **kwargs)
            after = list(answer) if len(places) > 1 else [answer]
            if first and self.measures:
                self._base = after
                if self.modulated is None:
                    at = part.returns.index(part.picture)
                    self._measured = after[at] - streams[at]
            if last and self._forecast is None:
                self._residual = [
                    None if a is None else a - b for a, b in zip(after, self._based(after), strict=True)
                ]
            return answer
        if last:
            based = self._based(self._forecast)
            streams = [None if r is None else b + r for b, r in zip(based, self._forecast, strict=True)]
        return tuple(streams) if len(places) > 1 else streams[0]

    def _based(self, streams: Streams) -> list[torch.Tensor]:
        """The tokens before the blocks; joined to one stream where the last block has only one."""
        base = [stream for stream in self._base if stream is not None]
        return base if len(base) == len(streams) else [torch.cat(base, 1)]


class StepCache(Part):
    """Leaves blocks of transformers out, anew in each generation; each guidance branch by itself.

    A pipeline that does not name its branches by `cache_context` has one for each text that it gives.
    Made before whatever shares the tokens of blocks; `watch` is
    called after it.

    Args:
        models: the transformers of a pipeline, in the order in which they take parts of the schedule.
        plan: their token plan.
        settings: which cache, with what.
        group: the ranks that decide together by what they measure; None: this rank alone.
    """

    def __init__(
        self,
        models: Sequence[Any],
        plan: TokenPlan,
        settings: CacheSettings,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.models, self.tokens, self.settings, self.group = list(models), plan, settings, group
        self.batches = not settings.measures  # what is measured decides for all pictures of a call together
        self.computed_blocks = 0
        """Blocks that this rank has computed since ``begin``."""
        surgery = self.held.enter_context(Surgery())
        self._blocks = [_Blocks(model, plan, settings, surgery) for model in self.models]
        self._branches: dict[Any, _Branch] = {}
        self._texts: list[Any] = []
        self._name: str | None = None
        self._schedule = (0, 0)
        self._begun()

    def watch(self, graphs: Sequence[Graphs]) -> Surgery:
        """Take over the calls of the transformers, each captured by its own graphs.

        Returns:
            what undoes it, before what was put on earlier is undone.
        """
        from diffusers.models.cache_utils import CacheMixin

        surgery = Surgery()
        for index, (model, captured) in enumerate(zip(self.models, graphs, strict=True)):
            if isinstance(model, CacheMixin):
                surgery.replace(model, "cache_context", self._in_branch)
            surgery.override(model, functools.partial(self._call, index, captured))
        return surgery

    def begin(self, steps: int, pictures: int = 1) -> None:
        super().begin(steps, pictures)
        self._schedule = (steps, 0)
        self._begun()

    def begin_late(self, steps: int, first: int) -> None:
        super().begin_late(steps, first)
        self._schedule = (first + steps, first)

    def _begun(self) -> None:
        self._branches, self._texts, self.computed_blocks = {}, [], 0

    @property
    def left_out(self) -> tuple[int, int]:
        """How many calls of the transformer this generation left out, and how many there were."""
        branches = self._branches.values()
        return sum(b.left_out for b in branches), sum(b.step + 1 for b in branches)

    @property
    def notes(self) -> list[str]:
        """What whoever asked for this generation should be told."""
        found = []
        if self.settings.calibrate:
            for branch in self._branches.values():
                ratios = torch.stack([torch.ones_like(branch.ratios[0]), *branch.ratios]).tolist()
                found.append(CALIBRATED + str([round(ratio, 5) for ratio in ratios]))
        left, calls = self.left_out
        if left:
            what = "steps" if len(self._branches) == 1 else f"calls ({len(self._branches)} a step)"
            found.append(f"step cache {self.settings.cache}: {left} of {calls} {what} were left out")
        return found

    @property
    def warm_up_calls(self) -> int:
        """Steps after which both kinds of forward have run twice, as far as it is known beforehand."""
        return self._rule(28).both_kinds(28)

    def _rule(self, steps: int, first: int = 0) -> Rule:
        plan, ratios = self.tokens, self.settings.mag_ratios
        polynomial = plan.modulated.polynomial if plan.modulated else ()
        return Rule(self.settings, steps, first, plan.mag_ratios if ratios is None else ratios, polynomial)

    @contextlib.contextmanager
    def _in_branch(self, name: str, **settings: Any) -> Iterator[None]:
        """What the pipeline enters around its calls of a guidance branch."""
        self._name = name
        try:
            yield
        finally:
            self._name = None

    def _branch(self, kwargs: dict) -> _Branch:
        key: Any = self._name
        if key is None and self.tokens.guidance != "batch":
            text = kwargs["encoder_hidden_states"]  # the same object in every step
            if not any(known is text for known in self._texts):
                self._texts.append(text)
            key = next(i for i, known in enumerate(self._texts) if known is text)
        if key not in self._branches:
            self._branches[key] = _Branch(self._rule(*self._schedule))
        return self._branches[key]

    def _call(self, index: int, graphs: Graphs, original: Forward, args: tuple, kwargs: dict) -> Any:
        self.check_begun()
        branch, blocks = self._branch(kwargs), self._blocks[index]
        branch.step += 1
        shapes = [leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = branch.known.get(index)
        if known is not None and known.shapes != shapes:
            known = None
        computes = branch.rule.ahead(branch.step)
        if known is not None and not computes:
            forecast = self._forecast(known, branch.step - known.step)
            answer, change, measured = graphs.run(
                ("left out", index),
                functools.partial(self._left_out, blocks, original),
                args=args,
                kwargs=kwargs,
                forecast=forecast,
                before=known.measured,
            )
            self.computed_blocks += self.settings.measures
            if computes is None:
                part, whole = change.tolist()
                computes = branch.rule.changed(part / whole if whole else 0.0)
                if not computes and blocks.modulated is not None:
                    known.measured = measured  # TeaCache adds up the changes from step to step
            if not computes:
                branch.left_out += 1
                return answer
        branch.rule.computed()
        answer, residual, measured = graphs.run(
            ("computed", index),
            functools.partial(self._computed, blocks, original),
            args=args,
            kwargs=kwargs,
        )
        self.computed_blocks += blocks.count
        self._learn(branch, index, _Known(shapes, [residual], branch.step, measured))
        return answer

    def _computed(
        self, blocks: _Blocks, original: Forward, args: tuple, kwargs: dict
    ) -> tuple[Any, Streams, torch.Tensor | None]:
        return blocks.run(original, args, kwargs, None)

    def _left_out(
        self,
        blocks: _Blocks,
        original: Forward,
        args: tuple,
        kwargs: dict,
        forecast: Streams,
        before: torch.Tensor | None,
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
        """The answer, how much has changed of how much on all ranks, and what shows it."""
        answer, _, measured = blocks.run(original, args, kwargs, forecast)
        if measured is None or before is None:
            return answer, None, measured
        change = torch.stack([(measured - before).abs().float().sum(), before.abs().float().sum()])
        if self.group is not None:
            dist.all_reduce(change, group=self.group)
        return answer, change, measured

    def _forecast(self, known: _Known, ahead: int) -> Streams:
        """What the blocks add so many steps after the latest that computed it, by a Taylor series.

        What they add is the sum of what their layers add, so this is TaylorSeer's series (arXiv 2503.06923)
        of every layer at once.
        """
        forecast, factor = known.residuals[0], 1.0
        for order, difference in enumerate(known.residuals[1:], 1):
            factor *= ahead / order
            forecast = _each(forecast, difference, 1.0, factor)
        return forecast

    def _learn(self, branch: _Branch, index: int, now: _Known) -> None:
        before = branch.known.get(index)
        branch.known[index] = now
        if before is None or before.shapes != now.shapes:
            return
        if self.settings.calibrate:
            branch.ratios.append(self._ratio(before.residuals[0], now.residuals[0]))
        for difference in before.residuals[: self.settings.order]:
            since = now.step - before.step
            now.residuals.append(_each(now.residuals[-1], difference, 1 / since, -1 / since))

    def _ratio(self, before: Streams, now: Streams) -> torch.Tensor:
        """How much larger the picture's residual is than it was, in the mean of all ranks' tokens."""
        last = self.tokens.left_out[-1]
        at = last.returns.index(last.picture)
        (old, new) = (torch.linalg.vector_norm(x[at].float(), dim=-1) for x in (before, now))  # type: ignore[union-attr]
        ratio = new / (old + 1e-8)
        ratios = torch.stack([ratio.sum(), torch.full_like(ratio.sum(), ratio.numel())])
        if self.group is not None:
            dist.all_reduce(ratios, group=self.group)
        return ratios[0] / ratios[1]


def _each(one: Streams, other: Streams, a: float, b: float) -> Streams:
    """a x one + b x other, of each stream."""
    pairs = zip(one, other, strict=True)
    return [None if x is None or y is None else a * x + b * y for x, y in pairs]
