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


def soft_info_nce(
    image: torch.Tensor, spot: torch.Tensor, temperature: float = 1.0, target_temperature: str = "multiply"
) -> torch.Tensor:
    """InfoNCE whose targets are how alike spots and tiles are among themselves, in both directions (BLEEP).

    Parameters
    ----------
    image, spot : (B, D)
        Embeddings I and S of the same B spots.
    temperature
        tau, which divides the logits S I^T; > 0.
    target_temperature
        Targets are the rows of softmax((I I^T + S S^T) / 2 x tau) (``multiply``: paper, and code until October
        2024), or of softmax((I I^T + S S^T) / 2 / tau) (``divide``: code since).

    Returns
    -------
    Tensor, shape ()
        Mean of both cross entropies over the spots, in nats.

    Notes
    -----
    As published, gradients go through the targets, and the image loss has the transposed targets, whose rows do not
    sum to 1. Computed in float32, as :func:`info_nce` is.
    """
    with torch.autocast(spot.device.type, enabled=False):
        image, spot = image.float(), spot.float()
        logits = spot @ image.T / temperature
        alike = (image @ image.T + spot @ spot.T) / 2
        target = (alike * temperature if target_temperature == "multiply" else alike / temperature).softmax(dim=1)
        spot_loss = -(target * logits.log_softmax(dim=1)).sum(dim=1)
        image_loss = -(target.T * logits.T.log_softmax(dim=1)).sum(dim=1)
        return ((spot_loss + image_loss) / 2).mean()
