"""Blocks that several methods use."""

from __future__ import annotations

import torch

from stexp.models.blocks import GeneHead


def test_predictions_near_each_other_stay_apart_under_autocast():
    """bf16 has steps of 1/64 at 3: genes whose mean is 3 would be equal in spots that differ by less."""
    torch.manual_seed(0)
    head, x = GeneHead(8, 5), 1e-3 * torch.randn(20, 8)
    torch.nn.init.constant_(head.bias, 3.0)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = head(x), torch.nn.functional.linear(x, head.weight, head.bias)
    assert found.dtype == torch.float32 and torch.equal(found, head(x))
    assert all(len(gene.unique()) == 20 for gene in found.T) and len(plain[:, 0].unique()) < 5
