"""The reference spots of a method that retrieves, and the file that keeps them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.data.genes import normalise
from stexp.errors import InputError
from stexp.inference.tensors import COUNTS, FLOATS, INTEGERS, damaged, read_arrays, write_arrays
from stexp.protocol import Protocol

LONGEST = 1000
"""Letters of a name: arrays of names are as wide as the longest."""


@dataclass(frozen=True)
class Bank:
    """The reference spots of a method that retrieves: N spots, G genes of the whole transcriptome.

    Parameters
    ----------
    embedding : (N, D) float32
    section, patient, spot : (N,) str
        Where they are from, and their ids there.
    counts : (N, G) CSR
        Raw.
    total_counts : (N,)
        Over all genes of the spot's section, those outside `genes` too.
    genes
        Measured in every section.
    rest : (S, G) CSR or None
        Per section, in the order they appear, the counts of its spots that are not references: what a truth that
        scales every gene by its total over the section needs.
    """

    embedding: np.ndarray
    section: np.ndarray
    patient: np.ndarray
    spot: np.ndarray
    counts: sp.csr_matrix
    total_counts: np.ndarray
    genes: list[str]
    rest: sp.csr_matrix | None = None

    def __len__(self) -> int:
        return len(self.embedding)

    def spots(self) -> pd.DataFrame:
        """Section, patient and spot of every reference, named by section and spot."""
        table = pd.DataFrame({"section": self.section, "patient": self.patient, "spot": self.spot})
        return table.set_index(table["section"] + ":" + table["spot"])

    def expression(self, genes: list[str], protocol: Protocol, panel: list[str]) -> np.ndarray:
        """Normalised as in training, (N, len(genes)) float32; where libraries are those of a panel, of `panel`."""
        columns = pd.Index(self.genes)
        position, total = columns.get_indexer(genes), self.total_counts
        if protocol.truth == "spot" and protocol.library == "panel":
            total = np.asarray(self.counts[:, columns.get_indexer(panel)].sum(axis=1), dtype=np.float64).ravel()
            protocol = replace(protocol, library="transcriptome")
        counts = self.counts[:, position].toarray()
        if self.rest is None:
            return normalise(counts, total, protocol)
        out = np.empty(counts.shape, dtype=np.float32)
        rest = self.rest[:, position].toarray()
        for i, name in enumerate(pd.unique(self.section)):
            of_section = self.section == name
            # one more row stands for all other spots of the section
            whole = np.concatenate([counts[of_section], rest[i : i + 1]])
            out[of_section] = normalise(whole, np.zeros(len(whole)), protocol)[:-1]
        return out

    def take(self, rows: np.ndarray) -> Bank:
        """The references `rows`, ascending; the others join the rest of their section."""
        rest = self.rest
        if rest is not None:
            names = pd.unique(self.section)
            if set(names) != set(self.section[rows]):
                raise InputError("a section would lose all its references; keep more of them")
            left = np.setdiff1d(np.arange(len(self)), rows)
            code = pd.Categorical(self.section[left], categories=names).codes
            gather = sp.csr_matrix((np.ones(len(left)), (code, np.arange(len(left)))), (len(names), len(left)))
            rest = sp.csr_matrix(rest + gather @ self.counts[left])
        return self._rows(rows, rest)

    def without(self, sections: set[str]) -> Bank:
        """The references of other sections than these.

        Raises
        ------
        InputError
            None would be left.
        """
        rows = np.flatnonzero(~np.isin(self.section, sorted(sections)))
        if not len(rows):
            raise InputError("exclude_slide=true leaves no reference: all are of this slide; give exclude_slide=false")
        # the rest of a section that is left out goes with it
        rest = self.rest
        if rest is not None:
            rest = rest[[i for i, name in enumerate(pd.unique(self.section)) if name not in sections]]
        return self._rows(rows, rest)

    def _rows(self, rows: np.ndarray, rest: sp.csr_matrix | None) -> Bank:
        return Bank(
            self.embedding[rows],
            self.section[rows],
            self.patient[rows],
            self.spot[rows],
            self.counts[rows],
            self.total_counts[rows],
            self.genes,
            rest,
        )


def write_bank(path: Path, bank: Bank, embedding_dtype: str = "float32") -> None:
    """Write a bank, each array in the smallest type that holds it.

    Raises
    ------
    InputError
        Embeddings beyond what `embedding_dtype` holds.
    """
    with np.errstate(over="ignore"):
        embedding = bank.embedding.astype(embedding_dtype)
    if not np.isfinite(embedding).all():
        raise InputError(f"embeddings go beyond what {embedding_dtype} holds; take bank=float32")
    arrays = {"embedding": embedding, "total_counts": bank.total_counts.astype(np.float64)}
    names = {"genes": bank.genes, "spot": bank.spot.tolist()}
    for key, values in (("section", bank.section), ("patient", bank.patient)):
        codes, names[key] = pd.factorize(values)
        arrays[key], names[key] = codes.astype(np.int32), [str(name) for name in names[key]]
    for key, matrix in (("counts", bank.counts), ("rest", bank.rest)):
        if matrix is not None:
            matrix = sp.csr_matrix(matrix)
            for part in ("data", "indices", "indptr"):
                values = getattr(matrix, part)
                arrays[f"{key}.{part}"] = values.astype(np.min_scalar_type(int(values.max(initial=0))))
    write_arrays(path, arrays, {key: json.dumps(value) for key, value in names.items()})


_MATRIX = {part: (COUNTS, 1) for part in ("data", "indices", "indptr")}
_NEEDED = {
    "embedding": (FLOATS, 2),
    "total_counts": (FLOATS, 1),
    "section": (INTEGERS, 1),
    "patient": (INTEGERS, 1),
    **{f"counts.{part}": kind for part, kind in _MATRIX.items()},
}
_OPTIONAL = {f"rest.{part}": kind for part, kind in _MATRIX.items()}


def read_bank(path: Path) -> Bank:
    """Read what `write_bank` wrote.

    Raises
    ------
    InputError
        Arrays that do not fit each other: lengths, codes out of range, indices outside a matrix, no finite numbers,
        a gene or a spot twice.
    """
    arrays, texts = read_arrays(path, _NEEDED, _OPTIONAL)
    names = {key: read_names(path, key, texts.get(key)) for key in ("genes", "spot", "section", "patient")}
    n, n_genes = len(arrays["embedding"]), len(names["genes"])
    for key in ("section", "patient", "total_counts"):
        if len(arrays[key]) != n:
            raise damaged(path, f"{key} is of {len(arrays[key])} spots, embedding of {n}")
    if len(names["spot"]) != n or not n or not arrays["embedding"].shape[1]:
        raise damaged(path, f"it names {len(names['spot'])} spots and embeds {n}")
    if len(set(names["genes"])) < n_genes or not n_genes:
        raise damaged(path, "it names a gene twice, or none")
    if (arrays["total_counts"] < 0).any():
        raise damaged(path, "total_counts are below 0")
    labels = {key: read_label(path, key, arrays[key], names[key]) for key in ("section", "patient")}
    bank = Bank(
        embedding=arrays["embedding"].astype(np.float32),
        section=labels["section"],
        patient=labels["patient"],
        spot=np.array(names["spot"]),
        counts=_matrix(path, "counts", arrays, (n, n_genes)),
        total_counts=arrays["total_counts"].astype(np.float64),
        genes=names["genes"],
        rest=_matrix(path, "rest", arrays, (len(set(labels["section"])), n_genes)) if "rest.data" in arrays else None,
    )
    if not bank.spots().index.is_unique:
        raise damaged(path, "it names a spot of a section twice")
    return bank


def read_names(path: Path, key: str, text: str | None) -> list[str]:
    """Names that stand as JSON in a file's texts."""
    try:
        names = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{key}: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and len(name) <= LONGEST for name in names):
        raise damaged(path, f"{key} is no list of names of at most {LONGEST} letters")
    return names


def read_label(path: Path, key: str, codes: np.ndarray, names: list[str]) -> np.ndarray:
    """The name that each code stands for."""
    if not names or codes.min() < 0 or codes.max() >= len(names):
        raise damaged(path, f"{key} has codes from {codes.min()} to {codes.max()}, and {len(names)} names")
    return np.array(names)[codes]


def _matrix(path: Path, key: str, arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> sp.csr_matrix:
    data, indices, indptr = (arrays[f"{key}.{part}"] for part in ("data", "indices", "indptr"))
    whole = indptr.astype(np.int64)
    fits = len(indptr) == shape[0] + 1 and len(data) == len(indices) == whole[-1] and whole[0] == 0
    if not fits or (np.diff(whole) < 0).any():
        raise damaged(path, f"{key} is no matrix of {shape[0]} rows")
    if len(indices) and (int(indices.max()) >= shape[1] or int(indices.min()) < 0 or int(data.min()) < 0):
        raise damaged(path, f"{key} counts less than 0, or genes beyond its {shape[1]}")
    return sp.csr_matrix((data.astype(np.float32), indices.astype(np.int64), whole), shape)
