"""Features of tiles under a frozen image encoder, computed once per section and encoder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from stexp.data.augment import augment
from stexp.data.cache import kept_array
from stexp.data.datamodule import SpotDataModule
from stexp.data.section import Section
from stexp.data.slides.store import JpegTiles
from stexp.data.slides.tiles import TileSpec, around, shown, tiles_around
from stexp.errors import InputError
from stexp.models.encoders.image import ImageEncoder, one_line

log = logging.getLogger(__name__)

UNTUNED = {"frozen": True, "tuning": "all"}
"""Keys of an image encoder as it is before any training: without the random updates of low rank that LoRA adds."""

Stain = tuple[str, Callable[[torch.Tensor], torch.Tensor]]
"""What names a stain normalisation of a section, and does it to tiles (B, px, px, 3) uint8."""


class FrozenEncoder:
    """Pooled features of tiles, unaugmented, kept in ``<cache_dir>/features``; a context manager.

    Parameters
    ----------
    encoder
        In the state it is to be judged in; inside the ``with`` it is on `device`, in evaluation mode.
    context
        Precision to compute in, e.g. ``torch.autocast("cuda", torch.bfloat16)``.
    batch_size
        Tiles at once.

    Notes
    -----
    One file per section, named by a hash of the tiles' store, of the encoder's weights and precision and, with stain
    normalisation, of what it does to the section.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        device: torch.device,
        context: AbstractContextManager | None,
        cache_dir: str | Path,
        batch_size: int = 256,
    ) -> None:
        self.encoder, self.device, self.context = encoder, device, context or nullcontext()
        self.folder, self.batch_size = Path(cache_dir) / "features", batch_size
        self.key = _weights_digest(encoder, self._precision())

    def __enter__(self) -> FrozenEncoder:
        self._before = self.encoder.training, next(self.encoder.parameters()).device
        self.encoder.eval().to(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        training, device = self._before
        self.encoder.train(training).to(device)

    def of_tiles(self, section: Section, store: np.ndarray | JpegTiles, stain: Stain | None = None) -> np.ndarray:
        """Features of a section's tiles, (n_spots, F) float32."""

        def parts() -> Iterable[tuple[np.ndarray, np.ndarray]]:
            rows = np.split(np.arange(len(store)), range(self.batch_size, len(store), self.batch_size))
            return ((part, store[part]) for part in shown(rows, f"section {section.name}: features"))

        what = f"section {section.name}: frozen features of {len(store)} tiles"
        return self._kept(self._path(store, stain), len(store), parts, what, stain)

    def of_surroundings(
        self, section: Section, store: np.ndarray | JpegTiles, spec: TileSpec, k: int, stain: Stain | None = None
    ) -> np.ndarray:
        """Features of the k x k tiles around each spot, (n_spots, k * k, F) float32, memory-mapped.

        They are zero where :func:`~stexp.data.slides.tiles.around` says that a tile is not inside the image.
        """
        what = f"section {section.name}: frozen features of {k} x {k} tiles around {len(section)} spots"
        path, n = self._path(store, stain, f"-around{k}"), len(section) * k * k
        self._kept(path, n, lambda: tiles_around(section, spec, k), what, stain)
        return np.load(path, mmap_mode="r").reshape(len(section), k * k, -1)

    def _path(self, store: np.ndarray | JpegTiles, stain: Stain | None, ending: str = "") -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{Path(store.filename).stem}-{self.key}{f'-{stain[0]}' if stain else ''}{ending}.npy"

    @torch.no_grad()
    def _kept(self, path: Path, n: int, parts: Callable, what: str, stain: Stain | None) -> np.ndarray:
        def encode() -> np.ndarray:
            log.info("%s by %s", what, self.encoder.name)
            out = np.zeros((n, self.encoder.num_features), dtype=np.float32)
            for rows, tiles in parts():
                for start in range(0, len(rows), self.batch_size):
                    part = slice(start, start + self.batch_size)
                    raw = torch.from_numpy(np.array(tiles[part])).to(self.device)
                    image = augment(stain[1](raw) if stain else raw, "none", 0)
                    try:
                        with self.context:
                            out[rows[part]] = self.encoder(image).float().cpu().numpy()
                    except torch.OutOfMemoryError:
                        raise
                    except (AssertionError, RuntimeError, ValueError) as error:
                        size = "x".join(map(str, image.shape[1:]))
                        raise InputError(
                            f"{self.encoder.name} does not take tiles of {size}: {one_line(error)}; another "
                            f"image_encoder.input_size may fit"
                        ) from error
            return out

        return kept_array(path, (n, self.encoder.num_features), encode)

    def _precision(self) -> torch.dtype:
        with self.context:
            autocast = torch.is_autocast_enabled(self.device.type)
            return torch.get_autocast_dtype(self.device.type) if autocast else torch.float32


class Surroundings:
    """Frozen features of the k x k tiles around each spot of a data module, read from the cache as asked for.

    Attributes
    ----------
    inside : (n_spots, k * k) bool
        Which of the tiles lie inside the image; False for all of a spot without an image.
    """

    def __init__(self, parts: list[np.ndarray], inside: np.ndarray) -> None:
        self._parts, self.inside = parts, inside
        self._starts = np.cumsum([0] + [len(part) for part in parts])
        self._row = np.cumsum(inside.any(axis=1)) - 1  # among the spots with an image: the middle is always inside

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Those of the spots `rows` (B,) of ``data.spots``, all with an image: (B, k * k, F) float32."""
        out = np.empty((len(rows), *self._parts[0].shape[1:]), dtype=np.float32)
        where = self._row[rows]
        section = np.searchsorted(self._starts, where, side="right") - 1
        for i in np.unique(section):
            here = section == i
            out[here] = self._parts[i][where[here] - self._starts[i]]
        return out


def frozen_features(
    data: SpotDataModule, encoder: ImageEncoder, device: torch.device, context: AbstractContextManager | None = None
) -> np.ndarray:
    """Pooled features of every spot with a tile, unaugmented, its stain as `data` has it; see `FrozenEncoder`.

    Returns
    -------
    (n_spots, F) float32
        In the order of ``data.spots``; NaN rows for spots without an image.
    """
    out = np.full((len(data.spots), encoder.num_features), np.nan, dtype=np.float32)
    with FrozenEncoder(encoder, device, context, data.cache_dir, data.eval_batch_size) as frozen:
        for section, store, stain in _with_image(data):
            rows = np.flatnonzero(data.spots["section"] == section.name)
            out[rows] = frozen.of_tiles(section, store, stain)
    return out


def surrounding_features(
    data: SpotDataModule,
    encoder: ImageEncoder,
    k: int,
    device: torch.device,
    context: AbstractContextManager | None = None,
) -> Surroundings:
    """As `frozen_features`, of the k x k tiles around each spot, its own in the middle (k odd)."""
    parts, inside = [], np.zeros((len(data.spots), k * k), dtype=bool)
    with FrozenEncoder(encoder, device, context, data.cache_dir, data.eval_batch_size) as frozen:
        for section, store, stain in _with_image(data):
            inside[data.spots["section"] == section.name] = around(section, data.tile, k)[1]
            parts.append(frozen.of_surroundings(section, store, data.tile, k, stain))
    return Surroundings(parts, inside)


def _with_image(data: SpotDataModule) -> Iterable[tuple[Section, np.ndarray | JpegTiles, Stain | None]]:
    """Sections with an image, their tiles, and what `data` does to their stain."""
    data.setup()
    with_image = [section for section in data.sections if section.slide is not None]
    for i, (section, store) in enumerate(zip(with_image, data.bank.stores, strict=True)):
        stain = None
        if data.normaliser is not None:
            stain = data.normaliser.key(i), lambda tiles, i=i: data.normaliser(tiles, torch.full((len(tiles),), i))
        yield section, store, stain


def _weights_digest(encoder: ImageEncoder, precision: torch.dtype | None) -> str:
    # the printed layers name what weights do not: padding, activations, pooling
    what = f"{encoder.name} {encoder.output} {encoder.input_size} {encoder.built_as} {encoder.model}"
    digest = hashlib.blake2b(what.encode(), digest_size=8)
    digest.update(str(precision or torch.float32).encode())
    for name, tensor in sorted({**encoder.state_dict(), "mean": encoder.mean, "std": encoder.std}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
