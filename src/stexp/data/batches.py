"""Batches of spots: what a loader hands out, in which order, and what a method receives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch.utils.data import DataLoader, Dataset, Sampler


@dataclass
class SpotBatch:
    """B spots; G panel genes; L tokens of a spot's context (itself first, then its nearest neighbours).

    `expression` is what the spot encoder reads, `target` the observed expression on the truth scale of the
    protocol; they differ only under ``protocol.truth="gene"``. `image` is None where no tile was asked for.
    """

    image: torch.Tensor | None  # (B, 3, px, px) in 0..1
    expression: torch.Tensor  # (B, G)
    target: torch.Tensor  # (B, G)
    counts: torch.Tensor  # (B, G)
    xy_um: torch.Tensor  # (B, 2); NaN where the scale is unknown
    array_xy: torch.Tensor  # (B, 2)
    section: torch.Tensor  # (B,) code in SpotDataModule.section_names
    spot: torch.Tensor  # (B,) row in SpotDataModule.spots
    context_expression: torch.Tensor  # (B, L, G)
    context_array_xy: torch.Tensor  # (B, L, 2)
    context_mask: torch.Tensor  # (B, L), False where a section has too few spots
    features: torch.Tensor | None = None  # (B, F) of the tile, from the frozen image encoder, unaugmented
    whole: int | None = None  # spots of the whole batch, of which several devices hold a part each

    def __len__(self) -> int:
        return len(self.spot)


@dataclass
class SpotIndex:
    """What a loader hands out: rows to gather, and the seed of their augmentation."""

    rows: torch.Tensor
    seed: int | None = None
    image: bool = True
    whole: int | None = None


class ShuffledBatches(Sampler):
    """Batches of rows in an order that depends on seed and epoch alone, so that a resumed run sees the same.

    Parameters
    ----------
    share
        Rank and number of devices; each batch is split among them, as :func:`part_of` says.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int, share: tuple[int, int] = (0, 1)) -> None:
        self.rows, self.batch_size, self.seed, self.epoch = torch.from_numpy(rows), batch_size, seed, 0
        self.share = share

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        # one spot has no negatives: where fewer than two a device would be left over, they join the batch before
        return max(1, math.ceil((len(self.rows) - 2 * self.share[1] + 1) / self.batch_size))

    def __iter__(self) -> Iterator[SpotIndex]:
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = self.rows[torch.randperm(len(self.rows), generator=draws)]
        starts = torch.arange(1, len(self)) * self.batch_size
        for rows in shuffled.tensor_split(starts):
            seed = int(torch.randint(2**62, (), generator=draws)) + self.share[0]
            yield SpotIndex(rows[part_of(len(rows), *self.share)], seed=seed, whole=len(rows))


class SectionBatches(Sampler):
    """Whole sections, one a batch, in an order that depends on seed and epoch alone."""

    def __init__(self, sections: list[np.ndarray], seed: int) -> None:
        self.sections, self.seed, self.epoch = [torch.from_numpy(rows) for rows in sections], seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sections)

    def __iter__(self) -> Iterator[SpotIndex]:
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        for i in torch.randperm(len(self), generator=draws).tolist():
            yield SpotIndex(self.sections[i], seed=int(torch.randint(2**62, (), generator=draws)))


class _AsGiven(Dataset):
    """The sampler already yields whole batches; a loader must still look them up somewhere."""

    def __getitem__(self, batch: SpotIndex) -> SpotIndex:
        return batch


def part_of(n: int, rank: int, world: int) -> slice:
    """Which of n things, in their order, the device `rank` of `world` has: as equal parts as can be, none twice."""
    return slice(*(i * (n // world) + min(i, n % world) for i in (rank, rank + 1)))


def index_loader(batches, shuffled: Sampler | None = None) -> DataLoader:
    # a generator of its own: an iterator draws a number when it starts, and of a resumed run it starts elsewhere
    order, own = batches if shuffled is None else shuffled, torch.Generator()
    return DataLoader(_AsGiven(), batch_size=None, sampler=order, num_workers=0, generator=own)


def nearest(xy: np.ndarray, n: int) -> np.ndarray:
    """For each of the N points its min(n, N - 1) nearest others, nearest first; ties by x, then y.

    A regular array has ties at every distance; ordered by place, they do not depend on the order of the points.

    Parameters
    ----------
    xy : (N, 2)
    """
    n = min(n, len(xy) - 1)
    if n <= 0:
        return np.empty((len(xy), 0), dtype=np.int64)
    # ties at the edge of the n nearest would depend on the tree: look a little further, then order exactly
    distance, index = cKDTree(xy).query(xy, k=min(n + 9, len(xy)))
    distance = np.round(distance, 6)
    distance[index == np.arange(len(xy))[:, None]] = np.inf
    order = np.lexsort((index, xy[index, 1], xy[index, 0], distance), axis=1)[:, :n]
    return np.take_along_axis(index, order, axis=1)
