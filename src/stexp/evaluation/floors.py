"""What a score has to beat (floors), and what counting noise allows (ceiling)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from stexp.data.expression import ExpressionTable, PanelCounts
from stexp.data.genes import choose_panel, normalise
from stexp.data.rows import MappedRows, Rows, blocks, column_means, some_rows
from stexp.data.section import Section
from stexp.data.splits import units
from stexp.errors import InputError
from stexp.evaluation.knn import knn
from stexp.evaluation.metrics import mean_or_none, mean_over_sections, pearson_per_gene, score_section, top_genes
from stexp.evaluation.ridge import Projection, moments_of
from stexp.protocol import Protocol

ORACLES = frozenset({"depth_oracle"})
"""Floors that look at the test spots' counts; no method could."""


NO_SCALE = frozenset({"depth_oracle"})
"""Floors that rank spots but predict no expression: correlations only, no errors."""


SEED = "_seed"
"""Between the name of a floor and the number of its seed, where it has several predictions."""


@dataclass(frozen=True)
class SpotTable:
    """What a floor may look at: N spots of any number of sections.

    Parameters
    ----------
    expression : (N, G)
        Observed expression on the scale of the truth; NaN columns of genes not measured in a section.
    log_depth : (N,)
        log(1 + counts of the spot over the whole transcriptome).
    section, patient : (N,) str
    xy : (N, 2)
        Position in the section, `unit_square`.
    colour : (N, 9) or None
        `colour_statistics` of the spots' tiles.
    features : (N, F) or None
        Tiles seen by a frozen image encoder.
    random : sequence of (N, at most 256)
        Components of the features of the same architecture at random weights, see `Projection`, one for each seed.
    """

    expression: Rows
    log_depth: np.ndarray
    section: np.ndarray
    patient: np.ndarray
    xy: np.ndarray
    colour: np.ndarray | None = None
    features: Rows | None = None
    random: Sequence[Rows] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for name in ("log_depth", "section", "patient", "xy", "colour", "features"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self):
                raise InputError(f"floors: {len(self)} spots have expression, {len(values)} have {name}")
        if any(len(values) != len(self) for values in self.random):
            raise InputError(f"floors: {len(self)} spots have expression, another number random features")

    def __len__(self) -> int:
        return len(self.expression)


def predict_floors(train: SpotTable, test: SpotTable, projection: Projection | None = None) -> dict[str, np.ndarray]:
    """Expression of the test spots as simple predictors see it.

    Parameters
    ----------
    train
        Spots that a method may learn from.
    test
        Spots to predict. Their expression is not looked at, and their depth only by the oracle.
    projection
        Of the features of `train`; None: made here.

    Returns
    -------
    dict of (Q, G) float32
        ``mean`` : training mean over spots.
        ``nearest_section`` : mean of the training section whose mean colour is nearest to that of the test section.
        ``depth_oracle`` : log depth of the test spots, the same for all genes (`ORACLES`, `NO_SCALE`).
        ``coordinates`` : ridge on x, y, x^2, xy, y^2.
        ``colour_ridge`` : ridge on the nine colour statistics.
        ``knn_features`` : mean of the 50 training spots nearest in cosine of the standardised features.
        ``ridge_features`` : ridge on 256 principal components of the standardised features, the probe of
        HEST-Benchmark (arXiv 2406.16192).
        ``random_features_seed0``, ``..._seed1``, ... : the same probe of the same encoder at random weights.
        Those that need colour or features are there when both tables have them. A gene not measured in a training
        section takes its mean over the others, or 0 without any.

    Notes
    -----
    Ridge penalties come from generalised cross-validation over the training spots, one for all genes; HEST-Benchmark
    fixes a very small one.
    """
    if len(train) < 2 or len(test) == 0:
        raise InputError(f"floors: {len(train)} training spots and {len(test)} test spots; need two and one at least")
    if train.expression.shape[1] != test.expression.shape[1]:
        raise InputError(
            f"floors: {train.expression.shape[1]} genes in training, {test.expression.shape[1]} in test; need one panel"
        )
    expression = _fill(train.expression)
    mean, shape = column_means(expression), (len(test), expression.shape[1])
    designs: dict[str, tuple[Rows, Rows]] = {}
    designs["coordinates"] = _standardise(*(_quadratic(table.xy) for table in (train, test)))
    floors: dict[str, np.ndarray | None] = {
        "mean": np.broadcast_to(mean, shape),
        "depth_oracle": np.broadcast_to(np.asarray(test.log_depth)[:, None], shape),
        "coordinates": None,
    }
    if train.colour is not None and test.colour is not None:
        x_train, x_test = designs["colour_ridge"] = _standardise(train.colour, test.colour)
        floors["nearest_section"] = _nearest_section(x_train, x_test, train.section, test.section, expression)
        floors["colour_ridge"] = None
    if train.features is not None and test.features is not None:
        projection = projection or Projection.fit(train.features)
        floors["knn_features"] = knn(projection, train.features, test.features, expression)
        designs["ridge_features"] = projection.of(train.features), projection.of(test.features)
        floors["ridge_features"] = None
    for seed, (own, tested) in enumerate(zip(train.random, test.random, strict=True)):
        name, centre = f"random_features{SEED}{seed}", column_means(own, np.float64)
        designs[name] = _centred(own, centre), _centred(tested, centre)
        floors[name] = None
    regressed = zip(designs.items(), moments_of([x for x, _ in designs.values()], expression, mean), strict=True)
    for (name, (_, tested)), moments in regressed:
        floors[name] = mean + tested[:] @ moments.slope()
    return {name: np.array(values, dtype=np.float32) for name, values in floors.items()}


def by_floor(names: Iterable[str]) -> dict[str, list[str]]:
    """Predictions of each floor: one, or one for each of its seeds."""
    out: dict[str, list[str]] = {}
    for name in names:
        out.setdefault(name.partition(SEED)[0], []).append(name)
    return out


def mean_over_seeds(scores: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Scores of each floor: of one with several seeds the mean of their scores, not the score of their mean."""
    return {floor: mean_over_sections([scores[name] for name in own]) for floor, own in by_floor(scores).items()}


def spread_over_seeds(scores: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Standard deviation (n - 1) of every score over the seeds of a floor; floors with one prediction are left out."""
    out = {}
    for floor, names in by_floor(scores).items():
        if len(names) < 2:
            continue
        values = {key: [scores[name][key] for name in names] for key in scores[names[0]]}
        out[floor] = {
            key: None if None in own else float(np.std(np.array(own, dtype=np.float64), ddof=1))
            for key, own in values.items()
        }
    return out


def unit_square(xy: np.ndarray) -> np.ndarray:
    """Positions of one section scaled to 0..1 by their bounding box, (N, 2); 0 along a side without extent."""
    low, high = xy.min(axis=0), xy.max(axis=0)
    return (xy - low) / np.where(high > low, high - low, 1.0)


def colour_statistics(tiles: np.ndarray) -> np.ndarray:
    """Mean, standard deviation and skewness of every colour channel.

    Parameters
    ----------
    tiles : (N, H, W, 3) uint8
        An array or a memory map; one tile is read at a time.

    Returns
    -------
    (N, 9) float64
        Means of R, G, B (0..255), then standard deviations, then skewnesses (0 where all pixels are equal).
    """
    if tiles.ndim != 4 or tiles.shape[3] != 3 or tiles.dtype != np.uint8:
        raise InputError(f"tiles must be (N, H, W, 3) uint8, got {tiles.shape} {tiles.dtype}")
    levels = np.arange(256.0)
    out = np.empty((len(tiles), 3, 3))
    for i, tile in enumerate(tiles):
        # moments of the histogram are exact, and cheaper than those of fifty thousand pixels
        pixels = np.asarray(tile).reshape(-1, 3)
        share = np.stack([np.bincount(pixels[:, channel], minlength=256) for channel in range(3)]) / len(pixels)
        mean = share @ levels
        centred = levels - mean[:, None]
        variance, third = (share * centred**2).sum(axis=1), (share * centred**3).sum(axis=1)
        flat = share.max(axis=1) == 1
        out[i] = mean, np.where(flat, 0, np.sqrt(variance)), np.where(flat, 0, third / np.where(flat, 1, variance**1.5))
    return out.reshape(-1, 9)


def ceiling_per_gene(
    counts: np.ndarray, total_counts: np.ndarray, protocol: Protocol, seed: int = 0, n_splits: int = 5
) -> np.ndarray:
    """Highest Pearson correlation per gene that counting noise allows in one section.

    The counts of every spot are split in two halves by binomial thinning, those outside the panel too; both halves
    are normalised as the truth is; r, the correlation of the halves over spots, is averaged over splits and set to 0
    where negative. The truth, having twice the counts, has the reliability 2r / (1 + r) (Spearman-Brown), and nothing
    correlates better with it than the square root of that, but for sampling error and the curvature of the logarithm.

    Parameters
    ----------
    counts : (N, G)
        Raw counts of the panel, all spots of one section; NaN columns of genes not measured.
    total_counts : (N,)
        Counts per spot over the whole transcriptome.
    protocol
        How the truth is normalised.
    seed, n_splits
        Random splits.

    Returns
    -------
    (G,) float64
        0..1; NaN where `normalise` gives a constant gene, or the gene was not measured.

    Notes
    -----
    HER2+, 785 genes of the paper, ln(1 + 1e4 x share of the transcriptome) per spot; mean over all genes | over the
    50 highest of the section: A2 0.36 | 0.58, B4 0.42 | 0.63, C2 0.42 | 0.73, C3 0.42 | 0.75, C6 0.41 | 0.75,
    D1 0.36 | 0.63, F1 0.31 | 0.46. A single split gives up to 0.02 less over all genes.
    Library sizes over the panel raise sparse sections (B4 0.52 | 0.69): a spot with few panel counts moves all
    its genes together, in both halves.
    """
    counts = np.asarray(counts, dtype=np.float64)
    truth = normalise(counts, total_counts, protocol)
    scored = ~np.isnan(pearson_per_gene(truth, truth))
    whole = np.nan_to_num(counts).astype(np.int64)
    outside = np.asarray(total_counts, dtype=np.float64).round().astype(np.int64) - whole.sum(axis=1)
    if (outside < 0).any():
        raise InputError(f"{int((outside < 0).sum())} spots have more counts in the panel than in the transcriptome")

    rng = np.random.default_rng(seed)
    r = np.zeros(counts.shape[1])
    for _ in range(n_splits):
        half, half_outside = rng.binomial(whole, 0.5), rng.binomial(outside, 0.5)
        halves = [(half, half_outside), (whole - half, outside - half_outside)]
        first, second = (normalise(panel, panel.sum(axis=1) + rest, protocol) for panel, rest in halves)
        r += np.nan_to_num(pearson_per_gene(first, second)) / n_splits
    r = r.clip(0, 1)
    return np.where(scored, np.sqrt(2 * r / (1 + r)), np.nan)


def _fill(expression: Rows) -> Rows:
    """Expression in 64 bits, with the mean over the others in the place of what is not measured."""
    n_measured, total = np.zeros((2, expression.shape[1]))
    if not any(np.isnan(expression[block]).any() for block in blocks(len(expression))):
        return MappedRows(expression, np.asarray, len(total))
    for block in blocks(len(expression)):
        part = np.asarray(expression[block], dtype=np.float64)
        n_measured += (~np.isnan(part)).sum(axis=0)
        total += np.nansum(part, axis=0)
    mean = total / np.maximum(n_measured, 1)

    def fill(part: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(part), mean, part)

    return MappedRows(expression, fill, len(mean))


def _centred(table: Rows, centre: np.ndarray) -> Rows:
    return MappedRows(table, lambda part: part - centre, len(centre))


def _quadratic(xy: np.ndarray) -> np.ndarray:
    return PolynomialFeatures(degree=2, include_bias=False).fit_transform(xy)


def _standardise(x_train: np.ndarray, x_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaler = StandardScaler().fit(np.asarray(x_train, dtype=np.float64))
    return scaler.transform(x_train), scaler.transform(x_test)


def _nearest_section(
    x_train: np.ndarray, x_test: np.ndarray, sections: np.ndarray, test_sections: np.ndarray, expression: Rows
) -> np.ndarray:
    rows = _rows_by_name(sections)
    colours = np.stack([x_train[own].mean(axis=0) for own in rows])
    out = np.empty((len(x_test), expression.shape[1]))
    for own in _rows_by_name(test_sections):
        nearest = np.linalg.norm(colours - x_test[own].mean(axis=0), axis=1).argmin()
        out[own] = expression[rows[nearest]].mean(axis=0)
    return out


def _rows_by_name(names: np.ndarray) -> list[np.ndarray]:
    """Rows of each name, in the order of the alphabet."""
    _, which, times = np.unique(names, return_inverse=True, return_counts=True)
    return np.split(np.argsort(which, kind="stable"), np.cumsum(times)[:-1])


def floors_without_images(sections: list[Section], protocol: Protocol, panel: list[str] | None) -> dict[str, dict]:
    """Scores of the floors that need no image, and the ceiling, with every section held out once.

    Parameters
    ----------
    sections
        All of them train and are tested, whether they have an image or not.
    panel
        Genes; None: chosen in every fold as the protocol says.

    Returns
    -------
    dict
        Floor (or ``ceiling``) -> mean scores over sections, or over the blocks of sections.
    """
    unit = {section.name: units(section, protocol) for section in sections}
    names = list(dict.fromkeys(np.concatenate(list(unit.values())).tolist()))
    if len(names) < 2:
        hint = "; protocol=blocks holds out parts of sections" if protocol.hold_out != "block" else ""
        raise InputError(f"floors need two {protocol.hold_out}s at least; there is {', '.join(names)}{hint}")
    scores: dict[str, list[dict]] = {}
    for held_out in names:
        kept = [(section, unit[section.name] != held_out) for section in sections]
        kept = [(section, spots) for section, spots in kept if spots.any()]
        choosing = sections if protocol.panel == "all" else [section.take(spots) for section, spots in kept]
        genes = panel or choose_panel(choosing, protocol)
        train = _table(kept, genes, protocol)
        for section in sections:
            spots = unit[section.name] == held_out
            if not spots.any():
                continue
            test, tested = _table([(section, spots)], genes, protocol), section.take(spots)
            heg = top_genes(_levels([(section, spots)] if protocol.heg == "test" else kept, genes, protocol))
            observed = test.expression[:]
            for name, predicted in predict_floors(train, test).items():
                scores.setdefault(name, []).append(score_section(observed, predicted, heg, name not in NO_SCALE))
            ceiling = ceiling_per_gene(tested.counts(genes), tested.total_counts, protocol)
            scores.setdefault("ceiling", []).append(
                {"pearson_acg": mean_or_none(ceiling), "pearson_heg50": mean_or_none(ceiling[heg])}
            )
    return {name: mean_over_sections(parts) for name, parts in scores.items()}


def _expression(
    kept: Sequence[tuple[Section, np.ndarray]], genes: list[str], protocol: Protocol, scaling: str | None = None
) -> Rows:
    """Expression (N, G) of the spots of sections that masks (n_spots,) name, scaled by whole sections."""
    counts = PanelCounts.of([section for section, _ in kept], genes)
    spots = np.flatnonzero(np.concatenate([spots for _, spots in kept]))
    return some_rows(ExpressionTable(counts, protocol, scaling), spots)


def _levels(kept: Sequence[tuple[Section, np.ndarray]], genes: list[str], protocol: Protocol) -> np.ndarray:
    """Mean expression of genes over some spots of sections, (G,), that ranks them; residuals have no level."""
    scaling = "spot" if protocol.truth == "residuals" else None
    return column_means(_expression(kept, genes, protocol, scaling))


def _table(kept: Sequence[tuple[Section, np.ndarray]], genes: list[str], protocol: Protocol) -> SpotTable:
    """Those of the spots of sections that masks (n_spots,) name."""
    names, patients = zip(*((section.name, section.patient) for section, _ in kept), strict=True)
    n_spots = [int(spots.sum()) for _, spots in kept]
    return SpotTable(
        expression=_expression(kept, genes, protocol),
        log_depth=np.concatenate([np.log1p(section.total_counts)[spots] for section, spots in kept]),
        section=np.repeat(names, n_spots),
        patient=np.repeat(patients, n_spots),
        xy=np.concatenate([unit_square(section.xy_px)[spots] for section, spots in kept]),
    )
