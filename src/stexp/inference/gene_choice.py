"""The genes that ``genes=`` asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from stexp.data.genes import listed_genes
from stexp.errors import InputError, did_you_mean
from stexp.inference import model_facts, model_folder


def choose_genes(genes: str | Sequence[str], panel: list[str], predicted: pd.Index) -> list[str]:
    """Names of the genes asked for: ``panel``, ``all`` that a model predicts, or some of them.

    Raises
    ------
    InputError
        A gene that is not predicted, or named twice, or none.
    """
    if isinstance(genes, str) and genes in ("panel", "all"):
        return panel if genes == "panel" else list(predicted)
    names = listed_genes(genes)
    unknown = [name for name in names if name not in predicted]
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(names)} genes are not among the {len(predicted)} that this model predicts: "
            f"{', '.join(unknown[:5])}{did_you_mean(unknown[0], predicted)}"
        )
    return names


def check_genes(folder: Path, genes: str | Sequence[str]) -> None:
    """InputError for genes that an exported model does not predict; its weights are not read."""
    if not (folder / "model.json").is_file():
        raise InputError(f"{folder} is no exported model: it has no model.json")
    facts = model_facts.read_json(folder / "model.json")
    if facts.get("format") != model_folder.FORMAT:
        return  # refused where it is read
    model_facts.check(facts)
    choose_genes(genes, facts["panel"], model_folder.read_genes(folder / "genes.csv", facts).index)
