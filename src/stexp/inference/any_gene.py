"""Genes outside a run's panel on its held-out spots: what its method makes of them, and what floors read there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stexp.data.datamodule import SpotDataModule
from stexp.data.rows import Rows
from stexp.inference.description import describe_model
from stexp.inference.rebuild import rebuild_encoder
from stexp.inference.references import bank_of
from stexp.inference.trained import TrainedMethod
from stexp.models.encoders.frozen import FrozenEncoder
from stexp.models.encoders.image import ImageEncoder
from stexp.models.method import Prediction
from stexp.runs.comparison import colours, kept_random_components
from stexp.runs.finished import FinishedRun

Inputs = tuple[Rows | None, np.ndarray, Sequence[Rows]]
"""Features, colours, and random components that floors read; see :func:`~stexp.runs.comparison.floors_under`."""


@dataclass(frozen=True)
class AnyGene:
    """A run whose method predicts any gene that its references measure.

    Parameters
    ----------
    predict
        The held-out spots of the run, for the panel of the data it is given.
    inputs
        What floors read of the run's spots.
    """

    predict: Callable[[SpotDataModule], Prediction]
    inputs: Callable[[], Inputs]


def any_gene(run: FinishedRun) -> AnyGene | None:
    """None of a run whose method predicts its panel alone."""
    if run.embeddings is not None:
        embeddings, how = run.for_retrieval
        kept = embeddings.obsm["features"], embeddings.obsm["colour"], kept_random_components(embeddings)
        return AnyGene(lambda data: run.retrieve(data, how)[0], lambda: kept)
    if run.protocol.truth == "residuals":
        return None
    facts, weights = describe_model(run)
    bank = bank_of(run, weights)
    if bank is None:
        return None
    model = TrainedMethod(facts, weights, bank)
    return AnyGene(lambda data: predict_together(run, model, data.panel), lambda: _inputs(run, model, weights))


def predict_together(run: FinishedRun, model: TrainedMethod, genes: list[str]) -> Prediction:
    """The held-out spots of a run, section by section, from their embeddings in its predictions."""
    data, rows = run.data, run.data.rows("test")
    section, query = data.spots["section"].to_numpy(str)[rows], run.predictions.obsm["image_embedding"]
    shape = len(rows), len(genes)
    predicted, uncertainty = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
    for name in data.names("test"):
        own = np.flatnonzero(section == name)
        made: dict[str, Any] = model.predict_together(query[own], data.xy_um[rows[own]], genes)
        predicted[own], uncertainty[own] = made["predicted"], made["uncertainty"]
    return Prediction(torch.from_numpy(predicted), torch.from_numpy(uncertainty))


def _inputs(run: FinishedRun, model: TrainedMethod, weights: dict[str, torch.Tensor]) -> Inputs:
    """Features as the run cached them, computed where they are gone; without those of random weights."""
    data, encoder = run.data, rebuild_encoder(model.facts["features_by"], weights)
    assert isinstance(encoder, ImageEncoder)  # of a method that reads frozen features
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixed = model.precision(device) == "bf16-mixed"
    context = torch.autocast(device.type, torch.bfloat16) if mixed else None
    data.encoder = FrozenEncoder(encoder, device, context, data.cache_dir, data.eval_batch_size)
    return data.tile_features, colours(data), ()
