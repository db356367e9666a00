"""The prototypes of a method that searches these instead of spots, and the file that keeps them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stexp.errors import InputError
from stexp.inference.bank import Bank, read_label, read_names
from stexp.inference.tensors import FLOATS, INTEGERS, damaged, read_arrays, write_arrays
from stexp.protocol import Protocol


@dataclass(frozen=True)
class PrototypeBank:
    """P prototypes and the expression of G genes of the whole transcriptome that they stand for.

    Parameters
    ----------
    embedding : (P, D) float32
    section, patient : (P,) str
        What most of its spots are of.
    spot : (P,) str
        Its name, and how many spots it stands for.
    values : (P, G) float32
        Mean expression of its spots, normalised as in training.
    genes
        Measured in every section.
    """

    embedding: np.ndarray
    section: np.ndarray
    patient: np.ndarray
    spot: np.ndarray
    values: np.ndarray
    genes: list[str]

    def __len__(self) -> int:
        return len(self.embedding)

    def spots(self) -> pd.DataFrame:
        """Section, patient and name of every prototype; the index is its name without the number of its spots."""
        table = pd.DataFrame({"section": self.section, "patient": self.patient, "spot": self.spot})
        return table.set_index(table["spot"].str.partition(" of ")[0].to_numpy())

    def expression(self, genes: list[str], protocol: Protocol, panel: list[str]) -> np.ndarray:
        """As :meth:`stexp.inference.bank.Bank.expression`: here it is kept as it was normalised."""
        return self.values[:, pd.Index(self.genes).get_indexer(genes)]

    def without(self, sections: set[str]) -> PrototypeBank:
        """Refused: the spots of a slide are in means with others."""
        raise InputError(
            "exclude_slide=true: prototypes (model.prototypes) are means over spots of several slides, from which none "
            "can be taken; exclude_slide=false would fit, or a model without prototypes"
        )


AnyBank = Bank | PrototypeBank


def write_prototype_bank(path: Path, bank: PrototypeBank, dtype: str = "float32") -> None:
    """Write prototypes, embeddings and expression as `dtype`.

    Raises
    ------
    InputError
        Numbers beyond what `dtype` holds.
    """
    with np.errstate(over="ignore"):
        arrays = {"embedding": bank.embedding.astype(dtype), "values": bank.values.astype(dtype)}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise InputError(f"embeddings or expression go beyond what {dtype} holds; take bank=float32")
    names: dict[str, list[str]] = {"genes": bank.genes, "spot": bank.spot.tolist()}
    for key, labels in (("section", bank.section), ("patient", bank.patient)):
        codes, categories = pd.factorize(labels)
        arrays[key], names[key] = codes.astype(np.int32), [str(name) for name in categories]
    write_arrays(path, arrays, {key: json.dumps(value) for key, value in names.items()})


_NEEDED = {"embedding": (FLOATS, 2), "values": (FLOATS, 2), "section": (INTEGERS, 1), "patient": (INTEGERS, 1)}


def read_prototype_bank(path: Path) -> PrototypeBank:
    """Read what `write_prototype_bank` wrote.

    Raises
    ------
    InputError
        Arrays that do not fit each other, codes out of range, a gene or a prototype twice.
    """
    arrays, texts = read_arrays(path, _NEEDED, {})
    names = {key: read_names(path, key, texts.get(key)) for key in ("genes", "spot", "section", "patient")}
    n, n_genes = len(arrays["embedding"]), len(names["genes"])
    fits = arrays["values"].shape == (n, n_genes) and all(len(arrays[key]) == n for key in ("section", "patient"))
    if not fits or len(names["spot"]) != n or not n or not n_genes or not arrays["embedding"].shape[1]:
        raise damaged(path, f"it names {len(names['spot'])} prototypes and {n_genes} genes, and embeds {n}")
    if len(set(names["genes"])) < n_genes:
        raise damaged(path, "it names a gene twice")
    labels = {key: read_label(path, key, arrays[key], names[key]) for key in ("section", "patient")}
    bank = PrototypeBank(
        embedding=arrays["embedding"].astype(np.float32),
        section=labels["section"],
        patient=labels["patient"],
        spot=np.array(names["spot"]),
        values=arrays["values"].astype(np.float32),
        genes=names["genes"],
    )
    if not bank.spots().index.is_unique:
        raise damaged(path, "it names a prototype twice")
    return bank
