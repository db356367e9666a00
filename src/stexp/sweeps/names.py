"""Names of the folders of a sweep's runs; recorded runs are found by them, so they do not change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stexp.sweeps.settings import default_settings, flat, typed

NOT_IN_NAME = (
    *(
        "fold",
        "seed",
        "output_dir",
        "overwrite",
        "verbose",
        "sweep",
        "plugins",
        "hydra.",
        "hardware.",
        "logger.",
        "callbacks.",
    ),
    *("data.name", "data.cache_dir", "data.placement", "data.eval_batch_size", "data.sections_of", "data.download"),
    *("data.mirror", "data.keep_archives", "trainer.accelerator", "trainer.devices", "trainer.log_every_n_steps"),
)
"""How keys begin that say where and how fast a run is made, not what it is."""
TWINS = {"data.reader.": "data.", "model.image_encoder.": "image_encoder."}
"""Where the same settings stand a second time."""
LONGEST = 120


def method_name(settings: Mapping[str, Any], choices: Mapping[str, str], sources: Mapping[str, str]) -> str:
    """The model and every setting that differs from the defaults of its data, protocol and model.

    Parameters
    ----------
    settings
        The resolved config.
    choices
        Group -> choice.
    sources
        Where choices come from besides ``conf/``; see :func:`~stexp.sweeps.settings.sources_in`.
    """
    groups = [*typed(sources), *(f"{group}={choices[group]}" for group in ("data", "protocol", "model"))]
    before, encoder = default_settings(*groups)
    parts = []
    if choices["image_encoder"] != encoder:
        parts = [f"image_encoder_{choices['image_encoder']}"]
        before, _ = default_settings(*groups, f"image_encoder={choices['image_encoder']}")
    now = flat(settings)
    differing = _differing(before, now)
    short = {key: key if key.startswith("protocol.") else key.rpartition(".")[2] for key in differing}
    for key in differing:
        name = short[key] if list(short.values()).count(short[key]) == 1 else key
        value = now.get(key)
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(f"{name}_{f'{Path(text).name}.{_digest(text)}' if '/' in text else text}")
    text = "-".join([str(now["model.name"]), *parts])
    # long ones are cut, and kept apart by a digest
    return text if len(text) <= LONGEST else f"{text[:100]}..{_digest(text)}"


def fold_name(fold: str, seed: str | int) -> str:
    """The folder of one fold and seed."""
    return f"{fold.replace('/', '_')}-s{seed}"


def rescored_name(changes: Mapping[str, str]) -> str:
    """The folder of a run that was retrieved again, as ``stexp-score`` names it."""
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys by which two configs differ in what a run is, each difference once."""
    keys = [
        key
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith((*NOT_IN_NAME, "model.name"))
    ]
    for twin, original in TWINS.items():
        originals = {key.removeprefix(original) for key in keys if key.startswith(original)}
        keys = [key for key in keys if not (key.startswith(twin) and key.removeprefix(twin) in originals)]
    # what model takes over from protocol is named once, in full
    return [key for key in keys if not (key.startswith("model.") and f"protocol.{key[6:]}" in keys)]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
