"""Buffers of what patches exchange asynchronously: many tensors in few messages.

A message to a neighbour holds boundary rows beside what goes to everyone. So a rank lays out what it sends as
[for the rank after it | for all | for the rank before it], and every message is one piece of that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch

from shared.parallel.distrifusion.differences import Differences
from shared.parallel.distrifusion.moments import Shares, StaleMoments

Kind = Literal["rows", "tokens", "moments"]
Shape = tuple[int, ...]
ALIGN = 256
"""Bytes: every tensor in a message starts at a multiple of it."""
MOST_MESSAGES = 16


@dataclass(frozen=True)
class Offer:
    """What one rank sends for one layer."""

    kind: Kind
    parts: tuple[Shape | None, Shape | None, Shape | None]  # to the rank after it, to all, to the one before
    dtype: torch.dtype
    count: int  # how many numbers a moment was made of

    def size(self, part: int) -> int:
        shape = self.parts[part]
        return 0 if shape is None else -(-prod(shape) * self.dtype.itemsize // ALIGN) * ALIGN


@dataclass
class Slot:
    """One exchange of a forward: what all ranks send in it, and where it lies."""

    offers: list[Offer]  # by rank
    bundle: Bundle | None = None
    # By rank: where its deferred tensor arrives; None for what is not deferred, and for this rank.
    inbox: list[torch.Tensor | None] = field(default_factory=list)
    outbox: list[torch.Tensor | None] = field(default_factory=list)  # by part: what waits for its message
    shares: Shares | None = None
    differences: Differences | None = None  # where it exchanges them
    packed: torch.Tensor | None = None  # of moments: what the last synchronous step knew of the others'
    stale: tuple[StaleMoments, int] | None = None  # of deferred moments: all of them, and which norm's


@dataclass
class Bundle:
    """Slots that share one message to each other rank."""

    number: int
    slots: list[Slot]
    posted: int = 0
    sends: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    receives: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    works: list[Any] = field(default_factory=list)


def part_for(sender: int, receiver: int, offers: list[Offer]) -> int:
    """Which part of its offer the sender has for the receiver: 0 after, 1 all, 2 before it."""
    if offers[0].kind != "rows":
        return 1
    return {1: 0, -1: 2}.get(receiver - sender, 1)


def as_whole(offer: Offer, own: torch.Tensor) -> Shape:
    """The shape of a rank's tokens [parts, batch, tokens, channels], whose rounded ones it offers."""
    rounded = offer.parts[1]
    assert rounded is not None
    return (*rounded[:3], own.shape[-1])


def make_bundles(
    slots: list[Slot], rank: int, ranks: int, device: torch.device, bundle_bytes: int, posting: bool
) -> list[Bundle]:
    """Divide slots, in the order in which they come, into bundles, and give them their memory.

    Args:
        rank, ranks: this rank, and how many there are.
        bundle_bytes: least size of a message.
        posting: whether this rank will send anything, so that it needs memory for it.
    """

    def size(slot: Slot) -> int:
        return max(sum(o.size(part) for part in range(3)) for o in slot.offers)

    least = max(bundle_bytes, sum(map(size, slots)) // MOST_MESSAGES)
    groups: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        groups[-1].append(slot)
        filled += size(slot)
        if filled >= least:
            groups.append([])
            filled = 0
    bundles = [Bundle(i, group) for i, group in enumerate(g for g in groups if g)]
    places = [_places(bundle.slots, rank) for bundle in bundles]
    longest = max((ends[3] for _, ends in places), default=0)
    # Two stages in turn: a message leaves one while the next is gathered in the other.
    stages = [_bytes(longest if i < len(places) else 0, device) for i in range(2)] if posting else []
    for bundle, (offsets, ends) in zip(bundles, places, strict=True):
        for slot, offset in zip(bundle.slots, offsets, strict=True):
            slot.bundle = bundle
            slot.inbox = [None] * ranks
            if stages:
                offer, stage = slot.offers[rank], stages[bundle.number % 2]
                slot.outbox = [_view(stage, offset[part], offer, part) for part in range(3)]
        for peer in set(range(ranks)) - {rank}:
            if stages:
                start, stop = _range(ends, peer - rank)
                if stop > start:
                    bundle.sends.append((peer, stages[bundle.number % 2][start:stop]))
            _make_inbox(bundle, rank, peer, device)
    return bundles


def _make_inbox(bundle: Bundle, rank: int, peer: int, device: torch.device) -> None:
    offsets, ends = _places(bundle.slots, peer)
    start, stop = _range(ends, rank - peer)
    flat = _bytes(stop - start, device)
    if stop > start:
        bundle.receives.append((peer, flat))
    for slot, offset in zip(bundle.slots, offsets, strict=True):
        part = part_for(peer, rank, slot.offers)
        slot.inbox[peer] = _view(flat, offset[part] - start, slot.offers[peer], part)


def _places(slots: list[Slot], rank: int) -> tuple[list[list[int]], list[int]]:
    """Offsets of each slot's three parts in a rank's stage (all first parts, then all second, then all
    third), and where the three regions begin and end."""
    offsets: list[list[int]] = [[] for _ in slots]
    ends, at = [0], 0
    for part in range(3):
        for own, slot in zip(offsets, slots, strict=True):
            own.append(at)
            at += slot.offers[rank].size(part)
        ends.append(at)
    return offsets, ends


def _range(ends: list[int], step: int) -> tuple[int, int]:
    """The bytes of a stage that go to the rank ``step`` places further."""
    return ends[0 if step == 1 else 1], ends[3 if step == -1 else 2]


def _bytes(size: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=device)


def _view(flat: torch.Tensor, offset: int, offer: Offer, part: int) -> torch.Tensor | None:
    shape = offer.parts[part]
    if shape is None:
        return None
    return flat[offset : offset + prod(shape) * offer.dtype.itemsize].view(offer.dtype).view(shape)
