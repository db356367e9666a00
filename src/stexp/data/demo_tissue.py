"""Made-up tissue and how it looks under H&E: compartments, nuclei, fibres, fat, stain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd
from PIL import Image
from scipy.spatial import cKDTree

Rng = np.random.Generator
Size = tuple[float, float]
Shape = tuple[int, int]
Tissue = dict[str, np.ndarray]  # fields on the grid: the compartments, "packed" and "angle"

GRID_UM = 8.0  # pitch of the grid on which tissue is laid out


HAEMATOXYLIN = (0.65, 0.70, 0.29)  # optical density of red, green, blue; Ruifrok & Johnston 2001
EOSIN = (0.14, 0.80, 0.38)


@dataclass(frozen=True)
class Cells:
    """How the nuclei of one compartment look; lengths in micrometres."""

    spacing: float
    kept: float  # share of the places of a jittered grid that hold a nucleus
    radius: float
    elongation: float  # long over short axis
    stain: float  # haematoxylin
    rim: float  # how much paler the middle is: open chromatin


CELLS = {
    "tumour": Cells(12.5, 0.95, 4.6, 1.25, 0.75, 0.5),
    "stroma": Cells(21.0, 0.60, 3.3, 2.8, 0.80, 0.0),
    "immune": Cells(8.5, 0.85, 2.9, 1.05, 1.15, 0.0),
    "fat": Cells(30.0, 0.12, 2.6, 1.8, 0.80, 0.0),
}
COMPARTMENTS = tuple(CELLS)


def random_field(rng: Rng, shape: tuple[int, ...], length: float) -> np.ndarray:
    """Smooth random field, mean about 0, variance about 1; `length` in cells of the grid."""
    nodes = [int(np.ceil(n / length)) + 3 for n in shape]
    noise = Image.fromarray(rng.standard_normal(nodes, dtype=np.float32))
    x, y = rng.random(2)
    box = (x, y, x + shape[1] / length, y + shape[0] / length)
    return 1.6 * np.asarray(noise.resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box=box))


def _step(field: np.ndarray, at: float, width: float) -> np.ndarray:
    return np.clip((field - at) / width + 0.5, 0, 1)


def lay_out_tissue(block: Rng, cut: Rng, size_um: Size) -> Tissue:
    """How much of each place belongs to each compartment, on the grid; all zero on bare glass."""
    shape = (round(size_um[1] / GRID_UM), round(size_um[0] / GRID_UM))
    whole = size_um[0] / GRID_UM  # lengths that scale with the section

    def field(length: float) -> np.ndarray:
        octaves = ((0.86 * 0.5**i, length / 2**i) for i in range(4))  # ragged, as the borders of tissue are
        parts = (a * (0.96 * random_field(block, shape, n) + 0.28 * random_field(cut, shape, n)) for a, n in octaves)
        return reduce(np.add, parts)

    v, u = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
    radius = (np.abs(u) ** 3 + np.abs(v) ** 3) ** (1 / 3)
    angle = block.uniform(0, 2 * np.pi)
    side = u * np.cos(angle) + v * np.sin(angle)  # fat lies at one side of the block
    glass = _step(radius + 0.06 * field(whole / 5), 0.85, 0.02)
    fat = _step(field(whole / 5) + 1.8 * side, 1.7, 0.1)
    region = field(whole / 4) - 0.8 * side
    rim = 4 * _step(region, -0.35, 2.0) * (1 - _step(region, -0.35, 2.0))  # of the tumour
    region = _step(region, -0.35, 0.15)
    nest = np.abs(field(whole / 12))
    tumour = region * _step(nest, 0.3, 0.12)  # septa run where the field is near zero
    lumen = region * _step(nest, 2.35, 0.1)
    immune = _step(field(whole / 9) + 0.6 * rim, 1.3, 0.7)
    kept, tissue = 1 - np.maximum(glass, lumen), {}
    for name, share in (("fat", fat), ("tumour", tumour), ("immune", immune)):
        tissue[name] = kept * share
        kept = kept * (1 - share)
    tissue["stroma"] = kept
    tissue["packed"] = 0.55 + 0.45 * _step(field(whole / 8), 0, 2.5)  # how densely nuclei lie
    tissue["angle"] = 0.5 * np.pi * random_field(block, shape, whole / 5)  # of collagen fibres
    return tissue


def values_at(field: np.ndarray, xy_um: np.ndarray) -> np.ndarray:
    """Values of a field on the grid at positions in micrometres."""
    x, y = (np.clip((xy_um[:, i] / GRID_UM).astype(int), 0, field.shape[1 - i] - 1) for i in (0, 1))
    return field[y, x]


def place_nuclei(rng: Rng, tissue: Tissue, size_um: Size) -> pd.DataFrame:
    """Columns x, y, a, b (half axes), all micrometres, angle, stain, rim, kind (index into `COMPARTMENTS`)."""
    parts = []
    for kind, (name, cells) in enumerate(CELLS.items()):
        xy = np.stack(np.meshgrid(*(np.arange(0.5, n / cells.spacing) for n in size_um)), axis=-1).reshape(-1, 2)
        xy[:, 0] += 0.5 * (np.floor(xy[:, 1]) % 2)
        xy = cells.spacing * (xy + rng.uniform(-0.36, 0.36, xy.shape))
        xy = xy[rng.random(len(xy)) < cells.kept * values_at(tissue[name] * tissue["packed"], xy)]
        n = len(xy)
        radius = cells.radius * np.exp(0.16 * rng.standard_normal(n))
        ratio = np.sqrt(cells.elongation * np.exp(0.15 * rng.standard_normal(n)))
        spread = 0.25 if name == "stroma" else np.pi  # spindle cells lie along the fibres
        parts.append(
            pd.DataFrame(
                {
                    "x": xy[:, 0],
                    "y": xy[:, 1],
                    "a": radius * ratio,
                    "b": radius / ratio,
                    "angle": values_at(tissue["angle"], xy) + spread * rng.uniform(-1, 1, n),
                    "stain": cells.stain * rng.uniform(0.75, 1.2, n),
                    "rim": cells.rim,
                    "kind": kind,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def paint(block: Rng, cut: Rng, tissue: Tissue, nuclei: pd.DataFrame, size_px: Shape, um_per_px: float) -> np.ndarray:
    """Light through the stains (Beer-Lambert), (height, width, 3) uint8."""
    full = {name: _enlarge(tissue[name], size_px) for name in COMPARTMENTS}
    shape = (size_px[1], size_px[0])
    fibres = _enlarge(_fibres(cut, tissue["angle"]), size_px)
    grain = random_field(cut, shape, 5 / um_per_px)
    membranes = _fat_membranes(cut, full["fat"], um_per_px)
    drawn = _draw(nuclei, shape, um_per_px)

    cytoplasm = 1 + 0.16 * grain
    thickness = 1 + 0.12 * _enlarge(random_field(cut, tissue["fat"].shape, 60), size_px)
    eosin = full["tumour"] * 0.28 * cytoplasm + full["immune"] * 0.17 * cytoplasm
    eosin += full["stroma"] * np.clip(0.34 + 0.13 * fibres, 0.03, 1) + full["fat"] * 0.36 * membranes
    eosin *= thickness
    haematoxylin = full["tumour"] * 0.15 * cytoplasm + full["immune"] * 0.08 * cytoplasm + full["stroma"] * 0.03
    eosin *= 1 - 0.5 * np.minimum(drawn, 1)
    haematoxylin += drawn * (1 + 0.12 * grain)

    strength = np.exp(block.uniform(-0.25, 0.25, 2))  # batches of stain
    colours = np.array([HAEMATOXYLIN, EOSIN]) * np.exp(0.08 * block.standard_normal((2, 3)))
    density = np.stack([haematoxylin, eosin], axis=-1) @ (strength[:, None] * colours).astype(np.float32)
    light = np.array([243, 242, 244], dtype=np.float32) * np.exp(-1.5 * density)
    light += 2.0 * cut.standard_normal(shape, dtype=np.float32)[..., None]
    return np.clip(light, 0, 255).astype(np.uint8)


def _enlarge(field: np.ndarray, size_px: Shape) -> np.ndarray:
    return np.asarray(Image.fromarray(field.astype(np.float32)).resize(size_px, Image.Resampling.BILINEAR))


def _fibres(rng: Rng, angle: np.ndarray, step_um: float = 4.0) -> np.ndarray:
    """White noise averaged along the fibre angle (line integral convolution), unit variance."""
    height, width = shape = tuple(int(n * GRID_UM / step_um) for n in angle.shape)
    angle = _enlarge(angle, (width, height))
    dx, dy = np.cos(angle), np.sin(angle)
    noise = rng.standard_normal(shape, dtype=np.float32)
    total = np.zeros(shape, dtype=np.float32)
    y0, x0 = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    for reach in range(-10, 11):
        x = np.clip(x0 + reach * dx, 0, shape[1] - 1).astype(np.int32)
        y = np.clip(y0 + reach * dy, 0, shape[0] - 1).astype(np.int32)
        total += noise[y, x]
    return total / total.std()


def _fat_membranes(rng: Rng, fat: np.ndarray, um_per_px: float, cell_um: float = 62.0) -> np.ndarray:
    """1 on the walls between fat vacuoles, 0 inside them: the borders of a Voronoi tessellation."""
    walls = np.zeros(fat.shape, dtype=np.float32)
    y, x = np.nonzero(fat > 0.02)
    cell = cell_um / um_per_px
    centres = np.stack(np.meshgrid(*(np.arange(-1, n / cell + 1) for n in fat.shape[::-1])), axis=-1).reshape(-1, 2)
    centres = cell * (centres + rng.uniform(-0.42, 0.42, centres.shape))
    distance, _ = cKDTree(centres).query(np.stack([x, y], axis=1), k=2)
    walls[y, x] = np.clip(1.7 - (distance[:, 1] - distance[:, 0]) * um_per_px / 4, 0, 1)
    return walls


def _draw(nuclei: pd.DataFrame, shape: Shape, um_per_px: float) -> np.ndarray:
    """Haematoxylin of all nuclei, (height, width) float32."""
    canvas = np.zeros(shape[0] * shape[1], dtype=np.float32)
    for _, group in nuclei.groupby("kind"):
        columns = group[["x", "y", "a", "b"]].to_numpy(np.float32).T / um_per_px
        x, y, a, b = (column[:, None] for column in columns)
        angle, stain, rim = (group[name].to_numpy(np.float32)[:, None] for name in ("angle", "stain", "rim"))
        reach = int(np.ceil(a.max())) + 1
        offset = np.arange(-reach, reach + 1, dtype=np.float32)
        oy, ox = (o.reshape(1, -1) for o in np.meshgrid(offset, offset, indexing="ij"))
        px, py = np.floor(x) + ox, np.floor(y) + oy
        dx, dy = px + 0.5 - x, py + 0.5 - y
        along = (dx * np.cos(angle) + dy * np.sin(angle)) / a
        across = (dy * np.cos(angle) - dx * np.sin(angle)) / b
        r = np.hypot(along, across)
        inside = np.clip((1 - r) * b + 0.5, 0, 1)  # half a pixel of soft edge
        value = stain * inside * (1 - rim * np.clip(1 - r, 0, 1))
        seen = (inside > 0) & (px >= 0) & (py >= 0) & (px < shape[1]) & (py < shape[0])
        where = py[seen].astype(np.int64) * shape[1] + px[seen].astype(np.int64)
        np.maximum.at(canvas, where, value[seen])
    return canvas.reshape(shape)
