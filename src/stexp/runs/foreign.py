"""Predictions that another tool made, scored as those of a run of ours and left as a run folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
import yaml

from stexp.data.datamodule import SpotDataModule
from stexp.data.quality import Thresholds
from stexp.data.section import Section, check_name
from stexp.data.splits import units
from stexp.errors import InputError
from stexp.evaluation.audit import audit_elsewhere
from stexp.evaluation.foreign.align import Aligned, align
from stexp.evaluation.foreign.layout import dense, lay_out, locate, refuse_transposed
from stexp.evaluation.foreign.names import check_sections, names_of, rename_genes
from stexp.evaluation.foreign.scales import check_scale
from stexp.evaluation.predictions import DIGEST, protocol_of
from stexp.files import alone_in, write_atomically
from stexp.models.method import Prediction
from stexp.protocol import Protocol
from stexp.runs.folder import PREDICTIONS, RunFolder
from stexp.runs.provenance import Stages, provenance
from stexp.runs.results import RunFacts, colours, quality_of_test, random_components, write_scored_files
from stexp.runs.scale import put_on_scale
from stexp.runs.scoring import score_finished, score_run
from stexp.training.duplicates import compare_tiles

log = logging.getLogger(__name__)


def evaluate(
    predicted: ad.AnnData,
    data: SpotDataModule,
    folder: Path,
    *,
    name: str,
    trained_on: Sequence[str] | None = None,
    scale: str | None = None,
    genes_chosen_on: Sequence[str] | None = None,
    own_panel: bool = False,
    gene_table: str | Path | None = None,
    sections: Sequence[Section] | None = None,
    thresholds: Thresholds | None = None,
    config: Mapping[str, Any] | None = None,
    data_name: str = "data",
    precision: str = "32-true",
    device: str = "cpu",
    overwrite: bool = False,
) -> dict:
    """Score predictions that no run of ours made, and leave a run folder without a model.

    Truth, floors, ceiling and highest genes are those of the fold that `data` serves; its training side is what the
    floors learn from. The report is the caller's to write
    (:func:`~stexp.reporting.report.write_report`), and the folder is finished with it.

    Parameters
    ----------
    predicted : AnnData, spots x genes
        ``X``; ``obs`` with section and spot, or rows named ``section:spot``; genes by symbol or Ensembl id.
    data
        One fold; with an encoder the floors on frozen features are there, too.
    folder
        Where the run goes.
    name
        Of the method, beside its scores.
    trained_on
        Sections of the data set that the method was trained, validated or tuned on, as whoever predicted states it;
        empty: none of them; None: not stated.
    scale
        One of :data:`~stexp.evaluation.foreign.scales.NAMES`; None: not named, see
        :func:`~stexp.runs.scale.put_on_scale`.
    genes_chosen_on
        Sections that the predicted genes were chosen on; None: not stated.
    own_panel
        Whether the panel of the fold is that of the predictions.
    gene_table
        See :func:`~stexp.data.gene_names.read_gene_table`.
    sections
        All of the data set, where the fold leaves some out; None: those of the fold.
    thresholds
        What flags a spot; None: none is flagged.
    config
        ``config.yaml`` of the run, every value in place; None: what `data` says of itself.
    data_name
        Of the data set, where there is no config.
    precision, device
        That features were computed with, for the record.
    overwrite
        Start anew where `folder` holds another run.

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
    sections = data.sections if sections is None else list(sections)
    if scale is not None:
        check_scale(scale)
    trained_on, genes_chosen_on = _listed(trained_on), _listed(genes_chosen_on)
    for key, value in (("trained_on", trained_on), ("genes_chosen_on", genes_chosen_on)):
        check_sections(key, value, [section.name for section in sections])
    aligned, renamed = _aligned(predicted, data, sections, gene_table)
    compare_tiles(data)
    values, facts_of_scale = put_on_scale(aligned, data, scale, _stated_by_file(predicted))
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
    config = _config_of(data, data_name) if config is None else config
    config = {**config, "model": {"name": name}, PREDICTIONS: {**config.get(PREDICTIONS, {}), **of_predictions}}
    run = RunFolder(Path(folder))
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
        record = provenance(data.sections, {}, stages, precision, device)
        write_atomically(run.path / "provenance.json", json.dumps({**record, DIGEST: digest}, indent=1))
    return metrics


def _write_results(
    run: RunFolder,
    data: SpotDataModule,
    values: np.ndarray,
    thresholds: Thresholds | None,
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
    quality = None if thresholds is None else quality_of_test(data, thresholds)
    config = run.config
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    facts = RunFacts(config["model"]["name"], str(data.fold), str(config["data"]["name"]), text, {}, elsewhere)
    prediction = Prediction(torch.from_numpy(values), obs=quality)
    random = random_components(data)
    digest = write_scored_files(run.path, data, prediction, data.features, colours(data), facts, random)
    judged = {
        "patient_of": patient_of,
        "test": data.names("test"),
        "panel_saw_test": data.panel_saw,
        **{key: elsewhere[key] for key in ("trained_on", "genes_chosen_on", "genes_by")},
    }
    write_atomically(run.path / "audit.json", json.dumps(audit_elsewhere(data.protocol, judged), indent=1))
    return digest


def _aligned(
    predicted: ad.AnnData, data: SpotDataModule, sections: Sequence[Section], gene_table: str | Path | None
) -> tuple[Aligned, int]:
    names, where = names_of(sections, data.sections), "the AnnData of predictions"
    if 0 in predicted.shape:
        raise InputError(f"{where} has {predicted.n_obs} spots and {predicted.n_vars} genes; one of each would fit")
    refuse_transposed(predicted.obs_names, predicted.var_names, names, where)
    obs = locate(predicted.obs, predicted.obs_names, where, names.sections)
    located = lay_out(dense(predicted.X, where), obs, predicted.var.filter(items=["gene_ids"]), where)
    located, renamed = rename_genes(located, names, gene_table)
    unit_of = {section.name: str(units(section, data.protocol)[0]) for section in sections}
    return align(located, data.spots, data.panel, unit_of, str(data.fold)), renamed


def _stated_by_file(predicted: ad.AnnData) -> Protocol | None:
    """Protocol that predictions of ours were made under; None of others, of changed ones and of those of elsewhere."""
    facts = predicted.uns.get("stexp")
    if not isinstance(facts, Mapping) or "protocol" not in facts or "elsewhere" in facts:
        return None
    written = predicted.layers.get("predicted")
    if written is None or not np.array_equal(np.asarray(predicted.X), np.asarray(written), equal_nan=True):
        return None
    return protocol_of(predicted)


def _config_of(data: SpotDataModule, data_name: str) -> dict[str, Any]:
    """What a data module says of itself, as ``config.yaml`` of a run has it."""
    return {
        "seed": data.seed,
        "fold": str(data.fold),
        "protocol": {"_target_": "stexp.protocol.Protocol", **asdict(data.protocol)},
        "data": {"name": data_name, "digest": data.digest},
    }


def _digest(predicted: ad.AnnData) -> str:
    """Hash of predicted values and of what says which spots and genes they are of."""
    obs, genes = predicted.obs.astype(str).to_csv(), list(map(str, predicted.var_names))
    hashed = hashlib.blake2b(json.dumps([obs, genes]).encode(), digest_size=16)
    hashed.update(np.ascontiguousarray(dense(predicted.X, "the AnnData of predictions")).data)
    return hashed.hexdigest()


def _listed(names: Sequence[str] | None) -> list[str] | None:
    """Names as stated; a single one may come without a list."""
    if isinstance(names, str):
        if not names:
            raise InputError(
                "trained_on and genes_chosen_on: '' names no section; [] states none, null that it is open"
            )
        return [names]
    return None if names is None else [str(name) for name in names]
