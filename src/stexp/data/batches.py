"""Batches of spots: their order, their indices as loaders carry them, and their tensors as methods receive them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree
from torch.utils.data import DataLoader, Dataset, Sampler

from stexp.data.rows import Rows, RowTable

WHOLE_BYTES = 256 << 20
"""Size up to which a table of all spots is copied whole to the device that asks; of larger ones the rows of a batch."""

Batching = Literal["spots", "section"]
"""What a batch is: spots drawn from all sections, or one whole section."""


@dataclass
class SpotBatch:
    """B spots; G panel genes; L tokens of a spot's context (itself first, then its nearest neighbours).

    `expression` is what the spot encoder reads, `target` the observed expression on the truth scale of the
    protocol; they are one under ``protocol.truth="spot"``. `image` is None where no tile was asked for, or
    `features` take its place.
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
    whole: int  # spots of the whole batch, of which several devices hold a part each
    features: torch.Tensor | None = None  # (B, F) of the tile by the frozen image encoder; of a view with data.views

    def __len__(self) -> int:
        return len(self.spot)

    @property
    def tiles(self) -> torch.Tensor:
        """`image` of a batch that was asked for with its tiles."""
        if self.image is None:
            raise ValueError("the batch was taken without its tiles")
        return self.image

    @property
    def tile_features(self) -> torch.Tensor:
        """`features` of a batch of data with a frozen image encoder."""
        if self.features is None:
            raise ValueError("features of tiles need a data module with an encoder")
        return self.features


@dataclass
class SpotIndex:
    """A batch before it is gathered: rows of spots, and the seed of their augmentation."""

    rows: torch.Tensor
    seed: int | None = None
    image: bool = True
    whole: int | None = None


class SpotTables:
    """Tables of all spots, from which batches are taken: small ones from a copy on each device that asks.

    Parameters
    ----------
    tables
        Fields of a :class:`SpotBatch` for all N spots, (N, ...); two may be one table.
    neighbours : (N, n)
        Rows of the spots in the context of each, -1 where there are fewer.
    """

    def __init__(self, tables: Mapping[str, Rows], neighbours: np.ndarray) -> None:
        self._tables = {**tables, "neighbours": neighbours}
        self._on_device: dict[tuple[int, torch.device], torch.Tensor] = {}

    def take(self, index: SpotIndex, image: torch.Tensor | None, device: torch.device) -> SpotBatch:
        """The spots of `index` on a device, with their tiles `image`."""
        rows = index.rows.to(device)
        around = self._rows("neighbours", rows)
        context = torch.cat([rows[:, None], around.clamp(min=0)], dim=1)
        # of tables that are made row by row, those of a spot that is in several contexts are made once
        expression = self._rows("expression", context)
        own = {
            name: expression[:, 0].clone() if table is self._tables["expression"] else self._rows(name, rows)
            for name, table in self._tables.items()
            if name != "neighbours"
        }
        return SpotBatch(
            image=image,
            spot=rows,
            context_expression=expression,
            context_array_xy=self._rows("array_xy", context),
            context_mask=torch.cat([torch.ones_like(rows[:, None], dtype=torch.bool), around >= 0], dim=1),
            whole=index.whole or len(rows),
            **own,
        )

    def _rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows (...) of a table on their device, (..., C)."""
        table = self._tables[name]
        if isinstance(table, RowTable) and table.nbytes > WHOLE_BYTES:
            used, place = rows.cpu().unique(return_inverse=True)
            return torch.from_numpy(table.take(used.numpy())).to(rows.device)[place.to(rows.device)]
        whole = self._on_device.get((id(table), rows.device))
        if whole is None:
            # pandas hands out read-only arrays, which torch does not take
            array = np.require(np.asarray(table), requirements="W")
            whole = self._on_device[id(table), rows.device] = torch.from_numpy(array).to(rows.device)
        return whole[rows]


def tensor_or_rows(table: Rows, device: torch.device) -> torch.Tensor | Rows:
    """A table as a tensor on a device where it is small, else as it is."""
    if isinstance(table, RowTable) and table.nbytes > WHOLE_BYTES:
        return table
    return torch.from_numpy(np.asarray(table)).to(device)


class ShuffledBatches(Sampler):
    """Batches of rows in an order that depends on seed and epoch alone, so that a resumed run sees the same.

    Parameters
    ----------
    share
        Rank and number of devices; each batch is split among them, as :func:`part_of` says.
    image
        Whether batches come with tiles.
    """

    def __init__(
        self, rows: np.ndarray, batch_size: int, seed: int, share: tuple[int, int] = (0, 1), *, image: bool = True
    ) -> None:
        self.rows, self.batch_size, self.seed, self.epoch = torch.from_numpy(rows), batch_size, seed, 0
        self.share, self.image = share, image

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
            yield SpotIndex(rows[part_of(len(rows), *self.share)], seed=seed, image=self.image, whole=len(rows))


class SectionBatches(Sampler):
    """Whole sections, one a batch, in an order that depends on seed and epoch alone; `image`: with their tiles."""

    def __init__(self, sections: list[np.ndarray], seed: int, *, image: bool = True) -> None:
        self.sections, self.seed, self.epoch = [torch.from_numpy(rows) for rows in sections], seed, 0
        self.image = image

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sections)

    def __iter__(self) -> Iterator[SpotIndex]:
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        for i in torch.randperm(len(self), generator=draws).tolist():
            seed = int(torch.randint(2**62, (), generator=draws))
            yield SpotIndex(self.sections[i], seed=seed, image=self.image)


class _Batches(Dataset):
    """The batches that a sampler yields, each under itself: a loader must look them up somewhere."""

    def __getitem__(self, batch: SpotIndex) -> SpotIndex:
        return batch


def part_of(n: int, rank: int, world: int) -> slice:
    """Which of n things, in their order, the device `rank` of `world` has: as equal parts as can be, none twice."""
    return slice(*(i * (n // world) + min(i, n % world) for i in (rank, rank + 1)))


def index_loader(batches: Sequence[SpotIndex] | Sampler) -> DataLoader:
    """Loader of batches in the order of a sequence or a sampler."""
    # a generator of its own: an iterator draws a number when it starts, and of a resumed run it starts elsewhere
    return DataLoader(_Batches(), batch_size=None, sampler=batches, num_workers=0, generator=torch.Generator())


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


def neighbours_within(spots: pd.DataFrame, xy: np.ndarray, n: int) -> np.ndarray:
    """Rows of the nearest spots of the same section and role, (N, n) or as many as any spot has; -1 where fewer.

    Parameters
    ----------
    spots
        N rows with columns section and role.
    xy : (N, 2)
        Where they lie, in any unit of their section.
    """
    groups = spots.reset_index(drop=True).groupby(["section", "role"], sort=False)
    n = min(n, int(groups.size().max()) - 1)  # no spot has more
    out = np.full((len(spots), n), -1, dtype=np.int64)
    for _, group in groups:
        rows = group.index.to_numpy()
        out[rows, : min(n, len(rows) - 1)] = rows[nearest(xy[rows], n)]
    return out
