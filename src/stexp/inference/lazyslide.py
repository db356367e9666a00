"""A model inside LazySlide: ``zs.tl.tile_prediction(wsi, TilePredictor(stexp.load_model(...)))``.

Nothing of LazySlide is imported: it asks a tile prediction model for ``name``, ``columns``, ``get_transform``, ``to``,
``try_compile`` and ``predict``, and takes whatever has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch

from stexp.errors import InputError
from stexp.inference.prototype_bank import AnyBank
from stexp.inference.trained import TrainedMethod, device_of


class TrainedModel(Protocol):
    """What a model says of itself, loaded or trained here."""

    @property
    def facts(self) -> dict[str, Any]: ...

    @property
    def panel(self) -> list[str]: ...

    @property
    def bank(self) -> AnyBank | None: ...

    @property
    def method(self) -> TrainedMethod: ...

    def names(self, genes: str | Sequence[str]) -> list[str]: ...


class TilePredictor:
    """A model as LazySlide's ``tile_prediction(model=)`` takes it: a column of the tiles for every gene.

    Parameters
    ----------
    model
        One that neither normalises stain nor predicts the tiles of a slide together, which takes a whole slide:
        ``Model.predict`` does that.
    genes
        ``panel``; ``all`` that the references measure; or names.

    Attributes
    ----------
    columns : tuple of str
        The genes.

    Examples
    --------
    >>> predictor = stexp.TilePredictor(stexp.load_model("model.stexp"), ["ERBB2"])
    >>> zs.pp.tile_tissues(wsi, **predictor.tiles)
    >>> zs.tl.tile_prediction(wsi, predictor)

    Raises
    ------
    InputError
        A model that needs a whole slide, or unknown genes.

    Notes
    -----
    LazySlide keeps numbers alone: checks of the slide, intervals and the verdict come with ``Model.predict``.
    """

    def __init__(self, model: TrainedModel, genes: str | Sequence[str] = "panel") -> None:
        if model.facts["stain"] is not None:
            raise InputError(
                "the model brings stain to that of its training, by a whole slide, and LazySlide hands over tiles; "
                "model.predict(slide), or a model trained with data.stain=null, would fit"
            )
        if model.method.together:
            raise InputError(
                f"{model.facts['method']} predicts all tiles of a slide together, and LazySlide hands them over in "
                f"batches; model.predict(slide), or a model of another method, would fit"
            )
        self.columns = tuple(model.names(genes))
        self.name = f"stexp-{model.facts['method']}"
        self.model: TrainedMethod = model.method
        self._at = [model.panel.index(gene) for gene in self.columns] if model.bank is None else []
        self._px, self._um = _tile(model)
        self._device = torch.device("cpu")

    @property
    def tiles(self) -> dict[str, Any]:
        """Arguments of ``zs.pp.tile_tissues`` for tiles that show as much tissue as those of training.

        Raises
        ------
        InputError
            Nobody said how large pixels were in training.
        """
        if self._um is None:
            raise InputError(
                f"the model does not know how large the pixels of its training were; tile_tissues(wsi, {self._px}, "
                f"mpp=) at the scale of those images would fit"
            )
        return {"tile_px": self._px, "mpp": self._um / self._px}

    def get_transform(self) -> Callable[[np.ndarray], torch.Tensor]:
        """Tiles as the method takes them; see `tile`."""
        return self.tile

    def tile(self, pixels: np.ndarray) -> torch.Tensor:
        """A tile (px, px, 3) uint8 of LazySlide; InputError where it has another size than those of training."""
        pixels = np.asarray(pixels)
        if pixels.shape != (self._px, self._px, 3) or pixels.dtype != np.uint8:
            size = " x ".join(map(str, pixels.shape))
            mpp = "" if self._um is None else f", mpp={self._um / self._px:.4g}"
            raise InputError(
                f"tiles of {size} {pixels.dtype}; the model takes {self._px} x {self._px} x 3 uint8: "
                f"tile_tissues(wsi, {self._px}{mpp}) would fit"
            )
        return torch.from_numpy(pixels.copy())  # what is read may not be writable

    def to(self, device: str | torch.device | None) -> Self:
        """Move to a device; None: ``auto``."""
        self._device = device_of("auto" if device is None else str(device))
        self.model.to(self._device)
        return self

    def try_compile(self, **compile_kws: Any) -> None:
        """Leave the model as it is: compiled, it would not predict to the last digit what it was checked for."""

    def predict(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        """Expression of tiles (B, px, px, 3) uint8: gene -> (B,), on the scale the model was trained on."""
        nowhere = torch.full((len(image), 2), torch.nan)
        # in the precision of the training, whatever LazySlide's amp= says
        with torch.autocast(self._device.type, enabled=False):
            arrays = self.model.encode(image.to(self._device), nowhere, torch.zeros(len(image), 2, dtype=torch.int64))
        if self._at:
            predicted = arrays["predicted"][:, self._at].cpu().numpy()
        else:
            query = arrays["image_embedding"].cpu().numpy()
            predicted = self.model.retrieve(query, list(self.columns), self._device, spread=False)["predicted"]
        return dict(zip(self.columns, predicted.T, strict=True))


def _tile(model: TrainedModel) -> tuple[int, float | None]:
    """Pixels and micrometres of a tile's side."""
    tile = model.facts["tile"]
    um = tile["um"]
    if um is None and tile["trained_um_per_px"] is not None:
        um = tile["px"] * tile["trained_um_per_px"]
    return tile["px"], um
