"""The rows of a whole batch, of which several devices hold a part each."""

from __future__ import annotations

import torch
import torch.distributed as dist

from stexp.data.batches import part_of


def gather(x: torch.Tensor, n: int) -> torch.Tensor:
    """Collect the rows of the whole batch, in its order, from all devices; with one device, `x` itself.

    Parameters
    ----------
    x : (B, ...)
        Rows of the part that :func:`~stexp.data.batches.part_of` gives this device.
    n
        Rows of the whole batch.

    Returns
    -------
    Tensor, shape (n, ...)

    Notes
    -----
    A loss of what this returns is the same on every device, and, as the gradient of each row is summed over devices
    and the gradient of each parameter is their mean, so is every gradient: that of one process with the whole batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    part = part_of(n, dist.get_rank(), dist.get_world_size())
    if len(x) != part.stop - part.start:
        raise ValueError(f"{len(x)} rows, where the part of this device has {part.stop - part.start} of {n}")
    whole = x.new_zeros(n, *x.shape[1:])
    whole[part] = x
    return _Sum.apply(whole)  # a sum with zeros: exact, and parts may differ in size


class _Sum(torch.autograd.Function):
    """Sum over devices; so is its gradient, since the loss of each device reads all rows."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient
