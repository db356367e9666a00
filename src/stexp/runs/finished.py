"""A finished run, opened again with its data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from omegaconf import OmegaConf

from stexp.config import build_data, load_run, load_sections
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.inference.model_folder import Bank
from stexp.models.retrieval import ReferenceIndex, choose_references
from stexp.runs.rescore import NEEDED
from stexp.runs.results import changed_data


class Run:
    """A finished run and its data, as the run read them.

    Attributes
    ----------
    before : AnnData
        ``predictions.h5ad``.
    kept : AnnData or None
        ``embeddings.h5ad`` of a method that retrieves.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.cfg = folder, load_run(folder)
        self.before = predictions.read(folder / "predictions.h5ad", "uns/stexp/chosen", "layers/predicted")
        self.record = predictions.read_json(folder / "provenance.json", "command", "precision", "data_manifest")
        self.protocol = predictions.protocol_of(self.before)
        self.panel = list(self.before.var_names)
        self.chosen = json.loads(self.before.uns["stexp"]["chosen"])
        self.sections = load_sections(self.cfg, self.protocol)
        changed = changed_data(folder, self.sections)
        if changed:
            raise InputError(
                f"the data under {self.cfg.data.root} changed since {folder} ({', '.join(changed[:5])}); train again"
            )
        self.data = self.data_of(self.panel)
        self.kept = None
        if (folder / "embeddings.h5ad").is_file():
            self.kept = predictions.read(folder / "embeddings.h5ad", *NEEDED)
            if list(self.data.spots.index) != list(self.kept.obs_names):
                raise InputError(f"the spots under {self.cfg.data.root} are no longer those of {folder}; train again")

    def data_of(self, panel: list[str]):
        """The data module of the run, with other genes."""
        return build_data(self.cfg, self.sections, self.protocol, str(self.cfg.fold), panel=panel)

    def references(self) -> np.ndarray:
        """Rows of the data's spots that are retrieved from."""
        rows = np.flatnonzero(~np.isnan(self.kept.obsm["spot_embedding"]).any(axis=1))
        which = OmegaConf.to_container(OmegaConf.create([self.cfg.model.reference]))[0]
        return rows[choose_references(self.data.spots.iloc[rows], which)]

    def bank(self) -> Bank | None:
        """The references with all genes that they and every section that trained measure."""
        if self.kept is None:
            return None
        data, rows = self.data, self.references()
        spots = data.spots.iloc[rows]
        used = {*spots["section"], *data.names("train", "validation")}
        genes = sorted(set.intersection(*(set(section.genes) for section in data.sections if section.name in used)))
        counts, rest = [], []
        for section in data.sections:
            here = data.spots["section"].to_numpy() == section.name
            chosen = np.isin(np.flatnonzero(here), rows)
            if chosen.any():
                x = section.spots.X[:, section.genes.get_indexer(genes)]
                counts.append(x[chosen])
                rest.append(sp.csr_matrix(x[~chosen].sum(axis=0)))
        return Bank(
            embedding=self.kept.obsm["spot_embedding"][rows].astype(np.float32),
            section=spots["section"].to_numpy(str),
            patient=spots["patient"].to_numpy(str),
            spot=spots["spot"].to_numpy(str),
            counts=sp.vstack(counts, format="csr"),
            total_counts=spots["total_counts"].to_numpy(np.float64),
            genes=genes,
            rest=sp.vstack(rest, format="csr") if self.protocol.truth == "gene" else None,
        )

    def retrieve(self, genes: list[str]) -> tuple:
        """The held-out spots with other genes: the data module, predicted and spread (Q, len(genes))."""
        data, rows = self.data_of(genes), self.references()
        spots, model = data.spots.iloc[rows], self.cfg.model
        index = ReferenceIndex(
            torch.from_numpy(self.kept.obsm["spot_embedding"][rows]),
            spots["section"].to_numpy(str),
            spots["patient"].to_numpy(str),
        )
        query = torch.from_numpy(self.kept.obsm["image_embedding"][data.rows("test")])
        neighbours = index.search(query, self.chosen["k"], model.distance, model.weighting)
        predicted, spread = index.average(neighbours, torch.from_numpy(data.target[rows]))
        return data, predicted.numpy(), spread.numpy()

    def outside(self, genes: list[str]) -> list[str]:
        """Those outside the panel that can be retrieved and scored."""
        if self.kept is None or (self.protocol.truth == "spot" and self.protocol.library == "panel"):
            return []
        common = set.intersection(*(set(section.genes) for section in self.data.sections)) - set(self.panel)
        return [gene for gene in genes if gene in common]

    def held_out(self, genes: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Observed, predicted and spread of the held-out spots, (Q, len(genes)); NaN where nothing is known."""
        out = tuple(np.full((self.before.n_obs, len(genes)), np.nan, dtype=np.float32) for _ in range(3))
        where = pd.Index(genes)
        inside = [gene for gene in genes if gene in self.before.var_names]
        before = self.before[:, inside].layers
        for array, key in zip(out, ("observed", "predicted", "uncertainty"), strict=True):
            array[:, where.get_indexer(inside)] = before[key]
        outside = self.outside(genes)
        if outside:
            data, predicted, spread = self.retrieve(outside)
            observed = data.target[data.rows("test")]
            for array, values in zip(out, (observed, predicted, spread), strict=True):
                array[:, where.get_indexer(outside)] = values
        return out
