"""Named sets of genes, from the files that collections of them come in."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

from stexp.documents import parse_yaml
from stexp.errors import InputError


def read_gene_sets(path: str | Path) -> dict[str, list[str]]:
    """Gene sets of a gmt (MSigDB), a yaml or json (name: [genes]), or a csv or tsv (columns set, gene).

    Raises
    ------
    InputError
        No such file, or not of that form.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"gene_sets={path} does not exist")
    try:
        sets = _parse_gene_sets(path, path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:  # not text, not a table, not YAML
        raise InputError(f"gene sets {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not sets or not all(sets.values()):
        raise InputError(f"gene sets {path}: there is none, or one without genes")
    return {name: list(dict.fromkeys(genes)) for name, genes in sets.items()}


def _parse_gene_sets(path: Path, text: str) -> dict[str, list[str]]:
    suffix = path.suffix.lower()
    if suffix == ".gmt":
        rows = [line.split("\t") for line in text.splitlines() if line.strip()]
        return {row[0]: [gene.strip() for gene in row[2:] if gene.strip()] for row in rows}
    if suffix in (".yaml", ".yml", ".json"):
        content = parse_yaml(text)
        if not isinstance(content, dict) or not all(isinstance(genes, list) for genes in content.values()):
            raise InputError(f"gene sets {path} cannot be read: it is no mapping of names to lists of genes")
        return {str(name): [str(gene) for gene in genes] for name, genes in content.items()}
    if suffix in (".csv", ".tsv"):
        table = pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
        if not {"set", "gene"} <= set(table):
            raise InputError(f"gene sets {path} cannot be read: it lacks the columns set and gene")
        return {str(name): list(genes) for name, genes in table.groupby("set", sort=False)["gene"]}
    raise InputError(f"gene sets {path}: gmt, yaml, json, csv or tsv would fit")
