"""Floors of spots: what position alone gives."""

from __future__ import annotations

import numpy as np

from stexp.completion.interpolation import Kind, interpolate
from stexp.completion.kriging import Kriging
from stexp.completion.tasks import Completed, SpotTask, error_per_gene, out_of_fold


def shown_mean(task: SpotTask) -> Completed:
    """Mean of every gene over the shown spots, the same at every spot."""
    held_out = out_of_fold(task, _mean)
    mean = _mean(task)
    return Completed(mean, np.tile(error_per_gene(task.expression, held_out), (len(mean), 1)), held_out)


def _mean(task: SpotTask) -> np.ndarray:
    return np.tile(task.expression.mean(axis=0, dtype=np.float64), (int((~task.shown).sum()), 1))


def _interpolated(task: SpotTask, kind: Kind) -> Completed:
    def predict(own: SpotTask) -> np.ndarray:
        return interpolate(own.xy[own.shown], own.expression, own.xy[~own.shown], kind)

    held_out = out_of_fold(task, predict)
    mean = predict(task)
    return Completed(mean, np.tile(error_per_gene(task.expression, held_out), (len(mean), 1)), held_out)


def nearest(task: SpotTask) -> Completed:
    """Expression of the nearest shown spot."""
    return _interpolated(task, "nearest")


def linear(task: SpotTask) -> Completed:
    """Linear interpolation on the triangles between shown spots; outside of them the nearest."""
    return _interpolated(task, "linear")


def cubic(task: SpotTask) -> Completed:
    """Cubic interpolation on the same triangles (Clough and Tocher); outside of them the nearest."""
    return _interpolated(task, "cubic")


def kriging(task: SpotTask) -> Completed:
    """Ordinary kriging with one variogram for all genes, chosen on the shown spots."""
    return _kriged(task, per_gene=False)


def kriging_per_gene(task: SpotTask) -> Completed:
    """Ordinary kriging with a variogram for each gene."""
    return _kriged(task, per_gene=True)


def _kriged(task: SpotTask, per_gene: bool) -> Completed:
    own = fit_kriging(task, per_gene)
    mean, sd = own.predict(task.xy[task.shown], task.expression, task.xy[~task.shown])
    return Completed(mean, sd, own.held_out, own.settings)


def fit_kriging(task: SpotTask, per_gene: bool = False) -> Kriging:
    """Variograms of the shown spots of a task."""
    return Kriging.fit(task.xy[task.shown], task.expression, task.folds, per_gene)
