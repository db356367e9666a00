"""Matrices of counts as text, up to tens of millions of cells."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.data.readers.memory import check_fits, one_line_without_memory
from stexp.data.readers.text import Dialect, find_dialect, read_text, separator_of_ending
from stexp.errors import InputError

TABS = Dialect("\t")
BLOCK = 1 << 25  # bytes of text parsed at a time; the parser needs ten times as much


def read_count_table(path: Path, also: tuple[str, ...] = ()) -> tuple[pd.Index, pd.Index, sp.csr_matrix]:
    """Names of rows and columns, and the counts, of a table.

    A section has up to thirty million cells, most of them "0". Array operations on the text read all 36 of HER2+ in
    six seconds, pandas takes seven times as long; whatever is not digits and separators goes to pandas.

    Parameters
    ----------
    also
        Endings beside those of tables that would fit, for the message.
    """
    expected = separator_of_ending(path, "counts", also)
    content, dialect = find_dialect(read_text(path, "counts"), path, "counts", expected)
    with one_line_without_memory(f"counts {path}"):
        header, _, body = content.partition(b"\n")
        columns = _column_names(header, body, path, dialect.separator)
        parts = []
        for block in _blocks(body):
            part = None if dialect.decimal_comma else parse_digits(block, len(columns), dialect.separator)
            if part is None:
                parts = [parse_any(body, columns, path, dialect)]
                break
            parts.append(part)
        rows = [name.strip() for ids, _ in parts for name in ids]
        values = parts[0][1] if len(parts) == 1 else sp.vstack([counts for _, counts in parts], format="csr")
        return pd.Index(rows, dtype=object), pd.Index(columns, dtype=object), values


def _column_names(header: bytes, body: bytes, path: Path, separator: str) -> list[str]:
    try:
        names = next(csv.reader([header.decode().rstrip("\r")], delimiter=separator), [])
        first = next(csv.reader([body[: body.find(b"\n") + 1 or None].decode()], delimiter=separator), [])
    except csv.Error:
        raise InputError(f"counts {path} are not text; need a table of counts, plain or gzip") from None
    # write.table of R leaves out the name above the row names
    columns = names if names and names[0] and len(first) == len(names) + 1 else names[1:]
    if names and not columns and (names[0].strip() or len(first) > 1):
        raise InputError(
            f"counts {path} have one column ({names[0][:50]!r}); names in the first row and column, and cells divided "
            f"by commas, tabs or semicolons would fit"
        )
    if not columns or not body.strip():
        raise InputError(f"counts {path} are empty; need names in the first row and column, and counts")
    return [name.strip() for name in columns]


def _blocks(body: bytes) -> Iterator[bytes]:
    """The text in pieces that end where a line ends."""
    start = 0
    while start < len(body):
        end = body.find(b"\n", start + BLOCK) + 1 or len(body)
        yield body[start:end]
        start = end


def parse_digits(body: bytes, n_columns: int, separator: str = "\t") -> tuple[list[str], sp.csr_matrix] | None:
    """Row names and counts, or None where the text is anything but rows of a name and `n_columns` whole numbers."""
    if not body.endswith(b"\n"):
        body += b"\n"
    text = np.frombuffer(body, dtype=np.uint8)
    ends: np.ndarray = np.flatnonzero((text == ord(separator)) | (text == 10))  # of each cell; 10 is the newline
    if ends.size % (n_columns + 1):
        return None
    ends = ends.reshape(-1, n_columns + 1)
    n_rows = len(ends)
    # every row ends in the only newline of its row
    if np.count_nonzero(text == 10) != n_rows or not (text[ends[:, -1]] == 10).all():
        return None
    starts = np.concatenate([[0], ends[:-1, -1] + 1])
    ids = [body[start:end] for start, end in zip(starts, ends[:, 0], strict=True)]
    digit = text - np.uint8(ord("0"))  # wraps round, so that only digits come out as 0..9
    names = b"".join(ids)
    not_digits = ends.size + sum(not 48 <= byte <= 57 for byte in names)
    lengths = np.diff(ends, axis=1) - 1
    if np.count_nonzero(digit > 9) != not_digits or not names.isascii() or b'"' in names:
        return None
    if lengths.min() < 1 or lengths.max() > 7:  # up to seven digits float32 is exact
        return None
    cells = np.flatnonzero((digit[ends[:, 1:] - 1] != 0) | (lengths > 1))
    last, length = ends[:, 1:].ravel()[cells] - 1, lengths.ravel()[cells]
    values = digit[last].astype(np.float32)
    for place in range(1, int(length.max(initial=1))):
        longer = np.flatnonzero(length > place)
        values[longer] += np.float32(10**place) * digit[last[longer] - place]
    row, column = np.divmod(cells, n_columns)
    indptr = np.searchsorted(row, np.arange(n_rows + 1))
    counts = sp.csr_matrix((values, column.astype(np.int32), indptr.astype(np.int32)), shape=(n_rows, n_columns))
    counts.eliminate_zeros()  # "00"
    return [name.decode() for name in ids], counts


def parse_any(body: bytes, columns: list[str], path: Path, dialect: Dialect = TABS) -> tuple[list[str], sp.csr_matrix]:
    """Row names and counts of a table whose numbers may be written in any way that pandas reads."""
    n_columns = len(columns)
    # missing counts are missing, but a row may be called NA, or 007
    missing = {column: ["", "NA", "NaN", "nan"] for column in range(1, n_columns + 1)}
    options = {"dtype": {0: object}, "na_values": missing, "keep_default_na": False}
    check_fits(3 * 8 * body.count(b"\n") * n_columns, f"counts {path}")
    try:
        decimal = "," if dialect.decimal_comma else "."
        table = pd.read_csv(io.BytesIO(body), sep=dialect.separator, decimal=decimal, header=None, **options)
    except ValueError as error:  # pandas' own errors are
        raise InputError(
            f"counts {path} are not a table of numbers: {' '.join(str(error).split())}, not counting the header"
        ) from None
    names, cells = list(table[0]), table.iloc[:, 1:]
    if cells.shape[1] != n_columns:
        raise InputError(f"counts {path}: {n_columns} names in the header, {cells.shape[1]} counts in a row")
    is_number = [kind.kind in "iuf" for kind in cells.dtypes]  # TRUE is no count
    text = np.flatnonzero(np.logical_not(is_number))
    if len(text):
        column = cells.iloc[:, text[0]]
        row = int(pd.to_numeric(column, errors="coerce").isna().to_numpy().argmax())
        raise InputError(
            f"counts {path} are not a table of numbers: {len(text)} columns hold text "
            f"(first: {str(column.iloc[row])[:50]!r} in the row {names[row]}, column {columns[text[0]]})"
        )
    return names, sp.csr_matrix(cells.to_numpy(np.float32))
