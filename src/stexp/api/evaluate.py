"""``stexp.evaluate``: score predictions of held-out spots, by our own models or by anything else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytorch_lightning as pl
from pytorch_lightning.utilities.seed import isolate_rng

from stexp.api.data import SpotDataModule
from stexp.api.features import machine_of
from stexp.api.score import Score
from stexp.api.typed import typed
from stexp.api.work_folder import WorkFolder
from stexp.construct import build
from stexp.errors import InputError, did_you_mean
from stexp.evaluation.foreign.files import find_files, read_predictions
from stexp.evaluation.foreign.names import names_of
from stexp.evaluation.predictions import read_fact
from stexp.files import alone_in
from stexp.reporting.report import write_report
from stexp.runs import foreign

KEPT = ("seed", "fold", "output_dir", "protocol", "data", "image_encoder")
"""Of the config of a run: what scoring depends on."""


@typed
def evaluate(
    predicted: ad.AnnData | pd.DataFrame | np.ndarray | str | Path,
    data: SpotDataModule,
    *,
    name: str | None = None,
    layer: str | None = None,
    trained_on: Sequence[str] | str | None = None,
    scale: str | None = None,
    genes_chosen_on: Sequence[str] | str | None = None,
    gene_table: str | Path | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Score:
    """Score predictions of the held-out spots with our truth, floors, ceiling and audit.

    Spots and genes are joined by name; what has no counterpart is said and scored without.

    Parameters
    ----------
    predicted
        Spots x genes: an AnnData, such as ``model.predict(data)``, with section and spot in ``obs`` or rows named
        ``section:spot``; a DataFrame with such rows and a column a gene; an array of all held-out spots x the panel,
        ordered as ``data.spots[data.spots["role"] == "test"]`` and ``data.panel``; or a file of h5ad, csv or parquet.
    data
        The fold that was predicted.
    name
        Of the method, in tables; None: of our own predictions that of their model, else ``predictions``.
    layer
        Of an AnnData; None: ``X``.
    trained_on
        Sections that the method was trained, validated or tuned on, ``[]``: none of these data; an item of the audit.
        None: not stated, unless the predictions are our own model's.
    scale
        ``target`` (that of the protocol), ``counts``, ``cpm``, ``log2_1p_cpm``, ``zscore``, ...; None: looked at, and
        errors count only on the scale of the truth.
    genes_chosen_on
        Sections that the predicted genes were chosen on; an item of the audit.
    gene_table
        CSV or TSV of gene ids and symbols, for predictions under other names.
    output_dir
        Where the run folder stays; None: it goes with the score.
    overwrite
        Start anew where `output_dir` holds another run.

    Raises
    ------
    InputError
        Predictions that do not fit the fold, or a statement about sections or scales that there are not.

    Examples
    --------
    >>> score = stexp.evaluate(model.predict(data), data)
    >>> theirs = stexp.evaluate("theirs.h5ad", data, name="theirs", trained_on=["C2", "C3"])
    >>> stexp.compare([score, theirs])
    """
    adata = _as_anndata(predicted, data, layer)
    facts = adata.uns.get("stexp", {})
    if trained_on is None and "trained_on" in facts:
        trained_on = read_fact(adata, "trained_on")["sections"]
    work = WorkFolder(output_dir)
    config = data.run_config({}, {"output_dir": str(work.path)})
    machine = machine_of(config)
    with isolate_rng():
        pl.seed_everything(data.seed, verbose=False)
        foreign.evaluate(
            adata,
            data,
            work.path,
            name=name or str(facts.get("model", "predictions")),
            trained_on=trained_on,
            scale=scale,
            genes_chosen_on=genes_chosen_on,
            gene_table=gene_table,
            sections=data.every_section,
            thresholds=build(config["data"]["quality"]),
            config={key: config[key] for key in KEPT} | {"precision": config["hardware"]["precision"]},
            precision=machine.chosen_precision,
            device=machine.device.type,
            overwrite=overwrite,
        )
    with alone_in(work.path, wait=True):
        write_report(work.path)
    return Score(work)


def _as_anndata(
    predicted: ad.AnnData | pd.DataFrame | np.ndarray | str | Path, data: SpotDataModule, layer: str | None
) -> ad.AnnData:
    """Predictions whose ``X`` is what is scored."""
    if isinstance(predicted, str | Path):
        return read_predictions(find_files([str(predicted)]), names_of(data.every_section), layer)
    if isinstance(predicted, ad.AnnData):
        if layer is None:
            return predicted
        if layer not in predicted.layers:
            there = ", ".join(predicted.layers) or "none"
            raise InputError(f"layer={layer}: there are {there}{did_you_mean(layer, predicted.layers)}")
        return ad.AnnData(predicted.layers[layer], obs=predicted.obs, var=predicted.var, uns=predicted.uns)
    if layer is not None:
        raise InputError(f"layer={layer}: only an AnnData or an h5ad file has layers")
    if isinstance(predicted, pd.DataFrame):
        obs = pd.DataFrame(index=predicted.index.astype(str))
        genes = pd.DataFrame(index=predicted.columns.astype(str))
        return ad.AnnData(_numbers(predicted.to_numpy()), obs=obs, var=genes)
    if not isinstance(predicted, np.ndarray):
        kind = type(predicted).__name__
        raise InputError(f"predicted is a {kind}; an AnnData, a DataFrame, a numpy array or a file would fit")
    test = data.spots.iloc[data.rows("test")]
    shape = (len(test), len(data.panel))
    if predicted.shape != shape:
        raise InputError(f"predicted is an array of {predicted.shape}; {shape}, held-out spots x panel, would fit")
    return ad.AnnData(_numbers(predicted), obs=test[["section", "spot"]], var=pd.DataFrame(index=data.panel))


def _numbers(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iufb":
        raise InputError(f"predicted holds {values.dtype}; numbers would fit")
    return values.astype(np.float32)
