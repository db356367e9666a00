"""Matrices of counts as text, up to tens of millions of cells."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.data.join import PLACE
from stexp.data.readers.memory import check_fits, one_line_without_memory
from stexp.data.readers.numbers import check_thousands, decimal_points
from stexp.data.readers.spot_columns import is_about_spots, words_of
from stexp.data.readers.text import EMPTY_LINES, find_separator, read_text, separator_of_ending
from stexp.errors import InputError

log = logging.getLogger(__name__)

CORNERS = re.compile(
    r"spot|barcode|cell|gene(?:id)?|symbol|feature|transcript|probe|ensembl|entrez|id|name|index|row|sample|tile|bin|x"
)
"""Words of what stands above the names of rows."""
BLOCK = 1 << 25  # bytes of text parsed at a time; the parser needs ten times as much


def read_count_table(path: Path, also: tuple[str, ...] = ()) -> tuple[pd.Index, pd.Index, sp.csr_matrix]:
    """Names of rows and columns, and the counts, of a table.

    A section has up to thirty million cells, most of them "0". Array operations on the text read such a table;
    whatever is not digits and separators goes to pandas.

    Parameters
    ----------
    also
        Endings beside those of tables that would fit, for the message.
    """
    expected = separator_of_ending(path, "counts", also)
    content, separator = find_separator(read_text(path, "counts"), path, "counts", expected)
    with one_line_without_memory(f"counts {path}"):
        header, _, body = EMPTY_LINES.sub(b"", content).partition(b"\n")
        columns = _column_names(header, body, path, separator)
        parts = []
        for block in _blocks(body):
            part = parse_digits(block, len(columns), separator)
            if part is None:
                parts = [parse_any(body, columns, path, separator)]
                break
            parts.append(part)
        rows = [name.strip() for ids, _ in parts for name in ids]
        values = parts[0][1] if len(parts) == 1 else sp.vstack([counts for _, counts in parts], format="csr")
        return pd.Index(rows, dtype=object), pd.Index(columns, dtype=object), values


def _column_names(header: bytes, body: bytes, path: Path, separator: str) -> list[str]:
    first_line = body.lstrip(b"\n").partition(b"\n")[0]
    try:
        names, first = (next(csv.reader([line.decode()], delimiter=separator), []) for line in (header, first_line))
    except csv.Error:
        raise InputError(f"counts {path} are not text; need a table of counts, plain or gzip") from None
    names = [name.strip() for name in names]
    if len(names) == 1 and (names[0] or len(first) > 1) and len(first) != 2:
        raise InputError(
            f"counts {path} have one column ({names[0][:50]!r}); names in the first row and column, and cells divided "
            f"by commas, tabs or semicolons would fit"
        )
    if not any(names) or not first:
        raise InputError(f"counts {path} are empty; need names in the first row and column, and counts")
    if len(names) == len(first):
        return names[1:]
    if len(names) == len(first) - 1 and not _is_corner(names[0], names[1:]):
        log.info("counts %s: no name stands above those of the rows, as write.table of R leaves it", path)
        return names
    raise InputError(
        f"counts {path}: {len(names)} names in the header (first: {names[0]!r}), {len(first)} cells in the row "
        f"{first[0][:50]!r}; a name for every column would fit, or, as R writes it, none above the names of the rows"
    )


def _is_corner(name: str, others: list[str]) -> bool:
    """Whether the first name of a header may stand above the names of the rows, for it is not like the others."""
    words = [word.removesuffix("s") for word in words_of(name)]
    if not words or any(map(CORNERS.fullmatch, words)) or is_about_spots(name):
        return True
    kinds = (lambda other: bool(PLACE.fullmatch(other)), str.isupper, lambda other: other[:3].isalpha())
    return any(not kind(name) and sum(map(kind, others)) > 0.9 * len(others) for kind in kinds)


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


def _has_commas_or_thousands(body: bytes, separator: str) -> bool:
    """Whether cells such as ``30,5`` or ``1.800`` occur."""
    sign = re.escape(separator.encode())
    return re.search(rb"%s\"?[+-]?(?:\d+,\d|[1-9]\d{0,2}\.\d{3}(?!\d))" % sign, body) is not None


def parse_any(body: bytes, columns: list[str], path: Path, separator: str = "\t") -> tuple[list[str], sp.csr_matrix]:
    """Row names and counts of a table whose numbers may be written in any way that pandas reads."""
    n_columns = len(columns)
    # missing counts are missing, but a row may be called NA, or 007
    missing = {column: ["", "NA", "NaN", "nan"] for column in range(1, n_columns + 1)}
    as_text = _has_commas_or_thousands(body, separator)
    options = {"dtype": object if as_text else {0: object}, "na_values": missing, "keep_default_na": False}
    check_fits((8 if as_text else 3) * 8 * body.count(b"\n") * n_columns, f"counts {path}")
    try:
        table = pd.read_csv(io.BytesIO(body), sep=separator, header=None, **options)
    except ValueError as error:  # pandas' own errors are
        raise InputError(
            f"counts {path} are not a table of numbers: {' '.join(str(error).split())}, not counting the header"
        ) from None
    if as_text:
        cells = table.iloc[:, 1:].set_axis(columns, axis=1) if table.shape[1] == n_columns + 1 else table.iloc[:, 1:]
        check_thousands(cells, f"counts {path}", ".")
        cells = decimal_points(cells, f"counts {path}")
        table = pd.concat([table[0], cells.apply(_as_numbers)], axis=1)
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


def _as_numbers(column: pd.Series) -> pd.Series:
    """A column of text as numbers, or as it is where one cell is none."""
    try:
        return pd.to_numeric(column)
    except ValueError:
        return column
