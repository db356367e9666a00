"""Figures of the report, as plain values that its page draws."""

from __future__ import annotations

import base64
import io
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from stexp.metrics import pearson_per_gene

MISSING = 255  # code of a value that is not there
LEVELS = {
    "observed": 254,
    "predicted": 254,
    "uncertainty": 14,
}  # steps of a gene's range; the last is only read, not seen
IMAGE_PX = 1200


def is_oracle(floor: str) -> bool:
    """Whether a floor reads the counts of the test spots; those that do say it in their name."""
    return floor.endswith("_oracle")


@dataclass(frozen=True)
class Bar:
    """One predictor's score, and its score in every section."""

    name: str
    kind: str  # "method", "floor" or "oracle"
    value: float | None
    sections: list[float]


@dataclass(frozen=True)
class ScoreChart:
    """One score of the method, its floors and the ceiling, on one axis."""

    title: str
    bars: list[Bar]
    ceiling: float | None
    low: float
    high: float

    def x(self, value: float, width: float) -> float:
        """Where `value` lies on an axis of `width` px."""
        return round(width * (value - self.low) / (self.high - self.low), 1)

    @property
    def ticks(self) -> list[float]:
        """Round numbers along the axis, six at most."""
        span = self.high - self.low
        step = next((step for step in (0.02, 0.05, 0.1, 0.2) if span / step < 6), 0.5)
        first = math.ceil(self.low / step)
        return [round(i * step, 2) for i in range(first, math.floor(self.high / step) + 1)]


def score_chart(metrics: dict[str, Any], score: str, title: str) -> ScoreChart:
    """The method first, then floors from high to low, then oracles; the axis holds all of them.

    Parameters
    ----------
    metrics
        What ``metrics.json`` holds.
    score
        ``"pearson_acg"`` or ``"pearson_heg50"``.
    """
    sections = metrics["sections"].values()

    def bar(name: str, kind: str) -> Bar:
        own = [metrics["floors"][name] if kind != "method" else metrics["scores"]]
        own += [section["floors"].get(name, {}) if kind != "method" else section["scores"] for section in sections]
        value, *rest = (scores.get(score) for scores in own)
        return Bar(name, kind, value, [v for v in rest if v is not None])

    floors = [bar(name, "oracle" if is_oracle(name) else "floor") for name in metrics["floors"]]
    floors.sort(key=lambda bar: (bar.kind == "oracle", math.inf if bar.value is None else -bar.value))
    bars = [bar(metrics["model"], "method"), *floors]
    ceiling = metrics["ceiling"].get(score)
    values = [v for bar in bars for v in (bar.value, *bar.sections) if v is not None]
    values += [0.0, 0.1] if ceiling is None else [0.0, ceiling]
    span = max(values) - min(values)
    return ScoreChart(
        title, bars, ceiling, min(values) - (0.02 * span if min(values) < 0 else 0), max(values) + 0.04 * span
    )


def quantise(values: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0..levels over each gene's own range.

    Parameters
    ----------
    values : (N, G)
        NaN where there is no value.

    Returns
    -------
    codes : (G, N) uint8
        ``MISSING`` where there is no value.
    ranges : (2, G) float32
        Lowest and highest value of each gene, NaN where it has none. A code c stands for
        low + c / levels x (high - low).
    """
    genes = np.asarray(values, dtype=np.float32).T
    there = np.isfinite(genes)
    low = np.where(there, genes, np.inf).min(axis=1, initial=np.inf)
    high = np.where(there, genes, -np.inf).max(axis=1, initial=-np.inf)
    empty = ~there.any(axis=1)
    low[empty] = high[empty] = np.nan
    step = np.where(high > low, (high - low) / levels, 1).astype(np.float32)
    with np.errstate(invalid="ignore"):
        codes = np.rint((genes - low[:, None]) / step[:, None])
    return np.where(there, codes, MISSING).astype(np.uint8), np.stack([low, high])


def pack(array: np.ndarray) -> str:
    """Array as base64 of its zlib-compressed little-endian bytes, which browsers unpack by themselves."""
    array = np.ascontiguousarray(array)
    return base64.b64encode(zlib.compress(array.astype(array.dtype.newbyteorder("<")).tobytes())).decode("ascii")


def jpeg(image: np.ndarray) -> str:
    """(h, w, 3) uint8 image as a data URI, at most ``IMAGE_PX`` px long."""
    picture = Image.fromarray(np.asarray(image, dtype=np.uint8)).convert("RGB")
    picture.thumbnail((IMAGE_PX, IMAGE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def section_maps(predictions: ad.AnnData) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What the maps of every section need.

    Returns
    -------
    sections
        One record per section, in order of appearance: name, patient, spot ids, where each prediction
        came from, image with its extent in level-0 px, spot diameter in level-0 px, layers there are.
    arrays
        Packed arrays by ``"<section number>-<what>"``: ``xy`` (N, 2) and ``pearson`` (G,) float32, and
        for each layer its codes (G, N) uint8 and ``<layer>-range`` (2, G) float32.
    """
    sections, arrays = [], {}
    for number, name in enumerate(dict.fromkeys(predictions.obs["section"].astype(str))):
        rows = (predictions.obs["section"].astype(str) == name).to_numpy()
        obs = predictions.obs[rows]
        layers = {key: np.asarray(predictions.layers[key][rows]) for key in LEVELS if key in predictions.layers}
        layers = {key: values for key, values in layers.items() if key != "uncertainty" or np.isfinite(values).any()}
        for key, values in layers.items():
            codes, ranges = quantise(values, LEVELS[key])
            arrays[f"{number}-{key}"], arrays[f"{number}-{key}-range"] = pack(codes), pack(ranges)
        xy = np.asarray(predictions.obsm["spatial"], dtype=np.float32)[rows]
        arrays[f"{number}-xy"] = pack(xy)
        arrays[f"{number}-pearson"] = pack(np.float32(pearson_per_gene(layers["observed"], layers["predicted"])))
        spatial = predictions.uns.get("spatial", {}).get(name, {})
        scale = spatial.get("scalefactors", {})
        image = spatial.get("images", {}).get("hires")
        sections.append(
            {
                "name": name,
                "patient": str(obs["patient"].iloc[0]),
                "spots": obs["spot"].astype(str).tolist(),
                "source": _sources(obs["neighbour_section"], obs["neighbour_section_weight"])
                if "neighbour_section" in obs
                else None,
                "image": None
                if image is None
                else {
                    "uri": jpeg(image),
                    "width": image.shape[1] / float(scale["tissue_hires_scalef"]),
                    "height": image.shape[0] / float(scale["tissue_hires_scalef"]),
                },
                "spot_px": float(scale.get("spot_diameter_fullres", 0)) or _typical_diameter(xy),
                "layers": list(layers),
            }
        )
    return sections, arrays


def _sources(names: Iterable[str], weights: Iterable[float]) -> list[str]:
    return [f"{name} ({weight:.0%} of the weight)" for name, weight in zip(names, weights, strict=True)]


def _typical_diameter(xy: np.ndarray) -> float:
    """Half the pitch of the array, which all platforms come near to."""
    if len(xy) < 2:
        return 1.0
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])) / 2 or 1.0
