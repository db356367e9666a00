"""Results of a trained method in its run folder, for scoring and for retrieving again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
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
from stexp.data.features import encode_tiles
from stexp.data.quality import Thresholds, inspect
from stexp.data.rows import Rows, RowTable, column_means, some_rows
from stexp.data.section import Section
from stexp.data.slides import pictures
from stexp.evaluation import predictions
from stexp.evaluation.audit import audit
from stexp.evaluation.coverage import FOREIGN
from stexp.evaluation.floors import SEED, SpotTable, ceiling_per_gene, colour_statistics, predict_floors, unit_square
from stexp.evaluation.programmes import co_expressed_modules, module_sets
from stexp.evaluation.ridge import Projection
from stexp.files import write_atomically
from stexp.models.method import Method, Prediction, References
from stexp.protocol import Protocol, other_protocols
from stexp.runs.folder import RunFolder
from stexp.runs.prototypes import write_prototypes
from stexp.runs.provenance import git_state, manifest
from stexp.runs.tiles import tiles_of, with_image

log = logging.getLogger(__name__)

TRAINING = ("train", "validation")  # what floors, like retrieval, may learn from
RANDOM = "random_features"
"""Beginning of the names in ``embeddings.h5ad`` under which `random_components` are kept, one for each seed."""


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
    random: Sequence[Rows] = (),
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
    random
        `random_components` of the data.

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
    colour = colours(data)
    if references is not None:
        query = prediction.image_embedding
        assert query is not None  # a method with references embeds the tiles that search them
        table = embedding_table(data, references, query.numpy(), data.tile_features, colour, random)
        predictions.write(table, folder.path / "embeddings.h5ad")
    facts_of_run = describe_run(folder.config, data, chosen)
    digest = write_scored_files(folder.path, data, prediction, data.tile_features, colour, facts_of_run, random, named)
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
    features: Rows | None,
    colour: np.ndarray,
    facts: RunFacts,
    random: Sequence[Rows] = (),
    named: pd.DataFrame | None = None,
) -> str:
    """Write the two files that scoring reads, and ``pictures.h5``; returns the digest of the predictions.

    Parameters
    ----------
    prediction
        Of the test spots, NaN throughout for those that are not predicted; its neighbours are rows of `named`.
    named
        Prototypes, see :func:`~stexp.runs.prototypes.name_prototypes`; None: the data's spots.
    """
    test, train = data.rows("test"), data.rows(*TRAINING)
    adata = predictions.make_predictions(
        data.spots.iloc[test],
        data.panel,
        observed=data.target[test],
        predicted=prediction.predicted.numpy(),
        counts=data.counts[test],
        xy_px=data.xy_px[test],
        mean_train=column_means(some_rows(levels(data), train)),
        levels=levels(data)[test],
        uncertainty=_array(prediction.uncertainty),
        obs=prediction.obs,
        embedding=_array(prediction.image_embedding),
    )
    predictions.add_images(adata, _tested(data))
    if prediction.neighbours is not None and prediction.neighbour_weights is not None:
        weights = prediction.neighbour_weights.numpy()
        table = data.spots if named is None else named
        predictions.add_neighbours(adata, table, prediction.neighbours.numpy(), weights)
    write_pictures(folder / pictures.NAME, data, adata, named)
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
    floors = ad.AnnData(obs=adata.obs, var=adata.var)
    modules = co_expressed_modules(some_rows(data.target, train), data.spots["section"].to_numpy(str)[train])
    floors.uns["gene_sets"] = json.dumps(module_sets(data.panel, modules))
    floors.uns["ceiling"] = {}
    unpredicted = test[np.isnan(adata.layers["predicted"]).all(axis=1)]
    projection = None if features is None else Projection.fit(some_rows(features, train))
    for protocol in (data.protocol, *other_protocols(data.protocol).values()):
        layers, ceiling = floors_under(protocol, data, features, colour, unpredicted, random, projection)
        floors.uns["ceiling"][protocol.name] = ceiling
        for name, values in layers.items():
            floors.layers[f"{protocol.name}:{name}"] = values
    predictions.write(floors, folder / "floors.h5ad")
    return predictions.digest(adata)


def levels(data: SpotDataModule) -> RowTable:
    """How high genes are, (n_spots, G): the truth, or, of residuals, which have no level, expression per spot."""
    return data.expression if data.protocol.truth == "residuals" else data.target


def _tested(data: SpotDataModule) -> list[Section]:
    """Sections with test spots."""
    names = set(data.names("test"))
    return [section for section in data.sections if section.name in names]


def _array(values: torch.Tensor | None) -> np.ndarray | None:
    return None if values is None else values.numpy()


def write_pictures(path: Path, data: SpotDataModule, adata: ad.AnnData, named: pd.DataFrame | None = None) -> None:
    """Write the slides of the test sections, and the tiles of those references that count most, as methods see them."""
    test = [section for section in _tested(data) if section.slide is not None]
    budget = pictures.SLIDE_BYTES // max(1, len(test))
    slides = {}
    for section in test:
        xy = adata.obsm["spatial"][(adata.obs["section"] == section.name).to_numpy()]
        slides[section.name] = pictures.picture(section.image, xy, data.tile.side_px(section), budget)
    sheet = None
    if "neighbours" in adata.obsm:
        names = np.array(predictions.heaviest_references(adata))
        rows = data.spots.index.get_indexer(names) if named is None else named.loc[names, "row"].to_numpy()
        shown = np.flatnonzero(with_image(data)[rows] & (rows >= 0))[: pictures.REFERENCES]
        if len(shown):
            sheet = pictures.sheet(list(names[shown]), tiles_of(data, rows[shown]))
    pictures.write(path, slides, sheet)


def floors_under(
    protocol: Protocol,
    data: SpotDataModule,
    features: Rows | None,
    colour: np.ndarray | None,
    unpredicted: np.ndarray | None = None,
    random: Sequence[Rows] = (),
    projection: Projection | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Floors of the test spots and the ceiling of each test section, on the truth scale of `protocol`.

    Parameters
    ----------
    unpredicted
        Rows of test spots that the ceiling is not of; None: it is of all spots.
    random
        `random_components` of the data; none: without the floor on them.
    projection
        Of the features of the training side, which is the same on every scale; None: made here.

    Returns
    -------
    floors : dict of (Q, G)
    ceiling : dict of section -> (G,)
    """
    expression, xy, ceiling = data.under(protocol), np.empty_like(data.xy_px), {}
    for section in data.sections:
        rows = data.rows_of(section)
        xy[rows] = unit_square(data.xy_px[rows])
    for section in _tested(data):
        rows = data.rows_of(section)
        judged = ~np.isin(rows, [] if unpredicted is None else unpredicted)
        judged |= not judged.any()
        ceiling[section.name] = ceiling_per_gene(
            data.counts[rows[judged]], section.total_counts[judged], protocol, seed=data.seed
        )

    def table(rows: np.ndarray) -> SpotTable:
        spots = data.spots.iloc[rows]
        return SpotTable(
            expression=some_rows(expression, rows),
            log_depth=np.log1p(spots["total_counts"].to_numpy()),
            section=spots["section"].to_numpy(str),
            patient=spots["patient"].to_numpy(str),
            xy=xy[rows],
            colour=None if colour is None else colour[rows],
            features=None if features is None else some_rows(features, rows),
            random=[some_rows(components, rows) for components in random],
        )

    return predict_floors(table(data.rows(*TRAINING)), table(data.rows("test")), projection), ceiling


def random_components(data: SpotDataModule) -> list[Rows]:
    """What the floor on random features regresses on, (n_spots, at most 256) for each seed; NaN without an image.

    The components are those of the training side, made row by row of the features in the cache. They are a fifth of
    the features or less, so that a run can keep them.
    """
    rows, out = data.rows(*TRAINING), list[Rows]()
    with_image = [section for section in data.sections if section.slide is not None]
    for encoder in () if data.encoder is None else data.encoder.at_random_weights():
        features = encode_tiles(encoder, data.tiled(), len(data.spots))
        if all(np.isfinite(features[data.rows_of(section)]).all() for section in with_image):
            out.append(Projection.fit(some_rows(features, rows)).of(features, np.float32))
        else:
            log.warning("at random weights the image encoder gives infinite features; a seed of that floor is left out")
    return out


def kept_random_components(embeddings: ad.AnnData) -> list[np.ndarray]:
    """`random_components` in ``embeddings.h5ad``; none in those of earlier versions."""
    return [np.asarray(embeddings.obsm[key]) for key in sorted(embeddings.obsm) if key.startswith(RANDOM)]


def colours(data: SpotDataModule) -> np.ndarray:
    """`colour_statistics` of every spot's tile as a method sees it, (n_spots, 9); NaN for spots without an image."""
    out = np.full((len(data.spots), 9), np.nan)
    for part in data.tiled():
        out[part.rows] = part.measured("colours-v1", 9, colour_statistics)
    return out


def quality_of_test(data: SpotDataModule, thresholds: Thresholds) -> pd.DataFrame:
    """The ``qc_`` columns of the test spots, in their order."""
    data.setup()
    stores = iter(data.open_tiles().stores)
    tiles = {section.name: next(stores) for section in data.sections if section.slide is not None}
    test = _tested(data)
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
    colour: np.ndarray,
    random: Sequence[Rows] = (),
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
    adata.obsm["features"], adata.obsm["colour"] = np.asarray(features), colour
    for seed, components in enumerate(random):
        adata.obsm[f"{RANDOM}{SEED}{seed}"] = np.asarray(components)
    return adata
