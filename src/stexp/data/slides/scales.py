"""Views of a tile at several magnifications: their sides in multiples of a tile's, or in micrometres."""

from __future__ import annotations

from collections.abc import Sequence

from stexp.arguments import Positive, check
from stexp.errors import InputError

_Sides = list[Positive] | None


def tile_and_scales(
    tile_um: float | None, scales: Sequence[float] | None, scales_um: Sequence[float] | None
) -> tuple[float | None, list[float] | None]:
    """The side of a tile, and the views of it in multiples of that side, however these are said.

    Parameters
    ----------
    tile_um
        ``data.tile_um``, the side that ``data.tile_px`` pixels cover. None: full-resolution pixels as they are; or,
        with `scales_um`, the side of the smallest view, so that each view has as many pixels as a tile.
    scales
        ``data.scales``, in sides of a tile; None: the tile alone.
    scales_um
        ``data.scales_um``, in micrometres.

    Returns
    -------
    tile_um, scales
        None where there is none: pixels as they are, the tile alone.

    Raises
    ------
    InputError
        Both are given, or one of them holds no or other values than lengths.
    """
    check("data.scales", scales, _Sides)
    check("data.scales_um", scales_um, _Sides)
    for name, sides in (("scales", scales), ("scales_um", scales_um)):
        if sides is not None and not sides:
            raise InputError(f"data.{name}=[]: one view at least, or null for the tile alone, would fit")
    if scales_um is None:
        return tile_um, None if scales is None else list(scales)
    if scales is not None:
        raise InputError(
            f"data.scales_um={_typed(scales_um)} and data.scales={_typed(scales)} both say what is seen of a tile; one "
            f"of them as null would fit (data.scales of a method with views of its own: model.scales=null)"
        )
    check("data.tile_um", tile_um, Positive | None)
    unit = float(min(scales_um) if tile_um is None else tile_um)
    return unit, [float(side) / unit for side in scales_um]


def _typed(sides: Sequence[float]) -> str:
    return f"[{','.join(f'{side:g}' for side in sides)}]"
