"""What a step of a transformer costs by its degrees: arithmetic, and bytes against the measured link.

One home of the numbers by which degrees are chosen, without torch. A block of every such transformer has
about 12 x channels^2 weights that each token meets, and an attention in which each token meets every other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from shared.launch.flags import HostConfig
from shared.parallel.xdit.degrees import Degrees

# Fitted to the H200s of docs/MEASURED.md; tests/backends/test_xdit_cost.py shows how far they are off.
PRODUCTS, ATTENTION = 0.87, 0.98
"""Share of a large matrix product's speed that a step's linear layers and its attention reach."""
COMPILED, EAGER = 34e3, 82e3
"""Operations of that product which take as long as what is elementwise, for each channel of a token and
block: bound by memory, and so less where it is compiled into a few passes."""
SHARED = 1.05
"""What ranks that share the tokens take in all, of what one takes: their products are smaller."""
RING_HIDES, OVERLAP_HIDES = (0.33, 0.37), (0.49, 0.68)
"""The most of a step's arithmetic during which ring's messages are under way, and the part of these messages
that is: values leave before queries and keys are there; with overlap half of attention, and more beside it,
runs meanwhile too. Ulysses waits for its exchanges."""
OVERLAP_COSTS = 0.06
"""Of a step's arithmetic: two attentions in place of one, two products in place of one."""
WORTH = 0.03
"""Share of a step's time that a plan must save to be taken in place of the usual one."""
SLOW = 0.25
"""Share of a step that is waiting for the link, from which it is called slow."""
GAINS = 0.95
"""Share of one rank's time below which a plan is called faster."""
SCALE_BYTES = 4
"""What 8 bits cost for each token and head (shared.parallel.rounding)."""


class Speeds(Protocol):
    """A measured link, as shared.ranks.link has it."""

    @property
    def latency(self) -> float: ...
    @property
    def bandwidth(self) -> float: ...
    @property
    def pair(self) -> float: ...
    @property
    def flops(self) -> float: ...


@dataclass(frozen=True)
class Step:
    """A step of one picture: what all ranks compute and exchange together."""

    blocks: int
    channels: int
    tokens: int
    branches: int
    """Guidance branches, 1 or 2."""
    itemsize: int = 2
    """Bytes of a number."""
    elementwise: float = COMPILED
    sent: float = 1.0
    """Bytes that are sent for each that attention exchanges: about 0.5 in 8 bits."""

    @property
    def products(self) -> float:
        """Floating point operations of linear layers."""
        return self.branches * self.blocks * 24.0 * self.tokens * self.channels**2

    @property
    def attention(self) -> float:
        """Those of attention between tokens."""
        return self.branches * self.blocks * 4.0 * self.tokens**2 * self.channels

    def received(self, degrees: Degrees) -> float:
        """Bytes that a rank receives: ring's keys and values; Ulysses' queries, keys, values, answers."""
        whole = self.tokens * self.channels * self.itemsize * self.sent
        ring = 2 * whole / degrees.ulysses * (degrees.ring - 1) / degrees.ring
        ulysses = 4 * whole / degrees.sequence * (degrees.ulysses - 1) / degrees.ulysses
        return (ring + ulysses) * self.blocks * self.branches / degrees.cfg

    def messages(self, degrees: Degrees) -> int:
        """Exchanges, one after the other."""
        each = 2 * (degrees.ring > 1) + 2 * (degrees.ulysses > 1)
        return each * self.blocks * (self.branches if degrees.cfg == 1 else 1)

    def arithmetic(self, degrees: Degrees, link: Speeds) -> float:
        """Seconds in which a rank computes."""
        numbers = self.branches * self.blocks * self.tokens * self.channels
        matrices = self.products / PRODUCTS + self.attention / ATTENTION
        alone = (matrices + self.elementwise * numbers) / link.flops
        alone *= SHARED if degrees.sequence > 1 else 1.0
        return alone / (degrees.sequence * min(degrees.cfg, self.branches))

    def exchange(self, degrees: Degrees, link: Speeds) -> float:
        """Seconds in which messages are under way."""
        bandwidth = link.pair if degrees.sequence == 2 else link.bandwidth
        return self.messages(degrees) * link.latency + self.received(degrees) / bandwidth

    def seconds(self, degrees: Degrees, link: Speeds, overlap: bool = False) -> float:
        """Of one step."""
        computed, sent = self.arithmetic(degrees, link), self.exchange(degrees, link)
        if degrees.ring == 1 or degrees.ulysses > 1:
            return computed + sent
        arithmetic, messages = OVERLAP_HIDES if overlap else RING_HIDES
        hidden = min(arithmetic * computed, messages * sent)
        return computed * (1 + OVERLAP_COSTS * overlap) + sent - hidden


@dataclass(frozen=True)
class Choice:
    """What is chosen for a link, and what it costs."""

    degrees: Degrees
    overlap: bool
    seconds: float
    alone: float
    """Seconds of a step on one rank."""
    slow: bool
    """Whether a large part of the step would be waiting."""


def step_of(
    config: HostConfig, settings: Mapping[str, Any], vae: Mapping[str, Any], itemsize: int, sent: float
) -> Step | None:
    """A step of this launch at its own size; None where configurations do not tell.

    Args:
        settings, vae: the configurations of the transformer and of the VAE.
        itemsize: bytes of a number.
        sent: as Step has it.
    """
    spec = config.spec
    tokens = spec.tokens
    assert tokens is not None
    blocks, channels = sum(int(settings.get(name) or 0) for name in BLOCKS), tokens.channels(settings)
    side = 2 if spec.packed else settings.get(tokens.side, 1)
    side = side[-1] if isinstance(side, list) else side
    if not blocks or not channels or not isinstance(side, int):
        return None
    pixels = spec.latent_pixels(vae)
    width, height = (max(x // (side * pixels), 1) for x in config.size)
    frames = ((spec.frames or 1) - 1) // spec.frames_factor + 1
    places = width * height * frames * (2 if spec.refers else 1) + spec.text_tokens
    branches = 1 if tokens.unguided else tokens.branches
    elementwise = COMPILED if config.compile_unet else EAGER
    return Step(blocks, channels, places, branches, itemsize, elementwise, sent)


BLOCKS = ("num_layers", "num_single_layers", "n_layers")
"""What configurations call the numbers of blocks."""


def choose(step: Step, link: Speeds, usual: Degrees, free: bool, heads: int | None) -> Choice:
    """The fastest way to share the sequence that leaves the other degrees as they are.

    Args:
        usual: the degrees by the rule of `choose_degrees`, with what was given.
        free: whether neither Ulysses' degree nor ring's was given.
        heads: attention heads, which Ulysses' degree divides; None where unknown.
    """

    def fastest(degrees: Degrees) -> tuple[float, bool]:
        plain = step.seconds(degrees, link)
        apart = step.seconds(degrees, link, overlap=True)
        return min((plain, False), (apart, True))

    best, (seconds, overlap) = usual, fastest(usual)
    for other in _ways(usual, heads) if free else ():
        took, apart = fastest(other)
        if took < seconds * (1 - WORTH):
            best, seconds, overlap = other, took, apart
    waits = seconds - step.arithmetic(best, link)
    return Choice(best, overlap, seconds, step.arithmetic(Degrees(), link), waits > SLOW * seconds)


def _ways(usual: Degrees, heads: int | None) -> Iterator[Degrees]:
    n = usual.sequence
    given = {k: v for k, v in usual.as_dict().items() if k not in ("ulysses", "ring")}
    for ulysses in range(n, 0, -1):
        if n % ulysses == 0 and (heads or ulysses) % ulysses == 0:
            yield Degrees(**given, ulysses=ulysses, ring=n // ulysses)
