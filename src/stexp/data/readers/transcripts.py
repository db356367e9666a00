"""Transcripts of Xenium, counted in squares or cells, a block of the table at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import scipy.sparse as sp

from stexp.data.readers.features import CONTROLS, GENES, genes_of
from stexp.data.readers.memory import one_line_without_memory
from stexp.data.readers.spaceranger import Features
from stexp.data.readers.sums import sums_of
from stexp.errors import InputError, listed

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1 << 20
PLACE = ("x_location", "y_location")
NEEDED = (*PLACE, "feature_name", "qv")
UNASSIGNED = ("UNASSIGNED", "-1", "0")
"""Cells of transcripts outside of any, as versions of the software write them."""


def count_in_squares(
    file: Path, bin_um: float, min_qv: float, panel: Features | None, where: str
) -> tuple[ad.AnnData, pd.DataFrame]:
    """Counts of transcripts in squares, and the centres of these.

    Parameters
    ----------
    file
        ``transcripts.parquet``.
    bin_um
        Side of a square.
    min_qv
        Transcripts of a lower quality (Phred-scaled) do not count; 10x counts those of 20 and more.
    panel
        Features of the matrix of cells, of which those of the type of genes count; None: whatever the table calls
        genes, or does not name like controls.

    Returns
    -------
    counts : AnnData, n_squares x n_genes
        Squares with a count, row by row; what is not on tissue cannot be told from what has none.
    centres : DataFrame
        array_x, array_y, and x_um, y_um of the same squares.
    """
    low, high = _extent(file)
    first = np.minimum(np.floor(low / bin_um), 0).astype(np.int64)
    width, height = (np.floor(high / bin_um).astype(np.int64) - first + 1).tolist()

    def square_of(batch: pa.RecordBatch) -> np.ndarray:
        x, y = (np.floor(_numbers(batch, name) / bin_um).astype(np.int64) for name in PLACE)
        return (y - first[1]) * width + (x - first[0])

    sums, genes = _count(file, square_of, (), width * height, min_qv, panel, where)
    counted = np.flatnonzero(np.diff(sums.indptr))
    column, row = counted % width, counted // width
    names = [f"s_{bin_um:g}um_{r:05d}_{c:05d}" for r, c in zip(row, column, strict=True)]
    middle = (np.column_stack([column, row]) + first + 0.5) * bin_um
    centres = {"array_x": column, "array_y": row, "x_um": middle[:, 0], "y_um": middle[:, 1]}
    counts = genes_of(sums[counted], names, genes.names, genes.ids, where=f"transcripts {file}")
    return counts, pd.DataFrame(centres, index=names)


def count_in_cells(file: Path, cells: pd.Index, min_qv: float, panel: Features | None, where: str) -> ad.AnnData:
    """Counts of the transcripts that ``transcripts.parquet`` assigns to each of `cells`, in their order."""
    number = pd.Series(np.arange(len(cells)), index=cells)

    def cell_of(batch: pa.RecordBatch) -> np.ndarray:
        names, codes = _encoded(batch, "cell_id")
        unknown = [name for name in names if name not in number.index and name not in UNASSIGNED]
        if unknown:
            raise InputError(f"{where}: transcripts {file} are of cells that are not in the table: {listed(unknown)}")
        return number.reindex(names).fillna(-1).to_numpy(np.int64)[codes]

    sums, genes = _count(file, cell_of, ("cell_id",), len(cells), min_qv, panel, where)
    return genes_of(sums, cells.to_numpy(), genes.names, genes.ids, where=f"transcripts {file}")


@contextmanager
def _transcripts(file: Path, columns: tuple[str, ...]) -> Iterator[Iterator[pa.RecordBatch]]:
    """Blocks of the columns of the table; whatever is not there or broken is one line."""
    if not file.is_file():
        raise InputError(f"transcripts {file} do not exist")
    try:
        with one_line_without_memory(f"transcripts {file}"), pq.ParquetFile(file) as table:
            missing = [name for name in columns if name not in table.schema_arrow.names]
            if missing:
                raise InputError(f"transcripts {file} lack {', '.join(missing)}; {', '.join(NEEDED)} would fit")
            yield table.iter_batches(ROWS_AT_ONCE, columns=list(columns))
    except InputError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"transcripts {file} cannot be read: {' '.join(str(error).split())}") from error


def _extent(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest x and y of all transcripts, in micrometres."""
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    with _transcripts(file, PLACE) as batches:
        for batch in batches:
            xy = np.column_stack([_numbers(batch, name) for name in PLACE])
            if not np.isfinite(xy).all():
                raise InputError(f"transcripts {file}: {int((~np.isfinite(xy)).any(axis=1).sum())} have no place")
            if len(xy):
                low, high = np.minimum(low, xy.min(axis=0)), np.maximum(high, xy.max(axis=0))
    if not np.isfinite(low).all():
        raise InputError(f"transcripts {file} hold none")
    return low, high


def _count(
    file: Path,
    group_of: Callable[[pa.RecordBatch], np.ndarray],
    columns: tuple[str, ...],
    n_groups: int,
    min_qv: float,
    panel: Features | None,
    where: str,
) -> tuple[sp.csr_matrix, _Genes]:
    """Counts of transcripts by group and gene, and these genes; what does not count is said by kind."""
    flag = _flag_of_genes(file) if panel is None else None
    genes = _Genes(panel)
    n, n_poor, others = 0, 0, Counter[str]()

    def entries() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        nonlocal n, n_poor
        for batch in batches:
            poor = ~(_numbers(batch, "qv") >= min_qv)
            names, codes = _encoded(batch, "feature_name")
            is_gene = None if flag is None else _genes_flagged(batch, flag, len(names), codes)
            column = genes.columns(names, is_gene)[codes]
            n, n_poor = n + len(codes), n_poor + int(poor.sum())
            others.update(_kind(names[code]) for code in codes[(column < 0) & ~poor])
            keep = (column >= 0) & ~poor
            yield group_of(batch)[keep], column[keep], np.ones(int(keep.sum()))

    with _transcripts(file, (*NEEDED, *columns, *([flag] if flag else []))) as batches:
        sums = sums_of(entries(), (n_groups, genes.most))
    counted = int(sums.sum())
    left_out = ", ".join(f"{count} of {kind}" for kind, count in sorted(others.items())) or "none of controls"
    log.info(
        "%s: %d of %d transcripts count; left out: %d below a quality of %g, %s%s",
        where, counted, n, n_poor, min_qv, left_out,
        f", {n - n_poor - others.total() - counted} outside of cells" if "cell_id" in columns else "",
    )  # fmt: skip
    if not counted:
        raise InputError(f"{where}: none of {n} transcripts of {file} counts ({n_poor} below data.min_qv={min_qv:g})")
    return sums[:, : len(genes.names)], genes


class _Genes:
    """Columns of the genes among names of features: those of the panel, or in the order in which they occur."""

    most = 1 << 16

    def __init__(self, panel: Features | None) -> None:
        self.ids: list[str] | None = None
        self.names: list[str] = []
        self.fixed = panel is not None
        if panel is not None:
            types = panel.types or [GENES] * len(panel.symbols)
            own = [i for i, kind in enumerate(types) if kind == GENES]
            self.names, self.ids = [panel.symbols[i] for i in own], [panel.ids[i] for i in own]
        self.column = {name: i for i, name in enumerate(self.names)}

    def columns(self, names: list[str], is_gene: np.ndarray | None) -> np.ndarray:
        """Column of each name, -1 of what is no gene."""
        if not self.fixed:
            for i, name in enumerate(names):
                gene = not CONTROLS.fullmatch(name) if is_gene is None else is_gene[i]
                if gene and name not in self.column:
                    self.column[name] = len(self.names)
                    self.names.append(name)
        return np.array([self.column.get(name, -1) for name in names], dtype=np.int64)


def _flag_of_genes(file: Path) -> str | None:
    """The column that tells genes from controls, where the version of the software writes one."""
    names = pq.read_schema(file).names
    return next((name for name in ("is_gene", "codeword_category") if name in names), None)


def _genes_flagged(batch: pa.RecordBatch, flag: str, n_names: int, codes: np.ndarray) -> np.ndarray:
    """Whether each name of a feature is of a gene, by the column that says it of every transcript."""
    values, own = _encoded(batch, flag)
    is_gene = np.array([value == "true" or value.endswith("_gene") for value in values], dtype=bool)
    out = np.zeros(n_names, dtype=bool)
    out[codes] = is_gene[own]
    return out


def _kind(name: str) -> str:
    """What a feature that is no gene is of: the part of its name before a number."""
    return name.split("_")[0]


def _numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return np.asarray(batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False))


def _encoded(batch: pa.RecordBatch, name: str) -> tuple[list[str], np.ndarray]:
    """Different values of a column as text, and which of them each row has; bytes and categories are text, too."""
    values = pc.fill_null(batch.column(name).cast(pa.string()), "").dictionary_encode()
    return values.dictionary.to_pylist(), values.indices.to_numpy()
