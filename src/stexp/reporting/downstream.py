"""Other formats and downstream analysis of what was predicted, in the folder of the prediction; needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd

from stexp.data.readers.gene_sets import read_gene_sets
from stexp.errors import InputError, did_you_mean
from stexp.evaluation import predictions
from stexp.evaluation.coverage import covered
from stexp.evaluation.spatial import variable_genes
from stexp.files import write_atomically, write_csv
from stexp.reporting import differences, exports
from stexp.reporting.domain_comparison import compare_domains
from stexp.reporting.domains import DOMAINS, LAYERS, METHODS, agreement, default_method, read_labels, spatial_domains
from stexp.reporting.gene_sets import gene_set_scores
from stexp.reporting.references import neighbour_table

NEEDED = ("layers/predicted", "obs/section", "obsm/spatial", "uns/stexp")


def wanted(cfg: dict) -> bool:
    """Whether the keys ask for anything."""
    keys = ("domains", "variable_genes", "gene_sets", "neighbours", "against")
    return bool(cfg["exports"]) or any(cfg["downstream"][key] not in (None, False) for key in keys)


def check(cfg: dict) -> None:
    """InputError for keys that are wrong whatever is predicted; single names become lists in place."""
    chosen = cfg["downstream"]
    for keys, key in ((cfg, "exports"), (cfg, "export_genes"), (chosen, "neighbours")):
        if keys[key] is not None and keys[key] != "all":
            several = keys[key] if isinstance(keys[key], list) else [keys[key]]
            keys[key] = [str(each) for each in several]
    cfg["exports"] = cfg["exports"] or []
    exports.check(cfg["exports"])
    if chosen["gene_sets"] is not None:
        chosen["gene_sets"] = str(chosen["gene_sets"])
    for key, names in (("domains", (None, *DOMAINS)), ("method", (None, *METHODS)), ("expression", LAYERS)):
        if chosen[key] not in names:
            choices = [name for name in names if name]
            near = did_you_mean(str(chosen[key]), choices)
            raise InputError(f"downstream.{key}={chosen[key]}: choose {', '.join(choices)}{near}")
    if chosen["gene_sets"] is not None:
        read_gene_sets(chosen["gene_sets"])
    if chosen["against"] is not None and not Path(str(chosen["against"])).is_dir():
        raise InputError(f"downstream.against={chosen['against']} is no folder; give a run or a predicted slide")


def folders(run: Path) -> list[Path]:
    """The folder, or those in it that hold predictions."""
    if (run / "predictions.h5ad").is_file():
        return [run]
    slides = sorted(path.parent for path in run.glob("*/predictions.h5ad"))
    if not slides:
        raise InputError(f"{run} holds no predictions.h5ad; give a run, or what stexp-predict wrote")
    return slides


def analyse(folder: Path, cfg: dict) -> list[str]:
    """Write what ``conf/analyse.yaml`` asks for into ``<folder>/downstream`` and ``<folder>/exports``.

    Returns
    -------
    list of str
        Results and files written, for the terminal.

    Raises
    ------
    InputError
        The predictions lack what is asked for; see the functions called here.
    """
    adata, chosen = covered(predictions.read(folder / "predictions.h5ad", *NEEDED)), cfg["downstream"]
    tables: dict[str, pd.DataFrame] = {}
    lines: list[str] = []
    if chosen["domains"] is not None:
        tables |= _domains(adata, chosen, lines)
    if chosen["variable_genes"]:
        table = tables["variable_genes"] = variable_genes(adata)
        lines.append(f"most variable in space: {', '.join(table['gene'][:5])}")
        if "observed" in table:
            both = table[["predicted", "observed"]].dropna()
            lines.append(f"Moran's I, predicted with observed: rank correlation {both.corr('spearman').iloc[0, 1]:.3f}")
    if chosen["gene_sets"] is not None:
        scores, tables["gene_sets"] = gene_set_scores(adata, read_gene_sets(chosen["gene_sets"]))
        tables["gene_set_scores"] = scores
        for name in scores:
            adata.obs[f"score_{name}"] = scores[name]
        lines += [
            f"gene set {row.set}: {row.n_predicted} of {row.n_genes} genes"
            + ("" if pd.isna(getattr(row, "pearson", None)) else f", Pearson with the observed score {row.pearson:.3f}")
            for row in tables["gene_sets"].itertuples()
        ]
    if chosen["neighbours"] is not None:
        tables["neighbours"] = neighbour_table(adata, chosen["neighbours"])
    written = _write(folder / "downstream", tables, chosen) if tables else []
    if chosen["against"] is not None:
        written += _differences(adata, folder, Path(str(chosen["against"])), lines)
    if cfg["exports"]:
        written += exports.export(adata, folder / "exports", cfg["exports"], cfg["export_genes"])
    return [*lines, *(f"wrote {path}" for path in written)]


def _domains(adata: ad.AnnData, chosen: dict[str, Any], lines: list[str]) -> dict[str, pd.DataFrame]:
    """Tables of domains, which ``obs`` gets too, of their agreement with labels, and of other ways to make them."""
    by, options = chosen["domains"], {key: chosen[key] for key in ("n_domains", "resolution", "smooth")}
    method = chosen["method"] = chosen["method"] or default_method(by)
    domains = spatial_domains(adata, by, method=method, expression=chosen["expression"], **options)
    adata.obs["domain"] = domains
    layer = "" if by == "image" else f" ({chosen['expression']} expression)"
    lines.append(f"{len(domains.categories)} domains by {by}{layer}, {method}")
    tables = {"domains": adata.obs[["section", "domain"]]}
    labels = read_labels(adata, chosen["labels"])
    if labels is not None and labels.notna().any():
        table = agreement(domains, labels, adata.obs["section"].to_numpy(str))
        tables["domains_agreement"] = table.set_index("section")
        lines += [
            f"with the labels of {row.section}: ARI {row.ari:.3f}, NMI {row.nmi:.3f} ({row.n_spots} spots)"
            for row in table.itertuples()
        ]
    if by == "multimodal":
        tables["domains_compared"] = compare_domains(adata, labels, **options)
        lines += [_compared(row) for row in tables["domains_compared"].to_dict("records")]
    return tables


def _compared(row: dict[str, Any]) -> str:
    parts = [f"ARI of three seeds with each other {row['over_seeds']:.3f}"]
    if not pd.isna(row["with_observed"]):
        parts.append(f"with those by observed expression {row['with_observed']:.3f}")
    if "ari" in row:
        parts.append(f"with the labels of {row['section']} {row['ari']:.3f}, NMI {row['nmi']:.3f}")
    return f"{row['domains']}, {row['method']}, {row['expression']} expression: {'; '.join(parts)}"


def _write(folder: Path, tables: dict[str, pd.DataFrame], chosen: dict[str, Any]) -> list[Path]:
    """Write tables by name, and the settings that made them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        index = None if isinstance(table.index, pd.RangeIndex) else str(table.index.name or "spot")
        write_csv(table, folder / f"{name}.csv", index)
    write_atomically(folder / "settings.json", json.dumps(chosen, indent=1))
    return [folder / f"{name}.csv" for name in tables]


def _differences(adata: ad.AnnData, folder: Path, against: Path, lines: list[str]) -> list[Path]:
    """Write the differences from another prediction; of one of several slides, from that of its name."""
    same = against / folder.name
    other = same if (same / "predictions.h5ad").is_file() else against
    table, maps = differences.compare(adata, covered(predictions.read(other / "predictions.h5ad", *NEEDED)))
    out = folder / "downstream"
    out.mkdir(parents=True, exist_ok=True)
    write_csv(table, out / "differences.csv")
    predictions.write(maps, out / "differences.h5ad")
    lines.append(
        f"with {other}: median Pearson {table['pearson'].median():.3f}, median RMSD {table['rmsd'].median():.3g}"
    )
    return [out / "differences.csv", out / "differences.h5ad", differences.draw(table, maps, out / "differences.png")]
