"""Training losses."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from stexp.models.objectives import Candidates, contrastive_loss


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
    return contrastive_loss("infonce", Candidates.of_batch(image, spot), temperature, image_weight)


@torch.no_grad()
def beside_chance(info_nce: torch.Tensor, image: torch.Tensor, spot: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a contrastive loss says beside embeddings that carry nothing.

    Parameters
    ----------
    info_nce : Tensor, shape ()
        Of a batch, in nats, with each tile's own spot its target: log(B) bounds no loss with other targets.
    image, spot : (B, D)
        Its embeddings.

    Returns
    -------
    dict of Tensor, shape ()
        ``mean_loss``; ``log_batch``, log(B); ``matched``, share of tiles whose own spot has the largest scalar product
        of the batch; ``chance``, 1 / B.
    """
    n = len(image)
    matched = (image.float() @ spot.float().T).argmax(dim=1) == torch.arange(n, device=image.device)
    chance = info_nce.new_tensor(1 / n, dtype=torch.float32)
    return {
        "mean_loss": info_nce.detach().float(),
        "log_batch": -chance.log(),
        "matched": matched.float().mean(),
        "chance": chance,
    }


def image_targets(image: torch.Tensor, spot: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Cross entropy of each tile's spots with targets by how alike the tiles are, in this direction alone (HECLIP).

    Parameters
    ----------
    image, spot : (B, D)
        Embeddings I and S of the same B spots.
    temperature
        tau, which divides the logits S I^T and the likeness I I^T; > 0.

    Returns
    -------
    Tensor, shape ()
        Mean over the tiles, in nats.

    Notes
    -----
    Targets are the rows of softmax(I I^T / tau), transposed as in the published code, so that those of a tile do not
    sum to 1; gradients go through them. Computed in float32, as :func:`info_nce` is.
    """
    with torch.autocast(spot.device.type, enabled=False):
        image, spot = image.float(), spot.float()
        target = (image @ image.T / temperature).softmax(dim=1)
        log_share = (image @ spot.T / temperature).log_softmax(dim=1)
        return -(target.T * log_share).sum(dim=1).mean()


def zinb_nll(
    counts: torch.Tensor, mean: torch.Tensor, dispersion: torch.Tensor, zero_logit: torch.Tensor
) -> torch.Tensor:
    """Negative log-likelihood of counts under a zero-inflated negative binomial distribution.

    Parameters
    ----------
    counts : (B, G)
        Raw counts.
    mean, dispersion : (B, G)
        mu and r of the negative binomial part, whose variance is mu + mu^2 / r; > 0.
    zero_logit : (B, G)
        Logit of pi, the share of zeros that come besides.

    Returns
    -------
    Tensor, shape ()
        Mean over spots and genes, in nats.

    Notes
    -----
    P(x) = pi [x = 0] + (1 - pi) NB(x; mu, r), as in DCA (Eraslan et al. 2019, Nat Commun 10, 390) and Hist2ST; in
    logarithms, where they add 1e-10 to what may vanish. Computed in float32.
    """
    with torch.autocast(counts.device.type, enabled=False):
        x, mu, r, logit = (tensor.float() for tensor in (counts, mean, dispersion, zero_logit))
        mu = mu.clamp(min=1e-10)  # of a spot without counts, whose library is 0
        log_none = -r * torch.log1p(mu / r)  # NB(0)
        log_nb = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1) + log_none + x * (mu / (r + mu)).log()
        log_pi, log_rest = F.logsigmoid(logit), F.logsigmoid(-logit)
        return -torch.where(x == 0, torch.logaddexp(log_pi, log_rest + log_none), log_rest + log_nb).mean()


def correlation_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - Pearson correlation of each gene over the spots of a batch, mean over genes.

    Parameters
    ----------
    predicted, target : (B, G)
        Expression of the same B spots.

    Returns
    -------
    Tensor, shape ()
        From 0 (all correlations 1) to 2; a gene without variance counts 1. Computed in float32.

    Notes
    -----
    The batch-wise term of EGN (Yang et al. 2023, section 3.2).
    """
    x, y = (z.float() - z.float().mean(dim=0) for z in (predicted, target))
    scale = (x.square().sum(dim=0) * y.square().sum(dim=0)).clamp(min=1e-12).sqrt()
    return (1 - (x * y).sum(dim=0) / scale).mean()
