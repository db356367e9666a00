"""Training losses."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def info_nce(
    image: torch.Tensor, spot: torch.Tensor, temperature: float | torch.Tensor = 1.0, image_weight: float = 0.5
) -> torch.Tensor:
    """InfoNCE between the two views of the same spots, in both directions.

    Parameters
    ----------
    image, spot : (B, D)
        Embeddings of the same B spots.
    temperature : float or Tensor, shape ()
        Divides the logits; > 0.
    image_weight
        lambda of mclSTExp's supplement, Table S7: lambda x image loss + (1 - lambda) x spot loss. The
        image loss asks, for each tile, for its spot among the B; the spot loss, for each spot, for its tile.

    Returns
    -------
    Tensor, shape ()
        Mean loss in nats; log(B) for embeddings that carry nothing.

    Notes
    -----
    Every other spot of the batch counts as a negative, neighbours included. Computed in float32: unnormalised
    embeddings make logits of several hundred, where bf16 has steps of 2.
    """
    with torch.autocast(spot.device.type, enabled=False):
        logits = (spot.float() @ image.float().T) / temperature
    same = torch.arange(len(logits), device=logits.device)
    image_loss = F.cross_entropy(logits.T, same)
    spot_loss = F.cross_entropy(logits, same)
    return image_weight * image_loss + (1 - image_weight) * spot_loss
