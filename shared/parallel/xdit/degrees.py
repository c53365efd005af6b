"""The degrees of xDiT's parallelism, and what PipeFusion supports: checks of a launch, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Degrees:
    """How many ranks share each dimension of the work; their product is the world size.

    Ranks are numbered with tensor innermost, then ulysses, ring, pipefusion, cfg and data outermost.
    """

    data: int = 1  # pictures of one request
    cfg: int = 1  # guidance branches, 1 or 2
    pipefusion: int = 1  # stages of the transformer, on patches of the picture
    ring: int = 1  # parts of the sequence, keys and values passed around
    ulysses: int = 1  # parts of the sequence, exchanged for attention heads
    tensor: int = 1  # parts of the feed-forward layers

    @property
    def world(self) -> int:
        """Ranks of all of it."""
        return math.prod(asdict(self).values())

    @property
    def sequence(self) -> int:
        """Parts of the sequence of tokens."""
        return self.ring * self.ulysses

    @property
    def exact(self) -> bool:
        """Whether no step uses stale activations: all but PipeFusion."""
        return self.pipefusion == 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in asdict(self).items() if value > 1]
        return " x ".join(parts) or "one rank"


class DegreesError(ValueError):
    """Degrees that do not make a plan.

    Args:
        must: the condition that does not hold.
        asked: the degrees in question, by field name of Degrees.
        more: what follows from them.
    """

    def __init__(self, must: str, asked: Mapping[str, int], more: str) -> None:
        self.must, self.asked, self.more = must, asked, more
        got = " x ".join(f"{name} {value}" for name, value in asked.items()) or "no degree"
        super().__init__(f"{must}; got {got}{more}")


PIPEFUSION_SCHEDULERS: dict[bool, dict[str, dict[str, Any]]] = {
    True: {"FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": False}},
    False: {
        "DDIMScheduler": {},
        "DDPMScheduler": {},
        "DPMSolverMultistepScheduler": {"solver_order": 2},
    },
}
"""Whether the model predicts flow -> class -> the only settings that xfuser's step by patches supports."""


def scheduler_problem(flow: bool, name: str, settings: Mapping[str, Any]) -> str | None:
    """Why PipeFusion cannot run this class with these settings, or None."""
    fitting = PIPEFUSION_SCHEDULERS[flow]
    if name not in fitting:
        return f"PipeFusion runs {' and '.join(fitting)} on this model, patch by patch; got {name}"
    for setting, wanted in fitting[name].items():
        if settings.get(setting, wanted) != wanted:
            return f"PipeFusion runs {name} with {setting} {wanted} only; got {settings[setting]}"
    return None


def stages_problem(degree: int, blocks: int, stages: tuple[int, ...] | None, equal: bool) -> str | None:
    """Why so many blocks of a transformer cannot be cut into `degree` stages, or None.

    Args:
        stages: blocks of each stage; None: equal numbers, the last stage may have fewer.
        equal: whether skip connections join the first blocks to the last ones.
    """
    if stages is not None and (len(stages) != degree or sum(stages) != blocks or min(stages) < 1):
        return (
            f"must be {degree} numbers above 0 with sum {blocks}, the blocks of the transformer; got "
            f"{list(stages)}"
        )
    if equal and (stages is not None or degree % 2 or blocks % degree):
        return (
            f"its skip connections need an even number of equal stages; got {degree} for "
            f"{blocks} blocks" + (f", stages {list(stages)}" if stages else "")
        )
    if stages is None and -(-blocks // degree) * (degree - 1) >= blocks:
        return f"{degree} stages leave one without any of {blocks} blocks"
    return None


def patch_count(height: int, patches: int, sequence: int) -> int:
    """Patches that xfuser makes of a picture: `patches` or fewer, each of whole rows for every rank.

    Args:
        height: of the picture, a multiple of 16 x sequence.
        patches: that were asked for.
        sequence: ranks that share a patch.
    """
    rows = height // 16
    each = -(-rows // (patches * sequence)) * sequence
    return -(-rows // each)


def choose_degrees(world: int, given: dict[str, int], branches: int, heads: int | None) -> Degrees:
    """Fill in the degrees that were left out.

    The rule: the guidance branches on two halves where the model has two in one batch, then Ulysses as far as
    the attention heads divide, then ring. PipeFusion, tensor and data parallelism are never chosen.

    Args:
        world: number of ranks.
        given: the degrees that were asked for, by field name of Degrees.
        branches: guidance branches that the model computes in one batch, 1 or 2.
        heads: attention heads of the model; None where unknown.

    Raises:
        DegreesError: what was given and what fits.
    """
    product = math.prod(given.values())
    if world % product:
        fits = [n for n in range(1, 9) if n % product == 0]
        raise DegreesError(
            f"the product of all degrees must divide the world size {world}",
            given,
            f", product {product} (world sizes that fit: {', '.join(map(str, fits)) or 'more than 8'})",
        )
    if heads is not None and heads % given.get("ulysses", 1):
        raise DegreesError(
            f"must divide the model's {heads} attention heads",
            {"ulysses": given["ulysses"]},
            f" (fits: {', '.join(str(n) for n in range(1, 9) if heads % n == 0)})",
        )
    chosen, rest = dict(given), world // product
    if "cfg" not in chosen and branches == 2 and rest % 2 == 0:
        chosen["cfg"], rest = 2, rest // 2
    if "ulysses" not in chosen:
        chosen["ulysses"] = max(n for n in range(1, rest + 1) if rest % n == 0 and (heads or n) % n == 0)
        rest //= chosen["ulysses"]
    if "ring" not in chosen:
        chosen["ring"], rest = rest, 1
    if rest != 1:
        raise DegreesError(
            f"the product of all degrees must be the world size {world}", given, f", product {world // rest}"
        )
    return Degrees(**chosen)


def fitting_sizes(size: int, multiple: int) -> str:
    """The nearest sizes that are a multiple: "96 and 128"."""
    low = size // multiple * multiple
    return f"{low} and {low + multiple}" if low else str(multiple)


def may_capture(stages: int, patches: int) -> bool:
    """Whether PipeFusion's stages may be captured while patches are on their way.

    A capture waits until what the rank has sent is received, which a stage prepares for one patch ahead. With
    twice as many patches as stages all of them could wait in a circle, each for the next one.
    """
    return patches < 2 * stages
