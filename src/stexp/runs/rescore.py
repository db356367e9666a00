"""Retrieve again from the embeddings of a run: other k, distance, weights, references or genes."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from stexp.data.genes import listed_genes
from stexp.data.section import Section
from stexp.errors import InputError, did_you_mean
from stexp.evaluation.audit import audit
from stexp.evaluation.contrast import NAME as CONTRAST
from stexp.evaluation.predictions import DIGEST
from stexp.evaluation.records import read_audit
from stexp.files import write_atomically
from stexp.models.correction import CORRECTION_EPOCHS
from stexp.runs.comparison import Comparison, kept_random_components
from stexp.runs.finished import FinishedRun
from stexp.runs.folder import RunFolder
from stexp.runs.provenance import command_line, now
from stexp.runs.results import describe_run, write_scored_files

log = logging.getLogger(__name__)


def predict_again(run: Path, changes: Mapping[str, Any], genes: str | list[str], output_dir: str | None) -> Path:
    """Predict the test spots of a finished run anew, without its encoders.

    Parameters
    ----------
    run
        Run folder of a retrieval method; its data must still be there.
    changes
        Some of ``k``, ``distance``, ``weighting``, ``reference``.
    genes
        ``panel``; ``all``: every gene measured in all references; or names.
    output_dir
        Where the new prediction goes; None: ``<run>/rescored/<what changed>``.

    Returns
    -------
    Path
        A folder with ``predictions.h5ad``, ``floors.h5ad``, ``audit.json`` and the run's ``provenance.json``.

    Raises
    ------
    InputError
        The run kept no embeddings, its data changed, or a gene is not measured in the references.
    """
    if not (run / "embeddings.h5ad").is_file():
        raise InputError(f"{run} has no embeddings.h5ad: it is unfinished, or its method does not retrieve")
    source = FinishedRun(RunFolder(run))
    embeddings, as_run = source.for_retrieval
    panel = source.panel
    if genes != "panel":
        in_run = set(embeddings.obs["section"])
        panel = choose_genes(genes, [section for section in source.sections if section.name in in_run])
    uncorrected = {"correct": False} if source.corrects else {}
    if source.corrects:
        log.warning("the correction of %s (model.correct) is left out: retrieved again is what is retrieved alone", run)
    data, how = source.serve(panel), replace(as_run, **changes)
    prediction, rows = source.retrieve(data, how)
    named = source.named_prototypes(rows)
    quality = source.predictions.obs.filter(like="qc_").reset_index(drop=True)
    prediction = replace(prediction, obs=pd.concat([prediction.obs, quality], axis=1))

    changed, folder = changed_settings(changes, genes), rescored_folder(run, changes, genes, output_dir)
    log.info(
        "predicted %d spots x %d genes again from %d references (%s)",
        len(prediction.predicted),
        len(panel),
        len(rows),
        folder_name(changed),
    )
    chosen = {
        **({} if changes else {key: value for key, value in source.chosen.items() if key != CORRECTION_EPOCHS}),
        **{"k": how.k, "rescored_from": run.resolve().name, "changed": changed},
    }
    config = {**source.config, "model": {**source.config["model"], **asdict(how), **uncorrected}}
    facts: dict = {**read_audit(run)["facts"], "reference": list(data.spots["section"].iloc[rows].unique())}
    if changes:
        facts["k_chosen_on"] = "after_scoring"
    if genes != "panel":
        facts["panel_saw_test"] = []
    record: dict = {
        **source.provenance,
        "trained_by": source.provenance["command"],
        "command": command_line(),
        "date": now(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    kept = embeddings.obsm
    random = kept_random_components(embeddings)
    beside = Comparison.of(data, kept["features"], kept["colour"], random)
    record[DIGEST] = write_scored_files(folder, data, prediction, beside, describe_run(config, data, chosen), named)
    write_atomically(folder / "audit.json", json.dumps(audit(source.protocol, facts), indent=1))
    write_atomically(folder / "provenance.json", json.dumps(record, indent=1))
    write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    if (run / CONTRAST).is_file():  # of the training, which is the same
        shutil.copyfile(run / CONTRAST, folder / CONTRAST)
    return folder


def rescored_folder(run: Path, changes: Mapping[str, Any], genes: str | list[str], output_dir: str | None) -> Path:
    """Where :func:`predict_again` writes: `output_dir`, or ``<run>/rescored/<what changed>``."""
    return Path(output_dir) if output_dir else run / "rescored" / folder_name(changed_settings(changes, genes))


def changed_settings(changes: Mapping[str, Any], genes: str | list[str]) -> dict[str, Any]:
    return {**changes, **({} if genes == "panel" else {"genes": genes})}


def choose_genes(genes: str | list[str], sections: list[Section]) -> list[str]:
    """``all`` genes that some sections have in common, or names that are checked against these."""
    common = set.intersection(*(set(section.genes) for section in sections))
    if genes == "all":
        return sorted(common)
    names = listed_genes(genes)
    missing = [name for name in names if name not in common]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} genes are not measured in every section: {', '.join(missing[:5])}"
            f"{did_you_mean(missing[0], common)}"
        )
    return names


def folder_name(changes: Mapping[str, Any]) -> str:
    """Name of a folder by what changed; long lists are shortened by a digest that keeps them apart."""
    parts = []
    for key, value in changes.items():
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        if len(text) > 40:
            text = f"{text[:24]}..{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
        parts.append(f"{key}={text}".replace("/", "_"))
    return ",".join(parts) or "same"
