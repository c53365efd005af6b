"""Group norm from parts of a picture: mean and variance by part, joined, forecast, and applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


def group_moments(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Mean and variance of each group of channels of [batch, channels, ...]: float32 [2, batch, groups]."""
    x = x.unflatten(1, (groups, -1))
    rest = tuple(range(2, x.ndim))
    if x.dtype in (torch.float32, torch.float64):
        variance, mean = torch.var_mean(x, dim=rest, correction=0)
        return torch.stack([mean, variance]).float()
    # Reductions that read 16 bits and add in 32, without a copy of x in 32.
    mean = x.mean(dim=rest, dtype=torch.float32)
    norm = torch.linalg.vector_norm(x, dim=rest, dtype=torch.float32)
    square = norm.square() * (mean.numel() / x.numel())
    return torch.stack([mean, (square - mean.square()).clamp_min(0)])


def join_moments(moments: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean and variance of a whole from those of its parts.

    Args:
        moments: [parts, 2, batch, groups]. weights: [parts, 1, 1], the parts' shares.

    Returns:
        [2, batch, groups].
    """
    means, variances = moments[:, 0], moments[:, 1]
    mean = (weights * means).sum(0)
    return torch.stack([mean, (weights * (variances + (means - mean).square())).sum(0)])


def pack_other_moments(
    others: torch.Tensor, share: torch.Tensor, then: Any = 0.0, along: Any = 0.0, change: Any = 0.0
) -> torch.Tensor:
    """What ``whole_moments`` needs besides this rank's own moments, in one tensor [..., 6, 2, batch, groups].

    Args:
        others: the other ranks' joined moments, [..., 2, batch, groups], as last received.
        share: this rank's share of the whole; broadcast to others.
        then: this rank's own moments at that time.
        along: its product with this rank's change since is how much of ``change`` is to be added to others.
        change: how the others' moments changed before.
    """
    planes = (others, share, share * (1 - share), then, along, change)
    # Numbers are filled in on the device: a captured step copies nothing from the CPU.
    tensors = [p if isinstance(p, torch.Tensor) else others.new_full((), p) for p in planes]
    return torch.stack([t.expand_as(others) for t in tensors], -4)


def whole_moments(
    own: torch.Tensor, known: torch.Tensor, moving: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance, [batch, groups], of the whole.

    Args:
        own: this rank's fresh moments, [2, batch, groups].
        known: of ``pack_other_moments``.
        moving: whether ``change`` counts; where it is zero, False saves a few kernels.
    """
    others, share, spread, then, along, change = known.unbind(0)
    if moving:
        rate = ((own - then) * along).sum((0, 2), keepdim=True).clamp(0, 2)
        others = torch.addcmul(others, rate, change)
    mean, variance = others.unbind(0)
    apart = own[0] - mean
    joined = torch.lerp(variance.clamp_min(0), own[1], share[1])
    return torch.lerp(mean, own[0], share[0]), torch.addcmul(joined, apart * spread[1], apart)


class Shares(NamedTuple):
    """Weights of moments: this rank's in the whole, [1, 1], and the others' among them, [others, 1, 1]."""

    own: torch.Tensor
    others: torch.Tensor

    @classmethod
    def of(cls, counts: Sequence[int], rank: int, device: torch.device) -> Shares:
        """Shares of a rank where the ranks have so many numbers each."""
        rest = [count for peer, count in enumerate(counts) if peer != rank]

        def column(numbers: Sequence[int], whole: int) -> torch.Tensor:
            shares = torch.tensor(numbers, dtype=torch.float64) / max(whole, 1)
            return shares.float().view(-1, 1, 1).to(device)

        return cls(column([counts[rank]], sum(counts))[0], column(rest, sum(rest)))


class StaleMoments:
    """The other ranks' moments, as known one step after they were sent.

    One object serves all norms whose moments have the same shape. Its tensors stay in place, as a captured
    step needs; what a step can know of the next is worked out at its end, for all norms together.

    With a forecast: section 4.3 of the paper moves the stale moments of the whole as this rank's own have
    moved since. But patches change in different ways, and pictures come out worse than with stale moments. So
    here the others' moments go on as they moved in the last step, as much faster or slower as this rank's own
    do: right on an even drift, no correction where nothing changes. This rank's own moments are fresh.

    Args:
        inboxes: by norm, then by other rank: where its moments arrive, [2, batch, groups].
        shares: by norm.
        forecast: False leaves the others' moments as they arrived.
    """

    def __init__(self, inboxes: list[list[torch.Tensor]], shares: list[Shares], forecast: bool) -> None:
        first, norms = inboxes[0][0], len(inboxes)
        self.forecast = forecast
        self._arrived = [inbox for row in zip(*inboxes, strict=True) for inbox in row]
        self._weights = torch.stack([share.others for share in shares], 1)
        self._share = torch.stack([share.own[None] for share in shares])
        self._fresh = first.new_zeros(norms, *first.shape)
        self._known = first.new_zeros(norms, 6, *first.shape)
        self._begun = torch.zeros((), dtype=torch.bool, device=first.device)
        """Whether what is known is of this generation."""

    @property
    def held_bytes(self) -> int:
        """Memory of the tensors kept from step to step."""
        return self._fresh.nbytes + self._known.nbytes

    def reset(self) -> None:
        """A new generation: there is no change before its second step."""
        self._begun.fill_(False)

    def keep(self, norm: int, own: torch.Tensor) -> None:
        """This rank's moments in this step, [2, batch, groups]."""
        self._fresh[norm].copy_(own)

    def known(self, norm: int) -> torch.Tensor:
        """For ``whole_moments``: what the last step leaves to this one."""
        return self._known[norm]

    def advance(self) -> None:
        """The step is over, and all that others sent in it is in the inboxes."""
        parts = torch.stack(self._arrived).unflatten(0, (-1, len(self._fresh))).transpose(1, 2)
        others = join_moments(parts, self._weights).transpose(0, 1)
        if not self.forecast:
            self._known.copy_(pack_other_moments(others, self._share))
            return
        before, _, _, then, _, _ = self._known.unbind(1)
        own, change = (self._fresh - then) * self._begun, (others - before) * self._begun
        self._begun.fill_(True)
        # Least squares over a picture's groups, of means and variances relative to the variance.
        variance = self._fresh[:, 1].clamp_min(1e-6)
        relative = own / torch.stack([variance, variance.square()], 1)
        along = relative / (own * relative).sum((1, 3), keepdim=True).clamp_min(1e-12)
        self._known.copy_(pack_other_moments(others, self._share, self._fresh, along, change))


def apply_moments(
    x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, weight: Any, bias: Any, eps: float
) -> torch.Tensor:
    """Group norm of [batch, channels, ...] with given moments, each float32 [batch, groups]."""
    (batch, groups), channels = mean.shape, x.shape[1]
    # [batch, groups, channels of a group]
    scale = (variance + eps).rsqrt().unsqueeze(-1).expand(batch, groups, channels // groups)
    if weight is not None:
        scale = scale * weight.view(groups, -1)
    if bias is None:
        shift = mean.unsqueeze(-1) * -scale
    else:
        shift = torch.addcmul(bias.view(groups, -1).float(), mean.unsqueeze(-1), scale, value=-1)
    shape = (batch, channels) + (1,) * (x.ndim - 2)
    return torch.addcmul(shift.to(x.dtype).reshape(shape), x, scale.to(x.dtype).reshape(shape))
