"""Tables of all spots whose rows are made when they are asked for, so that no table lies in memory whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

WHOLE, AT_ONCE = 16_384, 4_096
"""Rows up to which a table is one block, and is calculated with as an array is; rows of a block of larger ones."""


class Rows(Protocol):
    """A table of N rows: an array, or a :class:`RowTable`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class RowTable(ABC):
    """A table (N, C) of which any rows can be asked for as an array.

    ``table[rows]`` takes whatever indexes the first axis of an array, ``table[rows, columns]`` what indexes both;
    ``np.asarray(table)`` is all of it.
    """

    shape: tuple[int, int]
    dtype: np.dtype = np.dtype(np.float32)

    @abstractmethod
    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n,) int64, none negative, as an array (n, C)."""

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return 2

    @property
    def nbytes(self) -> int:
        """What all of it would take in memory."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, tuple) and (len(key) not in (1, 2) or any(part is None or part is ... for part in key)):
            return np.asarray(self)[key]  # what is rarely asked for, as NumPy understands it
        first, *others = key if isinstance(key, tuple) else (key,)
        index = np.arange(len(self))[first]  # checked and understood as NumPy does
        rows = self.take(index.reshape(-1)).reshape(*index.shape, self.shape[1])
        if not others:
            return rows
        if isinstance(first, slice) or index.ndim == 0:
            return rows[..., others[0]]
        # arrays of rows and of columns go together element by element
        columns = np.arange(self.shape[1])[others[0]]
        if isinstance(others[0], slice):
            return rows[..., columns]
        index, columns = np.broadcast_arrays(np.arange(index.size).reshape(index.shape), columns)
        return rows.reshape(-1, self.shape[1])[index, columns]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the rows of a table are made anew: there is no array without a copy")
        out = np.empty(self.shape, dtype=self.dtype if dtype is None else dtype)
        for block in blocks(len(self)):
            out[block] = self[block]
        return out

    def copy(self) -> np.ndarray:
        """All of it, as an array."""
        return np.asarray(self)

    def astype(self, dtype: Any) -> np.ndarray:
        """All of it, as an array of another type."""
        return np.asarray(self, dtype=dtype)

    def mean(self, axis: int = 0, dtype: Any = None) -> np.ndarray:
        """Mean over the rows (``axis=0``), or of each row (``axis=1``)."""
        if axis == 0:
            return column_means(self, dtype)
        return np.concatenate([self[block].mean(axis=1, dtype=dtype) for block in blocks(len(self))])


class SomeRows(RowTable):
    """Some rows of another table, in any order."""

    def __init__(self, table: RowTable, rows: np.ndarray) -> None:
        self.table, self.rows, self.dtype = table, rows, table.dtype
        self.shape = (len(rows), table.shape[1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.table.take(self.rows[rows])


def some_rows(table: Rows, rows: np.ndarray) -> Rows:
    """The rows (n,) int of a table: of an array those themselves, of a :class:`RowTable` another one."""
    return SomeRows(table, rows) if isinstance(table, RowTable) else table[rows]


def blocks(n: int, at_once: int | None = None) -> Iterator[slice]:
    """Slices that cover n rows: all of them up to `WHOLE`, else `AT_ONCE`; or another number in each."""
    at_once = at_once or (max(n, 1) if n <= WHOLE else AT_ONCE)
    return (slice(start, min(start + at_once, n)) for start in range(0, n, at_once))


def column_means(table: Rows, dtype: Any = None) -> np.ndarray:
    """Mean over the rows (C,): that of NumPy where they are one block, else by sums in 64 bits."""
    if len(table) <= WHOLE:
        return np.asarray(table[:]).mean(axis=0, dtype=dtype)
    total = sum(np.asarray(table[block]).sum(axis=0, dtype=np.float64) for block in blocks(len(table)))
    return (total / len(table)).astype(dtype or table[:1].dtype)


class MappedRows(RowTable):
    """What a function makes of the rows of a table, (n, C) -> (n, `n_columns`)."""

    def __init__(
        self, table: Rows, function: Callable[[np.ndarray], np.ndarray], n_columns: int, dtype: Any = np.float64
    ) -> None:
        self.table, self.function, self.dtype = table, function, np.dtype(dtype)
        self.shape = (len(table), n_columns)

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.function(self.table[rows]).astype(self.dtype, copy=False)
