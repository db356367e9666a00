"""Counts of a section in a file of the cache, memory-mapped, and what was made of them there."""

from __future__ import annotations

import hashlib
import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from stexp.data.kept_arrays import kept_arrays


@dataclass(frozen=True, eq=False)
class KeptCounts:
    """Counts of a whole transcriptome in a file, of which memory holds what is looked at; or of some of its spots.

    Attributes
    ----------
    path
        An h5ad, named by its content.
    matrix : (n_spots, n_genes) CSR
        Memory-mapped; that of some spots is in memory.
    total : (n_spots,) float64
        Sum of every row.
    part
        Hash of which spots of the file these are; empty: all.
    """

    path: Path
    matrix: sp.csr_matrix
    total: np.ndarray
    part: str = ""

    def take(self, spots: np.ndarray, matrix: sp.csr_matrix) -> KeptCounts:
        """Those of some spots, a mask (n_spots,) or numbers (n,), whose counts are `matrix`."""
        rows = np.arange(len(self.total))[spots]
        part = hashlib.blake2b(self.part.encode() + rows.tobytes(), digest_size=8).hexdigest()
        return replace(self, matrix=matrix, total=self.total[rows], part=part)

    def made(self, what: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays that depend on the counts and on `what` alone: from beside them, else made and written there."""
        path = self.path.with_name("-".join(filter(None, (self.path.stem, self.part, what))) + ".arrays.npz")

        def made() -> dict[str, np.ndarray]:
            arrays = make()
            self.let_go()
            return arrays

        return kept_arrays(path, made)

    def let_go(self) -> None:
        """Give back the memory of counts that were looked at; they are read again where they are asked for."""
        if sys.platform == "win32":
            return
        for values in (self.matrix.data, self.matrix.indices, self.matrix.indptr):
            if isinstance(values.base, mmap.mmap):  # else it is empty
                values.base.madvise(mmap.MADV_DONTNEED)


def digest_of(names: Sequence[str]) -> str:
    """Short hash of names in their order."""
    return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()


def smallest(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers of at least 0 in the smallest unsigned type that holds them all; as they are where none does."""
    highest = numbers.max(initial=0)
    fitting = (kind for kind in (np.uint8, np.uint16, np.uint32) if highest <= np.iinfo(kind).max)
    return numbers.astype(next(fitting, numbers.dtype))
