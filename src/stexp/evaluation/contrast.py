"""Whether contrastive embeddings learned anything: their loss beside log(batch), matched tiles beside chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from stexp.arguments import Count, NotNegative, Share
from stexp.evaluation.records import read_json

NAME = "contrast.json"
"""File of a run folder, with a row an epoch."""
BELOW = 0.99  # of log(batch)
DEVIATIONS = 4.0  # of the number of matches by chance: once in 30,000 epochs


class Epoch(TypedDict):
    """Means over the spots of one epoch.

    ``loss`` in nats; ``log_batch``, the loss of embeddings that carry nothing; ``matched``, share of tiles whose own
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

    An epoch did whose loss is a hundredth below log(batch), or whose matches are more than chance explains.
    """
    lowest = min(epochs, key=lambda epoch: epoch["loss"] - epoch["log_batch"])
    most = max(epochs, key=lambda epoch: epoch["matched"] - epoch["chance"])
    return {
        "loss": lowest["loss"],
        "log_batch": lowest["log_batch"],
        "matched": most["matched"],
        "chance": most["chance"],
        "left_chance": any(map(_left_chance, epochs)),
        "epochs": list(epochs),
    }


def _left_chance(epoch: Epoch) -> bool:
    chance = epoch["chance"]
    deviation = math.sqrt(chance * (1 - chance) / epoch["n_spots"])
    return epoch["loss"] < BELOW * epoch["log_batch"] or epoch["matched"] > chance + DEVIATIONS * deviation


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
        return f"{numbers[0].upper()}{numbers[1:]}."
    return f"The training never left chance: {numbers}."
