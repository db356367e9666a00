"""Images of OME-Zarr, as SpatialData keeps them: a folder of levels in chunks, read by region."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stexp.data.slides.pixels import BLOCK_PX, check_memory, check_size, on_glass
from stexp.errors import InputError

_MICROMETRES = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3}  # units of OME-NGFF


def is_zarr(path: Path) -> bool:
    """Whether a folder is a group or array of zarr 2 or 3."""
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zarray"))


@contextmanager
def without_pickles() -> Iterator[None]:
    """Let zarr refuse arrays that are opened meanwhile and say that they are pickled: to decode those runs code."""
    from numcodecs.registry import codec_registry  # of zarr, which is optional

    codec = codec_registry.pop("pickle", None)
    try:
        yield
    finally:
        if codec is not None:
            codec_registry["pickle"] = codec


class ZarrImage:
    """A multiscale image of OME-NGFF 0.4 or 0.5 with 3 or 4 channels of 8 bits.

    Parameters
    ----------
    path
        The folder of the image, such as ``store.zarr/images/full_image``.

    Attributes
    ----------
    sizes : list of (int, int)
        Width and height of every level, largest first.
    um_xy : (float, float) or None
        Micrometres per pixel of the first level, where its axes have a unit of length.
    block : (int, int)
        Width and height of regions that suit how the image is stored.
    notes, hints : list of str
        Empty.

    Raises
    ------
    InputError
        No image, one of other pixels, or the package zarr is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import zarr  # optional: spatialdata and anndata bring it
        except ImportError as error:
            raise InputError(f"image {path} is OME-Zarr, which needs more: pip install 'stexp[spatialdata]'") from error
        self.path = path
        self.notes: list[str] = []
        self.hints: list[str] = []
        with without_pickles():
            node: Any = zarr.open(path, mode="r")
            attributes: dict[str, Any] = node.attrs.asdict()
            multiscales = attributes.get("ome", attributes).get("multiscales")
            if not isinstance(node, zarr.Group) or not multiscales:
                inside = sorted(str(image) for image in path.glob("images/*") if is_zarr(image))
                near = f"; it holds {', '.join(inside[:5])}" if inside else ""
                raise InputError(f"image {path} is a folder of zarr, and no image of OME-Zarr{near}")
            datasets = multiscales[0]["datasets"]
            arrays: list[Any] = [node[dataset["path"]] for dataset in datasets]
        self._axes = [str(axis["name"]).lower() for axis in multiscales[0]["axes"]]
        for array in arrays:
            self._check(array)
        x, y = self._axes.index("x"), self._axes.index("y")
        self._arrays = sorted(arrays, key=lambda array: -array.shape[x])
        self.sizes: list[tuple[int, int]] = [(array.shape[x], array.shape[y]) for array in self._arrays]
        check_size(path, *self.sizes[0], expansion=None)
        first = self._arrays[0]
        across, down = (max(1, BLOCK_PX // side) * side for side in (first.chunks[x], first.chunks[y]))
        self.block = (across, down)
        self.um_xy = _um_xy(multiscales[0], datasets[arrays.index(first)])

    def _check(self, array: Any) -> None:
        sizes = dict(zip(self._axes, array.shape, strict=True))
        others = math.prod(size for axis, size in sizes.items() if axis not in "cyx")
        if array.dtype != np.uint8 or not {"c", "y", "x"} <= set(sizes) or sizes["c"] not in (3, 4) or others != 1:
            shape = " x ".join(f"{size} {axis}" for axis, size in sizes.items())
            raise InputError(
                f"image {self.path} has {shape} of {array.dtype}; an image of H&E has 3 channels of 8 bits (uint8)"
            )
        check_memory(self.path, math.prod(array.chunks))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        part = {"x": slice(x, x + width), "y": slice(y, y + height), "c": slice(None)}
        pixels = self._arrays[level][tuple(part.get(axis, 0) for axis in self._axes)]
        order = [axis for axis in self._axes if axis in part]
        pixels = np.ascontiguousarray(np.transpose(pixels, [order.index(axis) for axis in "yxc"]))
        return pixels if pixels.shape[2] == 3 else np.asarray(on_glass(Image.fromarray(pixels, "RGBA")))

    def close(self) -> None:
        """Nothing is kept open."""


def _um_xy(multiscale: Mapping[str, Any], dataset: Mapping[str, Any]) -> tuple[float, float] | None:
    """Micrometres per pixel of a level: by its own transformations, then by those of all levels (OME-NGFF 0.4)."""
    axes = [str(axis["name"]).lower() for axis in multiscale["axes"]]
    units = dict(zip(axes, (axis.get("unit") for axis in multiscale["axes"]), strict=True))
    own, of_all = (each.get("coordinateTransformations", []) for each in (dataset, multiscale))
    own = [step for step in own if step.get("type") == "scale"]
    # those with an output lead to coordinate systems of SpatialData, one each
    of_all = [step for step in of_all if step.get("type") == "scale" and "output" not in step]
    # a scale may also be kept in a file of its own, which is not read
    if len(own) != 1 or not all("scale" in step for step in own + of_all):
        return None
    if not {units["x"], units["y"]} <= set(_MICROMETRES):
        return None
    scale = np.prod([step["scale"] for step in own + of_all], axis=0)
    x, y = (float(scale[axes.index(axis)]) * _MICROMETRES[str(units[axis])] for axis in "xy")
    return x, y
