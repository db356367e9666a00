"""What tiles show: tissue, blur, ink, folds, stain."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from stexp.data.progress import track
from stexp.data.slides.store import JpegTiles
from stexp.errors import InputError

OF_TILES = ("tissue", "blur", "pen", "fold", "od_red", "od_green", "od_blue", "red", "green", "blue")
VERSION = 2  # of what is measured on a tile; raise when the same tile gives other numbers
BLUR_UM = 1.0  # um/px at which blur is measured
CELL_UM = 16.0  # side of the squares whose mean colour is judged: wider than a nucleus, narrower than a stroke
GREENEST, DENSE = 0.05, 0.15  # optical densities from which on a square is tissue, see `measure`
INK_OD, INK_GREY = 0.3, 0.2  # of ink that `stexp.data.slides.tissue` leaves out
SAMPLE = 256  # tiles that the usual hue of a section is measured on, evenly through it
FOLD = 0.2  # saturation minus intensity, see `measure`
TILES_AT_ONCE_PX = 1 << 21


def measure(tiles: np.ndarray | JpegTiles, um_per_px: float | None) -> np.ndarray:
    """What tiles show besides tissue of good quality.

    Parameters
    ----------
    tiles : (N, px, px, 3) uint8
        Array, memory map or tile store; some are read at a time.
    um_per_px
        Micrometres per pixel of the tiles; None: taken for `BLUR_UM`.

    Returns
    -------
    (N, 10) float64, the columns of `OF_TILES`
        ``tissue`` : share of the area that absorbs green more than red and blue, as haematoxylin and eosin do
        (Ruifrok & Johnston 2001), by `GREENEST` in optical density, or all three by `DENSE`, and is no ink. Glass is
        nearly grey and pale: in HER2+ 0.00 to 0.04, and 0.02 to 0.08.

        ``blur`` : blur metric of Crete et al. 2007 (doi 10.1117/12.702790) at `BLUR_UM`: how little of the
        differences between neighbouring pixels a further blur takes away; 0 sharp, 1 blurred. Tiles that are coarser
        are taken as they are. NaN for tiles without any difference, or too small. Tiles of HER2+ have 0.29..0.53, of
        a Visium section after two JPEG compressions 0.40..0.60, both after a Gaussian of 3 um 0.69 and more.

        ``pen`` : share of ink, see `ink`.

        ``fold`` : share of tissue whose saturation exceeds its intensity by `FOLD`: thicker tissue is darker and more
        saturated (Bautista & Yagi 2010, doi 10.4103/2153-3539.73320; Kothari et al. 2013, doi
        10.4103/2153-3539.117448). A hint only: dense nuclei come near to it (the lymphoid follicle of a mouse colon
        is flagged), and where the stain is pale a fold stays below it.

        ``od_red``, ..., ``red``, ... : optical density, -log10 of the light that passes (0..1), and colour (0..255),
        means over tissue; NaN without tissue.

    Notes
    -----
    Colours are judged as means over squares of `CELL_UM`. Thresholds of a pixel are constants here, shares of a tile
    that are too much are `Thresholds`.
    """
    if len(tiles.shape) != 4 or tiles.shape[3] != 3 or tiles.dtype != np.uint8:
        raise InputError(f"tiles must be (N, H, W, 3) uint8, got {tiles.shape} {tiles.dtype}")
    out = np.empty((len(tiles), len(OF_TILES)))
    at_once = max(1, TILES_AT_ONCE_PX // (tiles.shape[1] * tiles.shape[2]))
    parts = [slice(start, start + at_once) for start in range(0, len(tiles), at_once)]
    um_per_px = um_per_px or BLUR_UM
    hues = _usual_hues(tiles, um_per_px)
    for part in track(parts, len(tiles), "quality of tiles", size=lambda part: len(range(len(tiles))[part])):
        out[part] = _measure(*_at_scale(tiles[part], um_per_px), hues).double().numpy()
    return out


def _at_scale(tiles: np.ndarray, um_per_px: float) -> tuple[torch.Tensor, float]:
    """Colours (B, 3, h, w) 0..255, no finer than `BLUR_UM`, and their um/px."""
    colours = torch.from_numpy(np.array(tiles)).permute(0, 3, 1, 2).float()
    if um_per_px >= BLUR_UM:
        return colours, um_per_px
    size = [max(1, round(n * um_per_px / BLUR_UM)) for n in colours.shape[2:]]
    return F.interpolate(colours, size, mode="bilinear", antialias=True), BLUR_UM


def _cells(colours: torch.Tensor, um_per_px: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean colour and optical density of squares of `CELL_UM`, both (B, 3, cells)."""
    side = min(max(1, round(CELL_UM / um_per_px)), *colours.shape[2:])
    colour = F.avg_pool2d(colours, side).flatten(2)
    return colour, -torch.log10((colour.clamp(max=254) + 1) / 255)


def ink(red: torch.Tensor, green: torch.Tensor, blue: torch.Tensor, hues: tuple[float, float]) -> torch.Tensor:
    """Where optical densities are those of a pen, not of haematoxylin and eosin; bool of their shape.

    Parameters
    ----------
    hues
        Most red and least blue over green that the section's tissue has; see `_usual_hues`.

    Notes
    -----
    H&E absorbs green most: on tissue of six real sections red exceeds green by 0.10 at most, blue is 0.47 to 0.86 of
    green. Beyond that lie

    - blue and green ink, which absorb red most, or more of it than the section's own stains do;
    - black ink, which absorbs all alike, and strongly;
    - yellow, orange and light green ink, which absorb blue most;
    - red ink, which absorbs green strongly and blue nearly as much. So do lakes of blood;
    - purple ink, which absorbs red and green, and less blue than the section's own stains do.

    Measured on tiles of 150 um, a third of a section's under a stroke of a felt pen over two fifths of the tile
    (`pen_rates` in ``tests/test_quality.py``), flagged above 0.05 of the area. Hits on six real and twelve made-up
    sections: 0.94 and 1.00 at least, for black, blue, green, red, purple, and yellow, orange, green and purple
    highlighter (the lowest). Where a stroke is half as dense: black, blue, green, yellow and orange 1.00; red 0.91
    and 0.25; purple 0.88 and 0.69; purple highlighter 0.79 and 0.62; green highlighter 1.00 and 0.58. False alarms:
    2 of 1,195 real tiles without a mark (both in the mouse colon), none of 2,557 made-up ones. Pink highlighter looks
    like eosin and is not told apart.
    """
    most_red, least_blue = hues
    called = (red - green > 0.12) & ((red > 0.3) | (blue > 0.3))
    called |= (red > 0.3) & (red > most_red * green)
    lightest = (red > 0.45) & (green > 0.45) & (blue > 0.45)
    alike = (red > 0.7 * green) & (red > 0.7 * blue) & (blue > 0.7 * red) & (blue > 0.7 * green)
    called |= lightest & alike & (green > 0.7 * red) & (green > 0.7 * blue)
    called |= (blue > 0.25) & (blue - green > 0.02)
    called |= (green > 0.6) & (blue > 0.75 * green)
    called |= (green > 0.25) & (red > 0.25 * green) & (blue < least_blue * green)
    return called


def _usual_hues(tiles: np.ndarray | JpegTiles, um_per_px: float) -> tuple[float, float]:
    """Most red and least blue, both over green in optical density, of tissue that a section's stains make.

    Three times as far from the median over squares of tissue as the quartile on the other side, which ink does not
    reach, and a fifth at least: stains and scanners differ more between sections than ink does from any of them.
    Where there are fewer than 100 squares, infinity and 0, beyond which nothing lies.
    """
    rows = np.unique(np.linspace(0, len(tiles) - 1, SAMPLE).astype(int))
    at_once = max(1, TILES_AT_ONCE_PX // (tiles.shape[1] * tiles.shape[2]))
    parts = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
    density = [_cells(*_at_scale(tiles[part], um_per_px))[1].transpose(1, 2).flatten(0, 1) for part in parts]
    red, green, blue = torch.cat(density).T
    tissue = (green > 0.2) & (green - (red + blue) / 2 > GREENEST)
    if tissue.sum() < 100:
        return np.inf, 0.0
    quartile, middle = np.percentile((red / green)[tissue].numpy(), [25, 50])
    most_red = max(middle + 3 * (middle - quartile), 1.2 * middle)
    middle, quartile = np.percentile((blue / green)[tissue].numpy(), [50, 75])
    return float(most_red), float(min(middle - 3 * (quartile - middle), 0.8 * middle))


def _measure(tiles: torch.Tensor, um_per_px: float, hues: tuple[float, float]) -> torch.Tensor:
    """`measure` of (B, 3, h, w) colours 0..255, (B, 10)."""
    colour, density = _cells(tiles, um_per_px)
    red, green, blue = density.unbind(1)
    tissue = (green - (red + blue) / 2 > GREENEST) | (density.mean(1) > DENSE)
    pen = ink(red, green, blue, hues)
    tissue &= ~pen
    saturation = 1 - colour.amin(1) / colour.amax(1).clamp(min=1)
    fold = tissue & (saturation - colour.mean(1) / 255 > FOLD)
    shares = [mask.float().mean(1) for mask in (tissue, pen, fold)]
    weight = tissue.float() / tissue.sum(1, keepdim=True)  # 0 / 0 is NaN without tissue
    means = [(weight[:, None] * values).sum(2) for values in (density, colour)]
    luminance = (tiles * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    return torch.cat([torch.stack([shares[0], blur(luminance), *shares[1:]], dim=1), *means], dim=1)


def blur(image: torch.Tensor, width: int = 9) -> torch.Tensor:
    """Blur metric of Crete et al. 2007 of images (B, h, w): 0 sharp, 1 blurred; (B,).

    Notes
    -----
    Where the window of `width` pixels (theirs) would reach beyond the image, differences are not counted.
    """
    if min(image.shape[1:]) < width + 1:
        return torch.full((len(image),), torch.nan)
    worst = []
    for axis, window in ((1, (width, 1)), (2, (1, width))):
        blurred = F.avg_pool2d(image[:, None], window, stride=1)[:, 0].diff(dim=axis).abs()
        sharp = image.diff(dim=axis).abs().narrow(axis, width // 2, blurred.shape[axis])
        lost = (sharp - blurred).clamp(min=0).sum((1, 2))
        whole = sharp.sum((1, 2))
        worst.append((whole - lost) / whole)  # 0 / 0 is NaN
    return torch.maximum(*worst)
