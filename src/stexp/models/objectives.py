"""Objectives of contrastive training: InfoNCE, soft targets, and three bounds of mutual information."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from stexp.errors import InputError

Objective = Literal["infonce", "soft", "jsd", "dv", "nwj"]
TargetTemperature = Literal["multiply", "divide"]

LARGEST_CRITIC = 50.0  # whose power is a float32 with room for sums


@dataclass(frozen=True)
class Candidates:
    """B spots, and the tiles and spots that they are told apart from.

    Attributes
    ----------
    image, spot : (B, D)
        Embeddings of the same B spots.
    all_image, all_spot : (B + N, D)
        The same, and N of earlier batches behind them.
    negative : (B, B + N)
        Pairs that count as negatives; never those of a spot with itself.
    """

    image: torch.Tensor
    spot: torch.Tensor
    all_image: torch.Tensor
    all_spot: torch.Tensor
    negative: torch.Tensor

    @classmethod
    def of_batch(cls, image: torch.Tensor, spot: torch.Tensor) -> Candidates:
        """All pairs of a batch."""
        negative = ~torch.eye(len(image), dtype=torch.bool, device=image.device)
        return cls(image, spot, image, spot, negative)


def contrastive_loss(
    objective: Objective,
    candidates: Candidates,
    temperature: float | torch.Tensor = 1.0,
    image_weight: float = 0.5,
    target_temperature: TargetTemperature = "divide",
) -> torch.Tensor:
    """Loss of a batch, Tensor of shape (): lambda x image loss + (1 - lambda) x spot loss.

    The critic T of a pair is the scalar product of its embeddings / temperature. The image loss tells each tile's own
    spot from other spots, the spot loss each spot's own tile from other tiles.

    Parameters
    ----------
    objective
        ``infonce``: cross entropy of the own one among the candidates (:func:`infonce`); ``soft``: with targets by how
        alike spots and tiles are among themselves (:func:`soft_targets`); ``jsd``, ``dv``, ``nwj``: minus a bound of
        mutual information (:func:`jsd`, :func:`dv`, :func:`nwj`).
    image_weight
        lambda. Without negatives of earlier batches both losses of a bound are the same.
    target_temperature
        Of ``soft``.

    Notes
    -----
    Computed in float32: unnormalised embeddings make critics of several hundred, where bf16 has steps of 2.
    """
    with torch.autocast(candidates.spot.device.type, enabled=False):
        image, spot = candidates.image.float(), candidates.spot.float()
        all_image, all_spot, negative = candidates.all_image.float(), candidates.all_spot.float(), candidates.negative
        by_spot = spot @ all_image.T / temperature
        by_image = by_spot.T if len(all_spot) == len(spot) else image @ all_spot.T / temperature
        if objective == "soft":
            alike = (image @ image.T + spot @ spot.T) / 2
            alike = alike * temperature if target_temperature == "multiply" else alike / temperature
            counted = negative | _own(negative)
            target = alike.masked_fill(~counted, -torch.inf).softmax(dim=1)
            image_loss, spot_loss = soft_targets(by_image, target.T, counted), soft_targets(by_spot, target, counted)
        else:
            function = {"infonce": infonce, "jsd": jsd, "dv": dv, "nwj": nwj}[objective]
            image_loss, spot_loss = function(by_image, negative), function(by_spot, negative)
        return image_weight * image_loss + (1 - image_weight) * spot_loss


def infonce(critic: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018): log of the candidates - this is a bound of mutual information.

    Parameters
    ----------
    critic, negative : (B, C)
        T of each of B spots with each of C candidates, the i-th of which is its own, and which of them are negatives.
    """
    own = torch.arange(len(critic), device=critic.device)
    return F.cross_entropy(critic.masked_fill(~(negative | _own(negative)), -torch.inf), own)


def soft_targets(critic: torch.Tensor, target: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Cross entropy with a target for each pair that is counted (BLEEP), mean over spots; shapes (B, B)."""
    log_share = critic.masked_fill(~counted, -torch.inf).log_softmax(dim=1)
    return -(target * log_share.masked_fill(~counted, 0)).sum(dim=1).mean()


def jsd(critic: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """E[softplus(-T+)] + E[softplus(T-)], whose least value grows smaller with the Jensen-Shannon divergence.

    2 log 2 - this is a bound of twice that divergence, between pairs of one spot and pairs of two; at its optimum T is
    their log ratio of densities, by which Deep InfoMax (Hjelm et al. 2019) ranks. Parameters as of :func:`infonce`.
    """
    loss = F.softplus(-critic.diagonal()).mean()
    return loss + F.softplus(critic[negative]).mean() if negative.any() else loss


def dv(critic: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """-(E[T+] - log E[exp T-]), minus the bound of Donsker and Varadhan. Parameters as of :func:`infonce`.

    Of a batch the logarithm of a mean is below that of the expectation on average: the bound holds of many pairs.
    """
    loss = -critic.diagonal().mean()
    return loss + critic[negative].logsumexp(dim=0) - math.log(int(negative.sum())) if negative.any() else loss


def nwj(critic: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """-(E[T+] - E[exp(T- - 1)]), minus the bound of Nguyen, Wainwright and Jordan. Parameters as of :func:`infonce`."""
    loss = -critic.diagonal().mean()
    return loss + (critic[negative] - 1).exp().mean() if negative.any() else loss


def chance_level(objective: Objective, negative: torch.Tensor) -> torch.Tensor | None:
    """The lowest loss of a critic that says the same of every pair, Tensor of shape (); None of ``soft``.

    The targets of ``soft`` depend on the embeddings, and so does what nothing would score.
    """
    if objective == "infonce":
        return (1 + negative.sum(dim=1)).float().log().mean()
    level = {"jsd": 2 * math.log(2), "dv": 0.0, "nwj": 0.0}.get(objective)
    return None if level is None else torch.tensor(level, device=negative.device)


def check_objective(objective: Objective, normalise: bool, temperature: float, negatives_memory: int) -> None:
    """InputError where an objective does not go with the critic or the negatives of a method."""
    if objective == "nwj" and not (normalise and 1 / temperature <= LARGEST_CRITIC):
        raise InputError(
            f"model.objective=nwj takes the power of the critic, which overflows with model.normalise="
            f"{str(normalise).lower()} model.temperature={temperature:g}; model.normalise=true and a temperature of at "
            f"least {1 / LARGEST_CRITIC:g} would fit"
        )
    if objective == "soft" and negatives_memory:
        raise InputError(
            f"model.negatives_memory={negatives_memory}: soft targets are of the pairs of a batch; 0 would fit, or "
            f"model.objective=infonce"
        )


def _own(negative: torch.Tensor) -> torch.Tensor:
    """Where each spot is with itself, as `negative`."""
    return torch.eye(*negative.shape, dtype=torch.bool, device=negative.device)
