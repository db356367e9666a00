"""Completion of spots by what their tiles look like, and by place and look together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from stexp.completion.kriging import Kriging
from stexp.completion.tasks import Completed, SpotTask, choose, error_per_gene, out_of_fold
from stexp.evaluation.ridge import RidgeProbe
from stexp.models.retrieval import ReferenceIndex

BANKS = ("shown", "all")
NEIGHBOURS = (5, 10, 20, 50)


def _bank(task: SpotTask, which: str = "all") -> tuple[np.ndarray, np.ndarray]:
    """Features and expression of the measured spots: those shown here, and those of the references."""
    if which == "shown" or task.reference_features is None or not len(task.references):
        return task.shown_features, task.expression
    return (
        np.concatenate([task.shown_features, task.reference_features]),
        np.concatenate([task.expression, task.references]),
    )


def _retrieve(task: SpotTask, k: int, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of the k measured spots whose tiles are most alike, (H, G) each."""
    assert task.features is not None
    features, expression = _bank(task, which)
    centre, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1
    places = np.full(len(features), "bank")
    index = ReferenceIndex(torch.from_numpy(((features - centre) / scale).astype(np.float32)), places, places)
    query = torch.from_numpy(((task.features[~task.shown] - centre) / scale).astype(np.float32))
    neighbours = index.search(query, min(k, len(index)))
    mean, sd = index.average(neighbours, torch.from_numpy(np.asarray(expression, dtype=np.float32)))
    assert sd is not None
    return mean.numpy().astype(np.float64), sd.numpy().astype(np.float64)


def _best_bank(task: SpotTask) -> tuple[tuple[int, str], np.ndarray]:
    """Neighbours and bank, and the shown spots predicted with them while they were held out."""
    banks = BANKS if len(task.references) else BANKS[:1]
    best = choose(
        task, [(k, bank) for bank in banks for k in NEIGHBOURS], lambda inner, own: _retrieve(inner, own[0], own[1])[0]
    )
    return best.setting, best.held_out


def retrieval(task: SpotTask) -> Completed:
    """Weighted mean of the measured spots with the most similar tiles: those shown, and those of other sections.

    As the methods that retrieve do it (:mod:`stexp.models.retrieval`: cosine finds, the inverse square of the distance
    weighs), in the standardised features of the frozen encoder. How many, and whether other sections are in the bank,
    is chosen on the shown spots.
    """
    (k, bank), held_out = _best_bank(task)
    mean, spread = _retrieve(task, k, bank)
    error = error_per_gene(task.expression, held_out)
    # the spread among neighbours says where, the errors of held-out spots how much
    typical = np.sqrt(np.square(spread).mean(axis=0))
    return Completed(mean, spread * (error / np.where(typical > 0, typical, 1)), held_out, {"k": k, "bank": bank})


def ridge_features(task: SpotTask) -> Completed:
    """Ridge from frozen features (256 principal components), fitted on the spots shown and those of other sections."""
    held_out = out_of_fold(task, _ridge)
    mean = _ridge(task)
    return Completed(mean, np.tile(error_per_gene(task.expression, held_out), (len(mean), 1)), held_out)


def _ridge(task: SpotTask) -> np.ndarray:
    assert task.features is not None
    features, expression = _bank(task)
    return RidgeProbe.fit(features, np.asarray(expression, dtype=np.float64)).predict(task.features[~task.shown])


def retrieval_kriging(task: SpotTask) -> Completed:
    """Retrieval, and its errors at the shown spots kriged to the others."""
    (k, bank), held_out = _best_bank(task)
    return _kriged(task, lambda own: _retrieve(own, k, bank)[0], held_out, {"k": k, "bank": bank})


def ridge_kriging(task: SpotTask) -> Completed:
    """Ridge from frozen features, and its errors at the shown spots kriged to the others."""
    return _kriged(task, _ridge, out_of_fold(task, _ridge), {})


def _kriged(task: SpotTask, trend: Callable[[SpotTask], np.ndarray], held_out: np.ndarray, settings: dict) -> Completed:
    """Regression kriging (Odeh et al. 1995): a trend, and kriging of what it leaves.

    Parameters
    ----------
    held_out : (S, G)
        The trend at the shown spots, from others: a trend that saw them would leave less than it does elsewhere.
    """
    xy, rest = task.xy[task.shown], task.expression - held_out
    kriging = Kriging.fit(xy, rest, task.folds)
    mean, sd = kriging.predict(xy, rest, task.xy[~task.shown])
    return Completed(trend(task) + mean, sd, held_out + kriging.held_out, settings | kriging.settings)
