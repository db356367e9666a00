"""Predicted expression from tables: a row a spot, or a row a value."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.readers.memory import check_fits
from stexp.data.readers.text import ending_of, read_table
from stexp.errors import InputError
from stexp.evaluation.foreign.layout import (
    FITS,
    SECTION,
    SPOT,
    DataNames,
    lay_out,
    locate,
    refuse_transposed,
    texts,
)

log = logging.getLogger(__name__)

GENE = "gene"
VALUE = ("value", "predicted", "prediction", "expression")
"""What the columns of a long table are called, in any case."""


def read_table_of_predictions(path: Path, names: DataNames) -> ad.AnnData:
    """Predictions of a csv, tsv or parquet table; see :func:`~stexp.evaluation.foreign.files.read_predictions`."""
    where, ending = f"predictions {path}", ending_of(path)
    table = _read_parquet(path, where) if ending == ".parquet" else _read_text(path, where)
    stem = path.name.removesuffix(".gz").rpartition(".")[0]
    if table.empty:
        raise InputError(f"{where} has {len(table)} rows and {len(table.columns)} columns; give {FITS}")
    columns = {str(column).lower(): column for column in table.columns[::-1]}
    spot = next((columns[name] for name in SPOT if name in columns), None)
    value = next((columns[name] for name in VALUE if name in columns), None)
    if GENE in columns and value is not None:
        if spot is None:
            raise _without_spot(table, where)
        return _of_long(table, where, names, stem, {"gene": columns[GENE], "value": value})
    return _of_wide(table, where, names, stem, columns, spot)


def _of_wide(
    table: pd.DataFrame, where: str, names: DataNames, stem: str, columns: dict[str, Any], spot: Any
) -> ad.AnnData:
    named = not pd.api.types.is_integer_dtype(table.index)  # an R table, or an index of parquet
    first = None if named or spot is not None else table.columns[0]
    if first is not None and str(first).lower() == SECTION:
        raise _without_spot(table, where)
    rows = table.index if first is None else texts(table[first], where)
    if SECTION not in columns and spot is None:
        refuse_transposed(rows, [column for column in table.columns if column != first], names, where)
    keys = [columns[name] for name in (SECTION, *SPOT) if name in columns and columns[name] != first]
    values = _numbers(table.drop(columns=keys if first is None else [first, *keys]), where, names)
    obs = locate(table[keys], rows, where, names.sections, stem)
    return lay_out(values.to_numpy(np.float32), obs, pd.DataFrame(index=values.columns), where)


def _without_spot(table: pd.DataFrame, where: str) -> InputError:
    listed = ", ".join(map(str, table.columns[:8]))
    return InputError(f"{where} has the columns {listed}, and none says the spot; a column spot would fit")


def _of_long(table: pd.DataFrame, where: str, names: DataNames, stem: str, columns: dict[str, Any]) -> ad.AnnData:
    given = table[columns["value"]]
    numbers = pd.to_numeric(given, errors="coerce")
    bad = (numbers.isna() & given.notna()).to_numpy()
    if bad.any():
        example = str(given[bad].iloc[0])[:40]
        raise InputError(f"{where}: {int(bad.sum())} values are no numbers (first: {example!r})")
    genes = np.asarray(texts(table[columns["gene"]], where), dtype=object)
    obs = locate(table, table.index, where, names.sections, stem)
    spot_code, spots = pd.factorize(pd.MultiIndex.from_frame(obs))
    gene_code, panel = pd.factorize(genes)
    cell = spot_code * len(panel) + gene_code
    twice = pd.Series(cell).duplicated().to_numpy()
    if twice.any():
        at = int(twice.argmax())
        raise InputError(
            f"{where}: {int(twice.sum())} values are of a spot and gene that has one already (first: section "
            f"{obs['section'][at]}, spot {obs['spot'][at]}, gene {genes[at]}); one each would fit"
        )
    check_fits(4 * len(spots) * len(panel), where)
    values = np.full(len(spots) * len(panel), np.nan, dtype=np.float32)
    values[cell] = numbers.to_numpy(np.float32)
    located = pd.DataFrame(list(spots), columns=["section", "spot"], dtype=object)
    var = pd.DataFrame(index=pd.Index(panel, dtype=object))
    return lay_out(values.reshape(len(spots), len(panel)), located, var, where)


def _numbers(table: pd.DataFrame, where: str, names: DataNames) -> pd.DataFrame:
    """Columns of numbers, by gene; what else stands beside them is left out, unless a gene is called so."""
    out, left_out = {}, []
    for column in table.columns:
        name, values = str(column), table[column]
        numbers = pd.to_numeric(values, errors="coerce")
        bad = (numbers.isna() & values.notna()).to_numpy()
        if not bad.any() and not pd.api.types.is_bool_dtype(values):
            out[name] = numbers
        elif names.has_gene(name) and bad.any():
            example = str(values[bad].iloc[0])[:40]
            raise InputError(f"{where}: {int(bad.sum())} values of gene {name} are no numbers (first: {example!r})")
        else:
            left_out.append(name)
    if left_out:
        log.info("%s: columns that hold no numbers are left out: %s", where, ", ".join(left_out[:5]))
    if not out:
        listed = ", ".join([*left_out[:5], *(["..."] if len(left_out) > 5 else [])])
        raise InputError(f"{where} has no column of numbers{f' ({listed})' if listed else ''}; give {FITS}")
    return pd.DataFrame(out)


def _read_text(path: Path, where: str) -> pd.DataFrame:
    head = read_table(path, "predictions", header=None, nrows=1, dtype=str, keep_default_na=False)
    header = [str(cell) for cell in head.iloc[0]]
    _refuse_columns_twice([name for name in header if name], where)
    keys = [name for name in header if name.lower() in (SECTION, GENE, *SPOT)]
    if not any(name.lower() in SPOT for name in keys):
        keys.append(header[0] or "Unnamed: 0")  # it names the rows
    # names may look like numbers ("007"); numbers are read to their last digit
    return read_table(path, "predictions", dtype=dict.fromkeys(keys, str), float_precision="round_trip")


def _read_parquet(path: Path, where: str) -> pd.DataFrame:
    check_fits(4 * path.stat().st_size, where)
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow's own errors are of several kinds
        raise InputError(f"{where} cannot be read as parquet: {' '.join(str(error).split())[:200]}") from error
    levels = [name for name in table.index.names if name is not None]
    if isinstance(table.index, pd.MultiIndex) or any(str(name).lower() in (SECTION, *SPOT) for name in levels):
        table = table.reset_index()
    _refuse_columns_twice(list(map(str, table.columns)), where)
    return table


def _refuse_columns_twice(names: list[str], where: str) -> None:
    twice = pd.Index(names)[pd.Index(names).duplicated()].unique()
    if len(twice):
        raise InputError(f"{where}: {len(twice)} columns occur twice ({', '.join(twice[:3])}); once would fit")
