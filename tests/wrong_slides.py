"""The image of a demo section, and what is wrong with it on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

SEED = 0


def _turned(image: Image.Image) -> Image.Image:
    """Hue by a third of the circle: what was purple is green."""
    hue, saturation, value = image.convert("HSV").split()
    return Image.merge("HSV", (hue.point(lambda level: (level + 170) % 256), saturation, value)).convert("RGB")


def _pale(image: Image.Image) -> Image.Image:
    return Image.fromarray((255 * (np.asarray(image) / 255.0) ** 0.25).astype(np.uint8))


def _noise(image: Image.Image) -> Image.Image:
    rng = np.random.default_rng(SEED)
    return Image.fromarray(rng.integers(0, 256, (*image.size[::-1], 3), dtype=np.uint8))


def _photograph(image: Image.Image) -> Image.Image:
    """Sky over ground, with the grain of a film."""
    width, height = image.size
    y, x = np.mgrid[:height, :width] / max(width, height)
    colours = np.stack([90 + 100 * y + 30 * x, 130 + 20 * y, 220 - 180 * y], axis=2)
    colours += np.random.default_rng(SEED).normal(0, 6, colours.shape)
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8))


WRONG: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half": lambda image: image.resize([n // 2 for n in image.size], Image.Resampling.BILINEAR),
    "double": lambda image: image.resize([2 * n for n in image.size], Image.Resampling.BILINEAR),
    "channels": lambda image: Image.merge("RGB", image.split()[::-1]),
    "hue": _turned,
    "pale": _pale,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(2)),  # 4 um
    "noise": _noise,
    "photograph": _photograph,
    "white": lambda image: Image.new("RGB", image.size, (250, 250, 250)),
}
"""Name -> what makes a slide of the right one, that is said to be of the scale of the right one."""


def write(name: str, right: Path, folder: Path) -> Path:
    with Image.open(right) as image:
        wrong = WRONG[name](image.convert("RGB"))
    path = folder / f"{name}.jpg"
    wrong.save(path, quality=92)
    return path
