"""Weights of a trained model in a method that was built for another panel."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng

from stexp import construct
from stexp.data.datamodule import SpotDataModule
from stexp.errors import listed
from stexp.inference.base import Base
from stexp.inference.description import build_encoder
from stexp.inference.rebuild import FETCHING, rebuild_encoder
from stexp.models.adapter import as_method
from stexp.models.encoders.frozen import UNTUNED
from stexp.models.method import Method
from stexp.runs.folder import differing_keys

log = logging.getLogger(__name__)

NOT_OF_SHAPE = {*FETCHING, "mean", "std", "card", "frozen"}
"""Arguments of an image encoder on which no tensor's shape depends."""
MOST_NAMED = 20  # genes in a line of the log


class CarriedWeights(pl.Callback):
    """Weights of a base in a method that was built for other genes.

    They are carried over as it is made, and again behind the method's own start from its data, which resumed trainings
    do without.

    Parameters
    ----------
    base
    method
        Changed in place.
    node
        ``_target_`` and arguments it was built from.
    data
        It was built for.

    Attributes
    ----------
    new, gone : list of str
        Genes of the panel that the base does not know, and the other way round.

    Raises
    ------
    InputError
        Tensors of other sizes, or frozen features of another encoder.
    """

    def __init__(self, base: Base, method: Method, node: Mapping[str, Any], data: SpotDataModule) -> None:
        super().__init__()
        self._base, self._panel = base, data.panel
        known, now = set(base.panel), set(data.panel)
        self.new = [gene for gene in data.panel if gene not in known]
        self.gone = [gene for gene in base.panel if gene not in now]
        if len(self.new) == len(data.panel):
            raise base.refuse(
                f"none of its {len(base.panel)} genes (like {base.panel[0]}) is in the panel (like {data.panel[0]}); "
                f"a model of the same species and naming would fit"
            )
        if "n_features" in inspect.signature(construct.get_object(node["_target_"])).parameters:
            check_features(base, data)
        self._axes = _axes(node, data)
        self._check(method, node)
        self._carry(method)

    def say(self) -> None:
        """Log what was carried over, and what was not."""
        shared = len(self._panel) - len(self.new)
        log.info(
            "from=%s (%s): %d of %d genes carried over", self._base.source, self._base.method, shared, len(self._panel)
        )
        if self.new:
            log.info("%d genes are new, their weights are initialised: %s", len(self.new), listed(self.new, MOST_NAMED))
        if self.gone:
            log.info("%d genes of the model are not in the panel: %s", len(self.gone), listed(self.gone, MOST_NAMED))

    def record(self) -> dict[str, Any]:
        """For the run's provenance; plain values."""
        return {**self._base.record, "new_genes": self.new, "gone_genes": self.gone}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None:
            self._carry(pl_module)

    def _check(self, method: Method, node: Mapping[str, Any]) -> None:
        own, base = method.state_dict(), self._base.weights
        wrong = [key for key in own if key not in base or not self._fits(key, base[key], own[key])]
        wrong += [key for key in base if key not in own]
        if wrong:
            key = wrong[0]
            shapes = [" x ".join(map(str, each[key].shape)) if key in each else "none" for each in (base, own)]
            raise self._base.refuse(
                f"{len(wrong)} tensors do not fit ({key}: {shapes[0]}, here {shapes[1]}); "
                f"{_what_would_fit(self._base.node, node)}"
            )
        for key, buffer in method.named_buffers():
            if key in ("image_encoder.mean", "image_encoder.std"):
                stated = self._base.node["image_encoder"].get(key.rpartition(".")[2])
                if stated is not None and not np.allclose(stated, buffer.flatten().cpu().numpy(), atol=1e-5):
                    raise self._base.refuse(
                        f"{key} was {stated}, here it is {buffer.flatten().tolist()}; {key}= would fit"
                    )

    def _fits(self, key: str, base: torch.Tensor, own: torch.Tensor) -> bool:
        if base.ndim != own.ndim or key not in self._axes:
            return base.shape == own.shape
        genes, positions = self._axes[key]
        same_panel = self._panel == self._base.panel
        for axis, (before, now) in enumerate(zip(base.shape, own.shape, strict=True)):
            if axis in genes and not same_panel:
                if (before, now) != (len(self._base.panel), len(self._panel)):
                    return False  # features and genes along one axis
            elif before != now and axis not in positions:
                return False
        return True

    @torch.no_grad()
    def _carry(self, method: torch.nn.Module) -> None:
        place = {gene: i for i, gene in enumerate(self._base.panel)}
        into = torch.tensor([i for i, gene in enumerate(self._panel) if gene in place])
        of = torch.tensor([place[gene] for gene in self._panel if gene in place])
        same_panel = self._panel == self._base.panel
        for key, own in method.state_dict().items():
            values, target = self._base.weights[key], own
            genes, positions = self._axes.get(key, ((), ()))
            for axis in positions:  # rows of a position table that both have
                n = min(values.shape[axis], own.shape[axis])
                values, target = values.narrow(axis, 0, n), target.narrow(axis, 0, n)
            if same_panel or not genes:
                target.copy_(values)
                continue
            for axis in genes:
                values = values.index_select(axis, of)
            at = [into if axis in genes else torch.arange(size) for axis, size in enumerate(target.shape)]
            places = torch.meshgrid(*(each.to(target.device) for each in at), indexing="ij")
            target[places] = values.to(target.device, target.dtype)


def _axes(node: Mapping[str, Any], data: SpotDataModule) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Axes of tensors along which genes lie, and positions on the array, by the tensor's name.

    A method that is built for one gene, or one position, more says which they are.
    """
    node = {key: value for key, value in node.items() if key != "name"}
    if "image_encoder" in node:
        encoder = node["image_encoder"]
        node["image_encoder"] = {**encoder, **{key: value for key, value in FETCHING.items() if key in encoder}}

    def shapes(genes: int, positions: int) -> dict[str, torch.Size]:
        with torch.device("meta"):  # no tensor is made
            method = as_method(construct.build(node, n_genes=genes, n_positions=positions, n_features=data.n_features))
        return {key: value.shape for key, value in method.state_dict().items()}

    n, p = len(data.panel), data.array_size
    own, more_genes, more_positions = shapes(n, p), shapes(n + 1, p), shapes(n, p + 1)

    def differing(key: str, other: Mapping[str, torch.Size]) -> tuple[int, ...]:
        return tuple(axis for axis, (a, b) in enumerate(zip(own[key], other[key], strict=True)) if a != b)

    axes = {key: (differing(key, more_genes), differing(key, more_positions)) for key in own}
    return {key: each for key, each in axes.items() if any(each)}


def check_features(base: Base, data: SpotDataModule) -> None:
    """Refuse frozen features of another encoder than those the base read."""
    assert base.encoder is not None and data.encoder is not None  # of a method that reads features
    node, weights = base.encoder
    if weights is not None:
        same = data.encoder.is_of(rebuild_encoder(node, weights))
    else:
        with isolate_rng():
            pl.seed_everything(base.seed, verbose=False)  # random weights are those of the run's seed
            same = data.encoder.is_of(build_encoder({**node, **UNTUNED}))
    if not same:
        name = node.get("architecture") or node.get("name")
        raise base.refuse(
            f"it reads frozen features of {name} at other weights than those of image_encoder here; the same "
            f"image_encoder= would fit (with random weights, the same seed)"
        )


def _what_would_fit(base: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """Arguments that differ between two methods, as a command line would set them to those of the base."""
    settings = []
    for key in sorted(differing_keys(base, {name: value for name, value in node.items() if name != "name"})):
        if key.rpartition(".")[2] in NOT_OF_SHAPE:
            continue
        value: Any = base
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        settings.append(f"{key if key.startswith('image_encoder') else f'model.{key}'}={value}")
    return f"{' '.join(settings[:6])} would fit" if settings else "the same image_encoder and data.tile_px would fit"
