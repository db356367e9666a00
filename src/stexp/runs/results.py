"""Results of a trained method in its run folder, for scoring and for retrieving again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
import yaml

from stexp.data.cohorts import batch_effects
from stexp.data.datamodule import SpotDataModule
from stexp.data.dataset import DataSet
from stexp.data.digests import code_digest, content_digest, file_digest
from stexp.data.kept_arrays import kept_arrays
from stexp.data.quality import Thresholds, inspect
from stexp.data.rows import Rows, RowTable, column_means, some_rows
from stexp.data.section import Section
from stexp.data.slides import pictures
from stexp.evaluation import predictions
from stexp.evaluation.audit import audit
from stexp.evaluation.coverage import FOREIGN
from stexp.evaluation.floors import SEED
from stexp.files import write_atomically
from stexp.models.method import Method, Prediction, References
from stexp.runs.comparison import RANDOM, TRAINING, Comparison, tested
from stexp.runs.folder import RunFolder
from stexp.runs.prototypes import write_prototypes
from stexp.runs.provenance import git_state, manifest
from stexp.runs.tiles import tiles_of, with_image


@dataclass(frozen=True)
class RunFacts:
    """What predictions say of the run that made them, in ``uns["stexp"]``; plain values.

    Attributes
    ----------
    elsewhere
        What is on record of predictions that no run made, see :mod:`stexp.evaluation.coverage`; None of a run.
    """

    model: str
    fold: str
    data: str
    config: str
    chosen: dict
    elsewhere: dict | None = None


def describe_run(config: Mapping[str, Any], data: SpotDataModule, chosen: dict) -> RunFacts:
    """The facts of a run with a config, every value in place, and what its method chose on validation spots."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return RunFacts(config["model"]["name"], str(data.fold), DataSet.of(config).title, text, chosen)


def write_results(
    folder: RunFolder,
    data: SpotDataModule,
    method: Method,
    prediction: Prediction,
    chosen: dict,
    thresholds: Thresholds,
    comparison: Comparison,
) -> str:
    """Write ``predictions.h5ad``, ``floors.h5ad``, ``audit.json`` and, of a retrieval method, ``embeddings.h5ad``.

    Parameters
    ----------
    data
        With the features of its tiles.
    prediction
        Of the test spots, in their order.
    thresholds
        What flags a spot.
    comparison
        Of the data.

    Returns
    -------
    str
        Digest of the predictions, by which a later change of them is seen.
    """
    references, named = method.references, None
    if references is not None and references.prototype is not None:
        named = write_prototypes(folder.path, data, references)
    elif references is not None and prediction.neighbours is not None:
        rows = torch.from_numpy(references.retrieved_rows)[prediction.neighbours]
        prediction = replace(prediction, neighbours=rows)
    quality = quality_of_test(data, thresholds)
    prediction = replace(prediction, obs=pd.concat([prediction.obs, quality], axis=1))
    facts_of_run = describe_run(folder.config, data, chosen)
    digest = write_scored_files(folder.path, data, prediction, comparison, facts_of_run, named)
    if references is not None:
        query = prediction.image_embedding
        assert query is not None  # a method with references embeds the tiles that search them
        table = embedding_table(data, references, query.numpy(), data.tile_features, comparison)
        predictions.write(table, folder.path / "embeddings.h5ad")
    facts = {
        "patient_of": {section.name: section.patient for section in data.sections},
        "train": data.names("train"),
        "validation": data.names("validation"),
        "test": data.names("test"),
        "reference": [] if references is None else references.sections,
        "panel_saw_test": data.panel_saw,
        "checkpoint": "best" if folder.best_checkpoint.exists() else "last",
        "k_chosen_on": "validation" if "k_validation_pearson" in chosen else "given",
        "published_settings": data.protocol.published,
        "spot_context": method.spot_context,
        "copies": [copy.in_words() for copy in data.copies],
    }
    if cohorts := batch_effects(data.sections, data.panel):
        facts["cohorts"] = cohorts
    if folder.config.get("from") is not None:
        facts["began_at"] = folder.config["from"]["model"]
    write_atomically(folder.path / "audit.json", json.dumps(audit(data.protocol, facts), indent=1))
    return digest


def write_scored_files(
    folder: Path,
    data: SpotDataModule,
    prediction: Prediction,
    comparison: Comparison,
    facts: RunFacts,
    named: pd.DataFrame | None = None,
) -> str:
    """Write the two files that scoring reads, and ``pictures.h5``; returns the digest of the predictions.

    Parameters
    ----------
    prediction
        Of the test spots, NaN throughout for those that are not predicted; its neighbours are rows of `named`.
    comparison
        Of the data, and where some spots are not predicted, of the others.
    named
        Prototypes, see :func:`~stexp.runs.prototypes.name_prototypes`; None: the data's spots.
    """
    test = data.rows("test")
    adata = predictions.make_predictions(
        data.spots.iloc[test],
        data.panel,
        observed=data.target[test],
        predicted=prediction.predicted.numpy(),
        counts=data.counts[test],
        xy_px=data.xy_px[test],
        mean_train=column_means(some_rows(levels(data), data.rows(*TRAINING))),
        levels=levels(data)[test],
        uncertainty=_array(prediction.uncertainty),
        obs=prediction.obs,
        embedding=_array(prediction.image_embedding),
    )
    predictions.add_images(adata, tested(data))
    if prediction.neighbours is not None and prediction.neighbour_weights is not None:
        weights = prediction.neighbour_weights.numpy()
        table = data.spots if named is None else named
        predictions.add_neighbours(adata, table, prediction.neighbours.numpy(), weights)
    adata.uns["stexp"] = {
        "protocol": json.dumps(asdict(data.protocol)),
        "model": facts.model,
        "fold": facts.fold,
        "data": facts.data,
        "config": facts.config,
        "commit": str(git_state()["commit"]),
        "data_manifest": json.dumps(manifest(data.sections)),
        "chosen": json.dumps(facts.chosen),
    }
    if facts.elsewhere is not None:
        adata.uns["stexp"][FOREIGN] = json.dumps(facts.elsewhere)
    predictions.write(adata, folder / "predictions.h5ad")
    sheet = reference_sheet(data, adata, named) if "neighbours" in adata.obsm else None
    pictures.write(folder / pictures.NAME, slide_pictures(data), sheet)
    floors = ad.AnnData(obs=adata.obs[["section", "patient", "spot", "total_counts"]], var=adata.var)
    floors.uns["gene_sets"], floors.uns["ceiling"] = json.dumps(comparison.gene_sets), comparison.ceiling
    for protocol, layers in comparison.floors.items():
        for name, values in layers.items():
            floors.layers[f"{protocol}:{name}"] = values
    predictions.write(floors, folder / "floors.h5ad")
    return predictions.digest(adata)


def levels(data: SpotDataModule) -> RowTable:
    """How high genes are, (n_spots, G): the truth, or, of residuals, which have no level, expression per spot."""
    return data.expression if data.protocol.truth == "residuals" else data.target


def _array(values: torch.Tensor | None) -> np.ndarray | None:
    return None if values is None else values.numpy()


def slide_pictures(data: SpotDataModule) -> dict[str, pictures.SlidePicture]:
    """The slides of the test sections, around their test spots; runs on the same fold have them from the cache."""
    sections, names = tested(data), data.spots["section"].to_numpy(str)
    sections, rows = [section for section in sections if section.slide is not None], data.rows("test")
    budget = pictures.SLIDE_BYTES // max(1, len(sections))

    def kept(section: Section) -> pictures.SlidePicture:
        around = data.xy_px[rows[names[rows] == section.name]], data.tile.side_px(section), budget
        key = content_digest(code_digest(), file_digest(section.image.path), str(around[1:]), around[0])
        path = Path(data.cache_dir) / "pictures" / f"{key}.npz"
        return pictures.from_arrays(
            kept_arrays(path, lambda: pictures.as_arrays(pictures.picture(section.image, *around)))
        )

    return {section.name: kept(section) for section in sections}


def reference_sheet(data: SpotDataModule, adata: ad.AnnData, named: pd.DataFrame | None) -> pictures.Sheet | None:
    """The tiles of those references that count most, as methods see them; None where none has a tile."""
    names = np.array(predictions.heaviest_references(adata))
    rows = data.spots.index.get_indexer(names) if named is None else named.loc[names, "row"].to_numpy()
    shown = np.flatnonzero(with_image(data)[rows] & (rows >= 0))[: pictures.REFERENCES]
    return pictures.sheet(list(names[shown]), tiles_of(data, rows[shown])) if len(shown) else None


def quality_of_test(data: SpotDataModule, thresholds: Thresholds) -> pd.DataFrame:
    """The ``qc_`` columns of the test spots, in their order."""
    data.setup()
    stores = iter(data.open_tiles().stores)
    tiles = {section.name: next(stores) for section in data.sections if section.slide is not None}
    test = tested(data)
    for section in test:
        inspect(section, tiles[section.name], data.tile, thresholds)
    columns = pd.concat(
        [section.spots.obs.filter(like="qc_").add_prefix(f"{section.name}:", axis=0) for section in test]
    )
    return columns.loc[data.spots.index[data.rows("test")]].reset_index(drop=True)


def embedding_table(
    data: SpotDataModule,
    references: References,
    query: np.ndarray,
    features: Rows,
    comparison: Comparison,
) -> ad.AnnData:
    """All that retrieval and floors need to be done again without the encoders; spots without genes.

    ``obsm``: ``spot_embedding`` of what may be retrieved from, ``image_embedding`` of the test spots,
    ``features`` and ``colour`` of spots with a tile; NaN elsewhere. ``obs["prototype"]``: of a method that has them,
    which one a spot that may be retrieved from belongs to; -1 elsewhere.
    """
    adata = ad.AnnData(obs=data.spots[["section", "patient", "spot", "role"]].copy())
    if references.prototype is not None:
        adata.obs["prototype"] = np.int64(-1)
        adata.obs.iloc[references.rows, adata.obs.columns.get_loc("prototype")] = references.prototype
    for name, rows, values in (
        ("spot_embedding", references.rows, references.embedding.cpu().numpy()),
        ("image_embedding", data.rows("test"), query),
    ):
        adata.obsm[name] = np.full((len(data.spots), values.shape[1]), np.nan, dtype=np.float32)
        adata.obsm[name][rows] = values
    adata.obsm["features"], adata.obsm["colour"] = np.asarray(features), comparison.colour
    for seed, components in enumerate(comparison.random):
        adata.obsm[f"{RANDOM}{SEED}{seed}"] = np.asarray(components)
    return adata
