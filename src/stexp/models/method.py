"""The interface of a method: what training, prediction and export may ask of it, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch

from stexp.data.batches import Batching, SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.data.features import TileEncoder
from stexp.models.encoders.image import ImageEncoder


@dataclass
class Prediction:
    """Expression of B spots and G genes, with what the method can say besides; None where it cannot.

    Attributes
    ----------
    predicted : (B, G)
        On the scale of ``SpotBatch.target``.
    uncertainty : (B, G)
        Standard deviation, on the same scale.
    obs : DataFrame, B rows
        Columns that describe each spot, such as where its prediction comes from.
    image_embedding : (B, D)
        Of the tile, in the space that is searched.
    neighbours : (B, n) int64
        The retrieved references that count most, as positions in ``References.retrieved_rows``, or among the
        prototypes of these.
    neighbour_weights : (B, n)
        Their weights.
    """

    predicted: torch.Tensor
    uncertainty: torch.Tensor | None = None
    obs: pd.DataFrame | None = None
    image_embedding: torch.Tensor | None = None
    neighbours: torch.Tensor | None = None
    neighbour_weights: torch.Tensor | None = None

    def take(self, rows: torch.Tensor) -> Prediction:
        """Those of some spots, in their order."""

        def taken(value: Any) -> Any:
            if value is None:
                return None
            return value.iloc[rows.numpy()].reset_index(drop=True) if isinstance(value, pd.DataFrame) else value[rows]

        return Prediction(**{name: taken(value) for name, value in vars(self).items()})

    @classmethod
    def concatenate(cls, parts: Sequence[Prediction]) -> Prediction:
        """Predictions of several batches as one, in their order, on the CPU, floating point numbers in float32."""

        def joined(name: str) -> Any:
            values = [vars(part)[name] for part in parts]
            if all(value is None for value in values):
                return None
            if isinstance(values[0], pd.DataFrame):
                return pd.concat(values, ignore_index=True)
            whole = torch.cat(values).cpu()
            return whole.float() if whole.is_floating_point() else whole

        return cls(**{field.name: joined(field.name) for field in fields(cls)})


@dataclass(frozen=True)
class References:
    """Spots that a retrieval method embedded, and those of them that it searched.

    Attributes
    ----------
    rows : (N,) int64
        Rows of ``SpotDataModule.spots``: all spots that may be chosen from, kept for retrieving again.
    embedding : (N, D)
        Their embeddings.
    sections : list of str
        Sections that were searched.
    retrieved_rows : (R,) int64
        Rows of the spots that were searched, a part of `rows`.
    prototype : (N,) int64 or None
        Which prototype each of `rows` belongs to, of a method that searches prototypes instead of spots.
    """

    rows: np.ndarray
    embedding: torch.Tensor
    sections: list[str]
    retrieved_rows: np.ndarray
    prototype: np.ndarray | None = None


class Method(pl.LightningModule, ABC):
    """A way to predict expression from tiles.

    A method defines ``training_step``, ``configure_optimizers`` and :meth:`predict_step`, and overrides those of the
    class attributes below that differ. What it needs of the data besides batches it asks :attr:`data` for, in
    ``on_fit_start`` and ``on_predict_start``.
    """

    batching: Batching = "spots"
    """A batch is drawn from the spots of all sections, or is one whole section."""
    closed_form: bool = False
    """It is fitted by one calculation, without optimizer and epochs; see :class:`~stexp.models.closed_form.ClosedForm`.
    """
    several_devices: bool = False
    """Its loss of a batch is the same when the batch is split among devices; see :func:`~stexp.models.gather.gather`.
    """
    predicts_slides: bool = True
    """A tile and its frozen features are all that :meth:`predict_step` reads, so that it predicts bare slides."""
    together: bool = False
    """Of a slide, features become embeddings tile by tile (`embed_features`), which are predicted all
    together (`predict_together`)."""
    fine_tunes: bool = True
    """Its training can begin at the weights of another one; see :mod:`stexp.inference.carried`."""
    spot_context: str | None = None
    """Where spots are embedded: what a spot attends to; see :class:`~stexp.protocol.Protocol`."""
    references: References | None = None
    """Spots that the last validation or prediction retrieved from; None of a method that does not retrieve."""

    @property
    def frozen_encoder(self) -> ImageEncoder | None:
        """The encoder that never trains and whose pooled features are all that is read of a tile; None: more is read.

        Batches then may come with ``features`` and no ``image``, which spares cutting and encoding the tiles.
        """
        return None

    def reads_features_of(self, encoder: TileEncoder) -> bool:
        """Whether the features by an encoder are what this method would compute, and all that it reads of a tile."""
        own = self.frozen_encoder
        return own is not None and encoder.is_of(own)

    @property
    def data(self) -> SpotDataModule:
        """Data module of the trainer that the method is attached to."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # which Lightning sets without declaring it

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """Frozen features of tiles (B, F) to embeddings (B, D), of a method that predicts a slide `together`."""
        raise TypeError(f"{type(self).__name__} predicts spot by spot")

    def predict_together(self, embedding: torch.Tensor, xy_um: torch.Tensor) -> Prediction:
        """Expression of a whole slide from the embeddings of its tiles (Q, D) and where they lie (Q, 2)."""
        raise TypeError(f"{type(self).__name__} predicts spot by spot")

    @abstractmethod
    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Predict the expression of the spots of a batch."""

    # Lightning hands on to callbacks whatever this returns, though its annotation has tensors alone
    def validation_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:  # type: ignore[override]
        """Predict a batch of validation spots; ``val/pearson`` is computed from it, and picks the checkpoint."""
        return self.predict_step(batch, batch_idx)

    def tune(self, data: SpotDataModule) -> dict:
        """Choose, after training and on validation spots, what the config leaves open.

        Returns
        -------
        dict
            What was chosen, for the record; plain values.
        """
        return {}

    def finish(self, data: SpotDataModule) -> dict:
        """Learn, after training and `tune`, what stands on the final weights; they are then kept in the checkpoint.

        Returns
        -------
        dict
            What is on record of it, plain values; empty where there is nothing to learn.
        """
        return {}
