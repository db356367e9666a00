"""Stain normalisation: the colours of every section brought to those of the training sections."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stexp.data.slides.store import JpegTiles
from stexp.errors import InputError

METHODS = ("macenko",)

GLASS = 95  # percentile of a channel that is taken for glass: few tiles of a section show none
TISSUE = np.exp(-0.15)  # of the glass, below which a pixel is tissue: the density of 0.15 of Macenko et al.
MIN_PIXELS = 500  # of tissue: five above the 99th percentile
MIN_ANGLE = np.deg2rad(5)  # between two stains; haematoxylin and eosin are some 30 degrees apart
CHUNK = 4  # tiles that a CPU maps at once, so that they stay in its cache


@dataclass(frozen=True)
class StainNormaliser:
    """One colour map per section, from its own stain to a common target.

    Parameters
    ----------
    method
        ``"macenko"`` (Macenko et al. 2009, ISBI): glass, the two stain vectors and the 99th percentiles of their
        concentrations become those of the target; what lies outside the plane of the two stains is dropped.
        Density is relative to the section's own glass, which is rarely white; the original takes it for white.
    target
        ``glass`` (3,) in 0..255; ``stains`` (2, 3), for haematoxylin and eosin a unit vector of optical density in
        R, G, B, and ``strength`` (2,), their 99th percentiles.
    matrix, offset : (S, 3, 3), (S, 3) float32
        Per section, of optical density.
    glass : (S, 3) float32
        Of the sections.
    """

    method: str
    target: dict[str, np.ndarray]
    matrix: torch.Tensor
    offset: torch.Tensor
    glass: torch.Tensor

    @classmethod
    def fit(
        cls, method: str, names: Sequence[str], stores: Sequence[np.ndarray | JpegTiles], training: Sequence[np.ndarray]
    ) -> StainNormaliser:
        """Measure every section and the target.

        Parameters
        ----------
        names, stores
            Name and tiles, (n, px, px, 3) uint8, of each of S sections.
        training
            For each section, which of its tiles are trained on, (n,) bool.

        Notes
        -----
        A section's own parameters come from its own tiles, whatever their role: from the image alone, never from
        expression, as they would for a slide without counts. The target is the median over the sections that are
        trained on, measured on the tiles that are, so that one odd section cannot move it much; no tile of
        validation or test has a part in it. Measured are the tissue pixels in a fixed sample of tiles and pixels.

        Raises
        ------
        InputError
            A section with too little tissue, or whose colours do not determine its stain. It is not passed through
            unchanged: its colours would then differ from those of all others.
        """
        check_method(method)
        own, trained_on = [], []
        for name, tiles, used in zip(names, stores, training, strict=True):
            own.append(_measure(method, name, tiles, np.arange(len(tiles))))
            if used.any():
                trained_on.append(own[-1] if used.all() else _measure(method, name, tiles, np.flatnonzero(used)))
        target = {key: np.median([stain[key] for stain in trained_on], axis=0) for key in own[0]}
        target["stains"] /= np.linalg.norm(target["stains"], axis=1, keepdims=True)
        maps = [_macenko_map(stain, target) for stain in own]
        parts = *zip(*maps, strict=True), [stain["glass"] for stain in own]
        return cls(method, target, *(torch.from_numpy(np.stack(part)).float() for part in parts))

    @classmethod
    def towards(cls, state: dict, name: str, tiles: Mapping[int, np.ndarray], n_tiles: int) -> StainNormaliser:
        """Of one slide that was not there when the target was measured.

        Parameters
        ----------
        state
            Of the normaliser that the target comes from, see `state`.
        name
            Of the slide, for messages.
        tiles
            Those of its `n_tiles` tiles that `measured_tiles` names, by their number.
        """
        method = check_method(state["method"])
        target = {key: np.array(value) for key, value in state["target"].items()}
        own = _measure(method, name, tiles, np.arange(n_tiles))
        maps = *_macenko_map(own, target), own["glass"]
        return cls(method, target, *(torch.from_numpy(part[None]).float() for part in maps))

    def __call__(self, tiles: torch.Tensor, section: torch.Tensor) -> torch.Tensor:
        """Tiles (B, px, px, 3) uint8 of the sections `section` (B,; on the CPU) in the colours of the target."""
        matrix, offset = (x[section].to(tiles.device) for x in (self.matrix, self.offset))
        out = torch.empty_like(tiles)
        chunk = CHUNK if tiles.device.type == "cpu" else max(len(tiles), 1)
        for start in range(0, len(tiles), chunk):
            part = slice(start, start + chunk)
            planes = tiles[part].flatten(1, 2).mT.contiguous()
            mapped = _through_density(planes, matrix[part], offset[part])
            out[part] = mapped.round_().clamp_(0, 255).to(torch.uint8).mT.reshape(out[part].shape)
        return out

    def state(self) -> dict:
        """What another data set needs to be brought to the same target; plain values."""
        return {"method": self.method, "target": {key: value.tolist() for key, value in self.target.items()}}

    def key(self, section: int) -> str:
        """Hash of what is done to a section."""
        digest = hashlib.blake2b(self.method.encode(), digest_size=8)
        for part in (self.matrix[section], self.offset[section], self.glass[section]):
            digest.update(part.numpy().tobytes())
        digest.update(self.target["glass"].tobytes())
        return digest.hexdigest()


def check_method(method: str) -> str:
    """The name of a method that there is.

    Raises
    ------
    InputError
        There is none of this name; ``reinhard`` there was, see experiments/results/stain-her2st.json.
    """
    if method == "reinhard":
        raise InputError("data.stain=reinhard is no longer there; data.stain=macenko, or null for none, would fit")
    if method not in METHODS:
        raise InputError(f"data.stain={method}: choose {' or '.join(METHODS)}, or null for none")
    return method


def optical_density(pixels: torch.Tensor) -> torch.Tensor:
    """-ln((I + 1) / 256) of intensities in 0..255, uint8 or float: 0 for white, finite for black."""
    return (pixels + 1.0).div_(256).log_().neg_()


def intensity(density: torch.Tensor) -> torch.Tensor:
    """The inverse of `optical_density`."""
    return density.neg().exp_().mul_(256).sub_(1)


Tiles = np.ndarray | JpegTiles | Mapping


def _measure(method: str, name: str, tiles: Tiles, rows: np.ndarray) -> dict[str, np.ndarray]:
    pixels = _sample(tiles, rows)
    glass = np.percentile(pixels, GLASS, axis=0)
    tissue = pixels[pixels.mean(axis=1) < TISSUE * glass.mean()]
    way_out = f"leave the section out (data.sections=), or train without (data.stain=null; it is {method})"
    if len(tissue) < MIN_PIXELS:
        raise InputError(
            f"section {name}: {len(tissue)} of {len(pixels)} sampled pixels show tissue, its stain is measured on "
            f"{MIN_PIXELS} at least; {way_out}"
        )
    stain = _macenko(tissue, glass)
    if stain is None:
        raise InputError(f"section {name}: the colours of its tissue do not determine its stain; {way_out}")
    return {"glass": glass, **stain}


def measured_tiles(n_tiles: int) -> np.ndarray:
    """Numbers of the tiles that a slide of `n_tiles` is measured on, sorted."""
    return _choose(np.random.default_rng(0), np.arange(n_tiles))


def _choose(draws: np.random.Generator, rows: np.ndarray, n_tiles: int = 256) -> np.ndarray:
    return np.sort(draws.choice(rows, min(n_tiles, len(rows)), replace=False))


def _sample(tiles: Tiles, rows: np.ndarray, n_pixels: int = 1024) -> np.ndarray:
    """Pixels (n, 3) of some of the tiles `rows`, the same every time."""
    draws = np.random.default_rng(0)
    chosen = _choose(draws, rows)
    return np.concatenate([draws.choice(np.asarray(tiles[row]).reshape(-1, 3), n_pixels) for row in chosen])


def _density(pixels: np.ndarray) -> np.ndarray:
    return optical_density(torch.from_numpy(np.asarray(pixels, dtype=np.float64))).numpy()


def _macenko(tissue: np.ndarray, glass: np.ndarray) -> dict[str, np.ndarray] | None:
    density = _density(tissue) - _density(glass)
    # right singular vectors of the densities; the plane goes through the origin, which is glass
    plane = np.linalg.eigh(density.T @ density)[1][:, [2, 1]]
    plane[:, 0] *= np.sign(plane[:, 0].sum())
    along, across = (density @ plane).T
    extremes = np.percentile(np.arctan2(across, along), [1, 99])
    if np.ptp(extremes) < MIN_ANGLE:
        return None
    stains = np.stack([np.cos(extremes), np.sin(extremes)], axis=1) @ plane.T
    stains = stains[np.argsort(-stains[:, 0])]  # haematoxylin absorbs more red than eosin
    strength = np.percentile(density @ np.linalg.pinv(stains), 99, axis=0)
    return {"stains": stains, "strength": strength} if strength.min() > 0 else None


def _macenko_map(own: dict[str, np.ndarray], target: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    scale = np.diag(target["strength"] / own["strength"])
    matrix = target["stains"].T @ scale @ np.linalg.pinv(own["stains"].T)
    return matrix, _density(target["glass"]) - matrix @ _density(own["glass"])


def _through_density(planes: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Planes (n, 3, pixels) uint8, mapped: float in 0..255 and a little beyond."""
    return intensity(torch.baddbmm(offset[:, :, None], matrix, optical_density(planes)))
