"""Predictions that another tool made, scored as those of a run of ours and left as a run folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch

from stexp.data.cohorts import batch_effects
from stexp.data.datamodule import SpotDataModule
from stexp.data.quality import Thresholds
from stexp.data.section import Section, check_name
from stexp.data.splits import units
from stexp.errors import InputError
from stexp.evaluation.audit import audit_foreign
from stexp.evaluation.foreign import training
from stexp.evaluation.foreign.align import align
from stexp.evaluation.foreign.files import predictions_of
from stexp.evaluation.foreign.names import check_sections, names_of, rename_genes
from stexp.evaluation.foreign.scales import check_scale
from stexp.evaluation.predictions import DIGEST, protocol_of, read_fact
from stexp.files import alone_in, write_atomically
from stexp.models.method import Prediction
from stexp.protocol import Protocol
from stexp.runs.comparison import Comparison, colours, random_components
from stexp.runs.folder import PREDICTIONS, RunFolder
from stexp.runs.provenance import Stages, provenance
from stexp.runs.results import describe_run, quality_of_test, write_scored_files
from stexp.runs.scale import put_on_scale
from stexp.runs.scoring import score_finished, score_run
from stexp.training.duplicates import compare_tiles
from stexp.training.machine import Machine

log = logging.getLogger(__name__)


def evaluate(
    predicted: ad.AnnData,
    data: SpotDataModule,
    config: Mapping[str, Any],
    *,
    sections: Sequence[Section],
    thresholds: Thresholds,
    machine: Machine,
    name: str,
    trained_on: Sequence[str] | None = None,
    scale: str | None = None,
    genes_chosen_on: Sequence[str] | None = None,
    own_panel: bool = False,
    gene_table: str | Path | None = None,
    command: str | None = None,
    overwrite: bool = False,
) -> dict:
    """Score predictions that no run of ours made, and leave a run folder without a model.

    Truth, floors, ceiling and highest genes are those of the fold that `data` serves; its training side is what the
    floors learn from. The report is the caller's to write
    (:func:`~stexp.reporting.report.write_report`), and the folder is finished with it.

    Parameters
    ----------
    predicted : AnnData, spots x genes
        See :func:`~stexp.evaluation.foreign.files.predictions_of`; genes by symbol or Ensembl id.
    data
        One fold; with an encoder the floors on frozen features are there, too.
    config
        ``config.yaml`` of the run, every value in place, ``output_dir`` too.
    sections
        All of the data set, where the fold leaves some out.
    thresholds
        What flags a spot.
    machine
        That features were computed with, for the record.
    name
        Of the method, beside its scores.
    trained_on
        Sections of the data set that the method was trained, validated or tuned on, as whoever predicted states it;
        empty: none of them; None: not stated, unless predictions of a model of ours say it.
    scale
        One of :data:`~stexp.evaluation.foreign.scales.NAMES`; None: not named, see
        :func:`~stexp.runs.scale.put_on_scale`.
    genes_chosen_on
        Sections that the predicted genes were chosen on; None: not stated.
    own_panel
        Whether the panel of the fold is that of the predictions.
    gene_table
        See :func:`~stexp.data.gene_names.read_gene_table`.
    command
        What was called, for the record; None: the command that runs.
    overwrite
        Start anew where the folder holds another run.

    Returns
    -------
    dict
        ``metrics.json``; ``elsewhere`` holds what was stated, recognised, missing and left over.

    Raises
    ------
    InputError
        Predictions that do not fit the fold, see :func:`~stexp.evaluation.foreign.align.align`; a statement about
        sections or scales that there are not; a folder that holds another run.
    """
    check_name(name, "name")
    if scale is not None:
        check_scale(scale)
    trained_on, genes_chosen_on = _stated(trained_on), _stated(genes_chosen_on)
    for key, value in (("trained_on", trained_on), ("genes_chosen_on", genes_chosen_on)):
        check_sections(key, value, [section.name for section in sections])
    names = names_of(sections, data.sections)
    predicted = predictions_of(predicted, names, "the AnnData of predictions")
    located, renamed = rename_genes(predicted, names, gene_table)
    unit_of = {section.name: str(units(section, data.protocol)[0]) for section in sections}
    aligned = align(located, data.spots, data.panel, unit_of, str(data.fold))
    tiles = compare_tiles(data)
    if trained_on is None:
        trained_on = _trained_by_file(predicted, data, sections, tiles)
    values, facts_of_scale = put_on_scale(aligned, data, scale, _protocol_by_file(predicted))
    log.info("%s", facts_of_scale["statement"])
    log.info("floors learn from the training side of fold %s, whatever the predictions were trained on", data.fold)
    elsewhere = {
        "trained_on": trained_on,
        "genes_chosen_on": genes_chosen_on,
        "genes_by": "predictions" if own_panel or not aligned.panel.all() else "protocol",
        "scale": facts_of_scale,
        "left_over": aligned.left_over,
        "n_renamed_genes": renamed,
    }
    of_predictions = {
        "digest": _digest(predicted),
        "scale": scale,
        **{key: elsewhere[key] for key in ("trained_on", "genes_chosen_on")},
        "genes": "predicted" if own_panel else "panel",
        "gene_table": None if gene_table is None else str(gene_table),
    }
    config = {**config, "model": {"name": name}, PREDICTIONS: {**config.get(PREDICTIONS, {}), **of_predictions}}
    run = RunFolder(Path(config["output_dir"]))
    with alone_in(run.path):
        if run.claim(config, overwrite):
            return score_finished(run.path, data.sections)
        (run.path / "provenance.json").unlink(missing_ok=True)  # it is of predictions that are laid out anew
        stages = Stages(run.path)
        with stages("floors"):
            data.setup()  # the features
        with stages("results"):
            patient_of = {section.name: section.patient for section in sections}
            digest = _write_results(run, data, values, thresholds, elsewhere, patient_of)
        with stages("score"):
            metrics = score_run(run.path)
        record = provenance(data.sections, {}, stages, machine.chosen_precision, machine.device.type, command)
        write_atomically(run.path / "provenance.json", json.dumps({**record, DIGEST: digest}, indent=1))
    return metrics


def _write_results(
    run: RunFolder,
    data: SpotDataModule,
    values: np.ndarray,
    thresholds: Thresholds,
    elsewhere: dict[str, Any],
    patient_of: dict[str, str],
) -> str:
    """Write what a run of ours has, but for a model; the digest of the predictions.

    Parameters
    ----------
    values : (Q, G) float32
        Of the test spots; NaN throughout where nothing is predicted.
    elsewhere
        See :mod:`stexp.evaluation.coverage`.
    patient_of
        Of every section of the data set.
    """
    facts = replace(describe_run(run.config, data, {}), elsewhere=elsewhere)
    prediction = Prediction(torch.from_numpy(values), obs=quality_of_test(data, thresholds))
    random, unpredicted = random_components(data), data.rows("test")[np.isnan(values).all(axis=1)]
    comparison = Comparison.of(data, data.features, colours(data), random, unpredicted)
    digest = write_scored_files(run.path, data, prediction, comparison, facts)
    judged = {
        "patient_of": patient_of,
        "test": data.names("test"),
        "panel_saw_test": data.panel_saw,
        "copies": [{"sections": [copy.first, copy.second], "words": copy.in_words()} for copy in data.copies],
        **{key: elsewhere[key] for key in ("trained_on", "genes_chosen_on", "genes_by")},
    }
    if cohorts := batch_effects(data.sections, data.panel):
        judged["cohorts"] = cohorts
    write_atomically(run.path / "audit.json", json.dumps(audit_foreign(data.protocol, judged), indent=1))
    return digest


def _protocol_by_file(predicted: ad.AnnData) -> Protocol | None:
    """Protocol that predictions of ours were made under; None of others, of changed ones and of those of elsewhere."""
    facts = predicted.uns.get("stexp", {})
    return protocol_of(predicted) if "protocol" in facts and "elsewhere" not in facts else None


def _trained_by_file(
    predicted: ad.AnnData, data: SpotDataModule, sections: Sequence[Section], tiles: Mapping[str, np.ndarray]
) -> list[str] | None:
    """Sections of the data set that trained the model, as its predictions let tell; None of others."""
    if training.KEY not in predicted.uns.get("stexp", {}):
        return None
    record: training.TrainingRecord = read_fact(predicted, training.KEY, training.TrainingRecord)
    last, *earlier = record["trainings"]
    if record["fold"] != data.digest:
        return training.sections_of_training(record["trainings"], sections, tiles)
    before = training.sections_of_training(earlier, sections, tiles)
    return None if before is None else list(dict.fromkeys([*last["sections"], *before]))


def _digest(predicted: ad.AnnData) -> str:
    """Hash of predicted values and of what says which spots and genes they are of."""
    obs, genes = predicted.obs.astype(str).to_csv(), list(map(str, predicted.var_names))
    hashed = hashlib.blake2b(json.dumps([obs, genes]).encode(), digest_size=16)
    hashed.update(np.ascontiguousarray(predicted.X).data)
    return hashed.hexdigest()


def _stated(names: Sequence[str] | None) -> list[str] | None:
    """Names as stated; a single one may come without a list."""
    if isinstance(names, str):
        if not names:
            raise InputError(
                "trained_on and genes_chosen_on: '' names no section; [] states none, null that it is open"
            )
        return [names]
    return None if names is None else [str(name) for name in names]
