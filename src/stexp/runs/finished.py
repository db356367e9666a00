"""A finished run, opened again with its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import anndata as ad
import numpy as np
import pandas as pd
import torch

from stexp import construct
from stexp.arguments import Count, checked
from stexp.data.batches import tensor_or_rows
from stexp.data.datamodule import SpotDataModule
from stexp.data.dataset import DataSet
from stexp.data.rows import some_rows
from stexp.data.section import Section
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.evaluation.records import Chosen, read_provenance
from stexp.models.method import Prediction
from stexp.models.prototypes import Standing, stand_for
from stexp.models.retrieval import Distance, Reference, ReferenceIndex, Weighting, choose_references, retrieve
from stexp.protocol import Protocol
from stexp.runs.folder import RunFolder
from stexp.runs.prototypes import name_prototypes
from stexp.runs.provenance import changed_sections

EMBEDDINGS = (
    *("obs/role", "obs/section"),
    *(f"obsm/{key}" for key in ("spot_embedding", "image_embedding", "features", "colour")),
)
"""What retrieval reads of ``embeddings.h5ad``."""


@checked("model")
@dataclass(frozen=True)
class Retrieval:
    """How references are searched: the settings of a retrieval method that its encoders do not depend on."""

    k: Count
    distance: Distance
    weighting: Weighting
    reference: Reference


class FinishedRun:
    """The results of a run, and its data as the run read them.

    Parameters
    ----------
    folder
        Its data must still be there, unchanged.
    sections
        All sections of its data set as it had them, where they are at hand; None: they are read again.

    Attributes
    ----------
    predictions : AnnData
        ``predictions.h5ad``.
    embeddings : AnnData or None
        ``embeddings.h5ad`` of a method that retrieves.
    sections : list of Section
    data : SpotDataModule
    retrieval : Retrieval or None
        As the run was predicted.

    Raises
    ------
    InputError
        The run is not finished, or its data changed.
    """

    def __init__(self, folder: RunFolder, sections: list[Section] | None = None) -> None:
        self.folder, self.config = folder.require_model(), folder.config
        construct.require_plugins(self.config.get("plugins"), folder.path)
        self.dataset = DataSet.of(self.config)
        path = folder.path
        self.predictions: ad.AnnData = predictions.read(path / "predictions.h5ad", *predictions.OF_RUN)
        self.provenance = read_provenance(path)
        self.chosen: Chosen = predictions.read_fact(self.predictions, "chosen", Chosen)
        self.sections: list[Section] = self.dataset.read_sections(self.protocol) if sections is None else sections
        changed = changed_sections(path, self.sections)
        if changed:
            raise InputError(
                f"the data under {self.dataset.root} changed since {path} ({', '.join(changed[:5])}); train again"
            )
        self.data = self.serve(self.panel)
        self.embeddings: ad.AnnData | None = None
        self.retrieval: Retrieval | None = None
        if (path / "embeddings.h5ad").is_file():
            self.embeddings = predictions.read(path / "embeddings.h5ad", *EMBEDDINGS)
            model = self.config["model"]
            settings = {key: model.get(key) for key in ("distance", "weighting", "reference")}
            if self.corrects:
                settings["weighting"] = "similarity"
            self.retrieval = Retrieval(self.chosen.get("k"), **settings)
            self._check_spots(self.embeddings)

    @property
    def corrects(self) -> bool:
        """Whether what is retrieved is corrected by a residual, which genes outside the panel do without."""
        return bool(self.config["model"].get("correct"))

    @property
    def for_retrieval(self) -> tuple[ad.AnnData, Retrieval]:
        """`embeddings` and `retrieval` of a run whose method retrieves."""
        if self.embeddings is None or self.retrieval is None:
            raise ValueError(f"the method of {self.folder.path} does not retrieve")
        return self.embeddings, self.retrieval

    def _check_spots(self, embeddings: ad.AnnData) -> None:
        spots = self.data.spots
        if list(spots.index) != list(embeddings.obs_names) or list(spots["role"]) != list(embeddings.obs["role"]):
            raise InputError(
                f"the spots under {self.dataset.root} are no longer those of {self.folder.path}; train again"
            )

    @cached_property
    def protocol(self) -> Protocol:
        return predictions.protocol_of(self.predictions)

    @property
    def panel(self) -> list[str]:
        return list(self.predictions.var_names)

    @property
    def fold(self) -> str:
        return str(self.predictions.uns["stexp"]["fold"])

    def serve(self, panel: list[str]) -> SpotDataModule:
        """The data module of the run, with a panel that may be another."""
        config = self.config
        return self.dataset.serve(self.sections, self.protocol, str(config["fold"]), config["seed"], panel)

    def references(self, which: Reference) -> np.ndarray:
        """Rows of the data's spots that are retrieved from; see :func:`~stexp.models.retrieval.choose_references`."""
        embeddings, _ = self.for_retrieval
        rows = np.flatnonzero(~np.isnan(embeddings.obsm["spot_embedding"]).any(axis=1))
        return rows[choose_references(self.data.spots.iloc[rows], which)]

    def standing(self, rows: np.ndarray) -> Standing | None:
        """Prototypes that stand for the references `rows`; None of a run that searches spots."""
        embeddings, _ = self.for_retrieval
        if "prototype" not in embeddings.obs:
            return None
        number = embeddings.obs["prototype"].to_numpy(np.int64)[rows]
        return stand_for(number, torch.from_numpy(embeddings.obsm["spot_embedding"][rows]), self.data.spots.iloc[rows])

    def named_prototypes(self, rows: np.ndarray) -> pd.DataFrame | None:
        """`standing` as a table that predictions name, see :func:`~stexp.runs.prototypes.name_prototypes`."""
        standing, (embeddings, _) = self.standing(rows), self.for_retrieval
        if standing is None:
            return None
        return name_prototypes(self.data, standing, rows, torch.from_numpy(embeddings.obsm["spot_embedding"][rows]))

    def retrieve(self, data: SpotDataModule, how: Retrieval) -> tuple[Prediction, np.ndarray]:
        """Predict the held-out spots anew from the kept embeddings.

        Parameters
        ----------
        data
            Of this run, with the genes to predict; see `serve`.

        Returns
        -------
        Prediction
            Its neighbours are rows of the data's spots, or positions among the prototypes of the second result, see
            `standing`.
        (N,) int64
            Rows of the data's spots that were retrieved from.
        """
        embeddings, _ = self.for_retrieval
        rows = self.references(how.reference)
        spots, searched = data.spots.iloc[rows], torch.from_numpy(embeddings.obsm["spot_embedding"][rows])
        k, standing = how.k, self.standing(rows)
        if standing is not None:
            searched, spots = standing.embedding, standing.names
            k = min(k, len(searched))  # as the method does
        index = ReferenceIndex(searched, spots["section"].to_numpy(str), spots["patient"].to_numpy(str))
        query = torch.from_numpy(embeddings.obsm["image_embedding"][data.rows("test")])
        expression = tensor_or_rows(some_rows(data.target, rows), query.device)
        if standing is not None:
            expression = standing.mean(torch.from_numpy(data.target[rows]))
        prediction = retrieve(index, query, expression, k, how.distance, how.weighting)
        neighbours = prediction.neighbours
        if standing is None and neighbours is not None:
            neighbours = torch.from_numpy(rows)[neighbours]
        return replace(prediction, image_embedding=query, neighbours=neighbours), rows

    def outside_panel(self, genes: list[str]) -> list[str]:
        """Those of some genes that the panel lacks, and that can be predicted from references and scored."""
        if self.protocol.truth != "gene" and self.protocol.library == "panel":
            return []
        common = set.intersection(*(set(section.genes) for section in self.data.sections)) - set(self.panel)
        return [gene for gene in genes if gene in common]

    def held_out(
        self, genes: list[str], predict: Callable[[SpotDataModule], Prediction] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Observed, predicted and spread of the held-out spots, (Q, len(genes)); NaN where nothing is predicted.

        Parameters
        ----------
        predict
            The held-out spots for the panel of the data it is given; None: of genes outside the panel nothing is known.
        """
        observed, predicted, spread = np.full((3, self.predictions.n_obs, len(genes)), np.nan, dtype=np.float32)
        columns = pd.Index(genes)
        inside = [gene for gene in genes if gene in self.predictions.var_names]
        layers = self.predictions[:, inside].layers
        for array, key in ((observed, "observed"), (predicted, "predicted"), (spread, "uncertainty")):
            array[:, columns.get_indexer(inside)] = layers[key]
        outside = [] if predict is None else self.outside_panel(genes)
        if predict is not None and outside:
            data, where = self.serve(outside), columns.get_indexer(outside)
            prediction = predict(data)
            observed[:, where] = data.target[data.rows("test")]
            predicted[:, where] = prediction.predicted.numpy()
            if prediction.uncertainty is not None:
                spread[:, where] = prediction.uncertainty.numpy()
        return observed, predicted, spread
