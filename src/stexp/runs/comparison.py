"""What the predictions of a run stand beside: floors and ceilings, under its protocol and the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import anndata as ad
import numpy as np

from stexp.data.datamodule import SpotDataModule
from stexp.data.digests import code_digest, content_digest
from stexp.data.features import encode_tiles
from stexp.data.kept_arrays import kept_arrays
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
        """Calculate them under every protocol that scores count under.

        Methods and seeds on the same fold have floors in common: they are kept in the cache by all that they depend
        on, as ceilings are.

        Parameters
        ----------
        unpredicted
            Rows of test spots that ceilings are not of; None: they are of all spots.
        """
        protocols = (data.protocol, *other_protocols(data.protocol).values())
        settings = json.dumps([[asdict(protocol) for protocol in protocols], data.panel])
        columns = [data.spots["section"].to_numpy(str), data.spots["patient"].to_numpy(str)]
        of_data = (code_digest(), data.digest, settings, data.spots["total_counts"].to_numpy(), *columns)
        tables = ["none" if table is None else table for table in (features, colour, *random)]

        def make_floors() -> dict[str, np.ndarray]:
            projection = None if features is None else _projection(data, features)
            made = {each.name: floors_under(each, data, features, colour, random, projection) for each in protocols}
            return _flat(made) | {"gene_sets": np.array(json.dumps(_gene_sets(data)))}

        def make_ceilings() -> dict[str, np.ndarray]:
            return _flat({protocol.name: ceilings_under(protocol, data, unpredicted) for protocol in protocols})

        left_out = "none" if unpredicted is None else unpredicted
        # first, for what they take of memory beside all floors
        ceilings = kept_arrays(_file_of(data, "ceilings", *of_data, left_out), make_ceilings)
        floors = kept_arrays(_file_of(data, "floors", *of_data, *tables), make_floors)
        gene_sets = json.loads(str(floors.pop("gene_sets")))
        return cls(colour, random, _nested(floors), _nested(ceilings), gene_sets)


def _file_of(data: SpotDataModule, what: str, *of: str | Rows) -> Path:
    return Path(data.cache_dir) / "comparisons" / f"{what}-{content_digest(*of)}.npz"


def _flat(parts: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of several protocols, whose names have no colon, by ``protocol:name``."""
    return {f"{protocol}:{name}": values for protocol, own in parts.items() for name, values in own.items()}


def _nested(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, values in arrays.items():
        protocol, _, name = key.partition(":")
        parts.setdefault(protocol, {})[name] = values
    return parts


def _gene_sets(data: SpotDataModule) -> dict[str, list[str]]:
    train = data.rows(*TRAINING)
    modules = co_expressed_modules(some_rows(data.target, train), data.spots["section"].to_numpy(str)[train])
    return module_sets(data.panel, modules)


def _projection(data: SpotDataModule, features: Rows) -> Projection:
    """`Projection` of the features of the training side, kept in the cache by these."""
    own = some_rows(features, data.rows(*TRAINING))
    path = _file_of(data, "components", code_digest(), own)
    return Projection(**kept_arrays(path, lambda: asdict(Projection.fit(own))))


def floors_under(
    protocol: Protocol,
    data: SpotDataModule,
    features: Rows | None,
    colour: np.ndarray | None,
    random: Sequence[Rows] = (),
    projection: Projection | None = None,
) -> dict[str, np.ndarray]:
    """Floors of the test spots, each (Q, G), on the truth scale of `protocol`.

    Parameters
    ----------
    random
        `random_components` of the data; none: without the floor on them.
    projection
        Of the features of the training side, which is the same on every scale; None: made here.
    """
    expression, xy = data.under(protocol), np.empty_like(data.xy_px)
    for section in data.sections:
        rows = data.rows_of(section)
        xy[rows] = unit_square(data.xy_px[rows])

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

    return predict_floors(table(data.rows(*TRAINING)), table(data.rows("test")), projection)


def ceilings_under(
    protocol: Protocol, data: SpotDataModule, unpredicted: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The ceiling of each test section, (G,), on the truth scale of `protocol`.

    Parameters
    ----------
    unpredicted
        Rows of test spots that the ceiling is not of; None: it is of all spots.
    """
    ceiling = {}
    for section in tested(data):
        rows = data.rows_of(section)
        judged = ~np.isin(rows, [] if unpredicted is None else unpredicted)
        judged |= not judged.any()
        ceiling[section.name] = ceiling_per_gene(data.counts[rows[judged]], section.total_counts[judged], protocol)
    return ceiling


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
    return [_projection(data, each).of(each, np.float32) for each in features]


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
