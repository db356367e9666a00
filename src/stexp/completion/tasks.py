"""What a method gets to see of a section that is measured in part, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

N_FOLDS = 5
FOLDS_OF_GENES = 4


@dataclass(frozen=True)
class SpotTask:
    """Expression of some spots of a section, and the places of all.

    Parameters
    ----------
    xy : (N, 2)
        Places of all spots, in pitches.
    array_xy : (N, 2)
        Column and row of all spots on a square array.
    shown : (N,) bool
    expression : (S, G)
        Of the shown spots, in their order.
    features : (N, F) or None
        All tiles seen by a frozen image encoder: the image is measured everywhere.
    references : (R, G)
        Expression of spots of other sections, all measured, each section's gene means moved to those of `expression`.
    reference_features : (R, F) or None
    reference_section : (R,) str
    reference_xy : (R, 2)
        In pitches of their sections.
    compact : bool
        Whether the hidden spots lie together: then those held out of the shown ones do, too.
    seed
    """

    xy: np.ndarray
    array_xy: np.ndarray
    shown: np.ndarray
    expression: np.ndarray
    features: np.ndarray | None
    references: np.ndarray
    reference_features: np.ndarray | None
    reference_section: np.ndarray
    reference_xy: np.ndarray
    compact: bool = False
    seed: int = 0

    @property
    def shown_features(self) -> np.ndarray:
        """Features (S, F) of the shown spots of a task that has some."""
        assert self.features is not None
        return self.features[self.shown]

    @property
    def folds(self) -> list[np.ndarray]:
        """Parts of the shown spots, masks (S,), each to be held out in turn; drawn, or stripes of neighbours."""
        n = int(self.shown.sum())
        if self.compact:
            xy = self.xy[self.shown]
            order = np.argsort(xy[:, np.ptp(xy, axis=0).argmax()], kind="stable")
            number = np.empty(n, dtype=int)
            number[order] = np.arange(n) * N_FOLDS // n
        else:
            number = np.random.default_rng([self.seed, 21]).permutation(np.arange(n) % N_FOLDS)
        return [number == i for i in range(N_FOLDS)]

    def without(self, fold: np.ndarray) -> SpotTask:
        """The task within the shown spots, of which those of a fold (S,) are asked for."""
        return replace(
            self,
            xy=self.xy[self.shown],
            array_xy=self.array_xy[self.shown],
            shown=~fold,
            expression=self.expression[~fold],
            features=None if self.features is None else self.shown_features,
        )


@dataclass(frozen=True)
class GeneTask:
    """Some genes of all spots of a section, and a reference that has all genes.

    Parameters
    ----------
    xy : (N, 2)
        In pitches.
    expression : (N, S)
        Shown genes, relative to the counts of all shown genes of a spot: no other total is known.
    reference_shown : (R, S)
        The same genes of the reference, relative to the same.
    reference_hidden : (R, H)
        Genes that are asked for, on the scale of the truth.
    reference_section : (R,) str
    reference_xy : (R, 2) or None
        In pitches; None of cells that have no place.
    seed
    """

    xy: np.ndarray
    expression: np.ndarray
    reference_shown: np.ndarray
    reference_hidden: np.ndarray
    reference_section: np.ndarray
    reference_xy: np.ndarray | None = None
    seed: int = 0

    @property
    def folds(self) -> list[np.ndarray]:
        """Parts of the shown genes, masks (S,), each to be held out in turn."""
        n = self.expression.shape[1]
        number = np.random.default_rng([self.seed, 22]).permutation(np.arange(n) % FOLDS_OF_GENES)
        return [number == i for i in range(FOLDS_OF_GENES)]

    def without(self, fold: np.ndarray) -> GeneTask:
        """The task within the shown genes, of which those of a fold (S,) are asked for."""
        return replace(
            self,
            expression=self.expression[:, ~fold],
            reference_shown=self.reference_shown[:, ~fold],
            reference_hidden=self.reference_shown[:, fold],
        )


Task = TypeVar("Task", SpotTask, GeneTask)
Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Completed:
    """What a method makes of a task.

    Parameters
    ----------
    mean, sd : (H, G)
        Hidden spots x genes, or all spots x hidden genes: expression, and the standard deviation of its error.
    held_out : (S, G) or (N, S)
        What is shown, predicted while it was held out; NaN where it was not.
    settings
        Chosen on what is shown.
    """

    mean: np.ndarray
    sd: np.ndarray
    held_out: np.ndarray
    settings: dict[str, Any] = field(default_factory=dict)


Predict = Callable[[Task], np.ndarray]


def out_of_fold(task: Task, predict: Predict[Task]) -> np.ndarray:
    """What is shown, each part predicted from the others, shaped as ``task.expression``."""
    out = np.empty(task.expression.shape)
    for fold in task.folds:
        part = predict(task.without(fold))
        if isinstance(task, SpotTask):
            out[fold] = part
        else:
            out[:, fold] = part
    return out


def relative_error(task: SpotTask | GeneTask, held_out: np.ndarray) -> float:
    """Variance of the error as a share of each gene's variance over spots, mean over genes; 1 knows nothing."""
    scored = np.isfinite(held_out).any(axis=1)
    observed = np.asarray(task.expression[scored], dtype=np.float64)
    spread = observed.var(axis=0)
    varies = spread > 0
    if not varies.any():
        return 1.0
    return float(((held_out[scored] - observed).var(axis=0)[varies] / spread[varies]).mean())


@dataclass(frozen=True)
class Choice(Generic[Setting]):
    """A setting, with what it makes of the shown part when that is held out."""

    setting: Setting
    held_out: np.ndarray


def choose(task: Task, settings: Sequence[Setting], predict: Callable[[Task, Setting], np.ndarray]) -> Choice[Setting]:
    """The setting with the least `relative_error` on what is shown; the first of equals."""
    best: tuple[float, Choice[Setting]] | None = None
    for setting in settings:
        held_out = out_of_fold(task, partial(_with, predict, setting))
        error = relative_error(task, held_out)
        if best is None or error < best[0]:
            best = error, Choice(setting, held_out)
    assert best is not None
    return best[1]


def _with(predict: Callable[[Task, Setting], np.ndarray], setting: Setting, task: Task) -> np.ndarray:
    return predict(task, setting)


def error_per_gene(expression: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Root mean square of the errors of every gene of what was held out, (G,)."""
    return np.sqrt(np.nanmean(np.square(held_out - expression), axis=0))
