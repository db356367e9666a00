"""Whether contrastive embeddings learned anything: their loss beside log(batch), matched tiles beside chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom
from typing_extensions import TypedDict

from stexp.arguments import Count, NotNegative, Share
from stexp.evaluation.records import read_json

NAME = "contrast.json"
"""File of a run folder, with a row an epoch."""
BELOW = 0.99  # of log(batch)
LEVEL = 0.001
"""Share of the trainings at chance that have more matches in any of their epochs than this allows."""


class Epoch(TypedDict):
    """Means over the spots of one epoch.

    ``loss``, InfoNCE in nats, with each tile's own spot its target, whatever the training's are; ``log_batch``, that
    of embeddings that carry nothing; ``matched``, share of tiles whose own
    spot is the nearest of its batch, and ``chance``, that share for embeddings that carry nothing.
    """

    epoch: Count
    n_spots: Count
    loss: NotNegative
    log_batch: NotNegative
    matched: Share
    chance: Share


class Epochs(TypedDict):
    """The file."""

    epochs: list[Epoch]


class Contrast(Epochs):
    """The lowest loss and the highest share of matches in a training, whether it left chance, and its epochs."""

    loss: NotNegative
    log_batch: NotNegative
    matched: Share
    chance: Share
    left_chance: bool


def read_contrast(run: Path) -> Contrast | None:
    """What a run's folder says of its contrastive training; None of other methods, and of runs of before."""
    if not (run / NAME).is_file():
        return None
    epochs = read_json(run / NAME, Epochs)["epochs"]
    return summarise(epochs) if epochs else None


def summarise(epochs: Sequence[Epoch]) -> Contrast:
    """The best of some epochs, and whether any of them left chance.

    An epoch did whose loss is a hundredth below log(batch), or whose matches are more than chance explains: as many
    have a binomial probability below `LEVEL` divided by the number of epochs (Bonferroni).
    """
    loss, log_batch, matched, chance, n_spots = (
        np.array([epoch[key] for epoch in epochs]) for key in ("loss", "log_batch", "matched", "chance", "n_spots")
    )
    tail = binom.sf(np.rint(matched * n_spots) - 1, n_spots, chance)  # of as many matches or more
    left_chance = (loss < BELOW * log_batch) | (tail < LEVEL / len(epochs))
    lowest = min(epochs, key=lambda epoch: epoch["loss"] - epoch["log_batch"])
    most = max(epochs, key=lambda epoch: epoch["matched"] - epoch["chance"])
    return {
        "loss": lowest["loss"],
        "log_batch": lowest["log_batch"],
        "matched": most["matched"],
        "chance": most["chance"],
        "left_chance": bool(left_chance.any()),
        "epochs": list(epochs),
    }


def describe_contrast(metrics: Mapping[str, Any]) -> str:
    """A sentence on the contrastive training of a run, from its ``metrics.json``; empty of other methods."""
    contrast = metrics.get("contrast")
    if contrast is None:
        return ""
    numbers = (
        f"contrastive loss {contrast['loss']:.3f} at its lowest, {contrast['log_batch']:.3f} for embeddings that carry "
        f"nothing (log of the batch); {100 * contrast['matched']:.1f} % of tiles matched their spot at most, "
        f"{100 * contrast['chance']:.1f} % by chance"
    )
    if contrast["left_chance"]:
        if contrast["loss"] >= contrast["log_batch"]:  # which rests on the matches alone
            numbers += "; the loss is high since wrong matches are held for certain: a higher temperature lowers it"
        return f"{numbers[0].upper()}{numbers[1:]}."
    return f"The training never left chance: {numbers}."
