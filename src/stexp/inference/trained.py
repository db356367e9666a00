"""A trained method apart from the data it was trained on: tiles to embeddings, embeddings to expression."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch

from stexp import hardware
from stexp.data.augment import augment
from stexp.data.batches import SpotBatch
from stexp.errors import InputError
from stexp.inference.prototype_bank import AnyBank
from stexp.inference.rebuild import rebuild_encoder, rebuild_method
from stexp.inference.tensors import AGAIN
from stexp.models.consensus import Consensus, Gallery, Readout
from stexp.models.retrieval import Neighbours, ReferenceIndex
from stexp.models.retrieval_method import RetrievalMethod
from stexp.protocol import Protocol
from stexp.runs.plugins import require_as_recorded

QUERIES, GENES = 4096, 1024  # spots and genes that are retrieved at once
NUMBERS = 1 << 26  # of the references' expression, that loadings are computed from at once


_WITH_BANK = (RetrievalMethod, Consensus)


class TrainedMethod:
    """A method with its weights, the encoder of the frozen features it reads, and its references.

    Parameters
    ----------
    facts
        ``model.json``.
    weights
        See :mod:`stexp.inference.model_folder`.
    bank
        Of a method that retrieves; of ``consensus``, whose own references those are, and with which it names them and
        predicts any gene that they measure. Those that were exported without one predict their panel alone.
    """

    def __init__(self, facts: dict, weights: dict[str, torch.Tensor], bank: AnyBank | None) -> None:
        self.facts, self.bank, self.panel = facts, bank, facts["panel"]
        self.protocol = Protocol(**facts["protocol"])
        require_as_recorded(facts.get("plugins"), f"the model {facts['method']}")
        self._method = rebuild_method(facts["model"], weights, facts["sizes"])
        self._encoder = facts["features_by"] and rebuild_encoder(facts["features_by"], weights)
        self._precision = facts["precision"]
        self._channels_last = facts["channels_last"]
        retrieves, takes_bank = (isinstance(self._method, kind) for kind in (RetrievalMethod, _WITH_BANK))
        if (retrieves and (bank is None or not facts["k"])) or (bank is not None and not takes_bank):
            raise InputError(f"{facts['method']} and its files do not fit: one retrieves, the other does not; {AGAIN}")
        if isinstance(self._method, Consensus):
            self._take_references(self._method)
            self.k = self._method.members.k
        else:
            self.k = 0 if bank is None else min(facts["k"], len(bank))

    def _take_references(self, method: Consensus) -> None:
        """Give a method the references of the bank, and their scores, where it was exported without its own."""
        bank, (ranks, n_genes) = self.bank, method.loadings.shape
        if bank is None:
            if not len(method.reference):
                raise InputError(f"{self.facts['method']} has neither references nor a bank of them; {AGAIN}")
            return
        if not n_genes == len(method.mean) == len(self.panel) or ranks > max(method.ranks):
            raise InputError(f"{self.facts['method']}: its loadings are not of its panel and its ranks; {AGAIN}")
        method.reference = torch.from_numpy(bank.embedding)
        method.scores = torch.zeros(len(bank), ranks)
        for genes, expression in self._expression(bank, self.panel):
            method.scores += method.scores_of(expression, genes)

    def _expression(self, bank: AnyBank, genes: list[str]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Expression of some genes in the references, (N, n), of as many genes at a time as memory is bounded by."""
        step = max(1, min(GENES, NUMBERS // len(bank)))
        for start in range(0, len(genes), step):
            part = slice(start, start + step)
            yield part, torch.from_numpy(bank.expression(genes[part], self.protocol, self.panel))

    def to(self, device: torch.device) -> None:
        """Move to a device, in the memory format of the training."""
        for module in (self._method, self._encoder):
            if module is not None:
                module.to(device)
                if self._channels_last:
                    module.to(memory_format=torch.channels_last)

    def precision(self, device: torch.device) -> str:
        """That of the run, where the device multiplies it."""
        fits = self._precision == hardware.choose_precision("auto", device.type)
        return self._precision if fits else "32-true"

    def probe(self, px: int) -> int | None:
        """Encode one blank tile of `px` pixels; the width D of an image embedding, None of methods without.

        Raises
        ------
        InputError
            The method does not take such tiles, or predicts another number of genes than its panel has, or does not
            embed as its references are.
        """
        tile, nowhere = torch.zeros(1, px, px, 3, dtype=torch.uint8), torch.zeros(1, 2)
        try:
            made = self._encode(tile, nowhere, nowhere.long())
            alone = self.predict_together(made["image_embedding"].numpy(), nowhere.numpy()) if self.together else {}
        except (RuntimeError, AssertionError, ValueError, TypeError, LookupError) as error:  # model.json is not ours
            raise InputError(f"the model takes no tile of {px} px: {' '.join(str(error).split())[:200]}") from error
        if self.together:
            made |= {"predicted": torch.from_numpy(alone["predicted"])}
        width = made["image_embedding"].shape[1] if "image_embedding" in made else None
        if self.bank is not None and width != self.bank.embedding.shape[1]:
            raise InputError(f"tiles are embedded in {width} numbers, references in {self.bank.embedding.shape[1]}")
        if "predicted" in made and made["predicted"].shape[1] != len(self.panel):
            raise InputError(f"{made['predicted'].shape[1]} genes are predicted, the panel has {len(self.panel)}")
        return width

    def _autocast(self, device: torch.device) -> AbstractContextManager:
        if self.precision(device) != "bf16-mixed":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

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
            ``image_embedding`` (B, D) of a method that retrieves or predicts all spots together; of others
            ``predicted`` (B, G) and what they give besides.
        """
        return self._encode(tiles, xy_um, array_xy)

    @torch.inference_mode()
    def _encode(self, tiles: torch.Tensor, xy_um: torch.Tensor, array_xy: torch.Tensor) -> dict[str, torch.Tensor]:
        image = augment(tiles, "none", 0)
        n, device = len(image), image.device
        with self._autocast(device):
            if isinstance(self._method, RetrievalMethod):
                return {"image_embedding": self._method.embed_image(image).float()}
            features = None if self._encoder is None else self._encoder(image).float()
            if self.together and features is not None:
                return {"image_embedding": self._method.embed_features(features)}
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
                whole=n,
                features=features,
            )
            made = self._method.predict_step(batch)
        arrays = {name: value.float() for name, value in vars(made).items() if torch.is_tensor(value)}
        return arrays if features is None else {"image_embedding": features, **arrays}

    @property
    def together(self) -> bool:
        """Whether all spots of a slide are predicted at once, from their embeddings."""
        return self._method.together

    @torch.inference_mode()
    def predict_together(
        self, embedding: np.ndarray, xy_um: np.ndarray, genes: list[str] | None = None, *, bank: AnyBank | None = None
    ) -> dict[str, Any]:
        """Expression of a whole slide.

        Parameters
        ----------
        embedding, xy_um : (Q, D), (Q, 2)
            Of its tiles; NaN where the scale is not known.
        genes
            Of the panel, or, with a bank, that the references measure; None: the panel.
        bank
            References to search instead of the model's own.

        Returns
        -------
        dict
            ``predicted`` and ``uncertainty``, (Q, G) float32; ``obs``, where the method describes spots; where it names
            references, ``neighbours`` and ``neighbour_weights``, see `retrieve`.
        """
        genes, bank, method = genes or self.panel, bank or self.bank, self._method
        query, where = torch.from_numpy(embedding), torch.from_numpy(xy_um)
        if isinstance(method, Consensus) and bank is not None:
            readout = self._readout(method, genes, bank)
            made = method.predict_together(query, where, readout, self._gallery(method, bank))
        else:
            made = method.predict_together(query, where)
            if genes != self.panel:
                columns = torch.from_numpy(pd.Index(self.panel).get_indexer(genes))
                made.predicted = made.predicted[:, columns]
                made.uncertainty = None if made.uncertainty is None else made.uncertainty[:, columns]
        keys = ("predicted", "uncertainty", "neighbours", "neighbour_weights")
        arrays = {key: value for key, value in vars(made).items() if key in keys and value is not None}
        obs = {} if made.obs is None else {"obs": made.obs}
        return {key: value.cpu().numpy() for key, value in arrays.items()} | obs

    def _gallery(self, method: Consensus, bank: AnyBank) -> Gallery:
        index = ReferenceIndex(torch.from_numpy(bank.embedding).to(method.mean), bank.section, bank.patient)
        return Gallery(index, method.scores[self._of_own(bank)])

    def _readout(self, method: Consensus, genes: list[str], bank: AnyBank) -> Readout:
        """Of the panel as it was learned; of other genes from the references."""
        at = pd.Index(self.panel).get_indexer(genes)
        outside = [gene for gene, column in zip(genes, at, strict=True) if column < 0]
        mean, loadings = method.mean[at], method.loadings[:, at]
        places, scores = torch.from_numpy(np.flatnonzero(at < 0)), method.scores[self._of_own(bank)]
        for part, expression in self._expression(bank, outside):
            other = method.readout_of(expression, scores)
            mean[places[part]], loadings[:, places[part]] = other.mean, other.loadings
        return Readout(mean, loadings)

    def _of_own(self, bank: AnyBank) -> slice | torch.Tensor:
        """Rows of the model's own references that those of a bank are."""
        if self.bank is None or bank is self.bank:
            return slice(None)
        return torch.from_numpy(self.bank.spots().index.get_indexer(bank.spots().index))

    @torch.inference_mode()
    def retrieve(
        self,
        query: np.ndarray,
        genes: list[str],
        device: torch.device | str = "cpu",
        *,
        spread: bool = True,
        bank: AnyBank | None = None,
    ) -> dict[str, Any]:
        """Expression of `genes` for image embeddings (Q, D), from the bank, in bounded memory beside the result.

        Parameters
        ----------
        bank
            References to take instead of the model's own.

        Returns
        -------
        dict
            ``predicted`` and, with `spread`, ``uncertainty``, (Q, G) float32; ``obs``, see
            :meth:`~stexp.models.retrieval.ReferenceIndex.provenance`; ``neighbours`` and ``neighbour_weights``, see
            :meth:`~stexp.models.retrieval.Neighbours.heaviest`.
        """
        bank, method = bank or self.bank, self._method
        if bank is None or not isinstance(method, RetrievalMethod):
            raise ValueError("the method does not retrieve")
        index = ReferenceIndex(torch.from_numpy(bank.embedding).to(device), bank.section, bank.patient)
        retrieved, obs, heaviest = [], [], []
        for part in torch.from_numpy(query).split(QUERIES):
            neighbours = index.search(part.to(device), min(self.k, len(bank)), method.distance, method.weighting)
            obs.append(index.provenance(neighbours))
            heaviest.append(neighbours.heaviest())
            # int32 and without distances: of many spots the neighbours take much of the memory
            retrieved.append(Neighbours(neighbours.index.int(), neighbours.distance[:, :0], neighbours.weight))
        shape = (len(query), len(genes))
        made = {key: np.empty(shape, dtype=np.float32) for key in ("predicted", *(["uncertainty"] if spread else []))}
        for column in range(0, len(genes), GENES):
            columns = slice(column, column + GENES)
            expression = torch.from_numpy(bank.expression(genes[columns], self.protocol, self.panel)).to(device)
            for row, neighbours in zip(range(0, len(query), QUERIES), retrieved, strict=True):
                rows = slice(row, row + QUERIES)
                mean, sd = index.average(neighbours, expression, spread=spread)
                made["predicted"][rows, columns] = mean.cpu().numpy()
                if sd is not None:
                    made["uncertainty"][rows, columns] = sd.cpu().numpy()
        if method.correction is not None:  # of the panel; other genes are retrieved alone
            inside, of_panel = pd.Index(genes), pd.Index(self.panel)
            shared = inside.intersection(of_panel, sort=False)
            columns, of = inside.get_indexer(shared), of_panel.get_indexer(shared)
            on = next(method.correction.parameters()).device
            for row, part in zip(range(0, len(query), QUERIES), torch.from_numpy(query).split(QUERIES), strict=True):
                residual = method.correction(part.to(on)).cpu().numpy()
                made["predicted"][row : row + QUERIES, columns] += residual[:, of]
        which, weights = (torch.cat(part).cpu().numpy() for part in zip(*heaviest, strict=True))
        return {**made, "obs": pd.concat(obs, ignore_index=True), "neighbours": which, "neighbour_weights": weights}


def device_of(name: str) -> torch.device:
    """The device of a name as torch has it, or as :func:`stexp.hardware.accelerator_of`."""
    base, _, number = str(name).partition(":")
    kind = hardware.accelerator_of(base, "device")
    if not number:
        return torch.device(kind)
    if not number.isdigit() or (kind == "cuda" and int(number) >= torch.cuda.device_count()):
        raise InputError(f"device={name}: there is no such device; take {base}")
    return torch.device(kind, int(number))
