"""Floors and methods by name: what each completes, and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stexp.completion.genes import knn_reference, reference_mean, ridge_genes, ridge_neighbours
from stexp.completion.graph import masked_genes, masked_graph
from stexp.completion.image import retrieval, retrieval_kriging, ridge_features, ridge_kriging
from stexp.completion.shown import Known
from stexp.completion.spots import cubic, kriging, kriging_per_gene, linear, nearest, shown_mean
from stexp.completion.tasks import Completed, GeneTask, SpotTask
from stexp.completion.transformer import grid_transformer
from stexp.errors import InputError, did_you_mean

FLOORS: dict[Known, dict[str, Callable[[Any], Completed]]] = {
    "spots": {
        "mean": shown_mean,
        "nearest": nearest,
        "linear": linear,
        "cubic": cubic,
        "kriging": kriging,
        "kriging_per_gene": kriging_per_gene,
        "ridge_features": ridge_features,
    },
    "genes": {"reference_mean": reference_mean, "knn_reference": knn_reference, "ridge": ridge_genes},
}
METHODS: dict[Known, dict[str, Callable[[Any], Completed]]] = {
    "spots": {
        "retrieval": retrieval,
        "retrieval_kriging": retrieval_kriging,
        "ridge_kriging": ridge_kriging,
        "transformer": grid_transformer,
        "masked_graph": masked_graph,
    },
    "genes": {"ridge_neighbours": ridge_neighbours, "masked_graph": masked_genes},
}
OF_IMAGES = ("ridge_features", "retrieval", "retrieval_kriging", "ridge_kriging")
"""Which need a section with an image."""
OF_PLACES = ("ridge_neighbours",)
"""Which need places in the reference."""


def what_it_does(known: Known, name: str) -> str:
    """The first line of a completion's description."""
    return str((FLOORS[known] | METHODS[known])[name].__doc__).partition("\n")[0]


def chosen_methods(known: Known, names: list[str] | None, task: SpotTask | GeneTask) -> list[str]:
    """Floors that a task allows, then methods: those named, or all that it allows.

    Raises
    ------
    InputError
        A name that is no method, or of one that the task does not allow.
    """
    lacking: tuple[str, ...] = OF_IMAGES if isinstance(task, SpotTask) and task.features is None else ()
    if isinstance(task, GeneTask) and task.reference_xy is None:
        lacking = OF_PLACES
    choices = METHODS[known]
    for name in names or ():
        if name not in choices:
            meant = did_you_mean(name, choices)
            raise InputError(f"methods={name}: none that completes {known}; choose {', '.join(choices)}{meant}")
        if name in lacking:
            needs = "a section with an image" if name in OF_IMAGES else "a reference whose spots have places"
            raise InputError(
                f"methods={name} needs {needs}; {', '.join(own for own in choices if own not in lacking)} would fit"
            )
    wanted = list(choices) if names is None else names
    return [name for name in [*FLOORS[known], *wanted] if name not in lacking]


def complete(known: Known, name: str, task: SpotTask | GeneTask) -> Completed:
    """What a floor or method makes of a task."""
    return (FLOORS[known] | METHODS[known])[name](task)
