"""``stexp.evaluate``: score predictions of held-out spots, by our own models or by anything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytorch_lightning as pl
from pytorch_lightning.utilities.seed import isolate_rng

from stexp.api.data import SpotDataModule
from stexp.api.features import machine_of
from stexp.api.score import Score
from stexp.api.statement import statement
from stexp.api.typed import typed
from stexp.api.work_folder import WorkFolder
from stexp.construct import build
from stexp.data import datamodule
from stexp.errors import InputError
from stexp.evaluation.foreign.files import find_files, predictions_of, read_predictions
from stexp.evaluation.foreign.names import names_of
from stexp.files import alone_in
from stexp.reporting.report import write_report
from stexp.runs import foreign
from stexp.runs.folder import PREDICTIONS

KEPT = ("seed", "fold", "output_dir", "protocol", "data", "image_encoder", "precision", PREDICTIONS)
"""Keys of a config: what scoring depends on, and where predictions and scores are."""
NEWER = ("test_data", "random_features")
"""Of these, which not every config has."""


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
        None: not stated; of a model of ours the sections that are known again by their content.
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
    command = statement(evaluate, locals())
    files = [str(predicted)] if isinstance(predicted, str | Path) else []
    adata = _as_anndata(predicted, data, layer)
    work = WorkFolder(output_dir)
    config = data.run_config({}, {"output_dir": str(work.path)})
    config |= {"precision": config["hardware"]["precision"], PREDICTIONS: {"files": files, "layer": layer}}
    score_predictions(
        adata,
        data,
        config,
        sections=data.every_section,
        machine=machine_of(config),
        name=name or str(adata.uns.get("stexp", {}).get("model", "predictions")),
        trained_on=trained_on,
        scale=scale,
        genes_chosen_on=genes_chosen_on,
        gene_table=gene_table,
        command=command,
        overwrite=overwrite,
    )
    return Score(work)


def score_predictions(
    predicted: ad.AnnData,
    data: datamodule.SpotDataModule,
    config: Mapping[str, Any],
    *,
    gene_table: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score predictions into the run folder of a config, and write its report; ``stexp-evaluate`` calls it, too.

    Parameters
    ----------
    config
        Every value in place, as plain data; of it `KEPT` and `NEWER` are kept.
    gene_table
        None: that of the data set, if it has one.
    options
        See :func:`stexp.runs.foreign.evaluate`.

    Returns
    -------
    dict
        ``metrics.json``.
    """
    folder, of_data = Path(config["output_dir"]), config["data"]
    with isolate_rng():
        pl.seed_everything(config["seed"], verbose=False)
        metrics = foreign.evaluate(
            predicted,
            data,
            {key: config[key] for key in KEPT} | {key: config[key] for key in NEWER if key in config},
            thresholds=build(of_data["quality"]),
            gene_table=gene_table or of_data.get("gene_table"),
            **options,
        )
    with alone_in(folder, wait=True):
        write_report(folder)
    return metrics


def _as_anndata(
    predicted: ad.AnnData | pd.DataFrame | np.ndarray | str | Path, data: SpotDataModule, layer: str | None
) -> ad.AnnData:
    """Predictions whose ``X`` is what is scored."""
    names = names_of(data.every_section)
    if isinstance(predicted, str | Path):
        return read_predictions(find_files([str(predicted)]), names, layer)
    if isinstance(predicted, ad.AnnData):
        return predictions_of(predicted, names, "the AnnData of predictions", layer)
    if layer is not None:
        raise InputError(f"layer={layer}: only an AnnData or an h5ad file has layers")
    if isinstance(predicted, pd.DataFrame):
        obs = pd.DataFrame(index=predicted.index.astype(str))
        genes = pd.DataFrame(index=predicted.columns.astype(str))
        return ad.AnnData(_numbers(predicted.to_numpy()), obs=obs, var=genes)
    test = data.spots.iloc[data.rows("test")]
    shape = (len(test), len(data.panel))
    if predicted.shape != shape:
        raise InputError(f"predicted is an array of {predicted.shape}; {shape}, held-out spots x panel, would fit")
    return ad.AnnData(_numbers(predicted), obs=test[["section", "spot"]], var=pd.DataFrame(index=data.panel))


def _numbers(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iufb":
        raise InputError(f"predicted holds {values.dtype}; numbers would fit")
    return values.astype(np.float32)
