"""What the ranks that share a picture exchange: boundary rows, keys and values, moments.

One object owns all buffers and handles of one model at one shape. A synchronous exchange is answered at once.
A deferred one is read stale, as it arrived in the step before; this step's tensors are gathered into few
large messages, which overlap with the step and have all arrived when it ends. Source of the schedule: Li
et al., "DistriFusion", arXiv 2402.19481, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from shared.parallel.distrifusion.buffers import (
    Bundle,
    Kind,
    Offer,
    Shape,
    Slot,
    as_whole,
    make_bundles,
    part_for,
)
from shared.parallel.distrifusion.differences import Differences
from shared.parallel.distrifusion.moments import Shares, StaleMoments, join_moments, pack_other_moments
from shared.parallel.exchange import Pretended, Ranks
from shared.parallel.rounding import DIFFERENCES, Bits, packed_groups, unpacked_groups


class PatchExchange:
    """Exchanges between the ranks of a group, each of which has one patch, in rank order.

    Layers are known by their turn: those of one kind come in the same order in every forward, or not at all.
    The first forward only records what will be exchanged (``recording``): nothing travels and its result is
    worthless. ``build`` ends it. Each later forward is between ``start`` and ``finish``.

    Args:
        group: the ranks that share the picture; None for all.
        device: where the tensors are.
        deferred: the kinds that are read stale in asynchronous steps.
        posting: False: deferred tensors are never sent again after the synchronous steps.
        forecast: deferred moments are read as they are expected to be by now, not as they arrived.
        bundle_bytes: least size of a message.
        bits: what is for attention is sent in 8 bits, or its difference to the step before in 4, an
            approximation; None: as it is.
        sizes: the lengths of all patches, where every layer's are in proportion and nothing is deferred:
            then there is nothing to record.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        deferred: Sequence[Kind] = (),
        posting: bool = True,
        forecast: bool = False,
        bundle_bytes: int = 4 << 20,
        bits: Bits | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.group, self.device = group, device
        ranks = Ranks.of(group)
        _, self.rank, self.ranks = ranks
        self.deferred, self.posting, self.bundle_bytes = frozenset(deferred), posting, bundle_bytes
        self.sizes, self.forecast, self.bits = sizes, forecast, bits
        self.recording, self.synchronous, self.first = sizes is None, True, False
        self.messages = self.bytes = self.waits = 0
        """Messages and bytes that this rank has sent, how often a layer waited; replays are not counted."""
        self._mine: list[Offer] = []
        self._slots: dict[Kind, list[Slot]] = {"rows": [], "tokens": [], "moments": []}
        self._turn: dict[Kind, int] = {}
        self._bundles: list[Bundle] = []
        self._stale: list[StaleMoments] = []
        self._peers = [p for p in range(self.ranks) if p != self.rank]
        self._shares = Shares.of(sizes or [1] * self.ranks, self.rank, device)
        self._to_global = [ranks.to_global(p) for p in range(self.ranks)]

    @property
    def held_bytes(self) -> int:
        """Memory of the buffers."""
        flat = [t for b in self._bundles for _, t in b.receives]
        stage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._outboxes()}
        kept = sum(stale.held_bytes for stale in self._stale)
        kept += sum(slot.differences.held_bytes for slot in self._slots["tokens"] if slot.differences)
        return sum(t.numel() for t in flat) + sum(stage.values()) + kept

    def start(self, synchronous: bool = True, first: bool = False) -> None:
        """A forward begins; in a synchronous one every layer waits for what the others make in it.

        Args:
            first: it is the first of a generation, which has no step before it.
        """
        self.synchronous, self.first = synchronous, first
        self._turn = {"rows": 0, "tokens": 0, "moments": 0}

    def rows(
        self,
        first: torch.Tensor | None,
        last: torch.Tensor | None,
        use: Callable[[torch.Tensor | None, torch.Tensor | None], Any],
    ) -> Any:
        """``use(the last rows of the rank before, the first rows of the rank after)``, None at the border.

        Args:
            first: this rank's first rows, which the rank before needs; None where it needs none.
            last: this rank's last rows, which the rank after needs.
        """
        above, below = self.rank > 0, self.rank < self.ranks - 1
        own = (last if below else None, None, first if above else None)
        if self.recording:
            # What arrives has the shape of what is sent the other way.
            self._record("rows", own)
            return use(last if above else None, first if below else None)
        slot = self._next("rows", first, last)
        before, after = self.rank - 1, self.rank + 1

        def read(inbox: Sequence[torch.Tensor | None]) -> Any:
            return use(inbox[before] if above else None, inbox[after] if below else None)

        return self._exchange(slot, own, read)

    def tokens(self, own: torch.Tensor) -> torch.Tensor:
        """What all ranks have for attention, in rank order; ``own`` is [parts, batch, tokens, channels]: keys
        and values, or what both are made of."""
        bits = self.bits
        if bits == DIFFERENCES and not self.recording:
            return self._differences(self._next("tokens", own), own)
        sent = own if bits is None else packed_groups(own, bits)
        if self.recording:
            self._record("tokens", (None, sent, None))
            return torch.cat([own] * self.ranks, 2)

        def arrived(tensor: torch.Tensor | None) -> torch.Tensor:
            if tensor is None:
                return own
            return tensor if bits is None else unpacked_groups(tensor, own.shape[-1], bits, own.dtype)

        def read(inbox: Sequence[torch.Tensor | None]) -> torch.Tensor:
            return torch.cat([arrived(tensor) for tensor in inbox], 2)

        return self._exchange(self._next("tokens", sent), (None, sent, None), read)

    def _differences(self, slot: Slot, own: torch.Tensor) -> torch.Tensor:
        """What all ranks know of each other's tokens by now, and of this rank's those that they are."""
        if slot.differences is None:
            slot.differences = Differences(DIFFERENCES)
        differences, me = slot.differences, (None, own, None)
        if self.first or not differences.known:
            offers = [replace(o, parts=(None, as_whole(o, own), None), dtype=own.dtype) for o in slot.offers]
            (every,) = self._swap((Slot(offers), me))
            differences.begin([own if tensor is None else tensor for tensor in every])
            for rows in slot.inbox:  # what arrived last in the generation before
                if rows is not None:
                    rows.zero_()
        else:
            differences.arrived(slot.inbox)
            sent = differences.sent(own, self.rank)
            if self.synchronous or slot.bundle is None:
                differences.arrived(self._swap((slot, (None, sent, None)))[0])
            elif self.posting:
                self._post(slot, slot.bundle, (None, sent, None))
        return torch.cat([own if p == self.rank else x for p, x in enumerate(differences.known)], 2)

    def moments(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """What is known of the other ranks' moments, for ``moments.whole_moments``.

        Args:
            own: this rank's own, [2, batch, groups].
            count: how many numbers each is made of; the ranks' shares are in proportion.
        """
        if self.recording:
            self._record("moments", (None, own, None), count)
            return pack_other_moments(own, own.new_ones(()))
        slot = self._next("moments", own)

        def read(inbox: Sequence[torch.Tensor | None]) -> torch.Tensor:
            if slot.stale is not None and not self.synchronous:
                stale, norm = slot.stale
                return stale.known(norm)
            return self._packed(slot, inbox)

        known = self._exchange(slot, (None, own, None), read)
        if slot.stale is not None:
            stale, norm = slot.stale
            stale.keep(norm, own)
        return known

    def moments_and_rows(
        self, own: torch.Tensor, count: int, first: torch.Tensor, last: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What `moments` and `rows` give, in one message to each other rank; only where `at_once`."""
        above, below = self.rank > 0, self.rank < self.ranks - 1
        norm, border = self._next("moments", own), self._next("rows", first, last)
        rows = (last if below else None, None, first if above else None)
        theirs, arrived = self._swap((norm, (None, own, None)), (border, rows))
        known = self._packed(norm, theirs)
        return known, arrived[self.rank - 1] if above else None, arrived[self.rank + 1] if below else None

    @property
    def at_once(self) -> bool:
        """Whether every exchange is answered at once, in every step."""
        return not (self.deferred or self.recording)

    @property
    def moving(self) -> bool:
        """Whether moments of this step may be forecast ones."""
        return self.forecast and not self.synchronous

    def build(self) -> None:
        """End the recording: agree with the other ranks on what is exchanged, and make the buffers.

        Raises:
            RuntimeError: the ranks do not run the same layers.
        """
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, self._mine, group=self.group)
        for rank, offers in enumerate(everyone):
            if [o.kind for o in offers] != [o.kind for o in everyone[0]]:
                raise RuntimeError(
                    f"rank {rank} runs other layers than rank 0; load the same model on all ranks"
                )
        order = [Slot(list(offers)) for offers in zip(*everyone, strict=True)]
        for slot in order:
            kind = slot.offers[0].kind
            self._slots[kind].append(slot)
            if kind == "moments":
                slot.shares = Shares.of([o.count for o in slot.offers], self.rank, self.device)
        late = [s for s in order if s.offers[0].kind in self.deferred]
        self._bundles = make_bundles(
            late, self.rank, self.ranks, self.device, self.bundle_bytes, self.posting
        )
        self._join_late_moments()
        self.recording = False

    def totals(self) -> dict[int, int]:
        """How many tokens all ranks have together where this rank has so many."""
        found = {}
        for slot in self._slots["tokens"]:
            lengths = [(o.parts[1] or (0, 0, 0))[2] for o in slot.offers]
            found[lengths[self.rank]] = sum(lengths)
        return found

    def finish(self) -> None:
        """Wait until everything of this step has arrived (on CUDA: make the current stream wait).

        Raises:
            RuntimeError: a layer that took part in the recording did not run in this step.
        """
        for kind, slots in self._slots.items():
            if self.sizes is None and self._turn[kind] not in (0, len(slots)):
                raise RuntimeError(
                    f"{self._turn[kind]} exchanges of {kind} in this step, but {len(slots)} in the first step"
                )
        for bundle in self._bundles:
            self._wait(bundle)
        for stale in self._stale:
            stale.advance()

    def reset(self) -> None:
        """A new generation starts; forget a step that was left half done."""
        for bundle in self._bundles:
            bundle.posted = 0
            self._wait(bundle)
        for stale in self._stale:
            stale.reset()

    def _join_late_moments(self) -> None:
        alike: dict[Shape | None, list[Slot]] = {}
        for slot in self._slots["moments"]:
            if slot.bundle is not None:
                alike.setdefault(slot.offers[self.rank].parts[1], []).append(slot)
        for slots in alike.values():
            inboxes = [[t for t in slot.inbox if t is not None] for slot in slots]
            shares = [slot.shares for slot in slots if slot.shares is not None]
            stale = StaleMoments(inboxes, shares, self.forecast)
            self._stale.append(stale)
            for norm, slot in enumerate(slots):
                slot.stale = stale, norm

    def _next(self, kind: Kind, *own: torch.Tensor | None) -> Slot:
        if self.sizes is not None:
            return self._alike(kind, self.sizes, own)
        turn = self._turn[kind]
        self._turn[kind] = turn + 1
        if turn >= len(self._slots[kind]):
            raise RuntimeError(f"more exchanges of {kind} in this step than the {turn} of the first step")
        return self._slots[kind][turn]

    def _alike(self, kind: Kind, sizes: Sequence[int], own: tuple[torch.Tensor | None, ...]) -> Slot:
        """A slot whose other ranks' tensors have shapes in proportion to this rank's."""
        first, last = own[0], own[-1]
        present = next((t for t in own if t is not None), None)
        dtype = torch.uint8 if present is None else present.dtype
        offers = []
        for rank, size in enumerate(sizes):
            parts: list[Shape | None] = [None, None, None]
            if kind == "rows":
                if last is not None and rank < self.ranks - 1:
                    parts[0] = tuple(last.shape)
                if first is not None and rank > 0:
                    parts[2] = tuple(first.shape)
            else:
                assert first is not None
                shape = list(first.shape)
                if kind == "tokens":
                    shape[2] = shape[2] * size // sizes[self.rank]
                parts[1] = tuple(shape)
            offers.append(Offer(kind, (parts[0], parts[1], parts[2]), dtype, size))
        return Slot(offers)

    def _record(self, kind: Kind, own: tuple[torch.Tensor | None, ...], count: int = 0) -> None:
        present = next((t for t in own if t is not None), None)
        down, every, up = (None if t is None else tuple(t.shape) for t in own)
        dtype = torch.uint8 if present is None else present.dtype
        self._mine.append(Offer(kind, (down, every, up), dtype, count))

    def _exchange(
        self,
        slot: Slot,
        own: tuple[torch.Tensor | None, ...],
        read: Callable[[Sequence[torch.Tensor | None]], Any],
    ) -> Any:
        bundle = slot.bundle
        if self.synchronous or bundle is None:
            return read(self._swap((slot, own))[0])
        # Read before posting: the last post of a bundle lets its next message overwrite the inbox.
        result = read(slot.inbox)
        if self.posting:
            self._post(slot, bundle, own)
        return result

    def _packed(self, slot: Slot, inbox: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The others' moments, all of them fresh, as `moments` gives them."""
        shares, arrived = slot.shares or self._shares, [tensor for tensor in inbox if tensor is not None]
        others = arrived[0]
        if len(arrived) > 1:
            others = join_moments(torch.stack(arrived), shares.others)
        if slot.packed is None:
            with torch.inference_mode(False), torch.no_grad():
                slot.packed = pack_other_moments(others.clone(), shares.own)
        else:
            slot.packed[0].copy_(others)  # the only part that changes from step to step
        return slot.packed

    def _swap(self, *slots: tuple[Slot, tuple[torch.Tensor | None, ...]]) -> list[list[torch.Tensor | None]]:
        """What all ranks send in these slots, each with what this rank sends: one exchange."""
        inboxes: list[list[torch.Tensor | None]] = []
        ops = []
        for tag, (slot, own) in enumerate(slots):
            inbox = list(slot.inbox) or [self._fresh(slot, p) for p in range(self.ranks)]
            inboxes.append(inbox)
            sends = [(p, own[part_for(self.rank, p, slot.offers)]) for p in self._peers]
            ops += self._transfers(
                [(p, t.contiguous()) for p, t in sends if t is not None],
                [(p, t) for p, t in enumerate(inbox) if t is not None and p != self.rank],
                tag,
            )
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        self.waits += 1
        return inboxes

    def _post(self, slot: Slot, bundle: Bundle, own: tuple[torch.Tensor | None, ...]) -> None:
        if not bundle.posted and bundle.number >= 2:
            self._wait(self._bundles[bundle.number - 2])  # which used the same memory for its own tensors
        for waiting, tensor in zip(slot.outbox, own, strict=True):
            if waiting is not None and tensor is not None:
                waiting.copy_(tensor)
        bundle.posted += 1
        if bundle.posted == len(bundle.slots):
            bundle.posted = 0
            ops = self._transfers(bundle.sends, bundle.receives, 2 + bundle.number)
            bundle.works = dist.batch_isend_irecv(ops) if ops else []

    def _wait(self, bundle: Bundle) -> None:
        for work in bundle.works:
            work.wait()
        bundle.works = []

    def _transfers(
        self, sends: list[tuple[int, torch.Tensor]], receives: list[tuple[int, torch.Tensor]], tag: int
    ) -> list[Any]:
        if isinstance(self.group, Pretended):
            return []
        self.messages += len(sends)
        self.bytes += sum(t.numel() * t.element_size() for _, t in sends)
        ops = [dist.P2POp(dist.isend, t, self._to_global[p], self.group, tag) for p, t in sends]
        ops += [dist.P2POp(dist.irecv, t, self._to_global[p], self.group, tag) for p, t in receives]
        return ops

    def _fresh(self, slot: Slot, peer: int) -> torch.Tensor | None:
        shape = slot.offers[peer].parts[part_for(peer, self.rank, slot.offers)]
        if peer == self.rank or shape is None:
            return None
        return torch.empty(shape, dtype=slot.offers[peer].dtype, device=self.device)

    def _outboxes(self) -> list[torch.Tensor]:
        return [t for b in self._bundles for s in b.slots for t in s.outbox if t is not None]
