"""Counts of a panel at all spots of a fold, and expression on any scale made of their rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from stexp.data.genes import residuals, scaled_counts
from stexp.data.rows import RowTable, blocks
from stexp.data.section import Section
from stexp.protocol import Protocol


@dataclass(frozen=True)
class PanelCounts:
    """Raw counts of G genes at N spots of several sections, of which most are zero and are not stored.

    Stored are a gene and a number each, in the smallest types that hold them: two to three bytes a count of a panel of
    1,000 genes.

    Attributes
    ----------
    genes : (n_stored,) unsigned integer
        Column of every stored count, spot by spot.
    values : (n_stored,)
        The counts.
    starts : (N + 1,) int64
        Where a spot's counts begin among them, and the last one's end.
    section : (N,) int
        Number of the section of each spot.
    n_spots : (S,) int
        Spots of each section.
    measured : (S, G) bool
        Genes that a section measures.
    total : (N,) float64
        Counts of a spot over the whole transcriptome.
    """

    genes: np.ndarray
    values: np.ndarray
    starts: np.ndarray
    section: np.ndarray
    n_spots: np.ndarray
    measured: np.ndarray
    total: np.ndarray

    @classmethod
    def of(cls, sections: Sequence[Section], panel: Sequence[str]) -> PanelCounts:
        """Counts of `panel` in sections, spots in order."""
        parts = [section.stored_counts(panel) for section in sections]
        n_spots = np.array([len(section) for section in sections])
        return cls(
            starts=np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part["indptr"]) for part in parts]))]),
            genes=_joined(parts, "indices"),
            values=_joined(parts, "data"),
            section=np.repeat(np.arange(len(sections)), n_spots),
            n_spots=n_spots,
            measured=np.stack([section.genes.get_indexer(list(panel)) >= 0 for section in sections]),
            total=np.concatenate([section.total_counts for section in sections]),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """N and G."""
        return len(self.section), self.measured.shape[1]

    def rows(self, rows: np.ndarray) -> sp.csr_matrix:
        """Counts of the spots `rows` (n,), (n, G) float32."""
        starts, n_stored = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        ends = np.concatenate([[0], np.cumsum(n_stored)])
        where = np.arange(ends[-1]) + np.repeat(starts - ends[:-1], n_stored)
        parts = self.values[where].astype(np.float32), self.genes[where].astype(np.int32), ends
        return sp.csr_matrix(parts, shape=(len(rows), self.shape[1]))

    def of_panel(self) -> np.ndarray:
        """Counts of a spot over the genes of the panel that its section measures, (N,)."""
        # SciPy adds in the type of the numbers, whatever it is told
        sums = [np.asarray(self.rows(np.arange(*end)).astype(np.float64).sum(axis=1)) for end in self._ends()]
        return np.concatenate(sums).ravel()

    def of_genes(self) -> np.ndarray:
        """Counts of a gene over the spots of a section, (S, G); NaN where it does not measure it."""
        stored = [slice(*self.starts[list(end)]) for end in self._ends()]
        sums = [np.bincount(self.genes[part], self.values[part], self.shape[1]) for part in stored]
        return np.where(self.measured, np.stack(sums), np.nan)

    def _ends(self) -> Iterator[tuple[int, int]]:
        """First spot of each section, and that of the next one."""
        return itertools.pairwise([0, *np.cumsum(self.n_spots).tolist()])


def _joined(parts: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    """One array of all parts, each of which is let go once it is in it."""
    dtype = np.result_type(*(part[name].dtype for part in parts))
    out, start = np.empty(sum(len(part[name]) for part in parts), dtype), 0
    for part in parts:
        values = part.pop(name)
        out[start : start + len(values)] = values
        start += len(values)
    return out


class CountTable(RowTable):
    """Raw counts, (N, G) float32; NaN where a section does not measure a gene."""

    def __init__(self, panel: PanelCounts) -> None:
        self.panel, self.shape = panel, panel.shape
        self._whole = bool(panel.measured.all())

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self._unmeasured(self.panel.rows(rows).toarray(), rows)

    def _unmeasured(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if not self._whole:
            values[~self.panel.measured[self.panel.section[rows]]] = np.nan
        return values


class ExpressionTable(CountTable):
    """Expression on one scale, (N, G) float32, made row by row as :func:`~stexp.data.genes.normalise` makes it.

    Parameters
    ----------
    protocol
        Says library, total and logarithm.
    scaling
        ``"spot"``, ``"gene"`` or ``"residuals"``; default ``protocol.truth``.
    """

    def __init__(self, panel: PanelCounts, protocol: Protocol, scaling: str | None = None) -> None:
        super().__init__(panel)
        self.protocol, self.scaling = protocol, scaling or protocol.truth
        self.total = panel.of_panel() if protocol.library == "panel" else panel.total
        if self.scaling != "spot":
            self._of_genes = panel.of_genes()
        if self.scaling == "residuals":
            of_section = np.bincount(panel.section, self.total, len(panel.n_spots))
            self._share = self._of_genes / np.maximum(of_section, 1)[:, None]

    def take(self, rows: np.ndarray) -> np.ndarray:
        if self.scaling == "residuals":
            return self._residuals(rows)
        counts = self.panel.rows(rows)
        spot = np.repeat(rows, np.diff(counts.indptr))
        by_gene = self.scaling == "gene"
        total = self._of_genes[self.panel.section[spot], counts.indices] if by_gene else self.total[spot]
        # a count of zero has the expression zero, and need not be calculated
        counts.data = scaled_counts(counts.data.astype(np.float64), total, self.protocol)
        return self._unmeasured(counts.toarray(), rows)

    def _residuals(self, rows: np.ndarray) -> np.ndarray:
        out, section = np.empty((len(rows), self.shape[1]), dtype=np.float32), self.panel.section[rows]
        for block in blocks(len(rows), 1024):
            counts, share = self.panel.rows(rows[block]).toarray(), self._share[section[block]]
            n = self.panel.n_spots[section[block]][:, None]
            out[block] = residuals(counts.astype(np.float64), self.total[rows[block]], share, n)
        return out


def expression_of(panel: PanelCounts, protocol: Protocol) -> tuple[CountTable, ExpressionTable, ExpressionTable]:
    """Counts of a panel, what a spot encoder reads of them, and the truth, each (N, G) float32, spots in order.

    The two scales are one under ``protocol.truth="spot"``; genes not measured in a section are NaN.
    """
    read = ExpressionTable(panel, protocol, "spot")
    return CountTable(panel), read, read if protocol.truth == "spot" else ExpressionTable(panel, protocol)
