"""A trained method apart from the data it was trained on: tiles to embeddings, embeddings to expression."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch

from stexp import construct, hardware
from stexp.data.augment import augment
from stexp.data.batches import SpotBatch
from stexp.errors import InputError
from stexp.inference.model_folder import Bank
from stexp.models.retrieval import Neighbours, ReferenceIndex
from stexp.models.retrieval_method import RetrievalMethod
from stexp.protocol import Protocol

QUERIES, GENES = 4096, 1024  # spots and genes that are retrieved at once


class TrainedMethod:
    """A method with its weights, the encoder of the frozen features it reads, and its references.

    Parameters
    ----------
    facts
        ``model.json``.
    weights
        See :mod:`stexp.inference.model_folder`.
    bank
        Of a method that retrieves.
    """

    def __init__(self, facts: dict, weights: dict[str, torch.Tensor], bank: Bank | None) -> None:
        self.facts, self.bank, self.panel = facts, bank, facts["panel"]
        self.protocol = Protocol(**facts["protocol"])
        self._method = _build(facts["model"], weights, "model.", facts["sizes"])
        self._encoder = facts["features_by"] and _build(facts["features_by"], weights, "features.", {})
        self.k = 0 if bank is None else min(facts["k"], len(bank))

    def to(self, device: torch.device) -> None:
        """Move to a device, in the memory format of the training."""
        for module in (self._method, self._encoder):
            if module is not None:
                module.to(device)
                if self.facts["channels_last"]:
                    module.to(memory_format=torch.channels_last)

    def precision(self, device: torch.device) -> str:
        """That of the run, where the device multiplies it."""
        trained = self.facts["precision"]
        return trained if trained == hardware.choose_precision("auto", device.type) else "32-true"

    def _autocast(self, device: torch.device) -> AbstractContextManager:
        if self.precision(device) != "bf16-mixed":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    @torch.inference_mode()
    def encode(self, tiles: torch.Tensor, xy_um: torch.Tensor, array_xy: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the method makes of tiles alone.

        Parameters
        ----------
        tiles : (B, px, px, 3) uint8
            At the scale and in the stain of the training tiles, on the device of the method.
        xy_um, array_xy : (B, 2)
            Where they lie.

        Returns
        -------
        dict
            ``image_embedding`` (B, D) of a method that retrieves; of others ``predicted`` (B, G) and what they give
            besides.
        """
        image = augment(tiles, "none", 0)
        n, device = len(image), image.device
        with self._autocast(device):
            if isinstance(self._method, RetrievalMethod):
                return {"image_embedding": self._method.embed_image(image).float()}
            features = None if self._encoder is None else self._encoder(image).float()
            nothing = torch.empty(n, 0, device=device)  # no counts: a method that reads them fails
            batch = SpotBatch(
                image=image,
                expression=nothing,
                target=nothing,
                counts=nothing,
                xy_um=xy_um.to(device),
                array_xy=array_xy.to(device),
                section=torch.zeros(n, dtype=torch.int64, device=device),
                spot=torch.arange(n, device=device),
                context_expression=nothing[:, None],
                context_array_xy=nothing[:, None],
                context_mask=nothing[:, None, :0],
                features=features,
            )
            made = self._method.predict_step(batch, 0)
        made = {key: value.float() for key, value in made.items() if torch.is_tensor(value)}
        return made if features is None else {"image_embedding": features, **made}

    @torch.inference_mode()
    def retrieve(
        self, query: np.ndarray, genes: list[str], device: torch.device | str = "cpu", *, spread: bool = True
    ) -> dict[str, Any]:
        """Expression of `genes` for image embeddings (Q, D), from the bank, in bounded memory beside the result.

        Returns
        -------
        dict
            ``predicted`` and, with `spread`, ``uncertainty``, (Q, G) float32; ``obs``, see
            :meth:`~stexp.models.retrieval.ReferenceIndex.provenance`; ``neighbours`` and ``neighbour_weights``, see
            :meth:`~stexp.models.retrieval.Neighbours.heaviest`.
        """
        bank, method = self.bank, self._method
        index = ReferenceIndex(torch.from_numpy(bank.embedding).to(device), bank.section, bank.patient)
        found, obs, heaviest = [], [], []
        for part in torch.from_numpy(query).split(QUERIES):
            neighbours = index.search(part.to(device), self.k, method.distance, method.weighting)
            obs.append(index.provenance(neighbours))
            heaviest.append(neighbours.heaviest())
            # int32 and without distances: of many spots the neighbours take much of the memory
            found.append(Neighbours(neighbours.index.int(), neighbours.distance[:, :0], neighbours.weight))
        shape = (len(query), len(genes))
        made = {key: np.empty(shape, dtype=np.float32) for key in ("predicted", *(["uncertainty"] if spread else []))}
        for column in range(0, len(genes), GENES):
            columns = slice(column, column + GENES)
            expression = torch.from_numpy(bank.expression(genes[columns], self.protocol, self.panel)).to(device)
            for row, neighbours in zip(range(0, len(query), QUERIES), found, strict=True):
                rows = slice(row, row + QUERIES)
                for key, value in zip(made, index.average(neighbours, expression, spread=spread), strict=False):
                    made[key][rows, columns] = value.cpu().numpy()
        rows, weights = (torch.cat(part).cpu().numpy() for part in zip(*heaviest, strict=True))
        return {**made, "obs": pd.concat(obs, ignore_index=True), "neighbours": rows, "neighbour_weights": weights}


def _build(node: dict, weights: dict[str, torch.Tensor], prefix: str, sizes: dict) -> torch.nn.Module:
    if not str(node.get("_target_")).startswith("stexp.models."):
        raise InputError(f"the model names {node.get('_target_')}, which is no method of stexp")
    module = construct.build(node, **sizes)
    state = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the weights do not fit {node['_target_']} of this stexp: {reason}") from error
    return module.eval().requires_grad_(False)
