"""Figures of the report, as plain values that its page draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stexp.evaluation.verdict import is_oracle


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
    return ScoreChart(title, bars, ceiling, *axis_of(bars, ceiling))


def axis_of(bars: list[Bar], ceiling: float | None) -> tuple[float, float]:
    """Ends of an axis that holds bars, their sections, 0 and the ceiling."""
    values = [v for bar in bars for v in (bar.value, *bar.sections) if v is not None]
    values += [0.0, 0.1] if ceiling is None else [0.0, ceiling]
    span = max(values) - min(values)
    return min(values) - (0.02 * span if min(values) < 0 else 0), max(values) + 0.04 * span
