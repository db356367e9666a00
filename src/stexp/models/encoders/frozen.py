"""A frozen image encoder, whose features of tiles are computed once per section and kept in the cache."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stexp.construct import build
from stexp.data.augment import augment
from stexp.data.cache import mapped_array
from stexp.data.features import Stain, View
from stexp.data.progress import track
from stexp.data.section import Section
from stexp.data.slides.store import TileStore, file_of
from stexp.data.slides.tiles import TileSpec, subtiles, tiles_around
from stexp.errors import InputError
from stexp.models.encoders.image import ImageEncoder
from stexp.models.encoders.weights import one_line

log = logging.getLogger(__name__)

USUAL_PX = 224
UNTUNED = {"frozen": True, "tuning": "all"}
"""Changes to an image encoder's config that build it as before any training, without LoRA's random updates."""


class FrozenEncoder:
    """Pooled features of tiles, kept in ``<cache_dir>/features``.

    It is a :class:`~stexp.data.features.TileEncoder`.

    Parameters
    ----------
    encoder
        With the weights that the features are of. Inside the ``with`` it is on `device` and in evaluation mode; behind
        it, as it was before.
    context
        Precision to compute in, e.g. ``torch.autocast("cuda", torch.bfloat16)``.
    batch_size
        Tiles of 224 px at once; of wider ones as many as have the same pixels.
    twins
        What builds the same architecture at random weights, see :func:`random_twins`.
    about
        Stands behind the encoder's name in the log.

    Notes
    -----
    One file per section, named by a hash of the tiles' store, of the encoder's weights and precision and, with stain
    normalisation, of what it does to the section. An augmented view is drawn batch by batch, so that its name holds
    the size of these, too.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        device: torch.device,
        context: AbstractContextManager | None,
        cache_dir: str | Path,
        batch_size: int = 256,
        twins: Sequence[Callable[[], ImageEncoder]] = (),
        about: str = "",
    ) -> None:
        self.twins, self.about = twins, about
        self.encoder, self.device, self.context = encoder, device, context or nullcontext()
        self.folder, self.batch_size = Path(cache_dir) / "features", batch_size
        self.key = weights_digest(encoder, self._precision())

    def __enter__(self) -> FrozenEncoder:
        self._before = self.encoder.training, next(self.encoder.parameters()).device
        self.encoder.eval().to(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        training, device = self._before
        self.encoder.train(training).to(device)

    @property
    def num_features(self) -> int:
        """F."""
        return self.encoder.num_features

    def is_of(self, encoder: nn.Module) -> bool:
        """Whether another encoder would give the same features."""
        return isinstance(encoder, ImageEncoder) and weights_digest(encoder, self._precision()) == self.key

    def at_random_weights(self) -> Iterator[FrozenEncoder]:
        """Encoders of the same architecture at the random weights of several seeds, built one at a time."""
        for make in self.twins:
            about = " at random weights"
            twin = FrozenEncoder(make(), self.device, self.context, self.folder.parent, self.batch_size, about=about)
            if twin.key != self.key:  # an encoder of one's own may bring its weights whatever it is asked for
                yield twin

    def of_tiles(
        self, section: Section, store: TileStore, stain: Stain | None = None, view: View | None = None
    ) -> np.ndarray:
        """Features of a section's tiles as they are, or of an augmented view, (n_spots, F) float32, memory-mapped."""

        def parts() -> Iterable[tuple[np.ndarray, np.ndarray]]:
            rows = np.split(np.arange(len(store)), range(self.batch_size, len(store), self.batch_size))
            what_is_done = f"section {section.name}: features"
            return ((part, store[part]) for part in track(rows, len(store), what_is_done, size=len))

        which = "" if view is None else f", {view.augmentation}, view {view.number + 1}"
        what = f"section {section.name}: frozen features of {len(store)} tiles{which}"
        ending = "" if view is None else f"-{view.key}-b{self.batch_size}"
        return self._kept(self._path(store, stain, ending), len(store), parts, what, stain, view)

    def of_surroundings(
        self, section: Section, store: TileStore, spec: TileSpec, k: int, stain: Stain | None = None
    ) -> np.ndarray:
        """Features of the k x k tiles around each spot, (n_spots, k * k, F) float32, memory-mapped.

        They are zero where :func:`~stexp.data.slides.tiles.around` says that a tile is not inside the image.
        """
        what = f"section {section.name}: frozen features of {k} x {k} tiles around {len(section)} spots"
        path, n = self._path(store, stain, f"-around{k}"), len(section) * k * k
        kept = self._kept(path, n, lambda: tiles_around(section, spec, k), what, stain)
        return kept.reshape(len(section), k * k, -1)

    def of_subtiles(self, section: Section, store: TileStore, k: int, stain: Stain | None = None) -> np.ndarray:
        """Features of the k x k parts of each spot's own tile, (n_spots, k * k, F) float32, memory-mapped."""

        def parts() -> Iterable[tuple[np.ndarray, np.ndarray]]:
            spots = np.split(np.arange(len(store)), range(self.batch_size, len(store), self.batch_size))
            for some in track(spots, len(store), f"section {section.name}: features of parts of tiles", size=len):
                rows = some[:, None] * k * k + np.arange(k * k)
                yield rows.ravel(), np.concatenate(list(subtiles(np.asarray(store[some]), k)))

        what = f"section {section.name}: frozen features of {k} x {k} parts of {len(section)} tiles"
        path = self._path(store, stain, f"-parts{k}")
        kept = self._kept(path, len(section) * k * k, parts, what, stain)
        return kept.reshape(len(section), k * k, -1)

    def _path(self, store: TileStore, stain: Stain | None, ending: str = "") -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{file_of(store).stem}-{self.key}{f'-{stain[0]}' if stain else ''}{ending}.npy"

    @torch.no_grad()
    def _kept(
        self, path: Path, n: int, parts: Callable, what: str, stain: Stain | None, view: View | None = None
    ) -> np.ndarray:
        def encode() -> np.ndarray:
            log.info("%s by %s%s", what, self.encoder.name, self.about)
            out = np.zeros((n, self.encoder.num_features), dtype=np.float32)
            for rows, tiles in parts():
                n_at_once = self._at_once(tiles.shape[1]) if view is None else self.batch_size  # see Notes
                for start in range(0, len(rows), n_at_once):
                    part = slice(start, start + n_at_once)
                    raw = torch.from_numpy(np.array(tiles[part])).to(self.device)
                    image = _see(stain[1](raw) if stain else raw, view, int(rows[start]))
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

        return mapped_array(path, (n, self.encoder.num_features), encode)

    def _at_once(self, px: int) -> int:
        """How many tiles of a width are encoded at once, so that wide ones do not take more memory."""
        return max(1, int(self.batch_size * min(1.0, (USUAL_PX / px) ** 2)))

    def _precision(self) -> torch.dtype:
        with self.context:
            autocast = torch.is_autocast_enabled(self.device.type)
            return torch.get_autocast_dtype(self.device.type) if autocast else torch.float32


def random_twins(node: Mapping[str, Any], n: int) -> list[Callable[[], ImageEncoder]]:
    """What builds an image encoder at random weights, of the seeds 0 to n - 1 whatever the run's own seed is.

    Parameters
    ----------
    node
        Config of the encoder. One that has random weights already is its own control, and gets no twin.
    """
    return [partial(_at_random_weights, node, seed) for seed in range(n)] if node.get("pretrained") else []


def _at_random_weights(node: Mapping[str, Any], seed: int) -> ImageEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build({**node, **UNTUNED, "pretrained": False})


def _see(tiles: torch.Tensor, view: View | None, first: int) -> torch.Tensor:
    """Tiles in 0..1 as they are or as a view has them, drawn anew for each batch, which begins with spot `first`."""
    if view is None:
        return augment(tiles, "none", 0)
    return augment(tiles, view.augmentation, view.number * 1_000_003 + first, view.hed_sigma)


def weights_digest(encoder: ImageEncoder, precision: torch.dtype | None) -> str:
    """Hash of an encoder and of the precision it computes in; keys the feature cache."""
    # the printed layers name what weights do not: padding, activations, pooling
    text = f"{encoder.name} {encoder.output} {encoder.input_size} {encoder.built_as} {encoder.model}"
    digest = hashlib.blake2b(text.encode(), digest_size=8)
    digest.update(str(precision or torch.float32).encode())
    for name, tensor in sorted({**encoder.state_dict(), "mean": encoder.mean, "std": encoder.std}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
