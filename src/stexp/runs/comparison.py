"""What the predictions of a run stand beside: floors and ceilings, under its protocol and the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np

from stexp.data.datamodule import SpotDataModule
from stexp.data.features import encode_tiles
from stexp.data.rows import Rows, some_rows
from stexp.data.section import Section
from stexp.evaluation.floors import SpotTable, ceiling_per_gene, colour_statistics, predict_floors, unit_square
from stexp.evaluation.programmes import co_expressed_modules, module_sets
from stexp.evaluation.ridge import Projection
from stexp.protocol import Protocol, other_protocols

log = logging.getLogger(__name__)

TRAINING = ("train", "validation")  # what floors, like retrieval, may learn from
RANDOM = "random_features"
"""Beginning of the names in ``embeddings.h5ad`` under which `random_components` are kept, one for each seed."""


@dataclass(frozen=True)
class Comparison:
    """Floors and ceilings of the test spots of a fold, and what the floors read.

    Attributes
    ----------
    colour : (n_spots, 9)
        See `colours`.
    random : sequence of (n_spots, at most 256)
        See `random_components`.
    floors
        Protocol -> name of a floor, with its seed -> (Q, G) float32.
    ceiling
        Protocol -> test section -> (G,).
    gene_sets
        Modules of genes that vary together on the training side.
    """

    colour: np.ndarray
    random: Sequence[Rows]
    floors: dict[str, dict[str, np.ndarray]]
    ceiling: dict[str, dict[str, np.ndarray]]
    gene_sets: dict[str, list[str]]

    @classmethod
    def of(
        cls,
        data: SpotDataModule,
        features: Rows | None,
        colour: np.ndarray,
        random: Sequence[Rows] = (),
        unpredicted: np.ndarray | None = None,
    ) -> Comparison:
        """Calculate them under every protocol that scores count under; see `floors_under`."""
        train = data.rows(*TRAINING)
        projection = None if features is None else Projection.fit(some_rows(features, train))
        protocols = (data.protocol, *other_protocols(data.protocol).values())
        made = {
            protocol.name: floors_under(protocol, data, features, colour, unpredicted, random, projection)
            for protocol in protocols
        }
        modules = co_expressed_modules(some_rows(data.target, train), data.spots["section"].to_numpy(str)[train])
        return cls(
            colour,
            random,
            {name: layers for name, (layers, _) in made.items()},
            {name: ceiling for name, (_, ceiling) in made.items()},
            module_sets(data.panel, modules),
        )


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
    for section in tested(data):
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
    """What the floor on random features regresses on, (n_spots, at most 256) for each seed; NaN without an image."""
    return reduced(data, random_features(data))


def random_features(data: SpotDataModule) -> list[Rows]:
    """Features of every spot's tile by the image encoder at random weights, (n_spots, F) for each seed."""
    out = list[Rows]()
    with_image = [section for section in data.sections if section.slide is not None]
    for encoder in () if data.encoder is None else data.encoder.at_random_weights():
        features = encode_tiles(encoder, data.tiled(), len(data.spots))
        if all(np.isfinite(features[data.rows_of(section)]).all() for section in with_image):
            out.append(features)
        else:
            log.warning("at random weights the image encoder gives infinite features; a seed of that floor is left out")
    return out


def reduced(data: SpotDataModule, features: Sequence[Rows]) -> list[Rows]:
    """Principal components of features (n_spots, F), at most 256.

    The components are those of the training side, made row by row of the features in the cache. They are a fifth of
    the features or less, so that a run can keep them.
    """
    rows = data.rows(*TRAINING)
    return [Projection.fit(some_rows(each, rows)).of(each, np.float32) for each in features]


def kept_random_components(embeddings: ad.AnnData) -> list[np.ndarray]:
    """`random_components` in ``embeddings.h5ad``; none in those of earlier versions."""
    return [np.asarray(embeddings.obsm[key]) for key in sorted(embeddings.obsm) if key.startswith(RANDOM)]


def colours(data: SpotDataModule) -> np.ndarray:
    """`colour_statistics` of every spot's tile as a method sees it, (n_spots, 9); NaN for spots without an image."""
    out = np.full((len(data.spots), 9), np.nan)
    for part in data.tiled():
        out[part.rows] = part.measured("colours-v1", 9, colour_statistics)
    return out


def tested(data: SpotDataModule) -> list[Section]:
    """Sections with test spots."""
    names = set(data.names("test"))
    return [section for section in data.sections if section.name in names]
