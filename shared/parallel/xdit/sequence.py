"""Sequence parallelism of a diffusers transformer: each rank computes its tokens, attention sees all of them.

The pipeline stays diffusers' own: tokens are cut where the transformer embeds them and gathered behind its
last layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from shared.models import Padding, Section, Site, Stream, TokenPlan, token_plan
from shared.parallel.divided import DividedProducts
from shared.parallel.exchange import Ranks, all_gather
from shared.parallel.peers import PeerGather
from shared.parallel.rounding import Bits
from shared.parallel.surgery import Forward, Surgery
from shared.parallel.xdit.attention import Gathering, joined, ring, token_major, ulysses, usp, usp_operator

SharedBy = Literal["ulysses", "ring", "both"]
Shared = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Attention over all ranks' tokens, from query, key, value and mask."""


class Shares:
    """How the tokens of a sequence are shared: in equal parts; the remainder belongs to every rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        _, self.rank, self.ranks = Ranks.of(group)

    def cut(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's tokens of `x`, then the remainder."""
        each, rest = divmod(x.shape[dim], self.ranks)
        mine = x.narrow(dim, self.rank * each, each)
        if not rest:
            return mine
        return torch.cat([mine, x.narrow(dim, self.ranks * each, rest)], dim)

    def gather(self, x: torch.Tensor, total: int) -> torch.Tensor:
        """All `total` tokens of x [batch, tokens of this rank, channels], in order."""
        each, rest = divmod(total, self.ranks)
        parts = all_gather(x, self.group).unflatten(0, (self.ranks, -1))
        whole = joined(parts[:, :, :each])
        # Each rank has computed the remainder, which may differ in the last bits: all take the first one's.
        return torch.cat([whole, parts[0, :, each:]], 1) if rest else whole


def blocks_of(model: nn.Module, plan: TokenPlan) -> list[nn.Module]:
    """The blocks of a transformer or ControlNet, in order."""
    return [block for name in plan.blocks for block in model.get_submodule(name).children()]


class SequenceParallel:
    """Makes a transformer, or a ControlNet made of such blocks, compute only this rank's tokens.

    The output of a transformer is gathered; a ControlNet's residuals stay this rank's, which is what the
    transformer adds. Any number of tokens works: the remainder of the division is computed by every rank.

    Args:
        model: a transformer or ControlNet of diffusers with a token plan.
        group: the ranks that share the sequence.
        backend: name of xfuser's attention backend.
        surgery: collects what is overridden.
        by: how they share it.
        overlap: more is computed while messages are on their way, for slow links: with ring, attention of
            half the heads; in compiled blocks with a feed-forward layer beside attention, its part of the
            product that takes both.
        bits: what attention sends goes in 8 bits, an approximation; None: as it is. Not with "both".

    Raises:
        ValueError: a model without a token plan.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        backend: str,
        surgery: Surgery,
        by: SharedBy,
        overlap: bool = False,
        bits: Bits | None = None,
    ) -> None:
        self.plan = token_plan(type(model).__name__)
        self.shares, self.backend, self.by = Shares(group), backend, by
        self.bits = bits
        config: Any = model.config
        self._head_channels = self.plan.head_channels(config)
        self.tokens: dict[Stream, int] = {}
        """Length of each stream's whole sequence in the current call."""
        self._answered = self._running = False
        self._inside: Shared | None = None  # how the attention that is computed is shared
        self._ring = functools.partial(ring, group=group, backend=backend, overlap=overlap, bits=bits)
        self._sent: Gathering | None = None
        self._divided = DividedProducts()
        self._read: int | None = None  # tokens of text that are no padding, in the current call
        if self.plan.whole:
            return
        for site in (*self.plan.picture, *self.plan.text, *self.plan.positions):
            self._divide(model, site, surgery)
        if self.plan.counted is not None:
            name, argument = self.plan.counted

            def all_of_it(original: Forward, args: tuple, kwargs: dict) -> Any:
                return original(*args, **kwargs | {argument: self.tokens["text"]})

            surgery.override(model.get_submodule(name), all_of_it)
        for section in self.plan.sections:
            self._divide_section(model, section, surgery)
        if self.plan.output is not None:
            surgery.override(model.get_submodule(self.plan.output), self._output)
        apart = overlap or PeerGather.of(group) is not None
        for part in self.plan.blocks:
            beside = self.plan.beside
            for block in model.get_submodule(part).children():
                early, shared = by == "ring" and part not in self.plan.fused, self._shared
                here = apart and beside is not None and beside.blocks == part
                if here and beside is not None and self._divided.divide(block, beside, surgery):
                    shared = self._noted
                self._divide_block(block, surgery, shared, early)
        surgery.override(model, self._model)

    def _divide_block(self, block: nn.Module, surgery: Surgery, shared: Shared, early: bool) -> None:
        """Share a block's attention by `shared`; `early`: its values leave before its keys are made."""
        for name, module in block.named_children():
            if name in self.plan.everywhere:
                surgery.override(module, functools.partial(self._attention, shared=self._from_everywhere))
            if name in self.plan.attention:
                surgery.override(module, functools.partial(self._attention, shared=shared))
                if early:
                    surgery.override(module.get_submodule("to_v"), self._value)
        if self.plan.padding is not None:
            surgery.override(block, functools.partial(self._without_padding, self.plan.padding))

    def _divide(self, model: nn.Module, site: Site, surgery: Surgery) -> None:
        """Cut tokens, or what belongs to them, where the model takes them in."""

        def from_input(original: Forward, args: tuple, kwargs: dict) -> Any:
            cut = self._cut(args[site.place], site)
            return original(*args[: site.place], cut, *args[site.place + 1 :], **kwargs)

        def from_output(original: Forward, args: tuple, kwargs: dict) -> Any:
            return self._cut(original(*args, **kwargs), site)

        def from_argument(original: Forward, args: tuple, kwargs: dict) -> Any:
            return original(*args, **kwargs | {site.name: self._cut(kwargs.get(site.name), site)})

        if site.at in ("argument", "blocks"):
            for owner in [model] if site.at == "argument" else blocks_of(model, self.plan):
                surgery.override(owner, from_argument)
            return
        if site.optional and getattr(model, site.name) is None:
            return
        module = model.get_submodule(site.name)
        surgery.override(module, from_input if site.at == "input" else from_output)

    def _divide_section(self, model: nn.Module, section: Section, surgery: Surgery) -> None:
        """Cut what a list of blocks gets, and gather what its end gives.

        A ControlNet may run the same blocks in a forward of its own, on whole sequences.
        """
        blocks = list(model.get_submodule(section.blocks).children())
        end = blocks[-1] if section.end is None else model.get_submodule(section.end)

        def block(original: Forward, args: tuple, kwargs: dict, first: bool) -> Any:
            if not self._running:
                return original(*args, **kwargs)
            if first:
                self.tokens["picture"] = args[0].shape[1]
            cut = section.positions + (0,) * first
            mine = (self.shares.cut(x, 1) if place in cut else x for place, x in enumerate(args))
            return original(*mine, **kwargs)

        for number, module in enumerate(blocks):
            surgery.override(module, functools.partial(block, first=not number))
        surgery.override(end, self._output)

    def _cut(self, value: Any, site: Site) -> Any:
        """This rank's share of what is at a site."""
        if value is None or (site.optional and site.dim >= value.ndim):
            return value
        if site.each:
            each = [replace(site, of=(stream,), each=False) for stream in site.of]
            return tuple(self._cut(item, one) for item, one in zip(value, each, strict=True))
        if isinstance(value, tuple):
            return tuple(self._cut(item, site) for item in value)
        if isinstance(value, dict):
            return {name: self._cut(item, site) for name, item in value.items()}
        if site in (*self.plan.picture, *self.plan.text):
            self.tokens[site.of[0]] = value.shape[site.dim]
        if len(site.of) == 1:
            return self.shares.cut(value, site.dim)
        lengths = [self.tokens[stream] for stream in site.of]
        if sum(lengths) != value.shape[site.dim]:
            have = " and ".join(f"{n} {stream}" for n, stream in zip(lengths, site.of, strict=True))
            raise ValueError(
                f"{value.shape[site.dim]} positions for {have} tokens: this {self.plan.name} adds tokens of "
                "its own, which sequence parallelism does not support"
            )
        parts = value.split(lengths, site.dim)
        return torch.cat([self.shares.cut(part, site.dim) for part in parts], site.dim)

    def _model(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        self.tokens = dict.fromkeys(self.plan.joined, 0)
        self._inside, self._answered, self._read = None, False, None
        with Surgery() as during:
            during.replace(self, "_running", True)
            # Every processor of diffusers ends here; self._inside says which calls must see all tokens.
            shared = self._attend(F.scaled_dot_product_attention)
            during.replace(F, "scaled_dot_product_attention", shared)
            return original(*args, **kwargs)

    def _without_padding(self, padding: Padding, original: Forward, args: tuple, kwargs: dict) -> Any:
        """A block without the text that its mask leaves out, which no other token sees."""
        given, mask = list(args), args[padding.mask].bool()
        if self._read is None:
            counts = set(mask.sum(1).tolist())
            if len(counts) > 1:
                raise ValueError(f"{self.plan.name}: prompts of one call must have one length, got {counts}")
            self._read = counts.pop()
        given[padding.text] = given[padding.text][:, : self._read]
        given[padding.mask] = mask.new_ones(len(mask), 1)  # the block's attention extends it
        return original(*given, **kwargs)

    def _output(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        answer = original(*args, **kwargs)
        return self.shares.gather(answer, self.tokens["picture"]) if self._running else answer

    def _attention(self, original: Forward, args: tuple, kwargs: dict, shared: Shared) -> Any:
        if not self._running or (self.plan.skipped is not None and kwargs.get(self.plan.skipped)):
            return original(*args, **kwargs)
        self._inside, self._sent = shared, None
        answer = original(*args, **kwargs)
        answered, self._inside, self._answered = self._answered, None, False
        if not answered:
            raise RuntimeError(
                "attention did not go through torch's scaled_dot_product_attention, so its tokens were not "
                "shared; use no other attention (xformers, DIFFUSERS_ATTN_BACKEND) with sequence parallelism"
            )
        return answer

    def _value(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        """Values leave as soon as they are there, while queries and keys are normed and rotated.

        Of two streams the picture's do; the text's are few and leave with the keys.
        """
        value = original(*args, **kwargs)
        if self._inside is None:
            return value
        own, _ = _sort(value, self._runs(value.shape[1]), 1)
        if self.bits:
            own = own.unflatten(-1, (-1, self._head_channels))
        self._sent = Gathering([own], self.shares.group, self.bits)
        return value

    def _attend(self, plain: Forward) -> Forward:
        def attend(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            **others: Any,
        ) -> torch.Tensor:
            # A further call in one attention is that of the IP-Adapter: picture tokens to its tokens.
            inside = self._inside
            if inside is None or (self.plan.adapter == "call" and self._answered):
                return plain(
                    query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **others
                )
            self._answered = True
            # xfuser's own attention may be torch's too.
            self._inside = None
            # Without padding a mask leaves nothing out.
            answer = inside(query, key, value, None if self.plan.padding else attn_mask)
            self._inside = inside
            return answer

        return attend

    def _shared(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention over all ranks' tokens; [batch, heads, tokens, channels]."""
        group, backend, runs = self.shares.group, self.backend, self._runs(query.shape[2])
        # Keys behind the tokens (an IP-Adapter's) are the same on every rank.
        further = key.shape[2] - query.shape[2]
        (k, common_k), (v, common_v) = (_sort(x, [*runs, (further, False)], 2) for x in (key, value))
        if mask is not None:
            # xfuser's attentions take no mask: torch's does, over all keys.
            part = self._masked(mask, runs, further)
            return self._ring(query, k, self._in_order(v), common_k, common_v, part)
        if self.by == "ring":
            return self._ring(query, k, self._in_order(v), common_k, common_v)
        q, common_q = _sort(query, runs, 2)
        if self.by == "ulysses" and common_k is None:
            return ulysses(q, k, v, group, backend, self.bits)
        function = usp_operator if self.by == "both" and torch.compiler.is_compiling() else usp
        answer = function(q, k, v, common_q, common_k, common_v, backend)
        if common_q is None:
            return answer
        mine = q.shape[2]
        pieces, at = [], {True: 0, False: mine}
        for length, is_own in runs:
            pieces.append(answer.narrow(2, at[is_own], length))
            at[is_own] += length
        return token_major(torch.cat(pieces, 2))

    def _noted(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """`_shared` in a block whose product is divided."""
        answer = self._shared(query, key, value, mask)
        self._divided.attended(answer)
        return answer

    def _from_everywhere(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention from tokens that every rank has to the picture's; [batch, heads, tokens, channels]."""
        if mask is not None:
            raise ValueError(f"{self.plan.name}: no mask is supported from other tokens to the picture's")
        runs = self._runs(key.shape[2])
        (k, common_k), (v, common_v) = (_sort(x, runs, 2) for x in (key, value))
        return self._ring(query, k, [v], common_k, common_v)

    def _masked(self, mask: torch.Tensor, runs: list[tuple[int, bool]], further: int) -> torch.Tensor:
        """A mask of the whole sequence [batch, heads or 1, queries or 1, keys] for this rank's queries, its
        keys in the order in which `ring` has them: each rank's own, then what every rank has."""
        ranks, rank = self.shares.ranks, self.shares.rank
        whole = [length * ranks if own else length for length, own in runs]
        if mask.shape[-1] != sum(whole) + further or mask.shape[-2] not in (1, sum(whole)):
            raise ValueError(f"a mask of shape {list(mask.shape)} for a sequence of {sum(whole)} tokens")
        columns = mask.split([*whole, further], -1)
        own = [c for c, (_, mine) in zip(columns, runs, strict=False) if mine]
        common = [c for c, (_, mine) in zip(columns, [*runs, (further, False)], strict=True) if not mine]
        mask = torch.cat([*(c.chunk(ranks, -1)[r] for r in range(ranks) for c in own), *common], -1)
        if mask.shape[-2] == 1:
            return mask
        rows = zip(mask.split(whole, -2), runs, strict=True)
        return torch.cat([row.chunk(ranks, -2)[rank] if mine else row for row, (_, mine) in rows], -2)

    def _in_order(self, value: torch.Tensor) -> list[torch.Tensor | Gathering]:
        """This rank's values [batch, heads, tokens, channels]; those sent before as their gathering."""
        sent, self._sent = self._sent, None
        if sent is None:  # fused projections have no to_v
            return [value]
        rest = value.shape[2] - sent.tokens
        if not rest:
            return [sent]
        if self.plan.joined[0] == "text":
            return [value[:, :, :rest], sent]
        return [sent, value[:, :, sent.tokens :]]

    def _runs(self, tokens: int) -> list[tuple[int, bool]]:
        """(length, whether they are this rank's own) of the runs of tokens in a sequence of this length."""
        ranks = self.shares.ranks

        def stream(name: Stream) -> list[tuple[int, bool]]:
            total = self.tokens[name]
            return [(total // ranks, True), (total % ranks, False)]

        joined = [run for name in self.plan.joined for run in stream(name)]
        for runs in (joined, stream("picture")):
            if sum(length for length, _ in runs) == tokens:
                return runs
        have = ", ".join(f"{sum(n for n, _ in stream(name))} of the {name}" for name in self.plan.joined)
        raise ValueError(f"attention over {tokens} tokens, but this rank has {have}")


def _sort(
    x: torch.Tensor, runs: Sequence[tuple[int, bool]], dim: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens that are this rank's own, and the others if there are any."""
    if not any(length for length, mine in runs if not mine):
        return x, None
    pieces = x.split([length for length, _ in runs], dim)
    own = torch.cat([p for p, (_, mine) in zip(pieces, runs, strict=True) if mine], dim)
    return own, torch.cat([p for p, (_, mine) in zip(pieces, runs, strict=True) if not mine], dim)
