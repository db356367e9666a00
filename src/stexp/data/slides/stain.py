"""Stain normalisation: the colours of every section brought to those of the training sections."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stexp.errors import InputError

METHODS = ("reinhard", "macenko")

GLASS = 95  # percentile of a channel that is taken for glass: few tiles of a section show none
TISSUE = np.exp(-0.15)  # of the glass, below which a pixel is tissue: the density of 0.15 of Macenko et al.
MIN_PIXELS = 500  # of tissue: five above the 99th percentile
MIN_ANGLE = np.deg2rad(5)  # between two stains; haematoxylin and eosin are some 30 degrees apart
MIN_SD = 0.1  # of a channel of Lab; a difference of 1 can just be seen
CHUNK = 4  # tiles that a CPU maps at once, so that they stay in its cache

_LEVELS = torch.arange(256, dtype=torch.float64) / 255
_LINEAR = torch.where(_LEVELS > 0.04045, ((_LEVELS + 0.055) / 1.055) ** 2.4, _LEVELS / 12.92)  # IEC 61966-2-1
_RGB_TO_XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).double()
_RGB_TO_XYZ /= _RGB_TO_XYZ.sum(1, keepdim=True)  # relative to white, which so has a* = b* = 0
_XYZ_TO_RGB = torch.linalg.inv(_RGB_TO_XYZ)
_LAB_OF_ROOTS, _LAB_OF_BLACK = np.array([[0.0, 116, 0], [500, -500, 0], [0, 200, -200]]), np.array([-16.0, 0, 0])


@dataclass(frozen=True)
class StainNormaliser:
    """One colour map per section, from its own stain to a common target.

    Parameters
    ----------
    method
        ``"macenko"`` (Macenko et al. 2009, ISBI): glass, the two stain vectors and the 99th percentiles of their
        concentrations become those of the target; what lies outside the plane of the two stains is dropped.
        Density is relative to the section's own glass, which is rarely white; the original takes it for white.
        ``"reinhard"`` (Reinhard et al. 2001, IEEE CG&A 21(5), here in CIE Lab under D65): mean and standard
        deviation of L*, a*, b* of the tissue become those of the target. Lighter pixels fade from there to a
        scaling that makes the glass that of the target; the original maps them like tissue.
    target
        ``glass`` (3,) in 0..255; ``mean``, ``sd`` (3,) of L*, a*, b*; or ``stains`` (2, 3), for haematoxylin and
        eosin a unit vector of optical density in R, G, B, and ``strength`` (2,), their 99th percentiles.
    matrix, offset : (S, 3, 3), (S, 3) float32
        Per section, of optical density (Macenko) or of the cube roots that Lab is linear in (Reinhard).
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
        cls, method: str, names: Sequence[str], stores: Sequence[np.ndarray], training: Sequence[np.ndarray]
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
        own, trained_on = [], []
        for name, tiles, used in zip(names, stores, training, strict=True):
            own.append(_measure(method, name, tiles, np.arange(len(tiles))))
            if used.any():
                trained_on.append(own[-1] if used.all() else _measure(method, name, tiles, np.flatnonzero(used)))
        target = {key: np.median([found[key] for found in trained_on], axis=0) for key in own[0]}
        if method == "macenko":
            target["stains"] /= np.linalg.norm(target["stains"], axis=1, keepdims=True)
        maps = [(_reinhard_map if method == "reinhard" else _macenko_map)(found, target) for found in own]
        parts = *zip(*maps, strict=True), [found["glass"] for found in own]
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
        method = state["method"]
        target = {key: np.array(value) for key, value in state["target"].items()}
        own = _measure(method, name, tiles, np.arange(n_tiles))
        maps = *(_reinhard_map if method == "reinhard" else _macenko_map)(own, target), own["glass"]
        return cls(method, target, *(torch.from_numpy(part[None]).float() for part in maps))

    def __call__(self, tiles: torch.Tensor, section: torch.Tensor) -> torch.Tensor:
        """Tiles (B, px, px, 3) uint8 of the sections `section` (B,; on the CPU) in the colours of the target."""
        matrix, offset, glass = (x[section].to(tiles.device) for x in (self.matrix, self.offset, self.glass))
        target_glass = torch.from_numpy(self.target["glass"]).to(glass)
        out = torch.empty_like(tiles)
        chunk = CHUNK if tiles.device.type == "cpu" else max(len(tiles), 1)
        for start in range(0, len(tiles), chunk):
            part = slice(start, start + chunk)
            planes = tiles[part].flatten(1, 2).mT.contiguous()
            if self.method == "macenko":
                mapped = _through_density(planes, matrix[part], offset[part])
            else:
                mapped = _through_lab(planes, matrix[part], offset[part], glass[part], target_glass)
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


def optical_density(pixels: torch.Tensor) -> torch.Tensor:
    """-ln((I + 1) / 256) of intensities in 0..255, uint8 or float: 0 for white, finite for black."""
    return (pixels + 1.0).div_(256).log_().neg_()


def intensity(density: torch.Tensor) -> torch.Tensor:
    """The inverse of `optical_density`."""
    return density.neg().exp_().mul_(256).sub_(1)


def _measure(method: str, name: str, tiles: np.ndarray | Mapping, rows: np.ndarray) -> dict[str, np.ndarray]:
    pixels = _sample(tiles, rows)
    glass = np.percentile(pixels, GLASS, axis=0)
    tissue = pixels[pixels.mean(axis=1) < TISSUE * glass.mean()]
    way_out = f"leave the section out (data.sections=), or train without (data.stain=null; it is {method})"
    if len(tissue) < MIN_PIXELS:
        raise InputError(
            f"section {name}: {len(tissue)} of {len(pixels)} sampled pixels show tissue, its stain is measured on "
            f"{MIN_PIXELS} at least; {way_out}"
        )
    found = _reinhard(tissue) if method == "reinhard" else _macenko(tissue, glass)
    if found is None:
        raise InputError(f"section {name}: the colours of its tissue do not determine its stain; {way_out}")
    return {"glass": glass, **found}


def measured_tiles(n_tiles: int) -> np.ndarray:
    """Numbers of the tiles that a slide of `n_tiles` is measured on, sorted."""
    return _choose(np.random.default_rng(0), np.arange(n_tiles))


def _choose(draws: np.random.Generator, rows: np.ndarray, n_tiles: int = 256) -> np.ndarray:
    return np.sort(draws.choice(rows, min(n_tiles, len(rows)), replace=False))


def _sample(tiles: np.ndarray | Mapping, rows: np.ndarray, n_pixels: int = 1024) -> np.ndarray:
    """Pixels (n, 3) of some of the tiles `rows`, the same every time."""
    draws = np.random.default_rng(0)
    chosen = _choose(draws, rows)
    return np.concatenate([draws.choice(np.asarray(tiles[row]).reshape(-1, 3), n_pixels) for row in chosen])


def _density(pixels: np.ndarray) -> np.ndarray:
    return optical_density(torch.from_numpy(np.asarray(pixels, dtype=np.float64))).numpy()


def _reinhard(tissue: np.ndarray) -> dict[str, np.ndarray] | None:
    planes = torch.from_numpy(tissue).mT[None].contiguous()
    lab = _lab_roots(planes, torch.float64)[0].mT.numpy() @ _LAB_OF_ROOTS.T + _LAB_OF_BLACK
    found = {"mean": lab.mean(axis=0), "sd": lab.std(axis=0)}
    return found if found["sd"].min() >= MIN_SD else None


def _reinhard_map(own: dict[str, np.ndarray], target: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    scale, back = np.diag(target["sd"] / own["sd"]), np.linalg.inv(_LAB_OF_ROOTS)
    shift = target["mean"] - _LAB_OF_BLACK - scale @ (own["mean"] - _LAB_OF_BLACK)
    return back @ scale @ _LAB_OF_ROOTS, back @ shift


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


# planes are (n, 3, pixels) uint8; mapped, they are float in 0..255 and a little beyond


def _through_density(planes: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return intensity(torch.baddbmm(offset[:, :, None], matrix, optical_density(planes)))


def _through_lab(
    planes: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor, glass: torch.Tensor, target_glass: torch.Tensor
) -> torch.Tensor:
    roots = torch.baddbmm(offset[:, :, None], matrix, _lab_roots(planes, matrix.dtype))
    # both curves are a power above a threshold and a line below it
    xyz = roots.clamp(min=6 / 29).pow_(3).add_((roots - 6 / 29).clamp_(max=0), alpha=3 * (6 / 29) ** 2)
    linear = torch.matmul(_XYZ_TO_RGB.to(xyz), xyz).clamp_(0, 1)
    mapped = linear.clamp(min=0.0031308).pow_(1 / 2.4).mul_(1.055).sub_(0.055)
    mapped.add_((linear - 0.0031308).clamp_(max=0), alpha=12.92).mul_(255)
    pixels, light = planes.to(xyz), glass.mean(1)[:, None, None]
    tissue = ((light - pixels.mean(1, keepdim=True)) / (light * (1 - TISSUE))).clamp_(0, 1)
    return torch.lerp(pixels * (target_glass / glass)[:, :, None], mapped, tissue)


def _lab_roots(planes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The roots of X, Y, Z that L* + 16, a*, b* are linear in, of sRGB."""
    table = _LINEAR.to(planes.device, dtype)
    linear = table.index_select(0, planes.flatten().int()).view(planes.shape)
    xyz = torch.matmul(_RGB_TO_XYZ.to(linear), linear)
    least = (6 / 29) ** 3
    return xyz.clamp(min=least).pow_(1 / 3).add_((xyz - least).clamp_(max=0), alpha=1 / (3 * (6 / 29) ** 2))
