"""Attention over the tokens of all ranks: Ulysses' exchange, ring's gathering, or both by xfuser's USP.

Ulysses (Jacobs et al., arXiv 2309.14509) exchanges tokens for heads, ring attention (Liu et al., arXiv
2310.01889) passes keys and values around. Both together are xfuser's USP; one of them takes a shorter way
here, around xfuser's attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.nn import functional as F

from shared.parallel.peers import PeerGather, peer_gather
from shared.parallel.rounding import Bits, packed, unpacked

# torch 2.13 gave it this name and warns at the one that older releases know.
_all_gather = getattr(functional, "all_gather_single_coalesced", functional.all_gather_into_tensor_coalesced)

PARTS = 2
"""Messages of a layer's keys, each of some heads, on slow links."""


def joined(parts: torch.Tensor) -> torch.Tensor:
    """[ranks, batch, tokens of each, ...] -> [batch, all tokens, ...]; a view where the batch is 1."""
    return parts.transpose(0, 1).flatten(1, 2)


def usp(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    common_query: torch.Tensor | None,
    common_key: torch.Tensor | None,
    common_value: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """xfuser's attention over the sequence group.

    Args:
        query, key, value: [batch, heads, tokens of this rank, channels].
        common_query, common_key, common_value: tokens that every rank has, [batch, heads, tokens, channels];
            keys and values may come without queries.
        backend: name of xfuser's attention backend.

    Returns:
        [batch, heads, tokens of this rank + common queries, channels].
    """
    from xfuser.core.distributed.attention_backend import AttentionBackendType
    from xfuser.model_executor.layers.usp import USP

    common: dict[str, Any] = {}
    if common_key is not None:
        common = {
            "joint_query": query[:, :, :0] if common_query is None else common_query,
            "joint_key": common_key,
            "joint_value": common_value,
            "joint_strategy": "rear",
        }
    answer = USP(query, key, value, backend=AttentionBackendType[backend], **common)
    return token_major(answer.to(query.dtype))


# One operator where compiled code cannot look inside (ring).
usp_operator = torch.library.custom_op(
    "multigpu::usp",
    usp,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? common_query, Tensor? common_key, "
    "Tensor? common_value, str backend) -> Tensor",
)


@usp_operator.register_fake
def _(query: Any, key: Any, value: Any, common_query: Any, *others: Any) -> torch.Tensor:
    batch, heads, tokens, channels = query.shape
    tokens += 0 if common_query is None else common_query.shape[2]
    return query.new_empty(batch, tokens, heads, channels).transpose(1, 2)


def ulysses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: dist.ProcessGroup,
    backend: str,
    bits: Bits | None = None,
) -> torch.Tensor:
    """Ulysses' exchange around one of xfuser's attentions: tokens for heads and back (arXiv 2309.14509, 3.1).

    What xfuser's own does, with each tensor copied once on its way (twice where the batch is above 1): a
    token's query, key and value travel side by side and are read where they arrive.

    Args:
        query, key, value: [batch, heads, tokens of this rank, channels], of one shape.
        group: the ranks that share the sequence.
        backend: name of xfuser's attention backend.
        bits: all of it is sent in 8 bits, with a scale for each token and head; None: as it is.

    Returns:
        [batch, heads, tokens of this rank, channels].
    """
    ranks, tokens = dist.get_world_size(group), query.shape[2]
    # Each: [rank that gets the heads, batch, tokens, its heads, channels].
    parts = [x.unflatten(1, (ranks, -1)).permute(1, 0, 3, 2, 4) for x in (query, key, value)]
    if torch.compiler.is_compiling():
        sent = torch.stack(parts, 3)  # melts into what made the parts
    else:
        to, batch, _, heads, channels = parts[0].shape
        sent = query.new_empty(to, batch, tokens, 3, heads, channels)
        for index, part in enumerate(parts):
            sent[:, :, :, index] = part
    every = joined(_sent_in(bits, sent, group))
    q, k, v = every.permute(2, 0, 3, 1, 4).unbind()
    answer = _attention(q, k, v, backend)
    answer = answer.transpose(1, 2).unflatten(1, (ranks, tokens)).transpose(0, 1)
    back = _sent_in(bits, answer.contiguous(), group)
    return back.permute(1, 2, 0, 3, 4).flatten(2, 3).transpose(1, 2)


class Gathering:
    """Tensors [batch, tokens of this rank, heads, channels] on their way to all ranks. May be traced.

    Args:
        tensors: of the same tokens.
        group: the ranks that share the sequence.
        bits: sent in 8 bits, with a scale for each token and head; None: as they are.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], group: dist.ProcessGroup, bits: Bits | None = None
    ) -> None:
        self.tokens, self._bits, self._dtype = tensors[0].shape[1], bits, tensors[0].dtype
        self._parts = dist.get_world_size(group), tensors[0].shape[0]
        sent = [packed(x, bits) if bits else x.contiguous() for x in tensors]
        near = PeerGather.of(group) is not None
        self._pending = peer_gather(sent, group.group_name) if near else _all_gather(sent, group)
        if tensors[0].device.type == "cpu":
            # Two collectives of one gloo group at a time may hang or spoil the heap (torch 2.13).
            self._pending = [functional.wait_tensor(x) for x in self._pending]

    def finish(self) -> list[torch.Tensor]:
        """Each [ranks, batch, tokens of each rank, heads, channels]."""
        arrived = [functional.wait_tensor(x).unflatten(0, self._parts) for x in self._pending]
        bits = self._bits
        return [unpacked(x, bits, self._dtype) for x in arrived] if bits else arrived


def ring(
    query: torch.Tensor,
    key: torch.Tensor,
    values: Sequence[torch.Tensor | Gathering],
    common_key: torch.Tensor | None,
    common_value: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    backend: str,
    overlap: bool = False,
    bits: Bits | None = None,
) -> torch.Tensor:
    """This rank's queries over the keys and values of all ranks, which are gathered at once.

    torch's own ring attention, on which xfuser's is built, gathers at once by default too, waits, and then
    joins the attentions over each rank's keys by their log-sum-exps in fp32. Here one attention goes over all
    of them; or, to overlap, one for each half of the heads, the first while the second's keys arrive.

    Args:
        query: [batch, heads, any tokens, channels].
        key: [batch, heads, only this rank's tokens, channels].
        values: of the same tokens, in pieces; as the key, or on their way.
        common_key, common_value: of tokens that every rank has, [batch, heads, tokens, channels].
        mask: as torch's attention takes it; its keys are the gathered ones, rank by rank, then the common.
        group: the ranks that share the sequence.
        backend: name of xfuser's attention backend; torch's is taken with a mask.
        overlap: keys in PARTS messages, each of as many heads, if there is no mask.
        bits: keys, and values that are not on their way yet, are sent in 8 bits.

    Returns:
        [batch, heads, the query's tokens, channels].
    """
    parts = PARTS if overlap and mask is None and key.shape[1] % PARTS == 0 else 1
    sent = [k.transpose(1, 2) for k in key.chunk(parts, 1)]
    staying = [x.transpose(1, 2) for x in values if isinstance(x, torch.Tensor)]
    gathering = Gathering([sent[0], *staying], group, bits)
    later = [Gathering([k], group, bits) for k in sent[1:]]
    there = gathering.finish()
    keys = there.pop(0)
    pieces = [there.pop(0) if isinstance(x, torch.Tensor) else x.finish()[0] for x in values]
    pieces = [x if x.ndim == keys.ndim else x.unflatten(-1, (-1, keys.shape[-1])) for x in pieces]

    def whole(parts: torch.Tensor, common: torch.Tensor | None) -> torch.Tensor:
        mine = joined(parts).transpose(1, 2)
        return mine if common is None else torch.cat([mine, common], 2)

    value = whole(torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0], common_value)
    if mask is not None:
        k = whole(keys, common_key)
        return token_major(F.scaled_dot_product_attention(query, k, value, attn_mask=mask))
    answers: list[torch.Tensor] = []
    for part in range(parts):
        q, v = query.chunk(parts, 1)[part], value.chunk(parts, 1)[part]
        common = None if common_key is None else common_key.chunk(parts, 1)[part]
        keys = later[part - 1].finish()[0] if part else keys
        answers.append(_attention(q, whole(keys, common), v, backend).transpose(1, 2))
    answer = torch.cat(answers, 2) if later else answers[0].contiguous()
    return answer.transpose(1, 2)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str) -> torch.Tensor:
    """One of xfuser's attentions."""
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

    function = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType[backend]]
    answer, _ = function(query, key, value, dropout_p=0.0, is_causal=False)
    return answer.to(query.dtype)


def _sent_in(bits: Bits | None, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`_all_to_all`, in 8 bits if wanted."""
    if bits is None:
        return _all_to_all(x, group)
    return unpacked(_all_to_all(packed(x, bits), group), bits, x.dtype)


def _all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x[i] goes to rank i of the group; [i] of the answer comes from there. May be traced."""
    return functional.wait_tensor(functional.all_to_all_single(x, None, None, group))


def token_major(x: torch.Tensor) -> torch.Tensor:
    """[batch, heads, tokens, channels], a token's heads beside each other: as torch's attention answers."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
