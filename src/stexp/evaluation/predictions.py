"""``predictions.h5ad``: observed and predicted expression of the held-out spots; and reading files of a run folder."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from stexp.data.hdf5 import new_hdf5, open_hdf5
from stexp.data.readers.memory import check_fits
from stexp.data.section import Section
from stexp.data.slides.slide import Slide
from stexp.data.slides.spacing import spacing as spacing
from stexp.documents import parse_json
from stexp.errors import InputError
from stexp.evaluation.metrics import top_genes
from stexp.files import restore
from stexp.protocol import Protocol

AGAIN = "give the command that made the run again"
"""What makes a missing file of a run folder: the command goes on from what is there."""
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
        Mean expression of the training spots on the scale of `observed`.
    obs
        Q rows with what the method says of each prediction.
    embedding : (Q, D)
        Of the tiles.
    """
    columns = spots[["section", "patient", "spot", "array_x", "array_y", "total_counts"]].copy()
    if obs is not None:
        columns = pd.concat([columns, obs.set_index(columns.index)], axis=1)
    var = pd.DataFrame({"mean_train": mean_train.astype(np.float32)}, index=pd.Index(panel, name="gene"))
    for name, mean in (("heg50_train", mean_train), ("heg50_test", _mean_measured(observed))):
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
        ad.io.write_elem(file, "/", adata, dataset_kwargs={"compression": "gzip"})


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
        raise _damaged(path, error) from error
    absent = [need for need in needs if not _holds(adata, need)]
    if absent:
        raise InputError(f"{path} has no {', '.join(absent)}; delete it and {AGAIN}")
    return adata


def read_json(path: Path, *needs: str) -> dict:
    """Read a JSON object of a run folder.

    Parameters
    ----------
    needs
        Keys that it must hold, as ``fold``, ``chosen/k``, or ``sections/*/scores`` of everything in ``sections``.

    Raises
    ------
    InputError
        The file is missing or damaged, or lacks a key.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: the run has not got that far; {AGAIN}")
    try:
        # NaN is not JSON, but Python writes it; both mean "no value"
        check_fits(20 * path.stat().st_size, str(path))
        content = parse_json(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except InputError:
        raise
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object; delete it and {AGAIN}")
    absent = [need for need in needs if not _is_in(content, need)]
    if absent:
        raise InputError(f"{path} has no {', '.join(absent)}; delete it and {AGAIN}")
    return content


def read_genes(path: Path, *needs: str) -> list[dict[str, Any]]:
    """Read ``per_gene.csv`` of a run folder: a row a gene, its name and numbers; None where there is no value.

    Parameters
    ----------
    needs
        Columns that it must have besides ``gene``.

    Raises
    ------
    InputError
        The file is missing, cut or not a table of numbers, or lacks a column.
    """
    again = f"score the run again (stexp-score run={path.parent})"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {again}")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            rows, columns = list(table), table.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a table of numbers ({error}); {again}") from None
    absent = [key for key in ("gene", *needs) if key not in columns]
    if absent and columns:
        raise InputError(f"{path} has no column {', '.join(absent)}; {again}")
    if not rows:
        raise InputError(f"{path} names no gene; {again}")
    if any(None in row or None in row.values() for row in rows):
        raise InputError(f"{path} is not a table of numbers (a row has fewer or more cells than columns); {again}")
    try:
        return [{key: restore(cell) if key == "gene" else _number(cell) for key, cell in row.items()} for row in rows]
    except ValueError as error:
        raise InputError(f"{path} is not a table of numbers ({error}); {again}") from None


def digest(adata: ad.AnnData) -> str:
    """SHA-256 of the predicted values, as float32, and of the names of their spots and genes."""
    names = [[str(name) for name in index] for index in (adata.obs_names, adata.var_names)]
    hashed = hashlib.sha256(json.dumps(names).encode())
    hashed.update(np.ascontiguousarray(adata.layers["predicted"], dtype="<f4").data)
    return hashed.hexdigest()


def changed_since_run(folder: Path) -> bool:
    """Whether ``predictions.h5ad`` of a run holds something else than its method wrote; False where no record says."""
    recorded = read_json(folder / "provenance.json").get(DIGEST) if (folder / "provenance.json").is_file() else None
    path = folder / "predictions.h5ad"
    if recorded is None or not path.is_file():
        return False

    def load(path: Path) -> ad.AnnData:
        with open_hdf5(path, "", ("obs", "var", "layers/predicted")) as file:
            obs, var = (ad.io.read_elem(file[key]) for key in ("obs", "var"))
            return ad.AnnData(obs=obs, var=var, layers={"predicted": ad.io.read_elem(file["layers/predicted"])})

    return digest(_read(path, load, ())) != recorded


def is_of_a_slide(path: Path) -> bool:
    """Whether an h5ad holds the prediction of a slide without a truth, not of a run."""
    try:
        with open_hdf5(path, "", ("uns/stexp/kind",)) as file:
            kind = file.get("uns/stexp/kind")
            return isinstance(kind, h5py.Dataset) and kind.asstr()[()] == "prediction"
    except OSError:
        return False  # missing or damaged: what reads it next says so


def read_fact(adata: ad.AnnData, key: str) -> dict[str, Any]:
    """A JSON object that predictions hold in ``uns["stexp"]``; InputError where it is none."""
    try:
        fact = parse_json(str(adata.uns["stexp"][key]))
    except ValueError as error:
        raise InputError(f"these predictions do not say their {key} ({error}); they are not whole") from None
    if not isinstance(fact, dict):
        raise InputError(f"these predictions do not say their {key} (no JSON object); they are not whole")
    return fact


def protocol_of(adata: ad.AnnData) -> Protocol:
    """The protocol that predictions were made under, from its fields."""
    facts = adata.uns.get("stexp", {})
    fields = read_fact(adata, "protocol") if "protocol" in facts else {}
    unknown = set(fields) - {field.name for field in dataclasses.fields(Protocol)}
    if "name" not in fields or unknown:
        reason = f"unknown fields {', '.join(sorted(unknown))}" if unknown else "no name"
        raise InputError(f"these predictions do not say their protocol ({reason}); they are not whole")
    return Protocol(**fields)


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{path} cannot be read: {reason}; delete it and {AGAIN}")


def _holds(adata: ad.AnnData, need: str) -> bool:
    attribute, *keys = need.split("/")
    held = getattr(adata, attribute)
    for key in keys:
        if key not in held:
            return False
        held = held[key]
    return True


def _is_in(content: Any, need: str) -> bool:
    key, _, rest = need.partition("/")
    if key == "*":
        values = content.values() if isinstance(content, dict) else content
        return isinstance(content, dict | list) and all(_is_in(value, rest) for value in values)
    return isinstance(content, dict) and key in content and (not rest or _is_in(content[key], rest))


def _number(cell: str) -> float | None:
    value = {"true": 1.0, "false": 0.0, "": math.nan}.get(cell.lower())
    value = float(cell) if value is None else value
    return value if math.isfinite(value) else None


def _mean_measured(values: np.ndarray) -> np.ndarray:
    """Mean over the spots where a gene was measured; NaN where it never was."""
    measured = ~np.isnan(values)
    return np.where(measured.any(0), np.nansum(values, axis=0) / np.maximum(measured.sum(0), 1), np.nan)
