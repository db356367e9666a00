"""Tiles around spots: cut once, kept as uint8, gathered where the model runs."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch.nn import functional as F

from stexp import InputError
from stexp.data.section import Section

log = logging.getLogger(__name__)

BACKGROUND = 255  # glass: what a tile shows beyond the border of the image


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

    def side_px(self, section: Section) -> int:
        """Side at level 0 of the section's slide, in whole pixels."""
        if self.um is None:
            return self.px
        if section.um_per_px is None:
            raise InputError(
                f"section {section.name}: tiles of {self.um} um need um_per_px, which nobody gave; "
                f"give it, or take raw pixels (data.tile_um=null)"
            )
        side = round(self.um / section.um_per_px)
        if side < 1:
            raise InputError(
                f"section {section.name}: a tile of {self.um} um is {side} px at {section.um_per_px} um/px"
            )
        return side


def cut_tiles(image: np.ndarray, xy_px: np.ndarray, side_px: int, px: int, out: np.ndarray) -> int:
    """Cut the squares centred on `xy_px` and write them into `out`.

    Parameters
    ----------
    image : (height, width, 3) uint8
    xy_px : (N, 2)
        Centres in pixels of `image`, rounded down to whole pixels, as the published code does.
    side_px, px
        Side cut, and side written after antialiased bilinear resampling.
    out : (N, px, px, 3) uint8

    Returns
    -------
    int
        Tiles that reach beyond the image, filled there with white.
    """
    height, width = image.shape[:2]
    corner = np.floor(xy_px).astype(np.int64) - side_px // 2
    padded = 0
    for i in np.lexsort((corner[:, 0], corner[:, 1])):
        x, y = corner[i]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side_px, width), min(y + side_px, height)
        tile = image[y0:y1, x0:x1]
        if tile.shape[:2] != (side_px, side_px):
            padded += 1
            whole = np.full((side_px, side_px, 3), BACKGROUND, dtype=np.uint8)
            whole[y0 - y : y1 - y, x0 - x : x1 - x] = tile
            tile = whole
        if side_px != px:
            tensor = torch.from_numpy(np.ascontiguousarray(tile)).permute(2, 0, 1)[None]
            tile = F.interpolate(tensor, (px, px), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        out[i] = tile
    return padded


def open_tiles(section: Section, spec: TileSpec, cache_dir: str | Path) -> np.ndarray:
    """The section's tiles, (n_spots, px, px, 3) uint8, memory-mapped; cut first where the store lacks them.

    The file name carries a hash of image content, positions and geometry, so that a changed input is cut
    anew. It is written beside its place and renamed when whole; a lock lets several runs share a store.
    """
    if section.slide is None:
        raise InputError(f"section {section.name} has no image to cut tiles from")
    side = spec.side_px(section)
    key = hashlib.blake2b(digest_size=12)
    key.update(file_digest(section.slide.path).encode())
    key.update(section.xy_px.tobytes())
    key.update(f"{side} {spec.px} v1".encode())
    folder = Path(cache_dir) / "tiles"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{section.name}-{key.hexdigest()}.npy"
    shape = (len(section), spec.px, spec.px, 3)
    tiles = _open_whole(path, shape)
    if tiles is None:
        with FileLock(f"{path}.lock"):
            tiles = _open_whole(path, shape)
            if tiles is None:
                _write_tiles(section, side, spec.px, path)
                tiles = _open_whole(path, shape)
    return tiles


def _open_whole(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The store at `path`; None where there is none, or one that something damaged."""
    if not (path.exists() and path.with_suffix(".json").exists()):
        return None
    try:
        tiles = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError):
        tiles = None
    if tiles is None or tiles.shape != shape or tiles.dtype != np.uint8:
        log.warning("tile store %s is damaged; cutting it again", path)
        return None
    return tiles


def _write_tiles(section: Section, side: int, px: int, path: Path) -> None:
    shape = (len(section), px, px, 3)
    need, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if need > free:
        raise InputError(
            f"tiles of section {section.name} need {need / 1e6:.0f} MB in {path.parent}, {free / 1e6:.0f} MB are free"
        )
    part = path.with_suffix(".part")
    try:
        tiles = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        _reserve(part)
        padded = cut_tiles(section.slide.read(), section.xy_px, side, px, tiles)
        tiles.flush()
        del tiles
        facts = {"section": section.name, "n": len(section), "side_px": side, "px": px, "padded": padded}
        path.with_suffix(".json").write_text(json.dumps(facts))
        os.replace(part, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"disk full while cutting tiles of section {section.name} into {path.parent}") from None
        raise
    finally:
        part.unlink(missing_ok=True)
    log.info(
        "section %s: cut %d tiles of %d px (from %d px)%s",
        section.name,
        len(section),
        px,
        side,
        f"; {padded} reach beyond the image and are filled with white" if padded else "",
    )


def _reserve(path: Path) -> None:
    """Claim the blocks of a sparse file: a memory map that meets a full disk kills the process without a word."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def file_digest(path: str | Path) -> str:
    """Content hash of a file; above 256 MB, of its size and 64 blocks spread over it."""
    path = Path(path)
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= 256 << 20:
            while block := file.read(1 << 22):
                digest.update(block)
        else:
            for start in np.linspace(0, size - (1 << 20), 64, dtype=np.int64):
                file.seek(int(start))
                digest.update(file.read(1 << 20))
    return digest.hexdigest()


class TileBank:
    """Tiles of several sections under one running spot index.

    Parameters
    ----------
    stores
        One (n, px, px, 3) uint8 array per section, in the order of the index.
    placement
        ``"device"``: all tiles in the memory of the GPU; ``"pinned"``: in page-locked host memory, copied
        by batch; ``"disk"``: memory-mapped files, through the page cache. ``"auto"`` takes the first that
        fits in half of what is free; on a CPU that is always ``"disk"``, which costs one copy.
    """

    def __init__(self, stores: list[np.ndarray], placement: str = "auto") -> None:
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
        return "pinned" if need < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 else "disk"

    def _read(self, index: np.ndarray) -> np.ndarray:
        out = np.empty((len(index), *self.stores[0].shape[1:]), dtype=np.uint8)
        which = np.searchsorted(self.starts, index, side="right") - 1
        for store in np.unique(which):
            here = np.flatnonzero(which == store)
            out[here] = self.stores[store][index[here] - self.starts[store]]
        return out
