"""What a step of a UNet costs: by which a launch or a request is told that it gains nothing on its ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCost:
    """One step at the type's own size and its bytes in 16 bits.

    Seconds are of one captured H200, not compiled, from docs/MEASURED.md: `fixed` + branches x `branch`.
    Bytes and exchanges were counted in a forward of the published configuration.
    """

    fixed: float
    """Seconds of small kernels, which take as long for a small picture and for a patch."""
    branch: float
    """Further seconds of each guidance branch."""
    boundary: int
    """Bytes that AsyncDiff's two stages send each other, for each branch."""
    patches: int
    """Bytes of keys and values of all patches together, for each branch."""
    exchanges: int
    """Layers before which patches of an exact step wait for each other: 3 x 3 convolutions, group norms and
    self-attentions."""
