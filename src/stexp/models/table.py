"""Spots to learn from, in groups that are left out in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from stexp.data.datamodule import SpotDataModule
from stexp.data.splits import spatial_blocks
from stexp.errors import InputError

BLOCKS = 4  # of the only section, each predicted by the others
SPOTS_OF_A_BLOCK = 1024  # of those that thinned tables are made of, at most
FEWEST_OF_A_BLOCK = 16
AT_ONCE = 4096  # spots whose features and expression are read at once


class Rows(Protocol):
    """Numbers of spots, read some spots at a time: an array, in memory or mapped from a file, or what acts like one."""

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Table:
    """N spots to learn from; their features and expression stay where they are until they are read.

    Parameters
    ----------
    features, expression : (n, F), (n, G)
        Of these spots and perhaps others.
    xy_um : (N, 2)
    section : (N,) str
    group : (N,) str
        What is left out together: patients where there are three, else sections, else blocks of the only one.
    rows : (N,) int64
        Rows of `features` and `expression`; None: all, in their order.
    """

    features: Rows
    expression: Rows
    xy_um: np.ndarray
    section: np.ndarray
    group: np.ndarray
    rows: np.ndarray | None = None

    @classmethod
    def of(cls, data: SpotDataModule, rows: np.ndarray) -> Table:
        spots = data.spots.iloc[rows]
        group = spots["patient"].to_numpy(str)
        section = spots["section"].to_numpy(str)
        if len(np.unique(group)) < 3:
            group = section
        if len(np.unique(group)) < 2:
            group = np.char.add("block", spatial_blocks(data.xy_px[rows], BLOCKS).astype(str))
        if len(np.unique(group)) < 2 or len(rows) < 2 * BLOCKS:
            raise InputError(f"model=consensus: {len(rows)} spots to learn from are too few to leave some out")
        return cls(data.tile_features, data.target, data.xy_um[rows], section, group, rows)

    def __len__(self) -> int:
        return len(self.section)

    def read(self, which: Rows) -> np.ndarray:
        """`features` or `expression` of all spots, (N, ...)."""
        return which[self._rows]

    def blocks(self, which: Rows) -> Iterator[np.ndarray]:
        """`features` or `expression` of all spots, `AT_ONCE` at a time."""
        return (which[self._rows[start : start + AT_ONCE]] for start in range(0, len(self), AT_ONCE))

    @property
    def _rows(self) -> np.ndarray:
        return np.arange(len(self)) if self.rows is None else self.rows

    def take(self, rows: np.ndarray) -> Table:
        """Some of the spots."""
        changed = {"xy_um": self.xy_um[rows], "section": self.section[rows], "group": self.group[rows]}
        return replace(self, **changed, rows=self._rows[rows])

    def thinned(self, n: int) -> Table:
        """About `n` spots, where there are more: compact blocks of every section, the same share of each.

        Within a block the spots lie as densely as they did, so that a radius of smoothing is judged on what it meets.
        Of a section of which less than a block would be left, a block is.
        """
        if len(self) <= n:
            return self
        share = n / len(self)
        kept = []
        for name in np.unique(self.section):
            rows = np.flatnonzero(self.section == name)
            enough = min(math.ceil(8 / share), len(rows) // FEWEST_OF_A_BLOCK)  # to keep a share of them
            n_blocks = max(-(-len(rows) // SPOTS_OF_A_BLOCK), enough, 1)
            n_kept = max(round(share * n_blocks), 1)
            xy = self.xy_um[rows]
            if not np.isfinite(xy).all():  # nothing is smoothed: any order does
                xy = np.column_stack([np.arange(len(rows)), np.zeros(len(rows))])
            chosen = ((np.arange(n_kept) + 0.5) * n_blocks / n_kept).astype(np.int64)
            kept.append(rows[np.isin(spatial_blocks(xy, n_blocks), chosen)])
        return self.take(np.sort(np.concatenate(kept)))
