"""Tiles of a slide as a stream: read ahead in threads, never all in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock

import numpy as np
import torch

from stexp.data.slides.formats import PillowImage
from stexp.data.slides.pixels import BLOCK_PX
from stexp.data.slides.slide import Slide, SlideReader
from stexp.data.slides.tiles import by_region, corners, cut_tile
from stexp.errors import InputError

AHEAD_BYTES = 256 << 20  # of tiles that wait to be taken, beyond two batches
SPARSE = 0.5  # share of a region that its tiles cover, below which they are read one by one


def tile_batches(
    slide: Slide,
    xy_px: np.ndarray,
    side_px: int,
    px: int,
    batch_size: int,
    start: int = 0,
    threads: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tiles around places on a slide, batch by batch, the same as `stexp.data.slides.tiles.open_tiles` keeps.

    Parameters
    ----------
    xy_px : (N, 2)
        Centres in level-0 pixels.
    side_px, px
        Side of the square at level 0, and side of the tile.
    start
        Tiles of the order that are left out, because they are done; a multiple of `batch_size` leaves the batches
        that follow as they are.
    threads
        That read and cut; None: as many as torch computes with.

    Yields
    ------
    rows : (B,) int64
        Of `xy_px`; B is `batch_size` but for the last batch. Their order is that of blocks of the image, each of
        which is read once, or tile by tile where that is less. It depends on the slide, `xy_px`, `side_px` and `px`
        alone.
    tiles : (B, px, px, 3) uint8

    Raises
    ------
    InputError
        A number that does not fit, or a damaged slide.

    Notes
    -----
    Memory: two batches and up to 256 MB of tiles ahead, and a block per thread (1,024 px and a tile wide; as wide as
    the image where it is stored in strips). It grows neither with the slide nor with the number of tiles, but for
    images that Pillow decodes whole.
    """
    least = {"side_px": (side_px, 1), "px": (px, 1), "batch_size": (batch_size, 1), "start": (start, 0)}
    for name, (value, fits) in least.items():
        if value < fits:
            raise InputError(f"{name}={value}: a whole number of at least {fits} would fit")
    xy_px = np.asarray(xy_px, dtype=np.float64)
    if outside := int(((xy_px < 0) | (xy_px >= slide.size)).any(axis=1).sum()):
        raise InputError(f"image {slide.path}: {outside} of {len(xy_px)} places lie outside of it")
    threads = threads or torch.get_num_threads()
    with ExitStack() as stack:
        image = stack.enter_context(slide.open())
        readers: SimpleQueue[SlideReader] = SimpleQueue()
        readers.put(image)
        # one is enough of images that are decoded whole, or by strips, which may be as large
        if image.block != (BLOCK_PX, BLOCK_PX):
            threads = min(threads, 2)
        elif not isinstance(image._file, PillowImage):
            for _ in range(threads - 1):
                readers.put(stack.enter_context(slide.open()))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="tiles")
        stack.callback(pool.shutdown, cancel_futures=True)  # before the readers are closed
        waiting: deque[tuple[np.ndarray, np.ndarray, list[Future]]] = deque()
        most = 2 + AHEAD_BYTES // (batch_size * px * px * 3)
        for rows, parts in _batches(image, readers, xy_px, side_px, px, batch_size, start):
            tiles = np.empty((len(rows), px, px, 3), dtype=np.uint8)
            waiting.append((rows, tiles, [pool.submit(part.cut, tiles) for part in parts]))
            del parts  # what is left to do alone keeps a region's pixels
            if len(waiting) == most:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


def _finished(rows: np.ndarray, tiles: np.ndarray, parts: list[Future]) -> tuple[np.ndarray, np.ndarray]:
    for part in parts:
        part.result()
    return rows, tiles


class _Region:
    """What the tiles of a block are cut from: read by who needs it first, gone with the last who does."""

    def __init__(self, readers: SimpleQueue[SlideReader], low: np.ndarray, high: np.ndarray, level: int) -> None:
        self.low, self._size, self._level, self._readers = low, high - low, level, readers
        self._pixels: np.ndarray | None = None
        self._lock = Lock()

    def pixels(self) -> np.ndarray:
        with self._lock:
            if self._pixels is None:
                self._pixels = self.read(self.low, self._size)
            return self._pixels

    def read(self, low: np.ndarray, size: np.ndarray) -> np.ndarray:
        reader = self._readers.get()
        try:
            (x, y), (width, height) = low.tolist(), size.tolist()
            return reader.read(x, y, width, height, self._level)
        finally:
            self._readers.put(reader)

    def is_sparse(self, n: int, side: int) -> bool:
        """Whether `n` tiles are so few that they are read one by one, without the blocks between them."""
        return n * side**2 < SPARSE * int(np.prod(self._size))


@dataclass(frozen=True, eq=False)
class _Part:
    """Tiles of one region that go to one batch, from `place` on."""

    region: _Region
    sparse: bool
    corner: np.ndarray
    side: int
    px: int
    place: int

    def cut(self, tiles: np.ndarray) -> None:
        out = tiles[self.place : self.place + len(self.corner)]
        if not self.sparse:
            cut_tile(self.region.pixels(), self.corner - self.region.low, self.side, self.px, out)
            return
        for i, corner in enumerate(self.corner):
            pixels = self.region.read(corner, np.full(2, self.side))
            cut_tile(pixels, np.zeros((1, 2), dtype=np.int64), self.side, self.px, out[i : i + 1])


def _batches(
    image: SlideReader,
    readers: SimpleQueue[SlideReader],
    xy_px: np.ndarray,
    side_px: int,
    px: int,
    batch_size: int,
    start: int,
) -> Iterator[tuple[np.ndarray, list[_Part]]]:
    """Rows of every batch, and what is to be done for it."""
    corner, side, level = corners(xy_px, side_px), side_px, image.level(side_px / px)
    scale = image.downsamples[level]
    if level:
        corner, side = np.round(corner / scale).astype(np.int64), round(side_px / scale)
    # strips are read whole; between the pixels of level 0 OpenSlide interpolates, from where a region begins
    by_tile = image.block == (BLOCK_PX, BLOCK_PX) and scale == round(scale)
    rows: list[np.ndarray] = []
    parts: list[_Part] = []
    skip = start
    for in_block in by_region(corner, image.block) if len(xy_px) else ():
        low = np.maximum(corner[in_block].min(axis=0), 0)
        high = np.minimum(corner[in_block].max(axis=0) + side, image.sizes[level])
        region = _Region(readers, low, high, level)
        sparse = by_tile and region.is_sparse(len(in_block), side)
        in_block, skip = in_block[skip:], max(0, skip - len(in_block))
        while len(in_block):
            place = sum(len(part) for part in rows)
            now, in_block = np.split(in_block, [batch_size - place])
            rows.append(now)
            parts.append(_Part(region, sparse, corner[now], side, px, place))
            if place + len(now) == batch_size:
                yield np.concatenate(rows), parts
                rows, parts = [], []
    if rows:
        yield np.concatenate(rows), parts
