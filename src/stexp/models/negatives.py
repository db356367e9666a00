"""Negatives of a contrastive method: other spots of the batch, spots of earlier batches, none that lie near."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from stexp.data.batches import SpotBatch
from stexp.models.gather import gather
from stexp.models.objectives import Candidates


@dataclass(frozen=True)
class Origin:
    """Which spots they are, and where they lie.

    Attributes
    ----------
    spot, section : (B,)
        Row in ``SpotDataModule.spots``, code of the section.
    xy_um : (B, 2)
    """

    spot: torch.Tensor
    section: torch.Tensor
    xy_um: torch.Tensor

    @classmethod
    def of(cls, batch: SpotBatch) -> Origin:
        """Of the whole batch, of which several devices hold a part each."""
        return cls(*(gather(x, batch.whole) for x in (batch.spot, batch.section, batch.xy_um.float())))


class Negatives(nn.Module):
    """Which pairs of a spot and a tile count as negatives.

    Parameters
    ----------
    n_dims
        D of the embeddings.
    memory
        Spots of earlier batches that are negatives, too, the latest ones: their tiles' and their own embeddings, as
        they were then. A spot is no negative of its own earlier embedding. 0: the batch alone.
    mask_within_um
        Spots of the same section within this distance are no negatives of each other: what lies next to a spot often
        is what it is. 0: all others are.

    Notes
    -----
    The memory is that of Wang et al. 2020 (arXiv 1912.06798): a queue as in MoCo (He et al. 2020), filled by the
    encoders that are trained, without a slower copy of them; no gradient goes through it. It is part of the state, so
    that a resumed training goes on with it, and the same on each of several devices, since each of them fills its own
    with the whole batch.
    """

    image: torch.Tensor
    spot: torch.Tensor
    rows: torch.Tensor
    sections: torch.Tensor
    xy_um: torch.Tensor

    def __init__(self, n_dims: int, memory: int = 0, mask_within_um: float = 0.0) -> None:
        super().__init__()
        self.memory, self.mask_within_um = memory, mask_within_um
        if memory:
            self.register_buffer("image", torch.zeros(memory, n_dims))
            self.register_buffer("spot", torch.zeros(memory, n_dims))
            self.register_buffer("rows", torch.full((memory,), -1))  # -1: nothing yet
            self.register_buffer("sections", torch.full((memory,), -1))
            self.register_buffer("xy_um", torch.zeros(memory, 2))

    @property
    def plain(self) -> bool:
        """Whether the negatives of a spot are all others of its batch."""
        return not self.memory and not self.mask_within_um

    def forget(self) -> None:
        """Empty the memory."""
        if self.memory:
            self.rows.fill_(-1)

    def candidates(self, image: torch.Tensor, spot: torch.Tensor, origin: Origin) -> Candidates:
        """What the spots of a batch are told apart from; embeddings (B, D) of the whole batch."""
        rows, section, xy_um = origin.spot, origin.section, origin.xy_um
        all_image, all_spot = image, spot
        if self.memory:
            all_image = torch.cat([image, self.image.to(image)])
            all_spot = torch.cat([spot, self.spot.to(spot)])
            rows = torch.cat([rows, self.rows])
            section = torch.cat([section, self.sections])
            xy_um = torch.cat([xy_um, self.xy_um])
        negative = (rows != origin.spot[:, None]) & (rows >= 0)
        if self.mask_within_um:
            apart = torch.cdist(origin.xy_um, xy_um, compute_mode="donot_use_mm_for_euclid_dist")
            negative &= ~((section == origin.section[:, None]) & (apart <= self.mask_within_um))
        return Candidates(image, spot, all_image, all_spot, negative)

    @torch.no_grad()
    def keep(self, image: torch.Tensor, spot: torch.Tensor, origin: Origin) -> None:
        """Put the embeddings of a batch in front of those of earlier ones, the oldest of which go."""
        if not self.memory:
            return
        parts = (image, spot, origin.spot, origin.section, origin.xy_um)
        for kept, new in zip((self.image, self.spot, self.rows, self.sections, self.xy_um), parts, strict=True):
            kept.copy_(torch.cat([new.detach().to(kept), kept])[: self.memory])
