"""Names of methods in a table: what differs between runs, in as few words as tell them apart."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any


def label_methods(settings: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Name every run's method by what differs between the runs.

    The model; its image encoder and whether that is frozen, fine-tuned or from scratch, where these differ; then as
    few other settings as tell the rest apart.

    Returns
    -------
    labels
        One a run; equal for equal methods.
    besides
        Settings of data and training that differ and are in no label.
    """
    differing = [
        key
        for key in dict.fromkeys(key for each in settings for key in each)
        # a key that only some have came with another version or model, and tells nothing by itself
        if len({json.dumps(each[key]) for each in settings if key in each}) > 1
    ]
    methods = [json.dumps([each.get(key) for key in differing]) for each in settings]
    # settings of the model first, those of the image encoder last: its name and training stand in the name already
    order = {"model": 0, "image_encoder": 2}
    differing.sort(key=lambda key: order.get(key.split(".")[0], 1))
    few = [keys for n in range(min(len(differing), 3) + 1) for keys in combinations(differing, n)]
    for keys in [*few, tuple(differing)]:
        labels = _labels(settings, keys)
        if len(set(zip(labels, methods, strict=True))) == len(set(labels)):
            break
    return labels, [key for key in differing if key not in keys and key.startswith(("data.", "trainer."))]


def _labels(settings: list[dict[str, Any]], keys: tuple[str, ...]) -> list[str]:
    """Model, encoder and its training where these differ, and the values of some settings."""
    names = [(each.get("model.name"), each.get("image_encoder.name"), _training(each)) for each in settings]
    shown = [i for i in range(3) if i == 0 or len({name[i] for name in names if name[i]}) > 1]
    return [
        " ".join(
            [str(name[i]) for i in shown if name[i]]
            + [f"{key.split('.')[-1]}={_text(each[key])}" for key in keys if each.get(key) is not None]
        )
        for name, each in zip(names, settings, strict=True)
    ]


def _training(settings: dict[str, Any]) -> str | None:
    """How the image encoder learned; None of a method without one."""
    if "image_encoder.name" not in settings:
        return None
    frozen, pretrained = settings.get("image_encoder.frozen"), settings.get("image_encoder.pretrained")
    if frozen:
        return "frozen" if pretrained else "random, frozen"
    if settings.get("image_encoder.tuning", "all") == "last":
        return f"last {settings['image_encoder.last_blocks']} blocks fine-tuned"
    if settings.get("image_encoder.tuning", "all") == "lora":
        return "LoRA"
    return "fine-tuned" if pretrained else "from scratch"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")
