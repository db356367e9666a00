"""Score a run folder: ``metrics.json`` and ``per_gene.csv`` from its predictions and floors, without torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.section import Section
from stexp.documents import parse_json
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.evaluation.contrast import read_contrast
from stexp.evaluation.coverage import FOREIGN, coverage_of, covered, describe_coverage, foreign_facts
from stexp.evaluation.evidence import evidence
from stexp.evaluation.floors import ORACLES
from stexp.evaluation.records import AGAIN, Chosen, read_audit, read_metrics
from stexp.evaluation.score import floors_of, score_under, truth
from stexp.files import write_atomically, write_csv
from stexp.protocol import Protocol, other_protocols
from stexp.runs.provenance import changed_sections

log = logging.getLogger(__name__)


def score_run(run: Path, gene_sets: Mapping[str, Sequence[str]] | None = None) -> dict:
    """Score a run under its own protocol and the others, and write ``metrics.json`` and ``per_gene.csv``.

    Under another protocol's truth the predictions keep their scale, so correlations count and errors do not,
    unless the two truths are the same. The split stays that of the run.

    Parameters
    ----------
    gene_sets
        Sets that are scored as wholes; None: modules of genes that vary together on the training side.
    """
    observed = predictions.read(run / "predictions.h5ad", *predictions.OF_RUN)
    floors = predictions.read(run / "floors.h5ad", "uns/ceiling")
    facts, own = observed.uns["stexp"], predictions.protocol_of(observed)
    scored, genes = {}, None
    for protocol in (own, *other_protocols(own).values()):
        if protocol is not own and f"{protocol.name}:mean" not in floors.layers:
            continue  # a protocol that came after the run
        _check_floors(floors, observed, protocol, run / "floors.h5ad")
        scored[protocol.name], table = score_under(protocol, own, observed, floors)
        genes = table if protocol is own else genes
    mine = scored.pop(own.name)
    assert genes is not None
    sets = gene_sets or parse_json(str(floors.uns.get("gene_sets", "{}")))
    behind, columns = _evidence(observed, floors, own, genes, mine["sections"], sets)
    genes = genes.join(columns)
    metrics = {
        "protocol": own.name,
        **({"truth": own.truth} if own.truth == "residuals" else {}),  # which no named protocol has
        "fold": str(facts["fold"]),
        "model": str(facts["model"]),
        "data": str(facts["data"]),
        "scores": mine["scores"],
        "floors": mine["floors"],
        "ceiling": mine["ceiling"],
        **({"floor_spread": mine["floor_spread"]} if mine["floor_spread"] else {}),
        "oracle_floors": sorted(ORACLES & set(mine["floors"])),
        "n_spots": sum(section["n_spots"] for section in mine["sections"].values()),
        "n_genes": observed.n_vars,
        "n_constant_genes": sum(section["n_constant_genes"] for section in mine["sections"].values()),
        "chosen": predictions.read_fact(observed, "chosen", Chosen),
        "sections": mine["sections"],
        "evidence": behind,
        "scored_as": {
            name: {key: part[key] for key in ("scores", "floors", "ceiling")} for name, part in scored.items()
        },
    }
    elsewhere = foreign_facts(observed)
    if elsewhere is not None:
        metrics[FOREIGN] = {**elsewhere, "coverage": describe_coverage(observed)}
    if (run / "audit.json").is_file():
        metrics["leaks"] = [item["name"] for item in read_audit(run)["items"] if item["leak"]]
    contrast = read_contrast(run)
    if contrast is not None:
        metrics["contrast"] = contrast
    if predictions.changed_since_run(run):
        metrics["predictions_changed"] = True
    write_csv(genes, run / "per_gene.csv")
    write_atomically(run / "metrics.json", json.dumps(metrics, indent=1))
    return metrics


def score_finished(run: Path, sections: list[Section]) -> dict:
    """``metrics.json`` of a run that is finished, where the same command is given again.

    It is scored anew where the file is missing or its predictions were changed, with the gene sets that it names.

    Raises
    ------
    InputError
        The data changed since.
    """
    changed = changed_sections(run, sections)
    if changed:
        raise InputError(
            f"{run} is finished, and its data changed since ({', '.join(changed[:5])}); choose another output_dir, or "
            f"overwrite=true to start anew"
        )
    log.info("%s is finished; give overwrite=true to make it again", run)
    if not all((run / name).is_file() for name in ("metrics.json", "per_gene.csv")):
        return score_run(run)
    if not predictions.changed_since_run(run):
        predictions.read_annotations(run / "floors.h5ad")  # a damaged one is said
        return {**read_metrics(run)}
    sets = read_metrics(run).get("evidence", {}).get("gene_sets", [])
    return score_run(run, {each["set"]: each["genes"] for each in sets})


def _evidence(
    observed: ad.AnnData,
    floors: ad.AnnData,
    own: Protocol,
    genes: pd.DataFrame,
    sections: Mapping[str, Mapping],
    sets: Mapping[str, Sequence[str]],
) -> tuple[dict, pd.DataFrame]:
    """`evidence` on the spots and genes that are predicted."""
    coverage = coverage_of(observed)
    on = np.ix_(coverage.spots, coverage.genes)
    layers = {name: values[on] for name, values in floors_of(floors, own).items()}
    return evidence(covered(observed), truth(observed, own)[on], layers, genes[coverage.genes], sections, sets)


def _check_floors(floors: ad.AnnData, observed: ad.AnnData, protocol: Protocol, path: Path) -> None:
    ceiling = floors.uns["ceiling"].get(protocol.name, {})
    sections = observed.obs["section"].unique()
    lacking = [name for name in sections if np.shape(ceiling.get(name)) != (observed.n_vars,)]
    if list(floors.var_names) != list(observed.var_names):
        problem = "is of other genes than predictions.h5ad"
    elif list(floors.obs_names) != list(observed.obs_names):
        problem = "is of other spots than predictions.h5ad"
    elif f"{protocol.name}:mean" not in floors.layers:
        problem = f"has no floors under protocol {protocol.name}"
    elif lacking:
        problem = f"has no ceiling of section {', '.join(lacking)} under protocol {protocol.name}"
    else:
        return
    raise InputError(f"{path} {problem}; delete it and {AGAIN}")
