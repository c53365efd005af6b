"""Sequence parallelism of a diffusers transformer: each rank computes its tokens, attention sees all of them.

The pipeline stays diffusers' own: tokens are cut where the transformer embeds them and gathered behind its
last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from shared.parallel.exchange import Ranks, all_gather
from shared.parallel.surgery import Forward, Surgery
from shared.parallel.xdit.attention import Gathering, joined, ring, token_major, ulysses, usp, usp_operator

BLOCKS = ("transformer_blocks", "single_transformer_blocks", "blocks")
"""Names of the lists of blocks of diffusers' transformers."""

Method = Literal["ulysses", "ring", "both"]


class Shares:
    """How the tokens of a sequence are shared: in equal parts; what is left over belongs to every rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        _, self.rank, self.ranks = Ranks.of(group)

    def cut(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's tokens of `x`, then the left-over ones."""
        each, rest = divmod(x.shape[dim], self.ranks)
        mine = x.narrow(dim, self.rank * each, each)
        if not rest:
            return mine
        return torch.cat([mine, x.narrow(dim, self.ranks * each, rest)], dim)

    def gather(self, x: torch.Tensor, total: int) -> torch.Tensor:
        """All `total` tokens of x [batch, tokens of this rank, channels], in order."""
        each, rest = divmod(total, self.ranks)
        parts = joined(all_gather(x[:, :each], self.group).unflatten(0, (self.ranks, -1)))
        return torch.cat([parts, x[:, each:]], 1) if rest else parts


class SequenceParallel:
    """Makes a transformer, or a ControlNet made of such blocks, compute this rank's tokens only.

    The output of a transformer is gathered; a ControlNet's residuals stay this rank's, which is what the
    transformer adds. Any number of tokens works: what does not divide is computed by every rank.

    Args:
        model: FLUX, SD3, PixArt or HunyuanDiT of diffusers, or a ControlNet of theirs.
        group: the ranks that share the sequence.
        backend: name of xfuser's attention backend.
        surgery: collects what is overridden.
        by: how they share it.

    Raises:
        ValueError: a model of another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        backend: str,
        surgery: Surgery,
        by: Method,
    ) -> None:
        self.shares, self.backend, self.by = Shares(group), backend, by
        self.text = self.image = 0
        """Tokens of the whole sequence in the call that is under way."""
        self.ids = hasattr(model, "x_embedder")
        """Whether positions come as ids, and text stands before the picture (FLUX)."""
        self._inside = self._answered = False
        self._sent: Gathering | None = None
        self._embed(model, surgery)
        attentions = [
            module
            for name in BLOCKS
            for block in getattr(model, name, ())
            for module in block.modules()
            if hasattr(module, "processor") and not getattr(module, "is_cross_attention", False)
        ]
        if not attentions:
            raise ValueError(f"{type(model).__name__} has no self-attention that can be shared")
        for module in attentions:
            surgery.override(module, self._attention)
            if by == "ring":
                surgery.override(module.to_v, self._value)
        surgery.override(model, self._model)

    def _embed(self, model: nn.Module, surgery: Surgery) -> None:
        """Cut tokens where they are embedded, gather them behind the last layer."""
        if self.ids:
            surgery.override(model.x_embedder, self._image_input)
            surgery.override(model.pos_embed, self._positions)
            if hasattr(model, "controlnet_x_embedder"):
                surgery.override(model.controlnet_x_embedder, self._image_input)
        else:
            for name in ("pos_embed", "pos_embed_input"):
                if getattr(model, name, None) is not None:
                    surgery.override(getattr(model, name), self._image_output)
        if getattr(model, "context_embedder", None) is not None:
            surgery.override(model.context_embedder, self._text_input)
        if hasattr(model, "proj_out"):
            surgery.override(model.proj_out, self._output)

    def _model(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        if kwargs.get("image_rotary_emb") is not None:
            cut = [self.shares.cut(part, 0) for part in kwargs["image_rotary_emb"]]
            kwargs = kwargs | {"image_rotary_emb": tuple(cut)}
        plain, self.text = F.scaled_dot_product_attention, 0
        self._inside = self._answered = False
        # Every processor of diffusers ends here; which calls are to see all tokens, self._inside tells.
        F.scaled_dot_product_attention = self._attend(plain)
        try:
            return original(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = plain

    def _image_input(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        self.image = args[0].shape[1]
        return original(self.shares.cut(args[0], 1))

    def _image_output(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        tokens = original(*args, **kwargs)
        self.image = tokens.shape[1]
        return self.shares.cut(tokens, 1)

    def _text_input(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        self.text = args[0].shape[1]
        return original(self.shares.cut(args[0], 1))

    def _positions(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        ids = args[0]
        if len(ids) != self.text + self.image:
            raise ValueError(
                f"{len(ids)} positions for {self.text} text and {self.image} picture tokens: this ControlNet "
                "adds tokens of its own and cannot share the sequence"
            )
        text, image = ids.split([self.text, self.image])
        return original(torch.cat([self.shares.cut(text, 0), self.shares.cut(image, 0)]))

    def _output(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        return self.shares.gather(original(*args, **kwargs), self.image)

    def _attention(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        self._inside, self._sent = True, None
        answer = original(*args, **kwargs)
        answered, self._inside, self._answered = self._answered, False, False
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
        own, _ = _sort(value, self._runs(value.shape[1]), 1)
        self._sent = Gathering([own], self.shares.group)
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
            # In FLUX a further call in one attention is that of the IP-Adapter: picture tokens to its tokens.
            if not self._inside or (self.ids and self._answered):
                return plain(
                    query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **others
                )
            self._answered = True
            if attn_mask is not None:
                raise ValueError("masked self-attention cannot share its tokens")
            # xfuser's own attention may be torch's too.
            self._inside = False
            answer = self._shared(query, key, value)
            self._inside = True
            return answer

        return attend

    def _shared(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention over all ranks' tokens; [batch, heads, tokens, channels]."""
        group, backend, runs = self.shares.group, self.backend, self._runs(query.shape[2])
        # Keys behind the tokens (an IP-Adapter's in SD3) are the same on every rank.
        further = key.shape[2] - query.shape[2]
        (k, common_k), (v, common_v) = (_sort(x, [*runs, (further, False)], 2) for x in (key, value))
        if self.by == "ring":
            return ring(query, k, self._in_order(v), common_k, common_v, group, backend)
        q, common_q = _sort(query, runs, 2)
        if self.by == "ulysses" and common_k is None:
            return ulysses(q, k, v, group, backend)
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

    def _in_order(self, value: torch.Tensor) -> list[torch.Tensor | Gathering]:
        """This rank's values [batch, heads, tokens, channels]; those sent before as their gathering."""
        sent, self._sent = self._sent, None
        if sent is None:  # fused projections have no to_v
            return [value]
        rest = value.shape[2] - sent.tokens
        if not rest:
            return [sent]
        return [value[:, :, :rest], sent] if self.ids else [sent, value[:, :, sent.tokens :]]

    def _runs(self, tokens: int) -> list[tuple[int, bool]]:
        """(length, whether they are this rank's own) of the runs of tokens in a sequence of this length."""
        ranks = self.shares.ranks

        def stream(total: int) -> list[tuple[int, bool]]:
            return [(total // ranks, True), (total % ranks, False)]

        image, text = stream(self.image), stream(self.text)
        both = [*text, *image] if self.ids else [*image, *text]
        for runs in (both, image):
            if sum(length for length, _ in runs) == tokens:
                return runs
        raise ValueError(
            f"attention over {tokens} tokens, where this rank has {sum(n for n, _ in image)} of the picture "
            f"and {sum(n for n, _ in text)} of the text"
        )


def _sort(
    x: torch.Tensor, runs: Sequence[tuple[int, bool]], dim: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens that are this rank's own, and the others if there are any."""
    if not any(length for length, mine in runs if not mine):
        return x, None
    pieces = x.split([length for length, _ in runs], dim)
    own = torch.cat([p for p, (_, mine) in zip(pieces, runs, strict=True) if mine], dim)
    return own, torch.cat([p for p, (_, mine) in zip(pieces, runs, strict=True) if not mine], dim)
