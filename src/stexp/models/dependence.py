"""Dependence between two descriptions of the same spots: the Hilbert-Schmidt independence criterion."""

from __future__ import annotations

import torch


def hsic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Tr(K H L H) / (B - 1)^2, the biased estimate of HSIC (Gretton et al. 2005), Tensor of shape ().

    Parameters
    ----------
    x : (B, P)
    y : (B, Q)
        Of the same B spots, at least two; 0 where they are independent, in the limit of many.

    Notes
    -----
    Kernels are Gaussian, their bandwidths the median distances of `x` and of `y`, through which no gradient goes.
    Computed in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        return (_centred(_gaussian(x.float())) * _gaussian(y.float())).sum() / (len(x) - 1) ** 2


def _gaussian(x: torch.Tensor) -> torch.Tensor:
    """exp(-d^2 / (2 sigma^2)), (B, B), sigma the median of the distances d between two spots."""
    centred = x - x.mean(dim=0)
    square = centred.square().sum(dim=1)
    apart = (square[:, None] + square - 2 * centred @ centred.T).clamp(min=0)
    others = apart.detach()[~torch.eye(len(x), dtype=torch.bool, device=x.device)]
    return torch.exp(-apart / (2 * others.median().clamp(min=1e-12)))


def _centred(kernel: torch.Tensor) -> torch.Tensor:
    """H K H, H = 1 - 1 / B."""
    kernel = kernel - kernel.mean(dim=0)
    return kernel - kernel.mean(dim=1, keepdim=True)
