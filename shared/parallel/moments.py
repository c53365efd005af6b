"""Group norm from parts of a picture: mean and variance by part, joined, and applied."""

from __future__ import annotations

from typing import Any

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


def corrected_moments(
    moments: torch.Tensor, weights: torch.Tensor, before: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """The stale moments of the whole, moved as this rank's own have moved since (section 4.3 of the paper).

    Args:
        moments: [parts, 2, batch, groups] of the step before. weights: as in ``join_moments``.
        before: this rank's own in the step before, [2, batch, groups]. own: those of this step.
    """

    def square(m: torch.Tensor) -> torch.Tensor:
        return m[1] + m[0].square()

    mean = (weights * moments[:, 0]).sum(0) + own[0] - before[0]
    squares = (weights * (moments[:, 1] + moments[:, 0].square())).sum(0)
    variance = squares + square(own) - square(before) - mean.square()
    return torch.stack([mean, torch.where(variance < 0, own[1], variance)])


def apply_moments(
    x: torch.Tensor, moments: torch.Tensor, groups: int, weight: Any, bias: Any, eps: float
) -> torch.Tensor:
    """Group norm of [batch, channels, ...] with given moments, float32 [2, batch, groups]."""
    batch, channels = x.shape[:2]
    mean, variance = moments.unsqueeze(-1).expand(2, batch, groups, channels // groups).reshape(2, batch, -1)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (batch, channels) + (1,) * (x.ndim - 2)
    return torch.addcmul(shift.to(x.dtype).view(shape), x, scale.to(x.dtype).view(shape))
