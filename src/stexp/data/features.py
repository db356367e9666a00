"""Features of tiles under a frozen image encoder, computed once per section and encoder."""

from __future__ import annotations

import hashlib
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from stexp.data.augment import augment
from stexp.data.datamodule import SpotDataModule
from stexp.data.kept import kept_array
from stexp.models.image_encoders import ImageEncoder

log = logging.getLogger(__name__)


@torch.no_grad()
def frozen_features(
    data: SpotDataModule, encoder: ImageEncoder, device: torch.device, context: AbstractContextManager | None = None
) -> np.ndarray:
    """Pooled features of every spot with a tile, unaugmented, its stain as `data` has it.

    Parameters
    ----------
    encoder
        In the state it is to be judged in; it is put into evaluation mode and back.
    context
        Precision to compute in, e.g. ``torch.autocast("cuda", torch.bfloat16)``.

    Returns
    -------
    (n_spots, F) float32
        In the order of ``data.spots``; NaN rows for spots without an image.

    Notes
    -----
    Kept in ``<cache_dir>/features``, one file per section, named by a hash of the tiles' store, of the
    encoder's weights and, with stain normalisation, of what it does to the section.
    """
    data.setup()
    weights = _weights_digest(encoder, context)
    folder = Path(data.cache_dir) / "features"
    folder.mkdir(parents=True, exist_ok=True)
    out = np.full((len(data.spots), encoder.num_features), np.nan, dtype=np.float32)
    was_training, where = encoder.training, next(encoder.parameters()).device
    encoder.eval().to(device)
    with_image = [section for section in data.sections if section.slide is not None]
    for i, (section, tiles) in enumerate(zip(with_image, data.bank.stores, strict=True)):
        rows = np.flatnonzero(data.spots["section"] == section.name)
        stain = f"-{data.normaliser.key(i)}" if data.normaliser else ""
        path = folder / f"{Path(tiles.filename).stem}-{weights}{stain}.npy"

        def encode(rows=rows, name=section.name) -> np.ndarray:
            log.info("section %s: frozen features of %d tiles by %s", name, len(rows), encoder.name)
            return _encode(data, rows, encoder, device, context or nullcontext())

        out[rows] = kept_array(path, (len(rows), encoder.num_features), encode)
    encoder.train(was_training).to(where)
    return out


def _encode(data: SpotDataModule, rows: np.ndarray, encoder, device, context) -> np.ndarray:
    parts = []
    for start in range(0, len(rows), data.eval_batch_size):
        image = augment(data.tiles(rows[start : start + data.eval_batch_size], device), "none", 0)
        with context:
            parts.append(encoder(image).float().cpu().numpy())
    return np.concatenate(parts)


def _weights_digest(encoder: ImageEncoder, context: AbstractContextManager | None) -> str:
    # the printed layers name what weights do not: padding, activations, pooling
    digest = hashlib.blake2b(f"{encoder.name} {encoder.model}".encode(), digest_size=8)
    digest.update(str(getattr(context, "fast_dtype", "float32")).encode())
    for name, tensor in sorted({**encoder.state_dict(), "mean": encoder.mean, "std": encoder.std}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
