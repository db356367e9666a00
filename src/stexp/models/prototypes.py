"""Prototypes: a few points of the shared space that stand for many reference spots, learned with the encoders.

A spot belongs to the prototype it is most similar to (cosine, as references are ranked). While the encoders train,
prototypes follow the spots that belong to them as a moving average (van den Oord et al. 2017, arXiv 1711.00937,
appendix A.1), spots are drawn to their prototype, and a tile is asked, among all prototypes, for that of its spot. To
predict, a prototype is the mean of its reference spots, their embeddings as well as their expression, and is searched
in their place: a last step of k-means on the final weights, which the moving average lags behind.

Not as in VQ-VAE: the encoders' contrastive loss goes on between tiles and spots as they are, so that nothing passes
straight through; prototypes that no spot belongs to any more start again at the spots of the batch that their own
prototype fits least. Not as in multimodal prototyping for survival (arXiv 2407.00224): prototypes are not fixed before
training and do not summarise a slide; both modalities share them. Weights and rates are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

DECAY = 0.9  # of the moving average, per batch
COMMITMENT = 0.25  # weight of the distance of spots to their prototype
DEAD = 0.1  # of the spots a prototype has on average: with fewer it starts again
AT_ONCE = 65_536  # spots compared with all prototypes


class Prototypes(nn.Module):
    """Points of the shared space (P, D), and how many spots of a batch belonged to each, as a moving average."""

    embedding: torch.Tensor
    mass: torch.Tensor

    def __init__(self, n: int, n_dims: int) -> None:
        super().__init__()
        self.register_buffer("embedding", torch.zeros(n, n_dims))
        self.register_buffer("mass", torch.zeros(n))

    def __len__(self) -> int:
        return len(self.mass)

    @property
    def started(self) -> bool:
        """Whether they are anywhere: not so before `start`."""
        return bool(self.mass.any())

    @torch.no_grad()
    def start(self, embedding: torch.Tensor) -> None:
        """Place them, at spots (P, D)."""
        self.embedding.copy_(embedding)
        self.mass.fill_(1.0)

    @torch.no_grad()
    def assign(self, embedding: torch.Tensor) -> torch.Tensor:
        """Which prototype spots (N, D) belong to, (N,) int64."""
        with torch.autocast(embedding.device.type, enabled=False):
            unit = F.normalize(self.embedding, dim=1)
            # the length of a spot changes nothing in its order
            return torch.cat([(part.float() @ unit.T).argmax(dim=1) for part in embedding.split(AT_ONCE)])

    def forward(self, image: torch.Tensor, spot: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
        """Loss of a batch of tiles and their spots, (B, D) each, shape (); while training prototypes follow the spots.

        Commitment, 0.25 x mean squared distance of spots to their prototype, and cross entropy of the tiles' scalar
        products with all prototypes, divided by the temperature, the prototype of its spot being the target.
        """
        with torch.autocast(spot.device.type, enabled=False):
            image, spot, number = image.float(), spot.float(), self.assign(spot)
            points = self.embedding.clone()  # they move below, and the gradient is that of where they were
            loss = COMMITMENT * F.mse_loss(spot, points[number])
            loss = loss + F.cross_entropy(image @ points.T / temperature, number)
            if self.training:
                self.follow(spot.detach(), number)
        return loss

    @torch.no_grad()
    def follow(self, spot: torch.Tensor, number: torch.Tensor) -> None:
        """Move to the moving average of the spots (B, D) that belong to them; dead ones start again."""
        fit = F.cosine_similarity(spot, self.embedding[number])
        count = torch.bincount(number, minlength=len(self)).to(self.mass)
        total = torch.zeros_like(self.embedding).index_add_(0, number, spot)
        mass = DECAY * self.mass + (1 - DECAY) * count
        self.embedding.mul_(DECAY * self.mass[:, None]).add_((1 - DECAY) * total)
        self.embedding.div_(mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, None])
        self.mass.copy_(mass)
        share = len(spot) / len(self)
        dead = torch.nonzero(mass < DEAD * share)[:, 0][: len(spot)]
        self.embedding[dead] = spot[fit.argsort(stable=True)[: len(dead)]]
        self.mass[dead] = share


@dataclass(frozen=True)
class Standing:
    """P prototypes and the R reference spots that they stand for.

    Attributes
    ----------
    number : (P,)
        Of each among those that were learned: none stands for nothing.
    member : (R,) int64
        Of each spot, the position of its prototype among the P.
    embedding : (P, D)
        Mean of its spots.
    names : DataFrame, P rows
        ``section`` and ``patient`` that most of its spots are of, and ``spot``, which says how many they are.
    """

    number: np.ndarray
    member: torch.Tensor
    embedding: torch.Tensor
    names: pd.DataFrame

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Of spots (R, G) to prototypes (P, G)."""
        return group_mean(values, self.member.to(values.device), len(self.number))

    def nearest(self, embedding: torch.Tensor, shown: np.ndarray) -> list[np.ndarray]:
        """Of every prototype its spots that are `shown` (R,), as positions, the most similar to it first."""
        similarity = F.cosine_similarity(embedding, self.embedding[self.member]).cpu().numpy()
        order = np.argsort(-similarity, kind="stable")
        order = order[shown[order]]
        member = self.member.cpu().numpy()[order]
        return [order[member == each] for each in range(len(self.number))]


def stand_for(number: np.ndarray, embedding: torch.Tensor, spots: pd.DataFrame) -> Standing:
    """Prototypes of reference spots.

    Parameters
    ----------
    number : (R,)
        The prototype that each spot belongs to.
    embedding : (R, D)
        Of the spots.
    spots
        R rows with section and patient.
    """
    used, member = np.unique(number, return_inverse=True)
    where = torch.from_numpy(member).to(embedding.device)
    names = pd.DataFrame(index=pd.Index([f"prototype {each}" for each in used]))
    for key in ("section", "patient"):
        of = pd.Categorical(spots[key].to_numpy(str))
        counts = np.zeros((len(used), len(of.categories)), dtype=np.int64)
        np.add.at(counts, (member, of.codes), 1)
        names[key] = of.categories.to_numpy(str)[counts.argmax(axis=1)]
    sizes = [f"{n} spots" if n > 1 else "1 spot" for n in np.bincount(member)]
    names["spot"] = [f"{name} of {size}" for name, size in zip(names.index, sizes, strict=True)]
    return Standing(used, where, group_mean(embedding, where, len(used)), names)


def group_mean(values: torch.Tensor, group: torch.Tensor, n: int) -> torch.Tensor:
    """Means (n, G) of the rows (R, G) of every group (R,)."""
    total = torch.zeros(n, values.shape[1], dtype=torch.float64, device=values.device)
    total.index_add_(0, group, values.double())
    return (total / torch.bincount(group, minlength=n)[:, None]).to(values.dtype)
