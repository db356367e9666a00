"""Tiles around spots: cut once, kept as uint8, gathered where the model runs."""

from __future__ import annotations

import errno
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from stexp.data.cache import locked
from stexp.data.digests import file_digest
from stexp.data.progress import track
from stexp.data.section import Section
from stexp.data.slides.pixels import WHITE, free_memory
from stexp.data.slides.scales import tile_and_scales
from stexp.data.slides.slide import SlideReader
from stexp.data.slides.store import SUFFIXES, StoreInTheMaking, TileStore, open_store
from stexp.errors import InputError
from stexp.files import naming

log = logging.getLogger(__name__)

_AT_ONCE = 256  # tiles held in memory while a store is written


@dataclass(frozen=True)
class TileSpec:
    """The square around a spot.

    Parameters
    ----------
    px
        Side of the tile that the image encoder sees.
    um
        Side in micrometres, resampled to `px`; None: `px` level-0 pixels as they are, as the paper does.
    """

    px: int = 224
    um: float | None = None

    def __post_init__(self) -> None:
        if self.um is not None and not (isinstance(self.um, int | float) and 0 < self.um < np.inf):
            raise InputError(f"data.tile_um={self.um}: a length above 0 in micrometres, or null, would fit")

    @classmethod
    def of(
        cls, px: int, um: float | None, scales: Sequence[float] | None, scales_um: Sequence[float] | None
    ) -> TileSpec:
        """The tile that is cut and stored once for all views of it, which are its middle.

        Parameters
        ----------
        px, um, scales, scales_um
            ``data.tile_px``, and the others as :func:`~stexp.data.slides.scales.tile_and_scales` has them.
        """
        side_um, in_sides = tile_and_scales(um, scales, scales_um)
        return cls(px, side_um).wide(in_sides)

    def wide(self, scales: Sequence[float] | None) -> TileSpec:
        """As wide as the widest of some views, whose sides are multiples of this one's; never less."""
        reach = max([1.0, *(scales or [])])
        return TileSpec(round(self.px * reach), self.um and self.um * reach)

    def side_px(self, section: Section) -> int:
        """Side at level 0 of the section's slide, in whole pixels."""
        side = self.px
        if self.um is not None:
            if section.um_per_px is None:
                raise InputError(
                    f"section {section.name}: tiles of {self.um} um need um_per_px, which nobody gave; "
                    f"give it, or take raw pixels (data.tile_um=null, and no data.scales_um)"
                )
            side = round(self.um / section.um_per_px)
            if side < 1:
                raise InputError(
                    f"section {section.name}: a tile of {self.um} um is {side} px at {section.um_per_px} um/px"
                )
        if section.slide is not None and side > max(section.slide.size):
            width, height = section.slide.size
            raise InputError(
                f"section {section.name}: a tile of {side} px is larger than the image ({width} x {height} px)"
            )
        return side


def corners(xy_px: np.ndarray, side_px: int) -> np.ndarray:
    """Left and top (N, 2) of squares around centres that are rounded down to pixels, as the published code does."""
    return np.floor(xy_px).astype(np.int64) - side_px // 2


def _n_padded(corner: np.ndarray, side_px: int, size: tuple[int, int]) -> int:
    return int(((corner < 0) | (corner + side_px > np.array(size))).any(axis=1).sum())


def cut_tile(image: np.ndarray, corner: np.ndarray, side_px: int, px: int, out: np.ndarray) -> None:
    """Cut squares of an image (height, width, 3) uint8 and write them into `out` (N, px, px, 3).

    Parameters
    ----------
    corner : (N, 2) int64
        Left and top of each, in pixels of `image`; what lies beyond it is white.
    side_px, px
        Side cut, and side written after antialiased bilinear resampling.
    """
    height, width = image.shape[:2]
    for i, (x, y) in enumerate(corner):
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side_px, width), min(y + side_px, height)
        tile = image[y0:y1, x0:x1]
        if tile.shape[:2] != (side_px, side_px):
            whole = np.full((side_px, side_px, 3), WHITE, dtype=np.uint8)
            whole[y0 - y : y1 - y, x0 - x : x1 - x] = tile
            tile = whole
        if side_px != px:
            tensor = torch.from_numpy(np.array(tile)).permute(2, 0, 1)[None]
            tile = F.interpolate(tensor, (px, px), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        out[i] = tile


def warn_of_scales(sections: Iterable[Section], spec: TileSpec) -> None:
    """Say that tiles of raw pixels show more tissue in some sections than in others."""
    scales = [section.um_per_px for section in sections if section.um_per_px]
    if spec.um is None and scales and max(scales) > 1.1 * min(scales):
        text = "tiles of %d raw pixels show between %.0f and %.0f um of tissue; data.tile_um gives them one size"
        log.warning(text, spec.px, spec.px * min(scales), spec.px * max(scales))


def open_tiles(section: Section, spec: TileSpec, cache_dir: str | Path, store: str = "raw") -> TileStore:
    """The section's tiles, (n_spots, px, px, 3) uint8, memory-mapped; cut first where the store lacks them.

    Parameters
    ----------
    store
        ``"raw"``, a plain array, or ``"jpeg"``: a sixth of the disk, at the cost that
        :class:`~stexp.data.slides.store.JpegTiles` states. Two million tiles of 224 px are 301 GB raw.

    Notes
    -----
    The file name carries a hash of image content, positions, geometry and kind, so that a changed input is cut
    anew. It is written beside its place and renamed when whole; a run that was killed is taken up where it was;
    a lock lets several runs share a store. Slides are read by region, in memory that does not grow with them. Raw
    pixels come from level 0 as they are; tiles in micrometres from the coarsest level that is fine enough, with
    their corner rounded to a whole pixel of that level.
    """
    if section.slide is None:
        raise InputError(f"section {section.name} has no image to cut tiles from")
    if store not in SUFFIXES:
        raise InputError(f"data.tile_store={store}: choose {' or '.join(SUFFIXES)}")
    side = spec.side_px(section)
    key = hashlib.blake2b(digest_size=12)
    key.update(file_digest(section.slide.path).encode())
    key.update(section.xy_px.tobytes())
    key.update(f"{side} {spec.px} {store} v2".encode())
    folder = Path(cache_dir) / "tiles"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{section.name}-{key.hexdigest()}{SUFFIXES[store]}"
    shape = (len(section), spec.px, spec.px, 3)
    tiles = open_store(path, shape)
    if tiles is None:
        with locked(path):
            tiles = open_store(path, shape)
            if tiles is None:
                _write_tiles(section, side, path, shape)
                tiles = open_store(path, shape)
    if tiles is None:
        raise OSError(f"tile store {path} is damaged as soon as it is written")
    return tiles


def _write_tiles(section: Section, side: int, path: Path, shape: tuple[int, ...]) -> None:
    px = shape[1]
    corner = corners(section.xy_px, side)
    try:
        with (
            naming(path, path.with_suffix(".part")),
            StoreInTheMaking(path, shape) as store,
            section.image.open() as image,
        ):
            padded = _n_padded(corner, side, image.sizes[0])
            if store.done.any():
                log.info("section %s: %d of %d tiles are there already", section.name, store.done.sum(), len(section))
            scale = image.downsamples[image.level(side / px)]
            for rows, tiles in _read(image, corner, side, px, ~store.done, f"section {section.name}: tiles"):
                store.put(rows, tiles)
                store.commit()
            facts = {"section": section.name, "n": len(section), "side_px": side, "px": px, "padded": padded}
            store.finish({**facts, "downsample": scale})
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = "file too large" if error.errno == errno.EFBIG else "disk full"
        raise InputError(
            f"{reason} while cutting tiles of section {section.name} into {path}; what is cut stays, and the same "
            f"command goes on from there"
        ) from None
    log.info(
        "section %s: cut %d tiles of %d px (from %d px%s)%s",
        section.name,
        len(section),
        px,
        side,
        f", read at a {scale:.3g}th" if scale > 1 else "",
        f"; {padded} reach beyond the image and are filled with white" if padded else "",
    )


def _read(
    image: SlideReader, corner: np.ndarray, side: int, px: int, wanted: np.ndarray, what: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of `corner` (N, 2) that `wanted` (N,) names and their tiles, region by region of the slide."""
    level = image.level(side / px)
    if level:
        scale = image.downsamples[level]
        corner, side = np.round(corner / scale).astype(np.int64), round(side / scale)
    regions = [rows[wanted[rows]] for rows in by_region(corner, image.block)]
    regions = [rows for rows in regions if len(rows)]
    for rows in track(regions, sum(map(len, regions)), what, size=len):
        low = np.maximum(corner[rows].min(axis=0), 0)
        high = np.minimum(corner[rows].max(axis=0) + side, image.sizes[level])
        (x, y), (width, height) = low.tolist(), (high - low).tolist()
        region = image.read(x, y, width, height, level)
        for part in np.array_split(rows, -(-len(rows) // _AT_ONCE)):
            tiles = np.empty((len(part), px, px, 3), dtype=np.uint8)
            cut_tile(region, corner[part] - low, side, px, tiles)
            yield part, tiles


def around(section: Section, spec: TileSpec, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the k x k tiles lie that meet edge to edge around each spot, its own in the middle.

    Returns
    -------
    corner : (n_spots, k * k, 2) int64
        Left and top in level-0 pixels; from left to right, then down.
    inside : (n_spots, k * k) bool
        False where a tile reaches beyond the image on the side that it lies on; never in the middle.
    """
    side = spec.side_px(section)
    steps = np.arange(k) - k // 2
    offset = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    corner = corners(section.xy_px, side)[:, None] + side * offset
    beyond: np.ndarray = ((offset < 0) & (corner < 0)) | ((offset > 0) & (corner + side > np.array(section.image.size)))
    return corner, np.logical_not(beyond.any(axis=2))


def tiles_around(section: Section, spec: TileSpec, k: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tiles of `around` that lie inside: rows of the flattened (n_spots * k * k) and their tiles, not kept."""
    corner, inside = around(section, spec, k)
    with section.image.open() as image:
        what = f"section {section.name}: tiles around spots"
        yield from _read(image, corner.reshape(-1, 2), spec.side_px(section), spec.px, inside.ravel(), what)


def subtiles(tiles: np.ndarray, k: int) -> np.ndarray:
    """The k x k parts of tiles (B, px, px, 3), as they are: (B, k * k, px // k, px // k, 3), left to right, then down.

    They are spread evenly; where k does not divide the side, a pixel or more lies between some of them.
    """
    px = tiles.shape[1]
    side = px // k
    if side == 0:
        raise InputError(f"a tile of {px} px has no {k} x {k} parts; a larger data.tile_px would fit")
    starts = [round(i * (px - side) / max(k - 1, 1)) for i in range(k)]
    return np.stack([tiles[:, y : y + side, x : x + side] for y in starts for x in starts], axis=1)


def by_region(corner: np.ndarray, block: tuple[int, int]) -> Iterator[np.ndarray]:
    """Rows of `corner` by the block of the image they lie in, in reading order."""
    cell = corner // np.array(block)
    order = np.lexsort((corner[:, 0], corner[:, 1], cell[:, 0], cell[:, 1]))
    starts = np.flatnonzero((np.diff(cell[order], axis=0) != 0).any(axis=1)) + 1
    yield from np.split(order, starts)


class TileBank:
    """Tiles of several sections under one running spot index.

    Parameters
    ----------
    stores
        One (n, px, px, 3) uint8 array or `JpegTiles` per section, in the order of the index.
    placement
        ``"device"``: all tiles in the memory of the GPU; ``"pinned"``: in page-locked host memory, copied
        by batch; ``"disk"``: memory-mapped files, through the page cache. ``"auto"`` takes the first that
        fits in half of what is free; on a CPU that is always ``"disk"``, which costs one copy.
    """

    def __init__(self, stores: list[TileStore], placement: str = "auto") -> None:
        if placement not in ("auto", "device", "pinned", "disk"):
            raise InputError(f"data.placement={placement}: choose auto, device, pinned or disk")
        self.stores = stores
        self.starts = np.cumsum([0] + [len(store) for store in stores])
        self.placement = placement
        self._tiles: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, index: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Tiles of the spots `index` (B,), (B, px, px, 3) uint8 on `device`."""
        if self.placement == "auto":
            self.placement = self._choose(device)
            log.info("tiles are gathered from %s", self.placement)
        if self.placement == "disk" or device.type == "cpu":
            return torch.from_numpy(self._read(index.cpu().numpy())).to(device, non_blocking=True)
        if self._tiles is None:
            whole = torch.from_numpy(self._read(np.arange(len(self))))
            self._tiles = whole.to(device) if self.placement == "device" else whole.pin_memory()
        if self.placement == "device":
            return self._tiles[index.to(device)]
        return self._tiles[index.cpu()].pin_memory().to(device, non_blocking=True)

    def _choose(self, device: torch.device) -> str:
        if device.type != "cuda":
            return "disk"
        need = sum(store.nbytes for store in self.stores)
        if need < torch.cuda.mem_get_info(device)[0] / 2:
            return "device"
        free = free_memory()
        return "pinned" if free is not None and need < free / 2 else "disk"

    def _read(self, index: np.ndarray) -> np.ndarray:
        out = np.empty((len(index), *self.stores[0].shape[1:]), dtype=np.uint8)
        which = np.searchsorted(self.starts, index, side="right") - 1
        for store in np.unique(which):
            in_store = np.flatnonzero(which == store)
            out[in_store] = self.stores[store][index[in_store] - self.starts[store]]
        return out
