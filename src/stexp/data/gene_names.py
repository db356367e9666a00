"""One kind of gene names: symbols or Ensembl ids, without versions, each once."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.data.readers.formats import TEXT
from stexp.data.readers.paths import user_path
from stexp.data.readers.text import read_table
from stexp.errors import InputError

log = logging.getLogger(__name__)

# species, then 11 digits; before it the genome of a 10x reference of two species, after it version and GENCODE's mark
# of the second copy of a gene of X and Y
ENSEMBL = r"^(?:\w+?_+)?((ENS[A-Z]{0,6}G)\d{11})(?:\.\d+)?(?:_PAR_Y)?$"


def harmonise(counts: ad.AnnData, table: str | Path | None = None, where: str = "") -> ad.AnnData:
    """Give genes symbols where a table has them, drop versions of Ensembl ids, sum what becomes equal.

    Parameters
    ----------
    counts : AnnData, n_spots x n_genes
        ``var_names`` are symbols or Ensembl ids; ``var["gene_ids"]`` is the id behind a symbol, where there is one.
    table
        csv or tsv (also ``.gz``) of ids and symbols: columns named ``id`` and ``symbol`` (any ids), or two columns
        of which one holds Ensembl ids, in either order, with or without a header. None: names stay, ids lose their
        version.
    where
        What the counts are of, for messages.

    Returns
    -------
    AnnData, n_spots x (at most n_genes)
        In the order in which the names first occur; `counts` is not changed. ``var["gene_ids"]`` holds the ids
        without version, several joined by ";", "" where none is known; absent where no gene has one.
        ``uns["gene_names"]`` counts genes: ``given``; ``ids``, those with an id; ``matched`` and ``unmatched``,
        ids that the table has or lacks (0 without a table); ``summed``, those added to another of the same name;
        ``left_out``, those of another species than the table's.

    Raises
    ------
    InputError
        Ids of several species, unless the table has those of one only; a table that matches no id, gives an id two
        symbols, or cannot be read.

    Notes
    -----
    Species is never guessed, and symbols are not looked at: "Cd74" stays "Cd74". Genes of one name are summed where
    different ids stand behind them (10x references have some), or where version or table made them equal. The same
    name twice, without an id that tells the two apart, stays for `Section` to refuse.
    """
    where = f"{where}: " if where else ""
    names = pd.Series(counts.var_names.astype(str), dtype=object)
    original = names
    if "gene_ids" in counts.var:
        behind = pd.Series(counts.var["gene_ids"].astype(object).to_numpy(), dtype=object)
        original = _either(behind.mask(behind == ""), names).astype(str).astype(object)
    own, behind = names.str.extract(ENSEMBL), original.str.extract(ENSEMBL)
    ids, species = (_either(behind[i], own[i]) for i in (0, 1))
    symbols = read_gene_table(table) if table is not None else {}
    key = _either(ids, original)
    matched = key.isin(symbols.keys())
    ids = _either(ids, key.where(matched))  # what a table calls an id is one
    new = _either(key.map(symbols), _either(own[0], names))

    if table is not None and ids.notna().any() and not matched.any():
        raise InputError(
            f"{where}none of {int(ids.notna().sum())} gene ids (first: {ids.dropna().iloc[0]}) is in {table} "
            f"(first: {next(iter(symbols))}); is it of another species?"
        )
    keep = _of_one_species(species, matched, where)
    codes, first = _groups(new[keep], original[keep], names[keep])
    report = {
        "given": len(names),
        "ids": int(ids.notna().sum()),
        "matched": int(matched.sum()),
        "unmatched": int((ids.notna() & ~matched).sum()) if table is not None else 0,
        "summed": int(keep.sum()) - len(first),
        "left_out": int((~keep).sum()),
    }
    _say(report, table, where)

    summed = _sum_equal(counts, np.flatnonzero(keep), codes, first, new.to_numpy())
    if ids.notna().any():
        summed.var["gene_ids"] = _joined(ids[keep], codes, len(first))
    summed.uns["gene_names"] = report
    return summed


def _sum_equal(
    counts: ad.AnnData, columns: np.ndarray, codes: np.ndarray, first: np.ndarray, names: np.ndarray
) -> ad.AnnData:
    """Counts with the `columns` of one code added up, named by the first of them; a new AnnData."""
    var = counts.var.iloc[columns[first]].set_axis(pd.Index(names[columns[first]]), axis=0)
    X = sp.csr_matrix(counts.X)
    if len(first) < counts.n_vars:
        to = sp.csr_matrix((np.ones(len(columns), X.dtype), (columns, codes)), shape=(counts.n_vars, len(first)))
        X = X @ to
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names that still occur twice are for `Section` to refuse
        return ad.AnnData(X, obs=counts.obs.copy(), var=var, obsm=dict(counts.obsm), uns=dict(counts.uns))


def _either(first: pd.Series, second: pd.Series) -> pd.Series:
    """`first`, and `second` where it is missing; fillna would guess another dtype."""
    return pd.Series(np.where(first.notna(), first, second), dtype=object)


def _joined(ids: pd.Series, codes: np.ndarray, n: int) -> list[str]:
    """The ids behind each output gene."""
    behind: list[dict[str, None]] = [{} for _ in range(n)]
    for code, has_id, gene in zip(codes, ids.notna(), ids, strict=True):
        if has_id:
            behind[code][gene] = None
    return [";".join(genes) for genes in behind]


def _of_one_species(species: pd.Series, matched: pd.Series, where: str) -> pd.Series:
    """Which genes to keep: all, or those that are not of a species that the table lacks altogether."""
    n = species.value_counts()
    if len(n) < 2:
        return pd.Series(True, index=species.index)
    mapped = species[matched].dropna().unique()
    if len(mapped) == 1:
        return species.isna() | (species == mapped[0])
    some = ", ".join(f"{count} {prefix}..." for prefix, count in n.items())
    raise InputError(
        f"{where}gene ids of {len(n)} species ({some}); counts of one of them, or a table of its ids and symbols "
        f"alone (data.gene_table=), would fit"
    )


def _groups(new: pd.Series, original: pd.Series, names: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Code of the output gene of each input gene, and the first input gene of each output gene."""
    # genes that nothing tells apart get codes of their own
    again = pd.DataFrame({"original": original, "names": names}).groupby(["original", "names"]).cumcount()
    keys = pd.MultiIndex.from_arrays([new, again])
    codes, _ = pd.factorize(keys)
    return codes, np.unique(codes, return_index=True)[1]


def _say(report: dict[str, int], table: str | Path | None, where: str) -> None:
    if table is None and not report["ids"] and not report["summed"]:
        return
    in_table = "" if table is None else f", {report['matched']} in {Path(table).name} and {report['unmatched']} not"
    left_out = f"; left out, of another species: {report['left_out']}" if report["left_out"] else ""
    log.info(
        "%s%d gene names, %d with an id%s; %d summed into one of the same name%s",
        where,
        report["given"],
        report["ids"],
        in_table,
        report["summed"],
        left_out,
    )


def read_gene_table(path: str | Path) -> dict[str, str]:
    """Symbols by id without version; ids with an empty symbol are left out. See `harmonise` for the layout."""
    table = read_table(user_path(path), "gene table", header=None, **TEXT)
    table = table.fillna("").apply(lambda column: column.str.strip())
    header = list(table.iloc[0].str.lower())
    if {"id", "symbol"} <= set(header):
        id_column, symbol_column = header.index("id"), header.index("symbol")
        table = table.iloc[1:]
    else:
        is_id = table.apply(lambda column: column.str.match(ENSEMBL))
        if table.shape[1] != 2 or not is_id.to_numpy().any():
            raise InputError(
                f"gene table {path}: two columns, one with Ensembl ids, or columns named id and symbol would fit; "
                f"it has {table.shape[1]} column(s): {', '.join(table.iloc[0])[:100]}"
            )
        id_column = int(is_id.sum().to_numpy().argmax())
        symbol_column = 1 - id_column
        if not is_id.iloc[0, id_column]:
            table = table.iloc[1:]
    ids = _either(table[id_column].str.extract(ENSEMBL)[0], table[id_column]).to_numpy()
    pairs = pd.DataFrame({"id": ids, "symbol": table[symbol_column].to_numpy()}).drop_duplicates()
    pairs = pairs[(pairs["id"] != "") & (pairs["symbol"] != "")]
    twice = pairs["id"][pairs["id"].duplicated()]
    if len(twice):
        both = " and ".join(pairs["symbol"][pairs["id"] == twice.iloc[0]])
        raise InputError(
            f"gene table {path}: {twice.nunique()} ids have more than one symbol (first: {twice.iloc[0]}, {both})"
        )
    if pairs.empty:
        raise InputError(f"gene table {path} gives no id a symbol")
    return dict(zip(pairs["id"], pairs["symbol"], strict=True))
