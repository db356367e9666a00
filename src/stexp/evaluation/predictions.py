"""``predictions.h5ad``: observed and predicted expression of the held-out spots; and reading files of a run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from stexp.arguments import check_fields, check_keys
from stexp.data.hdf5 import new_hdf5, open_hdf5
from stexp.data.section import Section
from stexp.data.slides.slide import Slide
from stexp.data.slides.spacing import spacing as spacing
from stexp.documents import parse_json
from stexp.errors import InputError
from stexp.evaluation.metrics import top_genes
from stexp.evaluation.records import AGAIN, damaged, read_json
from stexp.protocol import Protocol

OF_RUN = (
    *(f"layers/{key}" for key in ("observed", "predicted", "uncertainty", "counts")),
    *(f"obs/{key}" for key in ("section", "patient", "spot", "total_counts")),
    "obsm/spatial",
    *(f"uns/stexp/{key}" for key in ("protocol", "fold", "model", "data", "chosen", "config")),
)
"""What ``predictions.h5ad`` of every run holds."""
NUMBERS = ("obs/total_counts", "var/expected_pearson", "var/n_held_out_sections")
"""Columns that are computed with."""
DIGEST = "predictions_digest"
"""Key of ``provenance.json``: :func:`digest` of the predictions as the method wrote them."""
CHANGED = "Predictions changed since the run: these are the scores of what the file holds now"


def make_predictions(
    spots: pd.DataFrame,
    panel: list[str],
    *,
    observed: np.ndarray,
    predicted: np.ndarray,
    counts: np.ndarray,
    xy_px: np.ndarray,
    mean_train: np.ndarray,
    levels: np.ndarray | None = None,
    uncertainty: np.ndarray | None = None,
    obs: pd.DataFrame | None = None,
    embedding: np.ndarray | None = None,
) -> ad.AnnData:
    """Lay out predictions of Q spots and G genes.

    Parameters
    ----------
    spots
        Q rows: section, patient, spot, array_x, array_y, total_counts, index ``section:spot``.
    observed, predicted, counts, uncertainty : (Q, G)
        Observed expression and counts are NaN in columns of genes not measured in a section.
    xy_px : (Q, 2)
    mean_train : (G,)
        Mean expression of the training spots on the scale of `levels`.
    levels : (Q, G)
        How high genes are, which ranks the highest; None: `observed`.
    obs
        Q rows with what the method says of each prediction.
    embedding : (Q, D)
        Of the tiles.
    """
    columns = spots[["section", "patient", "spot", "array_x", "array_y", "total_counts"]].copy()
    if obs is not None:
        columns = pd.concat([columns, obs.set_index(columns.index)], axis=1)
    var = pd.DataFrame({"mean_train": mean_train.astype(np.float32)}, index=pd.Index(panel, name="gene"))
    for name, mean in (
        ("heg50_train", mean_train),
        ("heg50_test", _mean_measured(observed if levels is None else levels)),
    ):
        var[name] = False
        var.iloc[top_genes(mean), var.columns.get_loc(name)] = True
    adata = ad.AnnData(predicted.astype(np.float32), obs=columns, var=var)
    adata.layers["observed"] = observed.astype(np.float32)
    adata.layers["predicted"] = predicted.astype(np.float32)
    if uncertainty is None:
        uncertainty = np.full(predicted.shape, np.nan)
    adata.layers["uncertainty"] = uncertainty.astype(np.float32)
    adata.layers["counts"] = counts.astype(np.float32)
    adata.obsm["spatial"] = xy_px
    if embedding is not None:
        adata.obsm["image_embedding"] = embedding.astype(np.float32)
    return adata


def add_images(adata: ad.AnnData, sections: list[Section], max_px: int = 1600) -> None:
    """Put the thumbnail of every section that has a slide where scanpy's and squidpy's spatial plots look for it."""
    adata.uns["spatial"] = {
        section.name: plotted_slide(section.slide, section.xy_px, section.um_per_px, max_px=max_px)
        for section in sections
        if section.slide is not None
    }


def plotted_slide(
    slide: Slide, xy_px: np.ndarray, um_per_px: float | None, spot_um: float = 100.0, max_px: int = 1600
) -> dict:
    """A slide as scanpy's ``uns["spatial"]`` has it: thumbnail, its scale, and the diameter of a spot.

    A spot is drawn with `spot_um` where the scale is known, else with half the distance of its neighbours.

    Parameters
    ----------
    xy_px : (N, 2)
        Spots in level-0 pixels.
    max_px
        Longer side of the thumbnail.
    """
    thumbnail, scale = slide.thumbnail(max_px)
    pitch = spacing(xy_px)
    factors = {"tissue_hires_scalef": scale, "spot_diameter_fullres": pitch / 2}
    if um_per_px:
        factors["spot_diameter_fullres"] = min(spot_um / um_per_px, pitch)
        factors["microns_per_pixel"] = um_per_px  # as SpaceRanger calls it
    return {"images": {"hires": thumbnail}, "scalefactors": factors}


def add_neighbours(adata: ad.AnnData, spots: pd.DataFrame, rows: np.ndarray, weights: np.ndarray) -> None:
    """Name the references that count most for each of Q predictions.

    Puts into `adata`: ``obsm["neighbours"]`` (Q, n) rows of ``uns["references"]``, a table with section, patient and
    (where known) spot, and ``obsm["neighbour_weights"]`` (Q, n).

    Parameters
    ----------
    spots
        Columns section, patient, and perhaps spot; its index names them.
    rows, weights : (Q, n)
        Rows of `spots`, by falling weight.
    """
    used, among = np.unique(rows, return_inverse=True)
    columns = [name for name in ("section", "patient", "spot") if name in spots]
    adata.uns["references"] = spots[columns].iloc[used].astype(str)
    adata.obsm["neighbours"] = among.reshape(rows.shape).astype(np.int32)
    adata.obsm["neighbour_weights"] = np.asarray(weights, dtype=np.float32)


def heaviest_references(adata: ad.AnnData) -> list[str]:
    """Names of the references, by falling sum of their weights."""
    names = adata.uns["references"].index
    total = np.bincount(adata.obsm["neighbours"].ravel(), adata.obsm["neighbour_weights"].ravel(), len(names))
    return list(names[np.argsort(-total, kind="stable")])


def write(adata: ad.AnnData, path: Path) -> None:
    """Write an h5ad so that half a file is never taken for a whole one; its columns of text become categorical."""
    adata.strings_to_categoricals()
    with new_hdf5(path) as file:
        # more takes a third longer for two hundredths of the size: numbers with a fraction hardly get smaller
        ad.io.write_elem(file, "/", adata, dataset_kwargs={"compression": "gzip", "compression_opts": 1})


def read(path: Path, *needs: str) -> ad.AnnData:
    """Read an h5ad of a run folder.

    Parameters
    ----------
    needs
        What it must hold, as ``layers/counts`` or ``uns/stexp/fold``.

    Raises
    ------
    InputError
        The file is missing or damaged, or lacks something.
    """

    def load(path: Path) -> ad.AnnData:
        with open_hdf5(path, ""):
            return ad.read_h5ad(path)

    return _read(path, load, needs)


def read_annotations(path: Path, *needs: str) -> ad.AnnData:
    """Read an h5ad without its matrices: ``obs``, ``var`` and ``uns``; otherwise as :func:`read`."""

    def load(path: Path) -> ad.AnnData:
        keys = ("obs", "var", "uns")
        with open_hdf5(path, "", keys) as file:
            return ad.AnnData(**{key: ad.io.read_elem(file[key]) for key in keys})

    return _read(path, load, needs)


def _read(path: Path, load: Callable[[Path], ad.AnnData], needs: tuple[str, ...]) -> ad.AnnData:
    if not path.is_file():
        raise InputError(f"{path} does not exist: the run has not got that far; {AGAIN}")
    try:
        adata = load(path)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # h5py and anndata raise errors of every kind at damaged bytes
        raise damaged(path, error) from error
    absent = [need for need in needs if not _holds(adata, need)]
    if absent:
        raise InputError(f"{path} has no {', '.join(absent)}, or it is of another kind; delete it and {AGAIN}")
    return adata


def digest(adata: ad.AnnData) -> str:
    """SHA-256 of the predicted values, as float32, and of the names of their spots and genes."""
    names = [[str(name) for name in index] for index in (adata.obs_names, adata.var_names)]
    hashed = hashlib.sha256(json.dumps(names).encode())
    hashed.update(np.ascontiguousarray(adata.layers["predicted"], dtype="<f4").data)
    return hashed.hexdigest()


def changed_since_run(folder: Path) -> bool:
    """Whether ``predictions.h5ad`` of a run holds something else than its method wrote; False where no record says."""
    written = read_json(folder / "provenance.json").get(DIGEST) if (folder / "provenance.json").is_file() else None
    path = folder / "predictions.h5ad"
    if written is None or not path.is_file():
        return False

    def load(path: Path) -> ad.AnnData:
        with open_hdf5(path, "", ("obs", "var", "layers/predicted")) as file:
            obs, var = (ad.io.read_elem(file[key]) for key in ("obs", "var"))
            return ad.AnnData(obs=obs, var=var, layers={"predicted": ad.io.read_elem(file["layers/predicted"])})

    return digest(_read(path, load, ())) != written


def is_of_a_slide(path: Path) -> bool:
    """Whether an h5ad holds the prediction of a slide without a truth, not of a run."""
    try:
        with open_hdf5(path, "", ("uns/stexp/kind",)) as file:
            kind = file.get("uns/stexp/kind")
            return isinstance(kind, h5py.Dataset) and kind.asstr()[()] == "prediction"
    except OSError:
        return False  # missing or damaged: what reads it next says so


def read_fact(adata: ad.AnnData, key: str, fields: Any = dict) -> Any:
    """A JSON object in ``uns["stexp"]`` of predictions; InputError where it is none, or does not fit `fields`."""
    try:
        fact = parse_json(str(adata.uns["stexp"][key]))
    except (ValueError, KeyError) as error:
        raise InputError(f"these predictions do not say their {key} ({error}); they are not whole") from None
    check_fields(f"{key} of these predictions", fact, fields, "they are not whole")
    return fact


def protocol_of(adata: ad.AnnData) -> Protocol:
    """The protocol that predictions were made under, from its fields."""
    fields = read_fact(adata, "protocol")
    check_keys(Protocol, fields, "protocol of these predictions")
    return Protocol(**fields)


def _holds(adata: ad.AnnData, need: str) -> bool:
    attribute, *keys = need.split("/")
    held = getattr(adata, attribute)
    for key in keys:
        if not isinstance(held, Mapping | pd.DataFrame) or key not in held:
            return False
        held = held[key]
    if attribute in ("layers", "obsm"):
        return isinstance(held, np.ndarray) and held.dtype.kind in "fiu"
    return need not in NUMBERS or pd.api.types.is_numeric_dtype(held)


def _mean_measured(values: np.ndarray) -> np.ndarray:
    """Mean over the spots where a gene was measured; NaN where it never was."""
    measured = ~np.isnan(values)
    return np.where(measured.any(0), np.nansum(values, axis=0) / np.maximum(measured.sum(0), 1), np.nan)
